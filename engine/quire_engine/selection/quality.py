"""How much has to be recomputed for an answer that is near enough to full prefill's: what the dial means.

The positions of the dial are targets for the mean KL divergence to full prefill along an answer. A model's measured
curve (`quire bench fidelity`) says which ratio reaches one; of other models the ratio is a guess that the bundled one
suggests. Knows nothing of time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from quire_engine import records

TARGETS: Mapping[str, float] = {"fast": 0.05, "balanced": 0.009, "exact": 0.0}
"""Mean KL to full prefill, in nats per token. At balanced's the likeliest token is another one at most two points more
often than between two full prefills (docs/decisions/selection.md)."""

USUAL_RATIOS: Mapping[str, float] = {"fast": 0.08, "balanced": 0.5, "exact": 1.0}
"""Of models whose curve nobody measured."""

_VERSION = 1
_SUFFIX = ".quality.json"


@dataclass(frozen=True)
class Curve:
    """Measured mean KL at some ratios below 1, by a selector.

    selector: its rule, not the name `default`, which may come to mean another one.  questions: how many it rests on.
    """

    selector: str
    points: tuple[tuple[float, float], ...]
    questions: int

    def falling(self) -> list[tuple[float, float]]:
        """By rising ratio, never rising in KL: neighbours that contradict each other share their mean. Ends at 1, which
        is full prefill itself."""
        pools: list[tuple[list[float], float]] = []  # ratios, mean KL
        for ratio, kl in sorted(self.points):
            pools.append(([ratio], kl))
            while len(pools) > 1 and pools[-1][1] > pools[-2][1]:
                (later, high), (sooner, low) = pools.pop(), pools.pop()
                mean = (high * len(later) + low * len(sooner)) / (len(later) + len(sooner))
                pools.append((sooner + later, mean))
        return [*((ratio, kl) for ratios, kl in pools for ratio in ratios), (1.0, 0.0)]

    def ratio(self, target: float) -> float:
        """The least that reaches a mean KL, read between the measured points on straight lines."""
        points = self.falling()
        if points[0][1] <= target:
            return points[0][0]
        for (left, above), (right, below) in pairwise(points):
            if below <= target:
                return left + (right - left) * (above - target) / (above - below)
        return 1.0


def ratio(dial: str, curves: Sequence[Curve], selector: str) -> float:
    """What a position of the dial takes. selector: the rule that is used."""
    found = [curve for curve in curves if curve.selector == selector and curve.points]
    return found[0].ratio(TARGETS[dial]) if found and TARGETS[dial] > 0 else USUAL_RATIOS[dial]


def save(curve: Curve, folder: Path, model: str) -> None:
    """Into a folder of profiles, in place of what was measured with that selector. model: its name for files there."""
    others = [one for one in load([folder], model) if one.selector != curve.selector]
    curves = {one.selector: {"points": one.points, "questions": one.questions} for one in (*others, curve)}
    records.save(folder / (model + _SUFFIX), {"version": _VERSION, "curves": curves})


def load(folders: Sequence[Path], model: str) -> tuple[Curve, ...]:
    """A model's curves from all folders, the first one's first; what cannot be read is left out."""
    found = []
    for folder in folders:
        record = records.load(folder / (model + _SUFFIX))
        curves = record.get("curves") if record.get("version") == _VERSION else None
        for selector, of_one in curves.items() if isinstance(curves, dict) else ():
            try:
                points = tuple((float(ratio), float(kl)) for ratio, kl in of_one["points"])
                found.append(Curve(selector, points, int(of_one["questions"])))
            except (KeyError, TypeError, ValueError):
                continue
    return tuple(found)
