"""`quire bench fidelity`: how near answers over stored KV are to full prefill's, by selector, ratio and precision plan.

Finished questions are kept in a file until all are done, so that a run that was stopped goes on. Knows which variants
stand side by side; how one is measured is `quire_engine.fidelity`'s.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from quire import paths
from quire.bench.cases import Case, contains, f1, prompt_of, scratch_engine, stopped, try_out
from quire.bench.plans import plan_of
from quire.session import Session
from quire_engine import fidelity
from quire_engine.engine import Engine
from quire_engine.errors import Aborted
from quire_engine.fidelity import Divergence, Prefilled, Reply, Reused, Trial, Variant
from quire_engine.plan import Prompt
from quire_engine.selection import selectors

Say = Callable[[str], None]
_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Way:
    """A row's settings. selector: as it was named; empty for full prefill."""

    selector: str
    ratio: float
    plan: str

    @property
    def name(self) -> str:
        return f"{self.selector} {self.ratio:g} {self.plan}"


EXACT, FLOOR = Way("", 1.0, "exact"), Way("", 1.0, "floor")


@dataclass(frozen=True)
class Finding:
    """One way's answer to one question, free-running in text and time. like_exact: word for word full prefill's.
    contains, f1: of the gold answer; zero where nobody knows it."""

    kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    first_token_ms: float
    like_exact: bool
    contains: bool
    f1: float


@dataclass(frozen=True)
class FidelityRow:
    """One way over all questions. Pairs named `..._interval` are the 95 % intervals of means over questions.

    kl, first_kl, kl_p99, top1: teacher-forced.  contains, f1: of the gold answers, free-running; None where questions
    have none.  like_exact: share of answers that are full prefill's word for word.  speedup: median first-token time of
    full prefill / this one's.
    """

    selector: str
    ratio: float
    plan: str
    questions: int
    kl: float
    kl_interval: tuple[float, float]
    first_kl: float
    kl_p99: float
    top1: float
    top1_interval: tuple[float, float]
    contains: float | None
    contains_interval: tuple[float, float] | None
    f1: float | None
    like_exact: float
    first_token_ms: float
    speedup: float


@dataclass(frozen=True)
class FidelityReport:
    """exact, floor: full prefill again, its context at once, and in batches of floor_batch tokens, as few as a stitched
    prompt computes at once. rules: what each selector's name stands for.  context_tokens: mean."""

    rows: tuple[FidelityRow, ...]
    exact: FidelityRow
    floor: FidelityRow
    floor_batch: int
    rules: Mapping[str, str]
    model: str
    questions: int
    forced_tokens: int
    answer_tokens: int
    context_tokens: float


def measure(
    session: Session,
    make_cases: Callable[[Engine], Sequence[Case]],
    ways: Sequence[Way],
    say: Say,
    should_stop: Callable[[], bool],
) -> FidelityReport:
    """Measures all ways on the same questions. When stopped it reports on those that were done.

    Raises QuireError when none was.
    """
    rules = {way.selector: selectors.parse(way.selector).name for way in ways}
    with scratch_engine(session) as engine:
        named = {way: plan_of(way.plan, engine) for way in ways}
        cases = make_cases(engine)
        prompts = [prompt_of(engine, case) for case in cases]
        batch = max(1, round(min(way.ratio for way in ways) * mean(prompt.context_tokens for prompt in prompts)))
        variants: dict[Way, Variant] = {EXACT: Prefilled(engine.runtime), FLOOR: Prefilled(engine.runtime, batch)}
        variants |= {way: Reused(plan, way.ratio, rules[way.selector]) for way, plan in named.items()}
        try_out(engine, should_stop)
        work = _Work(engine, variants, _Kept(_place(engine, variants, batch)), say)
        if work.kept.found:
            say(f"Going on from {work.kept.path}; delete it to begin anew")
        done = [
            (case, prompt, found)
            for number, (case, prompt) in enumerate(zip(cases, prompts, strict=True), 1)
            if (found := work.question(case, prompt, f"{number}/{len(cases)}", should_stop))
        ]
        if not done:
            raise stopped()
        if len(done) == len(cases):
            work.kept.path.unlink(missing_ok=True)
        gold = all(case.gold for case, _, _ in done)
        exact_ms = median(found[EXACT].first_token_ms for _, _, found in done)
        row = {way: _row(way, [found[way] for _, _, found in done], exact_ms, gold) for way in variants}
        return FidelityReport(
            tuple(row[way] for way in ways),
            row[EXACT],
            row[FLOOR],
            batch,
            rules,
            engine.model_name,
            len(done),
            fidelity.ANSWER_TOKENS,
            _ANSWER_TOKENS,
            mean(prompt.context_tokens for _, prompt, _ in done),
        )


