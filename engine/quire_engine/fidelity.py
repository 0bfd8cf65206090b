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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from quire_engine import plan as plans
from quire_engine.chunks import ChunkCache
from quire_engine.clock import Clock
from quire_engine.errors import Aborted, QuireError
from quire_engine.kv import codec, format
from quire_engine.kv.store import KVStore
from quire_engine.plan import Prompt, Segment
from quire_engine.prefill import Prefill
from quire_engine.runtimes.base import Runtime
from quire_engine.selection import selectors
from quire_engine.selection.selectors import Selector
from quire_engine.types import BitPlan, ChunkKV, Float32

ANSWER_TOKENS = 16
_EXACT_BITS = 16
_SCRATCH_TOKENS = 512
_RESAMPLES = 10_000

LogProbabilities = npt.NDArray[np.float64]
Extend = Callable[[Sequence[int]], Float32]
"""Appends tokens to what was read; scores of the next one."""


@dataclass(frozen=True)
class Divergence:
    """One variant's answer to one question against full prefill's: for every token KL(full || variant) in nats, and
    whether both find the same token most likely."""

    kl: tuple[float, ...]
    agrees: tuple[bool, ...]

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))


@dataclass(frozen=True)
class Fidelity:
    """Over questions: mean KL of an answer's tokens, of its first token, 99th percentile over all tokens, and the share
    of tokens whose most likely one is the same."""

    kl: float
    first_kl: float
    kl_p99: float
    top1: float


@dataclass(frozen=True)
class Added:
    """Mean KL that a variant has more than another one on the same questions, with its 95 % interval."""

    kl: float
    low: float
    high: float


def fidelity(divergences: Sequence[Divergence]) -> Fidelity:
    tokens = np.concatenate([d.kl for d in divergences])
    return Fidelity(
        float(np.mean([d.mean_kl for d in divergences])),
        float(np.mean([d.kl[0] for d in divergences])),
        float(np.percentile(tokens, 99)),
        float(np.mean(np.concatenate([d.agrees for d in divergences]))),
    )


def added(divergences: Sequence[Divergence], to: Sequence[Divergence]) -> Added:
    """Paired by question; the interval is the bootstrap's over questions, the same at every call."""
    differences = [a.mean_kl - b.mean_kl for a, b in zip(divergences, to, strict=True)]
    return Added(float(np.mean(differences)), *interval(differences))


