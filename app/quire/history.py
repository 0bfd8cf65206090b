"""The conversations: what was asked and answered, over which sources, and what each answer truly cost.

Knows SQL; knows nothing of models, of the index or of screens, and interprets no text. Unlike the index it cannot be
made again, so it has a file of its own that Quire never deletes or rebuilds. A conversation is a tree of turns: asking
again from an earlier turn begins a branch, and nothing is overwritten by it.
Safe for several processes at once; within a process each thread opens a History of its own.
"""

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlite_utils import Database, Migrations

from quire import transcript
from quire.database import SqliteFile, Wording
from quire.transcript import ROOT, UNMEASURED, Conversation, Ending, Mention, Source, Truth, Turn
from quire_engine.errors import QuireError

__all__ = ["ROOT", "UNMEASURED", "Conversation", "Ending", "Gone", "History", "HistoryHit", "Source", "Truth", "Turn"]

Found = TypeVar("Found")

_SNIPPET_CHARACTERS = 300  # a snippet is 16 words, but a word can be a page long
_MOST_WORDS = 64  # of a search
_GONE = "It may have been deleted in another window."
_TURN_FIELDS = [field.name for field in fields(Turn)]
_WORDING = Wording(
    name="history",
    damaged="The history is damaged. It is kept, nothing was deleted: {path}",
    if_damaged="Put a backup in its place, or move it elsewhere: Quire then begins a new one.",
    if_unusable="Check free space and permissions. Nothing was deleted.",
)


class Gone(QuireError):
    """A conversation or a turn does not exist (any more)."""


@dataclass(frozen=True)
class HistoryHit:
    """A turn found by a search, or a conversation found by its title (turn is ROOT then)."""

    conversation: int
    title: str
    turn: int
    snippet: str


_migrations = Migrations("quire.history")


@_migrations()
def create_tables(db: Database) -> None:
    """Version 1. ROOT is stored as NULL, which the foreign keys let pass."""
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
    ):
        db.execute(statement)
    _create_words(db)


@_migrations()
def create_documents(db: Database) -> None:
    """Version 2. What became of every document, where a question was put to all of them."""
    db.execute("ALTER TABLE turns ADD COLUMN documents TEXT NOT NULL DEFAULT '[]'")


def _create_words(db: Database) -> None:
    """The full-text index. It holds no text of its own: it reads `texts`, and triggers keep it in step.

    One index serves titles and turns. Their ids would collide, so a title stands at -id of its conversation.
    """
    title_before, title_after = "-old.id, old.title, '', ''", "-new.id, new.title, '', ''"
    turn_before, turn_after = "old.id, '', old.question, old.answer", "new.id, '', new.question, new.answer"
    for statement in (
        "CREATE INDEX conversations_by_word_id ON conversations (-id)",
        """CREATE VIEW texts AS SELECT -id AS id, title, '' AS question, '' AS answer FROM conversations
            UNION ALL SELECT id, '', question, answer FROM turns""",
        """CREATE VIRTUAL TABLE words USING fts5 (title, question, answer,
            content = 'texts', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2')""",
        _trigger("conversations_added", "INSERT ON conversations", _add(title_after)),
        _trigger("conversations_changed", "UPDATE OF title ON conversations", _drop(title_before), _add(title_after)),
        _trigger("conversations_deleted", "DELETE ON conversations", _drop(title_before)),
        _trigger("turns_added", "INSERT ON turns", _add(turn_after)),
        _trigger("turns_changed", "UPDATE OF answer ON turns", _drop(turn_before), _add(turn_after)),
        _trigger("turns_deleted", "DELETE ON turns", _drop(turn_before)),
    ):
        db.execute(statement)


def _trigger(name: str, event: str, *statements: str) -> str:
    return f"CREATE TRIGGER {name} AFTER {event} BEGIN {' '.join(statements)} END"


def _add(words: str) -> str:
    return f"INSERT INTO words (rowid, title, question, answer) VALUES ({words});"


