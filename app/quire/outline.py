"""What the lines of a text are: headings, fenced code, tables, the licence at the top of source code.

Knows Markdown, reStructuredText, CSV and comments; knows nothing of chunks, tokens or files.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, NamedTuple

Markup = Literal["markdown", "rst", "csv", "plain"]

_FENCE = re.compile(r"\s*(`{3,}|~{3,})([^`]*)$")
_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)$")
_UNDERLINE = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*$")
_DELIMITER_ROW = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
_COMMENT = re.compile(r"\s*(?:#|//|--|;|%|\*|<!--|\(\*|rem\b|dnl\b)", re.IGNORECASE)
_RIGHTS = re.compile(r"copyright|licen[cs]ed?\b|\u00a9", re.IGNORECASE)


class Row(NamedTuple):
    """A line that is not blank; start is its offset in the text."""

    number: int
    start: int
    text: str


class Heading(NamedTuple):
    """rows: how many rows it takes, its underline included."""

    level: int
    title: str
    rows: int


class Outline(NamedTuple):
    """headings: by the row where they begin.  fenced: rows inside a code fence, all but its first.  leads: for rows of
    a table the header above them.  tied: rows that stay with the one before.  licence_end: the first row behind the
    licence, or 0."""

    headings: dict[int, Heading]
    fenced: set[int]
    leads: dict[int, str]
    tied: set[int]
    licence_end: int


def rows_of(text: str) -> list[Row]:
    """The lines that are not blank."""
    rows, start = [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            rows.append(Row(number, start, line))
        start += len(line) + 1
    return rows


def outline_of(rows: Sequence[Row], markup: Markup) -> Outline:
    """What these lines are, in this markup."""
    if markup == "csv":
        inside = _quoted(rows)
        return Outline({}, inside, {i: rows[0].text for i in range(1, len(rows)) if i not in inside}, {1}, 0)
    if markup == "rst":
        return Outline(_rst_headings(rows), set(), {}, set(), 0)
    if markup == "plain":
        return Outline({}, set(), {}, set(), _licence_end(rows))
    headings: dict[int, Heading] = {}
    fenced: set[int] = set()
    leads: dict[int, str] = {}
    tied: set[int] = set()
    hopeless: dict[str, int] = {}
    i = 0
    while i < len(rows):
        last = _fence_end(rows, i, hopeless)
        fenced.update(range(i + 1, last + 1))
        if last == i and (heading := _markdown_heading(rows, i)):
            headings[i] = heading
            last += heading.rows - 1
        elif last == i and (end := _table_end(rows, i)) > i:
            tied |= {i + 1, i + 2}
            leads.update(dict.fromkeys(range(i + 2, end + 1), f"{rows[i].text}\n{rows[i + 1].text}"))
            last = end
        i = last + 1
    return Outline(headings, fenced, leads, tied, 0)


def _table_end(rows: Sequence[Row], i: int) -> int:
    """The last row of the table whose header is row i; i itself when there is none."""
    last = i
    if "|" not in rows[i].text or i + 1 >= len(rows) or not _DELIMITER_ROW.match(rows[i + 1].text):
        return i
    while last + 1 < len(rows) and rows[last + 1].number == rows[last].number + 1 and "|" in rows[last + 1].text:
        last += 1
    return last


def _quoted(rows: Sequence[Row]) -> set[int]:
    """The rows of a CSV file that go on with the record above them. A quote that is never closed quotes nothing."""
    inside: set[int] = set()
    opened: list[int] = []
    within = False
    for i, row in enumerate(rows):
        if within:
            opened.append(i)
        if row.text.count('"') % 2:
            within = not within
            inside.update(opened if not within else ())
            opened = []
    return inside


def _licence_end(rows: Sequence[Row]) -> int:
    """The first row behind a comment at the top that speaks of rights; 0 where there is none."""
    start = 1 if rows and rows[0].text.startswith("#!") else 0
    end = start
    if start < len(rows) and rows[start].text.lstrip().startswith("/*"):
        end = next((i + 1 for i in range(start, len(rows)) if "*/" in rows[i].text), start)
    else:
        while end < len(rows) and _COMMENT.match(rows[end].text) and _adjacent(rows, start, end):
            end += 1
    return end if any(_RIGHTS.search(row.text) for row in rows[start:end]) else 0


def _adjacent(rows: Sequence[Row], start: int, i: int) -> bool:
    return i == start or rows[i].number == rows[i - 1].number + 1


def _fence_end(rows: Sequence[Row], i: int, hopeless: dict[str, int]) -> int:
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


def _markdown_heading(rows: Sequence[Row], i: int) -> Heading | None:
    line = rows[i].text
    if line.lstrip()[0] == "#":
        atx = _ATX.match(line)
        return Heading(len(atx[1]), atx[2].rstrip().rstrip("#").rstrip(), 1) if atx else None
    mark = _underline_mark(rows, i)
    if mark not in ("=", "-") or line.lstrip()[0] in "-*+>|":
        return None
    return Heading(1 if mark == "=" else 2, line.strip(), 2)


def _rst_headings(rows: Sequence[Row]) -> dict[int, Heading]:
    """A title is underlined, or under- and overlined; styles rank in the order in which they first appear."""
    headings: dict[int, Heading] = {}
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
        headings[i - over] = Heading(styles.index((mark, over)) + 1, row.text.strip(), 2 + over)
    return headings


def _underline_mark(rows: Sequence[Row], i: int) -> str:
    """The character that underlines row i, or nothing."""
    if i + 1 >= len(rows) or rows[i + 1].number != rows[i].number + 1:
        return ""
    underline = _UNDERLINE.match(rows[i + 1].text)
    return underline[1] if underline and not _UNDERLINE.match(rows[i].text) else ""


def heading_paths(rows: int, headings: dict[int, Heading]) -> list[tuple[str, ...]]:
    """For each row the titles above it, its own included where it is a heading."""
    paths: list[tuple[str, ...]] = []
    stack: list[Heading] = []
    path: tuple[str, ...] = ()
    for i in range(rows):
        if heading := headings.get(i):
            stack = [above for above in stack if above.level < heading.level] + [heading]
            path = tuple(above.title for above in stack)
        paths.append(path)
    return paths


def shared_heading(paths: Sequence[tuple[str, ...]]) -> str:
    """What the rows of a chunk have in common; where that is nothing, the heading of its first row."""
    shared = tuple(titles[0] for titles in takewhile(lambda titles: len(set(titles)) == 1, zip(*paths, strict=False)))
    return " > ".join(shared or paths[0])
