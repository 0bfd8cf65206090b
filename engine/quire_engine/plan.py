"""A prompt as spans, left to right: each is reused from stored KV or computed. Pure arithmetic, no model.

The segmented token ids are the truth: the ids of the joined text would differ at the seams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Segment:
    """A run of prompt tokens with one origin. key: address of its stored KV, empty for text of this turn alone."""

    tokens: tuple[int, ...]
    key: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Span:
    """Prompt positions start..stop, all reused or all computed."""

    start: int
    stop: int
    reuse: bool

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Prompt:
    """Opening, chunks and question of one turn in their final order, from `position` on.

    opening: in the first turn the preamble, whose stored KV is exact since it guarded every chunk's encoding; in later
    ones the words between an answer and the next turn, which have no key.
    """

    opening: Segment
    chunks: tuple[Segment, ...]
    question: Segment
    position: int = 0

    @property
    def stored(self) -> tuple[Segment, ...]:
        """The segments that have stored KV."""
        return tuple(segment for segment, _ in self.places)

    @property
    def places(self) -> tuple[tuple[Segment, int], ...]:
        """The segments that have stored KV, each with its first position."""
        segments = zip((self.opening, *self.chunks), self.starts, strict=False)
        return tuple((segment, start) for segment, start in segments if segment.key)

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of the opening, of every chunk, and of the question."""
        return tuple(accumulate((len(segment) for segment in (self.opening, *self.chunks)), initial=self.position))

    @property
    def stored_start(self) -> int:
        """First position of what has stored KV."""
        return self.position if self.opening.key else self.starts[1]

    @property
    def intact(self) -> int:
        """How many of the first chunks stand where they were read, right behind the preamble: their stored KV is full
        prefill's."""
        return min(1, len(self.chunks)) if self.opening.key else 0

    @property
    def context_tokens(self) -> int:
        """Tokens before the question, earlier turns included."""
        return self.starts[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """This turn's tokens; the first stands at `position`."""
        return tuple(token for segment in (self.opening, *self.chunks, self.question) for token in segment.tokens)


@dataclass(frozen=True)
class StitchPlan:
    """How each position before the question comes to its KV."""

    prompt: Prompt
    spans: tuple[Span, ...]

    def reused_within(self, start: int, stop: int) -> int:
        """Reused tokens among the positions start..stop."""
        return sum(max(0, min(stop, span.stop) - max(start, span.start)) for span in self.reused)

    @property
    def reused_tokens(self) -> int:
        return sum(len(span) for span in self.reused)

    @property
    def recomputed_tokens(self) -> int:
        return sum(len(span) for span in self.recomputed)

    @property
    def reused(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.reuse)

    @property
    def recomputed(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if not span.reuse)

    def until(self, stop: int) -> "StitchPlan":
        """The same before a position; behind it nothing is computed again."""
        before = [Span(span.start, min(stop, span.stop), span.reuse) for span in self.spans if span.start < stop]
        return StitchPlan(self.prompt, (*before, Span(stop, self.spans[-1].stop, reuse=True)))


def stitch(prompt: Prompt, recompute: Sequence[Mask]) -> StitchPlan:
    """The plan for all that has stored KV: recompute the masked tokens of each chunk, reuse the rest.

    recompute: one bool array [tokens] per chunk.
    """
    exact = np.zeros(prompt.starts[1] - prompt.stored_start, dtype=bool)
    return StitchPlan(prompt, spans_of(np.concatenate([exact, *recompute]), prompt.stored_start))


def budget(tokens: int, ratio: float, tile: int) -> int:
    """How many tokens to compute again: at least this share, in whole tiles, since the rest of one costs little.

    tile: tokens that the runtime computes together.
    """
    return min(ceil(round(ratio * tokens / tile, 9)) * tile, tokens)


def leading(read_ms: Sequence[float], compute_ms: Sequence[float]) -> int:
    """How many passages to compute from the left while those right of them are read, so that both are done soonest.

    read_ms, compute_ms: of every passage. Never all of them: that would be full prefill.
    """
    return min(range(len(read_ms)), key=lambda count: max(sum(compute_ms[:count]), sum(read_ms[count:])), default=0)


def behind(prompt: Prompt, count: int) -> Prompt:
    """What is left of a prompt when its opening and its first passages are live."""
    return Prompt(Segment(()), prompt.chunks[count:], prompt.question, prompt.starts[1 + count])


def compute_all(prompt: Prompt) -> StitchPlan:
    """Full prefill as a plan: what the dial calls exact."""
    return StitchPlan(prompt, (Span(prompt.position, prompt.context_tokens, reuse=False),))


def spans_of(recompute: Mask, position: int = 0) -> tuple[Span, ...]:
    """Runs of equal value, in order; the first value is that of `position`."""
    edges = np.flatnonzero(np.diff(recompute)) + 1
    bounds = [0, *edges.tolist(), len(recompute)]
    return tuple(
        Span(position + start, position + stop, not recompute[start])
        for start, stop in pairwise(bounds)
        if start < stop
    )
