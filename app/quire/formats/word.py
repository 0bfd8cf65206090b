"""Word documents (docx): headings by style, paragraphs, lists, tables; deleted text stays out.

Marked by paragraph, since pages exist only once a printer is known. Headers and footers of pages, footnotes
and comments are left out.
"""

import io
from collections.abc import Iterator
from typing import Any

import docx
from docx.oxml.ns import qn

from quire.formats.archive import Archive, damaged
from quire.formats.base import Parsed, Unreadable, Writer

_TEXT, _TAB = qn("w:t"), qn("w:tab")
_BREAKS = {qn("w:br"), qn("w:cr")}
_PARAGRAPH, _TABLE, _ROW, _CELL = qn("w:p"), qn("w:tbl"), qn("w:tr"), qn("w:tc")
_INSIDE = {qn("w:sdt"), qn("w:sdtContent"), qn("w:customXml"), qn("w:smartTag"), qn("w:ins"), qn("w:moveTo")}
_OLD = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # the same again for old programs
_GONE = {_OLD, qn("w:del"), qn("w:moveFrom"), qn("w:pPr")}


def parse(data: bytes) -> Parsed:
    Archive(data).require("word/document.xml", "a Word document")
    try:
        document = docx.Document(io.BytesIO(data))
        styles = {style.style_id: style.name or "" for style in document.styles}
        body = document.element.body
    except (KeyError, ValueError, AttributeError, TypeError, SyntaxError) as error:
        raise damaged() from error
    writer = Writer()
    for number, block in enumerate(_blocks(body), 1):
        writer.mark("paragraph", number)
        if block.tag == _TABLE:
            writer.table([[_text(cell) for cell in row.iter(_CELL)] for row in block.iter(_ROW)])
        else:
            _paragraph(writer, block, styles)
    if writer.empty:
        raise Unreadable("no text", "If it holds pictures of text, run OCR over them.")
    return writer.parsed()


def _blocks(parent: Any) -> Iterator[Any]:
    """Paragraphs and tables in order, those inside of content controls too."""
    pending = [iter(parent)]
    while pending:
        for element in pending[-1]:
            if element.tag in (_PARAGRAPH, _TABLE):
                yield element
            elif element.tag in _INSIDE:
                pending.append(iter(element))
                break
        else:
            pending.pop()


def _paragraph(writer: Writer, element: Any, styles: dict[str, str]) -> None:
    text = _text(element)
    properties = element.find(qn("w:pPr"))
    style = properties.find(qn("w:pStyle")) if properties is not None else None
    name = styles.get(style.get(qn("w:val"), ""), "").casefold() if style is not None else ""
    if name == "title":
        writer.heading(1, text)
    elif name.startswith("heading") and name[-1:].isdigit():
        writer.heading(int(name[-1]), text)
    elif "list" in name or (properties is not None and properties.find(qn("w:numPr")) is not None):
        writer.item(text)
    else:
        writer.paragraph(text)


def _text(element: Any) -> str:
    """All text below an element that is still there."""
    parts: list[str] = []
    pending = [element]
    while pending:
        node = pending.pop()
        if node.tag == _TEXT:
            parts.append(node.text or "")
        elif node.tag == _TAB:
            parts.append("\t")
        elif node.tag in _BREAKS:
            parts.append("\n")
        elif node.tag not in _GONE:
            if node.tag == _PARAGRAPH and parts:
                parts.append("\n")
            pending.extend(reversed(node))
    return "".join(parts).strip()
