"""Before a question is computed: how long it will take, and whether stitching or full prefill is the shorter way.

Pure arithmetic over token counts and measured costs. Knows nothing of how the work is done.
"""

from dataclasses import dataclass

from quire_engine.costs import Costs
from quire_engine.types import Forecast


@dataclass(frozen=True)
class Work:
    """What one question needs, in tokens. new: before the question, that this turn adds.  missing: lengths of what has
    to be encoded first, behind `guard` tokens each.  held, loaded, read: of earlier turns, in memory, on disk, and
    neither.  dropped: passages that leave for it.  stitches: whether it brings passages.  probes: whether the question
    is asked first what it looks at."""

    new: int
    question: int
    missing: tuple[int, ...]
    guard: int
    held: int
    loaded: int
    read: int
    dropped: int
    stitches: bool
    probes: bool

    @property
    def earlier(self) -> int:
        return self.held + self.loaded + self.read


def foresee(
    work: Work, costs: Costs | None, ratio: float, reuse_off: str, insist: bool
) -> tuple[Forecast, dict[str, float]]:
    """The forecast, and the milliseconds expected of every step.

    costs: None when nothing was ever measured.  ratio: as wanted.  insist: stitch even where that is slower.
    """
    context, kept = work.earlier + work.new, work.held + work.loaded

    def decided(ratio: float, reason: str, first_ms: float = 0.0, full_ms: float = 0.0) -> Forecast:
        return Forecast(context, sum(work.missing), ratio, reason, first_ms, full_ms, kept, work.dropped)

    if costs is None or reuse_off:
        return decided(1.0, reuse_off), {}
    everything = sum(costs.full(context + work.question).values())
    resumed = costs.resumed(work.loaded, work.read, ratio)
    computed = resumed | costs.full(work.new + work.question, work.earlier)
    stitched = resumed | costs.stitched(
        work.new, work.question, ratio, work.missing, work.guard, work.probes, work.earlier
    )
    computed_ms, stitched_ms = sum(computed.values()), sum(stitched.values())
    if not work.stitches:
        reason = "" if work.earlier else "There are no passages to reuse."
        return decided(1.0 if reason else ratio, reason, computed_ms, everything), computed
    next_ms = stitched_ms - stitched["encode"]  # encoding is paid once and kept: the next question decides
    if ratio < 1 and next_ms >= computed_ms and not insist:
        reason = f"Full prefill is predicted to be as fast ({computed_ms:.0f} ms against {next_ms:.0f} ms)."
        return decided(1.0, reason, computed_ms, everything), computed
    if ratio >= 1:
        return decided(ratio, "", computed_ms, everything), computed
    return decided(ratio, "", stitched_ms, everything), stitched
