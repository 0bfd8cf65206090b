"""Where chunks lie on disk: one file per key below a root, complete or not there at all.

Knows nothing of what a file says; opening hands its bytes to `format`. A file is written under a temporary
name, flushed to the disk and renamed, so a crash, a full disk or a second process writing the same key cannot
leave a half-written one. Lists what lies there, with size and last use, for those who decide what has to go.
Needs a POSIX file system.
"""

import errno
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quire_engine.errors import DamagedChunk, MissingChunk, UnwritableStore
from quire_engine.kv.format import ChunkReader

_SUFFIX = ".kv"
_COUNTER = "written.json"
_TEMPORARY = ".tmp"
_LEFTOVER_AGE_S = 3600.0  # no write takes this long, so what is older was left by a crash
_KEY = re.compile(r"[0-9a-f]{8,128}")
_HINTS = {
    errno.ENOSPC: "The disk is full. Free some space, or let Quire keep less.",
    errno.EDQUOT: "Your disk quota is used up. Free some space, or let Quire keep less.",
    errno.EROFS: "The disk is read-only. Choose another directory for the cache.",
    errno.EACCES: "Quire may not write there. Check who owns the directory.",
}


@dataclass(frozen=True)
class Stored:
    """One chunk on disk. root: of the store it is in.  used_at: when it was last written or opened."""

    root: Path
    key: str
    size_bytes: int
    used_at: float


class KVStore:
    """Chunks by key, a hex string of 8 to 128 lower-case digits; ValueError for anything else.

    Several processes may use one root at the same time. Directories are private to the user.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._swept = False
        self.written_bytes = 0  # by this object

    @property
    def root(self) -> Path:
        return self._root

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def write(self, key: str, data: bytes | bytearray | memoryview) -> int:
        """Store data under the key, in place of what was there; returns its size in bytes.

        When this returns, the chunk survives a power failure. Raises QuireError when the disk is full or
        cannot be written to; the store is then as it was.
        """
        path = self._path(key)
        try:
            self._sweep_once()
            self._make_directories(path.parent)
            _write_atomically(path, memoryview(data).cast("B"))
        except OSError as error:
            raise UnwritableStore(
                f"A passage could not be stored in {self._root}.",
                hint=_HINTS.get(error.errno or 0, "Check the disk and the directory's permissions."),
                details=str(error),
            ) from error
        size_bytes = memoryview(data).nbytes
        self.written_bytes += size_bytes
        _count(self._root, size_bytes)
        return size_bytes

    def open(self, key: str) -> ChunkReader:
        """A reader of the chunk; close it, or use it as a context manager. It outlives the chunk's removal.

        Raises MissingChunk when there is none, DamagedChunk when its header does not check out.
        """
        source = _File(self._path(key))
        try:
            with suppress(OSError):  # another's file, or a disk that is read-only: it just looks unused
                written_ns = self._path(key).stat().st_mtime_ns
                os.utime(
                    self._path(key), ns=(time.time_ns(), written_ns)
                )  # many systems count no reading by themselves
            return ChunkReader(source)
        except BaseException:
            source.close()
            raise

    def drop_from_memory(self, keys: Iterable[str]) -> None:
        """Asks the operating system to forget these chunks' pages, so that the next read comes from the disk."""
        for key in keys:
            fd = os.open(self._path(key), os.O_RDONLY)
            try:
                os.fsync(fd)  # only clean pages can be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def remove(self, key: str) -> None:
        """Forget the chunk; nothing happens when there is none."""
        self._path(key).unlink(missing_ok=True)

    def entries(self) -> list[Stored]:
        """All chunks, in no order."""
        found: list[Stored] = []
        for path in self._files(_SUFFIX):
            with suppress(FileNotFoundError):  # removed by another process meanwhile
                status = path.stat()
                found.append(Stored(self._root, path.stem, status.st_size, max(status.st_atime, status.st_mtime)))
        return found

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(path.stem for path in self._files(_SUFFIX))

    def size_bytes(self) -> int:
        """Bytes of all chunks together."""
        return sum(entry.size_bytes for entry in self.entries())

    def total_written_bytes(self) -> int:
        """Bytes that all processes ever wrote here: what the disk had to bear."""
        with suppress(OSError, ValueError, TypeError, KeyError), open(self._root / _COUNTER, encoding="ascii") as file:
            return int(json.load(file)["bytes"])
        return 0

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a key is 8 to 128 lower-case hex digits, not {key!r}")
        return self._root / key[:2] / key[2:4] / (key + _SUFFIX)

    def _files(self, suffix: str) -> Iterator[Path]:
        return self._root.glob(f"??/??/*{suffix}")

    def _make_directories(self, leaf: Path) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (leaf.parent, leaf):  # one by one: mkdir's mode does not reach parents
            directory.mkdir(mode=0o700, exist_ok=True)

    def _sweep_once(self) -> None:
        """Remove what crashes left behind. With the first write, because only writers leave anything."""
        if self._swept:
            return
        self._swept = True
        for path in self._files(_TEMPORARY):
            with suppress(OSError):  # another process may be sweeping too
                if path.stat().st_mtime < time.time() - _LEFTOVER_AGE_S:
                    path.unlink()


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
    fd, temporary = tempfile.mkstemp(_TEMPORARY, path.stem, path.parent)
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
