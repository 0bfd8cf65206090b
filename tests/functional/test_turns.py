"""Conversations through the engine: follow-ups grow the live context, and whatever is gone comes back the same."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import stitching
from quire_engine.engine import Engine, Request
from quire_engine.runtimes.llama_cpp import LlamaCppRuntime
from quire_engine.types import Answered, Event, Exchange, Forecast, Text
from stitching import SETTINGS

Tiny = Callable[[str], Path]

PASSAGES = (
    *stitching.PASSAGES,
    "The ferry leaves at noon, and in winter not at all when the wind comes from the north.",
)
FIRST = Request("When was it built?", PASSAGES[:2], 0.3, max_tokens=8, insist=True, keep=True)


@pytest.fixture
def start(tiny: Tiny, checked: Path, tmp_path: Path) -> Callable[[], Engine]:
    """A new process, as it were, with the same cache."""
    cache = Path(shutil.copytree(checked, tmp_path / "cache"))
    return lambda: Engine(tiny("llama"), cache, SETTINGS)


def ask(engine: Engine, request: Request) -> tuple[Exchange, Forecast, Answered]:
    events: list[Event] = list(engine.answer(request))
    forecast, *texts, end = events
    assert isinstance(forecast, Forecast)
    assert isinstance(end, Answered)
    counts = end.tokens
    question = len(engine._writer.question(request.question))
    assert counts.context + question == counts.kept + counts.reused + counts.recomputed + counts.fresh
    answer = "".join(text.text for text in texts if isinstance(text, Text))
    return Exchange(request.passages, request.question, answer), forecast, end


def follow(request: Request, *history: Exchange, passages: tuple[str, ...] = PASSAGES[2:3]) -> Request:
    return replace(request, question="And the press?", passages=passages, history=history)


def live_keys(engine: Engine) -> np.ndarray:
    """Keys of the whole live sequence."""
    return engine.runtime.rows(0, engine.runtime.live_tokens)[0].astype(np.float32)


def test_a_follow_up_computes_only_what_is_new(start: Callable[[], Engine]) -> None:
    engine = start()
    engine.cache(PASSAGES)
    first, _, _ = ask(engine, FIRST)
    held = engine.runtime.live_tokens
    before = live_keys(engine)
    _, forecast, end = ask(engine, follow(FIRST, first))
    assert end.tokens.kept == held
    assert abs(forecast.kept_tokens - held) <= 8, "an answer may be cut into other tokens than it was made of"
    assert end.tokens.fresh == len(engine._writer.bridge(documents=True)) + len(
        engine._writer.question("And the press?")
    )
    np.testing.assert_array_equal(live_keys(engine)[:, :held], before)


def test_passages_that_stand_in_the_conversation_are_not_added_again(start: Callable[[], Engine]) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    held = engine.runtime.live_tokens
    _, _, end = ask(engine, follow(FIRST, first, passages=PASSAGES[:2]))
    assert end.tokens.kept == held
    assert end.tokens.reused == end.tokens.recomputed == 0
    assert end.tokens.context == held + len(engine._writer.bridge(documents=False))


def test_an_exact_follow_up_is_full_prefill_of_the_whole_conversation(start: Callable[[], Engine]) -> None:
    engine = start()
    first = Exchange(PASSAGES[:2], "When was it built?", "In 1871.")
    request = follow(replace(FIRST, ratio=1.0, max_tokens=1, keep=False), first)
    ask(engine, request)
    keys, writer = live_keys(engine), engine._writer
    tokens = (
        *writer.preamble,
        *(token for passage in first.passages for token in writer.chunk(passage)),
        *writer.question(first.question),
        *writer.answer(first.answer),
        *writer.bridge(documents=True),
        *writer.chunk(PASSAGES[2]),
        *writer.question(request.question),
    )
    assert len(tokens) == keys.shape[1]
    engine.runtime.rewind(0)
    engine.runtime.extend(tokens)
    assert np.abs(live_keys(engine) - keys).max() < 0.05


def test_reopening_loads_the_turns(start: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    second, _, _ = ask(engine, follow(FIRST, first))
    held, keys = engine.runtime.live_tokens, live_keys(engine)
    reopened = start()
    monkeypatch.setattr(LlamaCppRuntime, "encode", lambda *_: pytest.fail("a passage was encoded again"))
    _, forecast, end = ask(reopened, follow(FIRST, first, second, passages=PASSAGES[:1]))
    assert end.tokens.kept == held
    assert abs(forecast.kept_tokens - held) <= 16
    assert end.timings.resume_ms > 0
    assert np.abs(live_keys(reopened)[:, :held] - keys).max() < 0.1, "eight bits"


def test_branches_share_what_comes_before_them(start: Callable[[], Engine]) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    held = engine.runtime.live_tokens
    ask(engine, follow(FIRST, first))
    _, _, branch = ask(engine, follow(FIRST, first, passages=PASSAGES[3:4]))
    assert branch.tokens.kept == held
    _, _, other = ask(engine, replace(FIRST, question="Who built it?"))
    assert other.tokens.kept == 0
    _, _, back = ask(engine, follow(FIRST, first))
    assert back.tokens.kept == held, "from disk"


def test_asking_again_gives_the_same_answer(start: Callable[[], Engine]) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    second, _, _ = ask(engine, follow(FIRST, first))
    again, _, _ = ask(engine, follow(FIRST, first))
    assert again == second


@pytest.mark.parametrize("harm", ["delete", "flip"])
def test_a_damaged_turn_is_read_again(start: Callable[[], Engine], harm: str) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    (file,) = engine.turns.store.root.rglob("*.kv")
    if harm == "delete":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
    reopened = start()
    _, _, end = ask(reopened, follow(FIRST, first))
    assert end.tokens.kept > 0, "its passages are stored"
    assert end.tokens.fresh > 8 + len(reopened._writer.question("And the press?")), "its answer was read"
    _, _, once_more = ask(start(), follow(FIRST, first))
    assert once_more.tokens.kept > end.tokens.kept, "it was stored again"


def test_a_full_context_drops_passages_and_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    engine = Engine(tiny("small"), tmp_path, SETTINGS)
    history: tuple[Exchange, ...] = ()
    dropped = 0
    for number in range(8):
        passages = (f"Number {number}: {PASSAGES[number % 4]}",)
        exchange, forecast, end = ask(engine, replace(FIRST, passages=passages, history=history))
        assert end.tokens.context < engine.shape.context_tokens
        dropped += forecast.dropped
        history = (*history, exchange)
    assert dropped > 0


def test_stopping_leaves_the_conversation_as_it_was(start: Callable[[], Engine]) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    held = engine.runtime.live_tokens
    stopped = list(engine.answer(follow(FIRST, first), lambda: True))
    assert isinstance(stopped[-1], Answered)
    assert stopped[-1].ending == "stopped"
    _, _, end = ask(engine, follow(FIRST, first))
    assert end.tokens.kept == held


def test_caching_between_two_questions_keeps_the_conversation(start: Callable[[], Engine]) -> None:
    engine = start()
    first, _, _ = ask(engine, FIRST)
    held, keys = engine.runtime.live_tokens, live_keys(engine)
    engine.cache(PASSAGES)
    np.testing.assert_array_equal(live_keys(engine), keys)
    _, _, end = ask(engine, follow(FIRST, first))
    assert end.tokens.kept == held
    assert end.timings.resume_ms < end.timings.first_token_ms


def test_a_single_question_keeps_nothing(start: Callable[[], Engine]) -> None:
    engine = start()
    ask(engine, replace(FIRST, keep=False))
    assert not engine.turns.store.root.exists()


def test_going_back_and_forth(start: Callable[[], Engine]) -> None:
    """Forty questions at random places of a growing tree, with caching and stops in between: the memory of llama.cpp is
    in pieces by then, and every answer must still rest on the same rows as in a new process."""
    random = np.random.default_rng(7)
    engine = start()
    lines: list[tuple[Exchange, ...]] = [()]
    for number in range(40):
        history = lines[random.integers(len(lines))]
        passages = tuple(
            f"{PASSAGES[i]} ({random.integers(6)})" for i in random.permutation(4)[: random.integers(0, 4)]
        )
        request = replace(FIRST, question=f"Question {number}?", passages=passages, history=history)
        if random.random() < 0.2:
            engine.cache([f"{PASSAGES[0]} ({number})"])
        if random.random() < 0.2:
            list(engine.answer(request, lambda: True))
        exchange, _, _ = ask(engine, request)
        if len(history) < 5:
            lines.append((*history, exchange))
    longest = max(lines, key=len)
    request = replace(FIRST, question="And now?", passages=PASSAGES[:1], history=longest)
    ask(engine, request)
    other = start()
    ask(other, request)
    shared = other.runtime.live_tokens - 60
    assert engine.runtime.live_tokens == other.runtime.live_tokens
    assert np.abs(live_keys(engine)[:, :shared] - live_keys(other)[:, :shared]).max() < 0.1
