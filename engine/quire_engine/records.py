"""Small facts kept between runs (verdicts, costs) as JSON files that are whole or not there. Knows no meanings."""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def save(path: Path, record: dict[str, Any]) -> None:
    """Writes beside and renames: a reader in any process sees the old record or the new one.

    A disk that cannot be written to costs the record, which can be found out again, and nothing else.
    """
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(".tmp", path.stem, path.parent)
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(record, file)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):  # renamed
                os.unlink(temporary)


def load(path: Path) -> dict[str, Any]:
    """The record; empty when there is none that can be read, since everything kept here can be found out again."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
