"""Memory above the disk and disks below it, as questions meet them: what is read, and that answers stay the same."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from quire import config
from quire.session import Found, Session
from quire_engine.costs import Rate
from quire_engine.engine import Engine, EngineSettings, Request
from quire_engine.kv.format import ByteSource
from quire_engine.kv.pools import SlowDisk
from quire_engine.kv.store import KVStore
from quire_engine.prompt import Wording
from quire_engine.types import Answered, Exchange, Forecast, Text

Tiny = Callable[[str], Path]

SETTINGS = EngineSettings(Wording("Answer."), threads=1)
PASSAGES = tuple(
    f"{name} was built in {year} by two brothers who had never seen the sea before; the keeper wrote it on a door."
    for name, year in [("The lighthouse", 1871), ("The mill", 1764), ("The press", 1802), ("The barn", 1911)]
)
ROOM = 10_000_000


class Disk:
    """Counts the bytes of every file that are read."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def __call__(self, source: ByteSource) -> ByteSource:
        return _Counted(source, self)


@dataclasses.dataclass
class _Counted:
    source: ByteSource
    disk: Disk

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes

    def read(self, offset: int, length: int) -> bytes | memoryview:
        self.disk.read_bytes += length
        return self.source.read(offset, length)

    def close(self) -> None:
        self.source.close()


def question(passages: tuple[str, ...] = PASSAGES, ratio: float = 0.3) -> Request:
    return Request("When was it built?", passages, ratio, max_tokens=8, insist=True)


def ask(engine: Engine, request: Request) -> tuple[str, Answered]:
    *events, end = engine.answer(request)
    assert isinstance(end, Answered)
    return "".join(event.text for event in events if isinstance(event, Text)), end


