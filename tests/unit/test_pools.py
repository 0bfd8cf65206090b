"""The memory pool above the disk, and disks slower than this one: what is read, how often, and when it is forgotten."""

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from quire_engine.errors import DamagedChunk, MissingChunk
from quire_engine.kv import codec, format, pools, transfer
from quire_engine.kv.format import ByteSource
from quire_engine.kv.memory import MemorySource
from quire_engine.kv.pools import MemoryPool, SlowDisk
from quire_engine.kv.store import KVStore
from quire_engine.kv.transfer import Placement
from quire_engine.types import BitPlan, ChunkKV, Float16, Rope

KEYS = [f"{number:02x}" * 32 for number in range(8)]
LAYERS, TOKENS, HEADS, DIM = 3, 100, 2, 16


def chunk(key: str, fill: int = 0, tokens: int = TOKENS) -> bytes:
    numbers = np.random.default_rng([int(key[:2], 16), fill]).standard_normal((2, LAYERS, tokens, HEADS, DIM))
    k, v = numbers.astype(np.float16)
    return format.encoded(ChunkKV(k, v, {}), BitPlan.uniform(LAYERS, 4, 3), key)


@dataclass
class Disk:
    """Counts what is read of every file; may be held up, or turn damaged."""

    reads: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def __call__(self, source: ByteSource) -> ByteSource:
        return _Counted(source, self)


@dataclass
class _Counted:
    source: ByteSource
    disk: Disk

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes

    def read(self, offset: int, length: int) -> bytes | memoryview:
        self.disk.reached.set()
        assert self.disk.gate.wait(20)
        data = self.source.read(offset, length)
        self.disk.reads.append(len(data))
        return data

    def close(self) -> None:
        self.source.close()


SIZE = len(chunk(KEYS[0]))


def make(root: Path, room: int = 4) -> tuple[KVStore, MemoryPool, Disk]:
    """A store of eight chunks below memory with room for some of them."""
    memory, disk = MemoryPool(room * SIZE), Disk()
    store = KVStore(root, memory=memory)
    store.disk = disk
    for key in KEYS:
        if not store.has(key):
            store.write(key, chunk(key))
    return store, memory, disk


def held(store: KVStore) -> set[str]:
    return {key for key in KEYS if store.where(key) == "memory"}


def numbers(store: KVStore, key: str) -> Float16:
    with store.open(key) as reader:
        return codec.decode(reader.chunk()).k_pre


def fetch(store: KVStore, *keys: str) -> None:
    """Prefetches and waits."""
    store.prefetch(keys)
    for key in keys:
        store.open(key).close()


def test_what_was_prefetched_is_read_once_and_is_the_same(tmp_path: Path) -> None:
    store, memory, disk = make(tmp_path)
    straight = numbers(store, KEYS[1])
    one_read = sum(disk.reads)
    assert (store.where(KEYS[1]), store.where("ff" * 32)) == ("disk", "")
    disk.reads.clear()
    fetch(store, KEYS[1])
    assert store.where(KEYS[1]) == "memory"
    for _ in range(3):
        assert np.array_equal(numbers(store, KEYS[1]), straight)
    store.prefetch([KEYS[1]])
    assert disk.reads == [SIZE], "one read of the whole file"
    assert one_read >= SIZE
    assert memory.size_bytes == SIZE


def test_bytes_in_memory_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, _ = make(tmp_path)
    fetch(store, KEYS[0])
    monkeypatch.setattr(zlib, "crc32", lambda _: pytest.fail("checked again"))
    numbers(store, KEYS[0])
    with pytest.raises(pytest.fail.Exception):
        numbers(store, KEYS[1])


