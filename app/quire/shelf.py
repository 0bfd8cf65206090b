"""What of the library has its KV on disk, what is cached next, and what goes when the disk budget is used up.

A stored passage is worth more the more it is wanted: pinned ones are cached first and evicted last, then come those of
any document and the conversations of the last week, then the rest: of documents that are gone, of older conversations,
of other models. Among equals the one that was unused for longest goes first. Caching ahead takes the place only of what
is worth less; an answer stores what it needs, and the budget is met again afterwards. Several processes may do so at
once: what one takes away, another computes again.

Knows nothing of how KV is made, how files become passages, or who looks at it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Protocol

from quire.library import Library, StoredDocument, batched
from quire_engine.errors import Aborted
from quire_engine.kv.store import KVStore, Stored

_BATCH_CHUNKS = 4  # small: between two batches the work can stop
_ADDRESSES_AT_ONCE = 100  # found between two chances to do something else
_RECENT_SECONDS = 7 * 86400.0
_LOOSE, _HELD, _PINNED = range(3)  # what a stored passage is worth


class CachingEngine(Protocol):
    """What a shelf needs of the engine. Passages may come from any documents, in any order."""

    def address(self, passage: str) -> str: ...
    def cache(self, passages: Sequence[str], should_stop: Callable[[], bool]) -> None: ...


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

    def __init__(self, library: Library, engine: CachingEngine, store: KVStore, turns: KVStore, preamble: str) -> None:
        """turns: where the engine keeps conversations.  preamble: the address of what stands before every passage."""
        self._library = library
        self._engine = engine
        self._store = store
        self.limit_bytes = 0
        self._turns = turns
        self._preamble = preamble
        self._stores = store.root.parent  # this model's and those of others
        self._addresses: Mapping[str, str] = {}
        self._pinned: frozenset[str] = frozenset()
        self._bytes_per_token = 0.0
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

    def _all_addresses(self, between: Callable[[], None]) -> Mapping[str, str]:
        """Found once for every passage and model, and noted in the index."""
        name = self._store.root.name
        known = self._library.addresses(name)
        for some in batched((chunk for chunk in self.tokens if chunk not in known), _ADDRESSES_AT_ONCE):
            found = {chunk: self._engine.address(text) for chunk, text in self._library.texts(some).items()}
            self._library.note_addresses(name, found)
            known |= found
            between()
        return known

    def _look(self) -> list[Stored]:
        """What is on disk, of all models; what is not, waits."""
        self._looked, self._written_when_listed = True, self._total_written()
        entries = [entry for store in self._all_stores() for entry in store.entries()]
        self._listed_bytes = sum(entry.size_bytes for entry in entries)
        sizes = {entry.key: entry.size_bytes for entry in entries if entry.root == self._store.root}
        pinned_first = sorted(self.items, key=lambda item: not item.pinned)
        ordered = dict.fromkeys(chunk for item in pinned_first for chunk in item.passages)
        addresses = self._addresses
        self.waiting = {c: self.tokens[c] for c in ordered if c in self.tokens and addresses.get(c) not in sizes}
        stored = [c for c in self.tokens if c not in self.waiting and addresses.get(c) in sizes]
        if tokens := sum(self.tokens[c] for c in stored):
            self._bytes_per_token = sum(sizes[addresses[c]] for c in stored) / tokens
        return entries

    def _all_stores(self) -> list[KVStore]:
        with suppress(OSError):  # nothing was stored yet
            return [KVStore(path) for path in self._stores.iterdir() if path.is_dir()]
        return []

    def _total_written(self) -> int:
        return sum(store.total_written_bytes() for store in self._all_stores())

    # Caching

    def cache(self, progress: Callable[[CacheProgress], None], should_stop: Callable[[], bool]) -> CacheProgress:
        """Has the engine store what waits; returns how far it came.

        Reports at the start and after each batch; stops soon after should_stop says so, or when the rest does not
        fit the budget.
        """
        state = self.progress()
        progress(state)
        stopped = False
        while (batch := self._batch()) and not stopped and not should_stop():
            while batch and not self._room_for(batch):
                batch = batch[: len(batch) // 2]
            if not batch:
                return replace(self.progress(), over_budget=True)
            began = time.perf_counter()
            done = self._store_batch(batch, should_stop)
            stopped = len(done) < len(batch)
            self.trim()
            state = replace(self.progress(), finished=done, took_ms=1000 * (time.perf_counter() - began))
            progress(state)
        return state

    def _store_batch(self, batch: Sequence[str], should_stop: Callable[[], bool]) -> tuple[str, ...]:
        """Has the engine store these passages; returns those that wait no longer: all, unless it was stopped."""
        texts, written_before = self._library.texts(batch), self._store.written_bytes
        done = tuple(batch)
        try:
            self._engine.cache([texts[chunk] for chunk in batch if chunk in texts], should_stop)
        except Aborted:
            done = tuple(c for c in batch if c in self._addresses and self._store.has(self._addresses[c]))
        tokens = sum(self.waiting.pop(chunk, 0) for chunk in done)
        written_bytes = self._store.written_bytes - written_before
        self._bytes_per_token = max(self._bytes_per_token, written_bytes / max(1, tokens))
        return done

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
        """The next passages, all worth the same."""
        worth = {chunk: self._worth(chunk) for chunk in islice(self.waiting, _BATCH_CHUNKS)}
        return list(takewhile(lambda chunk: worth[chunk] == worth[next(iter(worth))], worth))

    def _worth(self, chunk: str) -> int:
        return _PINNED if chunk in self._pinned else _HELD

    # The budget

    def trim(self) -> None:
        """Evicts the least valuable until the budget is met."""
        self._make_room(0, _PINNED + 1)

    def _room_for(self, batch: Sequence[str]) -> bool:
        needed = int(self._bytes_per_token * sum(self.waiting.get(chunk, 0) for chunk in batch))
        return self._make_room(needed, self._worth(batch[0]))

    def _make_room(self, needed_bytes: int, below: int) -> bool:
        """Evicts only what is worth less than `below`, and nothing where that is not enough."""
        if self.limit_bytes and not self._looked:
            self._look()
        if not self.limit_bytes or self.usage().disk_bytes + needed_bytes <= self.limit_bytes:
            return True
        self.refresh()  # another process may have stored, evicted or pinned something
        excess = self._listed_bytes + needed_bytes - self.limit_bytes
        if excess <= 0:
            return True
        victims: list[Stored] = []
        for entry in self._least_valuable_first(below):
            victims.append(entry)
            excess -= entry.size_bytes
            if excess <= 0:
                break
        else:
            return False
        for entry in victims:
            KVStore(entry.root).remove(entry.key)
        self._look()
        return True

    def _least_valuable_first(self, below: int) -> list[Stored]:
        worth = {address: self._worth(chunk) for chunk, address in self._addresses.items() if chunk in self.tokens}
        worth[self._preamble] = _PINNED
        recently = time.time() - _RECENT_SECONDS

        def value(entry: Stored) -> int:
            if entry.root == self._turns.root:
                return _HELD if entry.used_at > recently else _LOOSE
            return worth.get(entry.key, _LOOSE) if entry.root == self._store.root else _LOOSE

        entries = [entry for entry in self._look() if value(entry) < below]
        return sorted(entries, key=lambda entry: (value(entry), entry.used_at))
