"""The engine thread: owns the session, answers questions, reads folders, and caches while nobody asks.

A question goes first: it waits for one file while a folder is read, and stops caching. Everything the screens learn
comes as messages; only the text of an answer goes through a queue, which the screen empties at its own pace. Knows
nothing of widgets. Session, engine and NumPy are imported here, on the thread, once the first screen is painted.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from textual.message import Message

from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from quire.indexer import CacheProgress, IndexProgress
    from quire.library import Chunk, StoredDocument
    from quire.session import Found, Session
    from quire_engine.types import Answered, Forecast

Letter = Literal["C", "Q", "S"]  # cached, queued, skipped
Doing = Literal["starting", "idle", "reading", "caching", "waiting", "paused", "answering"]

NO_TURN = 0
_MOST_LINES = 8  # about what reading a folder found
_TYPING_SECONDS = 2.0  # caching waits this long after a keystroke
_JOIN_SECONDS = 5.0  # what cannot be interrupted (loading a model) takes less, except on a very busy machine

_numbers = count(1)


@dataclass(frozen=True)
class Turn:
    """A question and the way back of its answer."""

    question: str
    id: int = field(default_factory=lambda: next(_numbers))
    pieces: SimpleQueue[str] = field(default_factory=SimpleQueue)
    stop: Flag = field(default_factory=Flag)


@dataclass(frozen=True)
class Row:
    """One document. waiting: its passages that are not cached yet.  reason: why it was skipped, with what helps."""

    path: Path
    letter: Letter
    passages: int = 0
    waiting: int = 0
    reason: str = ""


@dataclass(frozen=True)
class State:
    """What the thread does and has. read_done, read_total: files.  done, total: passages.  tokens_left: to cache.
    left_ms: how long that will take, 0 while unknown.  reuse_off: why nothing is cached with this model."""

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


class Changed(Message):
    """A new state; the newest one is all that counts."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, Changed)


class Told(Message):
    """Something about an answer other than its text, all of which has been queued when Answered comes."""

    def __init__(self, turn: int, event: "Found | Forecast | Answered") -> None:
        super().__init__()
        self.turn = turn
        self.event = event


class Failed(Message):
    """An error, of a question or (NO_TURN) of anything else."""

    def __init__(self, turn: int, error: QuireError) -> None:
        super().__init__()
        self.turn = turn
        self.error = error


