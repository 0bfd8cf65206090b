"""Texts into token ids word by word, because words repeat: the ids are those of the whole text.

llama.cpp's tokenizer takes 6 microseconds for each token, and 50 for each call; most words of a large library were met
before. A vocabulary that cuts at words before it merges (all byte-pair encodings but a few) gives a text the ids of its
parts, where it is cut before a space and a letter, or where letters end. Whether this one does is tried out on a text;
where it does not, texts are tokenized as a whole. Knows nothing of models or prompts.
"""

import re
from functools import lru_cache
from itertools import chain
from typing import Protocol

_BETWEEN = re.compile(
    r"(?= [^\W\d_])"  # a space and a letter
    r"|(?<=[A-Za-z])(?=[!-@\[-`{-~])"  # a letter, and a digit or a sign
    r"|(?<=[^\W_])(?=\n[^\W\d_])|(?<=\S\n)(?=[^\W\d_])"  # lines
)
_REMEMBERED = 1 << 16  # words, some 20 MB
_LONGEST_CHARS = 32  # longer ones are seldom met again
_TRIAL = """By the way, it is one of the most common things to say in the end. On the other hand there's 1984 or
 12,000; she said: "Don't go, I'll be there at 10 a.m."\n
 A new line\twith tabs  and two   spaces \n  and an indented one.
def find_all(self, words: list[str]) -> int:\n    return sum(len(word) for word in words if word not in {1, 22})\n\n
Das sch\u00f6ne M\u00e4dchen \u00fcber \u00d6l, l'\u00e9t\u00e9 \u00e0 la plage,
\u043d\u0430 \u0431\u0435\u0440\u0435\u0433\u0443, \u6771\u4eac \u30bf\u30ef\u30fc, \U0001f600
of the day, e\u0301 and A4.\n\n"""


class Tokenizer(Protocol):
    def tokenize(self, text: str) -> list[int]: ...


class Words:
    """Tokenizes texts that may be long, and many."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._whole = tokenizer.tokenize
        self._known = lru_cache(_REMEMBERED)(lambda word: tuple(self._whole(word)))
        self._by_words = self._joined(_TRIAL) == self._whole(_TRIAL)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """The ids of a text, in which no control token is read."""
        return tuple(self._joined(text) if self._by_words else self._whole(text))

    def _joined(self, text: str) -> list[int]:
        parts = _BETWEEN.split(text)
        if max(map(len, parts)) <= _LONGEST_CHARS:
            return list(chain.from_iterable(map(self._known, parts)))
        return [
            token for part in parts for token in (self._known if len(part) <= _LONGEST_CHARS else self._whole)(part)
        ]
