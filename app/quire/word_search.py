"""Which places share words with a question: BM25 by SQLite's full-text search, with an upper limit on the work.

To score a place takes SQLite microseconds, and a common word stands in most of a large library. Places are therefore
found by the rarest words of the question, as many as together stand in few enough places; of the others it only counts
whether they are there. In a small library nothing is left out. Knows the tables `words`, `passages` and `documents`;
knows nothing of texts, files or vectors.
"""

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

_WEIGHTS = "1.0, 2.0, 2.0"  # of a word in the text, in the heading, in the file name
_MOST_SCORED = 4000  # places
_MOST_JUDGED = 500  # of them, by the words that only count as there
_MOST_WORDS = 200  # of a question: a pasted page is found by fewer
_ENGLISH = """
a about am an and any are as at be been but by can could did do does for from had has have how i if in into is
it its me my no not of on or our please should so some such tell than that the their them then there these
they this to us was we were what when where which while who whom whose why will with would you your
"""
_STOPWORDS = frozenset(_ENGLISH.split())
_IN_SCOPE = (
    " AND +words.rowid IN (SELECT id FROM passages WHERE document IN (SELECT id FROM documents WHERE EXISTS"
    " (SELECT 1 FROM json_each(?) WHERE substr(documents.path || '/', 1, length(value)) = value)))"
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
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


class _Search:
    def __init__(self, rows: Rows, scopes: Sequence[str]) -> None:
        self._rows = rows
        self._where = _IN_SCOPE if scopes else ""
        self._scope = [json.dumps(list(scopes))] if scopes else []

    def places(self, words: Sequence[str]) -> dict[int, float]:
        counts = {word: self._count(_quoted(word)) for word in words}
        known = sorted((word for word in words if counts[word]), key=lambda word: counts[word])
        if not known:
            return {}
        few = sum(total <= _MOST_SCORED for total in accumulate(counts[word] for word in known))
        if few == len(known):
            return self._scored(_any(known))
        rare, common = known[:few], known[few:]
        found = self._scored(_any(rare)) if rare else self._scored(self._together(known))
        if self._scope and len(found) < _MOST_JUDGED:  # counted everywhere, found here: the rare ones may be elsewhere
            return self._scored(_any(known))
        best = dict(sorted(found.items(), key=lambda item: -item[1])[:_MOST_JUDGED])
        for word in common if rare else ():
            self._add_presence(best, word, counts[word])
        return best

    def _together(self, words: Sequence[str]) -> str:
        """The rarest words, as many of them as have to stand together to be rare enough."""
        chosen = _quoted(words[0])
        for word in words[1:]:
            narrower = f"{chosen} AND {_quoted(word)}"
            if not (count := self._count(narrower)):
                break
            chosen = narrower
            if count <= _MOST_SCORED:
                break
        return chosen

    def _count(self, match: str) -> int:
        return int(self._rows("SELECT count(*) FROM words WHERE words MATCH ?", [match])[0][0])

    def _scored(self, match: str) -> dict[int, float]:
        sql = f"SELECT rowid, -bm25(words, {_WEIGHTS}) FROM words WHERE words MATCH ?{self._where}"
        return dict(self._rows(sql, [match, *self._scope]))

    def _add_presence(self, places: dict[int, float], word: str, count: int) -> None:
        """What BM25 gives a word that stands once in a text of usual length."""
        total = int(self._rows("SELECT max(id) FROM passages", [])[0][0])  # nearly their number, and at once
        weight = max(0.0, math.log((total - count + 0.5) / (count + 0.5)))
        sql = "SELECT rowid FROM words WHERE words MATCH ? AND +rowid IN (SELECT value FROM json_each(?))"
        for (place,) in self._rows(sql, [_quoted(word), json.dumps(list(places))]):
            places[place] += weight


def _quoted(word: str) -> str:
    return f'"{word}"'


def _any(words: Sequence[str]) -> str:
    return " OR ".join(map(_quoted, words))
