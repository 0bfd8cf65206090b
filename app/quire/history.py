"""The conversations: what was asked and answered, over which sources, and what each answer truly cost.

Knows SQLite; knows nothing of models, of the index or of screens, and interprets no text. Unlike the index it cannot be
made again, so it has a file of its own that Quire never deletes or rebuilds. A conversation is a tree of turns: asking
again from an earlier turn begins a branch, and nothing is overwritten by it.
Safe for several processes at once; within a process each thread opens a History of its own.
"""

import json
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

from sqlite_utils import Database, Migrations

from quire_engine.errors import QuireError
from quire_engine.types import Forecast, Timings, TokenCounts

ROOT: Final = 0  # the parent of a first turn; no turn has this id
Ending = Literal["end", "length", "stopped", "lost"]  # lost: no end was recorded, by a crash or because it is not over

Found = TypeVar("Found")

_BUSY_SECONDS = 30.0
_TITLE_CHARACTERS = 60
_SNIPPET_CHARACTERS = 300  # a snippet is 16 words, but a word can be a page long
_MOST_WORDS = 64  # of a search
_FORMAT, _FORMAT_VERSION = "quire.conversation", 1
_GONE = "It may have been deleted in another window."


@dataclass(frozen=True)
class Source:
    """A passage that went into the prompt, as it was then; the file may have changed since. score: as searched."""

    path: Path
    start_line: int
    end_line: int
    heading: str
    text: str
    score: float


@dataclass(frozen=True)
class Truth:
    """What one answer cost: the engine's numbers, the search before it, and what had been predicted."""

    search_ms: float
    predicted: Forecast
    tokens: TokenCounts
    timings: Timings
    ratio: float


UNMEASURED: Final = Truth(
    0.0, Forecast(0, 0, 0.0, "", 0.0, 0.0), TokenCounts(0, 0, 0, 0, 0), Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.0
)


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which may be partial or empty. parent: the turn before it, or ROOT."""

    id: int
    conversation: int
    parent: int
    question: str
    answer: str
    ending: Ending
    sources: tuple[Source, ...]
    truth: Truth
    model: str
    created_at: datetime


@dataclass(frozen=True)
class Conversation:
    """A conversation without its texts. turns: how many, all branches.  leaf: where it was left; ROOT: at its start.

    title: one line, empty before the first question.  updated_at: of the last question or answer.
    """

    id: int
    title: str
    turns: int
    leaf: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class HistoryHit:
    """A turn found by a search, or a conversation found by its title (turn is ROOT then)."""

    conversation: int
    title: str
    turn: int
    snippet: str


_DAWN = datetime.min.replace(tzinfo=UTC)
_BLANK = Turn(0, 0, 0, "", "", "lost", (Source(Path(), 0, 0, "", "", 0.0),), UNMEASURED, "", _DAWN)  # for _restored
_migrations = Migrations("quire.history")


@_migrations()
def create_tables(db: Database) -> None:
    """Version 1. Triggers keep the words, which hold no text of their own: titles at -id, turns at id."""
    for statement in (
        """CREATE TABLE conversations (id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, leaf INTEGER,
            created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
            FOREIGN KEY (id, leaf) REFERENCES turns (conversation, id))""",
        """CREATE TABLE turns (id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE, parent INTEGER,
            question TEXT NOT NULL, answer TEXT NOT NULL, ending TEXT NOT NULL, sources TEXT NOT NULL,
            truth TEXT NOT NULL, model TEXT NOT NULL, created_at TEXT NOT NULL, UNIQUE (conversation, id),
            FOREIGN KEY (conversation, parent) REFERENCES turns (conversation, id))""",
        "CREATE INDEX turns_by_parent ON turns (conversation, parent)",
        "CREATE INDEX conversations_by_time ON conversations (updated_at, id)",
        "CREATE INDEX conversations_by_word_id ON conversations (-id)",
        """CREATE VIEW texts AS SELECT -id AS id, title, '' AS question, '' AS answer FROM conversations
            UNION ALL SELECT id, '', question, answer FROM turns""",
        """CREATE VIRTUAL TABLE words USING fts5 (title, question, answer,
            content = 'texts', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2')""",
    ):
        db.execute(statement)
    for table, column, row in (
        ("conversations", "title", "-{0}.id, {0}.title, '', ''"),
        ("turns", "answer", "{0}.id, '', {0}.question, {0}.answer"),
    ):
        drop = f"INSERT INTO words (words, rowid, title, question, answer) VALUES ('delete', {row.format('old')});"
        add = f"INSERT INTO words (rowid, title, question, answer) VALUES ({row.format('new')});"
        db.execute(f"CREATE TRIGGER {table}_added AFTER INSERT ON {table} BEGIN {add} END")
        db.execute(f"CREATE TRIGGER {table}_changed AFTER UPDATE OF {column} ON {table} BEGIN {drop} {add} END")
        db.execute(f"CREATE TRIGGER {table}_deleted AFTER DELETE ON {table} BEGIN {drop} END")


