"""How far answers over stored KV are from full prefill's, question by question.

Full prefill's greedy answer is the reference. Every variant, a way of bringing the same prompt into a model, then reads
the same tokens, and the distributions of each next one are compared. A variant says what is done: `Reused` is what the
product does, `InPlace` what the codec alone does to the rows of full prefill, `Prefilled` full prefill elsewhere or in
other batches. Knows nothing of where questions come from, or which variants are worth comparing.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, Self

from quire_engine import plan as plans
from quire_engine.chunks import ChunkCache
from quire_engine.clock import Clock
from quire_engine.divergence import Divergence, LogProbabilities, between, log_softmax
from quire_engine.errors import Aborted, QuireError
from quire_engine.kv import codec, format
from quire_engine.kv.store import KVStore
from quire_engine.plan import Prompt, Segment
from quire_engine.prefill import Prefill
from quire_engine.runtimes.base import SCRATCH_TOKENS, Runtime
from quire_engine.selection import selectors
from quire_engine.selection.selectors import Selector
from quire_engine.types import BitPlan, ChunkKV, Float32

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Reply:
    """An answer that was not forced: the likeliest tokens, until the model ended it or as many as were allowed."""

    tokens: tuple[int, ...]
    first_token_ms: float
    total_ms: float


@dataclass(frozen=True)
class Comparison:
    """One question both ways. divergence: of ours along the exact answer, and where it ends."""

    exact: Reply
    ours: Reply
    divergence: Divergence


class Reader(Protocol):
    """A model with what it has read so far."""

    def rewind(self, tokens: int) -> int: ...
    def extend(self, tokens: Sequence[int]) -> Float32: ...
    def scores(self, tokens: Sequence[int]) -> Float32: ...


class Variant(Protocol):
    """A way of bringing a prompt into a model."""

    def read(self, trial: "Trial") -> tuple[Float32, Reader]:
        """Scores of the answer's first token, and who reads on."""


@dataclass(frozen=True)
class Reused:
    """What the product does: passages read alone, stored, stitched, `ratio` of their tokens computed again."""

    plan: BitPlan
    ratio: float
    selector: str = "default"

    def read(self, trial: "Trial") -> tuple[Float32, Reader]:
        trial.runtime.rewind(0)
        cache = trial.stored(self.plan).cache
        scores = _stitched(trial.runtime, cache, trial.prompt, self.ratio, selectors.parse(self.selector))
        return scores, trial.runtime


@dataclass(frozen=True)
class InPlace:
    """The codec alone: full prefill's own rows, stored by a plan and put back where they were."""

    plan: BitPlan

    def read(self, trial: "Trial") -> tuple[Float32, Reader]:
        runtime = trial.runtime
        runtime.rewind(0)
        trial.stored(self.plan, in_place=True).cache.place(runtime, trial.prompt)
        runtime.adopt()
        return runtime.extend(trial.prompt.question.tokens), runtime


@dataclass(frozen=True)
class Prefilled:
    """Full prefill by any reader: the context at once, or passage by passage, in the batches that storing reads. Both
    are exact, and differ by what batches make of rounding."""

    reader: Reader
    by_passage: bool = False

    def read(self, trial: "Trial") -> tuple[Float32, Reader]:
        self.reader.rewind(0)
        prompt, pieces = trial.prompt, [trial.prompt.tokens[: trial.prompt.context_tokens]]
        if self.by_passage:
            pieces = [segment.tokens for segment in (prompt.opening, *prompt.chunks) if segment.tokens]
        for tokens in pieces:
            self.reader.extend(tokens)
        return self.reader.extend(prompt.question.tokens), self.reader


@dataclass(frozen=True)
class Stored:
    """A prompt's passages, each once, in files by one plan. values: that were stored."""

    cache: ChunkCache
    size_bytes: int
    values: int

    @property
    def bits_per_value(self) -> float:
        """Of whole files: codes, grids, exact tokens, scores, header, padding."""
        return 8 * self.size_bytes / self.values


