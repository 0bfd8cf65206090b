"""`quire bench fidelity`: how near answers over stored KV are to full prefill's, by selector, ratio and precision plan.

Whatever was measured is kept, question by question and way by way: a run that was stopped goes on, and one with another
selector measures that one only. Knows which variants stand side by side; how one is measured is
`quire_engine.fidelity`'s.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from quire import __version__, paths
from quire.bench.cases import Case, contains, f1, prompt_of, scratch_engine, stopped, try_out
from quire.bench.plans import plan_of
from quire.session import Session
from quire_engine import divergence, fidelity
from quire_engine.divergence import Divergence
from quire_engine.engine import Engine
from quire_engine.errors import Aborted
from quire_engine.fidelity import Prefilled, Reused, Trial
from quire_engine.plan import Prompt
from quire_engine.selection import selectors
from quire_engine.selection.quality import Curve

Say = Callable[[str], None]
Progress = Callable[[int, int], None]
_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Way:
    """A row's settings. selector: as it was named; empty for full prefill."""

    selector: str
    ratio: float
    plan: str


EXACT, FLOOR = Way("", 1.0, "exact"), Way("", 1.0, "floor")


@dataclass(frozen=True)
class Finding:
    """One way's answer to one question. full_ms: full prefill's first token in the same run.
    answer: free-running; None where it was not asked for."""

    kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    first_token_ms: float
    full_ms: float
    answer: str | None = None


@dataclass(frozen=True)
class FidelityRow:
    """One way over all questions. Pairs named `..._interval` are 95 % intervals over questions.

    kl, first_kl, kl_p99, top1: teacher-forced.  vs_baseline: its KL as a share of the baseline selector's at the same
    ratio and plan, over the same questions; None where the baseline was not measured.  contains, f1: of the gold
    answers, free-running; None where questions have none or answers were not asked for.  contains_vs_exact: answers
    that contain them, as a share of full prefill's.  like_exact: share of answers that are its own word for word.
    speedup: median first-token time of full prefill, in the same runs / this one's.
    """

    selector: str
    ratio: float
    plan: str
    questions: int
    kl: float
    kl_interval: tuple[float, float]
    vs_baseline: float | None
    vs_baseline_interval: tuple[float, float] | None
    first_kl: float
    kl_p99: float
    top1: float
    top1_interval: tuple[float, float]
    contains: float | None
    contains_interval: tuple[float, float] | None
    contains_vs_exact: float | None
    contains_vs_exact_interval: tuple[float, float] | None
    f1: float | None
    like_exact: float | None
    first_token_ms: float
    speedup: float


@dataclass(frozen=True)
class FidelityReport:
    """exact, floor: full prefill, and once more passage by passage, in the batches that storing reads.
    rules: what each selector's name stands for.  answer_tokens: of free answers, none if 0.  context_tokens: mean."""

    rows: tuple[FidelityRow, ...]
    exact: FidelityRow
    floor: FidelityRow
    baseline: str
    rules: Mapping[str, str]
    model: str
    runtime: str
    questions: int
    forced_tokens: int
    answer_tokens: int
    context_tokens: float


@dataclass(frozen=True)
class Wanted:
    """What is measured. baseline: the selector whose KL the others' are compared with.  answers: free ones too, which
    takes longer.  anew: what was measured before is forgotten."""

    ways: tuple[Way, ...]
    baseline: str = "spectral"
    answers: bool = True
    anew: bool = False