def test_nothing_is_promoted_without_being_asked_for_or_without_room(tmp_path: Path) -> None:
    store, _, disk = make(tmp_path)
    numbers(store, KEYS[0])
    assert held(store) == set()
    other, memory, _ = make(tmp_path, room=0)
    fetch(other, *KEYS)
    assert (memory.size_bytes, held(other)) == (0, set())
    assert len(disk.reads) > 1, "a file that is not held is read layer by layer"


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    store, memory, _ = make(tmp_path, room=3)
    fetch(store, KEYS[0], KEYS[1], KEYS[2])
    store.open(KEYS[0]).close()
    fetch(store, KEYS[3])
    assert held(store) == {KEYS[0], KEYS[2], KEYS[3]}
    fetch(store, KEYS[2], KEYS[4])  # what is wanted now does not leave for what is wanted now
    assert held(store) == {KEYS[2], KEYS[3], KEYS[4]}
    memory.limit_bytes = SIZE
    fetch(store, KEYS[5])
    assert held(store) == {KEYS[5]}
    assert memory.size_bytes == SIZE
    memory.limit_bytes = 0
    store.prefetch([])
    assert memory.size_bytes == 0


def test_a_question_larger_than_memory_is_read_as_far_as_it_fits(tmp_path: Path) -> None:
    """Or the chunks of one question would drive each other out, and be read twice."""
    store, _, disk = make(tmp_path, room=3)
    store.prefetch(KEYS)
    for key in KEYS:
        numbers(store, key)
    assert held(store) == set(KEYS[:3])
    per_file = sum(disk.reads[3:]) / 5
    assert disk.reads[:3] == [SIZE] * 3
    assert per_file < 1.1 * SIZE, "and the others once as well"


def test_reading_goes_on_in_the_background_and_opening_waits_for_it(tmp_path: Path) -> None:
    store, _, disk = make(tmp_path)
    disk.gate.clear()
    store.prefetch(KEYS[:2])
    assert disk.reached.wait(20), "nobody opened anything"
    opened: list[Float16] = []
    waiting = threading.Thread(target=lambda: opened.append(numbers(store, KEYS[1])))
    waiting.start()
    assert store.where(KEYS[1]) == "disk", "asking where it is does not wait"
    assert not opened
    disk.gate.set()
    waiting.join(20)
    assert len(opened) == 1
    assert disk.reads == [SIZE, SIZE]


def test_a_new_question_goes_before_what_was_asked_for_earlier(tmp_path: Path) -> None:
    store, _, disk = make(tmp_path)
    disk.gate.clear()
    store.prefetch(KEYS[:4])
    assert disk.reached.wait(20)
    store.prefetch([KEYS[6]])
    disk.gate.set()
    store.open(KEYS[6]).close()
    assert held(store) == {KEYS[0], KEYS[6]}
    assert len(disk.reads) == 2


def rewritten(path: Path) -> None:
    path.write_bytes(chunk(path.stem, fill=1))


def replaced(path: Path) -> None:
    KVStore(path.parent.parent).write(path.stem, chunk(path.stem, fill=1))


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_what_another_writes_is_read_anew(tmp_path: Path, change: Callable[[Path], None]) -> None:
    store, memory, _ = make(tmp_path)
    fetch(store, KEYS[0])
    before = numbers(store, KEYS[0])
    change(next(tmp_path.rglob(f"{KEYS[0]}.kv")))
    assert store.where(KEYS[0]) == "disk"
    assert memory.size_bytes == 0
    assert not np.array_equal(numbers(store, KEYS[0]), before)


def test_what_is_removed_is_gone_for_every_engine(tmp_path: Path) -> None:
    (one, memory, _), (two, _, _) = make(tmp_path), make(tmp_path)
    for store in (one, two):
        fetch(store, KEYS[0], KEYS[1])
    with one.open(KEYS[0]) as reader:
        two.remove(KEYS[0])
        codec.decode(reader.chunk())  # whoever has it open keeps it
    assert held(one) == held(two) == {KEYS[1]}
    assert (one.where(KEYS[0]), memory.size_bytes) == ("", SIZE)
    with pytest.raises(MissingChunk):
        one.open(KEYS[0])


@pytest.mark.parametrize("place", [3, 40, -200])
def test_damage_is_never_held(tmp_path: Path, place: int) -> None:
    store, _, _ = make(tmp_path)
    path = next(tmp_path.rglob(f"{KEYS[0]}.kv"))
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    store.prefetch([KEYS[0], "ff" * 32, KEYS[1]])
    with pytest.raises(DamagedChunk):
        numbers(store, KEYS[0])
    store.open(KEYS[1]).close()
    assert held(store) == {KEYS[1]}, "and it does not keep the others from being read"
    store.write(KEYS[0], chunk(KEYS[0]))
    fetch(store, KEYS[0])
    assert held(store) == {KEYS[0], KEYS[1]}


