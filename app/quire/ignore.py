"""Which files of an added folder are left out: by .gitignore and .quireignore in it, and by the patterns to include.

Both files are written alike and count in every folder, for what lies below it; what .quireignore says outranks what
.gitignore says, so that `!drafts/` brings back what Git leaves out. Files above the added folder do not count. The
folder need not be a Git repository. A line that cannot be understood is passed over, as Git does.

Knows names and patterns; knows nothing of what files hold, nor who asks.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from pathspec import GitIgnoreSpec

NAMES = (".quireignore", ".gitignore")  # the first outranks the second
_MOST_BYTES = 1_000_000  # of a file of patterns; Git's own limit is larger, and nobody writes one


class Rules:
    """What is left out of one added folder. The files are read when first needed, and kept until `forget`."""

    def __init__(self, root: Path, include: str = "") -> None:
        """include: patterns with commas between them; a file must match one of them, unless there is none."""
        self._root = str(root)
        self._include = _spec(patterns(include))
        self._specs: dict[str, GitIgnoreSpec | None] = {}

    def forget(self) -> None:
        """The files are read anew when next needed."""
        self._specs = {}

    def keeps(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file or folder is used, given that the folder around it is."""
        folder = entry.is_dir(follow_symlinks=False)
        included = folder or not self._include or self._include.match_file(self._below(self._root, entry.path))
        return included and not self._ignored(entry.path, folder)

    def leaves_out(self, path: Path) -> bool:
        """Whether the ignore files leave out what lies there, or a folder around it. The path need not exist."""
        around = [str(folder) for folder in path.parents if folder.is_relative_to(self._root)]
        return any(self._ignored(folder, True) for folder in around[-2::-1]) or self._ignored(str(path), False)

    def _ignored(self, path: str, folder: bool) -> bool:
        if path == self._root:
            return False
        slash = "/" if folder else ""
        for name in NAMES:
            for around in self._around(path):
                if spec := self._read(os.path.join(around, name)):
                    verdict = spec.check_file(self._below(around, path) + slash).include
                    if verdict is not None:
                        return verdict
        return False

    def _around(self, path: str) -> Iterator[str]:
        """The folders that hold it, the innermost first, up to the added one."""
        while path != self._root and (path := os.path.dirname(path)).startswith(self._root):
            yield path

    def _below(self, folder: str, path: str) -> str:
        return os.path.relpath(path, folder).replace(os.sep, "/")

    def _read(self, file: str) -> GitIgnoreSpec | None:
        specs = self._specs
        if file not in specs:
            specs[file] = _spec(_lines(file))
        return specs[file]


def patterns(include: str) -> list[str]:
    """The patterns of the setting `include`."""
    return [pattern for part in include.split(",") if (pattern := part.strip())]


def check(lines: Iterable[str]) -> None:
    """Raises ValueError for what is no pattern."""
    GitIgnoreSpec.from_lines(lines)


def _spec(lines: list[str]) -> GitIgnoreSpec | None:
    understood = []
    for line in lines:
        with suppress(ValueError):
            check([line])
            understood.append(line)
    return GitIgnoreSpec.from_lines(understood) if understood else None


def _lines(file: str) -> list[str]:
    """Of a regular file alone, and not through a link, which may lead out of the folder."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError), open(os.open(file, flags), "rb") as opened:
        if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            return opened.read(_MOST_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    return []