def measure(
    session: Session,
    make_cases: Callable[[Engine], Sequence[Case]],
    wanted: Wanted,
    say: Say,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> FidelityReport:
    """Measures all ways on the same questions. When stopped it reports on those that were done.

    progress: (question, way) pairs done, and all of them.  Raises QuireError when no question was done.
    """
    rules = {way.selector: selectors.parse(way.selector).name for way in wanted.ways}
    with scratch_engine(session) as engine:
        plans = {way: plan_of(way.plan, engine) for way in wanted.ways}
        cases = make_cases(engine)
        prompts = [prompt_of(engine, case) for case in cases]
        variants: dict[Way, Prefilled | Reused] = {
            EXACT: Prefilled(engine.runtime),
            FLOOR: Prefilled(engine.runtime, by_passage=True),
        }
        variants |= {way: Reused(plan, way.ratio, rules[way.selector]) for way, plan in plans.items()}
        try_out(engine, should_stop)
        work = _Work(engine, variants, wanted.answers, _Kept(_place(engine), wanted.anew), progress, len(prompts))
        if known := work.known(prompts):
            say(f"{known} of {len(prompts) * len(variants)} measurements were done before; --anew measures them again")
        done = [
            (case, prompt, found)
            for case, prompt in zip(cases, prompts, strict=True)
            if (found := work.question(prompt, should_stop))
        ]
        if not done:
            raise stopped()
        summed = _Sum(wanted, [case for case, _, _ in done], [found for _, _, found in done])
        return FidelityReport(
            tuple(map(summed.row, wanted.ways)),
            summed.row(EXACT),
            summed.row(FLOOR),
            wanted.baseline,
            rules,
            engine.model_name,
            engine.runtime.name,
            len(done),
            fidelity.ANSWER_TOKENS,
            _ANSWER_TOKENS * wanted.answers,
            mean(prompt.context_tokens for _, prompt, _ in done),
        )


class _Work:
    """Measures one question at a time, or takes what is known of it."""

    def __init__(
        self,
        engine: Engine,
        variants: Mapping[Way, Prefilled | Reused],
        answers: bool,
        kept: "_Kept",
        progress: Progress,
        questions: int,
    ) -> None:
        self._engine = engine
        self._variants = variants
        self._answers = answers
        self._kept = kept
        self._names = {way: _name(way, variant) for way, variant in variants.items()}
        self._progress = progress
        self._done, self._all = 0, questions * len(variants)

    def known(self, prompts: Sequence[Prompt]) -> int:
        """How many pairs of question and way need not be measured."""
        return sum(len(self._variants) - len(self._missing(_key(prompt))) for prompt in prompts)

    def question(self, prompt: Prompt, should_stop: Callable[[], bool]) -> dict[Way, Finding] | None:
        """None when it was stopped; what was measured until then is kept."""
        key = _key(prompt)
        missing = self._missing(key)
        self._count(len(self._variants) - len(missing))
        if missing and should_stop():
            return None
        if missing:
            try:
                with self._engine.runtime.abortable(should_stop):
                    for way, found in self._measured(missing, prompt, should_stop):
                        self._kept.add(key, self._names[way], found)
                        self._count(1)
            except Aborted:
                return None
        return {way: self._kept.found[key, name] for way, name in self._names.items()}

    def _missing(self, key: str) -> list[Way]:
        """The ways that are not known; an answer that was not asked for before is."""
        known = {way: self._kept.found.get((key, name)) for way, name in self._names.items()}
        return [way for way, found in known.items() if found is None or (self._answers and found.answer is None)]

    def _measured(
        self, ways: Sequence[Way], prompt: Prompt, should_stop: Callable[[], bool]
    ) -> Iterator[tuple[Way, Finding]]:
        engine, variants = self._engine, [self._variants[way] for way in ways]
        reused = [variant for variant in variants if isinstance(variant, Reused)]
        scores = frozenset[str]().union(*(selectors.parse(variant.selector).stored_scores for variant in reused))
        folder, is_end = engine.catalogue.root.parent, engine.vocabulary.is_end
        free = _ANSWER_TOKENS * self._answers
        with Trial(engine.runtime, prompt, folder, engine.chunks.unrelated, scores=scores, free_tokens=free) as trial:
            for plan in {variant.plan for variant in reused}:  # now, so that no way's time holds the encoding
                trial.stored(plan)
            for way, variant in zip(ways, variants, strict=True):
                if should_stop():
                    raise Aborted
                said: tuple[int, ...] = ()
                if way == EXACT:
                    distance, ms = trial.exact, trial.full_prefill_ms
                    said = trial.spoken(is_end, free)
                elif self._answers:
                    distance, reply = trial.examine(variant, is_end, free)
                    ms, said = reply.first_token_ms, reply.tokens
                else:
                    distance, ms = trial.timed(variant)
                text = b"".join(map(engine.vocabulary.piece, said)).decode("utf-8", "replace")
                answer = text if self._answers else None
                yield way, Finding(distance.kl, distance.agrees, ms, trial.full_prefill_ms, answer)

    def _count(self, pairs: int) -> None:
        self._done += pairs
        self._progress(self._done, self._all)


def _key(prompt: Prompt) -> str:
    return hashlib.sha256(repr(prompt.tokens).encode()).hexdigest()[:24]


def _name(way: Way, variant: Prefilled | Reused) -> str:
    """Names everything that its results depend on."""
    if isinstance(variant, Reused):
        return f"{variant.selector} {way.ratio:g} {hashlib.sha256(repr(variant.plan).encode()).hexdigest()[:16]}"
    return f"{way.plan} by passage" if variant.by_passage else way.plan


class _Kept:
    """What was measured, by question and way, one a line. A line that was cut short is forgotten."""

    def __init__(self, path: Path, anew: bool) -> None:
        self.found: dict[tuple[str, str], Finding] = {}
        self._path = path
        if anew:
            path.unlink(missing_ok=True)
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
            try:
                entry = json.loads(line)
                self.found[entry["question"], entry["way"]] = Finding(**entry["found"])
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, question: str, way: str, found: Finding) -> None:
        self.found[question, way] = found
        line = json.dumps({"question": question, "way": way, "found": asdict(found)})
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}")  # behind whatever was cut short


