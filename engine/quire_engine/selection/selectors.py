"""Which tokens to recompute: a selector is a product of factors, each a positive score per token.

"probe*sensitivity" multiplies the question's attention with the chunk's stored sensitivity. Chosen tokens come in short
spans, since neighbours belong together and a runtime pays per span. Knows nothing of how scores were measured.
"""

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


def choose(selector: Selector, chunks: Sequence[Evidence], ratio: float) -> list[Mask]:
    """One mask per chunk of the tokens to recompute, about `ratio` of all, in spans of SPAN_TOKENS.

    A selector that asks the question spends the budget where the question looks; one that does not, evenly.
    """
    if ratio >= 1:
        return [np.ones(chunk.tokens, dtype=bool) for chunk in chunks]
    scores = [selector.scores(chunk) for chunk in chunks]
    if selector.asks_question:
        return _best_spans(scores, ratio)
    return [_best_spans([score], ratio)[0] for score in scores]


def _best_spans(scores: Sequence[Float32], ratio: float) -> list[Mask]:
    """Spans by falling mean score until the budget is spent, to the nearest span."""
    masks = [np.zeros(len(score), dtype=bool) for score in scores]
    spans = [
        (float(score[start : start + SPAN_TOKENS].mean()), chunk, start)
        for chunk, score in enumerate(scores)
        for start in range(0, len(score), SPAN_TOKENS)
    ]
    budget = ratio * sum(len(score) for score in scores)
    for _, chunk, start in sorted(spans, key=lambda span: -span[0]):
        size = len(masks[chunk][start : start + SPAN_TOKENS])
        if budget < size / 2:
            break
        masks[chunk][start : start + size] = True
        budget -= size
    return masks