def _drop(words: str) -> str:
    """FTS5 must be told what it was made of, or it cannot find the entries."""
    return f"INSERT INTO words (words, rowid, title, question, answer) VALUES ('delete', {words});"


class History(SqliteFile):
    """The conversations in one SQLite file, made when missing. All methods raise QuireError where SQLite fails, and
    where a conversation or a turn does not exist (any more)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _migrations, _WORDING, synchronous="FULL")  # nothing here can be made again

    # Writing

    def begin(self, title: str = "") -> int:
        """Begins a conversation and returns its id. Without a title it is named after its first question."""
        with self._writing():
            return self._begin(transcript.title(title), datetime.now(UTC))

    def add_turn(self, conversation: int, parent: int, question: str, model: str) -> int:
        """Keeps a question before it is answered and returns the turn's id; it is "lost" until finish_turn.

        parent: ROOT, or any turn of the conversation; one that was answered before gets another branch.
        The turn becomes the conversation's current leaf.
        """
        turn = Turn(ROOT, conversation, parent, question, "", "lost", (), UNMEASURED, model, datetime.now(UTC))
        with self._writing():
            added = self._insert(turn)
            name = "UPDATE conversations SET title = ? WHERE id = ? AND title = ''"
            self._execute(name, [transcript.title(question), conversation])
            self._place(conversation, added, turn.created_at)
        return added

    def finish_turn(
        self,
        turn: int,
        answer: str,
        ending: Ending,
        sources: Sequence[Source] = (),
        truth: Truth = UNMEASURED,
        documents: Sequence[Mention] = (),
    ) -> None:
        """Writes what came of a question, in place of what was written of it before."""
        with self._writing():
            written = self._execute(
                "UPDATE turns SET answer = ?, ending = ?, sources = ?, truth = ?, documents = ? WHERE id = ?",
                [
                    *(answer, ending, transcript.pack(list(sources)), transcript.pack(truth)),
                    *(transcript.pack(list(documents)), turn),
                ],
            )
            _found(written.rowcount, "turn", turn)
            self._execute(
                "UPDATE conversations SET updated_at = ? WHERE id = (SELECT conversation FROM turns WHERE id = ?)",
                [transcript.to_stamp(datetime.now(UTC)), turn],
            )

    def take_back(self, turn: int) -> None:
        """Removes a question that came to nothing, and its conversation when nothing else was asked there.

        The conversation goes on where the question was asked. A turn that another one follows cannot be taken back.
        """
        with self._writing():
            taken = _found(self._turns("id = ?", [turn]), "turn", turn)[0]
            self._place(taken.conversation, taken.parent, datetime.now(UTC))
            self._execute("DELETE FROM turns WHERE id = ?", [turn])
            empty = "NOT EXISTS (SELECT 1 FROM turns WHERE conversation = conversations.id)"
            self._execute(f"DELETE FROM conversations WHERE id = ? AND {empty}", [taken.conversation])

    def set_leaf(self, conversation: int, turn: int) -> None:
        """Makes a turn of the conversation, or ROOT, the place where it goes on."""
        self._change(conversation, "leaf = nullif(?, 0)", turn)

    def rename(self, conversation: int, title: str) -> None:
        """Gives a conversation another title; an empty one names it after its first question again."""
        name = transcript.title(title) or self._first_question_as_title(conversation)
        self._change(conversation, "title = ?", name)

    def delete(self, conversation: int) -> None:
        """Deletes a conversation with all its branches."""
        with self._writing():
            deleted = self._execute("DELETE FROM conversations WHERE id = ?", [conversation])
            _found(deleted.rowcount, "conversation", conversation)

    # Reading

    def conversations(self, limit: int, offset: int = 0) -> list[Conversation]:
        """The conversations, the one last written to first."""
        return self._conversations("ORDER BY updated_at DESC, id DESC LIMIT ? OFFSET ?", [max(0, limit), offset])

    def conversation(self, conversation: int) -> Conversation:
        return _found(self._conversations("WHERE id = ?", [conversation]), "conversation", conversation)[0]

    def turns(self, conversation: int) -> list[Turn]:
        """The whole tree, oldest first: every turn comes after its parent."""
        return self._turns("conversation = ?", [conversation])

    def turn(self, turn: int) -> Turn:
        return _found(self._turns("id = ?", [turn]), "turn", turn)[0]

    def children(self, conversation: int, parent: int) -> list[Turn]:
        """The branches that begin after a turn, or at ROOT, oldest first."""
        return self._turns("conversation = ? AND parent IS nullif(?, 0)", [conversation, parent])

    def path_to(self, turn: int) -> list[Turn]:
        """The line of turns from the first to this one; none to ROOT."""
        if turn == ROOT:
            return []
        line = """WITH RECURSIVE line (id) AS (
            SELECT ? UNION SELECT parent FROM turns JOIN line USING (id) WHERE parent IS NOT NULL
        ) SELECT id FROM line"""
        return _found(self._turns(f"id IN ({line})", [turn]), "turn", turn)

    def questions(self, limit: int) -> list[str]:
        """What was asked last in any conversation, each once, the newest last."""
        rows = self._rows("SELECT question FROM turns GROUP BY question ORDER BY max(id) DESC LIMIT ?", [max(0, limit)])
        return [question for (question,) in reversed(rows)]

    def search(self, words: str, limit: int) -> list[HistoryHit]:
        """Titles and turns that hold all the words, or words that begin so, best first (BM25)."""
        rows = self._rows(
            # A word in the title counts 4, in the question 2, in the answer 1. Titles stand at negative ids.
            """SELECT conversations.id, conversations.title, max(words.rowid, 0), snippet(words, -1, '', '', '…', 16)
            FROM words JOIN conversations ON conversations.id = CASE
                WHEN words.rowid < 0 THEN -words.rowid
                ELSE (SELECT conversation FROM turns WHERE turns.id = words.rowid) END
            WHERE words MATCH ? AND rank MATCH 'bm25(4.0, 2.0, 1.0)'
            ORDER BY rank LIMIT ?""",
            [_match_expression(words), max(0, limit)],
        )
        return [HistoryHit(about, title, turn, text[:_SNIPPET_CHARACTERS]) for about, title, turn, text in rows]

    # Export and import

    def export_markdown(self, conversation: int, leaf: int = ROOT) -> str:
        """The line of turns to a leaf with its sources, for reading. ROOT: to where the conversation was left."""
        with self._reading():
            about = self.conversation(conversation)
            line = self.path_to(leaf or about.leaf)
        _found(not line or line[0].conversation == conversation, "turn in this conversation", leaf)
        return transcript.to_markdown(about, line)

    def export_json(self, conversation: int) -> str:
        """The whole tree with everything that is known of it, for import_json. Turns are numbered from 1."""
        with self._reading():
            about, turns = self.conversation(conversation), self.turns(conversation)
        return transcript.to_json(about, turns)

    def import_json(self, text: str) -> int:
        """Adds an exported conversation as a new one and returns its id. All or nothing."""
        about, turns = transcript.from_json(text)
        ids = {ROOT: ROOT}  # by the number in the export
        with self._writing():
            conversation = self._begin(transcript.title(about.title), about.created_at)
            for turn in turns:
                ids[turn.id] = self._insert(replace(turn, conversation=conversation, parent=ids[turn.parent]))
            self._place(conversation, ids[about.leaf], about.updated_at)
        return conversation

    # Inside, writing

    def _begin(self, title: str, now: datetime) -> int:
        return self._insert_row(
            "INSERT INTO conversations (title, created_at, updated_at) VALUES (?, ?, ?)",
            [title, transcript.to_stamp(now), transcript.to_stamp(now)],
        )

    def _insert(self, turn: Turn) -> int:
        """Stores a turn under a new id; that its parent belongs to its conversation is for the foreign key to see."""
        return self._insert_row(
            """INSERT INTO turns
                (conversation, parent, question, answer, ending, sources, truth, model, created_at, documents)
                VALUES (?, nullif(?, 0), ?, ?, ?, ?, ?, ?, ?, ?)""",
            [
                *(turn.conversation, turn.parent, turn.question, turn.answer, turn.ending),
                *(transcript.pack(turn.sources), transcript.pack(turn.truth)),
                *(turn.model, transcript.to_stamp(turn.created_at), transcript.pack(turn.documents)),
            ],
        )

    def _place(self, conversation: int, leaf: int, now: datetime) -> None:
        self._execute(
            "UPDATE conversations SET leaf = nullif(?, 0), updated_at = ? WHERE id = ?",
            [leaf, transcript.to_stamp(now), conversation],
        )

    def _change(self, conversation: int, assignment: str, value: str | int) -> None:
        with self._writing():
            changed = self._execute(f"UPDATE conversations SET {assignment} WHERE id = ?", [value, conversation])
            _found(changed.rowcount, "conversation", conversation)

    def _insert_row(self, sql: str, arguments: Sequence[str | int]) -> int:
        """Returns the new id."""
        return int(self._execute(sql, arguments).lastrowid or 0)

    def _execute(self, sql: str, arguments: Sequence[str | int] = ()) -> sqlite3.Cursor:
        return super()._execute(sql, [_whole(a) if isinstance(a, str) else a for a in arguments])

    # Inside, reading

    def _conversations(self, which: str, arguments: Sequence[int]) -> list[Conversation]:
        rows = self._rows(
            f"""SELECT id, title, (SELECT count(*) FROM turns WHERE conversation = conversations.id),
                ifnull(leaf, 0), created_at, updated_at FROM conversations {which}""",
            arguments,
        )
        with self._readable():
            return [
                Conversation(id, title, turns, leaf, transcript.from_stamp(created), transcript.from_stamp(updated))
                for id, title, turns, leaf, created, updated in rows
            ]

    def _turns(self, where: str, arguments: Sequence[int]) -> list[Turn]:
        rows = self._rows(
            f"""SELECT id, conversation, ifnull(parent, 0), question, answer, ending, sources, truth, model, created_at,
            documents FROM turns WHERE {where} ORDER BY id""",
            arguments,
        )
        with self._readable():
            return [_turn(row) for row in rows]

    def _first_question_as_title(self, conversation: int) -> str:
        """Empty when nothing was asked yet."""
        rows = self._rows("SELECT question FROM turns WHERE conversation = ? ORDER BY id LIMIT 1", [conversation])
        return transcript.title(rows[0][0]) if rows else ""

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """SQLite does not see bytes that changed within a value."""
        try:
            yield
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(error) from error

    def _explanation(self, error: sqlite3.Error | UnicodeEncodeError) -> QuireError:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_CONSTRAINT_FOREIGNKEY":
            return Gone("There is no such conversation, or it has no such turn.", _GONE, repr(error))
        return super()._explanation(error)


def _turn(row: Sequence[Any]) -> Turn:
    stored = dict(zip(_TURN_FIELDS, row, strict=True))
    for packed in ("sources", "truth", "documents"):
        stored[packed] = json.loads(stored[packed])
    return transcript.turn_from(stored)


def _found(found: Found, what: str, number: object) -> Found:
    """What was found or how many, unless it is none."""
    if not found:
        raise Gone(f"There is no {what} {number}.", _GONE)
    return found


def _match_expression(words: str) -> str:
    """The words as an FTS5 query, each quoted and taken as a beginning. FTS5 itself drops punctuation."""
    chosen = words.replace("\0", " ").split()[:_MOST_WORDS]
    quoted = ['"' + word.replace('"', '""') + '"*' for word in chosen]
    return " ".join(quoted) or '""'


def _whole(text: str) -> str:
    """Without lone surrogates, the halves of characters that undecodable input leaves: UTF-8 has no place for them."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
