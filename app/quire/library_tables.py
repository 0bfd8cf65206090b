"""The tables of the index, version by version. Knows nothing of what is done with them."""

from sqlite_utils import Database, Migrations

migrations = Migrations("quire.library")


@migrations()
def create_tables(db: Database) -> None:
    """Version 1. The full-text index reads through a view, so that no text is stored twice."""
    for statement in (
        "CREATE TABLE folders (path TEXT PRIMARY KEY)",
        """CREATE TABLE documents (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
            size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL, signature TEXT NOT
            NULL,
            state TEXT NOT NULL, reason TEXT NOT NULL, remedy TEXT NOT NULL)""",
        "CREATE INDEX documents_by_content ON documents (sha256, signature)",
        "CREATE TABLE chunks (id TEXT PRIMARY KEY, text TEXT NOT NULL, tokens INTEGER NOT NULL)",
        """CREATE TABLE passages (id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents,
            ordinal INTEGER NOT NULL, chunk TEXT NOT NULL REFERENCES chunks, start_line INTEGER NOT NULL,
            end_line INTEGER NOT NULL, heading TEXT NOT NULL, UNIQUE (document, ordinal))""",
        "CREATE INDEX passages_by_chunk ON passages (chunk)",
        """CREATE VIEW places AS SELECT passages.id, document, path, name, ordinal, chunk, text, tokens,
            start_line, end_line, heading FROM passages
            JOIN chunks ON chunks.id = chunk JOIN documents ON documents.id = document""",
        """CREATE VIRTUAL TABLE words USING fts5 (text, heading, name,
            content = 'places', content_rowid = 'id', tokenize = 'porter unicode61')""",
    ):
        db.execute(statement)


@migrations()
def create_pins_and_addresses(db: Database) -> None:
    """Version 2. An address is found by tokenizing, which is too slow to do again for a whole library."""
    db.execute("CREATE TABLE pins (path TEXT PRIMARY KEY)")
    db.execute(
        """CREATE TABLE addresses (cache TEXT NOT NULL, chunk TEXT NOT NULL REFERENCES chunks ON DELETE CASCADE,
            address TEXT NOT NULL, PRIMARY KEY (cache, chunk)) WITHOUT ROWID"""
    )
    db.execute("CREATE INDEX addresses_by_chunk ON addresses (chunk)")


@migrations()
def create_place(db: Database) -> None:
    """Version 3. Where a passage stands in a file that is not read by lines."""
    db.execute("ALTER TABLE passages ADD COLUMN place TEXT NOT NULL DEFAULT ''")
    db.execute("DROP VIEW places")
    db.execute(
        """CREATE VIEW places AS SELECT passages.id, document, path, name, ordinal, chunk, text, tokens,
            start_line, end_line, heading, place FROM passages
            JOIN chunks ON chunks.id = chunk JOIN documents ON documents.id = document"""
    )


@migrations()
def create_changed(db: Database) -> None:
    """When a file was last changed, by a clock that nobody sets back for it."""
    db.execute("ALTER TABLE documents ADD COLUMN changed_ns INTEGER NOT NULL DEFAULT 0")


@migrations()
def create_vectors(db: Database) -> None:
    """Version 4. Rows are numbered on and on, so that what came is found without comparing all."""
    db.execute(
        """CREATE TABLE vectors (id INTEGER PRIMARY KEY AUTOINCREMENT, embedder TEXT NOT NULL,
            chunk TEXT NOT NULL REFERENCES chunks ON DELETE CASCADE, vector BLOB NOT NULL, UNIQUE (chunk, embedder))"""
    )
