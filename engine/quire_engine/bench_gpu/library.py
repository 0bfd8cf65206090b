"""Cached passages of random numbers: as files, in page-locked memory, or on the device; and prompts made of them.

All files of a kind hold the same numbers, since packing them is not what is timed here, but each is a file of its own.
Knows nothing of time.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quire_engine.bench_gpu import model
from quire_engine.bench_gpu.clock import Bench
from quire_engine.kv import format as chunk_format
from quire_engine.kv.store import KVStore
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Mask, Prompt, Segment
from quire_engine.runtimes.torch_decoder import KV
from quire_engine.runtimes.torch_feed import DevicePlacer, Feed, ForEach, Slots
from quire_engine.runtimes.torch_gpu import TorchRuntime
from quire_engine.runtimes.transformer import Transformer
from quire_engine.types import BitPlan, ChunkKV, Float32
from quire_kernels.device_place import Angles, place

Stored = Literal["16 bits", "packed"]
Where = Literal["device", "pinned", "warm file", "cold file"]

KINDS: tuple[Stored, ...] = ("packed", "16 bits")
PLACES: tuple[Where, ...] = ("pinned", "cold file", "device", "warm file")  # what matters most comes first
PACKED_BITS = (4, 3)  # of keys and values
_QUESTION = 32


def chunk_tokens(bench: Bench) -> int:
    return bench.pick(512, 64)


@dataclass(frozen=True)
class Library:
    """Passages that are stored alike. keys: of the store."""

    store: KVStore
    keys: tuple[str, ...]
    chunk_tokens: int
    chunk_bytes: int

    def prompt(self, bench: Bench, tokens: int, seed: int = 0) -> Prompt:
        """Passages in another order for each seed, then a question."""
        count = tokens // self.chunk_tokens
        random = np.random.default_rng(seed)
        most = model.sizes(bench).vocabulary

        def some(length: int, key: str = "") -> Segment:
            return Segment(tuple(random.integers(0, most, length).tolist()), key)

        order = random.permutation(count) if seed else np.arange(count)
        chunks = tuple(some(self.chunk_tokens, self.keys[number]) for number in order)
        return Prompt(Segment(()), chunks, some(_QUESTION))

    def placements(self, prompt: Prompt, held: ExitStack) -> list[Placement]:
        """held: closes them."""
        return [
            Placement(segment.key, held.enter_context(self.store.open(segment.key)), start)
            for segment, start in prompt.places
        ]


def make(bench: Bench, kind: Stored, tokens: int) -> Library:
    """At least so many tokens of passages in files; what is there already is used again."""
    of, each = model.sizes(bench), chunk_tokens(bench)
    store = KVStore(bench.folder / kind.replace(" ", "-"))
    keys = tuple(f"{number:064x}" for number in range(tokens // each))
    if missing := [key for key in keys if not store.has(key)]:
        random = np.random.default_rng(1)
        size = (of.layers, each, of.kv_heads, of.dim)
        k_pre, v = (random.standard_normal(size, np.float32).astype(np.float16) for _ in range(2))
        plan = BitPlan.exact(of.layers) if kind == "16 bits" else BitPlan.uniform(of.layers, *PACKED_BITS)
        data = chunk_format.encoded(ChunkKV(k_pre, v, {}), plan, keys[0])
        for key in missing:
            store.write(key, data)
    with store.open(keys[0]) as reader:
        return Library(store, keys, each, reader.header.file_bytes)


def chosen(scores: Float32, prompt: Prompt, share: float) -> list[Mask]:
    """The share of tokens that the question looks at most, as masks of the passages."""
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argpartition(-scores, int(share * len(scores)))[: int(share * len(scores))]] = True
    ends = list(accumulate(len(chunk) for chunk in prompt.chunks))
    return np.split(mask, ends[:-1])


class ResidentPlacer(DevicePlacer):
    """From bytes that lie in page-locked memory or on the device already, into the buffers of several prompts.

    All prompts consist of the same passages; `placements` have the order in which the bytes lie.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        angles: Angles,
        kv: KV,
        slots: Slots,
        layers: Sequence[Tensor],
        others: Sequence[tuple[KV, Tensor]] = (),
    ) -> None:
        """layers: of each its bytes, as `bytes_of` gives them.  others: more buffers, and where each row goes."""
        super().__init__(placements, angles, kv, slots)
        self._bytes = layers
        self._all = ((kv, self._rows), *others)

    def load(self, layer: int, for_each: ForEach) -> list[int]:
        layout, data, stream = self._layout(layer), self._bytes[layer], self._slots.stream
        with torch.no_grad(), torch.cuda.stream(stream):
            if data.device != self._rows.device or data.is_pinned():
                slot = self._slots.device[layer % len(self._slots.device)][: layout.size]
                data = slot.copy_(data[: layout.size], non_blocking=True)
            for kv, rows in self._all:
                for batch in layout.k:
                    place(data, batch, rows, kv.k[layer], self._angles)
                for batch in layout.v:
                    place(data, batch, rows, kv.v[layer])
            if stream is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
                self._placed.append(event)
        return []


class BenchRuntime(TorchRuntime):
    """The runtime, with placing from bytes that are there already where some are given."""

    resident: Sequence[Tensor] = ()

    def __init__(self, transformer: Transformer) -> None:
        super().__init__(transformer, like_gpu=True)

    def place(self, placements: Sequence[Placement]) -> None:
        if not self.resident:
            super().place(placements)
            return
        stop = max(placement.stop for placement in placements)
        self._forget_placed()
        self.reserve(stop)
        placer = ResidentPlacer(placements, self._angles, self._kv, self._slots, self.resident)
        self._placed_stop = stop
        self._feed = Feed(placements, placer, self.shape.layers)
        self._ready(0)

    def bytes_of(self, placements: Sequence[Placement], on_device: bool) -> list[Tensor]:
        """Every layer's bytes of these passages, as the runtime sends them to the device."""
        self.reserve(max(placement.stop for placement in placements))
        slots = Slots(self._decoder.device)  # as large as these passages need, not as the largest ones needed
        placer = DevicePlacer(placements, self._angles, self._kv, slots)
        layers = []
        for layer in range(self.shape.layers):
            placer.load(layer, map)
            placer.finish()
            host = slots.host[layer % len(slots.host)]
            if on_device:
                layers.append(host.to(self._decoder.device, copy=True))
            else:
                layers.append(torch.empty(len(host), dtype=torch.uint8, pin_memory=slots.on_gpu).copy_(host))
        return layers
