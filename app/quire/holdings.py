"""All cached KV on this computer, whatever model it belongs to: what it holds, whether it is sound, and clearing it.

Opens no model and no index. Knows nothing of what is wanted, nor of the command line.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from quire.terminal import printable
from quire_engine.errors import DamagedChunk, MissingChunk, QuireError
from quire_engine.kv.catalogue import Catalogue, Entry, Total
from quire_engine.turns import STORE_PREFIX

_DAY_SECONDS = 86400.0
_UNKNOWN = "a model not used lately"


@dataclass(frozen=True)
class Holding:
    """What is stored for one model, prompt and bit plan. stores: where.  turns: of conversations, among the chunks.
    bits_per_value: all bytes of the files over the keys and values in them.  seconds: that computing it took, measured
    or estimated."""

    model: str
    stores: tuple[str, ...]
    chunks: int
    turns: int
    size_bytes: int
    tokens: int
    bits_per_value: float
    seconds: float


@dataclass(frozen=True)
class Holdings:
    """limit_bytes: the disk budget; 0: none.  written_bytes: to this cache, ever."""

    each: tuple[Holding, ...]
    size_bytes: int
    limit_bytes: int
    written_bytes: int

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"each": [asdict(holding) for holding in self.each]}


@dataclass(frozen=True)
class Damaged:
    """A file that does not check out. removed: so that it is computed again."""

    store: str
    key: str
    reason: str
    removed: bool


@dataclass(frozen=True)
class Checked:
    """How many chunks were read, and which of them are damaged. complete: it was not stopped."""

    chunks: int
    size_bytes: int
    damaged: tuple[Damaged, ...]
    complete: bool


def of(catalogue: Catalogue, limit_bytes: int) -> Holdings:
    """What is there now, the largest first."""
    catalogue.look()
    by_name: dict[str, list[Total]] = {}
    for total in catalogue.totals():
        by_name.setdefault(total.store.removeprefix(STORE_PREFIX), []).append(total)
    each = sorted((_holding(catalogue, totals) for totals in by_name.values()), key=lambda h: -h.size_bytes)
    written = sum(store.total_written_bytes() for store in catalogue.stores())
    return Holdings(tuple(each), sum(h.size_bytes for h in each), limit_bytes, written)


def _holding(catalogue: Catalogue, totals: Sequence[Total]) -> Holding:
    size_bytes, numbers = sum(t.size_bytes for t in totals), sum(t.numbers for t in totals)
    titles = [model for t in totals if (model := catalogue.store(t.store).model)]
    return Holding(
        model=titles[0] if titles else _UNKNOWN,
        stores=tuple(t.store for t in totals),
        chunks=sum(t.chunks for t in totals),
        turns=sum(t.chunks for t in totals if t.store.startswith(STORE_PREFIX)),
        size_bytes=size_bytes,
        tokens=sum(t.tokens for t in totals),
        bits_per_value=8 * size_bytes / numbers if numbers else 0.0,
        seconds=sum(t.seconds for t in totals),
    )


def verify(
    catalogue: Catalogue, keep: bool, progress: Callable[[int, int], None], should_stop: Callable[[], bool]
) -> Checked:
    """Reads every file and checks every checksum. keep: leaves what is damaged, which a question would remove.

    progress: bytes read, of how many.
    """
    catalogue.look()
    return check(catalogue, catalogue.entries(), keep, progress, should_stop)


def check(
    catalogue: Catalogue,
    entries: Sequence[Entry],
    keep: bool,
    progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> Checked:
    """As verify, but only these."""
    damaged: list[Damaged] = []
    done_bytes, total_bytes, count = 0, sum(entry.size_bytes for entry in entries), 0
    progress(0, total_bytes)
    for entry in entries:
        if should_stop():
            break
        store = catalogue.store(entry.store)
        try:
            store.check(entry.key)
        except MissingChunk:
            pass  # removed meanwhile
        except DamagedChunk as error:
            damaged.append(Damaged(entry.store, entry.key, error.message, not keep and store.remove(entry.key)))
        count, done_bytes = count + 1, done_bytes + entry.size_bytes
        progress(done_bytes, total_bytes)
    return Checked(count, done_bytes, tuple(damaged), complete=count == len(entries))


def unused(catalogue: Catalogue, days: float) -> list[Entry]:
    """What was neither made nor used for so many days; 0: everything."""
    catalogue.look()
    before = time.time() - days * _DAY_SECONDS
    return [entry for entry in catalogue.entries() if entry.used_at <= before]


def stores_of(catalogue: Catalogue, model: str) -> frozenset[str]:
    """The stores of a model by its title. Raises QuireError with the titles that there are."""
    holdings = of(catalogue, 0).each
    found = [name for h in holdings if h.model.casefold() == model.casefold() for name in h.stores]
    if not found:
        titles = ", ".join(sorted({printable(h.model) for h in holdings})) or "nothing"
        raise QuireError(f"Nothing is cached for a model called {model}.", f"There is: {titles}.")
    return frozenset(found)


def remove(catalogue: Catalogue, entries: Sequence[Entry]) -> int:
    """Removes these; returns how many could be."""
    return sum(catalogue.store(entry.store).remove(entry.key) for entry in entries)
