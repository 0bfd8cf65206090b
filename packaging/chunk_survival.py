"""What edits do to the chunks of a folder: which share stays as it is, and how many have to be cached anew.

    python packaging/chunk_survival.py FOLDER... [--tokens 512] [--edits 5]

Edits every text file in memory, nothing on disk. Tokens are counted as four characters each.
"""

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from quire.chunking import split
from quire.documents import markup_of, read_file, walk
from quire.formats.base import Unreadable
from quire.outline import Markup

_LARGE = 10  # chunks: files where an edit should touch a small part
Edit = Callable[[list[str], random.Random], None]


def _insert_at_the_top(paragraphs: list[str], rng: random.Random) -> None:
    paragraphs.insert(0, _sentences(rng))


def _insert_in_the_middle(paragraphs: list[str], rng: random.Random) -> None:
    paragraphs.insert(rng.randrange(len(paragraphs)), _sentences(rng))


def _change_a_sentence(paragraphs: list[str], rng: random.Random) -> None:
    place = rng.randrange(len(paragraphs))
    body = paragraphs[place].rstrip("\n")
    sentences = re.split(r"(?<=[.!?]) ", body)
    sentences[rng.randrange(len(sentences))] = "This sentence says something else now."
    paragraphs[place] = " ".join(sentences) + paragraphs[place][len(body) :]


def _delete_a_section(paragraphs: list[str], rng: random.Random) -> None:
    starts = [i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("#")] or [0]
    chosen = rng.randrange(len(starts))
    stop = starts[chosen + 1] if chosen + 1 < len(starts) else starts[chosen] + 5
    del paragraphs[starts[chosen] : min(stop, starts[chosen] + 20)]


def _append(paragraphs: list[str], rng: random.Random) -> None:
    paragraphs.append("\n\n" + _sentences(rng))


def _sentences(rng: random.Random) -> str:
    words = (f"New words number {rng.randrange(10**6)} were put in here." for _ in range(rng.randrange(1, 8)))
    return " ".join(words) + "\n\n"


EDITS: dict[str, Edit] = {
    "insert a paragraph at the top": _insert_at_the_top,
    "insert one in the middle": _insert_in_the_middle,
    "change a sentence": _change_a_sentence,
    "delete a section": _delete_a_section,
    "append a paragraph": _append,
}


@dataclass
class Tally:
    """Of one kind of edit. shares: of the chunks that stayed, file by file."""

    kept: int = 0
    chunks: int = 0
    new: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, before: set[str], after: set[str]) -> None:
        self.kept += len(before & after)
        self.chunks += len(before)
        self.new.append(len(after - before))
        self.shares.append(len(before & after) / len(before))

    def line(self) -> str:
        if not self.chunks:
            return "- | - | - | -"
        mean = sum(self.new) / len(self.new)
        return f"{self.kept / self.chunks:.1%} | {min(self.shares):.0%} | {mean:.2f} | {max(self.new)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--edits", type=int, default=5)
    options = parser.parse_args()
    everything = {name: Tally() for name in EDITS}
    large = {name: Tally() for name in EDITS}
    sizes: list[int] = []
    for path in (file for folder in options.folders for file in walk(folder)):
        try:
            text = read_file(path, 1 << 30).data.decode()
        except (Unreadable, UnicodeDecodeError):
            continue
        before = _chunks(text, options.tokens, markup_of(path))
        sizes += before.values()
        for name, edit in EDITS.items():
            for number in range(options.edits):
                paragraphs = re.findall(r".+?(?:\n\n+|\Z)", text, re.DOTALL)
                edit(paragraphs, random.Random(f"{name}{number}{path.name}"))
                after = set(_chunks("".join(paragraphs), options.tokens, markup_of(path)))
                everything[name].add(set(before), after)
                if len(before) > _LARGE:
                    large[name].add(set(before), after)
    fill = sum(sizes) / len(sizes) / options.tokens
    print(f"{len(sizes)} chunks, {fill:.0%} full on average\n")
    columns = "kept | worst | new | most"
    print(f"| edit | all files: {columns} | files of more than {_LARGE} chunks: {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in EDITS:
        print(f"| {name} | {everything[name].line()} | {large[name].line()} |")


def _chunks(text: str, tokens: int, markup: Markup) -> dict[str, int]:
    return {p.chunk_id: p.tokens for p in split(text, lambda text: len(text) // 4, tokens, markup=markup)}


if __name__ == "__main__":
    main()