def test_a_disk_that_breaks_in_the_background_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, disk = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(_Counted, "read", lambda *_: 1 / 0)
        store.prefetch([KEYS[0]])
        with pytest.raises(ZeroDivisionError):
            store.open(KEYS[0])
    fetch(store, KEYS[0])
    assert held(store) == {KEYS[0]}
    assert disk.reads == [SIZE]


def test_forgetting_reaches_memory_too(tmp_path: Path) -> None:
    """Or a measurement of the disk would measure memory."""
    store, _, _ = make(tmp_path)
    fetch(store, *KEYS[:3])
    store.drop_from_memory(KEYS[:2])
    assert held(store) == {KEYS[2]}


def test_memory_is_a_small_share_of_the_machine() -> None:
    assert 2**24 < pools.usual_bytes() < 2**40


ROPE = Rope("adjacent", DIM, 10_000.0)


def placed(store: KVStore, keys: list[str]) -> tuple[list[Float16], list[Float16]]:
    rows = [np.zeros((len(keys) * TOKENS, HEADS * DIM), np.float16) for _ in range(2 * LAYERS)]
    readers = [store.open(key) for key in keys]
    places = [Placement(key, r, i * TOKENS) for i, (key, r) in enumerate(zip(keys, readers, strict=True))]
    transfer.place(places, ROPE, rows[:LAYERS], rows[LAYERS:])
    for reader in readers:
        reader.close()
    return rows[:LAYERS], rows[LAYERS:]


def test_memory_and_slow_disks_give_the_same_rows(tmp_path: Path) -> None:
    store, _, _ = make(tmp_path)
    expected = np.array(placed(store, KEYS[:3]))
    slow = SlowDisk(bytes_per_second=20e6, seek_ms=0.1)
    store.disk = slow
    assert np.array_equal(placed(store, KEYS[:3]), expected)
    assert 3 * SIZE <= slow.read_bytes < 3.2 * SIZE
    fetch(store, *KEYS[:3])
    assert np.array_equal(placed(store, KEYS[:3]), expected)


def test_a_slow_disk_takes_its_time_and_has_one_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    disk = SlowDisk(bytes_per_second=1000, seek_ms=10)
    one, two = (disk(in_memory(bytes(5000))) for _ in range(2))
    for source, offset, took in [(one, 0, 0.11), (one, 100, 0.1), (two, 200, 0.11), (one, 200, 0.11), (one, 0, 0.11)]:
        before = now[0]
        assert len(source.read(offset, 100)) == 100
        assert now[0] - before == pytest.approx(took)
    assert (disk.read_bytes, disk.seeks) == (500, 4)


def test_how_long_reading_takes_is_known_from_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    store, memory, _ = make(tmp_path, room=8)
    store.disk = SlowDisk(bytes_per_second=500 * SIZE)
    fetch(store, *KEYS[:3])
    assert store.read_ms(KEYS[7]) == 0, "too few reads to say"
    fetch(store, KEYS[3])
    assert store.read_ms(KEYS[7]) == pytest.approx(2)
    assert (store.read_ms(KEYS[0]), store.read_ms("ff" * 32)) == (0, 0), "in memory, and nowhere"
    store.disk = SlowDisk(bytes_per_second=1000 * SIZE)
    fetch(store, KEYS[4])
    assert store.read_ms(KEYS[7]) == pytest.approx(1), "the slow ones may have been somebody else's doing"
    memory.limit_bytes = 0
    assert store.read_ms(KEYS[7]) == 0, "nothing is read ahead"


def test_reads_of_two_threads_queue_at_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    disk = SlowDisk(bytes_per_second=1000)
    for _ in range(3):
        disk(in_memory(bytes(500))).read(0, 500)
    assert slept == [0.5, 1.0, 1.5], "nobody's read is done before those before it"


def in_memory(data: bytes) -> ByteSource:
    return MemorySource(data)
