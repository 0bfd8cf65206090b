"""Which tokens to recompute: a selector is a product of factors, each a positive score per token.

"probe*sensitivity" multiplies the question's attention with the chunk's stored sensitivity. Chosen tokens come in short
spans, since neighbours belong together and a runtime pays per span. Knows nothing of how scores were measured.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quire_engine.errors import QuireError
from quire_engine.plan import Mask
from quire_engine.types import Float32

DEFAULT = "probe"
SPAN_TOKENS = 16


@dataclass(frozen=True)
class Evidence:
    """What is known about the tokens of one chunk. stored: scores kept with it.  probe: this question's attention
    mass, empty when it was not measured."""

    tokens: int
    stored: Mapping[str, Float32]
    probe: Float32


def _stored(name: str) -> Callable[[Evidence], Float32]:
    def factor(evidence: Evidence) -> Float32:
        return evidence.stored.get(name, np.ones(evidence.tokens, dtype=np.float32))

    return factor


def _first(evidence: Evidence) -> Float32:
    return np.float32(1) / np.arange(1, evidence.tokens + 1, dtype=np.float32)


def _random(evidence: Evidence) -> Float32:
    return np.random.default_rng(evidence.tokens).random(evidence.tokens, dtype=np.float32)


_FACTORS: dict[str, Callable[[Evidence], Float32]] = {
    "probe": lambda evidence: evidence.probe,
    "sensitivity": _stored("sensitivity"),
    "spectral": _stored("spectral"),
    "first": _first,
    "random": _random,
}


@dataclass(frozen=True)
class Selector:
    """A parsed selector expression."""

    factors: tuple[str, ...]

    @property
    def name(self) -> str:
        return "*".join(self.factors)

    @property
    def asks_question(self) -> bool:
        """Whether a probe has to be run."""
        return "probe" in self.factors

    @property
    def wants_sensitivities(self) -> bool:
        """Whether chunks need a score that is only measured on request."""
        return "sensitivity" in self.factors

    def scores(self, evidence: Evidence) -> Float32:
        product = np.ones(evidence.tokens, dtype=np.float32)
        for factor in self.factors:
            product = product * _FACTORS[factor](evidence)
        return product


def parse(expression: str) -> Selector:
    """A selector by name: factors joined by `*`, or `default`. Raises QuireError for an unknown factor."""
    names = tuple(part.strip() for part in (DEFAULT if expression == "default" else expression).split("*"))
    for name in names:
        if name not in _FACTORS:
            raise QuireError(
                f"There is no selector {name!r}.",
                f"Use default, or any of {', '.join(_FACTORS)}, or several joined by *.",
            )
    return Selector(names)


def choose(selector: Selector, chunks: Sequence[Evidence], ratio: float, tile: int = 1) -> list[Mask]:
    """One mask per chunk of the tokens to recompute, `ratio` of all of them, in spans of SPAN_TOKENS.

    A selector that asks the question spends the budget where the question looks; one that does not, evenly.
    tile: tokens that the runtime computes together; the budget is rounded to whole tiles, since it pays for them.
    """
    masks = [np.zeros(chunk.tokens, dtype=bool) for chunk in chunks]
    budget = round(ratio * sum(chunk.tokens for chunk in chunks) / tile) * tile if ratio < 1 else sys.maxsize
    spans = [span for number, chunk in enumerate(chunks) for span in _spans(number, selector.scores(chunk), selector)]
    for _, chunk_number, start in sorted(spans, key=lambda span: -span[0]):
        chosen = masks[chunk_number][start : start + min(SPAN_TOKENS, budget)]
        chosen[:] = True
        budget -= len(chosen)
    return masks


def _spans(chunk: int, scores: Float32, selector: Selector) -> list[tuple[float, int, int]]:
    """The spans of one chunk as (worth, chunk, first token)."""
    starts = range(0, len(scores), SPAN_TOKENS)
    means = [float(scores[start : start + SPAN_TOKENS].mean()) for start in starts]
    if not selector.asks_question:  # worth by rank, so that equal shares of all chunks are worth the same
        order = sorted(range(len(means)), key=lambda span: -means[span])
        for rank, span in enumerate(order):
            means[span] = -(rank + 0.5) * SPAN_TOKENS / len(scores)
    return [(mean, chunk, start) for mean, start in zip(means, starts, strict=True)]
