"""What of the library has its KV on disk, what is cached next, and what goes when the disk budget is used up.

What is stored is worth the seconds it saves: those that computing it took, times how often it was used, where a use
counts half after a week, over its bytes. A passage of the library counts half a use more, because it may be asked for;
one of a gone document or another model, and a conversation, count by their uses alone. What is pinned is cached first
and evicted last. Then come the documents that are likeliest to be asked for (saved just now, or found by questions
lately) over what caching the rest of them takes. Caching ahead takes the place only of what is not in the library and
worth less; an answer stores what it needs, and the budget is met again afterwards. Several processes may cache at once:
none computes what another is computing, and what one takes away, another computes again.

Knows nothing of how KV is made, how files become passages, or who looks at it.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Protocol

from quire.library import Library, StoredDocument, batched
from quire_engine.errors import Aborted
from quire_engine.kv.catalogue import Catalogue, Entry
from quire_engine.kv.store import KVStore

_BATCH_CHUNKS = 4  # small: between two batches the work can stop
_ADDRESSES_AT_ONCE = 100  # found between two chances to do something else
_EXPECTED_USES = 0.5  # of a passage of the library that was never used
_DAY_SECONDS = 86400.0
_JUST_NOW_SECONDS = 60.0  # saves closer together than this are equally new
_OTHERS_SECONDS = 0.2  # between two looks at what another process is computing


class CachingEngine(Protocol):
    """What a shelf needs of the engine. Passages may come from any documents, in any order."""

    def address(self, passage: str) -> str: ...
    def cache(self, passages: Sequence[str], should_stop: Callable[[], bool]) -> Collection[str]:
        """Returns the passages left out because another process is computing them."""


@dataclass(frozen=True)
class CacheProgress:
    """How much of the library has its KV on disk, passages cached before included. finished: the ids of those that
    came since the last report, and took_ms what they took.  over_budget: the rest does not fit the disk budget."""

    done: int
    total: int
    tokens_done: int
    tokens_total: int
    finished: tuple[str, ...] = ()
    took_ms: float = 0.0
    over_budget: bool = False


@dataclass(frozen=True)
class Item:
    """A document with the ids of its passages."""

    document: StoredDocument
    passages: tuple[str, ...]
    pinned: bool


@dataclass(frozen=True)
class Usage:
    """KV on disk, of all models, the limit (0: none), and what was written: by this process, and ever by any."""

    disk_bytes: int
    limit_bytes: int
    written_bytes: int
    total_written_bytes: int


class Shelf:
    """The cached side of a library, for one model.

    pins, items, tokens (of every passage, by id) and waiting (those not cached, in the order in which they will be)
    are as they were when last refreshed, corrected by what was done here since. limit_bytes: the disk budget; 0: none.
    """

    def __init__(
        self,
        library: Library,
        engine: CachingEngine,
        catalogue: Catalogue,
        store: KVStore,
        turns: KVStore,
        preamble: str,
    ) -> None:
        """catalogue: of all stores.  store, turns: where the engine keeps passages and conversations.  preamble: the
        address of what stands before every passage."""
        self._library = library
        self._engine = engine
        self._catalogue = catalogue
        self._store = store
        self.limit_bytes = 0
        self._turns = turns
        self._preamble = preamble
        self._addresses: Mapping[str, str] = {}
        self._pinned: frozenset[str] = frozenset()
        self._bytes_per_token = 0.0
        self._elsewhere: set[str] = set()  # of those that wait: another process was computing them
        self._looked = False
        self._listed_bytes = self._written_when_listed = 0
        self.pins: tuple[Path, ...] = ()
        self.items: tuple[Item, ...] = ()
        self.tokens: Mapping[str, int] = {}
        self.waiting: dict[str, int] = {}

    # Looking

    def refresh(self, between: Callable[[], None] = lambda: None) -> None:
        """Looks at library and disk anew. between: called now and then while that takes long."""
        self.pins, contents = tuple(self._library.pins()), self._library.contents()
        self.items = tuple(
            Item(d, contents.get(d.path, ()), any(d.path.is_relative_to(pin) for pin in self.pins))
            for d in self._library.documents()
        )
        self.tokens = self._library.tokens()
        self._addresses = self._all_addresses(between)
        self._pinned = frozenset(chunk for item in self.items if item.pinned for chunk in item.passages)
        self._look()

    def usage(self) -> Usage:
        written = self._total_written()
        return Usage(
            self._listed_bytes + max(0, written - self._written_when_listed),
            self.limit_bytes,
            self._store.written_bytes + self._turns.written_bytes,
            written,
        )

    def progress(self) -> CacheProgress:
        total, left = sum(self.tokens.values()), sum(self.waiting.values())
        return CacheProgress(len(self.tokens) - len(self.waiting), len(self.tokens), total - left, total)

    def note(self, texts: Mapping[str, str]) -> Mapping[str, str]:
        """Finds the addresses of passages, by id, and keeps them in the index: once for every passage and model."""
        found = {chunk: self._engine.address(text) for chunk, text in texts.items()}
        self._library.note_addresses(self._store.root.name, found)
        return found

    def _all_addresses(self, between: Callable[[], None]) -> Mapping[str, str]:
        known = self._library.addresses(self._store.root.name)
        for some in batched((chunk for chunk in self.tokens if chunk not in known), _ADDRESSES_AT_ONCE):
            known |= self.note(self._library.texts(some))
            between()
        return known

    def _look(self) -> None:
        """What is on disk, of all models; what is not, waits."""
        self._looked, self._written_when_listed = True, self._total_written()
        self._catalogue.look()
        self._listed_bytes = self._catalogue.size_bytes()
        sizes = self._catalogue.sizes(self._store.root.name)
        addresses = self._addresses
        lacking = {
            c for item in self.items for c in item.passages if c in self.tokens and addresses.get(c) not in sizes
        }
        ordered = dict.fromkeys(c for item in self._by_worth(lacking) for c in item.passages if c in lacking)
        self.waiting = {chunk: self.tokens[chunk] for chunk in ordered}
        stored = [c for c in self.tokens if c not in self.waiting and addresses.get(c) in sizes]
        if tokens := sum(self.tokens[c] for c in stored):
            self._bytes_per_token = sum(sizes[addresses[c]] for c in stored) / tokens

    def _by_worth(self, lacking: set[str]) -> list[Item]:
        """The documents that lack passages, in the order in which they are cached: pinned ones, then by the questions
        to be expected over the tokens to compute, so that the fewest questions come too early (Smith's rule)."""
        if not lacking:
            return []
        now, store = time.time(), self._store.root.name
        uses = {entry.key: entry.uses_at(now) for entry in self._catalogue.entries() if entry.store == store}

        def worth(item: Item) -> tuple[bool, float]:
            age = max(_JUST_NOW_SECONDS, now - item.document.mtime_ns / 1e9)  # a clock that jumped makes it new
            used = sum(uses.get(self._addresses.get(chunk, ""), 0.0) for chunk in item.passages)
            tokens = sum(self.tokens[chunk] for chunk in item.passages if chunk in lacking)
            return item.pinned, (_EXPECTED_USES + _DAY_SECONDS / age + used) / tokens

        return sorted((i for i in self.items if not lacking.isdisjoint(i.passages)), key=worth, reverse=True)

    def _total_written(self) -> int:
        return sum(store.total_written_bytes() for store in self._catalogue.stores())

    # Caching

    def cache(self, progress: Callable[[CacheProgress], None], should_stop: Callable[[], bool]) -> CacheProgress:
        """Has the engine store what waits; returns how far it came.

        Reports at the start and after each batch; stops soon after should_stop says so, or when the rest does not
        fit the budget. What another process is computing is waited for at the end.
        """
        self.trim()  # the budget may be less than it was
        state = self.progress()
        progress(state)
        stopped = False
        while self.waiting and not stopped and not should_stop():
            if not (batch := self._batch()):
                self._wait_for_others()
                state = self.progress()
                progress(state)
                continue
            while batch and not self._room_for(batch):
                batch = batch[: len(batch) // 2]
            if not batch:
                return replace(self.progress(), over_budget=True)
            began = time.perf_counter()
            done, stopped = self._store_batch(batch, should_stop)
            self.trim()
            state = replace(self.progress(), finished=done, took_ms=1000 * (time.perf_counter() - began))
            progress(state)
            if not self.waiting.keys().isdisjoint(done):  # it had to go again, and would for ever
                return replace(self.progress(), over_budget=True)
        return state

    def _store_batch(self, batch: Sequence[str], should_stop: Callable[[], bool]) -> tuple[tuple[str, ...], bool]:
        """Has the engine store these passages; returns those that wait no longer, and whether it was stopped."""
        texts, written_before = self._library.texts(batch), self._store.written_bytes
        stopped = False
        try:
            left = self._engine.cache([texts[chunk] for chunk in batch if chunk in texts], should_stop)
            self._elsewhere.update(chunk for chunk in batch if texts.get(chunk) in left)
            done = tuple(chunk for chunk in batch if chunk not in self._elsewhere)
        except Aborted:
            done = tuple(c for c in batch if c in self._addresses and self._store.has(self._addresses[c]))
            stopped = True
        tokens = sum(self.waiting.pop(chunk, 0) for chunk in done)
        written_bytes = self._store.written_bytes - written_before
        self._bytes_per_token = max(self._bytes_per_token, written_bytes / max(1, tokens))
        return done, stopped

    def _wait_for_others(self) -> None:
        """Then what another process was computing is there, or can be tried again."""
        time.sleep(_OTHERS_SECONDS)
        self.settle(self._elsewhere)
        self._elsewhere.clear()

    def settle(self, chunks: Iterable[str]) -> None:
        """Some of these passages may have been stored by an answer: then they wait no longer."""
        for chunk in chunks:
            if chunk in self.waiting and self._store.has(self._addresses[chunk]):
                del self.waiting[chunk]

    def drop(self, path: Path) -> int:
        """Removes the KV of a document, or of all below a folder, so that it is made anew; returns how many passages.

        A passage that stands in other documents too is made anew for all of them.
        """
        inside = [item.passages for item in self.items if item.document.path.is_relative_to(path)]
        chunks = {chunk for passages in inside for chunk in passages if chunk in self._addresses}
        for chunk in chunks:
            self._store.remove(self._addresses[chunk])
        self._look()
        return len(chunks)

    def _batch(self) -> list[str]:
        """The next passages, all pinned or none, without those that another process is computing."""
        free = list(islice((chunk for chunk in self.waiting if chunk not in self._elsewhere), _BATCH_CHUNKS))
        return list(takewhile(lambda chunk: (chunk in self._pinned) == (free[0] in self._pinned), free))

    # The budget

    def trim(self) -> None:
        """Evicts the least valuable until the budget is met."""
        self._make_room(0, self._victims)

    def _room_for(self, batch: Sequence[str]) -> bool:
        needed = int(self._bytes_per_token * sum(self.waiting.get(chunk, 0) for chunk in batch))
        return self._make_room(needed, self._unpinned if batch[0] in self._pinned else self._worth_less)

    def _make_room(self, needed_bytes: int, victims: Callable[[], list[Entry]]) -> bool:
        """Evicts the first of the victims, as many as it takes, and nothing where all are not enough."""
        if self.limit_bytes and not self._looked:
            self._look()
        if not self.limit_bytes or self.usage().disk_bytes + needed_bytes <= self.limit_bytes:
            return True
        self.refresh()  # another process may have stored, evicted or pinned something
        excess = self._listed_bytes + needed_bytes - self.limit_bytes
        going: list[Entry] = []
        for entry in victims() if excess > 0 else ():
            if excess <= 0:
                break
            going.append(entry)
            excess -= entry.size_bytes
        if excess > 0:
            return False
        for entry in going:
            self._catalogue.store(entry.store).remove(entry.key)
        if going:
            self._look()
        return True

    def _victims(self) -> list[Entry]:
        """All that is stored, least valuable first, what is pinned last."""
        now, wanted, pinned = time.time(), self._wanted(), self._pinned_addresses()

        def value(entry: Entry) -> tuple[bool, float, float]:
            expected = _EXPECTED_USES if entry.key in wanted else 0.0
            return entry.key in pinned, entry.value(now, expected), entry.used_at

        return sorted(self._catalogue.entries(), key=value)

    def _unpinned(self) -> list[Entry]:
        pinned = self._pinned_addresses()
        return [entry for entry in self._victims() if entry.key not in pinned]

    def _worth_less(self) -> list[Entry]:
        """What a passage of the library may take the place of: not others, or they would take turns for ever."""
        now, wanted = time.time(), self._wanted() | self._pinned_addresses()
        worth = self._catalogue.seconds_per_byte(self._store.root.name) * _EXPECTED_USES
        return [e for e in self._victims() if e.key not in wanted and e.value(now) < worth]

    def _wanted(self) -> frozenset[str]:
        """Addresses of the library's passages."""
        return frozenset(address for chunk, address in self._addresses.items() if chunk in self.tokens)

    def _pinned_addresses(self) -> frozenset[str]:
        pinned = {self._addresses[chunk] for chunk in self._pinned if chunk in self._addresses}
        return frozenset(pinned | {self._preamble})
