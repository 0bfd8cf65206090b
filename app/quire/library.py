"""The index of the documents: which folders were added, what their files say, and full-text search over it.

Knows SQL; knows nothing of how files are read and cut, of models or of cached KV. Everything in it can be
made again from the files. Text is content-addressed: a chunk is stored once, however many documents hold it.
Safe for several processes at once; within a process each thread opens a Library of its own.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal

from quire import word_search
from quire.chunking import Passage
from quire.database import SqliteFile, Wording
from quire.library_tables import migrations
from quire_engine.errors import QuireError

_WORDING = Wording(
    name="index",
    damaged="The index {path} is damaged.",
    if_damaged="Delete it; it is made again from your files. Cached work is not lost.",
    if_unusable="Check free space and permissions. If that does not help, delete it: it is made again.",
)
_MOST_ARGUMENTS = 500  # of one statement


@dataclass(frozen=True)
class Everywhere:
    """A search that is not limited to one folder or file."""


EVERYWHERE: Final = Everywhere()
Within = Path | Sequence[Path] | Everywhere


@dataclass(frozen=True)
class StoredDocument:
    """A file as the index knows it.

    sha256: of its bytes.  signature: how it was cut.  reason, remedy: why it was skipped, else empty.
    changed_ns: when anything about the file was last changed, which unlike mtime_ns nobody can set.
    """

    path: Path
    size_bytes: int
    mtime_ns: int
    sha256: str
    signature: str
    state: Literal["indexed", "skipped"] = "indexed"
    reason: str = ""
    remedy: str = ""
    changed_ns: int = 0


@dataclass(frozen=True)
class Chunk:
    """A piece of text, wherever it stands. id: SHA-256 of the text."""

    id: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Hit:
    """A chunk found by a search, at the best of its places. score: higher is better."""

    chunk_id: str
    text: str
    tokens: int
    path: Path
    start_line: int
    end_line: int
    heading: str
    score: float
    place: str = ""  # "page 3": where it is in a file that has no lines to name


class Library(SqliteFile):
    """The index in one SQLite file, made when missing. All methods raise QuireError where SQLite fails."""

    def __init__(self, path: Path) -> None:
        # Power loss may cost the last files, not the index.
        super().__init__(path, migrations, _WORDING, synchronous="NORMAL")

    # Folders

    def add_root(self, path: Path) -> Path:
        """Adds a folder or a single file; returns its resolved path. Adding it again changes nothing."""
        root = path.expanduser().resolve()
        if not root.exists():
            raise QuireError(f"There is no file or folder {root}.", "Check the spelling.")
        with self._writing():
            self._db.execute("INSERT OR IGNORE INTO folders VALUES (?)", [str(root)])
        return root

    def remove_root(self, path: Path) -> int:
        """Removes what was added and forgets its documents; returns how many. The files stay untouched.

        Documents that lie under another root too are kept.
        """
        root = path.expanduser().resolve()
        roots = self.roots()
        if root not in roots:
            above = next((other for other in roots if root.is_relative_to(other)), root)
            within = f"It lies inside {above}, which was added as a whole."
            hint = within if above != root else "See what was added: quire status"
            raise QuireError(f"{root} was not added, so it cannot be removed.", hint)
        others = [other for other in roots if other != root]
        inside = [document.path for document in self.documents() if document.path.is_relative_to(root)]
        gone = [file for file in inside if not any(file.is_relative_to(other) for other in others)]
        with self._writing():
            self._db.execute("DELETE FROM folders WHERE path = ?", [str(root)])
            for pin in self.pins():
                if pin.is_relative_to(root) and not any(pin.is_relative_to(other) for other in others):
                    self._db.execute("DELETE FROM pins WHERE path = ?", [str(pin)])
            self._drop_orphans([chunk for file in gone for chunk in self._remove(file)])
        return len(gone)

    def roots(self) -> list[Path]:
        """The folders and files that were added."""
        return [Path(path) for (path,) in self._rows("SELECT path FROM folders ORDER BY path")]

    # Pins

    def pin(self, path: Path) -> None:
        """What lies at this path, or below it, is worth more than the rest."""
        with self._writing():
            self._db.execute("INSERT OR IGNORE INTO pins VALUES (?)", [str(path)])

    def unpin(self, path: Path) -> None:
        """Takes back one pin; what is pinned above or below it stays so."""
        with self._writing():
            self._db.execute("DELETE FROM pins WHERE path = ?", [str(path)])

    def pins(self) -> list[Path]:
        return [Path(path) for (path,) in self._rows("SELECT path FROM pins ORDER BY path")]

    # Documents

    def replace_document(self, document: StoredDocument, passages: Sequence[Passage]) -> frozenset[str]:
        """Stores a document in place of what its path held; returns the ids of the chunks that the index did not have.

        All or nothing. Chunks that stay are not touched; those that no document holds any more are dropped.
        """
        chunks = {passage.chunk_id: passage for passage in passages}
        with self._writing():
            new = frozenset(c for c in chunks if not self._rows("SELECT 1 FROM chunks WHERE id = ?", [c]))
            self._many(
                # Another tokenizer counts other tokens for the same text.
                "INSERT INTO chunks VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET tokens = excluded.tokens",
                [(chunk, passage.text, passage.tokens) for chunk, passage in chunks.items()],
            )
            old_chunks = self._remove(document.path)
            row = self._insert_document(document)
            self._many(
                "INSERT INTO passages (document, ordinal, chunk, start_line, end_line, heading, place)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(row, i, p.chunk_id, p.start_line, p.end_line, p.heading, p.place) for i, p in enumerate(passages)],
            )
            self._db.execute(
                "INSERT INTO words (rowid, text, heading, name)"
                " SELECT id, text, heading, name FROM places WHERE document = ?",
                [row],
            )
            self._drop_orphans(old_chunks)
        return new

    def restamp(self, path: Path, size_bytes: int, mtime_ns: int, changed_ns: int = 0) -> None:
        """Notes that a file was touched without being changed."""
        with self._writing():
            self._db.execute(
                "UPDATE documents SET size_bytes = ?, mtime_ns = ?, changed_ns = ? WHERE path = ?",
                [size_bytes, mtime_ns, changed_ns, str(path)],
            )

    def forget(self, path: Path) -> None:
        """Drops a document and the chunks that only it held. Forgetting what is not there changes nothing."""
        with self._writing():
            self._drop_orphans(self._remove(path))

    def documents(self) -> list[StoredDocument]:
        """All documents, skipped ones included, ordered by path."""
        rows = self._rows(
            "SELECT path, size_bytes, mtime_ns, sha256, signature, state, reason, remedy, changed_ns"
            " FROM documents ORDER BY path"
        )
        return [StoredDocument(Path(path), *rest) for path, *rest in rows]

    def chunks_of(self, path: Path) -> list[Passage]:
        """The passages of one document, in order; none when it is not indexed."""
        return [passage for _, passage in self._places("path = ? ORDER BY ordinal", str(path))]

    def passages_of_content(self, sha256: str, signature: str) -> list[Passage]:
        """How a file with these bytes was cut under this signature; none when no such file is known."""
        same = "SELECT id FROM documents WHERE sha256 = ? AND signature = ? AND state = 'indexed' LIMIT 1"
        found = self._places(f"document = ({same}) ORDER BY ordinal", sha256, signature)
        return [passage for _, passage in found]

    def all_chunks(self) -> list[Chunk]:
        """Every chunk once, in the order of the documents and of their passages."""
        rows = self._rows("SELECT chunk, text, tokens FROM places ORDER BY path, ordinal")
        return list({row[0]: Chunk(*row) for row in rows}.values())

    def contents(self) -> dict[Path, tuple[str, ...]]:
        """The ids of the chunks of every indexed document, each once, in order; the documents ordered by path."""
        found: dict[Path, dict[str, None]] = {}
        rows = self._rows(
            "SELECT path, chunk FROM passages JOIN documents ON documents.id = document ORDER BY path, ordinal"
        )
        for path, same in groupby(rows, key=itemgetter(0)):
            found[Path(path)] = dict.fromkeys(chunk for _, chunk in same)
        return {path: tuple(chunks) for path, chunks in found.items()}

    def tokens(self) -> dict[str, int]:
        """The length of every chunk, by its id."""
        return dict(self._rows("SELECT id, tokens FROM chunks"))

    def texts(self, chunks: Sequence[str]) -> dict[str, str]:
        """The text of these chunks by their ids, as far as they are still there."""
        found: dict[str, str] = {}
        for some in batched(chunks, _MOST_ARGUMENTS):
            marks = ", ".join("?" * len(some))
            found.update(self._rows(f"SELECT id, text FROM chunks WHERE id IN ({marks})", some))
        return found

    # Addresses

    def addresses(self, cache: str) -> dict[str, str]:
        """Where the KV of chunks lies in the cache of this name, by their ids; of those that were noted."""
        return dict(self._rows("SELECT chunk, address FROM addresses WHERE cache = ?", [cache]))

    def note_addresses(self, cache: str, addresses: Mapping[str, str]) -> None:
        """Notes addresses by the ids of their chunks; of a chunk that is gone, nothing is noted."""
        with self._writing():
            self._many(
                "INSERT OR REPLACE INTO addresses SELECT ?, id, ? FROM chunks WHERE id = ?",
                [(cache, address, chunk) for chunk, address in addresses.items()],
            )

    # Vectors

    def without_vector(self, embedder: str) -> list[str]:
        """The ids of the chunks that this embedder gave no vector yet."""
        has = "SELECT 1 FROM vectors WHERE chunk = chunks.id AND embedder = ?"
        return [chunk for (chunk,) in self._rows(f"SELECT id FROM chunks WHERE NOT EXISTS ({has})", [embedder])]

    def note_vectors(self, embedder: str, vectors: Mapping[str, bytes]) -> None:
        """Keeps vectors by the ids of their chunks; of a chunk that is gone, none."""
        with self._writing():
            self._many(
                "INSERT OR REPLACE INTO vectors (embedder, chunk, vector) SELECT ?, id, ? FROM chunks WHERE id = ?",
                [(embedder, vector, chunk) for chunk, vector in vectors.items()],
            )

    def vectors(self, embedder: str, after: int = 0) -> list[tuple[int, str, bytes]]:
        """Row, chunk and vector, of the rows after that one."""
        sql = "SELECT id, chunk, vector FROM vectors WHERE id > ? AND embedder = ? ORDER BY id"
        return self._rows(sql, [after, embedder])

    def hits(self, scores: Mapping[str, float], within: Within = EVERYWHERE) -> list[Hit]:
        """These chunks, each at its first place in there, in the given order; those that are not there are left out."""
        scopes = _scopes(within)
        with self._reading():
            rows = self._rows(
                "SELECT chunk, passages.id, path FROM passages JOIN documents ON documents.id = document"
                " WHERE chunk IN (SELECT value FROM json_each(?)) ORDER BY path, ordinal",
                [json.dumps(list(scores))],
            )
            first: dict[str, int] = {}
            for chunk, place, path in rows:
                if not scopes or os.path.join(path, "").startswith(tuple(scopes)):
                    first.setdefault(chunk, place)
            return self._hits([(first[chunk], score) for chunk, score in scores.items() if chunk in first])

    # Search

    def search(self, question: str, limit: int, within: Within = EVERYWHERE) -> list[Hit]:
        """The chunks that share words with the question, best first (BM25), each once.

        The heading and the file name count too. within: files, and folders for everything below them.
        """
        if within == []:
            return []
        with self._reading():
            best: dict[str, tuple[int, float]] = {}
            for some in _without_parting(word_search.ranked(self._rows, question, _scopes(within)), 2 * limit):
                if len(best) >= limit:
                    break
                for place, chunk, score in self._in_order(dict(some)):
                    best.setdefault(chunk, (place, score))
            return self._hits(list(best.values())[: max(0, limit)])

    def neighbours(self, hit: Hit) -> list[Hit]:
        """The passages right before and after a hit in its document, as far as there are any. They score nothing."""
        rows = self._rows(
            "SELECT other.id FROM places AS this JOIN passages AS other ON other.document = this.document"
            " WHERE this.path = ? AND this.chunk = ? AND this.start_line = ?"
            " AND other.ordinal IN (this.ordinal - 1, this.ordinal + 1) ORDER BY other.ordinal",
            [str(hit.path), hit.chunk_id, hit.start_line],
        )
        return self._hits([(place, 0.0) for (place,) in rows])

    # Inside

    def _in_order(self, scores: Mapping[int, float]) -> list[tuple[int, str, float]]:
        """Places with their chunks and scores, best first; equally good ones ordered by path and position."""
        rows = self._rows(
            "SELECT passages.id, chunk FROM passages JOIN documents ON documents.id = document"
            " WHERE passages.id IN (SELECT value FROM json_each(?)) ORDER BY path, ordinal",
            [json.dumps(list(scores))],
        )
        return sorted(((place, chunk, scores[place]) for place, chunk in rows), key=lambda found: -found[2])

    def _hits(self, scores: Sequence[tuple[int, float]]) -> list[Hit]:
        """Places with their scores as hits, in the given order."""
        columns = "id, chunk, text, tokens, path, start_line, end_line, heading, place"
        where = "id IN (SELECT value FROM json_each(?))"
        rows = self._rows(f"SELECT {columns} FROM places WHERE {where}", [json.dumps([place for place, _ in scores])])
        found = {row[0]: row[1:] for row in rows}
        hits = []
        for at, score in scores:
            chunk, text, tokens, path, start, end, heading, place = found[at]
            hits.append(Hit(chunk, text, tokens, Path(path), start, end, heading, score, place))
        return hits

    def _places(self, where: str, *arguments: str | int) -> list[tuple[Path, Passage]]:
        columns = "path, text, tokens, start_line, end_line, heading, place"
        rows = self._rows(f"SELECT {columns} FROM places WHERE {where}", arguments)
        return [(Path(path), Passage(*rest)) for path, *rest in rows]

    def _insert_document(self, document: StoredDocument) -> int:
        values = {**vars(document), "path": str(document.path), "name": document.path.name}
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO documents ({columns}) VALUES ({marks})", list(values.values()))
        return self._one("SELECT last_insert_rowid()")

    def _remove(self, path: Path) -> list[str]:
        """Deletes a document but not its chunks, which are returned."""
        rows = self._rows("SELECT id, chunk FROM places WHERE path = ?", [str(path)])
        # The words first: to delete them, SQLite reads what they were made of.
        self._many("DELETE FROM words WHERE rowid = ?", [(place,) for place, _ in rows])
        self._many("DELETE FROM passages WHERE id = ?", [(place,) for place, _ in rows])
        self._db.execute("DELETE FROM documents WHERE path = ?", [str(path)])
        return [chunk for _, chunk in rows]

    def _drop_orphans(self, chunks: Iterable[str]) -> None:
        self._many(
            "DELETE FROM chunks WHERE id = ? AND NOT EXISTS (SELECT 1 FROM passages WHERE chunk = chunks.id)",
            [(chunk,) for chunk in chunks],
        )

    def _one(self, sql: str) -> int:
        return int(self._rows(sql)[0][0])

    def _many(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self._db.conn.executemany(sql, rows)

    def _explanation(self, error: sqlite3.Error | UnicodeEncodeError) -> QuireError:
        if isinstance(error, UnicodeEncodeError):
            return QuireError("A file name is not valid UTF-8.", "Rename the file.", repr(error))
        return super()._explanation(error)


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Groups of `size`, the last one with what is left. (itertools has it from Python 3.12 on.)"""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _without_parting(ranked: Sequence[tuple[int, float]], size: int) -> Iterator[Sequence[tuple[int, float]]]:
    """Runs of about that size, so that equal scores are in one."""
    start = 0
    while start < len(ranked):
        end = min(start + max(1, size), len(ranked))
        while end < len(ranked) and ranked[end][1] == ranked[end - 1][1]:
            end += 1
        yield ranked[start:end]
        start = end


def _scopes(within: Within) -> list[str]:
    """What the paths begin with, a slash behind them; none means everywhere."""
    if isinstance(within, Everywhere):
        return []
    places = [within] if isinstance(within, Path) else within
    return [os.path.join(place.expanduser().resolve(), "") for place in places]
