"""`quire search`: the passages that a question would be answered from, without a model.

Knows how they are asked for and printed; finding is `quire.retrieval`'s.
"""

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quire.commands.common import json_option, place_of, session_by
from quire.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.library import Hit
    from quire.retrieval import Findings

_SNIPPET_CHARACTERS = 150


@click.command()
@click.argument("query")
@click.option("--in", "within", type=click.Path(path_type=Path), help="Only documents in this folder or file.")
@click.option("-n", "limit", type=click.IntRange(1, 1000), default=10, show_default=True, help="At most so many.")
@json_option
def search(query: str, within: Path | None, limit: int, as_json: bool) -> None:
    """Find passages, best first. Words, headings and file names count, and meaning where `embedder` is set.

    With --json: hits and repeats (nearly the same again), each with path, start_line, end_line, place (in a file
    without lines: a page, a slide), score, heading and text; search_ms; by (how they were found).
    """
    from quire import render

    with session_by() as session:
        began = time.perf_counter()
        findings = session.look(query, place_of(within), limit)
        took_ms, by = 1000 * (time.perf_counter() - began), session.finds_by
    if as_json:
        click.echo(json.dumps({**_as_json(findings, took_ms), "by": by}, indent=2))
    else:
        for line in _lines(findings, query, f"{render.duration(took_ms)}, {by}"):
            click.echo(line)


def _lines(findings: "Findings", query: str, told: str) -> list[str]:
    from quire import render
    from quire.word_search import words_of

    if not findings.hits:
        return ["Nothing was found. See what was read: quire status"]
    words, lines = words_of(query), list[str]()
    for number, hit in enumerate(findings.hits, 1):
        lines += [f"{number:>2}. {render.source(hit)}", f"    {snippet(hit.text, words)}"]
    if findings.repeats:
        lines.append("Nearly the same stands in " + ", ".join(map(render.source, findings.repeats)))
    passages = "1 passage" if len(findings.hits) == 1 else f"{len(findings.hits)} passages"
    return [*lines, f"{passages} in {told}"]


def _as_json(findings: "Findings", took_ms: float) -> dict[str, object]:
    from quire import render

    def with_text(hits: "Sequence[Hit]") -> list[render.Json]:
        told = zip(render.sources_json(hits), hits, strict=True)
        return [{**source, "heading": hit.heading, "text": hit.text} for source, hit in told]

    return {
        "hits": with_text(findings.hits),
        "repeats": with_text(findings.repeats),
        "search_ms": round(took_ms, 3),
    }


def snippet(text: str, words: "Sequence[str]") -> str:
    """One line of the text, from shortly before the first of the words on."""
    line = " ".join(printable(text).split())
    found = re.search("|".join(rf"\b{re.escape(word)}" for word in words), line, re.IGNORECASE) if words else None
    start = max(0, (found.start() if found else 0) - _SNIPPET_CHARACTERS // 3)
    start = 0 if start + _SNIPPET_CHARACTERS >= len(line) > 0 and len(line) <= _SNIPPET_CHARACTERS else start
    start = line.rfind(" ", 0, start) + 1 if start else 0
    cut = line[start : start + _SNIPPET_CHARACTERS]
    return ("… " if start else "") + cut + (" …" if start + _SNIPPET_CHARACTERS < len(line) else "")
