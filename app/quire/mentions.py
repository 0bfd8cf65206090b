"""`@name` in a question: the documents and folders it may name, what fits some letters, and the question without it.

A name is a path as far up as it takes to be told apart: `@tea.md`, `@notes/tea.md`, `@notes/`, quoted where it has
spaces: `@"my notes/tea.md"`. An @ that names nothing is text as any other. Pure functions over paths; knows nothing of
the index, of search or of screens.
"""

import heapq
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.terminal import printable

_BEFORE = r"(?<![^\s(\[{\"'])"  # an @ within a word is part of an address
_MENTION = re.compile(_BEFORE + r'@(?:"((?:[^"\\\n]|\\.)*)"|([^\s"]+))')
_UNFINISHED = re.compile(_BEFORE + r'@(?:"((?:[^"\\\n]|\\.)*)|([^\s"]*))$')
_AFTER = ".,;:!?)]}'"  # what may follow a name without belonging to it
_MOST_AFTER = 4
_NOWHERE = 3
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Place:
    """A document or folder. name: from the added folder down, a folder's ends with a slash."""

    path: Path
    name: str


@dataclass(frozen=True)
class Mentions:
    """A question as the model gets it, and the places it is limited to: none when it names none."""

    question: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Unfinished:
    """A mention that is being typed. start: where its @ stands."""

    start: int
    letters: str


class Places:
    """All that can be named."""

    def __init__(self, documents: Iterable[Path], roots: Sequence[Path]) -> None:
        """documents: below the roots; a root is a folder, or a document itself."""
        found: dict[Path, str] = {}
        for path in documents:
            root = next((root for root in roots if path.is_relative_to(root)), path)
            found[path] = _shown(path, root)
            for folder in path.parents:
                if folder in found or not folder.is_relative_to(root):
                    break
                found[folder] = _shown(folder, root) + "/"
        self._all = [(name.casefold(), Place(path, name)) for path, name in found.items()]
        ends: defaultdict[str, list[tuple[str, Place]]] = defaultdict(list)
        for folded, place in self._all:
            ends[_last(folded)].append((folded, place))
        self._by_last: Mapping[str, list[tuple[str, Place]]] = ends

    def named(self, name: str) -> tuple[Path, ...]:
        """The places with this name, which may leave out the beginning of the path and the last slash."""
        if name.startswith(("/", "~")):
            path = Path(os.path.expanduser(name))
            return tuple(place.path for _, place in self._by_last.get(_last(name.casefold()), ()) if place.path == path)
        folded = name.casefold()
        fitting = (folded, folded + "/")
        return tuple(
            place.path
            for full, place in self._by_last.get(_last(folded), ())
            if full in fitting or full.endswith(tuple("/" + end for end in fitting))
        )

    def fitting(self, letters: str, limit: int) -> list[Place]:
        """The places whose names hold the letters, best first: where the last part or any begins, then within it."""
        folded = letters.casefold()
        ranked = ((_rank(name, folded), len(name), name, place) for name, place in self._all if folded in name)
        fitting = (entry for entry in ranked if entry[0] < _NOWHERE)
        return [place for *_, place in heapq.nsmallest(limit, fitting, key=lambda entry: entry[:3])]

    def mention(self, place: Place) -> str:
        """What names this place alone, as short as possible."""
        parts = place.name.rstrip("/").split("/")
        slash = "/" if place.name.endswith("/") else ""
        ends = ("/".join(parts[start:]) + slash for start in range(len(parts) - 1, -1, -1))
        name = next((end for end in ends if self.named(end) == (place.path,)), printable(str(place.path)))
        if re.search(r'[\s"]', name) or name[-1] in _AFTER:
            return '@"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
        return "@" + name

    def read(self, text: str) -> Mentions:
        """The question without the markup, and the places it names."""
        parts: list[str] = []
        paths: list[Path] = []
        position = 0
        for match in _MENTION.finditer(text):
            name, end = self._name(match)
            named = self.named(name)
            if named:
                parts += [text[position : match.start()], name]
                paths += named
                position = end
        return Mentions("".join([*parts, text[position:]]), tuple(dict.fromkeys(paths)))

    def _name(self, match: re.Match[str]) -> tuple[str, int]:
        """The name, and where it ends: what follows it belongs to the sentence unless there is a name that has it."""
        if match[1] is not None:
            return _ESCAPED.sub(r"\1", match[1]), match.end()
        for length in range(len(match[2]), max(0, len(match[2]) - _MOST_AFTER - 1), -1):
            name = match[2][:length]
            if self.named(name):
                return name, match.start(2) + length
            if name[-1] not in _AFTER:
                break
        return match[2], match.end()


def unfinished(before: str) -> Unfinished | None:
    """The mention at the end of a line that ends at the cursor, if there is one."""
    match = _UNFINISHED.search(before)
    return match and Unfinished(match.start(), match[2] if match[1] is None else _ESCAPED.sub(r"\1", match[1]))


def _shown(path: Path, root: Path) -> str:
    return printable(str(path.relative_to(root.parent))).replace("\n", " ")


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _rank(name: str, letters: str) -> int:
    if _last(name).startswith(letters):
        return 0
    if name.startswith(letters) or "/" + letters in name:
        return 1
    return 2 if letters in _last(name) else _NOWHERE
