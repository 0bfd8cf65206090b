"""`quire bench ratio`: time to the first token by ratio, pool by pool, and whether the search finds the fastest one.

A pool is memory, this disk, or one slowed down to a given speed. Every question begins as the application's do, with
reading ahead; page cache and memory are emptied before. Knows what stands side by side; the search is
`quire_engine.selection.ratio`'s.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from quire.bench.cases import pieces_of, scratch_engine, stopped, try_out
from quire.bench.pools import DISK, MEMORY, lay, slow
from quire.session import Session
from quire_engine.engine import Engine, Request
from quire_engine.selection import ratio as ratios
from quire_engine.selection.ratio import Tuned
from quire_engine.types import Answered

_QUESTION = "What do the documents say about the time before the war?"
_SWEEP = (0.24, 0.32, 0.48, 0.64, 0.8, 1.0)
_ROUNDS = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class RatioRow:
    """One pool. mb_per_s: of a slowed disk, else 0.  least: what the dial asks.  transfer: placing a token, in units of
    computing one.  searched: what the search found.  taken: that, or 1 where full prefill was faster.  best: of the
    curve.  taken_ms, best_ms: medians of both measured in turn, after the search.  over_best: taken_ms / best_ms - 1.
    curve: ratio and milliseconds to the first token; 1 is full prefill."""

    pool: str
    mb_per_s: float
    least: float
    transfer: float
    prior: float
    searched: float
    taken: float
    best: float
    taken_ms: float
    best_ms: float
    over_best: float
    curve: tuple[tuple[float, float], ...]


def ratio(
    session: Session,
    tokens: int,
    speeds: Sequence[float],
    usual: bool,
    say: Say,
    should_stop: Callable[[], bool],
) -> list[RatioRow]:
    """speeds: megabytes per second of slowed disks.  usual: memory and this disk as well; what is found for them is
    kept, and used from now on."""
    rows = []
    with scratch_engine(session) as engine:
        try_out(engine, should_stop)
        least = min(0.99, session.engine.ratio(session.settings.dial, session.settings.selector))
        passages = pieces_of(session, engine, min(tokens, engine.limits.context_tokens * 7 // 8))
        say(f"caching {len(passages)} passages")
        engine.cache(passages, should_stop)
        pools = [(pool, 0.0) for pool in (MEMORY, DISK) if usual] + [(DISK, speed) for speed in speeds]
        for pool, speed in pools:
            if should_stop():
                break
            slow(engine, 1e6 * speed)
            row = _Pool(engine, session.settings.selector, passages, pool, say).row(least, speed)
            rows.append(row)
            if not speed:
                known = session.engine.known_costs or engine.costs
                transfers = known.transfers() if known else {}
                session.engine.ratios.keep(pool, Tuned(row.searched, row.prior, transfers[pool]))
    if not rows:
        raise stopped()
    return rows


class _Pool:
    """The same question over the same passages, which lie in one pool."""

    def __init__(self, engine: Engine, selector: str, passages: tuple[str, ...], pool: str, say: Say) -> None:
        self._engine, self._selector, self._passages, self._pool, self._say = engine, selector, passages, pool, say

    def row(self, least: float, speed: float) -> RatioRow:
        where = f"{self._pool} at {speed:g} MB/s" if speed else self._pool
        self._say(f"{where}: what a token takes")
        transfer = self._transfer(least)
        prior = ratios.prior(transfer, least)
        self._say(f"{where}: searching from {prior:.2f}")
        searched = ratios.search(self._ms, prior, least).ratio
        self._say(f"{where}: the curve")
        curve = [(ratio, self._ms(ratio)) for ratio in dict.fromkeys((least, searched, *_SWEEP)) if ratio >= least]
        by_ratio = dict(curve)
        taken = 1.0 if by_ratio[1.0] < by_ratio[searched] else searched
        best = min(by_ratio, key=lambda ratio: by_ratio[ratio])
        both = {r: median(ms) for r, ms in self._in_turn({taken, best}).items()}
        over = both[taken] / both[best] - 1
        return RatioRow(
            self._pool, speed, least, transfer, prior, searched, taken, best, both[taken], both[best], over,
            tuple(sorted(curve)),
        )  # fmt: skip

    def _in_turn(self, some: set[float]) -> dict[float, list[float]]:
        times: dict[float, list[float]] = {one: [] for one in some}
        for _ in range(_ROUNDS):
            for one, ms in times.items():
                ms.append(self._ms(one))
        return times

    def _transfer(self, ratio: float) -> float:
        """The second of two questions says it: the first one pays for everything that is done once."""
        for _ in range(2):
            told = self._ask(max(ratio, 0.1))
        placed = told.timings.load_ms / max(1, told.tokens.context)
        return placed / (told.timings.recompute_ms / max(1, told.tokens.recomputed))

    def _ms(self, ratio: float) -> float:
        ms = self._ask(ratio).timings.first_token_ms
        self._say(f"  {ratio:.2f}: {ms:.0f} ms")
        return ms

    def _ask(self, ratio: float) -> Answered:
        lay(self._engine, self._passages, self._pool)
        if self._pool != MEMORY and ratio < 1:
            self._engine.prefetch(self._passages)
        request = Request(_QUESTION, self._passages, ratio, self._selector, max_tokens=1, insist=True)
        *_, told = self._engine.answer(request)
        assert isinstance(told, Answered)
        return told


def as_json(rows: Sequence[RatioRow]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows]})


def table(rows: Sequence[RatioRow]) -> list[str]:
    lines = []
    for row in rows:
        speed = f" at {row.mb_per_s:g} MB/s" if row.mb_per_s else ""
        lines += [f"{row.pool}{speed}: a token is placed in {row.transfer:.2f} of the time that computing one takes"]
        lines += [f"  {ratio:>5.2f}  {_bar(ms, row)} {ms:.0f} ms" for ratio, ms in row.curve]
        lines += [
            f"  prior {row.prior:.2f}, search {row.searched:.2f}, the dial asks for {row.least:.2f}: "
            f"{_named(row.taken)} is taken, {row.taken_ms:.0f} ms",
            f"  the curve's best is {_named(row.best)}, {row.best_ms:.0f} ms: {row.over_best:+.0%}",
            "",
        ]
    return lines


def _named(ratio: float) -> str:
    return "full prefill" if ratio >= 1 else f"{ratio:.2f}"


def _bar(ms: float, row: RatioRow) -> str:
    return "█" * max(1, round(40 * ms / max(took for _, took in row.curve)))
