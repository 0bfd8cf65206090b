"""The catalogue: an index that agrees with the files whatever happens to either, and claims between processes."""

import multiprocessing
import os
import random
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from quire_engine import processes
from quire_engine.errors import UnwritableStore
from quire_engine.kv import catalogue as module
from quire_engine.kv import codec
from quire_engine.kv.catalogue import Catalogue, Total
from quire_engine.kv.format import to_bytes
from quire_engine.kv.store import KVStore
from quire_engine.processes import Process
from quire_engine.types import BitPlan, ChunkKV

FORK = multiprocessing.get_context("fork")
NAME, OTHER = "0123456789abcdef", "turns-0123456789abcdef"
KEYS = [f"{i % 7:02x}{i:062x}" for i in range(20)]
DAY = 86400.0
TOKENS, LAYERS, HEADS, DIM = 6, 2, 2, 8
NUMBERS = 2 * TOKENS * LAYERS * HEADS * DIM


def chunk_bytes(key: str, fill: float = 1.0, tokens: int = TOKENS) -> bytes:
    """A chunk whose every number is `fill`."""
    numbers = np.full((LAYERS, tokens, HEADS, DIM), fill, np.float16)
    plan = BitPlan.exact(LAYERS)
    return to_bytes(codec.encode(ChunkKV(numbers, numbers, {}), plan, codec.text_order(tokens)), bytes.fromhex(key))


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path / "kv")


def filled(catalogue: Catalogue) -> list[Total]:
    """Twelve chunks in one store and eight in another; their totals."""
    store, other = catalogue.store(NAME, "A model"), catalogue.store(OTHER)
    for i, key in enumerate(KEYS):
        (store if i < 12 else other).write(key, chunk_bytes(key), seconds=2.0)
    catalogue.look()
    return catalogue.totals()


def listed(catalogue: Catalogue) -> dict[str, set[str]]:
    catalogue.look()
    return {name: set(catalogue.sizes(name)) for name in (NAME, OTHER)}


def on_disk(catalogue: Catalogue) -> dict[str, set[str]]:
    return {name: set(KVStore(catalogue.root / name).keys()) for name in (NAME, OTHER)}


