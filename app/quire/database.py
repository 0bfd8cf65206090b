"""A SQLite file of Quire: opened, kept at the newest version, used in transactions, and its failures explained.

Knows SQLite; knows nothing of what the tables hold. The index (library.py) and the conversations (history.py) are built
on it, so that both survive the same: processes that start at once, a crash within a write, a file of a newer Quire.
Safe for several processes at once; within a process each thread opens a SqliteFile of its own.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from sqlite_utils import Database, Migrations

from quire_engine.errors import QuireError

_BUSY_SECONDS = 30.0  # how long one process waits for another
_RETRY_SECONDS = 0.01


@dataclass(frozen=True)
class Wording:
    """How errors speak of a file, and what they advise.

    name: what it is called, as in "The index ... cannot be used".  damaged: the sentence that says so; {path} is its
    path.  if_damaged, if_unusable: what a person can do then.
    """

    name: str
    damaged: str
    if_damaged: str
    if_unusable: str


class SqliteFile:
    """One SQLite file, made when missing. Where SQLite fails, QuireError is raised."""

    def __init__(
        self, path: Path, migrations: Migrations, wording: Wording, synchronous: Literal["NORMAL", "FULL"]
    ) -> None:
        """migrations: what brings the tables up to date.

        synchronous: whether power loss may cost the last writes (NORMAL) or none (FULL); the file survives it in both.
        """
        self.path = path
        self._wording = wording
        with self._explained():
            self._db = Database(sqlite3.connect(path, timeout=_BUSY_SECONDS))
        try:
            with self._explained():
                self._enable_wal()
                self._db.execute(f"PRAGMA synchronous = {synchronous}")
                self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate(migrations)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; it cannot be used afterwards."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Reads all of it. Raises QuireError where SQLite finds it damaged."""
        if (found := self._rows("PRAGMA quick_check(1)")[0][0]) != "ok":
            raise self._damaged(sqlite3.DatabaseError(found))

    # Opening

    def _enable_wal(self) -> None:
        """Lets others read while one writes.

        Of several that make the file at once, SQLite refuses some without waiting: they try again.
        """
        give_up = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._db.enable_wal()
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > give_up:
                    raise
            time.sleep(_RETRY_SECONDS)

    def _migrate(self, migrations: Migrations) -> None:
        """Brings the tables up to date; a file of a newer Quire is refused and left as it is."""
        with self._explained():
            applied = {migration.name for migration in migrations.applied(self._db)}
        known = {migration.name for migration in migrations.pending(Database(memory=True))}
        if newer := sorted(applied - known):
            names = ", ".join(newer)
            message = f"The {self._wording.name} {self.path} belongs to a newer Quire ({names}); it is left as it is."
            raise QuireError(message, "Update Quire.")
        if applied != known:
            with self._writing():  # so that of two processes starting at once the second finds it done
                migrations.apply(self._db)

    # Statements and transactions

    def _execute(self, sql: str, arguments: Sequence[str | int] = ()) -> sqlite3.Cursor:
        return self._db.execute(sql, list(arguments))

    def _rows(self, sql: str, arguments: Sequence[str | int] = ()) -> list[Any]:
        with self._explained():
            return self._execute(sql, arguments).fetchall()

    def _reading(self) -> AbstractContextManager[None]:
        """Several queries see the same state, whatever another process writes in between."""
        return self._transaction("BEGIN")

    def _writing(self) -> AbstractContextManager[None]:
        """All or nothing. Immediate: a transaction that began by reading could not wait for another writer."""
        return self._transaction("BEGIN IMMEDIATE")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with self._explained():
            self._db.conn.execute(begin)
            try:
                yield
                self._db.conn.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise

    # Errors

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the failures of SQLite into errors that a person can act on."""
        try:
            yield
        except (sqlite3.Error, UnicodeEncodeError) as error:
            raise self._explanation(error) from error

    def _explanation(self, error: sqlite3.Error | UnicodeEncodeError) -> QuireError:
        """What a person is told. Overridden where a failure has a meaning of its own."""
        wording, code = self._wording, _code(error)
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or _is_undecodable(error):
            return self._damaged(error)
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            message = f"Another program keeps the {wording.name} {self.path} locked."
            return QuireError(message, "Wait for the other Quire to finish, or close it.", repr(error))
        message = f"The {wording.name} {self.path} cannot be used: {error}."
        return QuireError(message, wording.if_unusable, repr(error))

    def _damaged(self, error: Exception) -> QuireError:
        message = self._wording.damaged.format(path=self.path)
        return QuireError(message, self._wording.if_damaged, repr(error))


def _code(error: Exception) -> str:
    """SQLite's name of the failure; empty when it came from Python's side."""
    return str(getattr(error, "sqlite_errorname", ""))


def _is_undecodable(error: Exception) -> bool:
    """Whether stored text is not UTF-8 any more. Python notices it, so it has no code."""
    return isinstance(error, sqlite3.Error) and "decode" in str(error)
