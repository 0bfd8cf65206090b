"""The engine: keeps the KV of passages on disk and answers questions by stitching it into the prompt.

    engine = Engine(model_file, cache_dir, EngineSettings(Wording("Answer from the documents.")))
    engine.cache(["a passage", ...])                  once per passage, ahead of any question
    for event in engine.answer(request): ...          Forecast, Text..., Answered

One request at a time, on one thread. Knows nothing of folders, files of documents, search or screens.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from quire_engine import chunks, costs, generate, gguf, selfcheck
from quire_engine.chunks import ChunkCache
from quire_engine.costs import Costs
from quire_engine.errors import Aborted, ContextOverflow
from quire_engine.kv.store import KVStore
from quire_engine.plan import Prompt, Segment
from quire_engine.prefill import Prefill
from quire_engine.prompt import PromptWriter, Wording
from quire_engine.runtimes import choose
from quire_engine.runtimes.base import Runtime
from quire_engine.selection import selectors, sensitivity
from quire_engine.types import BitPlan, Event, Float32, Forecast, Limits, Text

DIALS = {"fast": 0.08, "balanced": 0.16, "exact": 1.0}
_SCRATCH_TOKENS = 512  # room in the runtime for the probe's copy of the question and for rounding to whole spans


def never() -> bool:
    """The stop check of work that nobody stops."""
    return False


@dataclass(frozen=True)
class EngineSettings:
    """wording: system prompt and the words around documents.  threads: 0 takes all cores.  k_bits, v_bits: width of
    stored keys and values.  chunk_tokens: the longest passage; models with a short context get less."""

    wording: Wording
    threads: int = 0
    k_bits: int = 8
    v_bits: int = 8
    chunk_tokens: int = 512


@dataclass(frozen=True)
class Request:
    """One question over some passages, in the order in which they stand in the prompt.

    ratio: share of passage tokens computed again, 0..1; 1 is full prefill.  selector: which ones.
    insist: stitch even where full prefill is predicted to be faster.
    """

    question: str
    passages: tuple[str, ...]
    ratio: float = DIALS["balanced"]
    selector: str = "default"
    max_tokens: int = 256
    sampling: generate.Sampling = field(default_factory=generate.Sampling)
    insist: bool = False


class Engine:
    """Loads the vocabulary at once and the weights on first use. Raises ModelError for an unusable file."""

    def __init__(self, model_file: Path, cache_dir: Path, settings: EngineSettings) -> None:
        self.model_file = model_file
        self._model = gguf.read(model_file)
        self._settings = settings
        self.shape = gguf.shape(self._model)
        self.vocabulary = choose.vocabulary(model_file)
        template = str(self._model.metadata.get("tokenizer.chat_template", ""))
        self._writer = PromptWriter(self.vocabulary, template, settings.wording)
        bits = BitPlan.uniform(self.shape.layers, settings.k_bits, settings.v_bits)
        fingerprint = gguf.fingerprint(self._model)
        self.tokenizer_id = fingerprint.hex()[:16]  # token counts are good as long as this stays the same
        identity = chunks.identity(fingerprint, self._writer.preamble, bits)
        name = identity.hex()[:16]
        unrelated = self.vocabulary.tokenize(sensitivity.UNRELATED_TEXT)[: sensitivity.UNRELATED_TOKENS]
        store = KVStore(cache_dir / "kv" / name)
        self.chunks = ChunkCache(store, identity, bits, self._writer.preamble, tuple(unrelated))
        self._verdict_file = cache_dir / "checks" / f"{name}.json"
        self._costs_file = cache_dir / "costs" / f"{name}.json"

    # What the model is and allows

    @property
    def model_name(self) -> str:
        return self._model.name

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
        return gguf.why_not_stitchable(self._model) or self._failure(self._verdict)

    @property
    def known_reuse_off(self) -> str:
        """As reuse_off, but never runs the self-check: empty while nothing speaks against reuse."""
        return gguf.why_not_stitchable(self._model) or self._failure(selfcheck.load(self._verdict_file))

    def _failure(self, verdict: selfcheck.Verdict | None) -> str:
        failed = verdict is not None and verdict.reason
        return f"{self.model_name} failed its self-check: {failed}." if failed else ""

    @cached_property
    def _verdict(self) -> selfcheck.Verdict:
        known = selfcheck.load(self._verdict_file)
        if known is None:
            text = self.vocabulary.tokenize(sensitivity.UNRELATED_TEXT * 2)
            known = selfcheck.check(self.runtime, text)
            selfcheck.save(known, self._verdict_file)
        return known

    @cached_property
    def runtime(self) -> Runtime:
        """The model's weights, loaded when first needed."""
        stitching = not gguf.why_not_stitchable(self._model)
        return choose.runtime(self.model_file, self.shape, self.threads, stitching)

    @property
    def threads(self) -> int:
        return self._settings.threads or os.cpu_count() or 1

    @property
    def costs(self) -> Costs | None:
        """What steps cost here; None for models that were never measured because they are only prefilled."""
        return costs.load(self._costs_file) or (None if self.reuse_off else self._verdict.costs)

    # Caching

    def count_tokens(self, text: str) -> int:
        """Tokens of a passage as it stands in a prompt."""
        return len(self._writer.chunk(text))

    def is_cached(self, passage: str) -> bool:
        return self.chunks.has(self._segment(passage))

    def cache(self, passages: Sequence[str], should_stop: Callable[[], bool] = never) -> None:
        """Stores the KV of those passages that are not stored yet.

        Raises Aborted soon after should_stop() turns true; what was finished is kept.
        """
        if self.reuse_off:
            return
        with self.runtime.abortable(should_stop):
            for segment in self.chunks.missing([self.chunks.preamble, *map(self._segment, passages)]):
                self.chunks.encode(self.runtime, segment)

    # Answering

    def prompt(self, request: Request) -> Prompt:
        """The segments of a request. Raises ContextOverflow when they do not fit the model."""
        prompt = Prompt(
            self.chunks.preamble,
            tuple(map(self._segment, request.passages)),
            Segment(self._writer.question(request.question)),
        )
        total, allowed = len(prompt.tokens), self.shape.context_tokens
        if total >= allowed:
            raise ContextOverflow(
                f"The question and its passages have {total} tokens; {self.model_name} holds {allowed}.",
                "Ask with fewer passages (--context-tokens), or a shorter question.",
            )
        return prompt

    def forecast(self, request: Request) -> Forecast:
        """What a request will do and how long it will take. Raises ContextOverflow when it does not fit."""
        return self._estimate(self.prompt(request), request)[0]

    def answer(self, request: Request, should_stop: Callable[[], bool] = never) -> Iterator[Event]:
        """Yields a Forecast, Texts, and Answered. Stops soon after should_stop() turns true, keeping what there is.

        Raises ContextOverflow before anything is computed when the prompt does not fit the model.
        """
        selector = selectors.parse(request.selector)
        prompt = self.prompt(request)
        forecast, expected = self._estimate(prompt, request)
        yield forecast
        again = 0 if forecast.ratio >= 1 else int(forecast.ratio * prompt.context_tokens) + _SCRATCH_TOKENS
        self.runtime.reserve(len(prompt.tokens) + again + request.max_tokens)
        prefill = Prefill(self.runtime, self.chunks, prompt, forecast.ratio)
        try:
            with self.runtime.abortable(should_stop):
                logits = prefill.run(selector)
        except Aborted:
            yield prefill.report(generated=0, ending="stopped")
            return
        self._learn(expected, prefill)
        room = self.shape.context_tokens - len(prompt.tokens)
        yield from self._speak(logits, request, prefill, room, should_stop)

    def _speak(
        self, logits: Float32, request: Request, prefill: Prefill, room: int, should_stop: Callable[[], bool]
    ) -> Iterator[Event]:
        """Generates the answer, of at most `room` tokens, then says what it took."""
        began, generated = time.perf_counter(), 0
        allowed = min(request.max_tokens, self.limits.answer_tokens, room)
        for piece in generate.generate(
            logits,
            lambda token: self.runtime.extend((token,)),
            self.vocabulary,
            request.sampling,
            allowed,
            should_stop,
        ):
            if isinstance(piece, generate.Piece):
                generated += 1
                yield Text(piece.text)
            else:
                yield prefill.report(generated, piece, 1000 * (time.perf_counter() - began))

    def _segment(self, passage: str) -> Segment:
        return self.chunks.segment(self._writer.chunk(passage))

    def _estimate(self, prompt: Prompt, request: Request) -> tuple[Forecast, dict[str, float]]:
        """The forecast, and the milliseconds expected of every step."""
        context, question = prompt.context_tokens, len(prompt.question)
        missing = [len(segment) for segment in self.chunks.missing(prompt.stored)]
        known = self.costs
        if known is None or self.reuse_off:
            return Forecast(context, sum(missing), 1.0, self.reuse_off, 0.0, 0.0), {}
        full = known.full(context, question)
        stitched = known.stitched(
            context,
            question,
            request.ratio,
            missing,
            len(prompt.preamble),
            selectors.parse(request.selector).asks_question,
        )
        full_ms, stitched_ms = sum(full.values()), sum(stitched.values())
        next_ms = stitched_ms - stitched["encode"]  # encoding is paid once and kept: the next question decides
        reason = ""
        if not prompt.chunks:
            reason = "There are no passages to reuse."
        elif request.ratio < 1 and next_ms >= full_ms and not request.insist:
            reason = f"Full prefill is predicted to be as fast ({full_ms:.0f} ms against {next_ms:.0f} ms)."
        if reason or request.ratio >= 1:
            return Forecast(context, sum(missing), 1.0, reason, full_ms, full_ms), full
        return Forecast(context, sum(missing), request.ratio, "", stitched_ms, full_ms), stitched

    def _learn(self, expected: dict[str, float], prefill: Prefill) -> None:
        """Corrects the cost estimates by what happened."""
        known = self.costs
        if known is None or not expected:
            return
        measured = dict(prefill.clock.steps)
        measured["prefill"] = measured["recompute"] + measured["question"]
        costs.save(known.learn(expected, measured), self._costs_file)
