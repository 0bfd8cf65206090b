"""How much to recompute where time alone decides: CacheTune's search for the fastest ratio (arXiv 2605.24022).

A roofline prior says where placing a token takes as long as computing one; a golden-section search then asks the
machine. How much the answer needs is another matter (quality.py), and so is full prefill, which is no point of this
curve: it loads nothing. Knows nothing of how a time is measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from quire_engine import records

R_MIN = 0.15
"""The published least ratio; with a measured floor of quality that one is taken."""

TOLERANCE = 0.01
DRIFT = 1.5
"""By what factor transfer and computing may change against each other until a search is out of date."""

_FINALISTS = 3
_GOLDEN = (5**0.5 - 1) / 2

Measure = Callable[[float], float]
"""Milliseconds to the first token at a ratio."""


@dataclass(frozen=True)
class Found:
    """ratio: the fastest, and its milliseconds.  probes: everything that was measured for it, in order."""

    ratio: float
    ms: float
    probes: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Tuned:
    """What a search found, and the circumstances: milliseconds of placing a token by those of computing it."""

    ratio: float
    prior: float
    transfer_per_compute: float

    def holds(self, transfer_per_compute: float) -> bool:
        """Whether it was found under circumstances much like these."""
        change = max(transfer_per_compute, 1e-9) / max(self.transfer_per_compute, 1e-9)
        return 1 / DRIFT <= change <= DRIFT


def prior(transfer_per_compute: float, least: float = R_MIN) -> float:
    """Where transferring the others takes as long as recomputing these, t_i / (t_c + t_i), within [least, 1]."""
    return min(1.0, max(least, transfer_per_compute / (1 + transfer_per_compute)))


def search(measure: Measure, start: float, least: float = R_MIN, tolerance: float = TOLERANCE) -> Found:
    """The fastest ratio of [least, 1) by golden-section search.

    Its first two probes are measured twice and count the second time, since the first measurements of a process are
    slow. Beyond what is published, `start` and `least` are probed too, and the best of all once more: one lucky
    measurement decides nothing.
    """
    probes: list[tuple[float, float]] = []

    def probe(ratio: float) -> float:
        probes.append((ratio, measure(ratio)))
        return probes[-1][1]

    low, high = least, 1.0
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    for warming in (left, right):
        measure(warming)
    left_ms, right_ms = probe(left), probe(right)
    while high - low > tolerance:
        if left_ms <= right_ms:
            high, right, right_ms = right, left, left_ms
            left = high - _GOLDEN * (high - low)
            left_ms = probe(left)
        else:
            low, left, left_ms = left, right, right_ms
            right = low + _GOLDEN * (high - low)
            right_ms = probe(right)
    for end in sorted({least, start} - {1.0}):
        probe(end)
    finalists = sorted(dict(probes).items(), key=lambda one: one[1])[:_FINALISTS]
    ratio, ms = min(((ratio, (ms + probe(ratio)) / 2) for ratio, ms in finalists), key=lambda one: one[1])
    return Found(ratio, ms, tuple(probes))


class Ratios:
    """What searches found for one model and device, pool by pool, in a file."""

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._device = device

    def fastest(self, transfers: Mapping[str, float]) -> dict[str, float]:
        """Pool -> ratio, as far as it is known and still holds. transfers: pool -> transfer by compute, as of now."""
        found = {pool: self._load(pool) for pool in transfers}
        return {pool: one.ratio for pool, one in found.items() if one and one.holds(transfers[pool])}

    def outdated(self, transfers: Mapping[str, float]) -> list[str]:
        """Pools where something was found that does not hold any more."""
        return [pool for pool, now in transfers.items() if (one := self._load(pool)) and not one.holds(now)]

    def keep(self, pool: str, tuned: Tuned) -> None:
        records.save(self._path, {**records.load(self._path), self._name(pool): asdict(tuned)})

    def _load(self, pool: str) -> Tuned | None:
        try:
            return Tuned(**records.load(self._path)[self._name(pool)])
        except (KeyError, TypeError):
            return None

    def _name(self, pool: str) -> str:
        return f"{self._device}: {pool}"
