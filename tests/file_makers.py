"""Makes documents of every format for the tests: honest ones, and ones that were made to do harm."""

import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import docx
import openpyxl
import pptx

Parts = Mapping[str, str | bytes]
W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def zipped(parts: Parts) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pdf(pages: Sequence[Iterable[tuple[float, float, str]]], extra: str = "", trailer: str = "") -> bytes:
    """Pages of lines: (distance from the lower edge, size, text)."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for i, lines in enumerate(pages):
        shown = "".join(f"/F1 {size} Tf 1 0 0 1 72 {y} Tm ({_escaped(text)}) Tj\n" for y, size, text in lines)
        stream = f"BT\n{shown}ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects += [extra] if extra else []
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
    end += f"<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + end.encode("latin-1")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def prose_pages(count: int) -> bytes:
    """Pages with a running title, a page number, a heading and two paragraphs."""
    pages = []
    for n in range(1, count + 1):
        lines = [(750.0, 9.0, "The Grey Point Report"), (700.0, 18.0, f"Part {n} of the harbour")]
        lines += [(670.0 - 14 * i, 11.0, f"First paragraph {n}, line {i}.") for i in range(3)]
        lines += [(590.0 - 14 * i, 11.0, f"Second paragraph {n}, line {i}.") for i in range(3)]
        pages.append([*lines, (40.0, 9.0, str(n))])
    return pdf(pages)


def encrypted_pdf() -> bytes:
    """Standard security, 40 bits; no password opens it."""
    junk = "".join(f"{(37 * i + 11) % 256:02x}" for i in range(32))
    extra = f"<< /Filter /Standard /V 1 /R 2 /O <{junk}> /U <{junk}> /P -44 >>"
    return pdf([[(700, 11, "secret")]], extra, "/Encrypt 6 0 R /ID [<00112233> <00112233>]")


def word(paragraphs: Sequence[tuple[str, str]], table: Sequence[Sequence[str]] = ()) -> bytes:
    """Paragraphs with their styles, and a table at the end."""
    document = docx.Document()
    for style, text in paragraphs:
        document.add_paragraph(text, style=style)
    if table:
        grid = document.add_table(len(table), len(table[0]))
        for row, cells in zip(grid.rows, table, strict=True):
            for cell, text in zip(row.cells, cells, strict=True):
                cell.text = text
    return _saved(document)


def word_of(body: str, prolog: str = "") -> bytes:
    """A Word file with this XML in its body."""
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?>{prolog}<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>'
    )
    return zipped({**unzipped(_saved(docx.Document())), "word/document.xml": xml})


def slides(titles: Sequence[tuple[str, str, str]]) -> bytes:
    """Title, text and notes of each."""
    show = pptx.Presentation()
    for title, text, notes in titles:
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    return _saved(show)


def sheets(tables: Mapping[str, Sequence[Sequence[object]]]) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in tables.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(list(row))
    return _saved(book)


def _saved(document: object) -> bytes:
    buffer = io.BytesIO()
    document.save(buffer)  # type: ignore[attr-defined]
    return buffer.getvalue()


def book(chapters: Sequence[str], parts: Parts | None = None) -> bytes:
    """An EPUB of these XHTML bodies, and whatever else is given."""
    items = "".join(f'<item id="c{i}" href="text/c{i}.xhtml" media-type="x"/>' for i in range(len(chapters)))
    order = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    pages = {
        f"OEBPS/text/c{i}.xhtml": f"<!DOCTYPE html><html><head><title>t</title></head><body>{c}</body></html>"
        for i, c in enumerate(chapters)
    }
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container><rootfile full-path="OEBPS/p.opf"/></container>',
            "OEBPS/p.opf": f"<package><manifest>{items}</manifest><spine>{order}</spine></package>",
            **pages,
            **(parts or {}),
        }
    )


def notebook(cells: Sequence[Mapping[str, object]]) -> bytes:
    return json.dumps({"cells": list(cells), "metadata": {"language_info": {"name": "python"}}, "nbformat": 4}).encode()


def laughs(depth: int = 12) -> str:
    """A document type whose last entity is a billion laughs."""
    lines = [f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "lol"}">' for i in range(depth)]
    return f"<!DOCTYPE w:document [{''.join(lines)}]>"


def lying_zip(name: str, claimed: int, real: int) -> bytes:
    """A zip whose part says that it unpacks to `claimed` bytes and unpacks to `real`."""
    data = zipped({name: b"0" * real})
    size = struct.pack("<L", real)
    return data.replace(size, struct.pack("<L", claimed))
