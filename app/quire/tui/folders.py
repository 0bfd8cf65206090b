"""What the engine thread does about folders: adds, watches and reads them, lists what is cached, and caches the rest.

A part of the worker, which decides when: everything here runs on its thread, except `add`, `wish` and `touched`, which
only take a note. Knows nothing of questions and their answers, nor of widgets.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from textual.message import Message

from quire.tui.messages import Edit, LibraryWish, Noted, Row
from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from quire.indexer import Change, IndexProgress, IndexReport
    from quire.session import Session
    from quire.shelf import CacheProgress, Item
    from quire.watcher import Watcher

_MOST_LINES = 8  # about what reading a folder found
_MOST_EDITS = 20


@dataclass(frozen=True)
class Host:
    """What is asked of the worker. tell: a new state.  post: a message for the screens.  failed: an error to show.
    between: a question may be answered now; raises Aborted when the application closes.  yields: something is more
    urgent than caching.  wake: there is something to do.  reuse_off: why nothing is cached with this model."""

    tell: Callable[..., None]
    post: Callable[[Message], None]
    failed: Callable[[Exception], None]
    between: "Callable[[Session], None]"
    yields: Callable[[], bool]
    wake: Callable[[], None]
    reuse_off: "Callable[[Session], str]"


class Folders:
    """The folders of the library. wanted: something waits to be cached, and nothing speaks against it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._added: deque[Path] = deque()
        self._wishes: deque[tuple[LibraryWish, Path]] = deque()
        self._touched: deque[frozenset[Path]] = deque()
        self._unread: list[Path] = []  # roots whose files may have changed
        self._unlisted = False
        self._gone: frozenset[Path] = frozenset()  # roots that were not there when last looked for
        self._edits: tuple[Edit, ...] = ()  # the newest first
        self._watcher: Watcher | None = None
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
            self._host.post(Noted((f"{path} cannot be watched: {reason}. It is looked through every minute.",)))

    # On the thread

    @property
    def urgent(self) -> bool:
        return bool(self._added or self._wishes or self._touched or self._unread or self._unlisted)

    def opened(self, session: "Session") -> None:
        """A session was opened, perhaps with another model than before."""
        self._unread, self._unlisted = session.library.roots(), True

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
        self._show(session)

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
        """What changed while the application is open."""
        from quire import render

        paths: set[Path] = set()
        while self._touched:
            paths |= self._touched.popleft()
        roots = session.library.roots()
        report = self._index(session, sorted(p for p in paths if any(p.is_relative_to(root) for root in roots)))
        lost = [f"{s.path.name} cannot be read any more: {s.reason}." for s in report.skipped if s.lost]
        missing = {skipped.path: skipped.remedy for skipped in report.skipped if skipped.path in roots}
        gone = [f"{path} is gone; its documents are kept. {missing[path]}" for path in missing.keys() - self._gone]
        back = [f"{path} is there again." for path in (self._gone & paths) - missing.keys()]
        self._gone = (self._gone - paths) | missing.keys()
        self._note([*back, *map(render.change_line, report.changes), *lost, *gone])

    def _index(self, session: "Session", paths: Sequence[Path]) -> "IndexReport":
        self._host.tell(doing="reading", read_done=0, read_total=0, roots=tuple(session.library.roots()))

        def progress(progress: "IndexProgress") -> None:
            """Every file is stored whole, so between two of them a question can be answered."""
            self._host.between(session)
            self._host.tell(doing="reading", read_done=progress.done, read_total=progress.total)

        report = session.index(paths, progress)
        self._log(report.changes)
        self._list(session)
        return report

    def _note(self, lines: Sequence[str]) -> None:
        more = len(lines) - _MOST_LINES
        rest = [f"... and {more} more: Ctrl+L"] if more > 0 else []
        if lines:
            self._host.post(Noted((*lines[:_MOST_LINES], *rest)))

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
        self._watcher.watch(session.library.roots())

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
                self._host.tell(roots=tuple(library.roots()))
        self._list(session)

    # Caching

    def _list(self, session: "Session") -> None:
        """What is cached of every document; what is not is cached next."""
        session.shelf.refresh(lambda: self._host.between(session))
        self.wanted = bool(session.shelf.waiting) and not session.engine.known_reuse_off
        self._host.tell(over_budget=False)
        if notice := session.take_notice():
            self._note([notice])
        self._show(session)

    def _show(self, session: "Session") -> None:
        shelf = session.shelf
        progress, usage = shelf.progress(), shelf.usage()
        self._host.tell(
            rows=tuple(_row(item, shelf.tokens, shelf.waiting) for item in shelf.items),
            done=progress.done,
            total=progress.total,
            tokens_left=progress.tokens_total - progress.tokens_done,
            disk_bytes=usage.disk_bytes,
            limit_bytes=usage.limit_bytes,
            written_bytes=usage.written_bytes,
            total_written_bytes=usage.total_written_bytes,
            edits=self._edits,
            pins=tuple(shelf.pins),
        )

    def cache(self, session: "Session") -> None:
        """Caches what waits, until something is more urgent."""
        self._host.tell(doing="caching")
        self.wanted = False  # until it ends without an error, which would come again and again
        try:
            reason = self._host.reuse_off(session)
        except Aborted:
            self.wanted = True  # somebody could not wait; it goes on afterwards
            raise
        if reason:
            self._host.tell(reuse_off=reason)
            return
        speed = _Speed()

        def progress(state: "CacheProgress") -> None:
            self._edits = tuple(_cached(edit, state) for edit in self._edits)
            self._show(session)
            self._host.tell(left_ms=speed.left_ms(state))

        done = session.shelf.cache(progress, self._host.yields)
        self.wanted = done.done < done.total and not done.over_budget
        self._host.tell(over_budget=done.over_budget)
        self._show(session)


def _cached(edit: Edit, state: "CacheProgress") -> Edit:
    """The edit with its share of what caching some passages took."""
    if not (finished := edit.left.intersection(state.finished)):
        return edit
    ms = state.took_ms * len(finished) / len(state.finished)
    return replace(edit, ms=edit.ms + ms, left=edit.left - finished)


class _Speed:
    """Turns progress into an estimate, from what this run did: what was cached before must not flatter it."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def left_ms(self, state: "CacheProgress") -> float:
        now = time.monotonic()
        began_at, began_with = self._began = self._began or (now, state.tokens_done)
        tokens = state.tokens_done - began_with
        left = state.tokens_total - state.tokens_done
        return 1000 * (now - began_at) / tokens * left if tokens > 0 else 0.0


def _row(item: "Item", tokens: Mapping[str, int], waiting: Collection[str]) -> Row:
    document = item.document
    if document.state == "skipped":
        return Row(document.path, "S", reason=f"{document.reason}. {document.remedy}".strip(), pinned=item.pinned)
    left = sum(passage in waiting for passage in item.passages)
    length = sum(tokens.get(passage, 0) for passage in item.passages)
    return Row(document.path, "Q" if left else "C", len(item.passages), left, "", length, item.pinned)
