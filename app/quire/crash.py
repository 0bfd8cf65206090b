"""What is left when Quire itself makes a mistake: a log with the traceback, and one line that says where it is.

A traceback holds lines of Quire's own code and the message of the error, never the values of variables, which may be
text of documents. Knows nothing of screens and of the engine; it must not fail itself, so it never raises.
"""

import os
import platform
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime

from quire import __version__, paths
from quire_engine.errors import QuireError

_MOST_BYTES = 500_000  # then the log becomes quire.log.1, and a new one begins
_MOST_CHARACTERS = 500  # of a line: the message of an error can quote what it stumbled over


def keep(error: BaseException) -> str:
    """Writes the error to the log; returns the sentence that says where, or that it could not be written."""
    try:
        path = paths.log_dir() / "quire.log"
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            path.replace(path.with_suffix(".log.1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8", errors="replace") as log:
            log.write(_entry(error))
    except (OSError, QuireError) as problem:
        return f"What happened could not be written to a log: {problem}."
    return f"What happened is in {path}."


def explained(error: BaseException) -> QuireError:
    """The error as a person is told it, after it was kept in the log."""
    details = _cut(f"{type(error).__name__}: {error}")
    return QuireError("Quire made a mistake.", f"{keep(error)} Please report it.", details)


def watch_threads(tell: Callable[[QuireError], object]) -> None:
    """From now on an error that ends a thread is kept in the log and told."""

    def hook(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            tell(explained(ended.exc_value))

    threading.excepthook = hook


def _entry(error: BaseException) -> str:
    system = f"Quire {__version__}, Python {platform.python_version()}, {platform.platform()}"
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    frames = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join([f"{moment} {system}, thread {threading.current_thread().name}", *map(_cut, frames), "\n"])


def _cut(line: str) -> str:
    return line[:_MOST_CHARACTERS]
