"""Decoding: tokens a second behind a long prompt, over exact rows and over a live window of packed ones.

Beside each stands what memory allows: the bytes of weights and KV that a token must read, at the measured rate. Knows
nothing of how the prompt came there.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from quire_engine.bench_gpu import model
from quire_engine.bench_gpu.clock import Bench, Times, timed
from quire_engine.kv.window import Window, usual_plan
from quire_engine.runtimes.torch_decoder import KV
from quire_engine.runtimes.torch_graph import decoding
from quire_engine.runtimes.torch_window import PackedKV
from quire_engine.runtimes.transformer import Transformer

_PIECE = 2048  # tokens that are exact at once while a window is filled
_SIZES = (8192, 32768)
_QUICK_SIZES = (256,)


@dataclass(frozen=True)
class Decoded:
    """of_bandwidth: share of what memory allows for the bytes read; 1 is as fast as the machine can be."""

    weights: model.Weights
    rows: str
    tokens: int
    times: Times
    tokens_per_second: float
    bytes_per_token: int
    of_bandwidth: float
    vram_peak_bytes: int


@torch.no_grad()
def measure(bench: Bench) -> dict[str, object]:
    found, failed = list[dict[str, object]](), dict[str, str]()
    for weights in ("bf16", "q4_k"):
        try:
            transformer = model.make(bench, weights)
        except Exception as error:
            failed[weights] = f"{type(error).__name__}: {error}"[:500]
            continue
        for tokens in _QUICK_SIZES if bench.quick else _SIZES:
            for rows, make in (("exact", _exact), ("packed", _packed)):
                name = f"{weights}, {rows} rows, {tokens} tokens"
                if not bench.seconds_left:
                    failed[name] = "no time was left"
                    continue
                try:
                    found.append(asdict(_decoded(bench, transformer, weights, (rows, make), tokens)))
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"[:500]
        del transformer
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"decoding": found, "errors": failed}


Make = Callable[[Bench, Transformer, int], tuple[Callable[[], object], int]]


def _decoded(
    bench: Bench, transformer: Transformer, weights: model.Weights, kind: tuple[str, Make], tokens: int
) -> Decoded:
    rows, make = kind
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, kv_bytes = make(bench, transformer, tokens)
    step()  # which records it
    count = bench.pick(16, 2)

    def steps() -> None:
        for _ in range(count):
            step()

    times = timed(steps, bench, min(2.0, bench.seconds_left))
    peak = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
    size = model.read_bytes(transformer) + kv_bytes
    per_second = 1000 * count / times.median_ms
    reached = per_second * size / bench.rates.copy if bench.rates.copy else 0.0
    print(
        f"  {weights}, {rows} rows, {tokens} tokens: {per_second:.1f} tokens/s, {reached:.0%} of memory's rate "
        f"({count} tokens a run: {times})",
        flush=True,
    )
    return Decoded(weights, rows, tokens, times, per_second, size, reached, peak)


def _exact(bench: Bench, transformer: Transformer, tokens: int) -> tuple[Callable[[], object], int]:
    """The runtime's own recorded step."""
    kv = KV(transformer.shape, tokens, bench.device, transformer.embedding.dtype)
    step = decoding(transformer, kv, tokens)
    return lambda: step.read(5, tokens - 1), kv.memory_bytes


def _packed(bench: Bench, transformer: Transformer, tokens: int) -> tuple[Callable[[], object], int]:
    """The same behind the runtime's window, which is filled piece by piece, so that the peak of memory is true."""
    shape, window = transformer.shape, Window(bench.pick(128, 64))
    piece = min(tokens, _PIECE)
    kv = PackedKV(shape, piece, bench.device, transformer.embedding.dtype, usual_plan(shape.layers), window)
    filled = 0
    while filled < tokens - 1:
        count = min(tokens - 1 - filled, kv.cells - (filled - kv.packed_tokens))
        kv.grow(kv.packed_tokens + kv.cells, filled)
        first = filled - kv.packed_tokens
        for rows in (*kv.k, *kv.v):
            rows[first : first + count].normal_()
        filled += count
        kv.pack(filled)
    kv.grow(kv.packed_tokens + kv.cells, filled)
    step = decoding(transformer, kv, 0)
    exact = (tokens - kv.packed_tokens) * shape.values_per_token * transformer.embedding.dtype.itemsize
    return lambda: step.read(5, tokens - 1), kv.packed_bytes + exact
