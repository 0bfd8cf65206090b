"""The engine: keeps the KV of passages on disk and answers questions by stitching it into the prompt.

    engine = Engine(model_file, cache_dir, EngineSettings(Wording("Answer from the documents.")))
    engine.cache(["a passage", ...])                  once per passage, ahead of any question
    for event in engine.answer(request): ...          Forecast, Text..., Answered

One request at a time, on one thread. Knows nothing of folders, files of documents, search or screens.
"""

import platform
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from quire_engine import chunks, costs, forecast, generate, gguf, plan, processes, remote, selfcheck, turns
from quire_engine.chunks import ChunkCache
from quire_engine.clock import Clock
from quire_engine.costs import Costs
from quire_engine.errors import Aborted, ContextOverflow
from quire_engine.kv.catalogue import Catalogue
from quire_engine.kv.pools import MemoryPool
from quire_engine.layout import Layout, Line
from quire_engine.plan import Prompt
from quire_engine.precision import calibrate, plans
from quire_engine.precision import profile as profiles
from quire_engine.prefill import Prefill
from quire_engine.prompt import PromptWriter, Wording
from quire_engine.runtimes import choose
from quire_engine.runtimes.base import SCRATCH_TOKENS, Runtime, likeliest
from quire_engine.runtimes.openai import Server
from quire_engine.selection import quality, selectors, sensitivity
from quire_engine.selection.quality import Curve
from quire_engine.selection.ratio import Ratios
from quire_engine.turns import Turns
from quire_engine.types import Answered, BitPlan, Event, Exchange, Float32, Forecast, Limits, Text, Timings, TokenCounts

_TURNS_BITS = 8  # of a conversation, whose KV nothing computes again


def never() -> bool:
    """The stop check of work that nobody stops."""
    return False


@dataclass(frozen=True)
class EngineSettings:
    """wording: system prompt and the words around documents.  threads: 0 takes all cores.  precision: of stored keys
    and values, one of `plans.NAMES`.  chunk_tokens: the longest passage; models with a short context get less.
    profiles: folders with precision profiles of models; new ones go into the first.  runtime: one of `choose.NAMES`.
    server: that answers when the runtime is openai.  live_window: of a conversation's latest tokens that the torch
    runtime keeps exactly, older ones packed; 0 packs none."""

    wording: Wording
    threads: int = 0
    precision: str = "default"
    chunk_tokens: int = 512
    profiles: tuple[Path, ...] = ()
    runtime: str = choose.AUTO
    server: Server = field(default_factory=Server)
    live_window: int = 0


@dataclass(frozen=True)
class Request:
    """One question over some passages, in the order in which they stand in the prompt.

    ratio: share of passage tokens computed again, 0..1; 1 is full prefill.  selector: which ones.
    insist: stitch even where full prefill is predicted to be faster.
    history: the turns before it, all of them; their KV is found or made again.  keep: another question will follow,
    so the KV of this turn is kept, on disk too.
    """

    question: str
    passages: tuple[str, ...]
    ratio: float = quality.USUAL_RATIOS["balanced"]
    selector: str = "default"
    max_tokens: int = 256
    sampling: generate.Sampling = field(default_factory=generate.Sampling)
    insist: bool = False
    history: tuple[Exchange, ...] = ()
    keep: bool = False


