"""Spreadsheets (xlsx): each sheet as a table, marked by cells. Values as they were last computed, not formulas."""

import datetime
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any
from zipfile import BadZipFile

import openpyxl
from openpyxl.utils import get_column_letter
from openpyxl.utils.exceptions import InvalidFileException

from quire.formats.archive import Archive, damaged
from quire.formats.base import Parsed, Unreadable, Writer

_WIDE_CELLS = 50


def parse(data: bytes) -> Parsed:
    Archive(data).require("xl/workbook.xml", "a spreadsheet")
    writer = Writer()
    found = False
    try:
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
        for sheet in book.worksheets:
            found = _sheet(writer, sheet) or found
    except Unreadable:
        raise
    except (
        KeyError, ValueError, AttributeError, TypeError, IndexError, SyntaxError, BadZipFile, InvalidFileException,
        zlib.error,
    ) as error:  # fmt: skip
        raise damaged() from error
    if not found:
        raise Unreadable("no cell holds a value", "If it holds formulas only, open and save it once in a spreadsheet.")
    return writer.parsed()


def _sheet(writer: Writer, sheet: Any) -> bool:
    """Writes a sheet; whether it holds anything."""
    sheet.reset_dimensions()  # what a file says of its size may be wrong
    width = 0  # of the widest row so far
    for number, cells in _rows(sheet):
        first = width == 0
        width = max(width, len(cells))
        writer.mark(f"{sheet.title}!", f"A{number}", f"{get_column_letter(width)}{number}")
        if first:
            writer.heading(1, sheet.title)
        writer.row(cells, header=first)
    return width > 0


def _rows(sheet: Any) -> Iterator[tuple[int, Sequence[str]]]:
    """The rows that hold anything, with their numbers; empty cells at their ends left out, all of them where a row is
    wide and holds little."""
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        cells = [_said(value) for value in values]
        while cells and not cells[-1]:
            cells.pop()
        filled = [cell for cell in cells if cell]
        if filled:
            sparse = len(cells) > _WIDE_CELLS and 4 * len(filled) < len(cells)
            yield number, filled if sparse else cells


def _said(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ").removesuffix(" 00:00:00")
    return str(value)
