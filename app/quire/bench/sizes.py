"""`quire bench bytes`: what stored passages take on disk, plan by plan, where it goes, and how fast it is read back.

Sizes are those of files that the store wrote. Knows nothing of what the lost precision does to answers (`codec`).
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np

from quire.bench import plans as bench_plans
from quire.bench.cases import Case, scratch_engine
from quire.bench.plans import plan_of
from quire.session import Session
from quire_engine.engine import Engine
from quire_engine.errors import QuireError
from quire_engine.kv import codec, distortion, format, transfer
from quire_engine.kv.format import ChunkReader
from quire_engine.kv.parts import to_parts
from quire_engine.kv.store import KVStore
from quire_engine.kv.transfer import Placement
from quire_engine.selection import spectral
from quire_engine.types import BitPlan, ChunkKV, Float16, GridName, ModelShape
from quire_kernels.place import PackedTensor

Say = Callable[[str], None]
LENGTHS = (64, 180, 512)
_SEEDS = 3  # of the generator; its errors differ by 2 % from one to the next
_FILES = 8  # that are read at once: as many passages as a large question has


@dataclass(frozen=True)
class SizeRow:
    """Bits per value of a passage's file, and the parts that add up to it. exact: the first tokens.  order: also the
    scores by which tokens are chosen.  rest: header, checksums, padding."""

    plan: str
    tokens: int
    bits_per_value: float
    codes: float
    grids: float
    exact: float
    order: float
    rest: float


@dataclass(frozen=True)
class LossRow:
    """Relative L2 error of generated keys, in which a few channels carry most of the energy, and of values."""

    bits: int
    grid: GridName
    keys: float
    values: float


@dataclass(frozen=True)
class SpeedRow:
    """Million values per second from files to rows at their positions. source: "memory", the page cache, or "disk",
    after dropping these pages from it."""

    plan: str
    source: str
    values: int
    runs: int
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class BytesReport:
    rows: tuple[SizeRow, ...]
    losses: tuple[LossRow, ...]
    speeds: tuple[SpeedRow, ...]
    model: str


def measure(
    session: Session, make_cases: Callable[[Engine], Sequence[Case]], plans: str, runs: int, say: Say
) -> BytesReport:
    """Reads one long passage of the cases with the model, and stores it by every plan.

    plans: names with commas between them; empty: all.
    """
    with scratch_engine(session) as engine:
        names = bench_plans.chosen(plans, bench_plans.PLANS, engine)
        by_name = {name: plan_of(name, engine) for name in dict.fromkeys(names)}
        text = "\n\n".join(passage for case in make_cases(engine) for passage in case.passages)
        longest = max(LENGTHS)
        tokens = (engine.vocabulary.tokenize(text) * longest)[: min(longest, engine.limits.chunk_tokens)]
        if not tokens:
            raise QuireError("There is no text to store.", "Give questions over passages: --data.")
        lengths = [length for length in LENGTHS if length < len(tokens)] + [len(tokens)]
        say(f"Reading {len(tokens)} tokens with {engine.model_name}")
        k_pre, v = engine.runtime.encode(engine.chunks.preamble.tokens, tokens)
        sizes, speeds = [], []
        for name, plan in by_name.items():
            sizes += [_size(engine, name, plan, _first(k_pre, v, length)) for length in lengths]
            speeds += _speeds(engine, name, plan, _first(k_pre, v, len(tokens)), runs)
            say(f"{name}: {sizes[-1].bits_per_value:.2f} bits per value, {speeds[-2].median:.0f} million values/s")
        return BytesReport(tuple(sizes), tuple(_losses()), tuple(speeds), engine.model_name)


def _first(k_pre: Float16, v: Float16, tokens: int) -> ChunkKV:
    """The KV of a passage's first tokens: they do not depend on what follows."""
    k_pre, v = k_pre[:, :tokens], v[:, :tokens]
    return ChunkKV(k_pre, v, {"spectral": spectral.score(k_pre, v)})


def _store(engine: Engine, name: str, plan: BitPlan, kv: ChunkKV, copies: int = 1) -> tuple[KVStore, list[str]]:
    """A store of its own that holds the passage under several keys."""
    store = KVStore(engine.catalogue.root.parent / f"bytes-{name}-{kv.tokens}")
    packed = codec.encode(kv, plan, codec.text_order(kv.tokens))
    keys = [f"{number:064x}" for number in range(copies)]
    for key in keys:
        store.write(key, format.to_bytes(packed, bytes.fromhex(key)))
    return store, keys


def _size(engine: Engine, name: str, plan: BitPlan, kv: ChunkKV) -> SizeRow:
    store, (key,) = _store(engine, name, plan, kv)
    with store.open(key) as reader:
        parts = _parts(reader)
    total, values = store.size_bytes(), kv.tokens * engine.shape.values_per_token
    store.remove(key)
    bits = [8 * part / values for part in (total, *parts, total - sum(parts))]
    return SizeRow(name, kv.tokens, *bits)


