"""From next-token scores to text: sample, stop, decode bytes as they become whole characters.

Works with any runtime that can extend a sequence by a token. Knows nothing of prompts or KV.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from quire_engine.types import Float32

Ending = Literal["end", "length", "stopped"]


class Vocabulary(Protocol):
    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; above, one of the likeliest that together hold `top_p`."""

    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Piece:
    """New text of one token; may be empty while a character is incomplete."""

    token: int
    text: str


def generate(
    logits: Float32,
    extend: Callable[[int], Float32],
    vocabulary: Vocabulary,
    sampling: Sampling,
    max_tokens: int,
    should_stop: Callable[[], bool],
) -> Iterator[Piece | Ending]:
    """Yields pieces and, last, why it ended: the model's own end, the length allowed, or because it was told to.

    logits: scores of the first token [vocabulary].  extend: appends a token, gives the scores of the next.
    """
    random = np.random.default_rng(sampling.seed)
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    for count in range(1, max_tokens + 1):
        token = _sample(logits, sampling, random)
        if vocabulary.is_end(token):
            yield "end"
            return
        yield Piece(token, characters.decode(vocabulary.piece(token)))
        if should_stop():
            yield "stopped"
            return
        if count < max_tokens:
            logits = extend(token)
    yield "length"


def _sample(logits: Float32, sampling: Sampling, random: np.random.Generator) -> int:
    if sampling.temperature <= 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / sampling.temperature
    likely = np.argsort(-scaled)[:200]
    weights = np.exp(scaled[likely].astype(np.float64))
    weights /= weights.sum()
    kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
    weights = weights[:kept] / weights[:kept].sum()
    return int(random.choice(likely[:kept], p=weights))
