"""Presentations (pptx): each slide with its title, texts, tables and notes, marked by slide."""

import io
from collections.abc import Iterator
from typing import Any

import pptx
from pptx.exc import PythonPptxError
from pptx.util import Length

from quire.formats.archive import Archive, damaged
from quire.formats.base import Parsed, Unreadable, Writer

_MOST_DEPTH = 20  # of groups in groups


def parse(data: bytes) -> Parsed:
    Archive(data).require("ppt/presentation.xml", "a presentation")
    writer = Writer()
    found = False
    try:
        for number, slide in enumerate(pptx.Presentation(io.BytesIO(data)).slides, 1):
            writer.mark("slide", number)
            found = _slide(writer, number, slide) or found
    except (KeyError, ValueError, AttributeError, TypeError, SyntaxError, PythonPptxError) as error:
        raise damaged() from error
    if not found:
        raise Unreadable("no text; its slides are pictures", "Run OCR over it, or add notes to the slides.")
    return writer.parsed()


def _slide(writer: Writer, number: int, slide: Any) -> bool:
    """Writes a slide; whether it says anything."""
    title = slide.shapes.title
    heading = title.text_frame.text.strip() if title is not None else ""
    notes = slide.notes_slide.notes_text_frame if slide.has_notes_slide else None
    spoken = notes.text.strip() if notes is not None else ""
    shapes = [shape for shape in _shapes(slide.shapes, 0) if title is None or shape.shape_id != title.shape_id]
    if not (heading or spoken or shapes):
        return False
    writer.heading(2, heading or f"Slide {number}")
    for shape in sorted(shapes, key=_position):
        if shape.has_table if hasattr(shape, "has_table") else False:
            writer.table([[cell.text for cell in row.cells] for row in shape.table.rows])
        else:
            for paragraph in shape.text_frame.paragraphs:
                text = "".join(run.text for run in paragraph.runs) or paragraph.text
                writer.item(text, paragraph.level) if paragraph.level else writer.paragraph(text)
    if spoken:
        writer.paragraph(f"Notes: {spoken}")
    return True


def _shapes(shapes: Any, depth: int) -> Iterator[Any]:
    """Those that hold text, the ones in groups too."""
    for shape in shapes:
        if hasattr(shape, "shapes"):
            if depth < _MOST_DEPTH:
                yield from _shapes(shape.shapes, depth + 1)
        elif getattr(shape, "has_table", False) or (shape.has_text_frame and shape.text_frame.text.strip()):
            yield shape


def _position(shape: Any) -> tuple[Length, Length]:
    """From the top down, then from the left."""
    return shape.top or Length(0), shape.left or Length(0)