class Engine:
    """Loads the vocabulary at once and the weights on first use. Raises ModelError for an unusable file."""

    def __init__(self, model_file: Path, cache_dir: Path, settings: EngineSettings) -> None:
        self.model_file = model_file
        self._model = gguf.read(model_file)
        self._settings = settings
        self.shape = gguf.shape(self._model)
        self.vocabulary = choose.vocabulary(model_file)
        self.choice = choose.choose(settings.runtime, self._model)
        self._server = settings.server.checked() if self.choice.runtime == choose.OPENAI else None
        template = str(self._model.metadata.get("tokenizer.chat_template", ""))
        self._writer = PromptWriter(self.vocabulary, template, settings.wording)
        fingerprint = gguf.fingerprint(self._model)
        self.profile = plans.find(fingerprint, settings.profiles)
        self._profile_name = plans.file_name(fingerprint)
        self._bits = bits = plans.named(settings.precision, self.shape, self.profile)
        of_turns = BitPlan.uniform(self.shape.layers, _TURNS_BITS, _TURNS_BITS)
        self.tokenizer_id = fingerprint.hex()[:16]  # token counts are good as long as this stays the same
        identity = chunks.identity(fingerprint, self._writer.preamble, bits)
        name = identity.hex()[:16]
        unrelated = self.vocabulary.tokenize(sensitivity.UNRELATED_TEXT)[: sensitivity.UNRELATED_TOKENS]
        self.catalogue = Catalogue.of(cache_dir)
        self.memory = MemoryPool()  # above the disk; has room once it is given some
        store = self.catalogue.store(name, self.model_name, self.memory)
        self.chunks = ChunkCache(store, identity, bits, self._writer.preamble, tuple(unrelated))
        self.turns = Turns(self.catalogue.store(turns.STORE_PREFIX + name, self.model_name), identity, of_turns)
        self._layout = Layout(self._writer, self.chunks, self.turns, self.shape.layers)
        name = f"{name}{self.choice.record}"  # what was measured with another runtime says nothing
        self._verdict_file = cache_dir / "checks" / f"{name}.json"
        self._costs_file = cache_dir / "costs" / f"{name}.json"
        device = f"{platform.machine()}, {self.threads} threads"
        self.ratios = Ratios(cache_dir / "costs" / f"{name}.ratios.json", device)
        self._quality_name = self.tokenizer_id + (f".{self.choice.runtime}" if self.choice.record else "")
        self._curves = quality.load(settings.profiles, self._quality_name)

    # What the model is and allows

    @property
    def model_name(self) -> str:
        if self._server:
            return f"{self._server.model or 'a model'} at {self._server.host}"
        return self._model.name

    @property
    def runtime_name(self) -> str:
        """What answers, without loading it where that is a server."""
        return self.choice.runtime if self._server else self.runtime.name

    @cached_property
    def limits(self) -> Limits:
        """At most a quarter of the context for the answer and a third of the rest for one passage."""
        total = self.shape.context_tokens - len(self._writer.preamble)
        answer, question = min(1024, total // 4), min(256, total // 4)
        context = max(1, total - answer - question)
        return Limits(min(self._settings.chunk_tokens, max(16, context // 3)), context, answer)

    @cached_property
    def reuse_off(self) -> str:
        """Why stored KV is not used with this model, in one sentence; empty when it is.

        The first time a model is used this runs the self-check, which takes some seconds; its verdict is kept.
        """
        return self._never_reused or self._failure(self._verdict)

    @property
    def known_reuse_off(self) -> str:
        """As reuse_off, but never runs the self-check: empty while nothing speaks against reuse."""
        return self._never_reused or self._failure(selfcheck.load(self._verdict_file))

    def try_out(self, should_stop: Callable[[], bool]) -> str:
        """reuse_off, whose self-check raises Aborted soon after should_stop() turns true."""
        if self._never_reused or selfcheck.load(self._verdict_file):
            return self.reuse_off
        with self.runtime.abortable(should_stop):
            return self.reuse_off

    @property
    def _never_reused(self) -> str:
        return self._server.statement if self._server else gguf.why_not_stitchable(self._model)

    def _failure(self, verdict: selfcheck.Verdict | None) -> str:
        failed = verdict is not None and verdict.reason
        return f"{self.model_name} failed its self-check: {failed}." if failed else ""

    @cached_property
    def _verdict(self) -> selfcheck.Verdict:
        known = selfcheck.load(self._verdict_file)
        if known is None:
            text = self.vocabulary.tokenize(sensitivity.UNRELATED_TEXT * 2)
            known = selfcheck.check(self.runtime, text, self._bits, self._verdict_file.parent)
            selfcheck.save(known, self._verdict_file)
        return known

    @cached_property
    def runtime(self) -> Runtime:
        """The model's weights, loaded when first needed."""
        stitching = not gguf.why_not_stitchable(self._model)
        window = self._settings.live_window
        return choose.runtime(self.model_file, self.shape, self.threads, stitching, self.choice, window)

    @property
    def threads(self) -> int:
        return self._settings.threads or processes.cores()

    @property
    def costs(self) -> Costs | None:
        """What steps cost here; None for models that were never measured because they are only prefilled."""
        return costs.load(self._costs_file) or (None if self.reuse_off else self._verdict.costs)

    @property
    def known_costs(self) -> Costs | None:
        """As costs, but never measures: None while this model was not used yet."""
        verdict = selfcheck.load(self._verdict_file)
        return costs.load(self._costs_file) or (verdict.costs if verdict else None)

    def ratio(self, dial: str, selector: str = "default") -> float:
        """The share to recompute that a position of the dial asks of this model: `Request.ratio`."""
        return quality.ratio(dial, self._curves, selectors.parse(selector).name)

    @property
    def fastest_ratios(self) -> tuple[dict[str, float], list[str]]:
        """Pool -> the ratio that was measured to be the fastest; and pools where what was measured no longer holds."""
        known = self.known_costs
        transfers = known.transfers() if known else {}
        return self.ratios.fastest(transfers), self.ratios.outdated(transfers)

    def keep_curve(self, curve: Curve) -> None:
        """From the next opening on, the dial takes for this model and runtime what was measured of a selector."""
        quality.save(curve, self._settings.profiles[0], self._quality_name)

    def measure_precision(
        self, passages: Sequence[str], on_progress: Callable[[int, int], None], should_stop: Callable[[], bool] = never
    ) -> None:
        """Finds out what rounding keys and values costs this model's answers, and keeps it: from the next opening on,
        precision plans follow from it. Takes minutes, and memory for all weights in float32.

        on_progress: steps done, and all of them.  Raises Aborted soon after should_stop() turns true.
        """
        cases = calibrate.cases(self._writer, passages)
        self.profile = calibrate.run(self.model_file, cases, on_progress, should_stop)
        profiles.save(self.profile, self._settings.profiles[0] / self._profile_name)

    def plan_sizes(self) -> dict[str, float]:
        """Bits per value of whole files under every precision plan, for short passages; by name."""
        plan = {name: plans.named(name, self.shape, self.profile) for name in plans.NAMES}
        return {name: profiles.file_bits_per_value(of_name, self.shape) for name, of_name in plan.items()}

    # Caching

    def count_tokens(self, text: str) -> int:
        """Tokens of a passage as it stands in a prompt."""
        return len(self._writer.chunk(text))

    @property
    def written_bytes(self) -> int:
        """What this engine has written to disk, passages and turns."""
        return self.chunks.store.written_bytes + self.turns.store.written_bytes

    def address(self, passage: str) -> str:
        """The key of a passage in the store, whether it is there or not. As good as long as the store's root is."""
        return self._layout.segment(passage).key

    def is_cached(self, passage: str) -> bool:
        return self.chunks.has(self._layout.segment(passage))

    def cache(self, passages: Sequence[str], should_stop: Callable[[], bool] = never) -> frozenset[str]:
        """Stores the KV of those passages that are not stored yet; returns those left out because another process is
        computing them right now.

        Raises Aborted soon after should_stop() turns true; what was finished is kept.
        """
        if self.reuse_off:
            return frozenset()
        segments = [self._layout.segment(passage) for passage in passages]
        with self.runtime.abortable(should_stop):
            lacking = self.chunks.missing([self.chunks.preamble, *segments])
            left = [segment for segment in lacking if not self.chunks.encode_ahead(self.runtime, segment)]
        return frozenset(passage for passage, segment in zip(passages, segments, strict=True) if segment in left)

    # Answering

    def prefetch(self, passages: Sequence[str]) -> None:
        """Begins to read stored passages into memory, as far as it has room: call it as soon as it is known which ones
        a question takes. What follows runs meanwhile, and waits for what it needs."""
        if passages and not self.known_reuse_off:
            # From a slow disk the first are not read: see _lead.
            self.chunks.prefetch([self.chunks.preamble, *map(self._layout.segment, reversed(passages))])

    def prompt(self, request: Request) -> Prompt:
        """The segments of a request without its history. Raises ContextOverflow when they do not fit the model."""
        prompt = self._layout.prompt(Exchange(request.passages, request.question, ""), 0)
        self._check_room(len(prompt.tokens))
        return prompt

    def forecast(self, request: Request) -> Forecast:
        """What a request will do and how long it will take. Raises ContextOverflow when it does not fit."""
        return self._estimate(self._line(request), request)[0]

    def answer(self, request: Request, should_stop: Callable[[], bool] = never) -> Iterator[Event]:
        """Yields a Forecast, Texts, and Answered. Stops soon after should_stop() turns true, keeping what there is.

        Exhaust it: after Answered a turn that is kept is stored.
        Raises ContextOverflow before anything is computed when the prompt does not fit the model.
        """
        selector = selectors.parse(request.selector)
        line = self._line(request)
        foreseen, expected = self._estimate(line, request)
        yield foreseen
        if self._server:
            most = min(request.max_tokens, self.limits.answer_tokens)
            asked = remote.messages(self._settings.wording, [*(turn.exchange for turn in line.earlier), line.asked])
            told = self._server.complete(asked, most, request.sampling.temperature, should_stop)
            yield from remote.answer(told, foreseen, line.tokens)
            return
        again = 0
        if foreseen.ratio < 1:
            again = plan.budget(foreseen.context_tokens, foreseen.ratio, self.runtime.tile_tokens) + SCRATCH_TOKENS
        self.runtime.reserve(line.tokens + again + request.max_tokens)
        clock = Clock()
        try:
            with self.runtime.abortable(should_stop):
                with clock.step("resume"):
                    computed = self._resume(line, request)
                prompt = self._layout.prompt(line.asked, self.runtime.live_tokens)
                lead = self._lead(prompt) if foreseen.ratio < 1 and not selector.compares_values else 0
                prefill = Prefill(self.runtime, self.chunks, prompt, foreseen.ratio, clock, computed, lead)
                logits = prefill.run(selector)
        except Aborted:
            yield _stopped(foreseen, clock)
            return
        if not lead:  # what was read meanwhile says nothing about the disk
            self._learn(expected, prefill)
        room = self.shape.context_tokens - len(prompt.tokens) - prompt.position
        answer = yield from self._speak(logits, request, prefill, room, should_stop)
        if request.keep:
            said = replace(line.asked, answer=answer)
            key = self.turns.keys([*(turn.exchange for turn in line.earlier), said], request.ratio >= 1)[-1]
            took_ms = sum(ms for step, ms in clock.steps.items() if step != "resume")
            self.turns.keep(self.runtime, key, self._stores_turns(request), took_ms / 1000)

    def _lead(self, prompt: Prompt) -> int:
        """How many of the first passages to compute while the others are read: none, unless the disk is slow."""
        read_ms = [self.chunks.store.read_ms(chunk.key) for chunk in prompt.chunks]
        known = self.costs
        if known is None or not any(read_ms):
            return 0
        places = zip(prompt.chunks, prompt.starts[1:], strict=False)
        # As it was measured: what was learned since may be about the disk.
        return plan.leading(read_ms, [known.prefill.of(len(chunk), start) for chunk, start in places])

    def _line(self, request: Request) -> Line:
        """The turns as they stand in the context."""
        exchanges = [*request.history, Exchange(request.passages, request.question, "")]
        room = self.shape.context_tokens - self.limits.answer_tokens - len(self._writer.preamble)
        line = self._layout.line(exchanges, room, request.ratio >= 1)
        self._check_room(line.tokens)
        return line

    def _resume(self, line: Line, request: Request) -> int:
        """Makes the runtime's live sequence of the earlier turns; how many of their tokens had to be computed."""

        def read(exchange: Exchange) -> int:
            prompt = self._layout.prompt(exchange, self.runtime.live_tokens)
            ratio = 1.0 if self.reuse_off else request.ratio
            prefill = Prefill(self.runtime, self.chunks, prompt, ratio, Clock())
            prefill.run(selectors.parse(request.selector))
            answer = self._writer.answer(exchange.answer)
            if answer:
                self.runtime.extend(answer)
            counts = prefill.report(0, "end").tokens
            return counts.fresh + counts.recomputed + len(answer)

        return self.turns.resume(self.runtime, line.earlier, self._stores_turns(request), read)

    def _stores_turns(self, request: Request) -> bool:
        """Stored KV is not exact, and useless where nothing is reused."""
        return request.ratio < 1 and not self.reuse_off

    def _check_room(self, tokens: int) -> None:
        if tokens >= self.shape.context_tokens:
            raise ContextOverflow(
                f"The question and its passages have {tokens} tokens; {self.model_name} holds "
                f"{self.shape.context_tokens}.",
                "Ask with fewer passages (--context-tokens), or a shorter question.",
            )

    def _speak(
        self, logits: Float32, request: Request, prefill: Prefill, room: int, should_stop: Callable[[], bool]
    ) -> Generator[Event, None, str]:
        """Generates the answer, of at most `room` tokens, then says what it took. Returns the answer, all of which is
        live then."""
        began, said, unread = time.perf_counter(), [], -1
        allowed = min(request.max_tokens, self.limits.answer_tokens, room)
        sampling = request.sampling
        first = generate.Candidates.of(logits, sampling.candidates)

        def extend(token: int) -> generate.Candidates:
            nonlocal unread
            unread = -1
            return likeliest(self.runtime, (token,), sampling.candidates)

        for piece in generate.generate(first, extend, self.vocabulary, sampling, allowed, should_stop):
            if isinstance(piece, generate.Piece):
                unread = piece.token
                said.append(piece.text)
                yield Text(piece.text)
            else:
                if unread >= 0 and request.keep:
                    extend(unread)
                yield prefill.report(len(said), piece, 1000 * (time.perf_counter() - began))
        return "".join(said)

    def _estimate(self, line: Line, request: Request) -> tuple[Forecast, dict[str, float]]:
        """The forecast, and the milliseconds expected of every step."""
        selector = selectors.parse(request.selector)
        prompt = self._layout.prompt(line.asked, line.tokens - line.asked_tokens)
        lead = self._lead(prompt) if request.ratio < 1 and not selector.compares_values else 0
        work = self._layout.work(line, prompt, selector, lead, self._stores_turns(request))
        known = self.costs
        tuned = self.ratios.fastest(known.transfers()) if known else {}
        return forecast.foresee(work, known, request.ratio, self.reuse_off, request.insist, tuned)

    def _learn(self, expected: dict[str, float], prefill: Prefill) -> None:
        """Corrects the cost estimates by what happened."""
        known = self.costs
        if known is None or not expected:
            return
        measured = dict(prefill.clock.steps)
        measured["prefill"] = measured["recompute"] + measured["question"]
        costs.save(known.learn(expected, measured), self._costs_file)


def _stopped(foreseen: Forecast, clock: Clock) -> Answered:
    """The end of a question that was stopped before its first token."""
    spent = {name: clock[name] for name in ("encode", "load", "probe", "recompute", "question", "resume")}
    timings = Timings(
        first_token_ms=0.0, decode_ms=0.0, **{f"{name}_ms": milliseconds for name, milliseconds in spent.items()}
    )
    return Answered(TokenCounts(foreseen.context_tokens, 0, 0, 0, 0), timings, foreseen.ratio, "stopped")