class Trial:
    """One prompt: full prefill's answer, and its passages' KV, computed once for all variants.

    Use it with `with`: it keeps files.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompt: Prompt,
        folder: Path,
        unrelated: tuple[int, ...] = (),
        answer_tokens: int = ANSWER_TOKENS,
        scores: frozenset[str] = frozenset(),
        free_tokens: int = 0,
    ) -> None:
        """prompt: of a first turn, with no passage twice.  folder: where files may lie meanwhile.
        unrelated: tokens for selectors that want sensitivities, as ChunkCache has them; empty when none does.
        scores: that selectors want of stored passages; those not named are measured when first asked for.
        free_tokens: of the longest answer that is not forced."""
        self.runtime = runtime
        self._unrelated, self._scores = unrelated, scores
        self._folder = TemporaryDirectory(prefix="trial-", dir=folder)
        self._stored: dict[tuple[BitPlan, bool], Stored] = {}
        self._exact = self._cache("exact", prompt, BitPlan.exact(runtime.shape.layers))
        chunks = tuple(self._exact.segment(chunk.tokens) for chunk in prompt.chunks)
        self.prompt = Prompt(self._exact.preamble, chunks, prompt.question)
        runtime.reserve(2 * len(prompt.tokens) + max(answer_tokens, free_tokens) + SCRATCH_TOKENS)
        runtime.rewind(0)
        clock = Clock()
        with clock.step("context"):
            runtime.execute(plans.compute_all(self.prompt))
        self._rows = {segment.key: self._row(segment, start) for segment, start in self.prompt.places if segment.tokens}
        with clock.step("question"):
            first = runtime.extend(prompt.question.tokens)
        self.full_prefill_ms = sum(clock.steps.values())
        self._said = _spoken(first, runtime, lambda _: False, max(answer_tokens, free_tokens))
        self.answer = self._said[:answer_tokens]
        runtime.rewind(len(prompt.tokens))
        self._reference = _read(first, runtime, self.answer[:-1])

    def measure(self, variant: Variant) -> Divergence:
        """The variant's answer to the question, forced to full prefill's tokens."""
        return self.timed(variant)[0]

    def timed(self, variant: Variant) -> tuple[Divergence, float]:
        """As measure, and the milliseconds until the scores of the first token."""
        began = time.perf_counter()
        first, reader = variant.read(self)
        ms = 1000 * (time.perf_counter() - began)
        return between(self._reference, _read(first, reader, self.answer[:-1])), ms

    def examine(self, variant: Variant, is_end: Callable[[int], bool], most: int) -> tuple[Divergence, Reply]:
        """As measure, and the variant's own answer of at most so many tokens."""
        reply, first, reader = _replied(lambda: variant.read(self), is_end, most)
        reader.rewind(len(self.prompt.tokens))
        return between(self._reference, _read(first, reader, self.answer[:-1])), reply

    @property
    def exact(self) -> Divergence:
        """Full prefill's, from itself."""
        return between(self._reference, self._reference)

    def spoken(self, is_end: Callable[[int], bool], most: int) -> tuple[int, ...]:
        """Full prefill's own answer of at most so many tokens, free_tokens or less."""
        return tuple(takewhile(lambda token: not is_end(token), self._said[:most]))

    def stored(self, plan: BitPlan, in_place: bool = False) -> Stored:
        """The passages by this plan, as read alone; or in_place, as full prefill has them."""
        if (plan, in_place) not in self._stored:
            numbers = self._rows if in_place else self._alone
            cache = self._cache(str(len(self._stored)), self.prompt, plan)
            preamble = self.prompt.opening.key
            exact = BitPlan.exact(len(plan.k_bits))
            sizes = {
                key: cache.store.write(key, format.encoded(kv, exact if key == preamble else plan, key))
                for key, kv in numbers.items()
            }
            sizes.pop(preamble, None)
            values = sum(numbers[key].tokens for key in sizes) * self.runtime.shape.values_per_token
            self._stored[plan, in_place] = Stored(cache, sum(sizes.values()), values)
        return self._stored[plan, in_place]

    @cached_property
    def _alone(self) -> dict[str, ChunkKV]:
        """Preamble and passages as the product reads them, bit for bit, by key."""
        self.runtime.rewind(0)
        self._exact.complete(self.runtime, self.prompt, self._scores)
        found = {}
        for segment in self.prompt.stored:
            if segment.tokens:
                with self._exact.store.open(segment.key) as reader:
                    found[segment.key] = codec.decode(reader.chunk())
        return found

    def _row(self, segment: Segment, start: int) -> ChunkKV:
        return ChunkKV(*self.runtime.rows(start, start + len(segment)), scores={})

    def _cache(self, name: str, prompt: Prompt, plan: BitPlan) -> ChunkCache:
        """Plans share their addresses, since each has a folder of its own."""
        store = KVStore(Path(self._folder.name) / name)
        return ChunkCache(store, bytes(32), plan, prompt.opening.tokens, self._unrelated)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def compare(
    runtime: Runtime,
    prompts: Iterable[Prompt],
    variants: Mapping[str, Variant],
    folder: Path,
    on_question: Callable[[Trial, Mapping[str, Divergence]], None],
    should_stop: Callable[[], bool],
    unrelated: tuple[int, ...] = (),
) -> None:
    """Measures every variant on every prompt and hands each finished prompt to on_question.

    Returns early, between or within prompts, soon after should_stop() turns true.  folder, unrelated: see Trial.
    """
    for prompt in prompts:
        try:
            with runtime.abortable(should_stop), Trial(runtime, prompt, folder, unrelated) as trial:
                found = {}
                for name, variant in variants.items():
                    if should_stop():
                        return
                    found[name] = trial.measure(variant)
                on_question(trial, found)
        except Aborted:
            return


