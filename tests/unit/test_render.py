"""How answers are spoken of: what was kept, reused and computed, what full prefill would have taken, what made room."""

from dataclasses import replace

from quire import render
from quire.session import Found
from quire_engine.types import Answered, Forecast, Timings, TokenCounts

FOUND = Found((), 3.0)
FORECAST = Forecast(1_600, 200, 0.16, "", 400.0, 3_000.0, kept_tokens=1_200, dropped=0)
TIMINGS = Timings(0.0, 20.0, 90.0, 210.0, 40.0, 450.0, 2_000.0, resume_ms=60.0)
FOLLOW_UP = Answered(TokenCounts(1_600, 300, 70, 60, 40, kept=1_200), TIMINGS, 0.16, "end")
FIRST = replace(FOLLOW_UP, tokens=TokenCounts(400, 300, 70, 60, 40))
ALL_FRESH = replace(FOLLOW_UP, tokens=TokenCounts(400, 0, 0, 430, 40))


def test_a_follow_up_says_what_was_kept() -> None:
    line = render.truth_line(FOUND, FORECAST, FOLLOW_UP)

    assert line.startswith(
        "1,200 tokens kept, 300 reused, 70 recomputed, 60 fresh (ratio 0.16) | search 3 ms, resume 60"
    )
    assert "first word 453 ms, full prefill about 3.0 s | saved about 2.5 s: " in line
    assert "2.2 s by kept turns, 341 ms by stored passages | 20 tokens/s" in line
    expected = "1,600 tokens of context, 1,200 of them kept, 200 not cached yet; first word in about 400 ms"
    assert render.forecast_line(FORECAST).startswith(expected)


def test_a_first_question_has_kept_nothing() -> None:
    assert render.truth_line(FOUND, FORECAST, FIRST).startswith("300 tokens reused, 70 recomputed, 60 fresh")
    assert "kept turns" not in render.truth_line(FOUND, FORECAST, FIRST)
    forecast = replace(FORECAST, kept_tokens=0)
    assert render.forecast_line(forecast).startswith("1,600 tokens of context, 200 of them not cached yet;")


def test_nothing_is_saved_where_nothing_was_reused() -> None:
    assert "full prefill" not in render.truth_line(FOUND, FORECAST, ALL_FRESH)
    assert render.saved_ms(FORECAST, ALL_FRESH) == 0.0
    assert render.saved_ms(FORECAST, FOLLOW_UP) == 2_550.0


def test_a_follow_up_that_reads_its_passages_in_full_saves_what_was_kept() -> None:
    exact = replace(FOLLOW_UP, tokens=TokenCounts(1_600, 0, 0, 430, 40, kept=1_200), ratio=1.0)

    assert render.saved_ms(FORECAST, exact) == 2_550.0
    assert "the rest read in full" in render.forecast_line(replace(FORECAST, ratio=1.0))


def test_what_left_a_full_context_is_said() -> None:
    assert render.dropped_line(FORECAST) == ""
    assert render.dropped_line(replace(FORECAST, dropped=1)).endswith("1 passage of earlier questions made room.")
    assert "2 passages" in render.dropped_line(replace(FORECAST, dropped=2))


def test_scripts_learn_what_was_kept() -> None:
    answer = render.answer_json("Yes.", FOUND, FORECAST, FOLLOW_UP, {})

    assert answer["tokens"] == {
        "context": 1_600, "kept": 1_200, "reused": 300, "recomputed": 70, "fresh": 60, "generated": 40
    }  # fmt: skip
    assert isinstance(answer["timings"], dict)
    assert answer["timings"]["resume_ms"] == 60.0
