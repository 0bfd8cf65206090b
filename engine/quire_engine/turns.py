"""Earlier turns of a conversation: what of them stands in the context, and how their KV comes back.

The line of turns comes with every question, so that branching, asking again and reopening are all the same: the turns
that the runtime still holds stay, those behind them are loaded from disk, and what is neither is read again. A turn's
address covers everything before it, so branches share what they have in common. Knows nothing of documents or screens.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from quire_engine.errors import DamagedChunk, MissingChunk, UnwritableStore
from quire_engine.kv import format
from quire_engine.kv.store import KVStore
from quire_engine.kv.transfer import DamagedPlacements, Placement
from quire_engine.runtimes.base import Runtime
from quire_engine.types import BitPlan, ChunkKV, Exchange

STORE_PREFIX = "turns-"  # of the name of the store beside that of the passages


@dataclass(frozen=True)
class Turn:
    """An exchange as it stands in the context. tokens: estimated, since an answer may be cut into others than it was
    made of.  key: address of its KV."""

    exchange: Exchange
    tokens: int
    key: str


def lay_out(
    exchanges: Sequence[Exchange], room: int, size: Callable[[Exchange], int]
) -> tuple[tuple[Exchange, ...], int]:
    """What of each exchange stands in the context, the last one being asked; and how many passages leave for it.

    A passage stands where it was first found. When the turns outgrow `room` tokens, passages leave until half of it is
    free: first those that no question has found for the longest time, never the last question's. If that is not
    enough, whole turns leave, the oldest first. It follows from the exchanges alone, so every question of a
    conversation comes to the same layout.
    """
    standing: list[Exchange] = []
    last_found: dict[str, int] = {}
    left = 0
    for number, exchange in enumerate(exchanges):
        present = {passage for earlier in standing for passage in earlier.passages}
        new = tuple(passage for passage in exchange.passages if passage not in present)
        last_found |= dict.fromkeys(exchange.passages, number)
        asked = Exchange(new, exchange.question, "")
        before = standing
        standing = _make_room([*before, asked], room, size, last_found, number)
        left = sum(len(e.passages) for e in before) + len(new) - sum(len(e.passages) for e in standing)
        standing[-1] = replace(standing[-1], answer=exchange.answer)
    return tuple(standing), left


def _make_room(
    standing: list[Exchange],
    room: int,
    size: Callable[[Exchange], int],
    last_found: Mapping[str, int],
    newest: int,
) -> list[Exchange]:
    total = sum(map(size, standing))
    if total <= room:
        return standing
    leaving = sorted((last_found[p], turn, p) for turn, e in enumerate(standing[:-1]) for p in e.passages)
    for found, turn, passage in leaving:
        if total <= room // 2 or found == newest:
            break
        whole = standing[turn]
        standing[turn] = replace(whole, passages=tuple(p for p in whole.passages if p != passage))
        total -= size(whole) - size(standing[turn])
    while total > room and len(standing) > 1:
        gone = standing.pop(0)
        still_wanted = tuple(passage for passage in gone.passages if last_found[passage] == newest)
        standing[-1] = replace(standing[-1], passages=standing[-1].passages + still_wanted)
        total = sum(map(size, standing))
    return standing


class Turns:
    """The turns that the runtime holds, and those on disk."""

    def __init__(self, store: KVStore, identity: bytes, plan: BitPlan) -> None:
        self.store = store
        self._identity = identity
        self._plan = plan
        self._held: list[tuple[str, int]] = []  # address, and the live position behind it

    def keys(self, exchanges: Sequence[Exchange], exact: bool) -> tuple[str, ...]:
        """Addresses of a line of turns. exact: nothing in it is stitched."""
        keys: list[str] = []
        for exchange in exchanges:
            digest = hashlib.sha256(self._identity + bytes([exact]))
            for text in (*keys[-1:], *exchange.passages, exchange.question, exchange.answer.strip()):
                digest.update(hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest())
            keys.append(digest.hexdigest())
        return tuple(keys)

    def shared(self, turns: Sequence[Turn]) -> int:
        """How many of the turns the runtime holds already."""
        held = 0
        while held < min(len(turns), len(self._held)) and turns[held].key == self._held[held][0]:
            held += 1
        return held

    def stored(self, turn: Turn) -> bool:
        return self.store.has(turn.key)

    def resume(self, runtime: Runtime, turns: Sequence[Turn], load: bool, read: Callable[[Exchange], int]) -> int:
        """Makes the live sequence of exactly these turns. load: from disk where possible.  read: appends one that is
        not there, and says how many tokens it had to compute.

        Returns how many tokens were computed.
        """
        self._held = self._held[: self.shared(turns)]
        end = self._held[-1][1] if self._held else 0
        if runtime.rewind(end) != end:
            self._held = []
            runtime.rewind(0)
        computed = 0
        for turn in turns[len(self._held) :]:
            before = runtime.live_tokens
            if not (load and self._load(runtime, turn.key)):
                began = time.perf_counter()
                computed += read(turn.exchange)
                if load:
                    self._save(runtime, turn.key, before, time.perf_counter() - began)
            self._held.append((turn.key, runtime.live_tokens))
        return computed

    def keep(self, runtime: Runtime, key: str, save: bool, seconds: float) -> None:
        """The live sequence has grown by one turn. save: on disk too, if it takes it.  seconds: that reading the turn
        took."""
        start = self._held[-1][1] if self._held else 0
        self._held.append((key, runtime.live_tokens))
        if save:
            self._save(runtime, key, start, seconds)

    def _load(self, runtime: Runtime, key: str) -> bool:
        try:
            with self.store.open(key) as reader:
                if reader.header.key.hex() != key:
                    return False
                runtime.place([Placement(key, reader, runtime.live_tokens)])
                runtime.adopt()
        except MissingChunk:
            return False
        except (DamagedChunk, DamagedPlacements):
            self.store.remove(key)
            return False
        return True

    def _save(self, runtime: Runtime, key: str, start: int, seconds: float) -> None:
        k_pre, v = runtime.rows(start, runtime.live_tokens)
        data = format.encoded(ChunkKV(k_pre, v, {}), self._plan, key)
        with suppress(UnwritableStore):  # a conversation goes on without it; reopening reads again
            self.store.write(key, data, seconds, uses=1.0)
