"""Where passages lie before they are asked about: in memory, on this disk, or on a slower one.

Knows nothing of what is measured then.
"""

from collections.abc import Sequence

from quire_engine.costs import DISK, MEMORY
from quire_engine.engine import Engine
from quire_engine.kv.pools import SlowDisk, usual_bytes

__all__ = ["DISK", "MEMORY", "lay", "slow"]


def slow(engine: Engine, bytes_per_second: float) -> None:
    """From now on the engine's disk is that slow; 0: it is what it was."""
    store = engine.chunks.store
    store.disk = SlowDisk(bytes_per_second) if bytes_per_second else lambda source: source


def lay(engine: Engine, passages: Sequence[str], pool: str) -> None:
    """Puts stored passages there, and nowhere else."""
    keys = [engine.chunks.preamble.key, *map(engine.address, passages)]
    store = engine.chunks.store
    engine.memory.limit_bytes = usual_bytes()
    store.drop_from_memory(key for key in keys if store.where(key))
    if pool == MEMORY:
        engine.prefetch(passages)
        for key in keys:
            store.open(key).close()  # waits until it is there
