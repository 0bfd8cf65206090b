"""Costs: rates out of two measurements, predictions out of rates, corrections out of surprises."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quire_engine import costs
from quire_engine.costs import Costs

RATES = Costs(compute_ms=2.0, attention_ms=0.5, load_ms=0.01)


def test_full_prefill_pays_attention_to_half_of_itself_on_average() -> None:
    assert RATES.full(1000) == {"prefill": pytest.approx(1000 * (2.0 + 0.5 * 0.5))}


def test_every_step_of_a_stitched_answer() -> None:
    steps = RATES.stitched(context=1000, question=100, ratio=0.2, missing=[100, 300], guard=50, probe=True)
    behind = 100 * (2.0 + 0.5 * 1.05)
    assert steps == pytest.approx(
        {
            "encode": 100 * (2.0 + 0.5 * 0.1) + 300 * (2.0 + 0.5 * 0.2),
            "load": 10.0,
            "probe": behind,
            "recompute": 0.2 * 1000 * (2.0 + 0.5 * 0.5),
            "question": behind,
        }
    )


def test_nothing_is_paid_for_what_is_not_done() -> None:
    steps = RATES.stitched(context=1000, question=100, ratio=0.0, missing=[], guard=50, probe=False)
    assert (steps["encode"], steps["probe"], steps["recompute"]) == (0, 0, 0)


def test_rates_come_back_out_of_what_they_predict() -> None:
    short, long = (RATES.stitched(context, 64, 0, [], 0, False)["question"] for context in (128, 1536))
    known = costs.from_measurements((64, 128, short), (64, 1536, long), 0.01)
    assert (known.compute_ms, known.attention_ms, known.load_ms) == pytest.approx((2.0, 0.5, 0.01))


def test_noisy_measurements_give_no_negative_rates() -> None:
    faster_when_long = costs.from_measurements((64, 128, 100.0), (64, 1536, 50.0), 0.01)
    assert faster_when_long.attention_ms == 0
    assert faster_when_long.compute_ms == pytest.approx(100 / 64)
    steep = costs.from_measurements((64, 128, 1.0), (64, 1536, 900.0), 0.01)
    assert steep.compute_ms > 0


def test_learning_moves_towards_what_happened() -> None:
    expected = RATES.full(1000)
    known = RATES
    errors = []
    for _ in range(12):
        known = known.learn(known.full(900, 100), {"prefill": 3 * expected["prefill"]})
        errors.append(abs(known.full(900, 100)["prefill"] / expected["prefill"] - 3))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3
    assert (known.compute_ms, known.load_ms) == (2.0, 0.01)


def test_one_wild_measurement_counts_as_four_times_at_most() -> None:
    expected = RATES.full(1000)
    for factor, limit in ((1000.0, 4.0), (0.0001, 0.25)):
        wild = RATES.learn(expected, {"prefill": factor * expected["prefill"]})
        assert wild == RATES.learn(expected, {"prefill": limit * expected["prefill"]})


def test_steps_that_did_not_happen_teach_nothing() -> None:
    expected = RATES.stitched(1000, 100, 0.0, [], 50, False)
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
