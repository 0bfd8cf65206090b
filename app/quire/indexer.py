"""Keeps the index in step with the folders.

Knows the order of the work: walk, compare, read, cut, store. Does not know how a file is read or cut, how the index
is stored, which model runs, or what becomes of the passages.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quire import chunking
from quire.chunking import Passage
from quire.config import Settings
from quire.documents import Document, Unreadable, markup_of, read_document, walk, walk_below
from quire.library import Library, StoredDocument

ChangeKind = Literal["added", "changed", "cut anew", "moved", "removed"]


@dataclass(frozen=True)
class Change:
    """One file that differed from the index. chunks_new: those that the index did not have; new: their ids, and
    tokens_new their tokens."""

    path: Path
    kind: ChangeKind
    chunks_new: int = 0
    chunks_total: int = 0
    tokens_new: int = 0
    new: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read, why, and what would help. lost: it could be read before."""

    path: Path
    reason: str
    remedy: str
    lost: bool = False


@dataclass(frozen=True)
class IndexProgress:
    """After each file. total: files found."""

    done: int
    total: int
    path: Path


@dataclass(frozen=True)
class IndexReport:
    """What one pass over the folders found. unchanged: files."""

    changes: tuple[Change, ...]
    skipped: tuple[Skipped, ...]
    unchanged: int

    def count(self, kind: ChangeKind) -> int:
        """How many files were changed in this way."""
        return sum(change.kind == kind for change in self.changes)

    @property
    def chunks_new(self) -> int:
        """Chunks that the index did not have before."""
        return sum(change.chunks_new for change in self.changes)

    @property
    def chunks_total(self) -> int:
        """Chunks of all added, changed and moved files."""
        return sum(change.chunks_total for change in self.changes)


def index_roots(
    library: Library,
    roots: Iterable[Path],
    count_tokens: Callable[[str], int],
    chunker_signature: str,
    settings: Settings,
    progress: Callable[[IndexProgress], None],
) -> IndexReport:
    """Brings the index up to date with these folders and files: what was added, or any path below it.

    chunker_signature: names the tokenizer behind count_tokens; documents cut under another one, another chunk
    size or other rules are cut again.
    """
    return _Pass(library, count_tokens, chunker_signature, settings).run(list(roots), progress)


class _Pass:
    """One pass over some roots."""

    def __init__(
        self, library: Library, count_tokens: Callable[[str], int], tokenizer: str, settings: Settings
    ) -> None:
        self._library = library
        self._count_tokens = count_tokens
        self._tokenizer = tokenizer
        self._settings = settings
        self._roots = library.roots()
        self._known = {document.path: document for document in library.documents()}
        self._origins: dict[str, list[Path]] = {}  # vanished files by their content
        self._changes: list[Change] = []
        self._skipped: list[Skipped] = []
        self._unchanged = 0

    def run(self, roots: Sequence[Path], progress: Callable[[IndexProgress], None]) -> IndexReport:
        # An unplugged disk is not a deleted folder: of a root that is not there, everything is kept.
        present = [root for root in roots if os.path.lexists(self._root_of(root))]
        files = list(dict.fromkeys(file for root in present for file in self._files(root)))
        vanished = self._vanished(present, files)
        for path in vanished:
            self._origins.setdefault(self._known[path].sha256, []).append(path)
        for done, file in enumerate(files, 1):
            self._index(file)
            progress(IndexProgress(done, len(files), file))
        for path in vanished:  # last, so that a moved file still finds its chunks
            self._library.forget(path)
            known = self._known[path]
            if known.state == "indexed" and path in self._origins[known.sha256]:
                self._changes.append(Change(path, "removed"))
        for root in set(map(self._root_of, set(roots) - set(present))):
            self._skipped.append(Skipped(root, "it is not there", "Restore it, or remove it from Quire."))
        return IndexReport(tuple(self._changes), tuple(self._skipped), self._unchanged)

    def _root_of(self, path: Path) -> Path:
        """The innermost added folder around a path; the path itself where there is none."""
        return _innermost(self._roots, path) or path

    def _files(self, path: Path) -> Iterable[Path]:
        root = self._root_of(path)
        return walk(root) if path == root else walk_below(root, path)

    def _vanished(self, roots: Sequence[Path], files: Sequence[Path]) -> list[Path]:
        """Documents of these roots whose files are gone, as far as one can see."""
        found = set(files)
        closed = [file for file in files if file.is_dir()]  # folders that refuse to be listed

        def was_looked_for(path: Path) -> bool:
            looked = _innermost(roots, path)
            root = self._root_of(path)  # perhaps another one inside of what was walked
            return looked is not None and (root == looked or not root.is_relative_to(looked))

        return [p for p in self._known if p not in found and was_looked_for(p) and not _below(p, closed)]

    def _index(self, file: Path) -> None:
        signature = self._signature(file)
        known = self._known.get(file)
        if known and known.state == "indexed" and known.signature == signature and _same_stamp(file, known):
            self._unchanged += 1
            return
        try:
            document = read_document(file, self._settings.max_file_mb * 1_000_000)
        except Unreadable as error:
            self._skip(file, error)
            return
        if known and known.sha256 == document.sha256 and known.signature == signature:
            self._library.restamp(file, document.size_bytes, document.mtime_ns)
            self._unchanged += 1
            return
        self._store(file, document, signature)

    def _store(self, file: Path, document: Document, signature: str) -> None:
        known = self._known.get(file)
        passages = self._library.passages_of_content(document.sha256, signature) or self._cut(document)
        new = self._library.replace_document(
            StoredDocument(file, document.size_bytes, document.mtime_ns, document.sha256, signature), passages
        )
        kind: ChangeKind = "changed" if known and known.state == "indexed" else "added"
        if known and kind == "changed" and known.sha256 == document.sha256:
            kind = "cut anew"  # as another model wants it
        if kind == "added" and self._origins.get(document.sha256):
            self._origins[document.sha256].pop(0)
            kind = "moved"
        tokens = {p.chunk_id: p.tokens for p in passages}
        tokens_new = sum(tokens[chunk] for chunk in new)
        self._changes.append(Change(file, kind, len(new), len(tokens), tokens_new, new))

    def _cut(self, document: Document) -> list[Passage]:
        return chunking.split(document.text, self._count_tokens, self._settings.chunk_tokens, markup=document.markup)

    def _skip(self, file: Path, error: Unreadable) -> None:
        known = self._known.get(file)
        lost = known is not None and known.state == "indexed"
        self._skipped.append(Skipped(file, error.reason, error.remedy, lost))
        record = StoredDocument(file, 0, 0, "", "", "skipped", error.reason, error.remedy)
        if record != known and _storable(file):
            self._library.replace_document(record, [])

    def _signature(self, file: Path) -> str:
        """Everything besides the content that decides how a file is cut."""
        parts = (self._tokenizer, chunking.VERSION, self._settings.chunk_tokens, markup_of(file))
        return "/".join(map(str, parts))


def _innermost(folders: Iterable[Path], path: Path) -> Path | None:
    """The nearest of the folders around a path."""
    return max((f for f in folders if path.is_relative_to(f)), key=lambda f: len(f.parts), default=None)


def _below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _same_stamp(file: Path, known: StoredDocument) -> bool:
    try:
        status = os.stat(file)
    except OSError:
        return False  # reading it will say why
    return (status.st_size, status.st_mtime_ns) == (known.size_bytes, known.mtime_ns)


def _storable(file: Path) -> bool:
    """Whether SQLite accepts the name: it may hold bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in str(file))
