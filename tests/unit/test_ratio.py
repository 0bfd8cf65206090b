"""How much is recomputed: the search for the fastest ratio, what quality asks for, and which of both is taken."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from quire_engine import forecast
from quire_engine.costs import Costs, Rate
from quire_engine.forecast import Work
from quire_engine.selection import quality, ratio
from quire_engine.selection.quality import Curve
from quire_engine.selection.ratio import Measure, Ratios, Tuned

# The search


def overlapped(transfer: float, compute: float = 1.0) -> Measure:
    """CacheTune's case: what is reused is loaded while the rest is computed."""
    return lambda share: 1000 * max(share * compute, (1 - share) * transfer)


@pytest.mark.parametrize("transfer", [0.3, 1.0, 4.0, 20.0])
def test_the_search_finds_where_loading_and_computing_take_as_long(transfer: float) -> None:
    measure, prior = overlapped(transfer), ratio.prior(transfer)
    found = ratio.search(measure, prior)
    assert prior == pytest.approx(transfer / (1 + transfer))
    assert found.ratio == pytest.approx(prior, abs=ratio.TOLERANCE)
    assert found.ms == measure(found.ratio)


@pytest.mark.parametrize(("start", "valley"), [(0.16, 0.5), (0.9, 0.42), (0.5, 0.77)])
def test_a_wrong_prior_does_no_harm(start: float, valley: float) -> None:
    found = ratio.search(lambda share: 100 + abs(share - valley), start, least=0.1)
    assert found.ratio == pytest.approx(valley, abs=ratio.TOLERANCE)


def test_where_computing_only_costs_the_least_is_taken_exactly() -> None:
    assert ratio.search(lambda share: 50 + 900 * share, start=0.3, least=0.16).ratio == 0.16


def test_the_first_pair_is_measured_twice_and_counts_the_second_time() -> None:
    asked: list[float] = []

    def slow_at_first(share: float) -> float:
        asked.append(share)
        return overlapped(2.0)(share) + (5000.0 if len(asked) <= 2 else 0.0)

    found = ratio.search(slow_at_first, start=0.5)
    assert asked[:2] == asked[2:4]
    assert asked[2:] == [share for share, _ in found.probes]
    assert max(ms for _, ms in found.probes) < 5000
    assert found.ratio == pytest.approx(2 / 3, abs=ratio.TOLERANCE)


def test_every_probe_lies_within_and_the_bracket_ends_at_the_tolerance() -> None:
    coarse, fine = (ratio.search(overlapped(1.0), 0.5, 0.2, tolerance) for tolerance in (0.1, 0.01))
    assert all(0.2 <= share < 1 for share, _ in (*coarse.probes, *fine.probes))
    assert len(coarse.probes) < len(fine.probes) <= 2 + 10 + 2 + 3


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_few_percent_costs_a_few_percent(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    measure = overlapped(1.5)
    noisy = lambda share: measure(share) * (1 + 0.04 * drawn.standard_normal())  # noqa: E731
    found = ratio.search(noisy, ratio.prior(1.5), least=0.16)
    best = min(measure(share) for share in np.linspace(0.16, 1, 200))
    assert measure(found.ratio) < 1.1 * best


def test_the_prior_stays_between_the_least_and_all() -> None:
    assert ratio.prior(0.0) == ratio.R_MIN == 0.15
    assert ratio.prior(0.05, least=0.3) == 0.3
    assert 0.99 < ratio.prior(1e9) <= 1


# What was found, kept


def test_what_was_found_holds_until_costs_drift(tmp_path: Path) -> None:
    path = tmp_path / "costs" / "m.ratios.json"
    kept = Ratios(path, "a machine, 2 threads")
    assert kept.fastest({"disk": 1.0}) == {}
    kept.keep("disk", Tuned(0.5, 0.52, transfer_per_compute=1.0))
    kept.keep("memory", Tuned(0.2, 0.16, transfer_per_compute=0.01))
    assert Ratios(path, "a machine, 2 threads").fastest({"disk": 1.2, "memory": 0.011}) == {"disk": 0.5, "memory": 0.2}
    assert kept.fastest({"disk": 2.0, "memory": 0.002, "tape": 1.0}) == {}, "to be measured again"
    assert kept.outdated({"disk": 2.0, "memory": 0.011, "tape": 1.0}) == ["disk"]
    assert Ratios(path, "a machine, 4 threads").fastest({"disk": 1.0}) == {}
    path.write_text('{"a machine, 2 threads: disk": {"ratio": 1}}')
    assert kept.fastest({"disk": 1.0}) == {}


# Quality

CURVE = Curve("probe", ((0.08, 0.10), (0.16, 0.06), (0.32, 0.04)), questions=60)


def test_a_curve_says_which_ratio_reaches_a_divergence() -> None:
    assert CURVE.ratio(0.06) == 0.16
    assert CURVE.ratio(0.08) == pytest.approx(0.12)
    assert CURVE.ratio(0.5) == 0.08, "less was not measured"
    assert CURVE.ratio(0.02) == pytest.approx(0.66), "between the last point and full prefill"
    assert CURVE.ratio(0.0) == 1.0


def test_points_that_contradict_each_other_share_their_mean() -> None:
    noisy = Curve("probe", ((0.32, 0.05), (0.08, 0.06), (0.16, 0.08), (0.24, 0.04)), questions=4)
    falling = noisy.falling()
    assert [share for share, _ in falling] == [0.08, 0.16, 0.24, 0.32, 1.0]
    assert [kl for _, kl in falling] == pytest.approx([0.07, 0.07, 0.045, 0.045, 0.0])
    targets = np.linspace(0, 0.1, 30)
    assert all(more >= less for more, less in pairwise(noisy.ratio(target) for target in targets))


def test_the_dial_asks_for_less_than_the_curve_only_where_nobody_measured() -> None:
    assert quality.ratio("balanced", [CURVE], "probe") == CURVE.ratio(quality.TARGETS["balanced"])
    assert quality.ratio("balanced", [CURVE], "first") == quality.USUAL_RATIOS["balanced"]
    assert quality.ratio("fast", [CURVE], "probe") <= quality.ratio("balanced", [CURVE], "probe")
    assert quality.ratio("exact", [CURVE], "probe") == 1.0
    assert list(quality.TARGETS) == list(quality.USUAL_RATIOS)


def test_curves_are_kept_by_selector_and_the_first_folder_counts(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    quality.save(replace(CURVE, questions=5), theirs, "abc")
    quality.save(replace(CURVE, selector="first"), theirs, "abc")
    assert {curve.selector for curve in quality.load([mine, theirs], "abc")} == {"probe", "first"}
    quality.save(CURVE, mine, "abc")
    loaded = quality.load([mine, theirs], "abc")
    assert loaded[0] == CURVE
    assert quality.load([mine, theirs], "other") == ()
    quality.save(replace(CURVE, points=((0.2, 0.01),)), theirs, "abc")
    assert [curve.points for curve in quality.load([theirs], "abc") if curve.selector == "probe"] == [((0.2, 0.01),)]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9, "curves": {}}', '{"version": 1, "curves": {"probe": 3}}'])
def test_what_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "abc.quality.json").write_text(text)
    assert quality.load([tmp_path], "abc") == ()


