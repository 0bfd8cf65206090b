"""PDF by its text layer, page by page: paragraphs from the gaps between lines, headings from larger type.

What stands at the edge of many pages (running titles, page numbers) is kept once. Knows nothing of pictures: a page
without text is one that was scanned.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import pypdfium2
from pypdfium2.raw import FPDFText_GetFontSize

from quire.formats.base import Parsed, Unreadable, Writer

_OCR = "Run OCR over it, for example: ocrmypdf in.pdf out.pdf"
_EDGE_LINES = 2  # at either end of a page, where running titles stand
_REPEATED_SHARE = 1 / 3  # of the pages: left and right ones may differ
_REPEATED_PAGES = 3
_GAP = 1.45  # of the usual distance between lines: a paragraph begins
_LARGER = 1.15  # than the usual size: a heading
_HEADING_CHARACTERS = 120
_HYPHEN = re.compile(r"[\ufffe\x02]")  # how PDFium says that a word goes on in the next line
_LEADERS = re.compile(r"(?: ?\.){5,} ?")  # of a table of contents
_NUMBER = re.compile(r"^\d{1,5}\b|\b\d{1,5}(?=(?: ?(?:of|/|von|de|sur) ?\d+)?$)")


class _Line(NamedTuple):
    """top: where the line stands, from the lower edge.  size: of its type; both 0 if unknown."""

    text: str
    top: float
    size: float


def parse(data: bytes) -> Parsed:
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        # PDFium remembers its last error beyond the file that caused it.
        if "password" in str(error).lower() and b"/Encrypt" in data:
            raise Unreadable("encrypted: it needs a password", "Save it without a password.") from error
        raise Unreadable("damaged, or not a PDF", "Print it to a new PDF from a viewer.") from error
    pages = [_lines(document, number) for number in range(len(document))]
    if not any(pages):
        raise Unreadable("no text; it looks scanned", _OCR)
    return _written(_without_repeats(pages))


def _lines(document: Any, number: int) -> list[_Line]:
    """The lines of a page that are not blank; none where it cannot be read."""
    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return []
    text_page = page.get_textpage()
    lines, start = [], 0
    for line in text_page.get_text_range().split("\n"):
        text = line.rstrip("\r")
        if text.strip():
            inked = start + len(text) - len(text.lstrip())
            lines.append(_Line(_LEADERS.sub(" ... ", text.strip()), *_look(text_page, inked)))
        start += len(line) + 1
    text_page.close()
    page.close()
    return lines


def _look(text_page: Any, character: int) -> tuple[float, float]:
    try:
        bottom = text_page.get_charbox(character, loose=True)[1]
    except (pypdfium2.PdfiumError, ValueError, IndexError):
        return 0.0, 0.0
    return bottom, float(FPDFText_GetFontSize(text_page.raw, character))


def _without_repeats(pages: Sequence[Sequence[_Line]]) -> list[list[_Line]]:
    """Running titles stay on the first page that has them, lone page numbers on none."""
    seen: dict[str, set[int]] = defaultdict(set)
    for number, lines in enumerate(pages):
        for i in _edges(lines):
            seen[_shape(lines[i].text, number)].add(number)
    least = max(_REPEATED_PAGES, _REPEATED_SHARE * len(pages))
    repeated = {s for s, where in seen.items() if len(where) >= (least if _says(s) else _REPEATED_PAGES)}

    def stays(number: int, lines: Sequence[_Line], i: int) -> bool:
        shape = _shape(lines[i].text, number)
        if i not in _edges(lines) or shape not in repeated:
            return True
        return _says(shape) and number == min(seen[shape])

    return [[line for i, line in enumerate(lines) if stays(n, lines, i)] for n, lines in enumerate(pages)]


def _says(shape: str) -> bool:
    return any(character.isalpha() for character in shape)


def _edges(lines: Sequence[_Line]) -> set[int]:
    return {i for i in range(len(lines)) if i < _EDGE_LINES or i >= len(lines) - _EDGE_LINES}


def _shape(text: str, page: int) -> str:
    """A line with the page's number in it, at its beginning or end, taken for the same on every page."""
    return _NUMBER.sub(lambda match: f"#{int(match[0]) - page}", " ".join(text.split()).casefold())


def _written(pages: Sequence[Sequence[_Line]]) -> Parsed:
    sizes: Counter[float] = Counter()
    for lines in pages:
        for line in lines:
            sizes[round(line.size, 1)] += len(line.text)
    usual = sizes.most_common(1)[0][0] if sizes else 0.0
    larger = sorted({s for s in sizes if usual and s > usual * _LARGER}, reverse=True)
    writer = Writer()
    for number, lines in enumerate(pages, 1):
        writer.mark("page", number)
        for block in _blocks(lines):
            size = round(block[0].size, 1)
            if size in larger and sum(len(line.text) for line in block) <= _HEADING_CHARACTERS:
                writer.heading(min(6, larger.index(size) + 1), _joined(block).replace("\n", " "))
            else:
                writer.paragraph(_joined(block))
    return writer.parsed()


def _blocks(lines: Sequence[_Line]) -> list[list[_Line]]:
    """The lines of a page as paragraphs: a new one begins after a wider gap, and where the type changes to or from a
    heading's size."""
    steps = [a.top - b.top for a, b in pairwise(lines) if a.top > b.top]
    usual = median(steps) if steps else 0.0
    blocks: list[list[_Line]] = []
    for i, line in enumerate(lines):
        before = lines[i - 1]
        step = before.top - line.top
        apart = usual and (step > usual * _GAP or step < -usual)  # a negative step begins the next column
        resized = max(before.size, line.size) > min(before.size, line.size) * _LARGER
        if i == 0 or apart or resized:
            blocks.append([])
        blocks[-1].append(line)
    return blocks


def _joined(lines: Sequence[_Line]) -> str:
    """The text of a paragraph, with words that were divided at a line's end whole again."""
    text = ""
    for line in lines:
        text += line.text if not text or text.endswith("\ufffe") else f"\n{line.text}"
        text = _HYPHEN.sub("\ufffe", text) if text[-1] in "\ufffe\x02" else text
    return _HYPHEN.sub("", text)
