"""Before a question is computed: how long it will take, and whether stitching or full prefill is the shorter way.

Pure arithmetic over token counts and measured costs. Knows nothing of how the work is done.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quire_engine import plan
from quire_engine.costs import DISK, MEMORY, Costs, Spans
from quire_engine.types import Forecast


@dataclass(frozen=True)
class Work:
    """What one question needs, in tokens. new: before the question, that this turn adds.  passages: of these, what a
    ratio is a share of.  pools: of these, what is stored, by where it lies.  missing: lengths of what has to be encoded
    first, behind `guard` tokens each.  held, loaded, read: of earlier turns, in memory, on disk, and neither.
    dropped: passages that leave for it.  stitches: whether it brings passages.  probes: whether the question is asked
    first what it looks at.  compared: share of the layers that are computed to compare values.  depth: where in the
    context tokens that are computed again stand on average, 0..1.  led: of the passages, the first ones that are
    computed while the others are read from a slow disk, which takes reads_ms."""

    new: int
    passages: int
    question: int
    pools: Mapping[str, int]
    missing: tuple[int, ...]
    guard: int
    held: int
    loaded: int
    read: int
    dropped: int
    stitches: bool
    probes: bool
    compared: float
    depth: float
    led: int
    reads_ms: float

    @property
    def earlier(self) -> int:
        return self.held + self.loaded + self.read

    @property
    def placed(self) -> dict[str, int]:
        """Tokens to place, by where they lie; what was just encoded lies on disk."""
        if self.led:
            return {MEMORY: self.new - self.led}
        return {**self.pools, DISK: self.pools.get(DISK, 0) + sum(self.missing)}

    def again(self, ratio: float, tile: int) -> Spans:
        """As selectors choose them."""
        return Spans(plan.budget(self.passages - self.led, ratio, tile), self.depth)


def foresee(
    work: Work, costs: Costs | None, ratio: float, reuse_off: str, insist: bool, tuned: Mapping[str, float]
) -> tuple[Forecast, dict[str, float]]:
    """The forecast, and the milliseconds expected of every step.

    costs: None when nothing was ever measured.  ratio: the least that will do.  insist: take that one, and stitch even
    where that is slower.  tuned: pool -> the ratio that was measured as the fastest there.
    """
    context, kept = work.earlier + work.new, work.held + work.loaded

    def decided(ratio: float, reason: str, first_ms: float = 0.0, full_ms: float = 0.0) -> Forecast:
        return Forecast(context, sum(work.missing), ratio, reason, first_ms, full_ms, kept, work.dropped)

    if costs is None or reuse_off:
        return decided(1.0, reuse_off), {}
    if work.stitches and not insist and not work.missing:
        most = max(work.placed, key=lambda pool: work.placed[pool] * costs.load_of(pool))
        ratio = max(ratio, tuned.get(most, 0.0))
    everything = sum(costs.full(context + work.question).values())
    resumed = costs.resumed(work.loaded, work.read, round(ratio * work.read))
    computed = resumed | costs.full(work.new + work.question, work.earlier)
    if not work.stitches:
        reason = "" if work.earlier else "There are no passages to reuse."
        return decided(1.0 if reason else ratio, reason, sum(computed.values()), everything), computed
    encoded = costs.encode(work.missing, work.guard)
    again, before = work.again(ratio, costs.tile_tokens), work.earlier + work.led
    placed = costs.stitched(work.placed, work.question, again, work.probes, work.compared, before)
    if work.led:
        leading = sum(costs.full(work.led, work.earlier + work.new - work.passages).values())
        placed["lead"] = max(leading, work.reads_ms)
    stitched = resumed | encoded | placed
    computed_ms = sum(computed.values())
    next_ms = sum(resumed.values()) + sum(placed.values())  # encoding is paid once and kept: the next question decides
    if ratio < 1 and next_ms >= computed_ms and not insist:
        reason = f"Full prefill is predicted to be as fast ({computed_ms:.0f} ms against {next_ms:.0f} ms)."
        return decided(1.0, reason, computed_ms, everything), computed
    if ratio >= 1:
        return decided(ratio, "", computed_ms, everything), computed
    return decided(ratio, "", sum(stitched.values()), everything), stitched
