"""Measurements of time, and of answers: `quire bench ttft`, `followup`, `answers`.

Every number is taken in one run, methods in turn, against baselines in the same run; tables state how often. Knows
what to compare, not how prompts are computed.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quire.bench.cases import Case, contains, from_file, passages_of, scratch_engine, try_out
from quire.session import Session
from quire_engine import divergence
from quire_engine.baselines import PlainLlama, prefix_only_ms
from quire_engine.engine import Engine, Request, never
from quire_engine.types import Answered, Exchange, Text

_QUESTION = "What do the documents say about the time before the war?"
_ANSWER_TOKENS = 48

Say = Callable[[str], None]


@dataclass(frozen=True)
class TtftRow:
    """First-token time of one method at one length. speedup: median of full prefill by the same runtime / median.

    source: where stored KV came from: "memory" (page cache warm), "disk" (page cache dropped), or "" for none.
    """

    context_tokens: int
    method: str
    ratio: float
    source: str
    runs: int
    median_ms: float
    lowest_ms: float
    highest_ms: float
    speedup: float


def ttft(session: Session, lengths: Sequence[int], ratios: Sequence[float], runs: int, say: Say) -> list[TtftRow]:
    """Time to the first token of full prefill (this runtime, plain llama-cpp-python), prefix reuse and Quire."""
    rows: list[TtftRow] = []
    with scratch_engine(session) as engine:
        try_out(engine, never)
        for length in lengths:
            rows += _Ttft(engine, passages_of(session, engine, length)).run(ratios, runs, say)
    return rows


class _Ttft:
    """One length: all methods in turn, several rounds."""

    def __init__(self, engine: Engine, passages: tuple[str, ...]) -> None:
        self._engine = engine
        self._request = Request(_QUESTION, passages, max_tokens=1, insist=True)
        self._prompt = engine.prompt(self._request)
        room = len(self._prompt.tokens) + 64
        self._plain = PlainLlama(engine.model_file, room, engine.threads)

    def run(self, ratios: Sequence[float], runs: int, say: Say) -> list[TtftRow]:
        tokens = self._prompt.context_tokens
        say(f"{tokens} tokens of context: caching {len(self._prompt.chunks)} passages")
        self._engine.cache(self._request.passages)
        self._engine.runtime.reserve(2 * tokens + 2048)  # once, so that no method pays for growing
        methods = self._methods(ratios)
        times: dict[tuple[str, float, str], list[float]] = {name: [] for name in methods}
        for number in range(runs):
            for name, measure in methods.items():
                times[name].append(measure())
                say(f"  run {number + 1}/{runs}  {name[0]} {name[1]:.2f} {name[2]}: {times[name][-1]:.0f} ms")
        self._plain.close()
        full = statistics.median(times["full prefill", 1.0, ""])
        return [
            TtftRow(tokens, *name, len(ms), statistics.median(ms), min(ms), max(ms), full / statistics.median(ms))
            for name, ms in times.items()
        ]

    def _methods(self, ratios: Sequence[float]) -> dict[tuple[str, float, str], Callable[[], float]]:
        engine, prompt = self._engine, self._prompt
        methods: dict[tuple[str, float, str], Callable[[], float]] = {
            ("full prefill", 1.0, ""): lambda: self._quire(1.0, "memory"),
            ("plain llama-cpp-python", 1.0, ""): lambda: self._plain.prefill_ms(prompt.tokens),
            ("prefix only", 1.0, "memory"): lambda: prefix_only_ms(engine.runtime, engine.chunks, prompt),
        }
        for ratio in ratios:
            for source in ("memory", "disk"):
                methods["quire", ratio, source] = lambda r=ratio, s=source: self._quire(r, s)  # type: ignore[misc]
        return methods

    def _quire(self, ratio: float, source: str) -> float:
        if source == "disk":
            self._engine.chunks.store.drop_from_memory({segment.key for segment in self._prompt.stored})
        request = Request(_QUESTION, self._request.passages, ratio, max_tokens=1, insist=True)
        answered = [event for event in self._engine.answer(request) if isinstance(event, Answered)]
        return answered[0].timings.first_token_ms


@dataclass(frozen=True)
class AnswersRow:
    """How many of one ratio's answers contain a gold answer. lost, gained: those where the exact answer does and this
    one does not, and the other way round.  low, high: 95 % interval of (gained - lost) / questions, the bootstrap's."""

    ratio: float
    selector: str
    questions: int
    contained: int
    lost: int
    gained: int
    low: float
    high: float
    same_as_exact: int


