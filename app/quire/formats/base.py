"""What every format gives: text as Markdown, with marks that say where its parts stand in the file; or why it fails.

Knows nothing of formats, of files on disk or of the process that all this runs in.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire_engine.errors import QuireError

VERSION = 1  # raise it when the same bytes would give other text; such files are then read again

MOST_CHARACTERS = 20_000_000  # of a file's text: about ten times a very long novel
_CELLS, _LINE = "!", "line"  # what the kind of a mark of cells ends in; the kind that counts lines
# What a line of prose must not begin with, because it would read as a heading, a code fence or an underline.
_MARKUP = re.compile(r"(?m)^( {0,3})(?=#{1,6}[ \t]|`{3}|~{3}|=+[ \t]*$|-+[ \t]*$)")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


class Unreadable(QuireError):
    """A file that cannot become text. reason: why, a few words.  remedy: what would help."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


class TooMuchText(Unreadable):
    def __init__(self) -> None:
        super().__init__(
            f"holds more than {MOST_CHARACTERS // 1_000_000} million characters of text", "Split it into parts."
        )


@dataclass(frozen=True)
class Mark:
    """Where the text comes from, from this line (1-based) up to the next mark.

    kind: "page", "slide", ...; "line" for a line of the file; a sheet's name and "!" for cells.  first, last: its
    number, or the cells where it begins and ends.
    """

    line: int
    kind: str
    first: str
    last: str


@dataclass(frozen=True)
class Parsed:
    """What a file says. text: Markdown, lines end with "\\n"."""

    text: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Lines:
    """Lines of the file itself, both included."""

    start: int
    end: int


def place(marks: Sequence[Mark], start_line: int, end_line: int) -> str | Lines:
    """Where these lines of the text stand in the file: "page 3", "slides 2-4", "Budget!A2:F40", or its own lines."""
    if not marks:
        return Lines(start_line, end_line)
    first, last = (_at(marks, line) for line in (start_line, end_line))
    if first.kind == last.kind == _LINE:
        return Lines(int(first.first), max(int(first.first), int(last.last)))
    if first.kind == last.kind:
        return _range(first.kind, first.first, last.last)
    return f"{_range(first.kind, first.first, first.last)} to {_range(last.kind, last.first, last.last)}"


def _at(marks: Sequence[Mark], line: int) -> Mark:
    return marks[max(0, bisect_right(marks, line, key=lambda mark: mark.line) - 1)]


def _range(kind: str, first: str, last: str) -> str:
    if kind.endswith(_CELLS):
        return f"{kind}{first}" if first == last else f"{kind}{first}:{last}"
    return f"{kind} {first}" if first == last else f"{kind}s {first}-{last}"


class Writer:
    """Collects the text of a document and its marks. Text that looks like markup is escaped, so that it stays text."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._marks: list[Mark] = []
        self._characters = 0

    def parsed(self) -> Parsed:
        return Parsed("\n".join(self._lines), tuple(self._marks))

    @property
    def empty(self) -> bool:
        """Whether nothing but headings' marks was written."""
        return not any(line.strip() for line in self._lines)

    def mark(self, kind: str, first: object, last: object = "") -> None:
        """What is written next comes from here. last: where that ends, if it has more than one number or cell."""
        self._marks.append(Mark(len(self._lines) + 1, kind, str(first), str(last) or str(first)))

    def heading(self, level: int, text: str) -> None:
        if title := " ".join(text.split()):
            self._block([f"{'#' * max(1, min(level, 6))} {title}"])

    def paragraph(self, text: str) -> None:
        """Prose; its line breaks stay."""
        body = _BLANK_LINES.sub("\n", _clean(text)).strip()
        if body:
            self._block(_MARKUP.sub(r"\1\\", body).split("\n"))

    def item(self, text: str, depth: int = 0) -> None:
        """One item of a list, below the one before it."""
        body = " ".join(_clean(text).split())
        if body:
            self._add([f"{'  ' * min(depth, 8)}- {body}"])

    def code(self, text: str, language: str = "") -> None:
        body = _clean(text).strip("\n")
        if body.strip():
            longest = max((len(run) for run in re.findall("`+", body)), default=0)
            fence = "`" * max(3, longest + 1)
            self._block([fence + language, *body.split("\n"), fence])

    def markdown(self, text: str) -> None:
        """Text that is Markdown already."""
        body = _clean(text).strip("\n")
        if body.strip():
            self._block(body.split("\n"))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        for number, row in enumerate(rows):
            self.row(row, header=number == 0)

    def row(self, cells: Sequence[str], header: bool) -> None:
        """One row of a table; its header comes first, and begins it."""
        line = "| " + " | ".join(" ".join(_clean(cell).replace("|", "\\|").split()) for cell in cells) + " |"
        if header:
            self._block([line, "|" + " --- |" * len(cells)])
        else:
            self._add([line])

    def _block(self, lines: Sequence[str]) -> None:
        """Lines with a blank one before them. A mark that was just set belongs to them."""
        if self._lines and self._lines[-1]:
            self._lines.append("")
            self._move_marks(len(self._lines))
        self._add(lines)

    def _add(self, lines: Sequence[str]) -> None:
        self._characters += sum(map(len, lines))
        if self._characters > MOST_CHARACTERS:
            raise TooMuchText
        self._lines += lines

    def _move_marks(self, line: int) -> None:
        while self._marks and self._marks[-1].line == line:
            last = self._marks.pop()
            self._marks.append(Mark(line + 1, last.kind, last.first, last.last))
            return


def _clean(text: str) -> str:
    """Without what no text holds: NUL, halves of characters, other line ends."""
    if text.isprintable():  # most are, and there are very many
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    for other in "\x0b\x0c\x85\u2028\u2029":
        text = text.replace(other, "\n")
    return text.encode("utf-8", "replace").decode("utf-8")
