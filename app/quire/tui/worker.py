"""The engine thread: owns the session, answers questions, reads folders, and caches while nobody asks.

A question goes first: it waits for one file while a folder is read, and stops caching. Everything the screens learn
comes as messages; only the text of an answer goes through a queue, which the screen empties at its own pace. Knows
nothing of widgets. Session, engine and NumPy are imported here, on the thread, once the first screen is painted.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Any

from textual.message import Message

from quire import crash, elsewhere
from quire.keeper import Keeper, LibraryWish
from quire.tui.folders import OnScreen
from quire.tui.messages import (
    NO_TURN,
    START,
    Changed,
    Doing,
    Failed,
    Letter,
    Noted,
    Priced,
    Row,
    State,
    Switched,
    Told,
    Turn,
    Weighed,
    Weighing,
)
from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from quire.config import Settings
    from quire.conversation import Recorder
    from quire.session import Session

__all__ = [
    "NO_TURN",
    "START",
    "Changed",
    "Doing",
    "Failed",
    "Letter",
    "Noted",
    "Row",
    "State",
    "Told",
    "Turn",
    "Worker",
]

# What the command line would do, and where it is done here.
_HERE = (
    ("Ask with fewer passages (--context-tokens)", "Choose fewer context_tokens (F2), name fewer @files"),
    ("Add one: quire add ~/notes", "Add one: /add ~/notes; or try /sample"),
    ("quire status", "Ctrl+L"),
    ("with --model, or see: quire models", "in the models screen (F3)"),
    ("quire config set runtime auto", "runtime auto (F2)"),
    ("quire config set openai_url", "openai_url (F2), such as"),
    ("openai_model: quire config", "openai_model (F2)"),
    ("quire ask --all", "/all"),
)
_TYPING_SECONDS = 2.0  # caching waits this long after a keystroke
_JOIN_SECONDS = 5.0  # what cannot be interrupted (loading a model) takes less, except on a very busy machine


class Worker:
    """The thread. Its methods may be called from any other one and return at once, except close()."""

    def __init__(self, open_session: "Callable[[], Session]", post: Callable[[Message], object]) -> None:
        self._open_session = open_session
        self._listener = post
        self._state = State()
        self._turns: deque[Turn] = deque()
        self._wake, self._closing, self._paused = Flag(), Flag(), Flag()
        self._typed_at = 0.0
        self._recorder: Recorder
        self._weighing: Weighing | None = None
        self._to_price: Settings | None = None
        self._wanted: Settings | None = None
        self._folders = Keeper(
            OnScreen(
                self._tell,
                self._post,
                lambda error: self._failed(None, error),
                self._between,
                self._yields,
                self._wake.set,
                self._reuse_off,
            )
        )
        self._thread = Thread(target=self._run, name="quire-engine", daemon=True)

    # For the screens

    def start(self) -> None:
        self._thread.start()

    def ask(self, question: str, conversation: int = START, parent: int = START) -> Turn:
        """Queues a question after a turn of a conversation. Set the turn's `stop` to end its answer early."""
        turn = Turn(question, conversation, parent)
        self._turns.append(turn)
        self._wake.set()
        return turn

    def add(self, path: Path) -> None:
        """Adds a folder or file, reads it, and caches it when there is time."""
        self._folders.add(path)

    def wish(self, wish: LibraryWish, path: Path) -> None:
        """Wants something done with a document or folder of the library."""
        self._folders.wish(wish, path)

    def toggle_pause(self) -> None:
        """Holds caching, or lets it go on. Without anything to cache there is nothing to hold."""
        if self._paused.is_set():
            self._paused.clear()
        elif self._state.done < self._state.total:
            self._paused.set()
        self._wake.set()

    def weigh(self, text: str, parent: int = START) -> None:
        """Finds out what a text would take as a question after a turn. A newer text replaces an older one."""
        self._weighing = Weighing(text, parent)
        self._wake.set()

    def price(self, settings: "Settings") -> None:
        """Finds out what going over to these settings costs; Priced says it. Newer ones replace older ones."""
        self._to_price = settings
        self._wake.set()

    def use(self, settings: "Settings") -> None:
        """Goes on with these settings, and the model they name, before the next question; Switched follows."""
        self._wanted = settings
        self._wake.set()

    def typed(self) -> None:
        """Somebody is at the keyboard: caching makes room for the question that may come."""
        self._typed_at = time.monotonic()

    @property
    def open(self) -> bool:
        """Whether there is a model to answer with."""
        return bool(self._state.model)

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
        from quire.conversation import Recorder

        with closing(self._folders), Recorder() as self._recorder, ExitStack() as opened:
            session: Session | None = None
            while not self._closing.is_set():
                self._wake.clear()  # before looking: what comes meanwhile wakes the next round
                turn = self._turns.popleft() if self._turns else None
                try:
                    if self._wanted:
                        session = self._switch(opened, session)
                    session = session or opened.enter_context(self._open(self._open_session))
                    self._work(session, turn)
                except Aborted:
                    pass  # the reason to stop is the next thing to do
                except Exception as error:
                    self._failed(turn, error)
                    if session is None:
                        self._folders.not_opened()  # the next question tries to open it again
                        self._to_price = None
                if not self._asked():
                    self._rest()

    def _switch(self, opened: ExitStack, session: "Session | None") -> "Session | None":
        """The session by the settings that are wanted; the one there was, when they cannot be had."""
        from quire import config
        from quire.session import Session

        settings, self._wanted = self._wanted, None
        assert settings
        if session and config.differences(session.settings, settings).keys() <= config.COUNTS_AT_ONCE:
            session.settings = settings
            self._post(Switched(settings))
            return session
        try:
            new = self._open(lambda: Session(settings))
        except Exception as error:
            self._post(Switched(settings, _explained(error)))
            return session
        opened.close()
        self._open_session = lambda: Session(settings)
        self._post(Switched(settings))
        return opened.enter_context(new)

    def _price(self, session: "Session") -> None:
        from quire import models

        settings, self._to_price = self._to_price, None
        assert settings
        try:
            self._post(Priced(settings, models.price(session, settings)))
        except Exception as error:
            self._post(Priced(settings, _explained(error)))

    def _open(self, open_session: "Callable[[], Session]") -> "Session":
        from quire import models
        from quire.config_values import BundledModel

        session = open_session()
        engine, roots = session.engine, tuple(session.library.roots())
        bundled = isinstance(session.settings.model, BundledModel) and not elsewhere.leaves(session.settings)
        name = models.BUNDLED_TITLE if bundled else engine.model_name
        self._tell(model=name, bundled=bundled, reuse_off=engine.known_reuse_off, roots=roots)
        self._folders.opened(session)
        return session

    def _work(self, session: "Session", turn: Turn | None) -> None:
        """The one most urgent thing."""
        if turn:
            self._answer(session, turn)
        elif self._to_price:
            self._price(session)
        elif self._folders.urgent:
            self._folders.work(session)
        elif self._weighing:
            self._weigh(session)
        elif self._folders.wanted and not (self._yields() or self._folders.hold):
            self._folders.cache(session)

    def _rest(self) -> None:
        if not self._folders.wanted:
            self._tell(doing="idle")
            self._wake.wait()
        elif self._paused.is_set():
            self._tell(doing="paused", left_ms=0.0)
            self._wake.wait()
        elif typing := self._typing_left():
            self._tell(doing="waiting", held="")
            self._wake.wait(typing)
        elif hold := self._folders.hold:
            if hold.reason:
                self._tell(doing="waiting", held=hold.reason, left_ms=0.0)
            self._wake.wait(hold.seconds)

    def _failed(self, turn: Turn | None, error: Exception) -> None:
        self._post(Failed(turn.id if turn else NO_TURN, _explained(error)))

    # Questions

    def _answer(self, session: "Session", turn: Turn) -> None:
        from quire.session import Found
        from quire.whole import Plan
        from quire_engine.types import Text

        found: set[str] = set()
        before = self._state.doing
        self._tell(doing="answering")

        def should_stop() -> bool:
            return turn.stop.is_set() or self._closing.is_set()

        place = turn.conversation, turn.parent
        events: Any = self._recorder.ask(session, turn.question, *place, should_stop=should_stop)
        for event in events:
            if isinstance(event, Text):
                turn.pieces.put(event.text)
                continue
            if isinstance(event, Found | Plan):
                found = {h.chunk_id for h in event.sources} if isinstance(event, Found) else set(session.shelf.waiting)
                try:
                    self._reuse_off(session, turn)
                except Aborted:
                    message = "Stopped while the model was tried out, which happens once, at its first question."
                    events.throw(QuireError(message, "Enter asks again."))
            self._post(Told(turn.id, event))
        self._folders.settle(session, found)
        self._tell(doing=before)

    def _weigh(self, session: "Session") -> None:
        """Never says what went wrong: the question itself will."""
        from quire.whole import WholeFolder, asks_for_all

        wanted, self._weighing = self._weighing, None
        if not wanted:
            return
        with suppress(QuireError):
            if asks_for_all(wanted.text):
                self._post(Weighed(wanted.text, WholeFolder(session).weigh(wanted.text)))
            else:
                estimate = session.estimate(wanted.text, self._recorder.past(wanted.parent))
                self._post(Weighed(wanted.text, estimate))

    # Folders

    def _between(self, session: "Session") -> None:
        """A moment at which nothing is half done, so that a question can be answered."""
        if self._closing.is_set():
            raise Aborted
        while self._turns:
            turn = self._turns.popleft()
            try:
                self._answer(session, turn)
            except Exception as error:
                self._failed(turn, error)

    def _reuse_off(self, session: "Session", *answering: Turn) -> str:
        """Why nothing is reused. A new model is tried out for some seconds first; quitting breaks that off, and so does
        the end of a question that waits for it."""
        if known := session.engine.known_reuse_off:
            return known

        def should_stop() -> bool:
            return self._closing.is_set() or any(turn.stop.is_set() for turn in (*answering, *self._turns))

        before = self._state.doing
        self._tell(doing="checking")
        try:
            with session.engine.runtime.abortable(should_stop):
                return session.engine.reuse_off
        finally:
            self._tell(doing=before)

    def _yields(self) -> bool:
        """Whether something is more urgent than caching."""
        return self._asked() or self._paused.is_set() or self._typing_left() > 0

    def _asked(self) -> bool:
        wanted = self._turns or self._folders.urgent or self._weighing or self._to_price or self._wanted
        return bool(wanted) or self._closing.is_set()

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


def _explained(error: Exception) -> QuireError:
    if not isinstance(error, QuireError):
        return crash.explained(error)
    hint = error.hint
    for there, here in _HERE:
        hint = hint.replace(there, here)
    return error if hint == error.hint else QuireError(error.message, hint, error.details)
