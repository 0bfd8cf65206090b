"""HTML into Markdown: headings, paragraphs, lists, code and tables; with the lines of the source where they stand.

Left out: scripts and styles, navigation, and everything around the main part where the page names one. Nothing that
a page refers to is fetched.
"""

import codecs
import re
from typing import Any

from selectolax.lexbor import LexborHTMLParser

from quire.formats.base import Parsed, Unreadable, Writer

_DROPPED = frozenset(
    """
    script style template noscript nav svg math iframe object embed head select button input
    """.split()  # noqa: SIM905
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = frozenset(
    """
    address article aside blockquote body caption dd details div dl dt fieldset figcaption figure footer form header
     hr html li main ol p pre section summary table tbody td tfoot th thead title tr ul
    """.split()  # noqa: SIM905
) | frozenset(_HEADINGS)
_CHARSET = re.compile(rb"""<(?:meta[^>]+charset|\?xml[^>]+encoding)\s*=\s*["']?\s*([a-zA-Z0-9_.:-]+)""")
_SNIFFED_BYTES = 4096
_SNIPPET = 24  # how much of a text is looked for in the source
_WINDOW = 200_000  # how far ahead


def parse(data: bytes) -> Parsed:
    writer = Writer()
    write(writer, decoded(data), lines=True)
    if writer.empty:
        raise Unreadable("no text", "Pages made by scripts hold none; save the page as the browser shows it.")
    return writer.parsed()


def decoded(data: bytes) -> str:
    """The text by its byte order mark, by what it declares, as UTF-8, or else as Windows-1252, as browsers do."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(name, "replace")
    declared = _CHARSET.search(data[:_SNIFFED_BYTES])
    names = [declared[1].decode("ascii")] if declared else []
    for name in [*names, "utf-8"]:
        try:
            return data.decode(name)
        except (LookupError, UnicodeError):
            continue
    return data.decode("cp1252", "replace")


def write(writer: Writer, html: str, lines: bool = False) -> None:
    """Writes a page. lines: with marks of the lines in its source."""
    html = html.replace("\r\n", "\n").replace("\r", "\n")
    tree = LexborHTMLParser(html)
    title = tree.css_first("title")
    if title is not None and tree.css_first("h1") is None:
        writer.heading(1, title.text() or "")
    root = tree.css_first("main") or tree.css_first("[role=main]") or tree.body
    if root is not None:
        _Page(writer, root, html if lines else "").walk()


class _Page:
    """One page on its way from tree to text."""

    def __init__(self, writer: Writer, root: Any, source: str) -> None:
        self._root = root
        self._writer = writer
        self._source = source
        self._at = max(0, source.find(f"<{root.tag}"))  # how far the source was followed
        self._line = 1 + source.count("\n", 0, self._at)
        self._text: list[str] = []
        self._depth = 0  # of lists
        self._item = False
        self._code = 0
        self._rows: list[list[str]] | None = None  # of the table that is being read

    def walk(self) -> None:
        """All nodes in order, each entered and left; without recursion, since a page may nest as it likes."""
        node = self._root
        while True:
            inside = self._enter(node)
            child = node.child if inside else None
            if child is not None:
                node = child
                continue
            while True:
                if inside:
                    self._leave(node)
                inside = True
                if node.mem_id == self._root.mem_id:
                    return
                if node.next is not None:
                    node = node.next
                    break
                node = node.parent

    def _enter(self, node: Any) -> bool:
        """Whether to look inside."""
        tag = node.tag
        if tag == "-text":
            self._read(node.text_content or "")
            return True
        if tag in _DROPPED or tag.startswith(("-", "_", "!")):
            return False
        if tag == "br":
            self._text.append("\n")
        elif self._rows is not None:
            if tag == "tr":
                self._rows.append([])
        elif tag == "table" and _is_data(node):
            self._flush()
            self._rows = []
        elif tag in _BLOCKS:
            self._flush()
            self._depth += tag in ("ul", "ol")
            self._item = self._item if tag == "p" else tag == "li"
            self._code += tag == "pre"
        return True

    def _leave(self, node: Any) -> None:
        tag = node.tag
        if self._rows is not None:
            if tag in ("td", "th") and self._rows:
                self._rows[-1].append(self._take())
            elif tag == "table":
                self._writer.table([row for row in self._rows if any(row)])
                self._rows, self._text = None, []
        elif tag in _HEADINGS:
            self._writer.heading(_HEADINGS[tag], self._take())
        elif tag in _BLOCKS:
            self._flush()
            self._depth -= tag in ("ul", "ol")
            self._code -= tag == "pre"

    def _read(self, text: str) -> None:
        if self._code:
            self._follow(text)
            self._text.append(text)
        elif text.strip():
            self._follow(text)
            spaced = re.sub(r"[ \t\n\f]+", " ", text)
            self._text.append(spaced)
        elif self._text:
            self._text.append(" ")

    def _follow(self, text: str) -> None:
        """Where this text stands in the source, as far as it stands there as it is."""
        if self._source and not "".join(self._text).strip():
            found = self._source.find(">" + text[:_SNIPPET], self._at, self._at + _WINDOW)
            if found >= 0:
                found += 1 + len(text) - len(text.lstrip())
                self._line += self._source.count("\n", self._at, found)
                self._at = found
            self._writer.mark("line", self._line)

    def _take(self) -> str:
        text, self._text = "".join(self._text), []
        return "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()

    def _flush(self) -> None:
        if self._code:
            text, self._text = "".join(self._text), []
            self._writer.code(text)
        elif self._item:
            self._writer.item(self._take(), max(0, self._depth - 1))
        else:
            self._writer.paragraph(self._take())


def _is_data(table: Any) -> bool:
    """Whether a table holds data. Many only arrange a page, above all in mail."""
    if any(part.css_first("table, h1, h2, h3, ul, ol, pre, p + p") is not None for part in table.iter()):
        return False
    return any(len(row.css("td, th")) > 1 for row in table.css("tr"))
