"""Where chunks lie on disk: one file per key below a root, complete or not there at all.

Knows nothing of what a file says; opening hands its bytes to `format`. A file is written under a temporary
name, flushed to the disk and renamed, so a crash, a full disk or a second process writing the same key cannot
leave a half-written one. What happens to files is told to an index, if there is one, which nothing here relies on.
Needs a POSIX file system.
"""

import errno
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from quire_engine import records
from quire_engine.errors import DamagedChunk, MissingChunk, UnwritableStore
from quire_engine.kv.format import BEGINNING_BYTES, ByteSource, ChunkReader
from quire_engine.kv.pools import MemoryPool, Pool

SUFFIX = ".kv"
TEMPORARY = ".tmp"  # of files that are being written, or were when something went wrong
KEY = re.compile(r"[0-9a-f]{8,128}")
FOLDER = re.compile(r"[0-9a-f]{2}")  # keys are spread over these by how they begin
_COUNTER = "written.json"
_ABOUT = "about.json"
_HINTS = {
    errno.ENOSPC: "The disk is full. Free some space, or let Quire keep less.",
    errno.EDQUOT: "Your disk quota is used up. Free some space, or let Quire keep less.",
    errno.EROFS: "The disk is read-only. Choose another directory for the cache.",
    errno.EACCES: "Quire may not write there. Check who owns the directory.",
}


class Index(Protocol):
    """Is told what happens to chunks, by the name of their store, and knows who computes which. Never raises."""

    def written(self, store: str, key: str, beginning: bytes, size_bytes: int, seconds: float, uses: float) -> None: ...
    def used(self, store: str, key: str) -> None: ...
    def removed(self, store: str, key: str) -> None: ...
    def claim(self, store: str, key: str) -> bool: ...
    def release(self, store: str, key: str) -> None: ...


class NoIndex:
    """Takes no notes, and lets everybody compute everything."""

    def written(self, store: str, key: str, beginning: bytes, size_bytes: int, seconds: float, uses: float) -> None:
        pass

    def used(self, store: str, key: str) -> None:
        pass

    def removed(self, store: str, key: str) -> None:
        pass

    def claim(self, store: str, key: str) -> bool:
        return True

    def release(self, store: str, key: str) -> None:
        pass


_NO_INDEX = NoIndex()


def _this_disk(source: ByteSource) -> ByteSource:
    return source


