"""Decoding: tokens a second behind a long prompt, over exact rows and over a live window of packed ones.

Beside each stands what memory allows: the bytes of weights and KV that a token must read, at the measured rate. Knows
nothing of how the prompt came there.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from quire_engine.bench_gpu import kernels, model
from quire_engine.bench_gpu.clock import Bench, Times, timed
from quire_engine.runtimes.torch_decoder import KV, Decoder
from quire_engine.runtimes.torch_graph import Decoding
from quire_engine.runtimes.transformer import Transformer
from quire_kernels import device_decode
from quire_kernels.device_decode import LiveRows
from quire_kernels.device_place import Angles

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


def _angles(bench: Bench, decoder: Decoder, tokens: int) -> Angles:
    cos, sin = decoder.angles(torch.arange(tokens).numpy())
    return Angles(cos[:, 0].contiguous(), sin[:, 0].contiguous(), decoder.shape.rope.layout)


def _exact(bench: Bench, transformer: Transformer, tokens: int) -> tuple[Callable[[], object], int]:
    """The runtime's own recorded step."""
    decoder = Decoder(transformer, check=lambda: None)
    kv = KV(transformer.shape, tokens, decoder.device, decoder.dtype)
    decoding = Decoding(transformer, kv, _angles(bench, decoder, tokens), tokens)
    return lambda: decoding.read(5, tokens - 1), sum(layer.nbytes for layer in (*kv.k, *kv.v))


def _packed(bench: Bench, transformer: Transformer, tokens: int) -> tuple[Callable[[], object], int]:
    decoder = Decoder(transformer, check=lambda: None)
    angles = _angles(bench, decoder, tokens)
    layers = [kernels.live_rows(bench, tokens, True, angles) for _ in range(transformer.shape.layers)]
    step = _Window(decoder, layers, angles, tokens - 1)
    return (
        Recorded(step.run, bench.device) if bench.device.type == "cuda" else step.run,
        sum(kernels.live_bytes(rows) for rows in layers),
    )


class _Window:
    """One token up the layers over packed and exact rows, its own written to the last exact one."""

    def __init__(self, decoder: Decoder, rows: list[LiveRows], angles: Angles, position: int) -> None:
        self._decoder, self._rows = decoder, rows
        self._token = torch.tensor([5], device=decoder.device)
        self._cos, self._sin = (x[position : position + 1, None] for x in (angles.cos, angles.sin))

    @torch.no_grad()
    def run(self) -> Tensor:
        decoder, transformer = self._decoder, self._decoder.model
        x = transformer.embedding[self._token]
        for layer, rows in zip(transformer.layers, self._rows, strict=True):
            q, k_pre, v = layer.projections(x, decoder.shape)
            q_rot, k_rot = (decoder.rotate(heads, self._cos, self._sin) for heads in (q, k_pre))
            rows.k[-1:] = k_rot
            rows.v[-1:] = v
            x = x + layer.attn_output(device_decode.attend(q_rot, rows).flatten(-2))
            x = x + layer.feed_forward(x)
        return decoder.scores(x[-1])


class Recorded:
    """A step as a CUDA graph, recorded when it is made; every call replays it."""

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, and lets libraries allocate what they keep
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scores = step()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._scores
