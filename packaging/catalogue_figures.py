"""How long the catalogue of stored chunks takes with many of them: prints one line per step.

    python packaging/catalogue_figures.py [--chunks 100000] [--folder DIR]

Makes small files in a folder of its own and removes them. Knows nothing of models: a chunk is a few hundred bytes here.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quire_engine.kv import codec
from quire_engine.kv.catalogue import Catalogue
from quire_engine.kv.format import to_bytes
from quire_engine.types import BitPlan, ChunkKV

STORE = "0123456789abcdef"


def make(root: Path, count: int) -> list[str]:
    """Writes that many chunks past the catalogue; returns their keys."""
    numbers = np.ones((1, 4, 1, 8), np.float16)
    packed = codec.encode(ChunkKV(numbers, numbers, {}), BitPlan.uniform(1, 16, 16), codec.text_order(4))
    data = to_bytes(packed, bytes(32))
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    for key in keys:
        folder = root / STORE / key[:2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.kv").write_bytes(data)
    return keys


def timed(what: str, work: Callable[[], object]) -> None:
    began = time.perf_counter()
    work()
    print(f"{what:<52}{1000 * (time.perf_counter() - began):>10,.1f} ms", flush=True)


def victims(catalogue: Catalogue, count: int) -> list[str]:
    now = time.time()
    return [entry.key for entry in sorted(catalogue.entries(), key=lambda entry: entry.value(now, 0.5))[:count]]


def start(root: Path) -> Catalogue:
    catalogue = Catalogue(root)
    catalogue.look()
    catalogue.sizes(STORE)
    return catalogue


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the catalogue of stored chunks.")
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: where temporary files are")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder) / "kv"
        keys = make(root, arguments.chunks)
        time.sleep(3)  # until the directories' times are past
        print(f"{arguments.chunks:,} chunks")
        catalogue = Catalogue(root)
        timed("made from the files", catalogue.look)
        catalogue.close()
        timed("start: look for changes, list one store", lambda: start(root))
        store = catalogue.store(STORE)
        timed("1,000 look-ups (has)", lambda: [store.has(key) for key in keys[:: max(1, len(keys) // 1000)]])
        timed("totals by store", catalogue.totals)
        timed("bytes of all", catalogue.size_bytes)
        timed("choosing 100 victims of all", lambda: victims(catalogue, 100))
        for key in keys[:4]:
            store.write(key, b"x" * 500, seconds=1.0)
        timed("look after 4 writes", catalogue.look)
        for key in keys[:100]:
            catalogue.used(STORE, key)
        timed("100 uses written down", catalogue.flush)
        catalogue.close()


if __name__ == "__main__":
    main()
