"""Keeping folders without a screen: real files, index, shelf and watcher; an engine that writes bytes."""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quire import paths
from quire.config import Settings
from quire.idle import Idleness, asking
from quire.indexer import IndexProgress, IndexReport, index_roots
from quire.keeper import Edit, Keeper
from quire.library import Library
from quire.shelf import Shelf
from quire_engine.errors import Aborted
from quire_engine.kv.catalogue import Catalogue

PATIENCE_S = 20.0


class FakeEngine:
    """Stores some bytes for every passage, and lets a test look in between."""

    known_reuse_off = ""

    def __init__(self, place: "FakeSession") -> None:
        self._place = place
        self.between: Callable[[], None] = lambda: None
        self.cached: list[str] = []

    def address(self, passage: str) -> str:
        return hashlib.sha256(passage.encode()).hexdigest()

    def cache(self, passages: Sequence[str], should_stop: Callable[[], bool]) -> Collection[str]:
        for passage in passages:
            self.between()
            if should_stop():
                raise Aborted
            time.sleep(0.002)
            self._place.store.write(self.address(passage), bytes(100), 0.002)
            self.cached.append(passage)
        return []


class FakeSession:
    """What a keeper needs of a session; index, shelf and catalogue are real."""

    def __init__(self, base: Path) -> None:
        self.settings = Settings()
        self.library = Library(base / "index.sqlite")
        self.catalogue = Catalogue(base / "kv")
        self.store = self.catalogue.store("0123456789abcdef")
        self.engine = FakeEngine(self)
        turns = self.catalogue.store("turns-0123456789abcdef")
        self.shelf = Shelf(self.library, self.engine, self.catalogue, self.store, turns, "f" * 64)

    def embed(self, should_stop: Callable[[], bool]) -> None:
        """Has no embedding model."""

    def index(self, roots: Sequence[Path], progress: Callable[[IndexProgress], None]) -> IndexReport:
        return index_roots(self.library, roots, lambda text: len(text.split()), "words", self.settings, progress)

    def take_notice(self) -> str:
        return ""


