"""What the engine thread and the screens say to each other: questions one way, messages and the state the other.

Knows nothing of widgets, nor of how anything is answered, read or cached.
"""

from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from typing import TYPE_CHECKING, Literal

from textual.message import Message

from quire.keeper import Edit
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.config import Settings
    from quire.conversation import Kept, Unkept
    from quire.models import Price
    from quire.session import Estimate, Found
    from quire.whole import Account, Part, Plan
    from quire_engine.types import Answered, Forecast

Letter = Literal["C", "Q", "S"]  # cached, queued, skipped
Doing = Literal["starting", "idle", "reading", "caching", "checking", "waiting", "paused", "answering"]

NO_TURN = 0
START = 0  # before the first question: history.ROOT, and the number of no conversation

_numbers = count(1)


@dataclass(frozen=True)
class Turn:
    """A question and the way back of its answer.

    conversation, parent: where it is asked, by their numbers in the history; START: in a new one, at its beginning.
    """

    question: str
    conversation: int = START
    parent: int = START
    id: int = field(default_factory=lambda: next(_numbers))
    pieces: SimpleQueue[str] = field(default_factory=SimpleQueue)
    stop: Flag = field(default_factory=Flag)


@dataclass(frozen=True)
class Row:
    """One document. waiting: its passages that are not cached yet.  reason: why it was skipped, with what helps.
    pinned: it, or a folder around it, is."""

    path: Path
    letter: Letter
    passages: int = 0
    waiting: int = 0
    reason: str = ""
    tokens: int = 0
    pinned: bool = False


@dataclass(frozen=True)
class State:
    """What the thread does and has. read_done, read_total: files.  done, total: passages.  tokens_left: to cache.
    left_ms: how long that will take, 0 while unknown.  held: why caching waits, where nobody here made it.
    reuse_off: why nothing is cached with this model.  disk_bytes: of KV, of all models; limit_bytes: the budget, 0 for
    none; over_budget: the rest does not fit it.  written_bytes: since the application is open; total_written_bytes:
    ever.  edits: the newest first."""

    doing: Doing = "starting"
    model: str = ""
    bundled: bool = False
    reuse_off: str = ""
    roots: tuple[Path, ...] = ()
    rows: tuple[Row, ...] = ()
    read_done: int = 0
    read_total: int = 0
    done: int = 0
    total: int = 0
    tokens_left: int = 0
    left_ms: float = 0.0
    held: str = ""
    disk_bytes: int = 0
    limit_bytes: int = 0
    over_budget: bool = False
    written_bytes: int = 0
    total_written_bytes: int = 0
    edits: tuple[Edit, ...] = ()
    pins: tuple[Path, ...] = ()


class Changed(Message):
    """A new state; the newest one is all that counts."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, Changed)


class Told(Message):
    """Something about an answer other than its text, all of which has been queued when Answered comes."""

    def __init__(self, turn: int, event: "Kept | Unkept | Found | Forecast | Plan | Part | Account | Answered") -> None:
        super().__init__()
        self.turn = turn
        self.event = event


class Failed(Message):
    """An error, of a question or (NO_TURN) of anything else."""

    def __init__(self, turn: int, error: QuireError) -> None:
        super().__init__()
        self.turn = turn
        self.error = error


@dataclass(frozen=True)
class Weighing:
    """A text in the prompt, and the turn that it would follow."""

    text: str
    parent: int


class Weighed(Message):
    """What a text in the prompt would take if it were asked, of the passages that are found or of all."""

    def __init__(self, text: str, estimate: "Estimate | Plan") -> None:
        super().__init__()
        self.text = text
        self.estimate = estimate


class Priced(Message):
    """What going over to these settings would cost; error: why that is not possible."""

    def __init__(self, settings: "Settings", price: "Price | QuireError") -> None:
        super().__init__()
        self.settings = settings
        self.price = price


class Switched(Message):
    """The engine thread goes on with these settings; error: why it stays with those it had."""

    def __init__(self, settings: "Settings", error: QuireError | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.error = error


class Noted(Message):
    """What reading a folder found that is worth saying."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__()
        self.lines = lines