class KVStore:
    """Chunks by key, a hex string of 8 to 128 lower-case digits; ValueError for anything else.

    Several processes may use one root at the same time. Directories are private to the user.
    """

    def __init__(self, root: Path, index: Index = _NO_INDEX, model: str = "", memory: MemoryPool | None = None) -> None:
        """model: whose chunks these are, for people; written down with the first one.  memory: above the disk; none
        unless given."""
        self._root = root
        self._index = index
        self._model = model
        self._memory = memory or MemoryPool()
        self.disk: Callable[[ByteSource], ByteSource] = _this_disk  # another one, for trying slow ones out
        self.written_bytes = 0  # by this object

    @property
    def root(self) -> Path:
        return self._root

    @property
    def model(self) -> str:
        """Whose chunks these are; empty when that is not known."""
        return self._model or str(records.load(self._root / _ABOUT).get("model", ""))

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def write(self, key: str, data: bytes | bytearray | memoryview, seconds: float = 0.0, uses: float = 0.0) -> int:
        """Store data under the key, in place of what was there; returns its size in bytes.

        seconds: that computing it took; 0: not measured.  uses: that this counts as; 0: it is only expected to be used.
        When this returns, the chunk survives a power failure. Raises QuireError when the disk is full or
        cannot be written to; the store is then as it was.
        """
        path = self._path(key)
        try:
            self._make_directories(path.parent)
            _write_atomically(path, memoryview(data).cast("B"))
        except OSError as error:
            raise UnwritableStore(
                f"A passage could not be stored in {self._root}.",
                hint=_HINTS.get(error.errno or 0, "Check the disk and the directory's permissions."),
                details=str(error),
            ) from error
        view = memoryview(data).cast("B")
        self.written_bytes += view.nbytes
        _count(self._root, view.nbytes)
        self._index.written(self._root.name, key, bytes(view[:BEGINNING_BYTES]), view.nbytes, seconds, uses)
        return view.nbytes

    def open(self, key: str) -> ChunkReader:
        """A reader of the chunk; close it, or use it as a context manager. It outlives the chunk's removal.

        Raises MissingChunk when there is none, DamagedChunk when its header does not check out.
        """
        path = self._path(key)
        reader = self._memory.find(path) or self._from_disk(path)
        with suppress(OSError):  # another's file, or a disk that is read-only: it just looks unused
            # Many systems count no reading by themselves.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        self._index.used(self._root.name, key)
        return reader

    def prefetch(self, keys: Sequence[str]) -> None:
        """Begins to read chunks into memory, in this order, in the background; `open` waits for those under way."""
        self._memory.prefetch(map(self._path, keys), self._source)

    def where(self, key: str) -> Pool:
        """Where the chunk would be read from at this moment."""
        path = self._path(key)
        if self._memory.holds(path):
            return "memory"
        return "disk" if path.exists() else ""

    def read_ms(self, key: str) -> float:
        """What reading the chunk from the disk takes, as the last ones went; 0 where it is in memory or not stored."""
        path = self._path(key)
        with suppress(OSError):
            return 0.0 if self._memory.holds(path) else self._memory.read_ms(path.stat().st_size)
        return 0.0

    def _from_disk(self, path: Path) -> ChunkReader:
        source = self._source(path)
        try:
            return ChunkReader(source)
        except BaseException:
            source.close()
            raise

    def _source(self, path: Path) -> ByteSource:
        return self.disk(_File(path))

    def check(self, key: str) -> None:
        """Reads all of a chunk. Raises MissingChunk, or DamagedChunk when a byte is wrong or it is another's."""
        source = _File(self._path(key))
        try:
            reader = ChunkReader(source)
            if reader.header.key.hex() != key:
                raise DamagedChunk("A stored passage is not the one its name says.")
            reader.check()
        finally:
            source.close()

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Within it other processes know that this one computes the chunk; False where another one does already."""
        mine = self._index.claim(self._root.name, key)
        try:
            yield mine
        finally:
            if mine:
                self._index.release(self._root.name, key)

    def drop_from_memory(self, keys: Iterable[str]) -> None:
        """Forgets these chunks, and asks the operating system to, so that the next read comes from the disk."""
        for key in keys:
            self._memory.drop(self._path(key))
            fd = os.open(self._path(key), os.O_RDONLY)
            try:
                os.fsync(fd)  # only clean pages can be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def remove(self, key: str) -> bool:
        """Forget the chunk; nothing happens when there is none. False where the disk does not allow it."""
        self._memory.drop(self._path(key))
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError:
            return False
        self._index.removed(self._root.name, key)
        return True

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(path.stem for path in self._files())

    def size_bytes(self) -> int:
        """Bytes of all chunks together."""
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):  # removed by another process meanwhile
                total += path.stat().st_size
        return total

    def total_written_bytes(self) -> int:
        """Bytes that all processes ever wrote here: what the disk had to bear."""
        with suppress(OSError, ValueError, TypeError, KeyError), open(self._root / _COUNTER, encoding="ascii") as file:
            return int(json.load(file)["bytes"])
        return 0

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"a key is 8 to 128 lower-case hex digits, not {key!r}")
        return self._root / key[:2] / (key + SUFFIX)

    def _files(self) -> Iterator[Path]:
        return self._root.glob(f"??/*{SUFFIX}")

    def _make_directories(self, folder: Path) -> None:
        if folder.is_dir():
            return
        for directory in (self._root.parent, self._root, folder):  # one by one: mkdir's mode does not reach parents
            directory.mkdir(mode=0o700, parents=directory == self._root.parent, exist_ok=True)
        _flush_directory(self._root)
        if self._model and not (self._root / _ABOUT).exists():
            records.save(self._root / _ABOUT, {"version": 1, "model": self._model})


class _File:
    """An open chunk file. `os.pread` has no position to share, so threads may read at once."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingChunk(
                f"No passage is stored under {path.stem}.",
                hint="It is computed again; nothing needs to be done.",
            ) from None
        except OSError as error:
            raise _unreadable(error) from error
        self.size_bytes = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise _unreadable(error) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unreadable(error: OSError) -> DamagedChunk:
    return DamagedChunk(
        "A stored passage could not be read from the disk.",
        hint="It is computed again. If this repeats, check the disk.",
        details=str(error),
    )


def _write_atomically(path: Path, data: memoryview) -> None:
    fd, temporary = tempfile.mkstemp(TEMPORARY, path.stem, path.parent)
    try:
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_directory(path.parent)


def _count(root: Path, size_bytes: int) -> None:
    """Adds to the counter beside the chunks. It is worth no flush: after a power failure it may lag behind."""
    with suppress(OSError):
        fd = os.open(root / _COUNTER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                before = int(json.loads(os.pread(fd, 100, 0))["bytes"])
            except (ValueError, TypeError, KeyError):  # new, or damaged
                before = 0
            text = json.dumps({"version": 1, "bytes": before + size_bytes}).encode("ascii")
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))
        finally:
            os.close(fd)


def _flush_directory(directory: Path) -> None:
    """Make a rename in the directory survive a power failure."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
