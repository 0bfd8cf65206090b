"""What a token costs on this machine with this model, and so how long a plan will take.

Three measured rates (compute, attention, load) predict every step; how far off each step was is remembered and
corrected. Knows nothing of how the work is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from quire_engine import records

_WEIGHT_OF_NEWEST = 0.4


@dataclass(frozen=True)
class Costs:
    """compute_ms: per token, without attention.  attention_ms: per token and thousand tokens before it.
    load_ms: per token placed from storage.  slowness: how much longer everything takes at present.
    corrections: step -> how much longer it takes beyond that."""

    compute_ms: float
    attention_ms: float
    load_ms: float
    slowness: float = 1.0
    corrections: dict[str, float] = field(default_factory=dict)

    def full(self, tokens: int, before: int = 0) -> dict[str, float]:
        """Milliseconds of prefilling tokens behind others: one step, `prefill`."""
        return self._corrected({"prefill": self._compute(tokens, before)})

    def stitched(
        self,
        context: int,
        question: int,
        ratio: float,
        missing: Sequence[int],
        guard: int,
        probe: bool,
        before: int = 0,
    ) -> dict[str, float]:
        """Milliseconds of every step of a stitched answer.

        context, question: tokens.  missing: lengths of chunks to encode first, behind `guard` tokens each.
        before: tokens of earlier turns.
        """
        return self._corrected(
            {
                "encode": sum(self._compute(tokens, guard) for tokens in missing),
                "load": context * self.load_ms,
                "probe": self._compute(question, before + context) if probe else 0.0,
                "recompute": ratio * self._compute(context, before),
                "question": self._compute(question, before + context),
            }
        )

    def resumed(self, loaded: int, read: int, ratio: float) -> dict[str, float]:
        """Milliseconds of bringing earlier turns back. loaded, read: tokens from disk, and tokens stitched again."""
        return self._corrected({"resume": (loaded + read) * self.load_ms + ratio * self._compute(read, loaded)})

    def learn(self, expected: Mapping[str, float], measured: Mapping[str, float]) -> "Costs":
        """The same rates, moved towards what happened: a busy machine slows every step, a wrong guess one of them."""
        both = {step: (ms, measured[step]) for step, ms in expected.items() if ms > 0 and measured.get(step, 0) > 0}
        if not both:
            return self
        overall = _bounded(sum(took for _, took in both.values()) / sum(ms for ms, _ in both.values()))
        corrections = dict(self.corrections)
        for step, (ms, took) in both.items():
            surprise = _bounded(_bounded(took / ms) / overall)
            corrections[step] = corrections.get(step, 1.0) * (1 + _WEIGHT_OF_NEWEST * (surprise - 1))
        slowness = self.slowness * (1 + _WEIGHT_OF_NEWEST * (overall - 1))
        return replace(self, slowness=slowness, corrections=corrections)

    def _compute(self, tokens: int, before: int) -> float:
        return tokens * (self.compute_ms + self.attention_ms * (before + tokens / 2) / 1000)

    def _corrected(self, steps: Mapping[str, float]) -> dict[str, float]:
        return {step: ms * self.slowness * self.corrections.get(step, 1.0) for step, ms in steps.items()}


def _bounded(surprise: float) -> float:
    """One odd measurement must not spoil many good ones."""
    return min(max(surprise, 0.25), 4.0)


def from_measurements(short: tuple[int, int, float], long: tuple[int, int, float], load_ms_per_token: float) -> Costs:
    """Rates from two timed computations (tokens, tokens before them, ms), the second behind many more tokens."""
    (n1, p1, t1), (n2, p2, t2) = short, long
    x1, x2 = (p1 + n1 / 2) / 1000, (p2 + n2 / 2) / 1000
    attention = max(0.0, (t2 / n2 - t1 / n1) / (x2 - x1))
    return Costs(max(t1 / n1 - attention * x1, 1e-3), attention, load_ms_per_token)


def save(costs: Costs, path: Path) -> None:
    records.save(path, asdict(costs))


def load(path: Path) -> Costs | None:
    """Saved costs; None when there are none that can be read: they are measured again."""
    try:
        return Costs(**records.load(path))
    except TypeError:
        return None
