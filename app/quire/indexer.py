"""Keeps the index in step with the folders.

Knows the order of the work: walk, compare, read, cut, store. Does not know how a file is read or cut, how the index
is stored, which model runs, or what becomes of the passages.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from quire import chunking
from quire.chunking import Passage
from quire.config import Settings
from quire.documents import Document, File, document_of, read_file, rules_of, walk, walk_below
from quire.formats.base import Unreadable
from quire.ignore import Rules
from quire.library import Library, StoredDocument
from quire.parsing import NotNow, Parser

ChangeKind = Literal["added", "changed", "cut anew", "moved", "removed"]


@dataclass(frozen=True)
class Change:
    """One file that differed from the index. chunks_new: those that the index did not have, with tokens_new tokens.
    new: their ids where the file was changed (not of all that a large folder brings)."""

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
    """After each file, and again and again while a slow one is parsed. total: files found."""

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
    on_new: Callable[[Mapping[str, str]], object] = lambda texts: None,
) -> IndexReport:
    """Brings the index up to date with these folders and files: what was added, or any path below it.

    chunker_signature: names the tokenizer behind count_tokens; documents cut under another one, another chunk
    size or other rules are cut again.  on_new: is given, file by file, the texts of chunks that the index did not have,
    by their ids.
    """
    with Parser() as parser:
        return _Pass(library, count_tokens, chunker_signature, settings, parser, on_new).run(list(roots), progress)


class _Pass:
    """One pass over some roots."""

    def __init__(
        self,
        library: Library,
        count_tokens: Callable[[str], int],
        tokenizer: str,
        settings: Settings,
        parser: Parser,
        on_new: Callable[[Mapping[str, str]], object],
    ) -> None:
        self._library = library
        self._count_tokens = count_tokens
        self._tokenizer = tokenizer
        self._settings = settings
        self._parser = parser
        self._on_new = on_new
        self._roots = library.roots()
        self._rules = {root: Rules(root, settings.include) for root in self._roots}
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
            before = IndexProgress(done - 1, len(files), file)
            self._index(file, partial(progress, before))
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
        keeps = self._rules[root].keeps if root in self._rules else Rules(root, self._settings.include).keeps
        return walk(root, keeps) if path == root else walk_below(root, path, keeps)

    def _vanished(self, roots: Sequence[Path], files: Sequence[Path]) -> list[Path]:
        """Documents of these roots whose files are gone, as far as one can see."""
        found = set(files)
        closed = [file for file in files if file.is_dir()]  # folders that refuse to be listed

        def was_looked_for(path: Path) -> bool:
            looked = _innermost(roots, path)
            root = self._root_of(path)  # perhaps another one inside of what was walked
            return looked is not None and (root == looked or not root.is_relative_to(looked))

        return [p for p in self._known if p not in found and was_looked_for(p) and not _below(p, closed)]

    def _index(self, path: Path, waiting: Callable[[], None]) -> None:
        signature = self._signature(path)
        known = self._known.get(path)
        if known and known.signature == signature and _same_stamp(path, known):
            self._unchanged_since(known)
            return
        try:
            file = read_file(path, self._settings.max_file_mb * 1_000_000)
        except Unreadable as error:
            self._skip(StoredDocument(path, 0, 0, "", "", "skipped", error.reason, error.remedy))
            return
        if known and known.sha256 == file.sha256 and known.signature == signature:
            self._library.restamp(path, file.size_bytes, file.mtime_ns, file.changed_ns)
            self._unchanged_since(known)
            return
        try:
            passages = self._library.passages_of_content(file.sha256, signature) or self._cut(file, waiting)
        except Unreadable as error:
            # With what it was read from, so that it is not tried again before it changes.
            read = ("", "") if isinstance(error, NotNow) else (file.sha256, signature)
            stamp = (file.size_bytes, file.mtime_ns)
            self._skip(StoredDocument(path, *stamp, *read, "skipped", error.reason, error.remedy, file.changed_ns))
            return
        self._store(file, signature, passages)

    def _unchanged_since(self, known: StoredDocument) -> None:
        if known.state == "indexed":
            self._unchanged += 1
        else:
            self._skipped.append(Skipped(known.path, known.reason, known.remedy))

    def _store(self, file: File, signature: str, passages: Sequence[Passage]) -> None:
        known = self._known.get(file.path)
        new = self._library.replace_document(
            StoredDocument(
                file.path, file.size_bytes, file.mtime_ns, file.sha256, signature, changed_ns=file.changed_ns
            ),
            passages,
        )
        chunks = {p.chunk_id: p for p in passages}
        if new:
            self._on_new({chunk: chunks[chunk].text for chunk in new})
        kind: ChangeKind = "changed" if known and known.state == "indexed" else "added"
        if known and kind == "changed" and known.sha256 == file.sha256:
            kind = "cut anew"  # as another model wants it
        if kind == "added" and self._origins.get(file.sha256):
            self._origins[file.sha256].pop(0)
            kind = "moved"
        tokens_new = sum(chunks[chunk].tokens for chunk in new)
        ids = new if kind == "changed" else frozenset[str]()
        self._changes.append(Change(file.path, kind, len(new), len(chunks), tokens_new, ids))

    def _cut(self, file: File, waiting: Callable[[], None]) -> list[Passage]:
        document: Document = document_of(file, self._parser, waiting)
        size = self._settings.chunk_tokens
        passages = chunking.split(document.text, self._count_tokens, size, markup=document.markup)
        return [document.located(passage) for passage in passages]

    def _skip(self, record: StoredDocument) -> None:
        known = self._known.get(record.path)
        lost = known is not None and known.state == "indexed"
        self._skipped.append(Skipped(record.path, record.reason, record.remedy, lost))
        if record != known and _storable(record.path):
            self._library.replace_document(record, [])

    def _signature(self, file: Path) -> str:
        """Everything besides the content that decides how a file is cut."""
        parts = (self._tokenizer, chunking.VERSION, self._settings.chunk_tokens, rules_of(file))
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
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return stamp == (known.size_bytes, known.mtime_ns, known.changed_ns)


def _storable(file: Path) -> bool:
    """Whether SQLite accepts the name: it may hold bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in str(file))
