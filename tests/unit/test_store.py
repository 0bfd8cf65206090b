"""The store: files complete or absent, whatever happens to the writer, and private to the user."""

import errno
import multiprocessing
import os
import random
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quire_engine.errors import DamagedChunk, MissingChunk, QuireError
from quire_engine.kv import codec
from quire_engine.kv.format import to_bytes
from quire_engine.kv.store import KVStore
from quire_engine.types import BitPlan, ChunkKV

KEY = "ab" * 32
OTHER = "cd" * 32


def chunk_bytes(fill: float, tokens: int = 6, layers: int = 2) -> bytes:
    """A chunk whose every number is `fill`, so that a reader can tell whose bytes it got."""
    numbers = np.full((layers, tokens, 2, 8), fill, np.float16)
    return to_bytes(
        codec.encode(ChunkKV(numbers, numbers, {}), BitPlan.exact(layers), codec.text_order(tokens)),
        bytes(32),
    )


def read_fill(store: KVStore, key: str) -> float:
    """The one number a whole chunk consists of."""
    with store.open(key) as reader:
        kv = codec.decode(reader.chunk())
    numbers = np.unique(np.stack([kv.k_pre, kv.v]))
    assert len(numbers) == 1
    return float(numbers[0])


@pytest.fixture
def store(tmp_path: Path) -> KVStore:
    return KVStore(tmp_path / "cache" / "kv")


def leftovers(root: Path) -> list[Path]:
    return list(root.rglob("*.tmp"))


def test_write_open_replace_remove(store: KVStore) -> None:
    assert not store.has(KEY)
    assert (store.keys(), store.size_bytes()) == ([], 0)
    data = chunk_bytes(1.0)
    assert store.write(KEY, data) == len(data)
    assert store.write(OTHER, memoryview(bytearray(data))) == len(data)
    assert store.has(KEY)
    assert (store.keys(), store.size_bytes()) == ([KEY, OTHER], 2 * len(data))
    store.write(KEY, chunk_bytes(2.0))
    assert (read_fill(store, KEY), read_fill(store, OTHER)) == (2.0, 1.0)
    store.remove(KEY)
    store.remove(KEY)
    assert store.keys() == [OTHER]
    with pytest.raises(MissingChunk, match=KEY) as missing:
        store.open(KEY)
    assert missing.value.hint


def test_files_fan_out_and_are_private(store: KVStore, tmp_path: Path) -> None:
    store.write(KEY, b"x")
    path = tmp_path / "cache" / "kv" / "ab" / f"{KEY}.kv"
    assert path.read_bytes() == b"x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in list(path.parents)[:3]:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("key", ["", "abc", "../../../etc", "ABCDEF0123", "ab/" * 8, "a" * 129, "abababab\n"])
def test_only_hex_keys_reach_the_disk(store: KVStore, key: str) -> None:
    with pytest.raises(ValueError, match="lower-case hex"):
        store.write(key, b"x")
    with pytest.raises(ValueError, match="lower-case hex"):
        store.has(key)


def test_a_reader_outlives_replacement_and_removal(store: KVStore) -> None:
    store.write(KEY, chunk_bytes(1.0))
    with store.open(KEY) as reader:
        store.write(KEY, chunk_bytes(2.0))
        store.remove(KEY)
        assert float(codec.decode(reader.chunk()).v.max()) == 1.0


