"""Which tokens to recompute: a selector is one or more rules, a rule a product of factors, a factor a positive score
per token.

"first+3*probe*early" spends a quarter of the budget on the beginnings of the chunks and three where the question looks,
rather early in a chunk than late; "probe*sensitivity" multiplies the question's attention with the chunk's stored
sensitivity; "spectral:0.3" is the frequency rule with three tenths of the frequencies in place of half. Knows nothing
of how scores were measured.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from quire_engine import plan
from quire_engine.errors import QuireError
from quire_engine.plan import Mask
from quire_engine.selection import spectral
from quire_engine.types import Float32

DEFAULT = "first+3*probe*early"
_SHARES = re.compile(r"[1-9][0-9]?")


@dataclass(frozen=True)
class Evidence:
    """What is known about the tokens of one chunk. stored: scores kept with it.  probe: this question's attention
    mass.  deviation: of stored values from this prompt's. Either is empty when it was not measured.
    intact: it stands where it was read, so that computing it again would give what is stored."""

    tokens: int
    stored: Mapping[str, Float32]
    probe: Float32
    deviation: Float32 = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    intact: bool = False


def _first(evidence: Evidence) -> Float32:
    return np.float32(1) / np.arange(1, evidence.tokens + 1, dtype=np.float32)


def _early(evidence: Evidence) -> Float32:
    """A weak preference: what was read with little before it changed most."""
    return _first(evidence) ** np.float32(0.25)


def _random(evidence: Evidence) -> Float32:
    return np.random.default_rng(evidence.tokens).random(evidence.tokens, dtype=np.float32)


_PROBE, _DEVIATION = "probe", "value-deviation"
_FACTORS: dict[str, Callable[[Evidence], Float32]] = {
    _PROBE: lambda evidence: evidence.probe,
    _DEVIATION: lambda evidence: evidence.deviation,
    "first": _first,
    "early": _early,
    "random": _random,
}
_STORED = ("sensitivity", *spectral.NAMES)
_NAMES = (_PROBE, *_STORED, _DEVIATION, "first", "early", "random")


@dataclass(frozen=True)
class Rule:
    """A product of factors, and how many shares of the budget it spends."""

    factors: tuple[str, ...]
    shares: int = 1

    @property
    def name(self) -> str:
        return "*".join([*([str(self.shares)] if self.shares > 1 else []), *self.factors])

    @property
    def asks_question(self) -> bool:
        return _PROBE in self.factors

    @property
    def knows_prompt(self) -> bool:
        """Whether its scores can be compared between chunks, since they come from the prompt they stand in."""
        return self.asks_question or _DEVIATION in self.factors

    def scores(self, evidence: Evidence) -> Float32:
        product = np.ones(evidence.tokens, dtype=np.float32)
        for factor in self.factors:
            product = product * (_FACTORS[factor](evidence) if factor in _FACTORS else evidence.stored[factor])
        return product

    def worth(self, chunk: Evidence) -> Float32:
        """Scores that can be compared between chunks: a rule that knows the prompt spends its budget where it matters
        there; one that does not, evenly, so that a token is worth its place among its chunk's."""
        scores = self.scores(chunk)
        if self.knows_prompt:
            return scores
        places = np.empty(chunk.tokens, dtype=np.float32)
        places[np.argsort(-scores, kind="stable")] = np.arange(chunk.tokens)
        return -(places + np.float32(0.5)) / np.float32(chunk.tokens)


@dataclass(frozen=True)
class Selector:
    """A parsed selector expression: rules that share the budget."""

    rules: tuple[Rule, ...]

    @property
    def name(self) -> str:
        return "+".join(rule.name for rule in self.rules)

    @property
    def asks_question(self) -> bool:
        """Whether a probe has to be run."""
        return any(rule.asks_question for rule in self.rules)

    @property
    def knows_prompt(self) -> bool:
        """Whether it spends its budget where this prompt needs it: nothing on chunks that are intact."""
        return any(rule.knows_prompt for rule in self.rules)

    @property
    def compares_values(self) -> bool:
        """Whether the first layers of the whole context have to be computed."""
        return any(_DEVIATION in rule.factors for rule in self.rules)

    @property
    def stored_scores(self) -> frozenset[str]:
        """The scores that chunks need to be stored with."""
        return frozenset(name for rule in self.rules for name in rule.factors if name not in _FACTORS)


def parse(expression: str) -> Selector:
    """A selector by name: factors joined by `*` to rules, rules by `+`, or `default`. A rule may begin with a number,
    its shares of the budget, and `spectral` and `highpass` may end with one, the share of frequencies that is low.

    Raises QuireError for an unknown factor.
    """
    rules = (DEFAULT if expression == "default" else expression).split("+")
    return Selector(tuple(_rule([name.strip() for name in rule.split("*")]) for rule in rules))


def _rule(names: list[str]) -> Rule:
    shares = int(names.pop(0)) if len(names) > 1 and _SHARES.fullmatch(names[0]) else 1
    return Rule(tuple(map(_factor, names)), shares)


def _factor(name: str) -> str:
    """Its one spelling."""
    if name in _NAMES:
        return name
    try:
        return spectral.canonical(name)
    except ValueError:
        raise QuireError(
            f"There is no selector {name!r}.",
            f"Use default, or any of {', '.join(_NAMES)}, or several joined by * (product) or + (shared budget). "
            "spectral:0.3 and highpass:0.3 call three tenths of the frequencies low, not half.",
        ) from None


def choose(selector: Selector, chunks: Sequence[Evidence], ratio: float, tile: int = 1) -> list[Mask]:
    """One mask per chunk of the tokens to recompute, `ratio` of all of them or a little more: whole tiles.

    tile: tokens that the runtime computes together.
    """
    ends = list(accumulate(chunk.tokens for chunk in chunks))
    total = ends[-1] if ends else 0
    chosen, left = np.zeros(total, dtype=bool), np.ones(total, dtype=bool)
    if ratio < 1 and selector.knows_prompt:
        left = np.repeat([not chunk.intact for chunk in chunks], [chunk.tokens for chunk in chunks])
    budget = plan.budget(total, ratio, tile)
    shares = accumulate(rule.shares for rule in selector.rules)
    all_shares = sum(rule.shares for rule in selector.rules)
    for rule, until_here in zip(selector.rules, shares, strict=True):
        worth = np.concatenate([np.zeros(0, np.float32), *map(rule.worth, chunks)])
        order = np.argsort(-worth, kind="stable")
        taken = order[left[order]][: budget * until_here // all_shares - int(chosen.sum())]
        chosen[taken], left[taken] = True, False
    return np.split(chosen, ends[:-1])
