"""What lies in the stores of a cache directory, by SQLite: an index of the files, which are the truth.

Beside bytes it knows what files do not tell: how long computing a chunk took, how often it was used, and which process
is computing it now. A look compares it with the directories that changed since the last one, so whatever happened to
files or index, they agree afterwards, and where the index cannot be used one in memory takes its place. Nothing here
raises because of the index. Safe for several processes and threads. Does not know what chunks
mean, or which are wanted.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from quire_engine import processes
from quire_engine.kv import format
from quire_engine.kv.pools import MemoryPool
from quire_engine.kv.store import FOLDER, KEY, SUFFIX, TEMPORARY, KVStore
from quire_engine.processes import Process

T = TypeVar("T")

_VERSION = 1
_NAME = "catalogue.sqlite"
_TABLES = (
    """CREATE TABLE chunks (store TEXT, key TEXT, bytes INTEGER NOT NULL, tokens INTEGER NOT NULL,
        numbers INTEGER NOT NULL, seconds REAL NOT NULL, uses REAL NOT NULL, used_at REAL NOT NULL,
        PRIMARY KEY (store, key)) WITHOUT ROWID""",
    # A directory is looked into again when it changed since.
    "CREATE TABLE folders (store TEXT, folder TEXT, changed_ns INTEGER NOT NULL, PRIMARY KEY (store, folder))",
    """CREATE TABLE claims (store TEXT, key TEXT, pid INTEGER NOT NULL, started INTEGER NOT NULL,
        until REAL NOT NULL, PRIMARY KEY (store, key))""",
)
_BUSY_SECONDS = 5.0  # how long one process waits for another
_RETRY_SECONDS = 0.01
_LEASE_SECONDS = 900.0  # no chunk takes this long; for owners of whom nothing can be found out
_LEFTOVER_SECONDS = 3600.0  # no write takes this long, so what is older was left by a crash
_CLOCK_NS = 2_000_000_000  # two changes closer than this may leave a directory the same time
_USES_KEPT = 500  # in memory, before they are written down
_HALF_LIFE_SECONDS = 7 * 86400.0
_UNKNOWN_SECONDS_PER_BYTE = 1e-6


class Entry(NamedTuple):  # there may be 100,000 of them, and a dataclass takes several times as long to make
    """One chunk on disk. seconds: that computing it took, or would take.  uses: how often it was used, where a use
    counts half after a week, as of used_at."""

    store: str
    key: str
    size_bytes: int
    seconds: float
    uses: float
    used_at: float

    def uses_at(self, now: float) -> float:
        """Its uses, as far as they still count."""
        return self.uses * _decay(now - self.used_at)

    def value(self, now: float, expected_uses: float = 0.0) -> float:
        """Seconds that a byte of it saves: by its uses, as far as they still count, and those to be expected."""
        return self.seconds * (self.uses_at(now) + expected_uses) / max(1, self.size_bytes)


@dataclass(frozen=True)
class Total:
    """All chunks of a store. numbers: stored keys and values.  seconds: that computing them took, or would take."""

    store: str
    chunks: int
    size_bytes: int
    tokens: int
    numbers: int
    seconds: float


class Catalogue:
    """Of the stores below root, one directory each. Made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._notice = ""
        self._db: sqlite3.Connection | None = None
        self._in_memory = False
        self._lock = threading.RLock()
        self._used: dict[tuple[str, str], tuple[int, float]] = {}  # not written down yet: how often, and when last

    @classmethod
    def of(cls, cache_dir: Path) -> "Catalogue":
        """Of everything that is cached there, for whatever model."""
        return cls(cache_dir / "kv")

    def store(self, name: str, model: str = "", memory: MemoryPool | None = None) -> KVStore:
        """A store that is listed here. model: whose chunks it holds, for people.  memory: above its disk, if any."""
        return KVStore(self.root / name, self, model, memory)

    def stores(self) -> list[KVStore]:
        """All that lie on disk, by name."""
        return [self.store(name) for name in _folders(self.root)]

    def close(self) -> None:
        """Writes down what is not yet; it may be used again."""
        self.flush()
        with self._lock, suppress(sqlite3.Error):
            if self._db and not self._in_memory:
                self._db.close()
                self._db = None

    def take_notice(self) -> str:
        """What a person should know about it, said once; empty most of the time."""
        with self._lock:
            notice, self._notice = self._notice, ""
        return notice

    # What happens to chunks

    def written(self, store: str, key: str, beginning: bytes, size_bytes: int, seconds: float, uses: float) -> None:
        tokens, numbers = format.sizes(beginning)

        def note(db: sqlite3.Connection) -> None:
            with _transaction(db):
                # A look may have adopted the file already; the use that it counts is a guess.
                db.execute("DELETE FROM chunks WHERE store = ? AND key = ? AND seconds = 0", (store, key))
                kept = _uses(db, store, key, time.time()) + uses
                row = (store, key, size_bytes, tokens, numbers, seconds, kept, time.time())
                db.execute("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

        self._note(note)

    def used(self, store: str, key: str) -> None:
        with self._lock:
            self._used[store, key] = (self._used.get((store, key), (0, 0.0))[0] + 1, time.time())
            if len(self._used) >= _USES_KEPT:
                self.flush()

    def removed(self, store: str, key: str) -> None:
        self._note(lambda db: db.execute("DELETE FROM chunks WHERE store = ? AND key = ?", (store, key)))

    def flush(self) -> None:
        """Writes down the uses."""
        with self._lock:
            used, self._used = self._used, {}

        def note(db: sqlite3.Connection) -> None:
            with _transaction(db):
                for (store, key), (times, at) in used.items():
                    new = (_uses(db, store, key, at) + times, at, store, key)
                    db.execute("UPDATE chunks SET uses = ?, used_at = ? WHERE store = ? AND key = ?", new)

        if used:
            self._note(note)

    # Who computes what

    def claim(self, store: str, key: str) -> bool:
        """Whether this process may compute the chunk: False while another one that is alive does."""
        me, mine = processes.this(), [True]

        def note(db: sqlite3.Connection) -> None:
            with _transaction(db):
                db.execute("DELETE FROM claims WHERE until < ?", (time.time(),))
                found = db.execute(
                    "SELECT pid, started FROM claims WHERE store = ? AND key = ?", (store, key)
                ).fetchone()
                owner = Process(*found) if found else me
                mine[0] = owner == me or not processes.is_alive(owner)
                if mine[0]:
                    row = (store, key, me.pid, me.started, time.time() + _LEASE_SECONDS)
                    db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)", row)

        self._note(note)
        return mine[0]

    def release(self, store: str, key: str) -> None:
        """Gives back this process's claim, if it has one."""
        me = processes.this()
        which = "store = ? AND key = ? AND pid = ? AND started = ?"
        self._note(lambda db: db.execute(f"DELETE FROM claims WHERE {which}", (store, key, me.pid, me.started)))

    # Looking

    def look(self) -> None:
        """Agrees with the files: adopts those it does not know and forgets those that are gone."""
        self.flush()
        self._ask(self._compare)

    def sizes(self, store: str) -> dict[str, int]:
        """Bytes of every chunk of a store, by key, as of the last look."""
        return dict(
            self._ask(lambda db: db.execute("SELECT key, bytes FROM chunks WHERE store = ?", (store,)).fetchall())
        )

    def size_bytes(self) -> int:
        """Bytes of all chunks, as of the last look."""
        return int(self._ask(lambda db: db.execute("SELECT total(bytes) FROM chunks").fetchone())[0])

    def totals(self) -> list[Total]:
        """Of every store with chunks, by name, as of the last look."""

        def ask(db: sqlite3.Connection) -> list[Total]:
            columns = "COUNT(*), SUM(bytes), SUM(tokens), SUM(numbers), SUM(iif(seconds > 0, seconds, bytes * ?))"
            select = f"SELECT store, {columns} FROM chunks WHERE store = ?"
            return [Total(*db.execute(select, (rate, name)).fetchone()) for name, rate in _rates(db).items()]

        return self._ask(ask)

    def entries(self) -> list[Entry]:
        """All chunks, as of the last look."""

        def ask(db: sqlite3.Connection) -> list[Entry]:
            columns = "store, key, bytes, iif(seconds > 0, seconds, bytes * ?), uses, used_at"
            select = f"SELECT {columns} FROM chunks WHERE store = ?"
            return [Entry._make(row) for name, rate in _rates(db).items() for row in db.execute(select, (rate, name))]

        self.flush()
        return self._ask(ask)

    def seconds_per_byte(self, store: str) -> float:
        """What a byte of a chunk of this store takes to compute, as far as that was measured."""
        return self._ask(lambda db: _rate(db, store))

    def _compare(self, db: sqlite3.Connection) -> None:
        known = {(store, folder): ns for store, folder, ns in db.execute("SELECT * FROM folders")}
        stores = _folders(self.root)
        there = {(store, name) for store in stores for name in _folders(self.root / store) if FOLDER.fullmatch(name)}
        for store, folder in known.keys() - there:
            _forget_folder(db, store, folder)
        for store, folder in there:
            path = self.root / store / folder
            with suppress(OSError):  # removed meanwhile, or not for us: what is known stays
                if known.get((store, folder)) != path.stat().st_mtime_ns:
                    _look_into(db, store, path)

    # The index itself

    def _note(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """What cannot be noted is found by the next look, or not missed."""
        with self._lock:
            try:
                work(self._database())
            except sqlite3.Error as error:
                if _is_damage(error):
                    self._replace(error, in_memory=False)

    def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            for attempt in range(2):
                try:
                    return work(self._database())
                except sqlite3.Error as error:
                    self._replace(error, in_memory=attempt > 0 or not _is_damage(error))
                    with suppress(sqlite3.Error):
                        self._compare(self._database())
            return work(self._database())

    def _database(self) -> sqlite3.Connection:
        if self._db is None:
            with suppress(OSError):  # then SQLite says what is wrong
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = _open(":memory:" if self._in_memory else str(self.root / _NAME))
        return self._db

    def _replace(self, error: sqlite3.Error, in_memory: bool) -> None:
        """Another index in place of one that failed: empty until it is compared with the files."""
        if self._db:
            self._db.close()
        self._db = None
        self._in_memory = in_memory
        self._notice = "The catalogue of cached KV was damaged. It was made again from the files; nothing is lost."
        if in_memory:
            self._notice = f"The catalogue of cached KV cannot be used: {error}. The files are counted at every start."
            return
        with suppress(OSError):
            for name in (_NAME, f"{_NAME}-wal", f"{_NAME}-shm"):
                (self.root / name).unlink(missing_ok=True)


def _open(path: str) -> sqlite3.Connection:
    """An index with its tables. Raises sqlite3.Error."""
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _enable_wal(db)
        db.execute("PRAGMA synchronous = NORMAL")
        with _transaction(db):
            [version] = db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise sqlite3.NotSupportedError("it belongs to a newer Quire")
            if version < _VERSION:
                for table in ("chunks", "folders", "claims"):
                    db.execute(f"DROP TABLE IF EXISTS {table}")
                for statement in _TABLES:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
    except BaseException:
        db.close()
        raise
    return db


def _enable_wal(db: sqlite3.Connection) -> None:
    """Lets others read while one writes. Of several that make the file at once, SQLite refuses some without waiting."""
    give_up = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(_RETRY_SECONDS)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. Immediate: one that began by reading could not wait for another writer."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _is_damage(error: sqlite3.Error) -> bool:
    """SQLITE_ERROR: its tables are not those that were made."""
    name = str(getattr(error, "sqlite_errorname", ""))
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or name == "SQLITE_ERROR" or "decode" in str(error)


# Between files and rows


def _folders(path: Path) -> list[str]:
    with suppress(OSError), os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    return []


def _look_into(db: sqlite3.Connection, store: str, folder: Path) -> None:
    """Within a transaction, so that what others write meanwhile is noted after this, not undone by it."""
    with _transaction(db):
        changed_ns = folder.stat().st_mtime_ns
        settled = time.time_ns() - changed_ns > _CLOCK_NS
        sizes: dict[str, os.stat_result] = {}
        for file in os.scandir(folder):
            with suppress(OSError):  # removed meanwhile
                name, status = file.name, file.stat()
                if name.endswith(SUFFIX) and KEY.fullmatch(name.removesuffix(SUFFIX)):
                    sizes[name.removesuffix(SUFFIX)] = status
                elif name.endswith(TEMPORARY):
                    settled = False  # being written, or left by a crash and removed when it is old enough
                    if status.st_mtime < time.time() - _LEFTOVER_SECONDS:
                        os.unlink(file)
        known = dict(
            db.execute(f"SELECT key, bytes FROM chunks WHERE {_WITHIN}", _within(store, folder.name)).fetchall()
        )
        gone = [(store, key) for key in known.keys() - sizes.keys()]
        db.executemany("DELETE FROM chunks WHERE store = ? AND key = ?", gone)
        new = [key for key, status in sizes.items() if known.get(key) != status.st_size]
        rows = [_row(store, key, folder, sizes[key]) for key in new]
        db.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?, 0, 1, ?)", rows)
        db.execute(
            "INSERT OR REPLACE INTO folders VALUES (?, ?, ?)", (store, folder.name, changed_ns if settled else 0)
        )


