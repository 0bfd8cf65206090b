"""From next-token scores to text: sample, stop, decode bytes as they become whole characters.

Sampling looks at the likeliest tokens alone, so a runtime may pick them where it computes. Works with any that can
extend a sequence by a token. Knows nothing of prompts or KV.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from quire_engine.types import Float32

Ending = Literal["end", "length", "stopped"]

_SAMPLED = 200  # of the likeliest, whatever share they hold


class Vocabulary(Protocol):
    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; above, one of the likeliest that together hold `top_p`."""

    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens it looks at."""
        return 1 if self.temperature <= 0 else _SAMPLED


@dataclass(frozen=True)
class Candidates:
    """The likeliest next tokens, the best one first, of equals the lower id.

    tokens: int64 [count], of a small vocabulary fewer than were asked for.  scores: [count].
    """

    tokens: npt.NDArray[np.int64]
    scores: Float32

    @classmethod
    def of(cls, scores: Float32, count: int) -> Self:
        """scores: of all tokens [vocabulary]."""
        if count == 1:
            likely = np.array([scores.argmax()])
        else:
            least = np.partition(scores, -count)[-count] if count < len(scores) else scores.min()
            among = np.flatnonzero(scores >= least)
            likely = among[np.argsort(-scores[among], kind="stable")][:count]
        return cls(likely, scores[likely])


@dataclass(frozen=True)
class Piece:
    """New text of one token; may be empty while a character is incomplete."""

    token: int
    text: str


def generate(
    first: Candidates,
    extend: Callable[[int], Candidates],
    vocabulary: Vocabulary,
    sampling: Sampling,
    max_tokens: int,
    should_stop: Callable[[], bool],
) -> Iterator[Piece | Ending]:
    """Yields pieces and, last, why it ended: the model's own end, the length allowed, or because it was told to.

    first: `sampling.candidates` for the first token.  extend: appends a token, gives those for the next.
    """
    random = np.random.default_rng(sampling.seed)
    candidates, characters = first, codecs.getincrementaldecoder("utf-8")("replace")
    for count in range(1, max_tokens + 1):
        token = _sample(candidates, sampling, random)
        if vocabulary.is_end(token):
            yield "end"
            return
        yield Piece(token, characters.decode(vocabulary.piece(token)))
        if should_stop():
            yield "stopped"
            return
        if count < max_tokens:
            candidates = extend(token)
    yield "length"


def _sample(candidates: Candidates, sampling: Sampling, random: np.random.Generator) -> int:
    if sampling.temperature <= 0:
        return int(candidates.tokens[0])
    scaled = (candidates.scores - candidates.scores[0]) / sampling.temperature
    weights = np.exp(scaled.astype(np.float64))
    weights /= weights.sum()
    kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
    weights = weights[:kept] / weights[:kept].sum()
    return int(random.choice(candidates.tokens[:kept], p=weights))