def test_damage_is_found_at_opening_or_reading(store: KVStore, tmp_path: Path) -> None:
    store.write(KEY, chunk_bytes(1.0))
    path = next(tmp_path.rglob("*.kv"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with store.open(KEY) as reader, pytest.raises(DamagedChunk):
        reader.chunk()
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for length in (0, 10, 400, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedChunk):
            store.open(KEY)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_disk_that_cannot_be_read_is_damage(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.write(KEY, chunk_bytes(1.0))
    with store.open(KEY) as reader, monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        with pytest.raises(DamagedChunk, match="could not be read") as damage:
            reader.layer(0)
    assert "Input/output error" in damage.value.details


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_leaves_the_store_as_it_was(
    store: KVStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    store.write(KEY, chunk_bytes(1.0))
    for key in (KEY, OTHER):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(QuireError, match="could not be stored") as failure:
                store.write(key, chunk_bytes(2.0))
        assert os.strerror(number) in failure.value.details
        assert ("Free some space" in failure.value.hint) == (number != errno.EIO)
    assert leftovers(tmp_path) == []
    assert store.keys() == [KEY]
    assert read_fill(store, KEY) == 1.0
    store.write(OTHER, chunk_bytes(3.0))
    assert read_fill(store, OTHER) == 3.0


def test_a_disk_that_fills_up_in_the_middle(store: KVStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short writes are continued; then the disk is full."""
    write, room = os.write, [400, 400, 0]

    def short_write(fd: int, data: memoryview) -> int:
        if not (count := room.pop(0)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:count])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short_write)
        with pytest.raises(QuireError, match="could not be stored"):
            store.write(KEY, chunk_bytes(1.0))
        assert room == []
        room += [5000] * 10
        store.write(KEY, chunk_bytes(4.0))
    assert read_fill(store, KEY) == 4.0
    assert leftovers(tmp_path) == []


def test_the_file_is_flushed_before_its_name_and_the_name_before_returning(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(fd: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def spy_replace(source: str, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    store.write(KEY, b"x")
    assert events == ["directory", "file", "rename", "directory"], "the first one is of the new folder's name"
    events.clear()
    store.write(KEY, b"x")
    assert events == ["file", "rename", "directory"]


def test_a_root_that_cannot_exist(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = KVStore(tmp_path / "file" / "kv")
    with pytest.raises(QuireError, match="could not be stored") as failure:
        store.write(KEY, b"x")
    assert failure.value.hint
    assert store.keys() == []
    assert not store.has(KEY)


def write_forever(root: Path, payloads: list[bytes], started: threading.Event) -> None:
    store = KVStore(root)
    started.set()
    while True:
        for data in payloads:
            store.write(KEY, data)


def test_killed_writers_leave_nothing_wrong(tmp_path: Path) -> None:
    """Two processes write the same key for ever and are killed, twenty times over."""
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)
    payloads = [chunk_bytes(fill, tokens=2000, layers=4) for fill in (1.0, 2.0)]
    store = KVStore(tmp_path)
    for _ in range(10):
        started = fork.Event()
        writers = [
            fork.Process(target=write_forever, args=(tmp_path, payloads, started), daemon=True) for _ in range(2)
        ]
        for writer in writers:
            writer.start()
        assert started.wait(10)
        for writer in writers:
            time.sleep(rng.uniform(0.001, 0.04))
            assert writer.is_alive()
            writer.kill()
        for writer in writers:
            writer.join(10)
            assert writer.exitcode == -9
        assert store.keys() in ([], [KEY])
        if store.has(KEY):
            assert read_fill(store, KEY) in (1.0, 2.0)
    assert store.has(KEY)
    assert leftovers(tmp_path)  # or no writer was hit while writing, and this test showed nothing
    store.write(KEY, payloads[0])
    assert read_fill(store, KEY) == 1.0


def test_many_threads_write_and_read_one_key(store: KVStore) -> None:
    payloads = {fill: chunk_bytes(fill, tokens=300) for fill in (1.0, 2.0, 3.0, 4.0)}
    store.write(KEY, payloads[1.0])

    def write_then_read(fill: float) -> float:
        store.write(KEY, payloads[fill])
        return read_fill(store, KEY)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(write_then_read, [*payloads] * 10)) <= set(payloads)


def test_what_was_written_is_counted_for_ever_and_by_all(store: KVStore, tmp_path: Path) -> None:
    assert (store.written_bytes, store.total_written_bytes()) == (0, 0)
    store.write(KEY, b"x" * 100)
    store.write(KEY, b"x" * 100)
    store.remove(KEY)
    other = KVStore(tmp_path / "cache" / "kv")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: other.write(f"{i:064x}", b"x" * 7), range(100)))
    assert (store.written_bytes, other.written_bytes) == (200, 700)
    assert store.total_written_bytes() == other.total_written_bytes() == 900
    (store.root / "written.json").write_text("damaged, and longer than what will be written")
    assert store.total_written_bytes() == 0
    store.write(KEY, b"x" * 5)
    assert store.total_written_bytes() == 5


def test_opening_says_that_a_chunk_was_used(store: KVStore) -> None:
    """For whoever makes the catalogue again from the files."""
    store.write(KEY, chunk_bytes(1.0))
    path = next(store.root.rglob(f"{KEY}.kv"))
    os.utime(path, (1000, 900))
    store.open(KEY).close()
    assert path.stat().st_atime > time.time() - 100
    assert path.stat().st_mtime == 900, "and not that it was written"


def test_checking_reads_everything(store: KVStore) -> None:
    data = to_bytes_of(KEY)
    store.write(KEY, data)
    store.check(KEY)
    path = next(store.root.rglob(f"{KEY}.kv"))
    for place in range(0, len(data), 50):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DamagedChunk):
            store.check(KEY)
    store.write(OTHER, data)
    with pytest.raises(DamagedChunk, match="not the one"):
        store.check(OTHER)
    with pytest.raises(MissingChunk):
        store.check("ee" * 32)


def to_bytes_of(key: str) -> bytes:
    numbers = np.ones((2, 6, 2, 8), np.float16)
    packed = codec.encode(ChunkKV(numbers, numbers, {}), BitPlan.uniform(2, 4, 4), codec.text_order(6))
    return to_bytes(packed, bytes.fromhex(key))
