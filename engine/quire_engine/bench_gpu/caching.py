"""Caching: from a passage's tokens to a file that survives a power failure, in tokens a second.

Two ways: as the application does it today, with the NumPy codec on the processor, and with packing on the device.
Cutting documents up and tokenizing are left out. Knows nothing of reading the files back.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from quire_engine.bench_gpu import library, model
from quire_engine.bench_gpu.clock import Bench, Times, timed
from quire_engine.bench_gpu.library import PACKED_BITS, BenchRuntime
from quire_engine.kv import format as chunk_format
from quire_engine.kv.store import KVStore
from quire_engine.runtimes.torch_decoder import KV, Decoder, Fresh
from quire_engine.types import BitPlan, ChunkKV
from quire_kernels import device_pack
from quire_kernels.device_pack import Packing

_GUARD = 64  # tokens of the preamble behind which passages are read


@dataclass(frozen=True)
class Cached:
    """bytes: of one passage's file."""

    way: str
    times: Times
    tokens_per_second: float
    bytes: int


class _Caching:
    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.weights = model.fitting(bench)
        self._runtime = BenchRuntime(model.make(bench, self.weights))
        self._decoder = Decoder(self._runtime.model, check=lambda: None)
        self._tokens = tuple(range(5, 5 + library.chunk_tokens(bench)))
        self._store = KVStore(bench.folder / "cached")
        self._number = 0
        self.written = 0

    def encode(self) -> None:
        """The model alone: keys and values in main memory."""
        self._runtime.encode(self._tokens[:_GUARD], self._tokens)

    def on_processor(self) -> None:
        kv = ChunkKV(*self._runtime.encode(self._tokens[:_GUARD], self._tokens), {})
        layers = self._runtime.shape.layers
        self._write(chunk_format.encoded(kv, BitPlan.uniform(layers, *PACKED_BITS), f"{0:064x}"))

    @torch.no_grad()
    def on_device(self) -> None:
        """Without the header and the checksums, which take the processor next to nothing beside the model."""
        seen, shape, decoder = list[Fresh](), self._runtime.shape, self._decoder
        places = decoder.places(torch.arange(len(self._tokens)).numpy())
        kv = KV(shape, len(self._tokens), decoder.device, decoder.dtype)
        decoder.read(self._tokens, places, kv, seen.append, hidden=False)
        keys = torch.stack([fresh.k_pre.flatten(1) for fresh in seen]).half()
        values = torch.stack([fresh.v.flatten(1) for fresh in seen]).half()
        order = torch.arange(len(self._tokens), dtype=torch.int32, device=decoder.device)
        k_bits, v_bits = PACKED_BITS
        packed = [
            device_pack.pack(x, order, [Packing(bits, by_channel=by_channel)] * shape.layers).data.cpu().numpy()
            for x, bits, by_channel in ((keys, k_bits, True), (values, v_bits, False))
        ]
        self._write(b"".join(part.tobytes() for part in packed))

    def _write(self, data: bytes) -> None:
        self._number += 1
        self.written = self._store.write(f"{self._number:064x}", data)


def measure(bench: Bench) -> dict[str, object]:
    caching = _Caching(bench)
    tokens = library.chunk_tokens(bench)
    ways: list[tuple[str, Callable[[], None]]] = [
        ("model alone, nothing written", caching.encode),
        ("packed on the processor, as the application does", caching.on_processor),
        ("packed on the device", caching.on_device),
    ]
    found, failed = list[dict[str, object]](), dict[str, str]()
    for number, (way, work) in enumerate(ways):
        caching.written = 0
        try:
            times = timed(work, bench, bench.seconds_left / (len(ways) - number) / 2)
        except Exception as error:
            failed[way] = f"{type(error).__name__}: {error}"[:500]
            continue
        row = Cached(way, times, 1000 * tokens / times.median_ms, caching.written)
        found.append(asdict(row))
        print(f"  {way}: {times}, {row.tokens_per_second:.0f} tokens/s", flush=True)
    return {"passage_tokens": tokens, "weights": caching.weights, "ways": found, "errors": failed}