class History:
    """The conversations in one SQLite file, made when missing. All methods raise QuireError where SQLite fails, and
    where a conversation or a turn does not exist (any more)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            self._db = Database(sqlite3.connect(path, timeout=_BUSY_SECONDS))
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        with self._explained():
            self._enable_wal()
            self._db.execute("PRAGMA synchronous = FULL")  # nothing here can be made again
            self._db.execute("PRAGMA foreign_keys = ON")
            applied = {migration.name for migration in _migrations.applied(self._db)}
        known = {migration.name for migration in _migrations.pending(Database(memory=True))}
        if newer := sorted(applied - known):
            message = f"The history {self.path} belongs to a newer Quire ({', '.join(newer)}); it is left as it is."
            raise QuireError(message, "Update Quire.")
        if applied != known:
            with self._writing():  # so that of two processes starting at once the second finds it done
                _migrations.apply(self._db)

    def _enable_wal(self) -> None:
        """Of several that make the file at once, SQLite refuses some without waiting: they try again."""
        give_up = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self._db.enable_wal()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                    raise
            time.sleep(0.01)

    def close(self) -> None:
        """Closes the file; the history cannot be used afterwards."""
        self._db.close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing

    def begin(self, title: str = "") -> int:
        """Begins a conversation and returns its id. Without a title it is named after its first question."""
        with self._writing():
            return self._begin(_title(title), _now())

    def add_turn(self, conversation: int, parent: int, question: str, model: str) -> int:
        """Keeps a question before it is answered and returns the turn's id; it is "lost" until finish_turn.

        parent: ROOT, or any turn of the conversation; one that was answered before gets another branch.
        The turn becomes the conversation's current leaf.
        """
        turn = Turn(ROOT, conversation, parent, question, "", "lost", (), UNMEASURED, model, _now())
        name = "UPDATE conversations SET title = ? WHERE id = ? AND title = ''"
        with self._writing():
            added = self._insert(turn)
            self._execute(name, _title(question), conversation)
            self._place(conversation, added, turn.created_at)
        return added

    def finish_turn(
        self, turn: int, answer: str, ending: Ending, sources: Sequence[Source] = (), truth: Truth = UNMEASURED
    ) -> None:
        """Writes what came of a question, in place of what was written of it before."""
        write = "UPDATE turns SET answer = ?, ending = ?, sources = ?, truth = ? WHERE id = ?"
        touch = "UPDATE conversations SET updated_at = ? WHERE id = (SELECT conversation FROM turns WHERE id = ?)"
        kept = _json([asdict(source) for source in sources])
        with self._writing():
            done = self._execute(write, answer, ending, kept, _json(asdict(truth)), turn)
            _found(done.rowcount, "turn", turn)
            self._execute(touch, _stamp(_now()), turn)

    def set_leaf(self, conversation: int, turn: int) -> None:
        """Makes a turn of the conversation, or ROOT, the place where it goes on."""
        self._change("UPDATE conversations SET leaf = nullif(?, 0) WHERE id = ?", turn, conversation)

    def rename(self, conversation: int, title: str) -> None:
        """Gives a conversation another title; an empty one names it after its first question again."""
        first = self._rows("SELECT question FROM turns WHERE conversation = ? ORDER BY id LIMIT 1", conversation)
        named = _title(title) or "".join(_title(question) for (question,) in first)
        self._change("UPDATE conversations SET title = ? WHERE id = ?", named, conversation)

    def delete(self, conversation: int) -> None:
        """Deletes a conversation with all its branches."""
        self._change("DELETE FROM conversations WHERE id = ?", conversation)

    # Reading

    def conversations(self, limit: int, offset: int = 0) -> list[Conversation]:
        """The conversations, the one last written to first."""
        return self._conversations("ORDER BY updated_at DESC, id DESC LIMIT ? OFFSET ?", max(0, limit), offset)

    def conversation(self, conversation: int) -> Conversation:
        return _found(self._conversations("WHERE id = ?", conversation), "conversation", conversation)[0]

    def turns(self, conversation: int) -> list[Turn]:
        """The whole tree, oldest first: every turn comes after its parent."""
        return self._turns("conversation = ?", conversation)

    def turn(self, turn: int) -> Turn:
        return _found(self._turns("id = ?", turn), "turn", turn)[0]

    def children(self, conversation: int, parent: int) -> list[Turn]:
        """The branches that begin after a turn, or at ROOT, oldest first."""
        return self._turns("conversation = ? AND parent IS nullif(?, 0)", conversation, parent)

    def path_to(self, turn: int) -> list[Turn]:
        """The line of turns from the first to this one; none to ROOT."""
        line = """WITH RECURSIVE line (id) AS
            (SELECT ? UNION SELECT parent FROM turns JOIN line USING (id) WHERE parent IS NOT NULL)"""
        found = self._turns("id IN line", turn, before=line)
        return found if turn == ROOT else _found(found, "turn", turn)

    def search(self, words: str, limit: int) -> list[HistoryHit]:
        """Titles and turns that hold all the words, or words that begin so, best first (BM25)."""
        chosen = words.replace("\0", " ").split()[:_MOST_WORDS]
        query = " ".join('"{}"*'.format(word.replace('"', '""')) for word in chosen) or '""'  # FTS5 drops punctuation
        rows = self._rows(
            """SELECT conversations.id, conversations.title, max(words.rowid, 0), snippet(words, -1, '', '', '…', 16)
            FROM words JOIN conversations ON conversations.id = CASE WHEN words.rowid < 0 THEN -words.rowid
                ELSE (SELECT conversation FROM turns WHERE turns.id = words.rowid) END
            WHERE words MATCH ? AND rank MATCH 'bm25(4.0, 2.0, 1.0)' ORDER BY rank LIMIT ?""",
            *(query, max(0, limit)),
        )
        return [HistoryHit(row[0], row[1], row[2], row[3][:_SNIPPET_CHARACTERS]) for row in rows]

    # Export and import

    def export_markdown(self, conversation: int, leaf: int = ROOT) -> str:
        """The line of turns to a leaf with its sources, for reading. ROOT: to where the conversation was left.

        Quoted and fenced, so that no text of a document or a model passes for another part. Control characters are
        kept: this is for a file, not for a terminal.
        """
        with self._reading():
            about = self.conversation(conversation)
            line = self.path_to(leaf or about.leaf)
        parts = [f"# {_escaped(about.title)}"]
        for number, turn in enumerate(line, 1):
            end = "" if turn.ending == "end" else f", ending: {turn.ending}"
            asked = f"{turn.created_at:%Y-%m-%d %H:%M} UTC, {_code(turn.model or 'unknown model')}{end}"
            parts += [f"## Question {number}", _quoted(turn.question), asked, "### Answer", _quoted(turn.answer)]
            parts += ["### Sources"] if turn.sources else []
            for s in turn.sources:
                place = f"{_code(str(s.path))}, lines {s.start_line}-{s.end_line}: {_escaped(s.heading)}"
                parts += [place.removesuffix(": "), _fenced(s.text)]
        return "\n\n".join(parts) + "\n"

    def export_json(self, conversation: int) -> str:
        """The whole tree with everything that is known of it, for import_json. Turns are numbered from 1."""
        with self._reading():
            about, turns = self.conversation(conversation), self.turns(conversation)
        ids = {ROOT: ROOT} | {turn.id: number for number, turn in enumerate(turns, 1)}
        head = {"format": _FORMAT, "version": _FORMAT_VERSION, **asdict(about), "id": 1, "leaf": ids[about.leaf]}
        tree = [asdict(replace(t, id=ids[t.id], conversation=1, parent=ids[t.parent])) for t in turns]
        return _json({**head, "turns": tree}, indent=2) + "\n"

    def import_json(self, text: str) -> int:
        """Adds an exported conversation as a new one and returns its id. All or nothing."""
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(data["format"])
            if data["version"] > _FORMAT_VERSION:
                raise QuireError("This conversation was exported by a newer Quire.", "Update Quire.")
            title = _restored("", data["title"])
            created_at, updated_at = (_restored(_DAWN, data[key]) for key in ("created_at", "updated_at"))
            turns: list[Turn] = [_restored(_BLANK, turn) for turn in data["turns"]]
            ids = {ROOT: ROOT}
            with self._writing():
                conversation = self._begin(title, created_at)
                for turn in turns:
                    if turn.id in ids or turn.ending not in get_args(Ending):
                        raise ValueError(turn)
                    ids[turn.id] = self._insert(replace(turn, conversation=conversation, parent=ids[turn.parent]))
                self._place(conversation, ids[data["leaf"]], updated_at)
            return conversation
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            message = "This is no conversation that Quire exported, or it is damaged; nothing was imported."
            raise QuireError(message, "Export it again as JSON.", repr(error)) from error

    # Inside

    def _begin(self, title: str, now: datetime) -> int:
        insert = "INSERT INTO conversations (title, created_at, updated_at) VALUES (?, ?, ?)"
        return int(self._execute(insert, title, _stamp(now), _stamp(now)).lastrowid or 0)

    def _place(self, conversation: int, leaf: int, now: datetime) -> None:
        place = "UPDATE conversations SET leaf = nullif(?, 0), updated_at = ? WHERE id = ?"
        self._execute(place, leaf, _stamp(now), conversation)

    def _insert(self, turn: Turn) -> int:
        """Stores a turn under a new id; that its parent belongs to its conversation is for the foreign key to see."""
        values = {**asdict(turn), "created_at": _stamp(turn.created_at)}
        del values["id"]
        values |= {"sources": _json(values["sources"]), "truth": _json(values["truth"]), "parent": turn.parent or None}
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        return int(self._execute(f"INSERT INTO turns ({columns}) VALUES ({marks})", *values.values()).lastrowid or 0)

    def _conversations(self, which: str, *arguments: int) -> list[Conversation]:
        turns = "(SELECT count(*) FROM turns WHERE conversation = conversations.id)"
        columns = f"id, title, {turns}, ifnull(leaf, 0), created_at, updated_at"
        rows = self._rows(f"SELECT {columns} FROM conversations {which}", *arguments)
        return [Conversation(*row[:4], *(datetime.fromisoformat(moment) for moment in row[4:])) for row in rows]

    def _turns(self, where: str, *arguments: int, before: str = "") -> list[Turn]:
        names = [field.name for field in fields(Turn)]
        columns = ", ".join(names).replace("parent", "ifnull(parent, 0)")
        rows = self._rows(f"{before} SELECT {columns} FROM turns WHERE {where} ORDER BY id", *arguments)
        try:
            stored = [dict(zip(names, row, strict=True)) for row in rows]
            return [_restored(_BLANK, s | {key: json.loads(s[key]) for key in ("sources", "truth")}) for s in stored]
        except (ValueError, TypeError, KeyError) as error:  # bytes that changed within a value, unseen by SQLite
            raise self._damaged(error) from error

    def _execute(self, sql: str, *arguments: str | int | None) -> sqlite3.Cursor:
        return self._db.execute(sql, [_whole(a) if isinstance(a, str) else a for a in arguments])

    def _rows(self, sql: str, *arguments: str | int) -> list[Any]:
        with self._explained():
            return self._execute(sql, *arguments).fetchall()

    def _change(self, sql: str, *arguments: str | int) -> None:
        """Of one conversation, whose id comes last."""
        with self._writing():
            _found(self._execute(sql, *arguments).rowcount, "conversation", arguments[-1])

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

    def _reading(self) -> AbstractContextManager[None]:
        """Several queries see the same state, whatever another process writes in between."""
        return self._transaction("BEGIN")

    def _writing(self) -> AbstractContextManager[None]:
        """Immediate: a transaction that began by reading could not wait for another writer."""
        return self._transaction("BEGIN IMMEDIATE")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the failures of SQLite into errors that a person can act on."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "decode" in str(error):
                raise self._damaged(error) from error
            if code == "SQLITE_CONSTRAINT_FOREIGNKEY":
                message = "There is no such conversation, or it has no such turn."
                hint = _GONE
            elif code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                message = f"Another program keeps the history {self.path} locked."
                hint = "Wait for the other Quire to finish, or close it."
            else:
                message = f"The history {self.path} cannot be used: {error}."
                hint = "Check free space and permissions. Nothing was deleted."
            raise QuireError(message, hint, repr(error)) from error

    def _damaged(self, error: Exception) -> QuireError:
        return QuireError(
            f"The history is damaged. It is kept, nothing was deleted: {self.path}",
            "Put a backup in its place, or move it elsewhere: Quire then begins a new one.",
            repr(error),
        )


def _now() -> datetime:
    return datetime.now(UTC)


def _found(found: Found, what: str, number: object) -> Found:
    """What was found or how many, unless it is none."""
    if not found:
        raise QuireError(f"There is no {what} {number}.", _GONE)
    return found


def _stamp(moment: datetime) -> str:
    """In UTC and always as long, so that stamps sort as the moments do."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def _title(text: str) -> str:
    """The text in one line, shortened at a word."""
    line = " ".join(text.split())
    if len(line) <= _TITLE_CHARACTERS:
        return line
    word = line.rfind(" ", 0, _TITLE_CHARACTERS)
    return line[: word if word > _TITLE_CHARACTERS // 2 else _TITLE_CHARACTERS - 1] + "…"


def _whole(text: str) -> str:
    """Without lone surrogates, the halves of characters that undecodable input leaves: UTF-8 has no place for them."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _json(value: object, indent: int | None = None) -> str:
    def plain(value: object) -> str:
        return _stamp(value) if isinstance(value, datetime) else str(value)

    return json.dumps(value, default=plain, ensure_ascii=False, indent=indent)


def _restored(like: Any, stored: Any) -> Any:
    """What _json wrote, as a value of the same kind as `like`. ValueError, TypeError or KeyError when it is none.

    A number that the engine did not measure yet when a turn was stored is taken from `like`.
    """
    if is_dataclass(like) and not isinstance(like, type):
        needed = isinstance(like, Turn | Source)
        names = [field.name for field in fields(like) if needed or field.name in stored]
        return replace(like, **{name: _restored(getattr(like, name), stored[name]) for name in names})
    if isinstance(like, tuple):
        return tuple(_restored(like[0], one) for one in stored)
    if isinstance(like, datetime):
        return datetime.fromisoformat(stored).astimezone(UTC)
    if isinstance(like, Path):
        return Path(_restored("", stored))
    if isinstance(like, float) and type(stored) is int:
        return float(stored)
    if type(stored) is not type(like):
        raise TypeError(stored)
    return stored


def _quoted(text: str) -> str:
    """As a block quote: what is opened inside it, a fence or a heading, ends with it."""
    return "\n".join(f"> {line}" for line in re.split(r"\r\n|\r|\n", text))


def _fenced(text: str, ticks: int = 3, edge: str = "\n") -> str:
    """As code, between fences longer than any in it."""
    fence = "`" * max([ticks, *(1 + len(run) for run in re.findall("`+", text))])
    return f"{fence}{edge}{text}{edge}{fence}"


def _code(text: str) -> str:
    """As code within a line."""
    return _fenced(" ".join(text.splitlines()), ticks=1, edge=" ")


def _escaped(text: str) -> str:
    """As plain words within a line."""
    return re.sub(r"([\\`*_<>\[\]#&|~])", r"\\\1", " ".join(text.split()))
