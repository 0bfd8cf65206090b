"""`quire bench matched`: time to the first token at the same quality.

Every selector gets the least ratio at which its answers are as near to full prefill's as is asked, read off its
measured curve; then all of them and full prefill are timed in turn, in one run. Knows how the two measurements meet;
what KL is, and how a prompt is computed, is the engine's.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median

from quire.bench import fidelity as bench_fidelity
from quire.bench.cases import Case, prompt_of, scratch_engine, stopped, try_out
from quire.bench.fidelity import FidelityReport, Progress, Say, Wanted, Way
from quire.session import Session
from quire_engine import fidelity
from quire_engine.engine import Engine
from quire_engine.errors import Aborted
from quire_engine.plan import Prompt
from quire_engine.runtimes.base import SCRATCH_TOKENS
from quire_engine.selection import selectors
from quire_engine.selection.quality import Curve

_FULL = "full prefill"
MakeCases = Callable[[Engine], Sequence[Case]]


@dataclass(frozen=True)
class MatchedRow:
    """One selector at one length. ratio: what it needs for the KL; 1 where no measured ratio was enough, which is full
    prefill.  speedup: median of full prefill / median."""

    context_tokens: int
    selector: str
    ratio: float
    runs: int
    median_ms: float
    lowest_ms: float
    highest_ms: float
    speedup: float


@dataclass(frozen=True)
class MatchedReport:
    """kl: what was asked for.  curves: (ratio, KL) by selector, over so many questions and tokens of context."""

    rows: tuple[MatchedRow, ...]
    kl: float
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    floor_kl: float
    model: str
    runtime: str
    questions: int
    context_tokens: float


def curves(
    session: Session,
    make_cases: MakeCases,
    chosen: Sequence[str],
    ratios: Sequence[float],
    say: Say,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> FidelityReport:
    """How near to full prefill every selector comes, ratio by ratio: see `fidelity.measure`, which keeps it."""
    ways = tuple(Way(selector, ratio, session.settings.precision) for selector in chosen for ratio in ratios)
    return bench_fidelity.measure(session, make_cases, Wanted(ways, answers=False), say, progress, should_stop)


def measure(
    session: Session,
    make_cases: MakeCases,
    quality: FidelityReport,
    kl: float,
    lengths: Sequence[int],
    runs: int,
    say: Say,
    should_stop: Callable[[], bool],
) -> MatchedReport:
    """Times full prefill and every selector at its ratio over contexts of about so many tokens, as far as the cases'
    passages go. When stopped it reports on the lengths that were done; raises QuireError when none was."""
    points = {name: tuple(_points(quality, name)) for name in quality.rules}
    ratios = {name: least(Curve(name, points[name], quality.questions), kl) for name in points}
    rows: list[MatchedRow] = []
    with scratch_engine(session) as engine:
        try_out(engine, should_stop)
        cases = make_cases(engine)
        try:
            with engine.runtime.abortable(should_stop):
                for length in lengths:
                    rows += _rows(engine, prompt_of(engine, _of_length(engine, cases, length)), ratios, runs, say)
        except Aborted:
            if not rows:
                raise stopped() from None
    return MatchedReport(
        tuple(rows),
        kl,
        points,
        quality.floor.kl,
        quality.model,
        quality.runtime,
        quality.questions,
        quality.context_tokens,
    )


def _points(quality: FidelityReport, selector: str) -> Iterator[tuple[float, float]]:
    return ((row.ratio, row.kl) for row in quality.rows if row.selector == selector)


def least(curve: Curve, kl: float) -> float:
    """The least ratio that reaches a KL; 1 where no measured one does."""
    reached = min(below for _, below in curve.falling()[:-1]) <= kl
    return curve.ratio(kl) if reached else 1.0


def _of_length(engine: Engine, cases: Sequence[Case], tokens: int) -> Case:
    """The first question over passages of all of them, of about so many tokens together."""
    chosen: list[str] = []
    for text in dict.fromkeys(chain.from_iterable(case.passages for case in cases)):
        if tokens <= 0:
            break
        chosen.append(text)
        tokens -= engine.count_tokens(text)
    return Case(cases[0].question, (), tuple(chosen))


def _rows(engine: Engine, prompt: Prompt, ratios: Mapping[str, float], runs: int, say: Say) -> Iterator[MatchedRow]:
    tokens = prompt.context_tokens
    say(f"{tokens} tokens of context: caching {len(prompt.chunks)} passages")
    engine.runtime.reserve(2 * len(prompt.tokens) + SCRATCH_TOKENS)  # once, so that no way pays for growing
    ways = {_FULL: 1.0} | {name: ratio for name, ratio in ratios.items() if ratio < 1}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs):
        for name, ratio in ways.items():
            selector = selectors.parse("default" if name == _FULL else name)
            times[name].append(fidelity.first_token_ms(engine.runtime, engine.chunks, prompt, ratio, selector))
            say(f"  run {run + 1}/{runs}  {name} {ratio:.2f}: {times[name][-1]:.0f} ms")
    full = median(times[_FULL])
    for name, ratio in ({_FULL: 1.0} | dict(ratios)).items():
        ms = times.get(name, times[_FULL])
        yield MatchedRow(tokens, name, ratio, len(ms), median(ms), min(ms), max(ms), full / median(ms))


def as_json(report: MatchedReport) -> str:
    return json.dumps(asdict(report))


def table(report: MatchedReport) -> list[str]:
    r = report
    lines = [
        f"{r.model}, {r.runtime}: KL at most {r.kl:g} (noise of full prefill {r.floor_kl:.4f}) over {r.questions} "
        f"questions, {r.context_tokens:.0f} tokens of context",
        *(
            f"  {name}: KL " + ", ".join(f"{kl:.4f} at {ratio:g}" for ratio, kl in sorted(points))
            for name, points in r.curves.items()
        ),
        "",
        f"{'context':>8}  {'selector':<24}{'ratio':>6}{'runs':>6}{'median':>10}{'spread':>18}  speedup",
    ]
    for row in r.rows:
        note = "  does not reach it: full prefill" if row.ratio == 1 and row.selector != _FULL else ""
        spread = f"{row.lowest_ms:.0f}-{row.highest_ms:.0f}"
        lines.append(
            f"{row.context_tokens:>8}  {row.selector:<24}{row.ratio:>6.2f}{row.runs:>6}{row.median_ms:>7.0f} ms"
            f"{spread:>15} ms  {row.speedup:.2f}x{note}"
        )
    return lines
