"""Which passages answer a question: found by words and, where there are vectors, by meaning; put in one order.

    Retriever(library).search("When was the mill built?", 40)

Rankings are fused by rank (reciprocal rank fusion, Cormack et al. 2009). Passages that say nearly the same as a better
one come last, neighbours of a short best one among the first. Of two that are as good as each other the one goes first
whose KV is stored, and it is said how often that happened. Knows nothing of SQL, of models, or of what fits a prompt.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from quire.library import EVERYWHERE, Hit, Library, Within

_DAMPING = 60  # of reciprocal rank fusion, as published
_AS_GOOD = 0.995  # of a score: a difference that says nothing
_NEARLY_SAME = 0.9  # share of the pairs of words that two passages have in common
_SPARE = 2  # candidates for one hit, since copies of it may come along
_BEST = 1  # hits whose neighbours are taken, where they are short: docs/decisions/finding.md
_SHORT_TOKENS = 100  # says little without what stands beside it
_BEFORE_NEIGHBOURS = 5  # hits that come before them


class Ranking(Protocol):
    """Another way of finding passages than by words."""

    def nearest(self, question: str, limit: int, within: Within) -> Sequence[Hit]:
        """Each chunk at most once, best first."""


@dataclass(frozen=True)
class Findings:
    """hits: best first, no two nearly the same.  neighbours: of a short best hit.  repeats: what says nearly the same
    as a hit.  cached_first: hits that are before an equally good one because their KV is stored."""

    hits: tuple[Hit, ...]
    neighbours: tuple[Hit, ...] = ()
    repeats: tuple[Hit, ...] = ()
    cached_first: int = 0

    @property
    def in_order(self) -> list[Hit]:
        """All of them, each once, in the order in which they are worth a place in the prompt."""
        first, rest = self.hits[:_BEFORE_NEIGHBOURS], self.hits[_BEFORE_NEIGHBOURS:]
        return [*first, *self.neighbours, *rest, *self.repeats]


def _never_cached(_passage: str) -> bool:
    return False


class Retriever:
    """is_cached: whether the KV of a passage is stored."""

    def __init__(
        self, library: Library, others: Sequence[Ranking] = (), is_cached: Callable[[str], bool] = _never_cached
    ) -> None:
        self._library = library
        self._others = others
        self._is_cached = is_cached

    def search(self, question: str, limit: int, within: Within = EVERYWHERE) -> Findings:
        """At most `limit` hits. Raises QuireError where the index cannot be read."""
        wanted = _SPARE * limit
        rankings = [self._library.search(question, wanted, within)]
        rankings += [list(other.nearest(question, wanted, within)) for other in self._others]
        found = fused(rankings) if self._others else rankings[0]
        ordered, cached_first = self._by_cache(found)
        hits, repeats = told_apart(ordered, limit)
        short = [hit for hit in hits[:_BEST] if hit.tokens < _SHORT_TOKENS]
        near = [beside for hit in short for beside in self._library.neighbours(hit)]
        known = {hit.chunk_id for hit in (*hits, *repeats)}
        neighbours = {hit.chunk_id: hit for hit in near if hit.chunk_id not in known}
        return Findings(tuple(hits), tuple(neighbours.values()), tuple(repeats), cached_first)

    def _by_cache(self, hits: Sequence[Hit]) -> tuple[list[Hit], int]:
        """Among equally good ones the stored ones first; and how many that moved."""
        ordered: list[Hit] = []
        moved = 0
        for group in _as_good(hits):
            stored = [len(group) > 1 and self._is_cached(hit.text) for hit in group]
            better = sorted(range(len(group)), key=lambda at: not stored[at])
            moved += sum(stored[at] and place < at for place, at in enumerate(better))
            ordered += [group[at] for at in better]
        return ordered, moved


def fused(rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
    """One ranking of all, by the sum of 1 / (60 + rank); that is their score then."""
    scores: dict[str, float] = {}
    hits: dict[str, Hit] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            scores[hit.chunk_id] = scores.get(hit.chunk_id, 0.0) + 1 / (_DAMPING + rank)
            hits.setdefault(hit.chunk_id, hit)  # at the place that the words say
    best_first = sorted(hits, key=lambda chunk: -scores[chunk])
    return [replace(hits[chunk], score=scores[chunk]) for chunk in best_first]


def _as_good(hits: Iterable[Hit]) -> list[list[Hit]]:
    """Runs of hits whose scores hardly differ from the first one's."""
    groups: list[list[Hit]] = []
    for hit in hits:
        if groups and hit.score >= _AS_GOOD * groups[-1][0].score:
            groups[-1].append(hit)
        else:
            groups.append([hit])
    return groups


def told_apart(hits: Sequence[Hit], limit: int) -> tuple[list[Hit], list[Hit]]:
    """The first hits, as many as there may be, of which no two say nearly the same; and what repeats them.

    Passages that differ in a number are never the same: two invoices are not."""
    kept: list[tuple[Hit, frozenset[str]]] = []
    repeats: list[Hit] = []
    for hit in hits:
        if len(kept) == limit:
            break
        pairs = _pairs(hit.text)
        some = tuple(islice(pairs, len(pairs) // 9 + 1))  # of nearly the same pairs, less than a ninth are others
        if any(not others.isdisjoint(some) and _nearly_same(pairs, others) for _, others in kept):
            repeats.append(hit)
        else:
            kept.append((hit, pairs))
    return [hit for hit, _ in kept], repeats


def _pairs(text: str) -> frozenset[str]:
    words = text.lower().split()
    return frozenset(map(" ".join, zip(["", *words], [*words, ""], strict=True)))


def _nearly_same(one: frozenset[str], other: frozenset[str]) -> bool:
    if min(len(one), len(other)) < _NEARLY_SAME * max(len(one), len(other)):
        return False
    common = len(one & other)
    if common < _NEARLY_SAME * (len(one) + len(other) - common):
        return False
    return not any(character.isdigit() for pair in one ^ other for character in pair)
