"""Cuts a text into passages of a limited number of tokens, at boundaries that mean something.

Knows Markdown and reStructuredText headings and fenced code; knows nothing of files, models or the index.
Tokens are counted by a function that the caller brings.

The whole text is first taken apart into units: its lines, or pieces of a line too long for one chunk. Then
the boundaries between units are visited from the weakest to the strongest, and a boundary is dissolved when
the two groups beside it fit into one chunk together. Two things follow:

- Any two neighbours together exceed the limit (or are two large sections), so chunks are more than half full
  on average.
- Boundaries of equal strength are visited in the order of a hash of the few characters around them, not of
  their position. What happens at one place therefore depends on its neighbourhood only: an edit changes the
  chunk it lies in, seldom one beside it, and the cached KV of all the others stays valid.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

Markup = Literal["markdown", "rst", "plain"]

VERSION = 1  # raise it when the same text would be cut differently; every document is then cut again

# What lies between two units, weakest first. Code fences are weaker than any boundary outside them, so that a
# block is whole before it is joined to its surroundings. A heading of level n has the strength _HEADING - n,
# at least _SECTION.
_CHARACTER, _RUN, _WORD, _SENTENCE, _HEADED = range(5)
_FENCED_LINE, _FENCED_BLANK, _LINE, _BLANK, _BLOCK, _SECTION = range(5, 11)
_HEADING = 100

_CONTEXT_CHARS = 24  # how much text on either side of a boundary decides its turn
_LONGEST_TOKEN_CHARS = 8  # on average; a longer text is taken apart without counting it first

_FENCE = re.compile(r"\s*(`{3,}|~{3,})([^`]*)$")
_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)$")
_UNDERLINE = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*$")
_SENTENCES = re.compile(r".+?(?:[.!?\u2026][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]|$)")
_WORDS = re.compile(r"\s*\S+\s*|\s+")
_RUN_CHARS = 16  # about the length of the pieces of a run without spaces


@dataclass(frozen=True)
class Passage:
    """A chunk at its place in a document.

    start_line, end_line: 1-based, both included.  heading: titles above it, "Guide > Widgets", or empty; of a
    chunk that spans several sections the part they share, or else the first one's.
    """

    text: str
    tokens: int
    start_line: int
    end_line: int
    heading: str

    @property
    def chunk_id(self) -> str:
        """The chunk's identity: equal text is one chunk wherever it stands."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


class _Row(NamedTuple):
    """A line that is not blank; start is its offset in the text."""

    number: int
    start: int
    text: str


class _Heading(NamedTuple):
    """rows: how many rows it takes, its underline included."""

    level: int
    title: str
    rows: int


