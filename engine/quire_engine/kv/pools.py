"""Above the disk and below it: chunks held in memory, and disks slower than the one there is.

A memory pool holds whole files of the chunks that questions found, packed and checked once, the latest longest. What
a question will need is read in the background, in the order in which it is needed, one file after the other, since a
disk with a head would have to move it otherwise. A held chunk is good as long as its file is there and unchanged,
whoever changes it. Knows nothing of where files lie, nor of what chunks are for.
"""

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quire_engine.errors import DamagedChunk
from quire_engine.kv.format import ByteSource, ChunkReader
from quire_engine.kv.memory import MemorySource

Pool = Literal["memory", "disk", ""]
"""Where a chunk would be read from; empty where it is not stored."""

Open = Callable[[Path], ByteSource]
_SHARE_OF_MEMORY = 16
_READS_REMEMBERED, _READS_ENOUGH = 8, 4  # to say how fast the disk is


def usual_bytes() -> int:
    """Of memory that a pool takes unless somebody says otherwise: a small share of this machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE_OF_MEMORY


@dataclass(frozen=True)
class _Version:
    """What tells one state of a file from the next."""

    inode: int
    changed_ns: int
    size_bytes: int


@dataclass(frozen=True)
class _Held:
    version: _Version
    reader: ChunkReader


class MemoryPool:
    """Chunks by their files, never more than limit_bytes together; what was used longest ago leaves first.

    Safe for several threads.
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._held: OrderedDict[Path, _Held] = OrderedDict()  # the latest at the end
        self._held_bytes = 0
        self._wanted: deque[tuple[Path, Open]] = deque()
        self._reading = Path()
        self._works = False
        self._ms_per_byte: deque[float] = deque(maxlen=_READS_REMEMBERED)

    @property
    def size_bytes(self) -> int:
        return self._held_bytes

    def holds(self, path: Path) -> bool:
        with self._changed:
            return self._current(path) is not None

    def prefetch(self, paths: Iterable[Path], source: Open) -> None:
        """Begins to read files in this order, as many as there is room for; what was asked for before and is not read
        yet is forgotten. Files that are missing or damaged are left to whoever opens them."""
        with self._changed:
            self._wanted.clear()
            self._make_room()  # the limit may have changed
            room = self.limit_bytes
            for path in paths:
                version = _version(path)
                if not version or version.size_bytes > room:
                    continue
                room -= version.size_bytes
                if self._current(path):
                    self._held.move_to_end(path)
                elif path != self._reading:
                    self._wanted.append((path, source))
            if self._wanted and not self._works:
                self._works = True
                threading.Thread(target=self._read_wanted, name="quire-prefetch", daemon=True).start()

    def find(self, path: Path) -> ChunkReader | None:
        """The chunk, if it is held or about to be: then this waits for it. Closing the reader does not free it."""
        with self._changed:
            self._changed.wait_for(lambda: path != self._reading and all(path != wanted for wanted, _ in self._wanted))
            held = self._current(path)
            if held:
                self._held.move_to_end(path)
            return held.reader if held else None

    def read_ms(self, size_bytes: int) -> float:
        """What reading so much takes, as fast as the last reads went; 0 while that is not known, and where nothing is
        read ahead."""
        with self._changed:
            known = self.limit_bytes and len(self._ms_per_byte) >= _READS_ENOUGH
            # The fastest: a busy machine makes some reads look slow, a slow disk all of them.
            return size_bytes * min(self._ms_per_byte) if known else 0.0

    def drop(self, path: Path) -> None:
        with self._changed:
            held = self._held.pop(path, None)
            self._held_bytes -= held.version.size_bytes if held else 0

    def _current(self, path: Path) -> _Held | None:
        """What is held, unless the file is another one by now."""
        held = self._held.get(path)
        if held and held.version != _version(path):
            self.drop(path)
            return None
        return held

    def _read_wanted(self) -> None:
        while True:
            with self._changed:
                self._reading = Path()
                self._changed.notify_all()
                if not self._wanted:
                    self._works = False
                    return
                self._reading, source = self._wanted.popleft()
                path = self._reading
            with suppress(Exception):  # whatever it is, whoever opens the chunk finds out; nobody may wait for ever
                began = time.perf_counter()
                held = _read(path, source)
                self._keep(path, held, 1000 * (time.perf_counter() - began))

    def _keep(self, path: Path, held: _Held, took_ms: float) -> None:
        with self._changed:
            self.drop(path)
            self._held[path] = held
            self._held_bytes += held.version.size_bytes
            self._ms_per_byte.append(took_ms / held.version.size_bytes)
            self._make_room()

    def _make_room(self) -> None:
        while self._held_bytes > self.limit_bytes:
            self.drop(next(iter(self._held)))


def _version(path: Path) -> _Version | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Version(found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: Path, open_source: Open) -> _Held:
    """All of a file, checked. Raises MissingChunk, or DamagedChunk, also where it changed meanwhile."""
    before = _version(path)
    source = open_source(path)
    try:
        reader = ChunkReader(MemorySource(bytes(source.read(0, source.size_bytes))))
    finally:
        source.close()
    reader.check()
    if not before or before != _version(path):
        raise DamagedChunk("A stored passage changed while it was read.")
    return _Held(before, reader)


class SlowDisk:
    """A disk that is slower than this one: `Throttled` sources of one share its head. For trying things out.

    seek_ms: paid by every read that does not go on where the last one ended.
    """

    def __init__(self, bytes_per_second: float, seek_ms: float = 0.0) -> None:
        self._bytes_per_second = bytes_per_second
        self._seek_seconds = seek_ms / 1000
        self._lock = threading.Lock()
        self._head: tuple[object, int] = (None, 0)  # source, and where its last read ended
        self._free_at = 0.0
        self.read_bytes = 0
        self.seeks = 0

    def __call__(self, source: ByteSource) -> ByteSource:
        return Throttled(source, self)

    def wait(self, source: object, offset: int, length: int) -> None:
        """As long as the disk would take to read that, after what it is at already."""
        with self._lock:
            seeks = self._head != (source, offset)
            self.seeks += seeks
            self.read_bytes += length
            self._head = (source, offset + length)
            began = max(time.perf_counter(), self._free_at)
            self._free_at = began + self._seek_seconds * seeks + length / self._bytes_per_second
            ready_at = self._free_at
        time.sleep(max(0.0, ready_at - time.perf_counter()))


class Throttled:
    """A source that is read as slowly as a disk reads."""

    def __init__(self, source: ByteSource, disk: SlowDisk) -> None:
        self._source = source
        self._disk = disk

    @property
    def size_bytes(self) -> int:
        return self._source.size_bytes

    def read(self, offset: int, length: int) -> bytes | memoryview:
        data = self._source.read(offset, length)
        self._disk.wait(self, offset, len(data))
        return data

    def close(self) -> None:
        self._source.close()
