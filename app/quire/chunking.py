"""Cuts a text into passages of a limited number of tokens, at boundaries that mean something.

Knows how strong the boundaries are that an outline tells; knows nothing of files, models or the index. Tokens are
counted by a function that the caller brings.

The whole text is first taken apart into units: its lines, or pieces of a line too long for one chunk. Then
the boundaries between units are visited from the weakest to the strongest, and a boundary is dissolved when
the two groups beside it fit into one chunk together. Two things follow:

- Any two neighbours together exceed the limit (or are two large sections), so chunks are more than half full
  on average.
- Boundaries of equal strength are visited in the order of a hash of the few characters around them, not of
  their position. What happens at one place therefore depends on its neighbourhood only: an edit changes the
  chunk it lies in, seldom one beside it, and the cached KV of all the others stays valid.

A chunk that begins inside a table repeats the table's header, because rows say little without it. The licence at
the top of a source file is a chunk of its own: equal ones are stored once.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quire.outline import Markup, Outline, Row, heading_paths, outline_of, rows_of, shared_heading

VERSION = 2  # raise it when the same text would be cut differently; every document is then cut again

# What lies between two units, weakest first. Code fences are weaker than any boundary outside them, so that a
# block is whole before it is joined to its surroundings. A heading of level n has the strength _HEADING - n,
# at least _SECTION.
_CHARACTER, _RUN, _WORD, _SENTENCE, _HEADED = range(5)
_FENCED_LINE, _FENCED_BLANK, _LINE, _BLANK, _BLOCK, _SECTION = range(5, 11)
_HEADING = 100
_LICENCE = 200

_CONTEXT_CHARS = 24  # how much text on either side of a boundary decides its turn
_HEADER_SHARE = 4  # a table's header is repeated if it takes no more than this part of a chunk
_LICENCE_TOKENS = 32  # a shorter one costs less than a chunk of its own

_LONGEST_TOKEN_CHARS = 8  # on average; a longer text is taken apart without counting it first

_SENTENCES = re.compile(r".+?(?:[.!?\u2026][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]|$)")
_WORDS = re.compile(r"\s*\S+\s*|\s+")
_RUN_CHARS = 16  # about the length of the pieces of a run without spaces


@dataclass(frozen=True)
class Passage:
    """A chunk at its place in a document.

    start_line, end_line: 1-based, both included.  heading: titles above it, "Guide > Widgets", or empty; of a
    chunk that spans several sections the part they share, or else the first one's.  place: where it is in a file that
    has no lines to name, "page 3"; else empty.
    """

    text: str
    tokens: int
    start_line: int
    end_line: int
    heading: str
    place: str = ""

    @property
    def chunk_id(self) -> str:
        """The chunk's identity: equal text is one chunk wherever it stands."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


class _Unit(NamedTuple):
    """A line or a piece of one. strength, turn and gap_tokens describe the boundary before it; lead_tokens is what a
    chunk that begins here repeats of its table."""

    start: int
    end: int
    tokens: int
    row: int
    strength: int
    turn: int
    gap_tokens: int
    lead_tokens: int