def both_ways(
    runtime: Runtime,
    chunks: ChunkCache,
    prompt: Prompt,
    ratio: float,
    selector: Selector,
    is_end: Callable[[int], bool],
    most: int,
) -> Comparison:
    """Answers a prompt of a first turn exactly and over stored KV. What is not stored yet is encoded first, untimed.

    is_end: whether a token ends an answer.  most: tokens of an answer.
    """
    runtime.reserve(2 * len(prompt.tokens) + most + SCRATCH_TOKENS)
    runtime.rewind(0)
    chunks.complete(runtime, prompt, selector.stored_scores)
    runtime.extend(prompt.question.tokens)  # so that neither way pays for bringing the weights to memory

    def by(share: float) -> tuple[Reply, Float32]:
        reply, first, _ = _replied(lambda: (_stitched(runtime, chunks, prompt, share, selector), runtime), is_end, most)
        runtime.rewind(len(prompt.tokens))
        return reply, first

    exact, first = by(1.0)
    reference = _read(first, runtime, exact.tokens[: most - 1])
    ours, first = by(ratio)
    found = _read(first, runtime, exact.tokens[: most - 1])
    return Comparison(exact, ours, between(reference, found))


def first_token_ms(runtime: Runtime, chunks: ChunkCache, prompt: Prompt, ratio: float, selector: Selector) -> float:
    """Milliseconds to the scores of a first turn's first token. What is not stored yet is encoded first, untimed."""
    chunks.complete(runtime, prompt, selector.stored_scores)
    began = time.perf_counter()
    _stitched(runtime, chunks, prompt, ratio, selector)
    return 1000 * (time.perf_counter() - began)


def _stitched(runtime: Runtime, chunks: ChunkCache, prompt: Prompt, ratio: float, selector: Selector) -> Float32:
    """Scores of the first token, with the prompt in the runtime."""
    runtime.rewind(0)
    prefill = Prefill(runtime, chunks, prompt, ratio, Clock())
    scores = prefill.run(selector)
    if prefill.report(0, "end").ratio != ratio:
        raise QuireError("Stored passages could not be read back, so there is nothing to measure.")
    return scores


def _replied(
    read: Callable[[], tuple[Float32, Reader]], is_end: Callable[[int], bool], most: int
) -> tuple[Reply, Float32, Reader]:
    """The answer, the scores of its first token, and who reads on."""
    began = time.perf_counter()
    first, reader = read()
    first_ms = 1000 * (time.perf_counter() - began)
    said = _spoken(first, reader, is_end, most)
    return Reply(said, first_ms, 1000 * (time.perf_counter() - began)), first, reader


def _spoken(scores: Float32, reader: Reader, is_end: Callable[[int], bool], most: int) -> tuple[int, ...]:
    """The likeliest tokens until the end, or as many as are allowed."""
    said = list[int]()
    while len(said) < most and not is_end(token := int(scores.argmax())):
        said.append(token)
        if len(said) < most:
            scores = reader.extend((token,))
    return tuple(said)


def _read(first: Float32, reader: Reader, answer: Sequence[int]) -> list[LogProbabilities]:
    """The distributions before, within and after an answer: read in one batch, since batches of other sizes differ."""
    return [log_softmax(first), *(map(log_softmax, reader.scores(answer)) if answer else ())]