def interval(of_questions: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over questions."""
    values = np.asarray(of_questions, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


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


class Variant(Protocol):
    """A way of bringing a prompt into a model."""

    def read(self, trial: "Trial") -> tuple[Float32, Extend]:
        """Scores of the answer's first token, and how to read on."""


@dataclass(frozen=True)
class Reused:
    """What the product does: passages read alone, stored, stitched, `ratio` of their tokens computed again."""

    plan: BitPlan
    ratio: float
    selector: str = "default"

    def read(self, trial: "Trial") -> tuple[Float32, Extend]:
        trial.runtime.rewind(0)
        cache = trial.stored(self.plan).cache
        return _stitched(trial.runtime, cache, trial.prompt, self.ratio, selectors.parse(self.selector))


@dataclass(frozen=True)
class InPlace:
    """The codec alone: full prefill's own rows, stored by a plan and put back where they were."""

    plan: BitPlan

    def read(self, trial: "Trial") -> tuple[Float32, Extend]:
        runtime = trial.runtime
        runtime.rewind(0)
        trial.stored(self.plan, in_place=True).cache.place(runtime, trial.prompt)
        runtime.adopt()
        return runtime.extend(trial.prompt.question.tokens), runtime.extend


class Reader(Protocol):
    """What full prefill needs of a model."""

    def rewind(self, tokens: int) -> int: ...
    def extend(self, tokens: Sequence[int]) -> Float32: ...


@dataclass(frozen=True)
class Prefilled:
    """Full prefill by any reader, the context in batches of so many tokens; 0: all at once."""

    reader: Reader
    batch_tokens: int = 0

    def read(self, trial: "Trial") -> tuple[Float32, Extend]:
        self.reader.rewind(0)
        tokens = trial.prompt.tokens[: trial.prompt.context_tokens]
        size = self.batch_tokens or len(tokens)
        for start in range(0, len(tokens), size):
            self.reader.extend(tokens[start : start + size])
        return self.reader.extend(trial.prompt.question.tokens), self.reader.extend


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
    ) -> None:
        """prompt: of a first turn, with no passage twice.  folder: where files may lie meanwhile.
        unrelated: tokens for selectors that want sensitivities, as ChunkCache has them; empty when none does.
        scores: that selectors want of stored passages; those not named are measured when first asked for."""
        self.runtime = runtime
        self._unrelated, self._scores = unrelated, scores
        self._folder = TemporaryDirectory(prefix="trial-", dir=folder)
        self._stored: dict[tuple[BitPlan, bool], Stored] = {}
        self._exact = self._cache("exact", prompt, BitPlan.uniform(runtime.shape.layers, _EXACT_BITS, _EXACT_BITS))
        chunks = tuple(self._exact.segment(chunk.tokens) for chunk in prompt.chunks)
        self.prompt = Prompt(self._exact.preamble, chunks, prompt.question)
        runtime.reserve(2 * len(prompt.tokens) + answer_tokens + _SCRATCH_TOKENS)
        runtime.rewind(0)
        runtime.execute(plans.compute_all(self.prompt))
        self._rows = {segment.key: self._row(segment, start) for segment, start in self.prompt.places if segment.tokens}
        logits = runtime.extend(prompt.question.tokens)
        self._reference = [_log_softmax(logits)]
        self.answer = [int(logits.argmax())]
        while len(self.answer) < answer_tokens:
            logits = runtime.extend(self.answer[-1:])
            self._reference.append(_log_softmax(logits))
            self.answer.append(int(logits.argmax()))

    def measure(self, variant: Variant) -> Divergence:
        """The variant's answer to the question, forced to full prefill's tokens."""
        return _forced(self._reference, self.answer, *variant.read(self))

    def examine(self, variant: Variant, is_end: Callable[[int], bool], most: int) -> tuple[Divergence, Reply]:
        """As measure, and the variant's own answer of at most so many tokens. It has to use this trial's runtime."""
        reply, seen, extend = _replied(lambda: variant.read(self), is_end, most)
        self.runtime.rewind(len(self.prompt.tokens))
        return _forced(self._reference, self.answer, seen[0], extend), reply

    def stored(self, plan: BitPlan, in_place: bool = False) -> Stored:
        """The passages by this plan, as read alone; or in_place, as full prefill has them."""
        if (plan, in_place) not in self._stored:
            numbers = self._rows if in_place else self._alone
            cache = self._cache(str(len(self._stored)), self.prompt, plan)
            preamble = self.prompt.opening.key
            exact = BitPlan.uniform(len(plan.k_bits), _EXACT_BITS, _EXACT_BITS)
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
    runtime.reserve(2 * len(prompt.tokens) + most + _SCRATCH_TOKENS)
    runtime.rewind(0)
    chunks.complete(runtime, prompt, selector.stored_scores)
    runtime.extend(prompt.question.tokens)  # so that neither way pays for bringing the weights to memory
    exact, reference, _ = _replied(lambda: _stitched(runtime, chunks, prompt, 1.0, selector), is_end, most)
    ours, seen, extend = _replied(lambda: _stitched(runtime, chunks, prompt, ratio, selector), is_end, most)
    runtime.rewind(len(prompt.tokens))
    return Comparison(exact, ours, _forced(map(_log_softmax, reference), exact.tokens, seen[0], extend))


def _stitched(
    runtime: Runtime, chunks: ChunkCache, prompt: Prompt, ratio: float, selector: Selector
) -> tuple[Float32, Extend]:
    runtime.rewind(0)
    prefill = Prefill(runtime, chunks, prompt, ratio, Clock())
    scores = prefill.run(selector)
    if prefill.report(0, "end").ratio != ratio:
        raise QuireError("Stored passages could not be read back, so there is nothing to measure.")
    return scores, runtime.extend


def _replied(
    read: Callable[[], tuple[Float32, Extend]], is_end: Callable[[int], bool], most: int
) -> tuple[Reply, list[Float32], Extend]:
    """The answer, the scores behind each of its tokens and of what would have come next, and how to read on."""
    began = time.perf_counter()
    scores, extend = read()
    first_ms = 1000 * (time.perf_counter() - began)
    said, seen = list[int](), [scores]
    while len(said) < most and not is_end(token := int(seen[-1].argmax())):
        said.append(token)
        if len(said) < most:
            seen.append(extend((token,)))
    return Reply(tuple(said), first_ms, 1000 * (time.perf_counter() - began)), seen, extend


def _forced(
    reference: Iterable[LogProbabilities], answer: Sequence[int], scores: Float32, extend: Extend
) -> Divergence:
    """How scores differ from the reference's while reading its answer."""
    kl, agrees = [], []
    for place, expected in enumerate(reference):
        if place:
            scores = extend(answer[place - 1 : place])
        found = _log_softmax(scores)
        kl.append(float(np.sum(np.exp(expected) * (expected - found))))
        agrees.append(bool(expected.argmax() == found.argmax()))
    return Divergence(tuple(kl), tuple(agrees))


def _log_softmax(logits: Float32) -> LogProbabilities:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