def _place(engine: Engine) -> Path:
    """A file for what is the same in all measurements of one model here."""
    same = (__version__, engine.tokenizer_id, engine.runtime.name, engine.threads)
    told = repr((same, fidelity.ANSWER_TOKENS, _ANSWER_TOKENS))
    return paths.cache_dir() / "bench" / f"fidelity-{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl"


class _Sum:
    """All ways over the questions that were done."""

    def __init__(self, wanted: Wanted, cases: Sequence[Case], found: Sequence[Mapping[Way, Finding]]) -> None:
        self._wanted = wanted
        self._gold = [case.gold for case in cases]
        self._found = found

    def row(self, way: Way) -> FidelityRow:
        findings = [found[way] for found in self._found]
        divergences = [Divergence(tuple(found.kl), tuple(found.agrees)) for found in findings]
        total, kl = divergence.fidelity(divergences), [one.mean_kl for one in divergences]
        base = Way(self._wanted.baseline, way.ratio, way.plan)
        against = divergence.share(kl, self._kl(base)) if base in self._wanted.ways else None
        hits, exact = self._hits(way), self._hits(EXACT)
        kept = [1 + (ours - theirs) / mean(exact) for ours, theirs in zip(hits, exact, strict=True) if any(exact)]
        ms = median(found.first_token_ms for found in findings)
        return FidelityRow(
            way.selector or way.plan,
            way.ratio,
            way.plan if way.selector else "",
            len(findings),
            total.kl,
            divergence.interval(kl),
            against.value if against else None,
            (against.low, against.high) if against else None,
            total.first_kl,
            total.kl_p99,
            total.top1,
            divergence.interval([mean(one.agrees) for one in divergences]),
            mean(hits) if hits else None,
            divergence.interval(hits) if hits else None,
            mean(kept) if kept else None,
            divergence.interval(kept) if kept else None,
            mean(self._by_gold(way, f1)) if hits else None,
            mean(found[way].answer == found[EXACT].answer for found in self._found) if self._wanted.answers else None,
            ms,
            median(found.full_ms for found in findings) / ms,
        )

    def _kl(self, way: Way) -> list[float]:
        return [mean(found[way].kl) for found in self._found]

    def _hits(self, way: Way) -> list[float]:
        return self._by_gold(way, contains)

    def _by_gold(self, way: Way, judge: Callable[[str, Sequence[str]], float]) -> list[float]:
        """Of every answer; nothing where not all questions have gold answers, or answers were not asked for."""
        if not (self._wanted.answers and all(self._gold)):
            return []
        return [
            float(judge(found[way].answer or "", gold)) for found, gold in zip(self._found, self._gold, strict=True)
        ]


def curves(report: FidelityReport, plan: str) -> list[Curve]:
    """What the report says of every selector with a precision plan: KL by ratio."""
    points: dict[str, dict[float, float]] = {}
    for row in report.rows:
        if row.plan == plan:
            points.setdefault(report.rules[row.selector], {})[row.ratio] = row.kl
    return [Curve(rule, tuple(sorted(of_rule.items())), report.questions) for rule, of_rule in points.items()]


def as_json(report: FidelityReport) -> str:
    return json.dumps(asdict(report))


def table(report: FidelityReport) -> list[str]:
    r = report
    lines = [
        f"{r.model}, {r.runtime}: {r.questions} questions over {r.context_tokens:.0f} tokens of context",
        f"KL and top-1 along {r.forced_tokens} tokens of full prefill's answer, with 95 % intervals",
        "exact: full prefill; floor: the same passage by passage",
    ]
    if r.answer_tokens:
        lines.append(f"gold, F1, same (as exact's, word for word): of free answers of {r.answer_tokens} tokens")
    titles = (
        *("selector", "ratio", "plan", "KL", f"of {r.baseline}'s", "first", "99 %", "top-1"),
        *("gold", "of exact's", "F1", "same", "first token"),
    )
    return [*lines, "", *_in_columns([titles, *map(_cells, (r.exact, r.floor, *r.rows))])]


def _cells(row: FidelityRow) -> tuple[str, ...]:
    return (
        row.selector,
        f"{row.ratio:g}",
        row.plan,
        _with(row.kl, row.kl_interval, 4),
        _with(row.vs_baseline, row.vs_baseline_interval, 2),
        f"{row.first_kl:.4f}",
        f"{row.kl_p99:.4f}",
        _with(row.top1, row.top1_interval, 3),
        "" if row.contains is None else f"{row.contains:.2f}",
        "" if row.contains_vs_exact is None else f"{100 * row.contains_vs_exact:.0f} %",
        "" if row.f1 is None else f"{row.f1:.2f}",
        "" if row.like_exact is None else f"{row.like_exact:.2f}",
        f"{row.first_token_ms:.0f} ms ({row.speedup:.1f}x)",
    )


def _with(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    if value is None or interval is None:
        return ""
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} {interval[1]:.{digits}f})"


def _in_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first line has titles; columns with nothing below theirs are left out."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
