"""A conversation as it goes on: what is asked and answered is kept while it happens, and given to the model again.

The bridge between the session, which answers, and the history, which remembers. Knows neither screen nor command line.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from quire import paths
from quire.history import ROOT, UNMEASURED, Ending, Gone, History, Source, Truth, Turn
from quire.library import EVERYWHERE, Everywhere
from quire.session import Found, Session
from quire.transcript import Mention
from quire.whole import Account, Part, Plan, WholeFolder, asks_for_all, bare
from quire_engine.engine import never
from quire_engine.errors import Aborted, QuireError
from quire_engine.types import Answered, Event, Exchange, Forecast, Text

Heard = Found | Plan | Part | Account | Event

NEW: Final = 0  # the conversation that its first question begins
_KEEP_SECONDS = 2.0  # of an unfinished answer at most so much is lost when the power fails


def open_history() -> History:
    """The conversations of this person. Each thread opens its own."""
    return History(paths.data_dir() / "history.sqlite")


@dataclass(frozen=True)
class Kept:
    """The question stands in the history. siblings: the turns with the same parent, it among them, oldest first."""

    conversation: int
    turn: int
    siblings: tuple[int, ...]


@dataclass(frozen=True)
class Unkept:
    """The history could not be written. The answer comes all the same."""

    error: QuireError


class Recorder:
    """Asks a session and keeps what comes. Used by one thread; close it, or use it with `with`."""

    def __init__(self) -> None:
        self._opened: list[History] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()

    def ask(
        self,
        session: Session,
        question: str,
        conversation: int = NEW,
        parent: int = ROOT,
        within: Path | Everywhere = EVERYWHERE,
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[Kept | Unkept | Heard]:
        """Asks after a turn of a conversation, or at its ROOT; yields Kept or Unkept, then what Session.ask yields, or,
        for a question that asks for all and so stands alone, what WholeFolder.ask yields.

        A question that fails before the first word is taken back. Raises QuireError as Session.ask does, and when the
        conversation was deleted meanwhile.
        """
        past: Sequence[Exchange] = ()
        try:
            past = exchanges(self._history.path_to(parent))
            kept = self._begin(question, conversation, parent, session.engine.model_name)
        except Gone as error:
            message = "This conversation was deleted in another window."
            raise QuireError(message, "Begin a new one to ask this.", error.message) from error
        except QuireError as error:
            yield Unkept(error)
            yield from _asked(session, question, past, within, should_stop)
            return
        yield kept
        yield from self._recorded(kept.turn, _asked(session, question, past, within, should_stop))

    def questions(self, limit: int) -> list[str]:
        """What was asked last in any conversation, the newest last."""
        return self._history.questions(limit)

    def past(self, turn: int) -> tuple[Exchange, ...]:
        """The turns up to this one, as the model read them."""
        return exchanges(self._history.path_to(turn))

    @property
    def _history(self) -> History:
        if not self._opened:
            self._opened.append(open_history())
        return self._opened[0]

    def _begin(self, question: str, conversation: int, parent: int, model: str) -> Kept:
        conversation = conversation or self._history.begin()
        turn = self._history.add_turn(conversation, parent, question, model)
        return Kept(conversation, turn, tuple(t.id for t in self._history.children(conversation, parent)))

    def _recorded(self, turn: int, events: Iterator[Heard]) -> Iterator[Unkept | Heard]:
        record = _Record()
        kept_at = time.monotonic()
        try:
            for event in events:
                record.hear(event)
                if isinstance(event, Answered):
                    yield from self._finish(turn, record, event.ending)
                elif record.text and time.monotonic() - kept_at > _KEEP_SECONDS:
                    with suppress(QuireError):  # it is said once, at the end
                        self._keep(turn, record, "lost")
                    kept_at = time.monotonic()
                yield event
        except BaseException as error:
            with suppress(QuireError):  # what happened first counts
                if record.text and not record.over:
                    self._keep(turn, record, "lost")
                elif not record.over and isinstance(error, Exception) and not isinstance(error, Aborted):
                    self._history.take_back(turn)
            raise

    def _finish(self, turn: int, record: "_Record", ending: Ending) -> Iterator[Unkept]:
        try:
            self._keep(turn, record, ending)
        except Gone as error:
            message = "This conversation was deleted in another window; the answer is not kept."
            yield Unkept(QuireError(message, "Begin a new one to go on.", error.message))
        except QuireError as error:
            yield Unkept(error)

    def _keep(self, turn: int, record: "_Record", ending: Ending) -> None:
        self._history.finish_turn(turn, record.text, ending, record.sources, record.truth, record.documents)


def _asked(
    session: Session,
    question: str,
    past: Sequence[Exchange],
    within: Path | Everywhere,
    should_stop: Callable[[], bool],
) -> Iterator[Heard]:
    if asks_for_all(question):
        yield from WholeFolder(session).ask(question, within, should_stop)
    else:
        yield from session.ask(question, within, should_stop, history=past)


@dataclass
class _Record:
    """What was heard of one answer so far."""

    pieces: list[str] = field(default_factory=list)
    found: Found = field(default_factory=lambda: Found((), 0.0))
    documents: tuple[Mention, ...] = ()
    forecast: Forecast = UNMEASURED.predicted
    truth: Truth = UNMEASURED
    over: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def sources(self) -> list[Source]:
        hits = self.found.sources
        return [Source(h.path, h.start_line, h.end_line, h.heading, h.text, h.score, h.place) for h in hits]

    def hear(self, event: Heard) -> None:
        match event:
            case Text():
                self.pieces.append(event.text)
            case Found():
                self.found = event
            case Account():
                self.found, self.documents = Found(event.sources, 0.0), event.documents
            case Forecast():
                self.forecast = event
            case Answered():
                self.over = True
                self.truth = Truth(self.found.search_ms, self.forecast, event.tokens, event.timings, event.ratio)


def exchanges(line: Sequence[Turn]) -> tuple[Exchange, ...]:
    """The turns as the model read them. A question that was never answered is left out, and the passages of one that
    was put to all documents, which never stood in one context."""
    return tuple(
        Exchange(() if turn.documents else tuple(s.text for s in turn.sources), bare(turn.question), turn.answer)
        for turn in line
        if turn.answer
    )


class Tree:
    """The turns of a conversation and how they follow each other."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        """turns: every one after its parent, as History.turns gives them."""
        self._turns = {turn.id: turn for turn in turns}
        self._children: dict[int, list[int]] = {ROOT: []}
        for turn in turns:
            self._children[turn.id] = []
            self._children[turn.parent].append(turn.id)

    def siblings(self, turn: int) -> tuple[int, ...]:
        """The turns with the same parent, this one among them, oldest first."""
        return tuple(self._children[self._turns[turn].parent])

    def newest_below(self, turn: int) -> int:
        """The leaf of the branch that was written last among those that go through a turn, or through ROOT."""
        below, newest = [turn], turn
        while below:
            children = self._children[below.pop()]
            below += children
            newest = max([newest, *children])  # every turn is newer than its parent, so that the newest is a leaf
        return newest

    def line(self, leaf: int) -> list[Turn]:
        """From the first turn to this one; none to ROOT."""
        line: list[Turn] = []
        while leaf != ROOT:
            line.append(self._turns[leaf])
            leaf = self._turns[leaf].parent
        return line[::-1]


@dataclass(frozen=True)
class Line:
    """One branch of a conversation, from its first turn to its leaf. siblings: of each turn, as in Kept."""

    turns: tuple[Turn, ...]
    siblings: tuple[tuple[int, ...], ...]


def open_line(history: History, conversation: int, through: int = ROOT) -> Line:
    """The newest branch through a turn, or (ROOT) the one where the conversation was left. It goes on there now."""
    about, tree = history.conversation(conversation), Tree(history.turns(conversation))
    leaf = tree.newest_below(through) if through else about.leaf
    if leaf != about.leaf:
        history.set_leaf(conversation, leaf)
    turns = tree.line(leaf)
    return Line(tuple(turns), tuple(tree.siblings(turn.id) for turn in turns))
