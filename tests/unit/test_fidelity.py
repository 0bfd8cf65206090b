"""Divergences summed up: means of means, and differences paired by question."""

import pytest

from quire_engine.divergence import Divergence, added, fidelity, share


def divergence(*kl: float, agrees: int = 0) -> Divergence:
    return Divergence(kl, tuple(place < agrees for place in range(len(kl))))


def test_questions_count_alike_and_tokens_within_them() -> None:
    found = fidelity([divergence(0.0, 0.2, agrees=1), divergence(0.4, 0.4, agrees=2)])
    assert found.kl == pytest.approx(0.25)
    assert found.first_kl == pytest.approx(0.2)
    assert found.top1 == pytest.approx(0.75)
    assert 0.39 < found.kl_p99 <= 0.4


def test_what_is_added_is_paired_by_question() -> None:
    """Questions differ far more than variants do: only pairs show that one is always worse."""
    base = [divergence(kl) for kl in (0.1, 1.0, 0.5, 2.0)]
    worse = [divergence(kl + extra) for kl, extra in zip((0.1, 1.0, 0.5, 2.0), (0.01, 0.02, 0.03, 0.02), strict=True)]
    found = added(worse, base)
    assert found.kl == pytest.approx(0.02)
    assert 0.01 <= found.low < 0.02 < found.high <= 0.03
    assert added(base, base).high == 0
    assert found == added(worse, base), "the interval does not depend on chance"


def test_a_share_is_of_means_and_paired_by_question() -> None:
    """A question that is ten times as hard is so for both."""
    base, half = [0.1, 1.0, 0.5, 2.0], [0.05, 0.5, 0.25, 1.0]
    found = share(half, base)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    mixed = share([0.05, 1.0, 0.1, 1.0], base)
    assert mixed.value == pytest.approx(2.15 / 3.6)
    assert mixed.low < mixed.value < mixed.high