@dataclass
class Hosting:
    """A host that notes what it is told, and runs the keeper until it rests."""

    session: Any
    said: list[str] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)
    estimates: list[float] = field(default_factory=list)
    edits: tuple[Edit, ...] = ()
    keeper: Keeper = field(init=False)

    def run(self) -> None:
        """As a loop does, until nothing is left to do or something speaks against it."""
        while self.keeper.urgent or (self.keeper.wanted and not self.keeper.hold):
            try:
                if self.keeper.urgent:
                    self.keeper.work(self.session)
                else:
                    self.keeper.cache(self.session)
            except Aborted:
                continue

    def until(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, (self.said, self.happened)
            self.run()
            time.sleep(0.01)

    def wake(self) -> None: ...
    def yields(self) -> bool:
        return self.keeper.urgent

    def between(self, session: Any) -> None: ...
    def reuse_off(self, session: Any) -> str:
        return ""

    def say(self, lines: Sequence[str], more: int = 0) -> None:
        self.said += lines

    def failed(self, error: Exception) -> None:
        raise error

    def reading(self, roots: Sequence[Path], done: int, total: int) -> None:
        self.happened.append("reading")

    def has_roots(self, roots: Sequence[Path]) -> None: ...
    def caching(self) -> None:
        self.happened.append("caching")

    def off(self, reason: str) -> None: ...
    def show(self, session: Any, edits: tuple[Edit, ...]) -> None:
        self.edits = edits

    def estimate(self, left_ms: float) -> None:
        self.estimates.append(left_ms)

    def budget(self, used_up: bool) -> None: ...


class Quiet(Idleness):
    """A machine that a test makes busy, or unplugs."""

    unplugged = others = False

    @property
    def on_battery(self) -> bool:
        return self.unplugged

    @property
    def busy(self) -> bool:
        return self.others


@pytest.fixture
def machine() -> Quiet:
    return Quiet()


@pytest.fixture
def host(tmp_path: Path, machine: Quiet) -> Iterator[Hosting]:
    hosting = Hosting(FakeSession(tmp_path))
    hosting.keeper = Keeper(hosting, machine)
    hosting.keeper.opened(hosting.session)
    yield hosting
    hosting.keeper.close()
    hosting.session.library.close()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    for number in range(20):
        write(folder / f"{number}.md", f"word{number}")
    return folder


def write(file: Path, word: str) -> None:
    file.write_text(f"# About {word}\n\nThis is what is said of {word}.\n")


def found(host: Hosting, word: str) -> set[str]:
    return {hit.path.name for hit in host.session.library.search(word, 9)}


def test_text_is_searchable_before_anything_is_cached(host: Hosting, notes: Path) -> None:
    host.keeper.add(notes)
    seen: list[set[str]] = []
    host.session.engine.between = lambda: seen.append(found(host, "word19"))
    host.run()
    assert seen[0] == {"19.md"}
    assert host.happened.index("caching") > max(i for i, what in enumerate(host.happened) if what == "reading")
    assert len(host.session.engine.cached) == 20
    assert host.session.shelf.waiting == {}
    assert not host.keeper.wanted


def test_a_saved_file_is_read_and_cached_again_by_itself(host: Hosting, notes: Path) -> None:
    host.keeper.add(notes)
    host.run()
    write(notes / "3.md", "zebra")
    host.until(lambda: found(host, "zebra") and not host.session.shelf.waiting)
    assert "3.md changed: 1 of 1 passage, 10 tokens read again" in host.said
    assert host.edits[0].path == notes / "3.md"
    assert not host.edits[0].left
    assert host.edits[0].ms > 0
    assert len(host.session.engine.cached) == 21


def test_a_file_that_changed_but_not_in_size_and_time(host: Hosting, notes: Path) -> None:
    host.keeper.add(notes)
    host.run()
    file = notes / "3.md"
    before = file.stat()
    file.write_text(file.read_text().replace("word3", "wolf3"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    host.until(lambda: found(host, "wolf3"))
    os.utime(file, (0, 0))  # the clock jumped back; nothing is different
    write(notes / "4.md", "after")
    host.until(lambda: found(host, "after"))
    assert found(host, "wolf3") == {"3.md"}


def test_ignore_files_count_as_soon_as_they_change(host: Hosting, notes: Path) -> None:
    host.keeper.add(notes)
    host.run()
    (notes / ".gitignore").write_text("1?.md\n")
    host.until(lambda: not found(host, "word19"))
    assert len(host.session.library.documents()) == 10
    (notes / ".quireignore").write_text("!19.md\n")
    host.until(lambda: found(host, "word19"))
    (notes / ".gitignore").unlink()
    host.until(lambda: len(host.session.library.documents()) == 20)
    assert len(host.session.engine.cached) == 20, "what was cached once is not cached again"


def test_only_what_the_setting_includes(host: Hosting, notes: Path) -> None:
    host.session.settings = Settings(include="1*.md, sub/**")
    (notes / "sub" / "x.txt").write_text("inside")
    host.keeper.add(notes)
    host.run()
    assert len(host.session.library.documents()) == 12


def test_on_battery_nothing_is_cached_but_everything_is_read(host: Hosting, notes: Path, machine: Quiet) -> None:
    machine.unplugged = True
    host.keeper.add(notes)
    host.run()
    assert found(host, "word1")
    assert host.session.engine.cached == []
    assert host.keeper.hold
    assert "battery" in host.keeper.hold.reason
    machine.unplugged = False
    host.session.engine.between = lambda: setattr(machine, "unplugged", len(host.session.engine.cached) == 5)
    host.run()
    assert len(host.session.engine.cached) == 5, "unplugged in the middle"
    machine.unplugged = False
    host.session.engine.between = lambda: None
    host.run()
    assert len(host.session.engine.cached) == len(set(host.session.engine.cached)) == 20


def test_who_does_not_want_that_can_say_so(host: Hosting, notes: Path, machine: Quiet) -> None:
    machine.unplugged = True
    host.session.settings = Settings(considerate=False)
    host.keeper.add(notes)
    host.run()
    assert len(host.session.engine.cached) == 20


def test_a_busy_machine_gets_half_of_the_time(host: Hosting, notes: Path, machine: Quiet) -> None:
    machine.others = True
    host.keeper.add(notes)
    host.run()
    assert 0 < len(host.session.engine.cached) < 20
    assert host.keeper.wanted
    host.until(lambda: not host.keeper.wanted)
    assert len(host.session.engine.cached) == len(set(host.session.engine.cached)) == 20


def test_a_question_to_another_process_goes_first(host: Hosting, notes: Path) -> None:
    host.keeper.add(notes)
    questions = iter([asking(paths.data_dir())])

    def asks() -> None:
        if len(host.session.engine.cached) == 6 and (question := next(questions, None)):
            question.__enter__()
            began = time.monotonic()
            while not host.keeper.hold:
                assert time.monotonic() < began + PATIENCE_S
            held.append(question)

    held: list[Any] = []
    host.session.engine.between = asks
    host.run()
    assert len(host.session.engine.cached) == 6
    assert host.keeper.hold
    assert "question" in host.keeper.hold.reason
    held[0].__exit__(None, None, None)
    host.until(lambda: not host.keeper.wanted)
    assert len(host.session.engine.cached) == 20


def test_the_estimate_follows_what_caching_took(host: Hosting, notes: Path) -> None:
    host.keeper.add(notes)
    host.run()
    assert host.estimates[0] == 0, "nothing is known yet"
    assert all(left > 0 for left in host.estimates[1:-1])
    assert host.estimates[-1] == 0
    assert host.estimates[1] > host.estimates[-2]


def test_folders_that_another_process_added_or_removed(host: Hosting, notes: Path, tmp_path: Path) -> None:
    host.keeper.add(notes)
    host.run()
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "m.md", "moose")
    host.session.library.add_root(tmp_path / "more")
    host.keeper.look_for_roots(host.session)
    host.run()
    assert found(host, "moose")
    write(tmp_path / "more" / "n.md", "newt")
    host.until(lambda: found(host, "newt"))
    host.session.library.remove_root(notes)
    host.keeper.look_for_roots(host.session)
    host.run()
    assert len(host.session.shelf.items) == 2
