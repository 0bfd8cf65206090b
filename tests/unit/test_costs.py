"""Costs: rates out of two measurements, predictions out of rates, corrections out of surprises."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from quire_engine import costs
from quire_engine.costs import Costs, Rate, Spans

PREFILL, QUESTION, SPANS = Rate(2.0, 0.5), Rate(3.0, 4.0), Rate(2.5, 1.0)
RATES = Costs(PREFILL, QUESTION, SPANS, 0.75, 0.1, {"memory": 0.01, "disk": 0.2}, tile_tokens=64)


def test_full_prefill_pays_attention_to_half_of_itself_on_average() -> None:
    assert RATES.full(1000) == {"prefill": pytest.approx(1000 * (2.0 + 0.5 * 0.5))}


def test_every_step_of_a_stitched_answer() -> None:
    steps = RATES.stitched({"memory": 800, "disk": 200}, 50, Spans(200, 0.75), probe=True, compared=0.1, before=1000)
    asked = 50 * (3.0 + 4.0 * 2.025)
    assert steps == pytest.approx(
        {
            "load/memory": 8.0,
            "load/disk": 40.0,
            "probe": 0.75 * asked,
            "probe/values": 0.1 * 1000 * (2.0 + 0.5 * 0.5),
            "recompute": 200 * (2.5 + 1.0 * 1.75) + 0.1 * 1000,
            "question": asked,
        }
    )
    assert RATES.encode([100, 300], 50) == pytest.approx({"encode": 100 * (2 + 0.5 * 0.1) + 300 * (2 + 0.5 * 0.2)})
    assert RATES.resumed(500, 100, 20) == pytest.approx({"resume": 600 * 0.2 + 20 * (2.5 + 1.0 * 0.51)})


def test_a_long_question_is_read_like_a_passage() -> None:
    few, many = (RATES.stitched({}, tokens, Spans(0), probe=False)["question"] for tokens in (63, 64))
    assert (few, many) == pytest.approx((QUESTION.of(63, 0), PREFILL.of(64, 0)))


def test_nothing_is_paid_for_what_is_not_done() -> None:
    steps = RATES.stitched({"disk": 1000}, 100, Spans(0), probe=False)
    assert (steps["probe"], steps["probe/values"], steps["recompute"]) == (0, 0, 0)
    assert RATES.encode([], 50) == {"encode": 0}


def test_a_pool_that_nobody_measured_is_taken_for_a_disk() -> None:
    assert RATES.load_of("tape") == RATES.load_of("disk") == 0.2


def test_rates_come_back_out_of_what_they_predict() -> None:
    points = [(32, position, QUESTION.at(32, position)) for position in (200.0, 1500.0)]
    known = costs.rate(points[0], points[1])
    assert (known.compute_ms, known.attention_ms) == pytest.approx((3.0, 4.0))


def test_noisy_measurements_give_no_negative_rates() -> None:
    assert costs.rate((64, 128, 100.0), (64, 1536, 50.0)) == Rate(100 / 64, 0.0)
    assert costs.rate((64, 128, 1.0), (64, 1536, 900.0)).compute_ms > 0
    assert costs.rate((64, 128, 64.0), (64, 128, 64.0)) == Rate(1.0, 0.0)


def test_transfer_is_told_in_units_of_computing_and_learns_with_it() -> None:
    compute = 1000 * (2.5 + 0.5) + 100
    assert RATES.transfers() == pytest.approx({"memory": 10 / compute, "disk": 200 / compute})
    expected = RATES.stitched({"disk": 1000}, 50, Spans(100), probe=False)
    known = RATES.learn(expected, {"load": 4 * expected["load/disk"], "recompute": expected["recompute"]})
    assert known.transfers()["disk"] > 1.5 * RATES.transfers()["disk"]
    assert known.transfers()["memory"] < RATES.transfers()["disk"]
    slow = RATES.learn(expected, {"load": 3 * expected["load/disk"], "recompute": 3 * expected["recompute"]})
    assert slow.transfers() == pytest.approx(RATES.transfers()), "a busy machine is slow at both"


def test_what_a_step_took_is_divided_among_its_parts() -> None:
    expected = RATES.stitched({"memory": 1000, "disk": 10}, 0, Spans(0), probe=False)
    known = RATES.learn(expected | {"question": 100.0}, {"load": 3 * 12.0, "question": 100.0})
    few, many = known.corrections["load/disk"], known.corrections["load/memory"]
    assert 1 < few < many, "most of it was expected of memory"


def test_learning_moves_towards_what_happened() -> None:
    expected = RATES.full(1000)
    known = RATES
    errors = []
    for _ in range(12):
        known = known.learn(known.full(900, 100), {"prefill": 3 * expected["prefill"]})
        errors.append(abs(known.full(900, 100)["prefill"] / expected["prefill"] - 3))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3
    assert (known.prefill, known.load_ms) == (PREFILL, RATES.load_ms)


def test_one_wild_measurement_counts_as_four_times_at_most() -> None:
    expected = RATES.full(1000)
    for factor, limit in ((1000.0, 4.0), (0.0001, 0.25)):
        wild = RATES.learn(expected, {"prefill": factor * expected["prefill"]})
        assert wild == RATES.learn(expected, {"prefill": limit * expected["prefill"]})


def test_steps_that_did_not_happen_teach_nothing() -> None:
    expected = RATES.stitched({"disk": 1000}, 100, Spans(0), probe=False) | RATES.encode([], 50)
    known = RATES.learn(expected, {"encode": 5.0, "recompute": 7.0, "load": 0.0, "other": 3.0})
    assert known.corrections == {}


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "costs" / "m.json"
    assert costs.load(path) is None
    known = RATES.learn(RATES.full(1000), {"prefill": 5000.0})
    costs.save(known, path)
    assert costs.load(path) == known
    costs.save(RATES, path)
    assert costs.load(path) == RATES
    costs.save(replace(RATES, load_ms={"memory": 1.0}), path)
    assert costs.load(path) is None, "what a disk takes has to be known"
    costs.save(RATES, path)
    assert [file.name for file in path.parent.iterdir()] == ["m.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"compute_ms": 1}', '{"speed": 1}', "\udcff"])
def test_what_cannot_be_read_is_measured_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert costs.load(path) is None


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Two answers may end at the same moment in two terminals."""
    path = tmp_path / "m.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: costs.save(RATES, path), range(400)))
    assert costs.load(path) == RATES
