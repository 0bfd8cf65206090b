"""`quire bench codec`: what fewer bits per value cost answers, plan by plan, on a real model.

Knows which variants stand side by side; how one is measured is `quire_engine.fidelity`'s.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import mean

from quire.bench import plans as bench_plans
from quire.bench.cases import Case, prompt_of, scratch_engine, stopped, try_out
from quire.bench.plans import plan_of
from quire.session import Session
from quire_engine import divergence, fidelity
from quire_engine.baselines import KV_TYPES, QuantizedLlama
from quire_engine.divergence import Divergence, Fidelity
from quire_engine.engine import Engine
from quire_engine.fidelity import InPlace, Prefilled, Reused, Trial, Variant
from quire_engine.plan import Prompt
from quire_engine.selection import selectors
from quire_engine.types import BitPlan

Say = Callable[[str], None]
_BASELINE, _FLOOR = "fp16", "floor"


@dataclass(frozen=True)
class CodecRow:
    """One plan. bits_per_value: of the passages' whole files.

    kl, first_kl, kl_p99, top1: of reuse, against full prefill.  added: mean KL beyond that of fp16 reuse, paired by
    question; low and high are its 95 % interval.  in_place: of full prefill's own rows, packed and unpacked. None where
    nothing is reused: with llama.cpp's own types.
    """

    plan: str
    bits_per_value: float
    kl_in_place: float
    p99_in_place: float
    top1_in_place: float
    kl: float | None = None
    first_kl: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    added: float | None = None
    added_low: float | None = None
    added_high: float | None = None


@dataclass(frozen=True)
class CodecReport:
    """floor: full prefill against itself, passage by passage.  context_tokens, passage_tokens: means."""

    rows: tuple[CodecRow, ...]
    floor: Fidelity
    model: str
    questions: int
    answer_tokens: int
    context_tokens: float
    passage_tokens: float
    ratio: float
    selector: str


def codec(
    session: Session,
    make_cases: Callable[[Engine], Sequence[Case]],
    plans: str,
    ratio: float,
    say: Say,
    should_stop: Callable[[], bool],
) -> CodecReport:
    """Measures plans, and fp16 with them, on the same questions. When stopped it reports on those that were done.

    plans: names with commas between them; empty: all.
    Raises QuireError when none was.
    """
    selector = selectors.parse(session.settings.selector)
    with scratch_engine(session) as engine, ExitStack() as models:
        names = bench_plans.chosen(plans, bench_plans.ALL, engine)
        ours = {name: plan_of(name, engine) for name in dict.fromkeys((_BASELINE, *names)) if name not in KV_TYPES}
        prompts = [prompt_of(engine, case) for case in make_cases(engine)]
        try_out(engine, should_stop)
        variants: dict[str, Variant] = {_FLOOR: Prefilled(engine.runtime, by_passage=True)}
        for name, plan in ours.items():
            variants |= {name: Reused(plan, ratio, selector.name), _in_place(name): InPlace(plan)}
        room = max(len(prompt.tokens) for prompt in prompts) + 2 * fidelity.ANSWER_TOKENS
        for name in _types_for(engine, names, say):
            variants[_in_place(name)] = Prefilled(models.enter_context(_quantized(engine, name, room)))
        tally, folder = _Tally(ours, len(prompts), say), engine.catalogue.root.parent
        fidelity.compare(engine.runtime, prompts, variants, folder, tally.take, should_stop, engine.chunks.unrelated)
        if not tally.prompts:
            raise stopped()
        return CodecReport(
            tuple(tally.rows()),
            divergence.fidelity(tally.found[_FLOOR]),
            engine.model_name,
            len(tally.prompts),
            fidelity.ANSWER_TOKENS,
            mean(prompt.context_tokens for prompt in tally.prompts),
            mean(len(chunk) for prompt in tally.prompts for chunk in prompt.chunks),
            ratio,
            selector.name,
        )


class _Tally:
    """What was found so far, question by question."""

    def __init__(self, plans: Mapping[str, BitPlan], questions: int, say: Say) -> None:
        self.found: dict[str, list[Divergence]] = {}
        self.prompts: list[Prompt] = []
        self._plans = plans
        self._questions = questions
        self._say = say
        self._bytes = dict.fromkeys(plans, 0)
        self._values = dict.fromkeys(plans, 0)

    def take(self, trial: Trial, found: Mapping[str, Divergence]) -> None:
        """A finished question."""
        self.prompts.append(trial.prompt)
        for name, distance in found.items():
            self.found.setdefault(name, []).append(distance)
        for name, plan in self._plans.items():
            stored = trial.stored(plan)
            self._bytes[name] += stored.size_bytes
            self._values[name] += stored.values
        figures = ", ".join(f"{name} {found[name].mean_kl:.4f}" for name in found if name in self._plans)
        self._say(f"{len(self.prompts)}/{self._questions} questions  KL: {figures}")

    def rows(self) -> Iterator[CodecRow]:
        for name in self._plans:
            reused, alone = divergence.fidelity(self.found[name]), divergence.fidelity(self.found[_in_place(name)])
            added = divergence.added(self.found[name], self.found[_BASELINE])
            yield CodecRow(
                name,
                8 * self._bytes[name] / self._values[name],
                *(alone.kl, alone.kl_p99, alone.top1),
                *(reused.kl, reused.first_kl, reused.kl_p99, reused.top1),
                *(added.kl, added.low, added.high),
            )
        for name, kv_type in KV_TYPES.items():
            if _in_place(name) in self.found:
                alone = divergence.fidelity(self.found[_in_place(name)])
                yield CodecRow(name, kv_type.bits_per_value, alone.kl, alone.kl_p99, alone.top1)


def _in_place(name: str) -> str:
    return f"{name} in place"


def _types_for(engine: Engine, names: Sequence[str], say: Say) -> Iterator[str]:
    """Those of llama.cpp's own types that are wanted and that the model's heads can have."""
    for name in (name for name in KV_TYPES if name in names):
        if QuantizedLlama.takes(engine.shape, KV_TYPES[name]):
            yield name
        else:
            say(f"{name} is left out: it needs heads whose size is a multiple of {KV_TYPES[name].block}.")


@contextmanager
def _quantized(engine: Engine, name: str, room: int) -> Iterator[QuantizedLlama]:
    llama = QuantizedLlama(engine.model_file, room, engine.threads, KV_TYPES[name])
    try:
        yield llama
    finally:
        llama.close()


def as_json(report: CodecReport) -> str:
    return json.dumps(asdict(report))


def table(report: CodecReport) -> list[str]:
    r, floor = report, report.floor
    base = next(row.kl for row in r.rows if row.plan == _BASELINE) or 0.0
    lines = [
        f"{r.model}: {r.questions} questions over {r.context_tokens:.0f} tokens of context in passages of "
        f"{r.passage_tokens:.0f}, {r.answer_tokens} tokens of answer",
        f"Reuse: ratio {r.ratio:g}, selector {r.selector}. All against full prefill; its own noise (passage "
        f"by passage): KL {floor.kl:.4f}, 99 % {floor.kl_p99:.4f}, top-1 {floor.top1:.3f}",
        "",
        f"{'':<15}{'bits per':>9}  {'reused':<64}in place",
        f"{'plan':<15}{'value':>9}  KL      first   99 %    top-1  {'added to fp16 (95 %)':<33}KL      top-1",
    ]
    for row in r.rows:
        lines.append(f"{row.plan:<15}{row.bits_per_value:>9.2f}  {_reused(row, base):<64}{_alone(row)}")
    return lines


def _reused(row: CodecRow, base: float) -> str:
    if row.kl is None or row.added is None:
        return ""
    share = f" {100 * row.added / base:+.0f} %" if base else ""
    added = f"{row.added:+.4f} ({row.added_low:+.4f} {row.added_high:+.4f}){share}"
    return f"{row.kl:<8.4f}{row.first_kl:<8.4f}{row.kl_p99:<8.4f}{row.top1:<7.3f}{added}"


def _alone(row: CodecRow) -> str:
    return f"{row.kl_in_place:<8.4f}{row.top1_in_place:.3f}"