def split(
    text: str,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    min_tokens: int | Literal["half"] = "half",
    markup: Markup = "markdown",
) -> list[Passage]:
    """Cuts text (lines end with "\\n") into passages of at most max_tokens; nothing but blank space is lost.

    min_tokens: sections under different headings are kept apart once each has this size; half of max_tokens
    unless given. Only a single character that alone exceeds max_tokens yields a larger passage.
    """
    if max_tokens < 1:
        raise ValueError("max_tokens must be at least 1")
    floor_tokens = max_tokens // 2 if min_tokens == "half" else min_tokens
    rows = rows_of(text)
    outline = outline_of(rows, markup)
    units = list(_units(text, rows, outline, count_tokens, max_tokens))
    paths = heading_paths(len(rows), outline.headings)

    def passages(units: Sequence[_Unit], limit: int) -> Iterator[Passage]:
        for group, estimate in _groups(units, limit, floor_tokens):
            plain = text[group[0].start : group[-1].end].rstrip()
            body = f"{outline.leads[group[0].row]}\n{plain}" if group[0].lead_tokens else plain
            tokens = count_tokens(body)
            if tokens > max_tokens and len(group) > 1:
                # The parts were counted one by one and their sum fell short: divide this group further.
                yield from passages(group, estimate * max_tokens // tokens - 1)
            elif body:
                if tokens > max_tokens and group[0].lead_tokens:
                    body, tokens = plain, count_tokens(plain)
                first, last = group[0].row, group[-1].row
                heading = shared_heading(paths[first : last + 1])
                yield Passage(body, tokens, rows[first].number, rows[last].number, heading)

    return list(passages(units, max_tokens))


def _units(
    text: str,
    rows: Sequence[Row],
    outline: Outline,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> Iterator[_Unit]:
    """The lines of the text, and the pieces of those that exceed max_tokens, in order."""
    counted: dict[str, int] = {}  # gaps and headers of tables: there are few, and they repeat

    def count(text: str) -> int:
        if text not in counted:
            counted[text] = max(1, count_tokens(text))
        return counted[text]

    tied_until = 0  # rows before this one belong to a heading, or follow it: they stay with it
    end = 0
    for i, row in enumerate(rows):
        gap = text[end : row.start]
        gap_tokens = count(gap)
        tied = i < tied_until or i in outline.tied
        strength = _HEADED if tied else _strength(i, row, gap.count("\n") > 1, outline)
        if i in outline.headings:
            tied_until = i + outline.headings[i].rows + 1
        lead = outline.leads.get(i)
        lead_tokens = 0
        if lead is not None and len(lead) * _HEADER_SHARE <= max_tokens * _LONGEST_TOKEN_CHARS:
            lead_tokens = count(lead) + count("\n")
            lead_tokens = lead_tokens if lead_tokens * _HEADER_SHARE <= max_tokens else 0
        line_end = row.start + len(row.text.rstrip())
        for start, stop, tokens, inner in _pieces(text, row.start, line_end, count_tokens, max_tokens - lead_tokens):
            around = text[max(0, end - _CONTEXT_CHARS) : end] + text[start : start + _CONTEXT_CHARS]
            turn = zlib.crc32(around.encode("utf-8", "surrogatepass"))
            found = strength if start == row.start else inner
            yield _Unit(start, stop, tokens, i, found, turn, gap_tokens, lead_tokens)
            end, gap_tokens = stop, 0


def _strength(i: int, row: Row, blank: bool, outline: Outline) -> int:
    if i in outline.fenced:
        return _FENCED_BLANK if blank else _FENCED_LINE
    if i in outline.headings:
        return max(_HEADING - outline.headings[i].level, _SECTION)
    if i and i == outline.licence_end:
        return _LICENCE
    if not blank:
        return _LINE
    # After a blank line an indented one goes on with what came before: a list item, a function body, a
    # directive.
    return _BLANK if row.text[0].isspace() else _BLOCK


def _pieces(
    text: str, start: int, end: int, count_tokens: Callable[[str], int], max_tokens: int, depth: int = 0
) -> Iterator[tuple[int, int, int, int]]:
    """Start, end, tokens and strength of the parts of text[start:end], each within max_tokens if possible."""
    finest = depth == len(_CUTS)
    if finest or end - start <= max_tokens * _LONGEST_TOKEN_CHARS:
        tokens = max(1, count_tokens(text[start:end]))
        if finest or tokens <= max_tokens:
            yield start, end, tokens, _SENTENCE
            return
    strength, cut = _CUTS[depth]
    for length in cut(text[start:end]):
        stop = start + length
        for a, b, tokens, inner in _pieces(text, start, stop, count_tokens, max_tokens, depth + 1):
            yield a, b, tokens, strength if a == start else inner
        start = stop


def _runs(text: str) -> Iterator[int]:
    """Lengths of short pieces of a text without spaces, cut where its characters say, not at fixed steps."""
    start = 0
    for i in range(4, len(text)):
        if i - start < _RUN_CHARS // 2:
            continue
        here = zlib.crc32(text[i - 4 : i].encode("utf-8", "surrogatepass")) % _RUN_CHARS == 0
        if here or i - start == 4 * _RUN_CHARS:
            yield i - start
            start = i
    yield len(text) - start


def _lengths(pattern: re.Pattern[str]) -> Callable[[str], Iterator[int]]:
    return lambda text: (len(match[0]) for match in pattern.finditer(text))


_CUTS: tuple[tuple[int, Callable[[str], Iterator[int]]], ...] = (
    (_SENTENCE, _lengths(_SENTENCES)),
    (_WORD, _lengths(_WORDS)),
    (_RUN, _runs),
    (_CHARACTER, lambda text: iter([1] * len(text))),
)


def _groups(units: Sequence[_Unit], limit: int, floor_tokens: int) -> Iterator[tuple[Sequence[_Unit], int]]:
    """The units joined into groups of at most limit tokens, with estimated sizes: see the module's text."""
    reach = list(range(len(units)))  # at either end of a group: where its other end is
    size = [unit.tokens + unit.lead_tokens for unit in units]  # at the first unit of a group
    for i in sorted(range(1, len(units)), key=lambda i: (units[i].strength, units[i].turn)):
        first, last = reach[i - 1], reach[i]
        total = size[first] + units[i].gap_tokens + size[i] - units[i].lead_tokens
        if units[i].strength == _LICENCE:
            apart = size[first] >= _LICENCE_TOKENS
        else:
            apart = units[i].strength >= _SECTION and min(size[first], size[i]) >= floor_tokens
        if total <= limit and not apart:
            size[first], reach[first], reach[last] = total, last, first
    first = 0
    while first < len(units):
        yield units[first : reach[first] + 1], size[first]
        first = reach[first] + 1