def _row(store: str, key: str, folder: Path, status: os.stat_result) -> tuple[str, str, int, int, int, float]:
    """What a file tells: it was used once, when it was read or written last."""
    beginning = b""
    with suppress(OSError), open(folder / (key + SUFFIX), "rb", buffering=0) as file:
        beginning = file.read(format.BEGINNING_BYTES)
    return store, key, status.st_size, *format.sizes(beginning), max(status.st_atime, status.st_mtime)


_WITHIN = "store = ? AND key >= ? AND key < ?"


def _within(store: str, folder: str) -> tuple[str, str, str]:
    """The chunks of a folder: their keys begin with its name, and "g" comes after all digits."""
    return store, folder, folder + "g"


def _forget_folder(db: sqlite3.Connection, store: str, folder: str) -> None:
    with _transaction(db):
        db.execute(f"DELETE FROM chunks WHERE {_WITHIN}", _within(store, folder))
        db.execute("DELETE FROM folders WHERE store = ? AND folder = ?", (store, folder))


# Uses and seconds


def _decay(seconds: float) -> float:
    return float(0.5 ** (max(0.0, seconds) / _HALF_LIFE_SECONDS))


def _uses(db: sqlite3.Connection, store: str, key: str, now: float) -> float:
    found = db.execute("SELECT uses, used_at FROM chunks WHERE store = ? AND key = ?", (store, key)).fetchone()
    return float(found[0]) * _decay(now - found[1]) if found else 0.0


def _rates(db: sqlite3.Connection) -> dict[str, float]:
    stores = db.execute("SELECT DISTINCT store FROM chunks ORDER BY store").fetchall()
    return {name: _rate(db, name) for (name,) in stores}


def _rate(db: sqlite3.Connection, store: str) -> float:
    """Seconds a byte took in this store; where none was measured, in all of them."""
    measured = "SELECT total(seconds), total(bytes) FROM chunks WHERE seconds > 0"
    for rows in (db.execute(f"{measured} AND store = ?", (store,)), db.execute(measured)):
        seconds, size_bytes = rows.fetchone()
        if size_bytes:
            return float(seconds / size_bytes)
    return _UNKNOWN_SECONDS_PER_BYTE
