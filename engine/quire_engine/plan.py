"""A prompt as spans, left to right: each is reused from stored KV or computed. Pure arithmetic, no model.

The segmented token ids are the truth: the ids of the joined text would differ at the seams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
    """Preamble, chunks and question in their final order. The preamble is exact: it guarded every chunk's encoding."""

    preamble: Segment
    chunks: tuple[Segment, ...]
    question: Segment

    @property
    def stored(self) -> tuple[Segment, ...]:
        return (self.preamble, *self.chunks)

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of the preamble, of every chunk, and of the question."""
        return tuple(accumulate((len(segment) for segment in self.stored), initial=0))

    @property
    def context_tokens(self) -> int:
        """Tokens before the question."""
        return self.starts[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for segment in (*self.stored, self.question) for token in segment.tokens)


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


def stitch(prompt: Prompt, recompute: Sequence[Mask]) -> StitchPlan:
    """The plan that recomputes the masked tokens of each chunk and reuses the rest and the preamble.

    recompute: one bool array [tokens] per chunk.
    """
    masks = [np.zeros(len(prompt.preamble), dtype=bool), *recompute]
    return StitchPlan(prompt, spans_of(np.concatenate(masks)))


def compute_all(prompt: Prompt) -> StitchPlan:
    """Full prefill as a plan: what the dial calls exact."""
    return StitchPlan(prompt, (Span(0, prompt.context_tokens, reuse=False),))


def spans_of(recompute: Mask) -> tuple[Span, ...]:
    """Runs of equal value, in order."""
    edges = np.flatnonzero(np.diff(recompute)) + 1
    bounds = [0, *edges.tolist(), len(recompute)]
    return tuple(Span(start, stop, not recompute[start]) for start, stop in pairwise(bounds) if start < stop)
