"""Which places share words with a question: BM25 by SQLite's full-text search, with an upper limit on the work.

To score a place takes SQLite microseconds, and a common word stands in most of a large library. Places are therefore
found by the rarest words of the question, as many as together stand in few enough places; of a few others it only
counts whether they are there. How common a word is, is counted up to a limit and estimated beyond it. In a small
library nothing is left out. Knows the tables `words`, `passages` and `documents`; knows nothing of texts, files or
vectors.
"""

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

_WEIGHTS = "1.0, 2.0, 2.0"  # of a word in the text, in the heading, in the file name
_MOST_SCORED = 2000  # places
_MOST_JUDGED = 500  # of them, by the words that only count as there
_MOST_COMMON = 4  # of these words, the rarest ones
_NEAR_WORDS = 20  # between words that are all common
_MOST_WORDS = 200  # of a question: a pasted page is found by fewer
_ENGLISH = """
a about am an and any are as at be been but by can could did do does for from had has have how i if in into is
it its me my no not of on or our please should so some such tell than that the their them then there these
they this to us was we were what when where which while who whom whose why will with would you your
"""
_STOPWORDS = frozenset(_ENGLISH.split())
_OF_SCOPE = (
    "SELECT {} FROM passages WHERE document IN (SELECT id FROM documents WHERE EXISTS"
    " (SELECT 1 FROM json_each(?) WHERE substr(documents.path || '/', 1, length(value)) = value))"
)

Rows = Callable[[str, Sequence[str | int]], list[Any]]  # runs a query


def content_words(text: str) -> list[str]:
    """Its words, each once, without the commonest ones of English, or all when it has no others."""
    spaced = "".join(c if c.isalnum() or c == "_" or unicodedata.combining(c) else " " for c in text)
    words = dict.fromkeys(spaced.lower().split())
    return [word for word in words if word not in _STOPWORDS] or list(words)


def words_of(question: str) -> list[str]:
    """What a question is found by."""
    return content_words(question)[:_MOST_WORDS]


def ranked(rows: Rows, question: str, scopes: Sequence[str]) -> list[tuple[int, float]]:
    """Places (rows of `passages`) with their scores, higher is better, best first.

    scopes: what paths begin with, a slash behind them; none means everywhere.
    """
    found = _Search(rows, scopes).places(words_of(question))
    return [(place, -score) for score, place in sorted((-score, place) for place, score in found.items())]


class _Search:
    def __init__(self, rows: Rows, scopes: Sequence[str]) -> None:
        self._rows = rows
        self._scope = [json.dumps(list(scopes))] if scopes else []
        self._where = f" AND +words.rowid IN ({_OF_SCOPE.format('id')})" if scopes else ""
        # Files of a folder are read one after the other, so that their places lie together.
        everywhere = "SELECT 0, (SELECT coalesce(max(id), 0) FROM passages)"
        within = _OF_SCOPE.format("coalesce(min(id), 0), coalesce(max(id), 0)")
        [self._range] = rows(within if scopes else everywhere, self._scope)

    def places(self, words: Sequence[str]) -> dict[int, float]:
        counts = {word: self._count(_quoted(word)) for word in words}
        known = sorted((word for word in words if counts[word]), key=lambda word: counts[word])
        few = sum(total <= _MOST_SCORED for total in accumulate(counts[word] for word in known))
        if few == len(known):
            return self._scored(_any(known)) if known else {}
        rare, common = known[:few], known[few:][:_MOST_COMMON]
        found = self._scored(_any(rare)) if rare else self._together(common)
        if self._scope and len(found) < _MOST_JUDGED:  # they may lie between those of other folders
            return self._scored(_any(known))
        best = dict(sorted(found.items(), key=itemgetter(1), reverse=True)[:_MOST_JUDGED])
        for word in common if rare else ():
            self._add_presence(best, _any(rare), word, counts[word])
        return best

    def _together(self, words: Sequence[str]) -> dict[int, float]:
        """Where the rarest words, as many of them as have to, stand together to be rare enough; where all do not
        suffice, near each other."""
        chosen = _quoted(words[0])
        for word in words[1:]:
            narrower = f"{chosen} AND {_quoted(word)}"
            if not (count := self._count(narrower)):
                return self._scored(chosen)
            chosen = narrower
            if count <= _MOST_SCORED:
                return self._scored(chosen)
        near = f"NEAR({' '.join(map(_quoted, words))}, {_NEAR_WORDS})"
        return (len(words) > 1 and self._scored(near)) or self._scored(chosen)

    @property
    def _total(self) -> int:
        """Nearly the number of places that are searched."""
        first, last = self._range
        return int(last - first + 1)

    def _count(self, match: str) -> int:
        """Places with a match: counted up to the limit; beyond it estimated, as if the rest were like the first."""
        found = "SELECT rowid FROM words WHERE words MATCH ? AND rowid BETWEEN ? AND ? LIMIT ?"
        sql = f"SELECT count(*), max(rowid) FROM ({found})"
        [(count, last)] = self._rows(sql, [match, *self._range, _MOST_SCORED + 1])
        return int(count if count <= _MOST_SCORED else count * self._total // (last - self._range[0] + 1))

    def _scored(self, match: str) -> dict[int, float]:
        sql = (
            f"SELECT rowid, -bm25(words, {_WEIGHTS}) FROM words"
            f" WHERE words MATCH ? AND rowid BETWEEN ? AND ?{self._where} LIMIT ?"
        )
        return dict(self._rows(sql, [match, *self._range, *self._scope, _MOST_SCORED]))

    def _add_presence(self, places: dict[int, float], found_by: str, word: str, count: int) -> None:
        """What BM25 gives a word that stands once in a text of usual length."""
        weight = max(0.0, math.log((self._total - count + 0.5) / (count + 0.5)))
        for (place,) in self._rows(
            "SELECT rowid FROM words WHERE words MATCH ?", [f"({found_by}) AND {_quoted(word)}"]
        ):
            if place in places:
                places[place] += weight


def _quoted(word: str) -> str:
    return f'"{word}"'


def _any(words: Sequence[str]) -> str:
    return " OR ".join(map(_quoted, words))
