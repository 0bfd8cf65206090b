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
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

NAMES = (".quireignore", ".gitignore")  # the first outranks the second
_MOST_BYTES = 1_000_000  # of a file of patterns; Git's own limit is larger, and nobody writes one


class Rules:
    """What is left out of one added folder. The files are read when first needed, and kept until `forget`."""

    def __init__(self, root: Path, include: str = "") -> None:
        """include: patterns with commas between them; a file must match one of them, unless there is none."""
        self._root = str(root)
        self._include = GitIgnoreSpec.from_lines(patterns(include)) if patterns(include) else None
        self._files: dict[str, list[_Line]] = {}

    def forget(self) -> None:
        """The files are read anew when next needed."""
        self._files = {}

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
                below = self._below(around, path) + slash
                for line in self._lines(os.path.join(around, name)):
                    if line.matches(below):
                        return line.ignores
        return False

    def _around(self, path: str) -> Iterator[str]:
        """The folders that hold it, the innermost first, up to the added one."""
        while path != self._root and (path := os.path.dirname(path)).startswith(self._root):
            yield path

    def _below(self, folder: str, path: str) -> str:
        return os.path.relpath(path, folder).replace(os.sep, "/")

    def _lines(self, file: str) -> "list[_Line]":
        """The last one first: it decides."""
        files = self._files
        if file not in files:
            files[file] = _understood(_read(file))[::-1]
        return files[file]


class _Line:
    """One pattern, asked as Git does: about a file or folder itself, after all folders around it. (GitIgnoreSpec asks
    about all of them at once, which differs where a later line brings a folder back.)"""

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is no pattern."""
        self._pattern = GitIgnoreSpecPattern(text)
        self._by_name = "/" not in text.strip().removesuffix("/")
        self.ignores = bool(self._pattern.include)

    def matches(self, path: str) -> bool:
        """path: below the folder of the file, with a slash behind folders."""
        asked = path[path.rfind("/", 0, -1) + 1 :] if self._by_name else path
        if self._pattern.include is None or not (found := self._pattern.match_file(asked)):
            return False
        # pathspec names the slash behind a folder that matched: here it must be the last one.
        return all(slash in (-1, len(asked)) for slash in map(found.match.end, found.match.groupdict()))


def patterns(include: str) -> list[str]:
    """The patterns of the setting `include`."""
    return [pattern for part in include.split(",") if (pattern := part.strip())]


def check(lines: Iterable[str]) -> None:
    """Raises ValueError for what is no pattern."""
    GitIgnoreSpec.from_lines(lines)


def _understood(lines: Iterable[str]) -> list[_Line]:
    understood = []
    for line in lines:
        with suppress(ValueError):
            understood.append(_Line(line))
    return understood


def _read(file: str) -> list[str]:
    """Of a regular file alone, and not through a link, which may lead out of the folder."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError), open(os.open(file, flags), "rb") as opened:
        if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            return opened.read(_MOST_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    return []