def answers(
    session: Session, data: Path, questions: int, passages: int, ratios: Sequence[float], say: Say
) -> list[AnswersRow]:
    """Asks questions of a file (see `from_file`) over their passages, exactly and at each ratio.

    An answer counts when it contains a gold answer, letter case and punctuation aside.
    """
    cases = from_file(data, questions, passages)
    selector = session.settings.selector
    given: dict[float, list[str]] = {ratio: [] for ratio in dict.fromkeys((1.0, *ratios))}
    hits: dict[float, list[bool]] = {ratio: [] for ratio in given}
    with scratch_engine(session) as engine:
        for number, case in enumerate(cases, 1):
            for ratio in given:
                given[ratio].append(_answer(engine, case, ratio, selector))
                hits[ratio].append(contains(given[ratio][-1], case.gold))
            found = "  ".join("yes" if of_ratio[-1] else "no " for of_ratio in hits.values())
            say(f"{number}/{len(cases)}  {found}  {case.question}")
    rows = []
    for ratio, texts in given.items():
        changes = [int(now) - int(before) for now, before in zip(hits[ratio], hits[1.0], strict=True)]
        low, high = divergence.interval(changes)
        lost, gained, same = changes.count(-1), changes.count(1), sum(map(str.__eq__, texts, given[1.0]))
        rows.append(AnswersRow(ratio, selector, len(cases), sum(hits[ratio]), lost, gained, low, high, same))
    return rows


@dataclass(frozen=True)
class FollowupRow:
    """First-token time of one turn of a conversation. new_tokens: what the turn adds to the context.
    speedup: median of full prefill of the same context / median."""

    turn: str
    context_tokens: int
    new_tokens: int
    method: str
    runs: int
    median_ms: float
    lowest_ms: float
    highest_ms: float
    speedup: float


_GROWN, _PREFIX, _FULL = "quire", "prefix kept, new part prefilled", "full prefill"