class _Work:
    """Measures one question at a time, or takes it from the file."""

    def __init__(self, engine: Engine, variants: Mapping[Way, Variant], kept: "_Kept", say: Say) -> None:
        self.kept = kept
        self._engine = engine
        self._variants = variants
        self._say = say
        chosen = [variant for variant in variants.values() if isinstance(variant, Reused)]
        self._plans = {variant.plan for variant in chosen}
        parsed = [selectors.parse(variant.selector) for variant in chosen]
        self._scores = frozenset[str]().union(*(selector.stored_scores for selector in parsed))

    def question(
        self, case: Case, prompt: Prompt, number: str, should_stop: Callable[[], bool]
    ) -> dict[Way, Finding] | None:
        """None when it was stopped."""
        key = hashlib.sha256(repr((prompt.tokens, case.gold)).encode()).hexdigest()
        if key not in self.kept.found:
            try:
                with self._engine.runtime.abortable(should_stop):
                    found = self._measure(case, prompt, number, should_stop)
            except Aborted:
                return None
            self.kept.add(key, found)
        return {way: self.kept.found[key][way.name] for way in self._variants}

    def _measure(self, case: Case, prompt: Prompt, number: str, should_stop: Callable[[], bool]) -> dict[str, Finding]:
        engine, found, folder = self._engine, dict[str, Finding](), self._engine.catalogue.root.parent
        with Trial(engine.runtime, prompt, folder, engine.chunks.unrelated, scores=self._scores) as trial:
            for plan in self._plans:  # now, so that no way's time holds the encoding
                trial.stored(plan)
            for way, variant in self._variants.items():
                if should_stop():
                    raise Aborted
                divergence, reply = trial.examine(variant, engine.vocabulary.is_end, _ANSWER_TOKENS)
                if way == EXACT:
                    exact = reply.tokens
                found[way.name] = self._finding(case, divergence, reply, exact)
                kl, ms = divergence.mean_kl, reply.first_token_ms
                self._say(f"{number}  {way.selector or way.plan:<20}{way.ratio:<6g}KL {kl:.4f}  {ms:.0f} ms")
        return found

    def _finding(self, case: Case, divergence: Divergence, reply: Reply, exact: tuple[int, ...]) -> Finding:
        text = b"".join(map(self._engine.vocabulary.piece, reply.tokens)).decode("utf-8", "replace")
        return Finding(
            divergence.kl,
            divergence.agrees,
            reply.first_token_ms,
            reply.tokens == exact,
            contains(text, case.gold),
            f1(text, case.gold),
        )


class _Kept:
    """Finished questions, one a line. A line that was cut short is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Finding]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
                self.found[entry["question"]] = {way: Finding(**found) for way, found in entry["found"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def add(self, key: str, found: Mapping[str, Finding]) -> None:
        self.found[key] = dict(found)
        line = json.dumps({"question": key, "found": {way: asdict(one) for way, one in found.items()}})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _place(engine: Engine, variants: Mapping[Way, Variant], batch: int) -> Path:
    """A file for this model and these settings. Questions are told apart inside it."""
    settings = [repr(variant) for variant in variants.values() if isinstance(variant, Reused)]
    names = sorted(way.name for way in variants)
    told = repr((engine.tokenizer_id, engine.threads, names, settings, batch, fidelity.ANSWER_TOKENS, _ANSWER_TOKENS))
    return paths.cache_dir() / "bench" / f"fidelity-{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl"


def _row(way: Way, findings: Sequence[Finding], exact_ms: float, gold: bool) -> FidelityRow:
    divergences = [Divergence(tuple(found.kl), tuple(found.agrees)) for found in findings]
    total, ms = fidelity.fidelity(divergences), median(found.first_token_ms for found in findings)
    hits = [float(found.contains) for found in findings]
    return FidelityRow(
        way.selector or way.plan,
        way.ratio,
        way.plan if way.selector else "",
        len(findings),
        total.kl,
        fidelity.interval([one.mean_kl for one in divergences]),
        total.first_kl,
        total.kl_p99,
        total.top1,
        fidelity.interval([mean(one.agrees) for one in divergences]),
        mean(hits) if gold else None,
        fidelity.interval(hits) if gold else None,
        mean(found.f1 for found in findings) if gold else None,
        mean(found.like_exact for found in findings),
        ms,
        exact_ms / ms,
    )


def as_json(report: FidelityReport) -> str:
    return json.dumps(asdict(report))


def table(report: FidelityReport) -> list[str]:
    r, width = report, max(20, *(len(row.selector) + 2 for row in report.rows))
    lines = [
        f"{r.model}: {r.questions} questions over {r.context_tokens:.0f} tokens of context",
        f"KL and top-1 along {r.forced_tokens} tokens of full prefill's answer; gold, F1 and same (as full prefill's, "
        f"word for word) of free answers of {r.answer_tokens}",
        f"floor: full prefill in batches of {r.floor_batch}",
        "",
        f"{'selector':<{width}}{'ratio':<7}{'plan':<10}{'KL (95 %)':<24}{'first':<8}{'99 %':<8}{'top-1 (95 %)':<20}"
        f"{'gold':<7}{'F1':<7}{'same':<7}first token",
    ]
    for row in (r.exact, r.floor, *r.rows):
        kl = f"{row.kl:.4f} ({row.kl_interval[0]:.4f} {row.kl_interval[1]:.4f})"
        top1 = f"{row.top1:.3f} ({row.top1_interval[0]:.3f} {row.top1_interval[1]:.3f})"
        gold = "" if row.contains is None else f"{row.contains:.2f}"
        shared = "" if row.f1 is None else f"{row.f1:.2f}"
        lines.append(
            f"{row.selector:<{width}}{row.ratio:<7g}{row.plan:<10}{kl:<24}{row.first_kl:<8.4f}{row.kl_p99:<8.4f}{top1:<20}"
            f"{gold:<7}{shared:<7}{row.like_exact:<7.2f}{row.first_token_ms:.0f} ms ({row.speedup:.1f}x)"
        )
    return lines