def _parts(reader: ChunkReader) -> tuple[int, int, int, int]:
    """Bytes of codes, grids, exact tokens, order and scores."""
    codes = grids = exact = 0
    for number in range(len(reader.header.layers)):
        layer = reader.layer(number)
        exact += layer.k_sinks.nbytes + layer.v_sinks.nbytes
        for tensor in (layer.k, layer.v):
            lengths = [len(part) for part in to_parts(tensor)]
            grid = lengths[0] if isinstance(tensor, PackedTensor) else 0
            codes, grids = codes + sum(lengths) - grid, grids + grid
    return codes, grids, exact, 2 * reader.tokens * (1 + len(reader.scores))


def _speeds(engine: Engine, name: str, plan: BitPlan, kv: ChunkKV, runs: int) -> list[SpeedRow]:
    """From memory and from disk, in turns."""
    store, keys = _store(engine, name, plan, kv, _FILES)
    values = _FILES * kv.tokens * engine.shape.values_per_token
    rows = _rows(engine.shape, _FILES * kv.tokens)
    took: dict[str, list[float]] = {"memory": [], "disk": []}
    _place(engine.shape, store, keys, rows)  # nobody pays for the first touch of these rows
    for _ in range(runs):
        for source, seconds in took.items():
            if source == "disk":
                store.drop_from_memory(keys)
            seconds.append(_place(engine.shape, store, keys, rows))
    for key in keys:
        store.remove(key)
    speeds = {source: [values / second / 1e6 for second in seconds] for source, seconds in took.items()}
    return [
        SpeedRow(name, source, values, runs, statistics.median(rates), min(rates), max(rates))
        for source, rates in speeds.items()
    ]


def _rows(shape: ModelShape, tokens: int) -> tuple[list[Float16], list[Float16]]:
    return tuple(  # type: ignore[return-value]  # of two
        [np.zeros((tokens, shape.kv_heads * dim), np.float16) for _ in range(shape.layers)]
        for dim in (shape.key_dim, shape.value_dim)
    )


def _place(shape: ModelShape, store: KVStore, keys: Sequence[str], rows: tuple[list[Float16], list[Float16]]) -> float:
    """Seconds that opening, reading, checking, unpacking and rotating take."""
    began = time.perf_counter()
    placements, position = [], 0
    for key in keys:
        placements.append(Placement(key, store.open(key), position))
        position = placements[-1].stop
    try:
        transfer.place(placements, shape.rope, *rows)
        return time.perf_counter() - began
    finally:
        for placement in placements:
            placement.chunk.close()


def _losses() -> list[LossRow]:
    keys, values = ([make(seed) for seed in range(_SEEDS)] for make in (distortion.keys, distortion.values))
    return [
        LossRow(
            bits,
            grid,
            statistics.mean(distortion.of_keys(x, bits, bits, grid).error for x in keys),
            statistics.mean(distortion.of_values(x, bits, bits, grid).error for x in values),
        )
        for bits in range(1, 9)
        for grid in get_args(GridName)
    ]


def as_json(report: BytesReport) -> str:
    return json.dumps(asdict(report))


def table(report: BytesReport) -> list[str]:
    lines = [
        f"{report.model}: bits per value of a passage's file, and where they go",
        f"{'plan':<15}{'tokens':>7}{'bits':>8}{'codes':>9}{'grids':>8}{'exact':>8}{'order':>8}{'rest':>8}",
    ]
    for s in report.rows:
        parts = f"{s.codes:>9.3f}{s.grids:>8.3f}{s.exact:>8.3f}{s.order:>8.4f}{s.rest:>8.3f}"
        lines.append(f"{s.plan:<15}{s.tokens:>7}{s.bits_per_value:>8.3f}{parts}")
    lines += ["", "Relative error of generated keys and values", f"{'bits':<5}{'grid':<10}{'keys':>8}{'values':>8}"]
    lines += [f"{x.bits:<5}{x.grid:<10}{x.keys:>8.4f}{x.values:>8.4f}" for x in report.losses]
    values = report.speeds[0].values / 1e6 if report.speeds else 0
    lines += ["", f"Million values per second from files to rows, {values:.0f} million at once"]
    lines.append(f"{'plan':<15}{'from':<8}{'runs':>5}{'median':>9}{'spread':>14}")
    for p in report.speeds:
        spread = f"{p.lowest:.0f}-{p.highest:.0f}"
        lines.append(f"{p.plan:<15}{p.source:<8}{p.runs:>5}{p.median:>9.0f}{spread:>14}")
    return lines
