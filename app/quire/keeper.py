"""Keeps folders by itself: adds, watches and reads them, and caches what is read while nothing is more urgent.

Text first: what was read is searchable before any of it is cached. The terminal application and `quire watch` share
this; who runs it is its host, which decides when: everything here runs on the host's thread, except `add`, `wish` and
`touched`, which only take a note. Knows nothing of questions and their answers, nor of screens.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from quire import paths
from quire.idle import Idleness, somebody_asks
from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from quire.indexer import Change, IndexProgress, IndexReport
    from quire.session import Session
    from quire.shelf import CacheProgress
    from quire.watcher import Watcher

LibraryWish = Literal["pin", "unpin", "recache", "remove"]

_MOST_LINES = 8  # about what reading a folder found
_MOST_EDITS = 20
_BATTERY_SECONDS = 10.0  # until the next look
_ASKED_SECONDS = 0.1
_ASKED_LOOK_SECONDS = 0.02  # it is asked for at every step of the model
_LONGEST_REST_SECONDS = 10.0
_REMEMBERED = 0.9  # of what earlier passages took, at each step


@dataclass(frozen=True)
class Edit:
    """A document that was changed. at: seconds since 1970.  passages: of `total`, had to be read again, with `tokens`;
    left: the ids of those that are not yet.  ms: what the others took."""

    at: float
    path: Path
    passages: int
    total: int
    tokens: int
    ms: float
    left: frozenset[str]


@dataclass(frozen=True)
class Hold:
    """Why caching waits, and for how many seconds at least. No reason: for a moment, not worth telling."""

    reason: str
    seconds: float


class Host(Protocol):
    """Who runs a keeper: gives it time, and is told what happens."""

    def wake(self) -> None:
        """There is something to do. Called on any thread."""

    def yields(self) -> bool:
        """Whether something is more urgent than caching. Asked all the time."""

    def between(self, session: "Session") -> None:
        """A moment at which nothing is half done; raises Aborted to end the work."""

    def reuse_off(self, session: "Session") -> str:
        """Why nothing is cached with this model, which may have to be tried out first."""

    def say(self, lines: Sequence[str], more: int = 0) -> None:
        """What is worth telling a person; more: lines that are left out. Called on any thread."""

    def failed(self, error: Exception) -> None: ...
    def reading(self, roots: Sequence[Path], done: int, total: int) -> None: ...
    def has_roots(self, roots: Sequence[Path]) -> None: ...
    def caching(self) -> None: ...
    def off(self, reason: str) -> None:
        """Nothing is cached with this model."""

    def show(self, session: "Session", edits: tuple[Edit, ...]) -> None:
        """What is cached, or what is known of it, changed. edits: the newest first."""

    def estimate(self, left_ms: float) -> None:
        """How long caching the rest will take, by the speed so far; 0 while unknown."""

    def budget(self, used_up: bool) -> None: ...


class Keeper:
    """The folders of the library. wanted: something waits to be cached, and nothing speaks against it."""

    def __init__(self, host: Host, idleness: Idleness | None = None) -> None:
        self._host = host
        self._idleness = idleness or Idleness()
        self._added: deque[Path] = deque()
        self._wishes: deque[tuple[LibraryWish, Path]] = deque()
        self._touched: deque[frozenset[Path]] = deque()
        self._unread: list[Path] = []  # roots whose files may have changed
        self._unlisted = False
        self._gone: frozenset[Path] = frozenset()  # roots that were not there when last looked for
        self._edits: tuple[Edit, ...] = ()  # the newest first
        self._watcher: Watcher | None = None
        self._watched: list[Path] = []
        self._session: Session | None = None  # for its settings, which may change at any time
        self._speed = _Speed()
        self._rest_until = self._asked_until = self._looked_at = 0.0
        self.wanted = False

    # From any thread

    def add(self, path: Path) -> None:
        self._added.append(path)
        self._host.wake()

    def wish(self, wish: LibraryWish, path: Path) -> None:
        self._wishes.append((wish, path))
        self._host.wake()

    def touched(self, paths: frozenset[Path]) -> None:
        self._touched.append(paths)
        self._host.wake()

    def _unwatched(self, path: Path, reason: str) -> None:
        if path.exists():  # that it is not there, reading it says
            self._host.say((f"{path} cannot be watched: {reason}. It is looked through every minute.",))

    # On the thread

    @property
    def urgent(self) -> bool:
        return bool(self._added or self._wishes or self._touched or self._unread or self._unlisted)

    @property
    def hold(self) -> Hold | None:
        """What speaks against caching right now, besides what the host has to do."""
        now = time.monotonic()
        if now - self._looked_at > _ASKED_LOOK_SECONDS:
            self._looked_at = now
            if somebody_asks(paths.data_dir()):
                self._asked_until = now + _ASKED_SECONDS
        if now < self._asked_until:
            return Hold("another Quire answers a question", self._asked_until - now)
        if self._considerate and self._idleness.on_battery:
            return Hold("this computer runs on battery", _BATTERY_SECONDS)
        if self._considerate and now < self._rest_until:
            return Hold("", self._rest_until - now)  # others keep the machine busy
        return None

    @property
    def _considerate(self) -> bool:
        return self._session is not None and self._session.settings.considerate

    def opened(self, session: "Session") -> None:
        """A session was opened, perhaps with another model than before."""
        self._session, self._unread, self._unlisted = session, session.library.roots(), True

    def look_for_roots(self, session: "Session") -> None:
        """What another process added or removed meanwhile is kept from now on, or no longer."""
        roots = session.library.roots()
        if self._watcher and set(roots) != set(self._watched):
            self._unread = [root for root in roots if root not in self._watched]
            self._watch(session)
            self._unlisted = True

    def not_opened(self) -> None:
        self._added.clear()

    def close(self) -> None:
        if self._watcher:
            self._watcher.close()

    def work(self, session: "Session") -> None:
        """The one most urgent thing."""
        if self._unlisted:
            self._unlisted = False
            self._list(session)
        elif self._wishes:
            self._fulfil(session, *self._wishes.popleft())
        elif self._added or self._unread:
            self._read(session)
        elif self._touched:
            self._read_again(session)

    def settle(self, session: "Session", passages: Collection[str]) -> None:
        """An answer may have stored these passages."""
        session.shelf.settle(passages)
        waiting = session.shelf.waiting
        self._edits = tuple(replace(edit, left=edit.left & waiting.keys()) for edit in self._edits)
        self._host.show(session, self._edits)

    # Reading

    def _read(self, session: "Session") -> None:
        """Folders that were added, and at the start all of them."""
        from quire import render

        roots, self._unread, new = self._unread, [], False
        while self._added:
            try:
                roots.append(session.library.add_root(self._added.popleft()))
                new = True
            except QuireError as error:
                self._host.failed(error)
        self._watch(session)  # before reading: what changes meanwhile is read again
        report = self._index(session, roots)
        self._gone = frozenset(skipped.path for skipped in report.skipped if skipped.path in roots)
        if new or report.changes or any(skipped.path in roots for skipped in report.skipped):
            self._note(render.index_lines(report))

    def _read_again(self, session: "Session") -> None:
        """What changed while the folders are watched."""
        from quire import render

        changed: set[Path] = set()
        while self._touched:
            changed |= self._touched.popleft()
        roots = session.library.roots()
        report = self._index(session, sorted(p for p in changed if any(p.is_relative_to(root) for root in roots)))
        lost = [f"{s.path.name} cannot be read any more: {s.reason}." for s in report.skipped if s.lost]
        missing = {skipped.path: skipped.remedy for skipped in report.skipped if skipped.path in roots}
        gone = [f"{path} is gone; its documents are kept. {missing[path]}" for path in missing.keys() - self._gone]
        back = [f"{path} is there again." for path in (self._gone & changed) - missing.keys()]
        self._gone = (self._gone - changed) | missing.keys()
        self._note([*back, *map(render.change_line, report.changes), *lost, *gone])

    def _index(self, session: "Session", places: Sequence[Path]) -> "IndexReport":
        roots = session.library.roots()
        self._host.reading(roots, 0, 0)

        def progress(progress: "IndexProgress") -> None:
            """Every file is stored whole, so between two of them a question can be answered."""
            self._host.between(session)
            self._host.reading(roots, progress.done, progress.total)

        report = session.index(places, progress)
        self._log(report.changes)
        self._list(session)
        return report

    def _note(self, lines: Sequence[str]) -> None:
        if lines:
            self._host.say(tuple(lines[:_MOST_LINES]), max(0, len(lines) - _MOST_LINES))

    def _log(self, changes: "Iterable[Change]") -> None:
        now = time.time()
        edits = [
            Edit(now, change.path, change.chunks_new, change.chunks_total, change.tokens_new, 0.0, change.new)
            for change in changes
            if change.kind == "changed"
        ]
        self._edits = (*reversed(edits), *self._edits)[:_MOST_EDITS]

    def _watch(self, session: "Session") -> None:
        from quire.watcher import Watcher

        self._watcher = self._watcher or Watcher(self.touched, self._unwatched)
        self._watched = session.library.roots()
        self._watcher.watch(self._watched)

    # What somebody wants done with a document or folder

    def _fulfil(self, session: "Session", wish: LibraryWish, path: Path) -> None:
        library = session.library
        match wish:
            case "pin":
                library.pin(path)
            case "unpin":
                library.unpin(path)
            case "recache":
                session.shelf.drop(path)
            case "remove":
                library.remove_root(path)
                self._watch(session)
                self._host.has_roots(library.roots())
        self._list(session)

    # Caching

    def _list(self, session: "Session") -> None:
        """What is cached of every document; what is not is cached next."""
        session.shelf.refresh(lambda: self._host.between(session))
        self.wanted = bool(session.shelf.waiting) and not session.engine.known_reuse_off
        self._host.budget(False)
        if notice := session.take_notice():
            self._note([notice])
        self._host.show(session, self._edits)

    def cache(self, session: "Session") -> None:
        """Caches what waits, until something is more urgent or speaks against it."""
        self._host.caching()
        self.wanted = False  # until it ends without an error, which would come again and again
        try:
            reason = self._host.reuse_off(session)
        except Aborted:
            self.wanted = True  # somebody could not wait; it goes on afterwards
            raise
        if reason:
            self._host.off(reason)
            return

        def progress(state: "CacheProgress") -> None:
            self._edits = tuple(_cached(edit, state) for edit in self._edits)
            self._host.show(session, self._edits)
            busy = self._considerate and self._idleness.busy  # then half of the time is for others
            if busy:
                self._rest_until = time.monotonic() + min(state.took_ms / 1000, _LONGEST_REST_SECONDS)
            self._host.estimate(self._speed.left_ms(state) * (2 if busy else 1))

        self._speed.begin()
        session.embed(self._host.yields)  # finding comes first
        done = session.shelf.cache(progress, lambda: self._host.yields() or self.hold is not None)
        self.wanted = done.done < done.total and not done.over_budget
        self._host.budget(done.over_budget)
        self._host.show(session, self._edits)


def _cached(edit: Edit, state: "CacheProgress") -> Edit:
    """The edit with its share of what caching some passages took."""
    if not (finished := edit.left.intersection(state.finished)):
        return edit
    ms = state.took_ms * len(finished) / len(state.finished)
    return replace(edit, ms=edit.ms + ms, left=edit.left - finished)


class _Speed:
    """Turns progress into an estimate, by what caching took lately; what was cached before does not flatter it."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._last: CacheProgress | None = None
        self._at = 0.0

    def begin(self) -> None:
        """The time since the last progress was spent on something else."""
        self._last = None

    def left_ms(self, state: "CacheProgress") -> float:
        now = time.monotonic()
        if self._last:
            self._tokens = _REMEMBERED * self._tokens + state.tokens_done - self._last.tokens_done
            self._seconds = _REMEMBERED * self._seconds + now - self._at
        self._last, self._at = state, now
        left = state.tokens_total - state.tokens_done
        return 1000 * self._seconds / self._tokens * left if self._tokens > 0 else 0.0