def followup(session: Session, turns: int, tokens: int, runs: int, say: Say) -> list[FollowupRow]:
    """Time to the first token of every turn of a conversation, and of one more after reopening it.

    Against a growing context whose new part is prefilled (what a prefix cache saves), and full prefill. All three take
    turns in one run. tokens: of the passages that each turn brings.
    """
    times: dict[tuple[str, str], list[float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with scratch_engine(session) as engine:
        try_out(engine, never)
        texts = passages_of(session, engine, tokens * (turns + 1))
        share = -(-len(texts) // (turns + 1))
        brought = [texts[start : start + share] for start in range(0, len(texts), share)]
        engine.cache(texts)
        for run in range(runs):
            for name, tokens_now, ms in _conversation(engine, session, brought, f"({run})"):
                sizes[name] = tokens_now
                for method, took in ms.items():
                    times.setdefault((name, method), []).append(took)
                figures = ", ".join(f"{method} {took:.0f} ms" for method, took in ms.items())
                say(f"  run {run + 1}/{runs}  turn {name}: {tokens_now[0]} tokens, {figures}")
    return [
        FollowupRow(name, *sizes[name], method, len(ms), median, min(ms), max(ms), full / median)
        for (name, method), ms in times.items()
        for median, full in [(statistics.median(ms), statistics.median(times[name, _FULL]))]
    ]


def _conversation(
    engine: Engine, session: Session, brought: Sequence[tuple[str, ...]], mark: str
) -> Iterator[tuple[str, tuple[int, int], dict[str, float]]]:
    """One conversation on three engines over one cache: name, context and new tokens, milliseconds by method."""
    cache_dir = engine.turns.store.root.parent.parent
    ours, prefix, full = (session.make_engine(cache_dir) for _ in range(3))
    history: tuple[Exchange, ...] = ()
    for number, passages in enumerate(brought, 1):
        name = str(number)
        if number == len(brought):
            name, ours = "reopened", session.make_engine(cache_dir)
            _ = ours.runtime  # loading the weights is another matter
            ours.turns.store.drop_from_memory(ours.turns.store.keys())
        request = Request(f"{_QUESTION} {mark}", passages, max_tokens=8, insist=True, history=history, keep=True)
        grown, answer = _first_token(ours, request)
        exact = replace(request, ratio=1.0, keep=False)
        _first_token(prefix, replace(exact, passages=(), max_tokens=1))  # brings the earlier turns
        full.runtime.rewind(0)
        ms = {
            _GROWN: grown.timings.first_token_ms,
            _PREFIX: _first_token(prefix, exact)[0].timings.first_token_ms,
            _FULL: _first_token(full, exact)[0].timings.first_token_ms,
        }
        kept = grown.tokens.kept
        yield name, (grown.tokens.context, grown.tokens.context - kept), ms
        history = (*history, Exchange(passages, request.question, answer))


def _first_token(engine: Engine, request: Request) -> tuple[Answered, str]:
    *events, end = engine.answer(request)
    assert isinstance(end, Answered)
    return end, "".join(event.text for event in events if isinstance(event, Text))


def followup_table(rows: Sequence[FollowupRow]) -> list[str]:
    lines = [f"{'turn':<9}{'context':>8}{'new':>7}  {'method':<32}{'runs':>5}{'median':>10}{'spread':>18}  speedup"]
    for r in rows:
        lines.append(f"{r.turn:<9}{r.context_tokens:>8}{r.new_tokens:>7}  {r.method:<32}{_timed(r)}")
    return lines


def _answer(engine: Engine, case: Case, ratio: float, selector: str) -> str:
    request = Request(case.question, case.passages, ratio, selector, _ANSWER_TOKENS, insist=True)
    return "".join(event.text for event in engine.answer(request) if isinstance(event, Text))


def as_json(rows: Sequence[TtftRow] | Sequence[AnswersRow] | Sequence[FollowupRow]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows]})


def ttft_table(rows: Sequence[TtftRow]) -> list[str]:
    lines = [f"{'context':>8}  {'method':<24}{'ratio':>6}  {'from':<7}{'runs':>5}{'median':>10}{'spread':>18}  speedup"]
    for r in rows:
        lines.append(f"{r.context_tokens:>8}  {r.method:<24}{r.ratio:>6.2f}  {r.source:<7}{_timed(r)}")
    return lines


def _timed(row: TtftRow | FollowupRow) -> str:
    """The columns that every timed table ends with."""
    spread = f"{row.lowest_ms:.0f}-{row.highest_ms:.0f}"
    return f"{row.runs:>5}{row.median_ms:>7.0f} ms{spread:>15} ms  {row.speedup:.2f}x"


def answers_table(rows: Sequence[AnswersRow]) -> list[str]:
    lines = [
        f"{'ratio':>6}  {'selector':<20}{'questions':>10}{'contain gold':>14}{'lost':>6}{'gained':>8}"
        f"{'more, points (95 %)':>23}{'same as exact':>15}"
    ]
    for r in rows:
        more = f"{100 * (r.gained - r.lost) / r.questions:+.1f} ({100 * r.low:+.1f} {100 * r.high:+.1f})"
        lines.append(
            f"{r.ratio:>6.2f}  {r.selector:<20}{r.questions:>10}{r.contained:>14}{r.lost:>6}{r.gained:>8}"
            f"{more:>23}{r.same_as_exact:>15}"
        )
    return lines