class _Unit(NamedTuple):
    """A line or a piece of one. strength, turn and gap_tokens describe the boundary before it."""

    start: int
    end: int
    tokens: int
    row: int
    strength: int
    turn: int
    gap_tokens: int


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
    rows = _rows(text)
    headings, fenced = _outline(rows, markup)
    units = list(_units(text, rows, headings, fenced, count_tokens, max_tokens))
    paths = _heading_paths(len(rows), headings)

    def passages(units: Sequence[_Unit], limit: int) -> Iterator[Passage]:
        for group, estimate in _groups(units, limit, floor_tokens):
            body = text[group[0].start : group[-1].end].rstrip()
            tokens = count_tokens(body)
            if tokens > max_tokens and len(group) > 1:
                # The parts were counted one by one and their sum fell short: divide this group further.
                yield from passages(group, estimate * max_tokens // tokens - 1)
            elif body:
                first, last = group[0].row, group[-1].row
                heading = _shared_heading(paths[first : last + 1])
                yield Passage(body, tokens, rows[first].number, rows[last].number, heading)

    return list(passages(units, max_tokens))


def _rows(text: str) -> list[_Row]:
    rows, start = [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            rows.append(_Row(number, start, line))
        start += len(line) + 1
    return rows


def _outline(rows: Sequence[_Row], markup: Markup) -> tuple[dict[int, _Heading], set[int]]:
    """Headings by the row where they begin, and the rows inside a code fence (all but its first)."""
    if markup == "rst":
        return _rst_headings(rows), set()
    if markup == "plain":
        return {}, set()
    headings: dict[int, _Heading] = {}
    fenced: set[int] = set()
    hopeless: dict[str, int] = {}
    i = 0
    while i < len(rows):
        last = _fence_end(rows, i, hopeless)
        fenced.update(range(i + 1, last + 1))
        if last == i and (heading := _markdown_heading(rows, i)):
            headings[i] = heading
            last += heading.rows - 1
        i = last + 1
    return headings, fenced


def _fence_end(rows: Sequence[_Row], i: int, hopeless: dict[str, int]) -> int:
    """The row that closes the fence opened in row i; i itself when it opens none.

    A fence that is never closed is no fence: otherwise one stray line would turn the rest of a document into
    code. hopeless: the shortest fence of each character known to stay open, so that each search is done once.
    """
    if i == 0 and rows[0].number == 1 and rows[0].text.rstrip() == "---":  # front matter
        return next((j for j in range(1, len(rows)) if rows[j].text.rstrip() in ("---", "...")), 0)
    opening = _FENCE.match(rows[i].text) if rows[i].text.lstrip()[0] in "`~" else None
    if not opening:
        return i
    mark, length = opening[1][0], len(opening[1])
    if length >= hopeless.get(mark, length + 1):
        return i
    for j in range(i + 1, len(rows)):
        line = rows[j].text.strip()
        if len(line) >= length and not line.strip(mark):
            return j
    hopeless[mark] = length
    return i


def _markdown_heading(rows: Sequence[_Row], i: int) -> _Heading | None:
    line = rows[i].text
    if line.lstrip()[0] == "#":
        atx = _ATX.match(line)
        return _Heading(len(atx[1]), atx[2].rstrip().rstrip("#").rstrip(), 1) if atx else None
    mark = _underline_mark(rows, i)
    if mark not in ("=", "-") or line.lstrip()[0] in "-*+>|":
        return None
    return _Heading(1 if mark == "=" else 2, line.strip(), 2)


def _rst_headings(rows: Sequence[_Row]) -> dict[int, _Heading]:
    """A title is underlined, or under- and overlined; styles rank in the order in which they first appear."""
    headings: dict[int, _Heading] = {}
    styles: list[tuple[str, bool]] = []
    for i, row in enumerate(rows):
        mark = _underline_mark(rows, i)
        if not mark or len(rows[i + 1].text.rstrip()) < len(row.text.strip()):
            continue
        over = i > 0 and rows[i - 1].number == row.number - 1
        over = over and rows[i - 1].text.rstrip() == rows[i + 1].text.rstrip()
        if row.text[0].isspace() and not over:
            continue
        if (mark, over) not in styles:
            styles.append((mark, over))
        headings[i - over] = _Heading(styles.index((mark, over)) + 1, row.text.strip(), 2 + over)
    return headings


def _underline_mark(rows: Sequence[_Row], i: int) -> str:
    """The character that underlines row i, or nothing."""
    if i + 1 >= len(rows) or rows[i + 1].number != rows[i].number + 1:
        return ""
    underline = _UNDERLINE.match(rows[i + 1].text)
    return underline[1] if underline and not _UNDERLINE.match(rows[i].text) else ""


def _heading_paths(rows: int, headings: dict[int, _Heading]) -> list[tuple[str, ...]]:
    """For each row the titles above it, its own included where it is a heading."""
    paths: list[tuple[str, ...]] = []
    stack: list[_Heading] = []
    path: tuple[str, ...] = ()
    for i in range(rows):
        if heading := headings.get(i):
            stack = [above for above in stack if above.level < heading.level] + [heading]
            path = tuple(above.title for above in stack)
        paths.append(path)
    return paths


def _shared_heading(paths: Sequence[tuple[str, ...]]) -> str:
    """What the rows of a chunk have in common; where that is nothing, the heading of its first row."""
    shared = tuple(titles[0] for titles in takewhile(lambda titles: len(set(titles)) == 1, zip(*paths, strict=False)))
    return " > ".join(shared or paths[0])


def _units(
    text: str,
    rows: Sequence[_Row],
    headings: dict[int, _Heading],
    fenced: set[int],
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> Iterator[_Unit]:
    """The lines of the text, and the pieces of those that exceed max_tokens, in order."""
    gaps: dict[str, int] = {}
    tied_until = 0  # rows before this one belong to a heading, or follow it: they stay with it
    end = 0
    for i, row in enumerate(rows):
        gap = text[end : row.start]
        if gap not in gaps:
            gaps[gap] = max(1, count_tokens(gap))
        strength = _strength(i, row, gap.count("\n") > 1, headings, fenced) if i >= tied_until else _HEADED
        if i in headings:
            tied_until = i + headings[i].rows + 1
        line_end = row.start + len(row.text.rstrip())
        gap_tokens = gaps[gap]
        for start, stop, tokens, inner in _pieces(text, row.start, line_end, count_tokens, max_tokens):
            around = text[max(0, end - _CONTEXT_CHARS) : end] + text[start : start + _CONTEXT_CHARS]
            turn = zlib.crc32(around.encode("utf-8", "surrogatepass"))
            yield _Unit(start, stop, tokens, i, strength if start == row.start else inner, turn, gap_tokens)
            end, gap_tokens = stop, 0


def _strength(i: int, row: _Row, blank: bool, headings: dict[int, _Heading], fenced: set[int]) -> int:
    if i in fenced:
        return _FENCED_BLANK if blank else _FENCED_LINE
    if i in headings:
        return max(_HEADING - headings[i].level, _SECTION)
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
    size = [unit.tokens for unit in units]  # at the first unit of a group
    for i in sorted(range(1, len(units)), key=lambda i: (units[i].strength, units[i].turn)):
        first, last = reach[i - 1], reach[i]
        total = size[first] + units[i].gap_tokens + size[i]
        sections = units[i].strength >= _SECTION and min(size[first], size[i]) >= floor_tokens
        if total <= limit and not sections:
            size[first], reach[first], reach[last] = total, last, first
    first = 0
    while first < len(units):
        yield units[first : reach[first] + 1], size[first]
        first = reach[first] + 1
