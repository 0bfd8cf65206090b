"""What a token costs on this machine with this model, and so how long a plan will take.

Measured rates predict every step; how far off each step was is remembered and corrected. Knows nothing of how the work
is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quire_engine import records

MEMORY, DISK = "memory", "disk"
"""Pools: where stored KV lies when it is wanted."""

SMALL_TOKENS = 64
"""So many tokens are computed in one tile; fewer cost more each, since every one of them reads all keys by itself."""

_WEIGHT_OF_NEWEST = 0.4
_USUAL_CONTEXT = 1000


@dataclass(frozen=True)
class Rate:
    """Milliseconds per token: without attention, and for every thousand tokens before it."""

    compute_ms: float
    attention_ms: float

    def of(self, tokens: int, before: int) -> float:
        """Tokens in a row behind others."""
        return self.at(tokens, before + tokens / 2)

    def at(self, tokens: int, position: float) -> float:
        """Tokens that stand at this position on average."""
        return tokens * (self.compute_ms + self.attention_ms * position / 1000)


@dataclass(frozen=True)
class Spans:
    """What a stitched prompt computes again. tokens: of passages, at `depth` of the context on average."""

    tokens: int
    depth: float = 0.5


@dataclass(frozen=True)
class Costs:
    """prefill: of many tokens in a row.  question: of fewer than SMALL_TOKENS.  spans: of tokens here and there.
    probe_share: what asking a question first takes of answering it.  assemble_ms: per token of a context some of whose
    tokens were computed again.  load_ms: pool -> per token placed.  tile_tokens: those of the runtime.
    slowness: how much longer everything takes at present.  corrections: step -> how much longer that one still."""

    prefill: Rate
    question: Rate
    spans: Rate
    probe_share: float
    assemble_ms: float
    load_ms: dict[str, float]
    tile_tokens: int
    slowness: float = 1.0
    corrections: dict[str, float] = field(default_factory=dict)

    def full(self, tokens: int, before: int = 0) -> dict[str, float]:
        """Milliseconds of prefilling tokens behind others: one step, `prefill`."""
        return self._corrected({"prefill": self._read(tokens, before)})

    def encode(self, lengths: Sequence[int], guard: int) -> dict[str, float]:
        """Reading chunks of these lengths, each behind `guard` tokens."""
        return self._corrected({"encode": sum(self._read(tokens, guard) for tokens in lengths)})

    def stitched(
        self,
        pools: Mapping[str, int],
        question: int,
        again: Spans,
        probe: bool,
        compared: float = 0.0,
        before: int = 0,
    ) -> dict[str, float]:
        """Milliseconds of every step of a stitched answer; those with a part behind a slash belong to one step.

        pools: tokens to place, by where they lie.  compared: share of the layers that are computed for all of them to
        compare values.  before: tokens of earlier turns.
        """
        context = sum(pools.values())
        asked = self._read(question, before + context)
        computed = self.spans.at(again.tokens, before + again.depth * context)
        return self._corrected(
            {f"load/{pool}": tokens * self.load_of(pool) for pool, tokens in pools.items()}
            | {
                "probe": self.probe_share * asked if probe else 0.0,
                "probe/values": compared * self.prefill.of(context, 0),
                "recompute": computed + self.assemble_ms * context if again.tokens else 0.0,
                "question": asked,
            }
        )

    def resumed(self, loaded: int, read: int, again: int) -> dict[str, float]:
        """Milliseconds of bringing earlier turns back. loaded: tokens from disk.  read: tokens stitched again, of which
        `again` are computed."""
        load = (loaded + read) * self.load_of(DISK)
        return self._corrected({"resume": load + self.spans.of(again, loaded)})

    def load_of(self, pool: str) -> float:
        """Per token, uncorrected. Of a pool that was never measured: as from disk."""
        return self.load_ms.get(pool, self.load_ms[DISK])

    def transfers(self) -> dict[str, float]:
        """Pool -> what placing a token of a usual context takes, in units of computing one again."""
        again = Spans(_USUAL_CONTEXT)
        steps = {pool: self.stitched({pool: again.tokens}, 0, again, probe=False) for pool in self.load_ms}
        return {pool: of_pool[f"load/{pool}"] / of_pool["recompute"] for pool, of_pool in steps.items()}

    def learn(self, expected: Mapping[str, float], measured: Mapping[str, float]) -> "Costs":
        """The same rates, moved towards what happened: a busy machine slows every step, a wrong guess one of them.

        What a step took is divided among its parts as expected.
        """
        steps: dict[str, float] = {}
        for part, ms in expected.items():
            steps[_step(part)] = steps.get(_step(part), 0.0) + ms
        both = {step: (ms, measured[step]) for step, ms in steps.items() if ms > 0 and measured.get(step, 0) > 0}
        if not both:
            return self
        overall = _bounded(sum(took for _, took in both.values()) / sum(ms for ms, _ in both.values()))
        corrections = dict(self.corrections)
        for part, of_part in expected.items():
            if of_part > 0 and _step(part) in both:
                ms, took = both[_step(part)]
                surprise = _bounded(_bounded(took / ms) / overall)
                weight = _WEIGHT_OF_NEWEST * of_part / ms
                corrections[part] = corrections.get(part, 1.0) * (1 + weight * (surprise - 1))
        slowness = self.slowness * (1 + _WEIGHT_OF_NEWEST * (overall - 1))
        return replace(self, slowness=slowness, corrections=corrections)

    def _read(self, tokens: int, before: int) -> float:
        return (self.question if tokens < SMALL_TOKENS else self.prefill).of(tokens, before)

    def _corrected(self, steps: Mapping[str, float]) -> dict[str, float]:
        return {step: ms * self.slowness * self.corrections.get(step, 1.0) for step, ms in steps.items()}


def _step(part: str) -> str:
    return part.partition("/")[0]


def _bounded(surprise: float) -> float:
    """One odd measurement must not spoil many good ones."""
    return min(max(surprise, 0.25), 4.0)


def rate(short: tuple[int, float, float], long: tuple[int, float, float]) -> Rate:
    """From two timed computations (tokens, their mean position, ms), the second behind many more tokens."""
    (n1, x1, t1), (n2, x2, t2) = short, long
    attention = max(0.0, 1000 * (t2 / n2 - t1 / n1) / (x2 - x1)) if x2 > x1 else 0.0
    return Rate(max(t1 / n1 - attention * x1 / 1000, 1e-3), attention)


def of_record(record: dict[str, Any]) -> Costs:
    """Raises TypeError or KeyError when it is none."""
    rates = {name: Rate(**record[name]) for name in ("prefill", "question", "spans")}
    known = Costs(**{**record, **rates})
    _ = known.load_ms[DISK]
    return known


def save(costs: Costs, path: Path) -> None:
    records.save(path, asdict(costs))


def load(path: Path) -> Costs | None:
    """Saved costs; None when there are none that can be read: they are measured again."""
    try:
        return of_record(records.load(path))
    except (TypeError, KeyError):
        return None