def ago(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


# What it knows


def test_it_tells_what_every_store_holds(catalogue: Catalogue) -> None:
    size = len(chunk_bytes(KEYS[0]))
    expected = [
        Total(NAME, 12, 12 * size, 12 * TOKENS, 12 * NUMBERS, 24.0),
        Total(OTHER, 8, 8 * size, 8 * TOKENS, 8 * NUMBERS, 16.0),
    ]
    assert filled(catalogue) == expected
    assert catalogue.size_bytes() == 20 * size
    assert catalogue.sizes(NAME) == dict.fromkeys(KEYS[:12], size)
    assert catalogue.sizes("no such store") == {}
    assert [store.model for store in catalogue.stores()] == ["A model", ""]
    again = Catalogue(catalogue.root)
    assert again.totals() == expected, "without a look"
    assert [store.model for store in again.stores()] == ["A model", ""], "another process knows it too"
    assert catalogue.take_notice() == again.take_notice() == ""


def test_an_empty_place_needs_nothing(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "nowhere" / "kv")
    catalogue.look()
    assert (catalogue.totals(), catalogue.entries(), catalogue.size_bytes(), catalogue.take_notice()) == ([], [], 0, "")


def test_removed_and_replaced_chunks(catalogue: Catalogue) -> None:
    store = catalogue.store(NAME)
    store.write(KEYS[0], chunk_bytes(KEYS[0]), seconds=2.0)
    store.write(KEYS[1], chunk_bytes(KEYS[1]), seconds=2.0)
    store.remove(KEYS[0])
    store.remove(KEYS[2])
    store.write(KEYS[1], chunk_bytes(KEYS[1], tokens=9), seconds=5.0)
    [total] = catalogue.totals()
    assert (total.chunks, total.tokens, total.seconds) == (1, 9, 5.0)
    assert total.size_bytes == store.size_bytes()


def test_uses_count_half_after_a_week(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = catalogue.store(NAME), time.time()
    store.write(KEYS[0], chunk_bytes(KEYS[0]), seconds=8.0)
    store.write(KEYS[1], chunk_bytes(KEYS[1]), seconds=8.0, uses=1.0)
    size = len(chunk_bytes(KEYS[0]))
    unused, used = catalogue.entries()
    assert unused.value(now) == 0
    assert unused.value(now, expected_uses=0.5) == pytest.approx(4.0 / size)
    assert used.value(now) == pytest.approx(8.0 / size, rel=1e-3)
    assert used.value(now + 7 * DAY) == pytest.approx(4.0 / size, rel=1e-3)
    store.open(KEYS[1]).close()
    monkeypatch.setattr(time, "time", lambda: now + 7 * DAY)
    store.open(KEYS[1]).close()
    store.open(KEYS[1]).close()
    _, used = catalogue.entries()
    # Noted together: the last use is when they all count as of.
    assert used.uses == pytest.approx(3.5, rel=1e-3)
    assert Catalogue(catalogue.root).entries()[1].uses == used.uses


def test_uses_are_written_down_when_it_is_closed_or_they_are_many(catalogue: Catalogue) -> None:
    store = catalogue.store(NAME)
    for key in KEYS:
        store.write(key, chunk_bytes(key))
        store.open(key).close()
    another = Catalogue(catalogue.root)
    assert {entry.uses for entry in another.entries()} == {0.0}
    catalogue.close()
    assert [round(entry.uses, 3) for entry in another.entries()] == [1.0] * 20
    for number in range(600):
        catalogue.used(NAME, KEYS[number % 20] if number < 20 else f"{number:064x}")
    assert [round(entry.uses, 3) for entry in another.entries()] == [2.0] * 20


def test_what_was_not_measured_is_estimated(catalogue: Catalogue) -> None:
    store, other = catalogue.store(NAME), catalogue.store(OTHER)
    store.write(KEYS[0], bytes(1000))
    assert catalogue.entries()[0].seconds == pytest.approx(0.001), "a guess, while nothing at all was measured"
    store.write(KEYS[1], bytes(1000), seconds=3.0)
    other.write(KEYS[2], bytes(2000))
    assert [entry.seconds for entry in catalogue.entries()] == [3.0, 3.0, 6.0]
    other.write(KEYS[3], bytes(1000), seconds=9.0)
    assert [entry.seconds for entry in catalogue.entries()] == [3.0, 3.0, 18.0, 9.0], "each store by its own"
    assert catalogue.seconds_per_byte(NAME) == pytest.approx(0.003)
    assert [total.seconds for total in catalogue.totals()] == [6.0, 27.0]


# The files are the truth


def test_files_that_came_and_went_behind_its_back(catalogue: Catalogue) -> None:
    filled(catalogue)
    folder = catalogue.root / NAME / KEYS[0][:2]
    (folder / f"{KEYS[0]}.kv").unlink()
    KVStore(catalogue.root / NAME).write(KEYS[1][:2] + "ff" * 31, chunk_bytes(KEYS[1]))  # not told
    KVStore(catalogue.root / NAME).write("ee" * 32, chunk_bytes("ee" * 32))  # and in a new folder
    (folder / "notes.kv").write_text("not a key")
    (folder / "README").write_text("not a chunk")
    assert listed(catalogue) == {name: keys - {"notes"} for name, keys in on_disk(catalogue).items()}
    assert [total.tokens for total in catalogue.totals()] == [13 * TOKENS, 8 * TOKENS]
    shutil.rmtree(folder)
    shutil.rmtree(catalogue.root / OTHER)
    assert listed(catalogue) == on_disk(catalogue)
    assert [total.store for total in catalogue.totals()] == [NAME]


def test_a_file_replaced_behind_its_back_has_its_new_size(catalogue: Catalogue) -> None:
    filled(catalogue)
    KVStore(catalogue.root / NAME).write(KEYS[0], chunk_bytes(KEYS[0], tokens=9))
    catalogue.look()
    assert catalogue.sizes(NAME)[KEYS[0]] == len(chunk_bytes(KEYS[0], tokens=9))
    assert catalogue.totals()[0].tokens == 11 * TOKENS + 9


def test_only_folders_that_changed_are_looked_into(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(catalogue)
    for folder in catalogue.root.glob("*/??"):
        ago(folder, 60)
    catalogue.look()
    looked: list[str] = []
    look_into = module._look_into

    def spy(db: sqlite3.Connection, store: str, folder: Path) -> None:
        looked.append(f"{store}/{folder.name}")
        look_into(db, store, folder)

    monkeypatch.setattr(module, "_look_into", spy)
    catalogue.look()
    Catalogue(catalogue.root).look()
    assert looked == []
    KVStore(catalogue.root / NAME).remove(KEYS[3])
    catalogue.look()
    assert looked == [f"{NAME}/{KEYS[3][:2]}"]


def test_two_changes_at_the_same_time_are_both_seen(catalogue: Catalogue) -> None:
    """A directory's time is as coarse as the system's clock."""
    filled(catalogue)
    folder = catalogue.root / NAME / KEYS[0][:2]
    status = folder.stat()
    (folder / f"{KEYS[0]}.kv").unlink()
    os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert KEYS[0] not in listed(catalogue)[NAME]


def test_leftovers_of_crashes_are_removed_after_an_hour(catalogue: Catalogue) -> None:
    filled(catalogue)
    folder = catalogue.root / NAME / KEYS[0][:2]
    old, young = folder / "old.tmp", folder / "young.tmp"
    for path, age_seconds in ((old, 3700), (young, 3500)):
        path.write_bytes(b"half a chunk")
        ago(path, age_seconds)
    ago(folder, 3500)
    catalogue.look()
    assert (old.exists(), young.exists()) == (False, True)
    ago(young, 3700)
    ago(folder, 3500)
    catalogue.look()
    assert not young.exists(), "a folder with a leftover is looked into again, though it did not change"
    assert listed(catalogue) == on_disk(catalogue)


# Whatever happens to the index


def overwrite(start: int, count: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[start : start + count] = random.Random(start).randbytes(min(count, len(data) - start))
        path.write_bytes(data)

    return damage


def other_tables(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE chunks")
    db.close()


def older(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE chunks")
        db.execute("PRAGMA user_version = 0")
    db.close()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "text": overwrite(0, 1_000_000),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "header": overwrite(0, 100),
    "schema": overwrite(100, 1000),
    "pages": overwrite(4096, 100_000),
    "other tables": other_tables,
    "older": older,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_made_again_from_the_files(catalogue: Catalogue, kind: str) -> None:
    before = filled(catalogue)
    for key in KEYS[:12]:
        ago(catalogue.root / NAME / key[:2] / f"{key}.kv", 7 * DAY)
    catalogue.close()
    DAMAGE[kind](catalogue.root / "catalogue.sqlite")
    again = Catalogue(catalogue.root)
    assert listed(again) == on_disk(again) == {NAME: set(KEYS[:12]), OTHER: set(KEYS[12:])}
    counts = [(t.store, t.chunks, t.size_bytes, t.tokens, t.numbers) for t in before]
    assert [(t.store, t.chunks, t.size_bytes, t.tokens, t.numbers) for t in again.totals()] == counts
    values = {e.key: e.value(time.time()) / e.seconds * e.size_bytes for e in again.entries()}
    assert [round(values[key], 2) for key in KEYS] == [0.5] * 12 + [1.0] * 8, "one use, when its file was used last"
    assert ("damaged" in again.take_notice()) == (kind not in ("deleted", "empty", "older"))
    again.store(NAME).write("ee" * 32, chunk_bytes("ee" * 32), seconds=4.0)
    again.close()
    healed = Catalogue(catalogue.root)
    assert healed.take_notice() == "", "it is said once"
    assert next(entry for entry in healed.entries() if entry.key == "ee" * 32).seconds == 4.0


def test_damage_while_it_is_in_use(catalogue: Catalogue) -> None:
    filled(catalogue)
    catalogue.close()
    with sqlite3.connect(catalogue.root / "catalogue.sqlite") as db:
        db.execute("PRAGMA journal_mode = DELETE")
    db.close()
    assert len(catalogue.entries()) == 20
    overwrite(0, 100_000)(catalogue.root / "catalogue.sqlite")
    for key in KEYS[:3]:
        catalogue.store(NAME).remove(key)
    assert listed(catalogue) == on_disk(catalogue)


def test_the_index_of_a_newer_quire_is_left_alone(catalogue: Catalogue) -> None:
    filled(catalogue)
    catalogue.close()
    path = catalogue.root / "catalogue.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    older = Catalogue(catalogue.root)
    older.store(NAME).write("ee" * 32, chunk_bytes("ee" * 32))
    assert listed(older) == on_disk(older)
    assert "newer Quire" in older.take_notice()
    older.close()
    assert path.read_bytes() == before


def test_where_it_cannot_be_written_the_files_are_counted(catalogue: Catalogue) -> None:
    (catalogue.root / "catalogue.sqlite").mkdir(parents=True)
    assert len(filled(catalogue)) == 2
    assert listed(catalogue) == on_disk(catalogue)
    assert "cannot be used" in catalogue.take_notice()
    assert catalogue.claim(NAME, KEYS[0])
    catalogue.release(NAME, KEYS[0])
    catalogue.store(NAME).remove(KEYS[0])
    assert listed(catalogue) == on_disk(catalogue)


def test_an_index_that_is_locked_for_long_stops_nobody(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(catalogue)
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.05)
    locked = sqlite3.connect(catalogue.root / "catalogue.sqlite", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    other = Catalogue(catalogue.root)
    other.store(NAME).write("ee" * 32, chunk_bytes("ee" * 32))
    other.store(NAME).open("ee" * 32).close()
    assert other.claim(NAME, KEYS[0])
    assert listed(other) == on_disk(other)
    other.close()
    locked.execute("ROLLBACK")
    locked.close()
    assert listed(catalogue) == on_disk(catalogue)


def in_a_child(work: Callable[[Connection], None]) -> object:
    """What the work sends from a process of its own."""
    ours, theirs = FORK.Pipe()

    def child() -> None:
        try:
            work(theirs)
        except BaseException as error:
            theirs.send(repr(error))

    process = FORK.Process(target=child, daemon=True)
    process.start()
    assert ours.poll(30)
    answer: object = ours.recv()
    process.join(10)
    return answer


def test_a_full_disk_leaves_store_and_index_usable(catalogue: Catalogue) -> None:
    filled(catalogue)
    catalogue.close()

    def work(send: Connection) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = Catalogue(catalogue.root)
        store = full.store(NAME)
        assert len(full.entries()) == 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file takes another byte
        with pytest.raises(UnwritableStore):
            store.write("ee" * 32, chunk_bytes("ee" * 32))
        store.open(KEYS[0]).close()
        assert full.claim(NAME, "ee" * 32)
        store.remove(KEYS[1])
        assert listed(full) == on_disk(full)
        started_full = Catalogue(catalogue.root)
        assert listed(started_full) == on_disk(started_full)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.write("ee" * 32, chunk_bytes("ee" * 32))
        assert listed(full) == on_disk(full)
        full.close()
        send.send("done")

    assert in_a_child(work) == "done"
    assert listed(catalogue) == on_disk(catalogue)
    assert len(catalogue.sizes(NAME)) == 12
    assert not list(catalogue.root.rglob("*.tmp"))


def test_a_directory_that_is_read_only_still_serves(catalogue: Catalogue) -> None:
    filled(catalogue)
    catalogue.close()
    for path in [catalogue.root, *catalogue.root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work(send: Connection) -> None:
        os.chdir(catalogue.root)  # which needs no rights above it afterwards
        if os.getuid() == 0:
            os.setuid(65534)
        ours = Catalogue(Path())
        ours.store(NAME).open(KEYS[0]).close()
        assert ours.claim(NAME, KEYS[0])
        with pytest.raises(UnwritableStore):
            ours.store(NAME).write("ee" * 32, b"x")
        assert listed(ours) == on_disk(ours)
        assert len(ours.entries()) == 20
        ours.close()
        send.send("done")

    assert in_a_child(work) == "done"
    for path in [catalogue.root, *catalogue.root.rglob("*")]:
        path.chmod(0o755)


def write_for_ever(root: Path, payloads: dict[str, list[bytes]], ready: Connection) -> None:
    catalogue = Catalogue(root)
    store = catalogue.store(NAME)
    ready.send(True)
    for number in range(1_000_000):
        for key, contents in payloads.items():
            store.write(key, contents[number % len(contents)], seconds=1.0)
            store.open(key).close()
        store.remove(next(iter(payloads)))


def test_killed_at_200_moments_nothing_wrong_is_served(catalogue: Catalogue) -> None:
    """A process that writes chunks of known content for ever is killed again and again."""
    rng = random.Random(0)
    payloads = {key: [chunk_bytes(key, fill) for fill in (1.0, 2.0)] for key in KEYS[:6]}
    in_between = 0
    for _ in range(200):
        ours, theirs = FORK.Pipe()
        writer = FORK.Process(target=write_for_ever, args=(catalogue.root, payloads, theirs), daemon=True)
        writer.start()
        assert ours.poll(30)
        time.sleep(rng.uniform(0, 0.02))
        assert writer.is_alive()
        writer.kill()
        writer.join(10)
        store = KVStore(catalogue.root / NAME)
        served = {key: store._path(key).read_bytes() for key in on_disk(catalogue)[NAME]}
        assert all(served[key] in payloads[key] for key in served)
        in_between += len(list(catalogue.root.rglob("*.tmp"))) > 0
    assert in_between, "or no writer was hit while writing, and this test showed nothing"
    for key in on_disk(catalogue)[NAME]:
        store.check(key)
    after = Catalogue(catalogue.root)
    assert listed(after)[NAME] == on_disk(after)[NAME] != set()
    assert after.size_bytes() == store.size_bytes()
    assert after.take_notice() == "", "and the index was never damaged"
    assert after.claim(NAME, KEYS[0])


def test_many_threads_share_one(catalogue: Catalogue) -> None:
    store = catalogue.store(NAME)

    def work(number: int) -> None:
        key = f"{number:064x}"
        with store.claimed(key) as mine:
            assert mine
            store.write(key, chunk_bytes(key), seconds=1.0)
        store.open(key).close()
        catalogue.look()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))
    assert len(catalogue.entries()) == 40
    assert {round(entry.uses, 3) for entry in catalogue.entries()} == {1.0}


# Claims


def hold(root: Path, key: str, pipe: Connection) -> None:
    pipe.send(Catalogue(root).claim(NAME, key))
    pipe.recv()


def test_a_claim_holds_while_its_owner_lives(catalogue: Catalogue) -> None:
    ours, theirs = FORK.Pipe()
    owner = FORK.Process(target=hold, args=(catalogue.root, KEYS[0], theirs), daemon=True)
    owner.start()
    assert ours.recv() is True
    assert not catalogue.claim(NAME, KEYS[0])
    catalogue.release(NAME, KEYS[0])
    assert not catalogue.claim(NAME, KEYS[0]), "nobody gives back what is another's"
    assert catalogue.claim(NAME, KEYS[1])
    assert catalogue.claim(OTHER, KEYS[0]), "the same key in another store"
    with catalogue.store(NAME).claimed(KEYS[0]) as mine:
        assert not mine
    owner.kill()
    owner.join(10)
    assert catalogue.claim(NAME, KEYS[0]), "the dead hold nothing"


def test_a_claim_is_given_back(catalogue: Catalogue) -> None:
    with catalogue.store(NAME).claimed(KEYS[0]) as mine:
        assert mine
        with sqlite3.connect(catalogue.root / "catalogue.sqlite") as db:
            assert db.execute("SELECT key FROM claims").fetchall() == [(KEYS[0],)]
    assert db.execute("SELECT key FROM claims").fetchall() == []
    db.close()


@pytest.mark.parametrize("what", ["lapsed", "number given out again"])
def test_claims_that_hold_no_longer(catalogue: Catalogue, what: str) -> None:
    parent = os.getppid()
    started = processes._started(parent)
    if not started:
        pytest.skip("the system does not tell when processes started")
    until = time.time() + (-1 if what == "lapsed" else 100)
    catalogue.look()
    with sqlite3.connect(catalogue.root / "catalogue.sqlite") as db:
        started += what != "lapsed"
        db.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", (NAME, KEYS[0], parent, started, until))
        db.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", (NAME, KEYS[1], parent, started - 1, until + 100))
    db.close()
    assert catalogue.claim(NAME, KEYS[0])
    assert catalogue.claim(NAME, KEYS[1]) == (what == "lapsed"), "the other one's holds while this one's does not"


def test_processes_are_told_apart() -> None:
    me = processes.this()
    assert processes.is_alive(me)
    assert not processes.is_alive(Process(me.pid, me.started + 1))
    child = FORK.Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
    assert child.pid is not None
    assert not processes.is_alive(Process(child.pid, me.started))


def encode_all(root: Path, log: Path, keys: list[str], start: Connection) -> None:
    """As the engine does it: claim, look, compute, write; what another process computes is tried again later."""
    store = Catalogue(root).store(NAME)
    start.recv()
    left = keys
    while left:
        elsewhere = []
        for key in left:
            with store.claimed(key) as mine:
                if not mine:
                    elsewhere.append(key)
                elif not store.has(key):
                    with open(log, "a") as file:
                        file.write(f"{key} {os.getpid()}\n")
                    time.sleep(0.002)
                    store.write(key, chunk_bytes(key), seconds=0.002)
        left = elsewhere


def test_processes_with_the_same_folder_do_not_double_the_work(catalogue: Catalogue, tmp_path: Path) -> None:
    keys, log = [f"{i:064x}" for i in range(300)], tmp_path / "log"
    pipes, workers = [], []
    for _ in range(3):
        ours, theirs = FORK.Pipe()
        workers.append(FORK.Process(target=encode_all, args=(catalogue.root, log, keys, theirs), daemon=True))
        workers[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.send("go")
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    encoded = [line.split() for line in log.read_text().splitlines()]
    assert sorted(key for key, _ in encoded) == keys, "each once"
    assert len({pid for _, pid in encoded}) > 1, "and by more than one of them"
    store = catalogue.store(NAME)
    assert listed(catalogue)[NAME] == set(keys)
    assert catalogue.size_bytes() == store.size_bytes() == store.total_written_bytes()