@pytest.fixture(scope="module")
def cached(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with the passages in it."""
    directory = tmp_path_factory.mktemp("cached")
    Engine(tiny("llama"), directory, SETTINGS).cache(PASSAGES)
    return directory


@pytest.fixture
def start(tiny: Tiny, cached: Path, tmp_path: Path) -> Callable[[], Engine]:
    """An engine of its own with memory above a disk that counts, on a copy of the same cache."""
    copy = Path(shutil.copytree(cached, tmp_path / "cache"))

    def make() -> Engine:
        engine = Engine(tiny("llama"), copy, SETTINGS)
        engine.memory.limit_bytes = ROOM
        engine.chunks.store.disk = Disk()
        return engine

    return make


def where(engine: Engine, *passages: str) -> list[str]:
    return [engine.chunks.store.where(engine.address(passage)) for passage in passages]


def sizes(engine: Engine, *keys: str) -> int:
    """Bytes of their files."""
    return sum(next(engine.chunks.store.root.rglob(f"{key}.kv")).stat().st_size for key in keys)


def read(engine: Engine) -> int:
    assert isinstance(engine.chunks.store.disk, Disk)
    return engine.chunks.store.disk.read_bytes


def test_what_was_found_is_read_once_however_often_it_is_asked_for(start: Callable[[], Engine]) -> None:
    engine = start()
    straight, _ = ask(engine, question())
    assert where(engine, *PASSAGES) == ["disk"] * 4, "only what was found is kept in memory"
    engine = start()
    engine.prefetch(PASSAGES)
    text, end = ask(engine, question())
    everything = sizes(engine, engine.chunks.preamble.key, *map(engine.address, PASSAGES))
    assert (text, read(engine), engine.memory.size_bytes) == (straight, everything, everything)
    assert where(engine, *PASSAGES) == ["memory"] * 4
    engine.prefetch(PASSAGES[::-1])
    assert ask(engine, question(PASSAGES[::-1]))[1].tokens == end.tokens
    assert read(engine) == everything, "nothing was read again"


def test_two_engines_and_a_chunk_that_one_of_them_removes(start: Callable[[], Engine]) -> None:
    one, two = start(), start()
    for engine in (one, two):
        engine.prefetch(PASSAGES)
        ask(engine, question())
    gone = one.address(PASSAGES[1])
    assert one.chunks.store.remove(gone)
    assert where(two, *PASSAGES) == ["memory", "", "memory", "memory"]
    two.prefetch(PASSAGES)
    _, end = ask(two, question())
    assert end.tokens.fresh > len(two._writer.question("When was it built?")), "it was encoded again"
    assert KVStore(one.chunks.store.root).has(gone)


def test_a_damaged_file_is_made_anew_as_ever(start: Callable[[], Engine]) -> None:
    engine = start()
    straight, _ = ask(engine, question())
    file = next(engine.chunks.store.root.rglob(f"{engine.address(PASSAGES[0])}.kv"))
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    engine.prefetch(PASSAGES)
    assert ask(engine, question())[0] == straight
    engine.chunks.store.check(engine.address(PASSAGES[0]))


# Slow disks


def test_rows_from_a_slow_disk_are_the_same(start: Callable[[], Engine]) -> None:
    straight, end = ask(start(), question())
    engine = start()
    engine.memory.limit_bytes = 0
    engine.chunks.store.disk = SlowDisk(bytes_per_second=1e7, seek_ms=0.1)
    text, slow_end = ask(engine, question())
    assert (text, slow_end.tokens) == (straight, end.tokens)


@pytest.fixture
def as_slow_as_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a passage takes as long as computing it: so half of them are computed."""

    def read_ms(store: KVStore, key: str) -> float:
        return 100.0 if store.where(key) == "disk" else 0.0

    monkeypatch.setattr(KVStore, "read_ms", read_ms)
    monkeypatch.setattr(Rate, "of", lambda self, tokens, before: 100.0)


@pytest.mark.usefixtures("as_slow_as_computing")
def test_from_a_slow_disk_the_first_passages_are_computed_and_not_read(start: Callable[[], Engine]) -> None:
    engine = start()
    _, end = ask(engine, question())
    led = sum(map(engine.count_tokens, PASSAGES[:2]))
    assert read(engine) == sizes(engine, engine.chunks.preamble.key, *map(engine.address, PASSAGES[2:]))
    assert where(engine, *PASSAGES) == ["disk", "disk", "memory", "memory"]
    preamble = len(engine.chunks.preamble)
    assert end.tokens.recomputed > led, "of the others a share is computed again, as ever"
    assert end.tokens.reused > preamble
    assert end.tokens.context == end.tokens.reused + end.tokens.recomputed
    stitched = engine.runtime.rows(0, preamble + led)
    full = start()
    ask(full, question(ratio=1.0))
    exact = full.runtime.rows(0, preamble + led)
    for ours, theirs in zip(stitched, exact, strict=True):
        assert np.allclose(ours[:, preamble:], theirs[:, preamble:], atol=0.02), (
            "they are what full prefill makes of them"
        )


@pytest.mark.usefixtures("as_slow_as_computing")
def test_a_later_turn_and_a_slow_disk(start: Callable[[], Engine]) -> None:
    engine = start()
    first = dataclasses.replace(question(PASSAGES[:1]), keep=True)
    said, _ = ask(engine, first)
    earlier = (Exchange(first.passages, first.question, said),)
    later = dataclasses.replace(question(PASSAGES[1:]), history=earlier, keep=True)
    before = read(engine)
    _, end = ask(engine, later)
    assert read(engine) - before == sizes(engine, *map(engine.address, PASSAGES[2:])), "one of three is computed"
    counts = end.tokens
    asked = len(engine._writer.question(later.question))
    assert counts.context + asked == counts.kept + counts.reused + counts.recomputed + counts.fresh
    assert counts.recomputed >= engine.count_tokens(PASSAGES[1])


@pytest.mark.usefixtures("as_slow_as_computing")
def test_what_lies_in_memory_is_not_computed(start: Callable[[], Engine]) -> None:
    engine = start()
    engine.prefetch(PASSAGES)
    for passage in PASSAGES:
        engine.chunks.store.open(engine.address(passage)).close()  # which waits for it
    _, end = ask(engine, question(ratio=0.0))
    assert end.tokens.recomputed == 0


# From the search to memory


@pytest.fixture
def session(tiny: Tiny, tmp_path: Path) -> Iterator[Session]:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number, text in enumerate(PASSAGES):
        (notes / f"{number}.md").write_text(text)
    with Session(config.load({"model": str(tiny("llama"))})) as session:
        session.index([session.library.add_root(notes)], lambda _: None)
        session.cache(lambda _: None, lambda: False)
        yield session


def test_what_the_search_finds_is_on_its_way_before_anything_is_computed(session: Session) -> None:
    asked = session.ask("lighthouse mill")
    found = next(asked)
    assert isinstance(found, Found)
    store = session.engine.chunks.store
    addresses = [session.engine.address(hit.text) for hit in found.sources]
    for address in addresses:
        store.open(address).close()  # which waits for it
    assert {store.where(address) for address in addresses} == {"memory"}
    others = set(map(session.engine.address, PASSAGES)) - set(addresses)
    assert {store.where(address) for address in others} == {"disk"}
    assert isinstance(next(asked), Forecast)


@pytest.mark.parametrize("setting", [{"memory_gb": 0}, {"dial": "exact"}])
def test_what_nobody_reads_is_not_fetched(session: Session, setting: dict[str, object]) -> None:
    session.settings = dataclasses.replace(session.settings, **setting)  # type: ignore[arg-type]
    assert isinstance(next(session.ask("lighthouse mill")), Found)
    assert session.engine.memory.size_bytes == 0
    store = session.engine.chunks.store
    assert {store.where(key) for key in sorted(store.keys())} == {"disk"}


def test_passages_of_earlier_turns_are_not_fetched_again(session: Session) -> None:
    hit = session.find("lighthouse")[0]
    earlier = Exchange((hit.text,), "lighthouse?", "1871")
    asked = session.ask("lighthouse mill", history=(earlier,))
    assert isinstance(next(asked), Found)
    store = session.engine.chunks.store
    mill = next(hit for hit in session.find("mill"))
    store.open(session.engine.address(mill.text)).close()
    assert store.where(session.engine.address(hit.text)) == "disk"
    assert store.where(session.engine.address(mill.text)) == "memory"
