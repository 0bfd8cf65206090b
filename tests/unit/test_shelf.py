"""What is cached, in which order, and what has to go: with real index and store, and an engine that writes bytes."""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from quire.chunking import Passage
from quire.library import Library, StoredDocument
from quire.shelf import CacheProgress, Shelf
from quire_engine.errors import Aborted
from quire_engine.kv.catalogue import Catalogue
from quire_engine.kv.store import KVStore

MODEL = "0123456789abcdef"
PREAMBLE = "f" * 64
TOKENS = 10
BYTES = 1000  # of a stored passage
SECONDS = 2.0  # that making it took


def address(passage: str) -> str:
    return hashlib.sha256(passage.encode()).hexdigest()


class WritingEngine:
    """Stores a thousand bytes for every passage and notes the batches."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self.batches: list[list[str]] = []
        self.addressed = 0
        self.abort_after = -1
        self.elsewhere: set[str] = set()  # what another process is computing
        self.opening = 0  # bytes of what is stored with the first passage

    @property
    def read(self) -> list[str]:
        return [text for batch in self.batches for text in batch]

    def address(self, passage: str) -> str:
        self.addressed += 1
        return address(passage)

    def cache(self, passages: Sequence[str], should_stop: Callable[[], bool]) -> Collection[str]:
        self.batches.append(list(passages))
        if self.opening and not self._store.has(PREAMBLE):
            self._store.write(PREAMBLE, bytes(self.opening))
        for number, passage in enumerate(passages):
            if number == self.abort_after:
                raise Aborted
            if passage not in self.elsewhere:
                self._store.write(address(passage), bytes(BYTES), SECONDS)
        return [passage for passage in passages if passage in self.elsewhere]


class Place:
    """An index, a store and a shelf over both."""

    def __init__(self, base: Path, limit_bytes: int = 0) -> None:
        self.library = Library(base / "index.sqlite")
        self.catalogue = Catalogue(base / "kv")
        self.store = self.catalogue.store(MODEL)
        self.turns = self.catalogue.store(f"turns-{MODEL}")
        self.engine = WritingEngine(self.store)
        self.shelf = self.another(limit_bytes)

    def another(self, limit_bytes: int = 0) -> Shelf:
        shelf = Shelf(self.library, self.engine, self.catalogue, self.store, self.turns, PREAMBLE)
        shelf.limit_bytes = limit_bytes
        return shelf

    def add(self, path: str, *texts: str) -> None:
        passages = [Passage(text, TOKENS, i, i, "") for i, text in enumerate(texts, 1)]
        self.library.replace_document(StoredDocument(Path(path), 1, 1, path, "s"), passages)

    def save(self, path: str, *texts: str, days_ago: float) -> None:
        """As `add`, with a time of the last change."""
        passages = [Passage(text, TOKENS, i, i, "") for i, text in enumerate(texts, 1)]
        at = int(1e9 * (time.time() - 86400 * days_ago))
        self.library.replace_document(StoredDocument(Path(path), 1, at, path, "s"), passages)

    def cache(self, should_stop: Callable[[], bool] = lambda: False) -> CacheProgress:
        self.shelf.refresh()
        return self.shelf.cache(lambda _: None, should_stop)

    def age(self, text: str, days: float) -> None:
        """As if it had been used for the last time then."""
        self.age_key(self.store, address(text), days)

    def age_key(self, store: KVStore, key: str, days: float) -> None:
        self.catalogue.close()
        with sqlite3.connect(self.catalogue.root / "catalogue.sqlite") as db:
            at = (time.time() - 86400 * days, store.root.name, key)
            assert db.execute("UPDATE chunks SET used_at = ? WHERE store = ? AND key = ?", at).rowcount == 1
        db.close()

    def use(self, text: str) -> None:
        self.catalogue.used(MODEL, address(text))

    def cached(self) -> set[str]:
        keys = set(self.store.keys())
        return {chunk.text for chunk in self.library.all_chunks() if address(chunk.text) in keys}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def test_caching_reports_and_finishes(place: Place) -> None:
    place.add("/d/a.md", *names("a", 7))
    place.add("/d/b.md", *names("b", 3))
    seen: list[CacheProgress] = []
    place.shelf.refresh()
    last = place.shelf.cache(seen.append, lambda: False)
    assert place.engine.read == names("b", 3) + names("a", 7)
    assert len(place.engine.batches) > 2
    assert (seen[0].done, seen[0].total, seen[0].tokens_done, seen[0].tokens_total) == (0, 10, 0, 100)
    assert (last.done, last.tokens_done, last.over_budget) == (10, 100, False)
    assert len(seen) == len(place.engine.batches) + 1
    finished = [chunk for state in seen for chunk in state.finished]
    assert sorted(finished) == sorted(place.shelf.tokens)
    assert place.shelf.waiting == {}
    assert place.shelf.usage().disk_bytes == place.shelf.usage().written_bytes == 10 * BYTES


def test_caching_stops_between_batches_and_goes_on_where_it_was(place: Place) -> None:
    place.add("/d/a.md", *names("a", 10))
    stopped = place.cache(lambda: len(place.engine.batches) == 1)
    assert 0 < stopped.done < 10
    assert stopped.tokens_done == TOKENS * stopped.done
    assert place.cache().done == 10
    assert sorted(place.engine.read) == names("a", 10)


def test_what_was_finished_when_caching_was_broken_off_waits_no_longer(place: Place) -> None:
    place.add("/d/a.md", *names("a", 10))
    place.engine.abort_after = 2
    assert place.cache().done == 2
    assert len(place.shelf.waiting) == 8


def test_nothing_to_cache_asks_nothing_of_the_engine(place: Place) -> None:
    assert place.cache() == CacheProgress(0, 0, 0, 0)
    place.add("/d/a.md", "a")
    place.cache()
    assert place.cache().done == 1
    assert len(place.engine.batches) == 1


def test_an_address_is_found_once(place: Place) -> None:
    place.add("/d/a.md", *names("a", 300))
    moments: list[int] = []
    place.shelf.refresh(lambda: moments.append(place.engine.addressed))
    assert moments == [100, 200, 300]
    place.add("/d/a.md", *names("a", 299), "new")
    place.another().refresh()
    assert place.engine.addressed == 301


def test_addresses_noted_while_files_are_read_are_not_found_again(place: Place) -> None:
    place.add("/d/a.md", *names("a", 3))
    noted = place.shelf.note({chunk.id: chunk.text for chunk in place.library.all_chunks()})
    assert noted == {chunk.id: address(chunk.text) for chunk in place.library.all_chunks()}
    place.shelf.refresh()
    assert place.engine.addressed == 3
    assert len(place.shelf.waiting) == 3


def test_another_model_has_addresses_of_its_own(place: Place, tmp_path: Path) -> None:
    place.add("/d/a.md", "a")
    place.cache()
    store = place.catalogue.store("fedcba9876543210")
    other = Shelf(place.library, place.engine, place.catalogue, store, place.turns, PREAMBLE)
    other.refresh()
    assert len(other.waiting) == 1
    assert place.engine.addressed == 2


def test_pinned_documents_are_cached_first(place: Place) -> None:
    place.add("/d/a.md", *names("a", 5))
    place.add("/d/sub/b.md", *names("b", 5))
    place.add("/d/z.md", "z")
    place.library.pin(Path("/d/sub"))
    place.library.pin(Path("/d/z.md"))
    place.cache()
    assert place.engine.read == ["z", *names("b", 5), *names("a", 5)]
    assert [item.pinned for item in place.shelf.items] == [False, True, True]


def test_what_was_edited_lately_is_cached_before_what_is_old(place: Place) -> None:
    place.save("/d/old.md", "o", days_ago=300)
    place.save("/d/today.md", *names("t", 5), days_ago=0.3)
    place.save("/d/now.md", *names("n", 9), days_ago=0)
    place.save("/d/from the future.md", *names("f", 8), days_ago=-900)
    place.cache()
    assert place.engine.read == [*names("f", 8), *names("n", 9), *names("t", 5), "o"]


def test_documents_that_questions_found_are_cached_before_others(place: Place) -> None:
    place.save("/d/a.md", *names("a", 3), days_ago=100)
    place.save("/d/b.md", *names("b", 4), days_ago=100)
    place.engine.cache(["b2"], lambda: False)  # an answer needed it
    for _ in range(3):
        place.use("b2")
    place.cache()
    assert place.engine.read == ["b2", "b0", "b1", "b3", *names("a", 3)]


def test_the_budget_ends_caching_and_nothing_is_given_up_for_it(place: Place) -> None:
    place.add("/d/a.md", *names("a", 20))
    place.shelf.limit_bytes = 10 * BYTES
    done = place.cache()
    assert done.over_budget
    assert done.done == len(place.cached()) == 10
    batches = len(place.engine.batches)
    assert place.cache().over_budget
    assert len(place.engine.batches) == batches, "nothing is cached only to be given up"


def test_passages_of_no_document_make_room(place: Place) -> None:
    place.add("/d/a.md", *names("old", 8))
    place.shelf.limit_bytes = 8 * BYTES
    place.cache()
    place.add("/d/a.md", *names("new", 6), "old0", "old1")
    done = place.cache()
    assert (done.done, done.over_budget) == (8, False)
    assert place.cached() == {*names("new", 6), "old0", "old1"}
    assert place.shelf.usage().disk_bytes <= 8 * BYTES


def test_what_another_model_stored_makes_room(place: Place) -> None:
    other = place.catalogue.store("fedcba9876543210")
    for i, key in enumerate(("aa" * 32, "bb" * 32)):
        other.write(key, bytes(5 * BYTES), 5 * SECONDS)
        place.age_key(other, key, days=1 - i / 10)
    place.add("/d/a.md", *names("a", 4))
    place.shelf.limit_bytes = 12 * BYTES
    assert place.cache().done == 4
    assert other.keys() == ["bb" * 32], "the one unused for longest"


def test_conversations_of_the_last_week_are_worth_a_document(place: Place) -> None:
    for key, days in (("aa" * 32, 1), ("bb" * 32, 30)):
        place.turns.write(key, bytes(2 * BYTES), 2 * SECONDS, uses=1)
        place.age_key(place.turns, key, days)
    place.store.write(PREAMBLE, bytes(BYTES))
    place.add("/d/a.md", *names("a", 8))
    place.shelf.limit_bytes = 8 * BYTES
    done = place.cache()
    assert (done.done, done.over_budget) == (5, True)
    assert place.turns.keys() == ["aa" * 32]
    assert place.store.has(PREAMBLE)
    place.library.pin(Path("/d/a.md"))
    place.cache()
    assert place.turns.keys() == []
    assert place.store.has(PREAMBLE)


def test_pinned_documents_displace_others_but_not_each_other(place: Place) -> None:
    place.add("/d/a.md", *names("a", 8))
    place.shelf.limit_bytes = 8 * BYTES
    place.cache()
    for i, text in enumerate(names("a", 8)):
        place.age(text, days=10 - i)
    place.add("/d/p.md", *names("p", 4))
    place.library.pin(Path("/d/p.md"))
    done = place.cache()
    assert done.over_budget, "of those that were displaced"
    assert place.cached() == {*names("p", 4), "a4", "a5", "a6", "a7"}, "those unused for longest went"
    place.library.pin(Path("/d/a.md"))
    assert place.cache().over_budget
    assert place.cached() == {*names("p", 4), "a4", "a5", "a6", "a7"}


def test_after_an_answer_the_budget_is_met_again(place: Place) -> None:
    place.add("/d/a.md", *names("a", 8))
    place.shelf.limit_bytes = 8 * BYTES
    place.cache()
    place.library.pin(Path("/d/a.md"))
    for text in names("a", 8):
        place.age(text, days=1)
    place.add("/d/b.md", "b0")
    place.engine.cache(["b0", "loose"], lambda: False)  # as an answer does, whatever the budget
    fresh = place.another(8 * BYTES)
    fresh.trim()
    assert place.cached() == set(names("a", 8)), "what is pinned goes last, however old"
    place.library.unpin(Path("/d/a.md"))
    place.age("a3", days=30)
    place.engine.cache(["b0"], lambda: False)
    fresh.trim()
    assert place.cached() == {*names("a", 8), "b0"} - {"a3"}


def test_a_budget_smaller_than_one_passage_caches_nothing_for_long(place: Place) -> None:
    place.add("/d/a.md", *names("a", 3))
    place.shelf.limit_bytes = BYTES // 2
    assert place.cache().over_budget
    assert place.cached() == set()


def test_a_budget_that_the_opening_alone_exceeds_is_not_tried_for_ever(place: Place) -> None:
    place.engine.opening = 20 * BYTES
    place.add("/d/a.md", *names("a", 3))
    place.cache()
    place.shelf.limit_bytes = 5 * BYTES
    assert place.cache().over_budget
    assert place.store.size_bytes() <= 5 * BYTES


def test_several_processes_keep_one_budget(place: Place) -> None:
    place.add("/d/a.md", *names("a", 20))
    shelves = [place.another(10 * BYTES) for _ in range(2)]
    for shelf in shelves:
        shelf.refresh()
    first = shelves[0].cache(lambda _: None, lambda: len(place.engine.batches) == 1)
    assert not first.over_budget
    assert shelves[1].cache(lambda _: None, lambda: False).over_budget, "it counts what the other one wrote"
    assert place.store.size_bytes() <= 10 * BYTES


def test_a_dropped_document_is_made_anew(place: Place) -> None:
    place.add("/d/a.md", "a", "shared")
    place.add("/d/sub/b.md", "b", "shared")
    place.cache()
    assert place.shelf.drop(Path("/d/sub")) == 2
    assert place.cached() == {"a"}
    place.shelf.cache(lambda _: None, lambda: False)
    assert place.cached() == {"a", "b", "shared"}
    assert place.shelf.usage().written_bytes == 5 * BYTES
    assert place.shelf.usage().disk_bytes == 3 * BYTES


def test_what_an_answer_stored_waits_no_longer(place: Place) -> None:
    place.add("/d/a.md", "a", "b")
    place.shelf.refresh()
    place.engine.cache(["a"], lambda: False)
    place.shelf.settle(place.shelf.tokens)
    assert len(place.shelf.waiting) == 1
    place.shelf.settle(["of no document"])


# What a stored passage is worth


def test_what_is_used_more_often_stays(place: Place) -> None:
    place.add("/d/a.md", *names("a", 4))
    place.cache()
    for text, times in (("a0", 3), ("a1", 1), ("a2", 2)):
        for _ in range(times):
            place.use(text)
    for limit, left in ((3, {"a0", "a1", "a2"}), (2, {"a0", "a2"}), (1, {"a0"})):
        place.another(limit * BYTES).trim()
        assert place.cached() == left


def test_uses_of_long_ago_count_less(place: Place) -> None:
    place.add("/d/a.md", "often, but a month ago", "once")
    place.cache()
    for _ in range(4):
        place.use("often, but a month ago")
    place.age("often, but a month ago", days=30)
    place.use("once")
    place.another(BYTES).trim()
    assert place.cached() == {"once"}


def test_what_took_longer_and_is_smaller_is_worth_more(place: Place) -> None:
    for key, size, seconds in (("aa", BYTES, 1.0), ("bb", BYTES, 9.0), ("cc", 3 * BYTES, 9.0), ("dd", 2 * BYTES, 9.0)):
        place.turns.write(key * 32, bytes(size), seconds, uses=1)
    left = []
    for limit in (6, 5, 3, 1):
        place.another(limit * BYTES).trim()
        left.append("".join(key[0] for key in sorted(place.turns.keys())))
    assert left == ["bcd", "bd", "bd", "b"]


def test_a_gone_document_stays_as_long_as_it_was_used_lately(place: Place) -> None:
    place.add("/d/a.md", *names("old", 4))
    place.cache()
    place.use("old0")
    place.catalogue.flush()
    place.age("old0", days=1)
    place.use("old1")
    place.catalogue.flush()
    place.age("old1", days=9)
    place.add("/d/a.md", *names("new", 4))
    place.shelf.limit_bytes = 4 * BYTES
    assert place.cache().over_budget
    assert place.cached() == {"new0", "new1", "new2"}
    assert place.store.has(address("old0")), "it would be asked for more likely than a passage that never was"


def test_after_an_answer_conversations_and_passages_are_weighed_alike(place: Place) -> None:
    place.add("/d/a.md", *names("a", 2))
    place.cache()
    place.use("a0")
    place.use("a0")
    place.turns.write("aa" * 32, bytes(BYTES), SECONDS, uses=1)
    place.another(2 * BYTES).trim()
    assert (place.cached(), place.turns.keys()) == ({"a0"}, ["aa" * 32])


# Several processes


def test_what_another_process_computes_is_waited_for(place: Place) -> None:
    place.add("/d/a.md", *names("a", 10))
    place.engine.elsewhere = {"a1", "a2"}
    states: list[CacheProgress] = []

    def progress(state: CacheProgress) -> None:
        states.append(state)
        if state.done == 8 and place.engine.elsewhere:  # all others are there
            place.store.write(address("a1"), bytes(BYTES))  # the other process goes on, and ends too early
            place.engine.elsewhere = set()

    place.shelf.refresh()
    last = place.shelf.cache(progress, lambda: False)
    assert (last.done, last.over_budget, place.shelf.waiting) == (10, False, {})
    assert place.cached() == set(names("a", 10))
    assert place.store.total_written_bytes() == 10 * BYTES
    assert len({chunk for state in states for chunk in state.finished}) == 9, "all but the one the other process made"


def test_waiting_for_another_process_can_be_stopped(place: Place) -> None:
    place.add("/d/a.md", *names("a", 3))
    place.engine.elsewhere = {"a1"}
    looks = 0

    def should_stop() -> bool:
        nonlocal looks
        looks += 1
        return looks > 3

    place.shelf.refresh()
    state = place.shelf.cache(lambda _: None, should_stop)
    assert (state.done, len(place.shelf.waiting)) == (2, 1)