class Noted(Message):
    """What reading a folder found that is worth saying."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__()
        self.lines = lines


class Worker:
    """The thread. Its methods may be called from any other one and return at once, except close()."""

    def __init__(self, open_session: "Callable[[], Session]", post: Callable[[Message], object]) -> None:
        self._open_session = open_session
        self._listener = post
        self._state = State()
        self._turns: deque[Turn] = deque()
        self._added: deque[Path] = deque()
        self._unread: list[Path] = []  # roots whose files may have changed
        self._wake, self._closing, self._paused = Flag(), Flag(), Flag()
        self._cache_wanted = False
        self._typed_at = 0.0
        self._waiting: deque[Chunk] = deque()  # in the order in which they are cached
        self._documents: list[tuple[StoredDocument, tuple[str, ...]]] = []  # with the ids of their passages
        self._passages = 0
        self._thread = Thread(target=self._run, name="quire-engine", daemon=True)

    # For the screens

    def start(self) -> None:
        self._thread.start()

    def ask(self, question: str) -> Turn:
        """Queues a question. Set the turn's `stop` to end its answer early."""
        turn = Turn(question)
        self._turns.append(turn)
        self._wake.set()
        return turn

    def add(self, path: Path) -> None:
        """Adds a folder or file, reads it, and caches it when there is time."""
        self._added.append(path)
        self._wake.set()

    def toggle_pause(self) -> None:
        """Holds caching, or lets it go on. Without anything to cache there is nothing to hold."""
        if self._paused.is_set():
            self._paused.clear()
        elif self._state.done < self._state.total:
            self._paused.set()
        self._wake.set()

    def typed(self) -> None:
        """Somebody is at the keyboard: caching makes room for the question that may come."""
        self._typed_at = time.monotonic()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> bool:
        """Stops whatever runs; what was cached and read is kept. False when the thread did not end in time."""
        self._closing.set()
        self._wake.set()
        if self.alive:
            self._thread.join(_JOIN_SECONDS)
        return not self.alive

    # On the thread

    def _run(self) -> None:
        with ExitStack() as opened:
            session: Session | None = None
            while not self._closing.is_set():
                self._wake.clear()  # before looking: what comes meanwhile wakes the next round
                turn = self._turns.popleft() if self._turns else None
                try:
                    session = session or opened.enter_context(self._open())
                    self._work(session, turn)
                except Aborted:
                    pass  # the reason to stop is the next thing to do
                except Exception as error:
                    self._failed(turn, error)
                    if session is None:
                        self._added.clear()  # the next question tries to open it again
                if not self._asked():
                    self._rest()

    def _open(self) -> "Session":
        from quire.config import BundledModel

        session = self._open_session()
        engine, roots = session.engine, tuple(session.library.roots())
        bundled = isinstance(session.settings.model, BundledModel)
        self._tell(model=engine.model_name, bundled=bundled, reuse_off=engine.known_reuse_off, roots=roots)
        self._list(session)
        self._unread = list(roots)
        return session

    def _work(self, session: "Session", turn: Turn | None) -> None:
        """The one most urgent thing."""
        if turn:
            self._answer(session, turn)
        elif self._added or self._unread:
            self._read(session)
        elif self._cache_wanted and not self._yields():
            self._cache(session)

    def _rest(self) -> None:
        if not self._cache_wanted:
            self._tell(doing="idle")
            self._wake.wait()
        elif self._paused.is_set():
            self._tell(doing="paused", left_ms=0.0)
            self._wake.wait()
        elif typing := self._typing_left():
            self._tell(doing="waiting")
            self._wake.wait(typing)

    def _failed(self, turn: Turn | None, error: Exception) -> None:
        if not isinstance(error, QuireError):
            error = QuireError("Quire made a mistake.", "Please report it with the line below.", repr(error))
        self._post(Failed(turn.id if turn else NO_TURN, error))

    # Questions

    def _answer(self, session: "Session", turn: Turn) -> None:
        from quire.session import Found
        from quire_engine.types import Text

        found: set[str] = set()
        before = self._state.doing
        self._tell(doing="answering")

        def should_stop() -> bool:
            return turn.stop.is_set() or self._closing.is_set()

        events: Iterator[Any] = session.ask(turn.question, should_stop=should_stop)
        for event in events:
            if isinstance(event, Text):
                turn.pieces.put(event.text)
                continue
            if isinstance(event, Found):
                found = {hit.chunk_id for hit in event.sources}
                self._reuse_off(session)
            self._post(Told(turn.id, event))
        # What the answer had to compute is kept, so it no longer waits.
        self._waiting = deque(c for c in self._waiting if c.id not in found or not session.engine.is_cached(c.text))
        self._show_rows()
        self._tell(doing=before)

    # Folders

    def _read(self, session: "Session") -> None:
        from quire import render

        roots, self._unread, new = self._unread, [], False
        while self._added:
            try:
                roots.append(session.library.add_root(self._added.popleft()))
                new = True
            except QuireError as error:
                self._failed(None, error)
        self._tell(doing="reading", read_done=0, read_total=0, roots=tuple(session.library.roots()))
        report = session.index(roots, lambda progress: self._between_files(session, progress))
        self._list(session)
        if new or report.changes or any(skipped.path in roots for skipped in report.skipped):
            lines = render.index_lines(report)
            more = len(lines) - _MOST_LINES
            self._post(Noted((*lines[:_MOST_LINES], *([f"... and {more} more: Ctrl+L"] if more > 0 else []))))

    def _between_files(self, session: "Session", progress: "IndexProgress") -> None:
        """Every file is stored whole, so between two of them a question can be answered."""
        if self._closing.is_set():
            raise Aborted
        self._tell(doing="reading", read_done=progress.done, read_total=progress.total)
        while self._turns:
            turn = self._turns.popleft()
            try:
                self._answer(session, turn)
            except Exception as error:
                self._failed(turn, error)

    def _list(self, session: "Session") -> None:
        """Asks the engine what it has of every document; the waiting passages are cached next."""
        chunks = session.library.all_chunks()
        self._waiting = deque(chunk for chunk in chunks if not session.engine.is_cached(chunk.text))
        self._passages = len(chunks)
        self._documents = [
            (document, tuple(dict.fromkeys(p.chunk_id for p in session.library.chunks_of(document.path))))
            for document in session.library.documents()
        ]
        self._cache_wanted = bool(self._waiting) and not session.engine.known_reuse_off
        self._show_rows()

    def _show_rows(self) -> None:
        waiting = {chunk.id for chunk in self._waiting}
        self._tell(
            rows=tuple(_row(document, ids, waiting) for document, ids in self._documents),
            done=self._passages - len(waiting),
            total=self._passages,
            tokens_left=sum(chunk.tokens for chunk in self._waiting),
        )

    # Caching

    def _cache(self, session: "Session") -> None:
        self._tell(doing="caching")
        self._cache_wanted = False  # until it ends without an error, which would come again and again
        if reason := self._reuse_off(session):
            self._tell(reuse_off=reason)
            return
        speed = _Speed()

        def progress(state: "CacheProgress") -> None:
            while self._waiting and session.engine.is_cached(self._waiting[0].text):
                self._waiting.popleft()
            self._show_rows()
            self._tell(left_ms=speed.left_ms(state))

        done = session.cache(progress, self._yields)
        self._cache_wanted = done.done < done.total

    def _reuse_off(self, session: "Session") -> str:
        """Why nothing is reused. A new model is tried out for some seconds first; quitting breaks that off."""
        if known := session.engine.known_reuse_off:
            return known
        with session.engine.runtime.abortable(self._closing.is_set):
            return session.engine.reuse_off

    def _yields(self) -> bool:
        """Whether something is more urgent than caching."""
        return self._asked() or self._paused.is_set() or self._typing_left() > 0

    def _asked(self) -> bool:
        return bool(self._turns or self._added or self._unread) or self._closing.is_set()

    def _typing_left(self) -> float:
        return max(0.0, self._typed_at + _TYPING_SECONDS - time.monotonic()) if self._typed_at else 0.0

    def _post(self, message: Message) -> None:
        if not self._closing.is_set():
            self._listener(message)

    def _tell(self, **news: Any) -> None:
        state = replace(self._state, **news)
        if state != self._state:
            self._state = state
            self._post(Changed(state))


class _Speed:
    """Turns progress into an estimate, from what this run did: what was cached before must not flatter it."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def left_ms(self, state: "CacheProgress") -> float:
        now = time.monotonic()
        began_at, began_with = self._began = self._began or (now, state.tokens_done)
        tokens = state.tokens_done - began_with
        return 1000 * (now - began_at) / tokens * (state.tokens_total - state.tokens_done) if tokens else 0.0


def _row(document: "StoredDocument", ids: Sequence[str], waiting: set[str]) -> Row:
    if document.state == "skipped":
        return Row(document.path, "S", reason=f"{document.reason}. {document.remedy}".strip())
    left = sum(chunk in waiting for chunk in ids)
    return Row(document.path, "Q" if left else "C", len(ids), left)
