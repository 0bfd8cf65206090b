"""Fetching a model while the application is used: one at a time, on a thread of its own.

Says how far it is as messages, at most ten a second. Knows nothing of screens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Literal

from textual.message import Message

from quire import crash, models
from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from quire.download import Fetching

_PAUSE_S = 0.1
_JOIN_S = 2.0


@dataclass(frozen=True)
class Pull:
    """One fetching. source: as it was asked for.  total_bytes, left_s: 0 while unknown.  error: why it failed."""

    source: str
    state: Literal["running", "done", "stopped", "failed"] = "running"
    done_bytes: int = 0
    total_bytes: int = 0
    left_s: float = 0.0
    error: QuireError | None = None


def sentence(pull: Pull) -> str:
    """Fetching qwen3-4b: 1.2 GB of 2.5 GB, about 3 min left"""
    from quire.render import duration, size

    name = pull.source.rsplit("/", 1)[-1]
    match pull.state:
        case "done":
            return f"{name} is here. Enter uses it."
        case "stopped":
            return f"{name}: stopped at {size(pull.done_bytes)}, which is kept. Fetching it again goes on from there."
        case "failed":
            return f"{name} could not be fetched: {pull.error.message if pull.error else 'unknown reason'}"
    of = f" of {size(pull.total_bytes)}" if pull.total_bytes else ""
    left = f", about {duration(1000 * pull.left_s)} left" if pull.left_s else ""
    return f"Fetching {name}: {size(pull.done_bytes)}{of}{left}"


class Pulled(Message):
    """A new state of the fetching."""

    def __init__(self, pull: Pull) -> None:
        super().__init__()
        self.pull = pull


class Puller:
    """At most one fetching at a time. post: where messages go."""

    def __init__(self, post: Callable[[Message], object]) -> None:
        self._post = post
        self._stop = Flag()
        self._thread: Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, source: str) -> bool:
        """Begins, or goes on; False while another one runs."""
        if self.running:
            return False
        self._stop = Flag()
        # A daemon: a server that hangs must not keep the application from ending. What came is on disk.
        self._thread = Thread(target=self._run, args=(source, self._stop), name="quire-fetch", daemon=True)
        self._thread.start()
        return True

    def stop(self) -> None:
        """Ends it soon; what came is kept."""
        self._stop.set()

    def close(self) -> None:
        """Stops, and waits a moment."""
        self.stop()
        if self._thread:
            self._thread.join(_JOIN_S)

    def _run(self, source: str, stop: Flag) -> None:
        pull, told_at, began = Pull(source), 0.0, time.monotonic()
        first_bytes = -1

        def progress(at: "Fetching") -> None:
            nonlocal pull, told_at, first_bytes
            now = time.monotonic()
            first_bytes = at.done_bytes if first_bytes < 0 else first_bytes
            came, missing = at.done_bytes - first_bytes, at.total_bytes - at.done_bytes
            left_s = (now - began) * missing / came if came > 0 and missing > 0 else 0.0
            pull = replace(pull, done_bytes=at.done_bytes, total_bytes=at.total_bytes, left_s=left_s)
            if now - told_at >= _PAUSE_S:
                told_at = now
                self._tell(pull, stop)

        self._tell(pull, stop)
        try:
            models.pull(source, progress, stop.is_set)
            self._tell(replace(pull, state="done"), stop)
        except Aborted:
            self._post(Pulled(replace(pull, state="stopped")))  # the only thing that is said after stop()
        except QuireError as error:
            self._tell(replace(pull, state="failed", error=error), stop)
        except Exception as error:
            self._tell(replace(pull, state="failed", error=crash.explained(error)), stop)

    def _tell(self, pull: Pull, stop: Flag) -> None:
        if not stop.is_set():
            self._post(Pulled(pull))