# Which is taken


COSTS = Costs(Rate(5.0, 1.0), Rate(6.0, 4.0), Rate(5.0, 1.0), 0.7, 0.05, {"memory": 0.05, "disk": 0.2}, tile_tokens=1)
WORK = Work(
    new=1050,
    passages=1000,
    question=30,
    pools={"disk": 1050},
    missing=(),
    guard=50,
    held=0,
    loaded=0,
    read=0,
    dropped=0,
    stitches=True,
    probes=True,
    compared=0.0,
    depth=0.5,
    led=0,
    reads_ms=0.0,
)


def taken(
    work: Work, wanted: float, tuned: Mapping[str, float], insist: bool = False, costs: Costs = COSTS
) -> tuple[float, str]:
    foreseen, _ = forecast.foresee(work, costs, wanted, "", insist, tuned)
    return foreseen.ratio, foreseen.reason


def test_the_larger_of_quality_and_speed_is_taken_for_the_pool_that_most_comes_from() -> None:
    assert taken(WORK, 0.16, {}) == (0.16, "")
    assert taken(WORK, 0.16, {"disk": 0.4}) == (0.4, "")
    assert taken(WORK, 0.5, {"disk": 0.4}) == (0.5, "")
    mostly_memory = replace(WORK, pools={"memory": 1000, "disk": 50})
    assert taken(mostly_memory, 0.16, {"disk": 0.4}) == (0.16, "")
    assert taken(mostly_memory, 0.16, {"disk": 0.4, "memory": 0.2}) == (0.2, "")
    assert taken(WORK, 0.16, {"disk": 0.4}, insist=True) == (0.16, "")


def test_full_prefill_is_taken_where_the_pool_is_too_slow() -> None:
    slow = replace(COSTS, load_ms={"memory": 0.05, "disk": 9.0})
    assert taken(WORK, 0.16, {}, costs=slow)[0] == 1.0
    assert "Full prefill is predicted" in taken(WORK, 0.16, {}, costs=slow)[1]
    assert taken(replace(WORK, pools={"memory": 1050}), 0.16, {}, costs=slow) == (0.16, "")
    assert taken(WORK, 0.16, {}, insist=True, costs=slow) == (0.16, "")


def test_passages_computed_while_others_are_read_are_not_loaded() -> None:
    """From a slow disk: the longer of both is waited for, and a ratio is a share of what was read."""
    led = replace(WORK, led=400, reads_ms=2000.0)
    _, expected = forecast.foresee(led, COSTS, 0.5, "", True, {})
    assert expected["lead"] == pytest.approx(max(2000.0, COSTS.prefill.of(400, 50)))
    assert expected["load/memory"] == pytest.approx(650 * 0.05)
    assert expected["recompute"] == pytest.approx(300 * (5.0 + 1.0 * (400 + 325) / 1000) + 650 * 0.05)
    assert expected["question"] == forecast.foresee(WORK, COSTS, 0.5, "", True, {})[1]["question"]
    waited = forecast.foresee(replace(led, reads_ms=9000.0), COSTS, 0.5, "", True, {})[0].first_token_ms
    assert waited == pytest.approx(sum(expected.values()) - expected["lead"] + 9000)


def test_comparing_values_takes_its_share_of_a_prefill() -> None:
    first = {}
    for compared in (0.0, 0.1):
        foreseen, expected = forecast.foresee(replace(WORK, compared=compared), COSTS, 0.16, "", True, {})
        first[compared] = foreseen.first_token_ms
        assert expected["probe/values"] == pytest.approx(compared * COSTS.prefill.of(1050, 0))
    assert first[0.1] - first[0.0] == pytest.approx(0.1 * COSTS.prefill.of(1050, 0))


def test_whole_tiles_are_computed_as_selectors_choose_them() -> None:
    assert WORK.again(0.16, tile=64).tokens == 192
    assert WORK.again(0.128, tile=64).tokens == 128
    assert WORK.again(0.02, tile=64).tokens == 64
    assert WORK.again(0.0, tile=64).tokens == 0
    assert WORK.again(0.999, tile=64).tokens == 1000
