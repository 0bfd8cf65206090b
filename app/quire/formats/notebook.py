"""Notebooks (ipynb): text, code and what the code printed, marked by cell. Pictures are left out."""

import json
from typing import Any

from quire.formats.base import Parsed, Unreadable, Writer

_MOST_OUTPUT = 4000  # characters of what one cell printed; the rest is seldom read


def parse(data: bytes) -> Parsed:
    try:
        notebook = json.loads(data)
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        about = notebook.get("metadata", {})
        language = str((about.get("language_info") or about.get("kernelspec") or {}).get("name", ""))
        language = "python" if language.startswith("python") else language
        writer = Writer()
        for number, cell in enumerate(cells, 1):
            writer.mark("cell", number)
            _cell(writer, cell, language if language.isalnum() else "")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Unreadable("damaged, or not a notebook", "Open it in Jupyter and save it anew.") from error
    if writer.empty:
        raise Unreadable("empty", "Nothing to do: it holds no text.")
    return writer.parsed()


def _cell(writer: Writer, cell: dict[str, Any], language: str) -> None:
    source = _joined(cell.get("source", cell.get("input", "")))
    if cell["cell_type"] != "code":
        writer.markdown(source)
        return
    writer.code(source, language)
    printed = "\n".join(_joined(_printed(output)).rstrip("\n") for output in cell.get("outputs", []))
    writer.code(printed if len(printed) <= _MOST_OUTPUT else f"{printed[:_MOST_OUTPUT]}\n...")


def _printed(output: dict[str, Any]) -> str | list[str]:
    if "text" in output:
        return output["text"]  # type: ignore[no-any-return]
    if "ename" in output:
        return f"{output['ename']}: {output.get('evalue', '')}"
    return output.get("data", {}).get("text/plain", "")  # type: ignore[no-any-return]


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
