"""Notices what changes in folders while they are open, and says so when it has settled.

A save is often several events: a temporary file, a rename, a backup. So paths are collected until nothing more came
for a moment, then handed over together. A folder that cannot be watched (too many watches, a network mount, not there)
is said so of, once, and is to be looked through as a whole now and then instead; the others too, but rarely, because a
full queue loses events. One that is renamed, removed or put back while it is watched is handed over itself, within
seconds; so is a folder in it whose permissions or ignore files change.

Knows which names are never looked at; knows nothing of what the files say or what becomes of them.
"""

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Lock, Thread
from types import TracebackType
from typing import Literal, Self

from watchdog.events import (
    EVENT_TYPE_CLOSED_NO_WRITE,
    EVENT_TYPE_MODIFIED,
    EVENT_TYPE_OPENED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

from quire import ignore
from quire.documents import left_out
from quire.ignore import Rules

_SETTLED_SECONDS = 0.7
_LATEST_SECONDS = 5.0  # a file that is written to all the time does not hold up the others for longer
_RESCAN_SECONDS = 60.0
_SWEEP_SECONDS = 600.0
_GLANCE_SECONDS = 3.0  # no event tells that a watched folder itself was renamed
_JOIN_SECONDS = 2.0
_MOST_PATHS = 500  # of so many at once some may have been missed: the whole folder is looked through
_READING = {EVENT_TYPE_OPENED, EVENT_TYPE_CLOSED_NO_WRITE}  # ours, for example
# What other machines change there is not noticed here.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "fuse.rclone", "fuse.s3fs"}
_NOWHERE = (0, 0)  # the identity of what is not there
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Pace:
    """How long to wait, in seconds: until changes have settled; between two looks at what cannot be watched; between
    two glances whether what is watched is still there; between two looks at everything."""

    settled: float = _SETTLED_SECONDS
    rescan: float = _RESCAN_SECONDS
    glance: float = _GLANCE_SECONDS
    sweep: float = _SWEEP_SECONDS


class Watcher:
    """Watches from the first `watch` until `close`; both are called on one thread, the callbacks come on another.

    changed: paths that may be new, different or gone: of files, folders, or a whole watched folder.
    unwatched: a folder that cannot be watched, and why.
    """

    def __init__(
        self,
        changed: Callable[[frozenset[Path]], None],
        unwatched: Callable[[Path, str], None],
        pace: Pace = Pace(),  # noqa: B008  # frozen
    ) -> None:
        self._changed = changed
        self._unwatched = unwatched
        self._pace = pace
        self._observer: BaseObserver = Observer()
        self._roots: dict[Path, _Root] = {}
        self._changing_roots = Lock()  # not _news: the observer holds a lock of its own while it calls _collect
        self._collected: set[Path] = set()
        self._first_at = self._last_at = 0.0
        self._news = Condition()
        self._closing = Event()
        self._thread = Thread(target=self._run, name="quire-watcher", daemon=True)

    def watch(self, roots: Collection[Path]) -> None:
        """From now on these folders and files, and no others."""
        if not self._thread.is_alive():
            self._observer.start()
            self._thread.start()
        with self._changing_roots:
            for path in self._roots.keys() - set(roots):
                self._roots.pop(path).stop()
            for path in set(roots) - self._roots.keys():
                self._roots[path] = root = _Root(path, self._observer, self._collect)
                if reason := root.start():
                    self._unwatched(path, reason)

    def close(self) -> None:
        """No callback comes afterwards, unless one is running that does not return."""
        self._closing.set()
        with self._news:
            self._news.notify()
        if self._thread.is_alive():
            self._observer.stop()
            self._thread.join(_JOIN_SECONDS)
            self._observer.join(_JOIN_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # On the observer's thread

    def _collect(self, root: Path, paths: Collection[Path]) -> None:
        with self._news:
            self._collected |= {root} if len(self._collected) > _MOST_PATHS else set(paths)
            self._last_at = time.monotonic()
            self._first_at = self._first_at or self._last_at
            self._news.notify()

    # On its own thread

    def _run(self) -> None:
        rescan_at = time.monotonic() + self._pace.rescan
        glance = min(self._pace.glance, self._pace.rescan)
        glance_at = time.monotonic() + glance
        sweep_at = time.monotonic() + self._pace.sweep
        while not self._closing.is_set():
            with self._news:
                now = time.monotonic()
                if not self._closing.is_set():
                    self._news.wait(max(0.0, min(glance_at, self._settled_at(now)) - now))
                settled = self._take() if self._settled_at(time.monotonic()) <= time.monotonic() else frozenset()
            if settled and not self._closing.is_set():
                self._changed(settled)
            if time.monotonic() >= glance_at and not self._closing.is_set():
                rescans, sweeps = time.monotonic() >= rescan_at, time.monotonic() >= sweep_at
                self._look(rescans, sweeps)
                glance_at = time.monotonic() + glance
                rescan_at = time.monotonic() + self._pace.rescan if rescans else rescan_at
                sweep_at = time.monotonic() + self._pace.sweep if sweeps else sweep_at

    def _settled_at(self, now: float) -> float:
        if not self._collected:
            return now + self._pace.rescan
        return min(self._last_at + self._pace.settled, self._first_at + _LATEST_SECONDS)

    def _take(self) -> frozenset[Path]:
        taken, self._collected, self._first_at = frozenset(self._collected), set(), 0.0
        for root in list(self._roots.values()) if taken else ():
            root.rules.forget()  # an ignore file may be among what changed
        return taken

    def _look(self, rescans: bool, sweeps: bool) -> None:
        """What went away or came back is handed over; when it is time, also what cannot be watched, or everything."""
        with self._changing_roots:
            needs = {path: root.needs_look() for path, root in self._roots.items()}
            look = frozenset(p for p, need in needs.items() if need == "changed" or (rescans and need) or sweeps)
        if look:
            self._changed(look)


class _Root:
    """One folder or file that was added, watched while that is possible."""

    def __init__(self, path: Path, observer: BaseObserver, collect: Callable[[Path, Collection[Path]], None]) -> None:
        self.rules = Rules(path)
        self._path = path
        self._observer = observer
        self._handler = _Handler(path, self.rules, collect)
        self._watch: ObservedWatch | None = None
        self._identity = _NOWHERE  # of the folder for which watching was tried

    def start(self) -> str:
        """Why it cannot be watched; empty when it is."""
        try:
            folder = self._folder()
            self._identity = _identity(folder)
            if kind := network_mount(self._path):
                return f"it lies on a network ({kind})"
            self._watch = self._observer.schedule(self._handler, str(folder), recursive=folder == self._path)
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return ""

    def stop(self) -> None:
        if not self._watch:
            return
        with suppress(KeyError, OSError):
            self._observer.remove_handler_for_watch(self._handler, self._watch)  # other files may share the watch
            if self._watch.is_recursive:
                self._observer.unschedule(self._watch)
        self._watch = None

    def needs_look(self) -> Literal["", "unwatched", "changed"]:
        """Whether something may have been missed: it went away or came back, or it is not watched."""
        was_there = self._identity != _NOWHERE
        try:
            same = _identity(self._folder()) == self._identity
        except OSError:
            self.stop()
            self._identity = _NOWHERE
            return "changed" if was_there else ""
        if same:  # then trying again would fail again, and each failure costs watches (watchdog 6 keeps them)
            return "" if self._watch else "unwatched"
        self.stop()
        self.start()
        return "changed"

    def _folder(self) -> Path:
        """What is watched. A file is replaced by most editors, so its folder is."""
        os.stat(self._path)
        return self._path if self._path.is_dir() else self._path.parent


class _Handler(FileSystemEventHandler):
    """What happens in one watched folder, without what is never looked at."""

    def __init__(self, root: Path, rules: Rules, collect: Callable[[Path, Collection[Path]], None]) -> None:
        self._root = root
        self._rules = rules
        self._collect = collect
        self._closed: set[Path] = set()  # folders that cannot be listed

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in _READING:
            return
        paths = {Path(os.fsdecode(path)) for path in (event.src_path, event.dest_path) if path}
        if event.is_directory and event.event_type == EVENT_TYPE_MODIFIED:
            paths = {path for path in paths if self._opens_or_closes(path)}  # the rest is told of by itself
        if noted := {place for path in paths for place in self._noted(path)}:
            self._collect(self._root, noted)

    def _opens_or_closes(self, folder: Path) -> bool:
        """Whether its permissions changed so that it can be listed now, or no longer."""
        closed, was_closed = not os.access(folder, os.R_OK | os.X_OK), folder in self._closed
        (self._closed.add if closed else self._closed.discard)(folder)
        return closed != was_closed and folder.exists()

    def _noted(self, path: Path) -> Collection[Path]:
        """The path itself, or the folder for which an ignore file counts; nothing where nobody looks."""
        place = path.parent if path.name in ignore.NAMES else path
        if not place.is_relative_to(self._root) or left_out(self._root, place) or self._rules.leaves_out(place):
            return ()
        return (place,)


def network_mount(path: Path, mounts: Path = _MOUNTS) -> str:
    """The kind of network file system that a path lies on; empty for local ones, and where that cannot be known."""
    best, kind = -1, ""
    with suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            before, _, after = line.partition(" - ")
            point = Path(_unescaped(before.split()[4]))
            if path.is_relative_to(point) and len(point.parts) >= best:
                best, kind = len(point.parts), after.split()[0]
    return kind if kind in _NETWORK else ""


def _unescaped(text: str) -> str:
    for character in " \t\n\\":
        text = text.replace(f"\\{ord(character):03o}", character)
    return text


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
