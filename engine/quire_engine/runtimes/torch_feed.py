"""Stored rows on their way into KV buffers: a thread reads layer by layer, ahead of the layer that computes.

The bytes of a layer go from all files at once into a ring of page-locked buffers, from there to the device on a stream
of their own, and are unpacked, turned and scattered there; what computes waits for the layer it needs, not for all. On
the processor the NumPy codec does the same without a device between. Knows nothing of plans or of attention.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from threading import Condition, Thread
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire_engine import processes
from quire_engine.errors import Aborted, DamagedChunk
from quire_engine.kv import codec, transfer
from quire_engine.kv.parts import Cut
from quire_engine.kv.transfer import DamagedPlacements, Placement
from quire_engine.runtimes.torch_decoder import KV
from quire_engine.types import Float16, Rope
from quire_kernels import device_place
from quire_kernels.device_place import Angles
from quire_kernels.stored import Batch, StoredRows, batches

_RING = 3  # the layer that is placed, and two ahead of it
_ALIGNMENT = 16  # of a chunk's bytes in a buffer
_READERS = 8  # files read at once: a fast disk wants that many

UInt8 = npt.NDArray[np.uint8]
ForEach = Callable[[Callable[[int], bool], Iterable[int]], Iterable[bool]]


class Placer(Protocol):
    """Brings one layer of all placements into the buffers, layer after layer."""

    threads: int  # that are of use

    def load(self, layer: int, for_each: ForEach) -> list[int]:
        """Returns the numbers of the placements whose bytes are wrong; nothing of the layer counts then.

        for_each: does something for every number, on several threads.
        """

    def wait(self, layer: int) -> None:
        """What is computed from now on finds the layer's rows in place."""

    def finish(self) -> None:
        """What is computed from now on finds nothing being written any more."""


class Feed:
    """The placements of one prompt. `wait` before a layer is used, `stop` when they are not wanted any more."""

    def __init__(self, placements: Sequence[Placement], placer: Placer, layers: int) -> None:
        self._placements = tuple(placements)
        self._placer = placer
        self._layers = layers
        self._changed = Condition()
        self._loaded = 0
        self._failure: Exception | None = None
        self._stopped = False
        for placement in self._placements:
            placement.chunk.hold()  # whoever opened it may close it
        self._thread = Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def wait(self, layer: int) -> None:
        """Raises DamagedPlacements when the layer, or one before it, has wrong bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._loaded > layer or self._failure is not None)
            if self._loaded <= layer and self._failure is not None:
                raise self._failure
        self._placer.wait(layer)

    def stop(self) -> None:
        """Returns when nothing is read or written any more."""
        self._stopped = True
        self._thread.join()
        self._placer.finish()

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            with ThreadPoolExecutor(min(len(self._placements), self._placer.threads)) as pool:
                for layer in range(self._layers):
                    if self._stopped:
                        raise Aborted
                    if damaged := self._placer.load(layer, pool.map):
                        raise DamagedPlacements(tuple(self._placements[number].key for number in damaged))
                    self._tell(layer + 1, None)
        except Exception as error:  # it is raised where the rows are wanted
            failure = error
        finally:
            for placement in self._placements:
                placement.chunk.close()
        self._tell(self._loaded, failure)

    def _tell(self, loaded: int, failure: Exception | None) -> None:
        with self._changed:
            self._loaded, self._failure = loaded, failure
            self._changed.notify_all()


class HostPlacer:
    """With the NumPy codec, through float16 rows in main memory."""

    def __init__(self, placements: Sequence[Placement], rope: Rope, kv: KV) -> None:
        self.threads = processes.cores()
        self._placements, self._layout, self._kv = placements, rope.layout, kv
        self._angles = [transfer.angles(np.arange(p.position, p.stop), rope) for p in placements]
        longest = max(p.chunk.tokens for p in placements)

        def rows(layers: list[Tensor]) -> list[Float16]:
            return [np.empty((longest, layers[0][0].numel()), np.float16) for _ in placements]

        self._k, self._v = rows(kv.k), rows(kv.v)

    def load(self, layer: int, for_each: ForEach) -> list[int]:
        sound = for_each(lambda number: self._load(layer, number), range(len(self._placements)))
        return [number for number, ok in enumerate(sound) if not ok]

    def _load(self, layer: int, number: int) -> bool:
        placement, (cos, sin) = self._placements[number], self._angles[number]
        tokens = placement.chunk.tokens
        k, v = self._k[number][:tokens], self._v[number][:tokens]
        try:
            codec.place_layer(placement.chunk.layer(layer), cos, sin, self._layout, k, v)
        except DamagedChunk:
            return False
        for out, rows in ((self._kv.k[layer], k), (self._kv.v[layer], v)):
            first = placement.position - self._kv.packed_tokens
            out[first : first + tokens] = torch.from_numpy(rows).view(tokens, *out.shape[1:])
        return True

    def wait(self, layer: int) -> None:
        pass

    def finish(self) -> None:
        pass


class Slots:
    """The ring: page-locked buffers and as many on the device. Kept from prompt to prompt, since locking is slow."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._device = device
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.host: list[Tensor] = []
        self.device: list[Tensor] = []

    def make_room(self, size: int) -> None:
        if not self.host or len(self.host[0]) < size:
            self.host = [torch.empty(size, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(_RING)]
            self.device = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(_RING)]


@dataclass(frozen=True)
class _Layout:
    """Where everything of a layer lies in a slot. starts: of every chunk's bytes.  k, v: what they are."""

    starts: tuple[int, ...]
    size: int
    k: tuple[Batch, ...]
    v: tuple[Batch, ...]


class DevicePlacer:
    """With the kernels of `quire_kernels.device_place`, from the bytes of the files as they are."""

    threads = _READERS

    def __init__(self, placements: Sequence[Placement], angles: Angles, kv: KV, slots: Slots) -> None:
        """angles: of every row of the buffers."""
        self._placements, self._angles, self._kv, self._slots = placements, angles, kv, slots
        self._layouts: dict[object, _Layout] = {}
        layers = range(len(kv.k))
        slots.make_room(max(sum(_padded(_layer_bytes(p, layer)) for p in placements) for layer in layers))
        packed = kv.packed_tokens
        to = np.concatenate([p.position - packed + p.chunk.order.astype(np.int32) for p in placements])
        self._rows = torch.from_numpy(to).to(kv.k[0].device)
        self._placed: list[torch.cuda.Event] = []
        if slots.stream is not None:
            slots.stream.wait_stream(torch.cuda.current_stream())  # which may still read the rows that were there

    def load(self, layer: int, for_each: ForEach) -> list[int]:
        slot = layer % _RING
        if self._placed and layer >= _RING:
            self._placed[layer - _RING].synchronize()
        layout, host = self._layout(layer), self._slots.host[slot]
        buffer: UInt8 = host.numpy()
        sound = for_each(
            lambda number: _fill(buffer[layout.starts[number] :], self._placements[number], layer),
            range(len(self._placements)),
        )
        if damaged := [number for number, ok in enumerate(sound) if not ok]:
            return damaged
        with torch.no_grad(), torch.cuda.stream(self._slots.stream):  # None: where there is no device
            data = self._slots.device[slot][: layout.size]
            data.copy_(host[: layout.size], non_blocking=True)
            for batch in layout.k:
                device_place.place(data, batch, self._rows, self._kv.k[layer], self._angles)
            for batch in layout.v:
                device_place.place(data, batch, self._rows, self._kv.v[layer])
            if self._slots.stream is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._slots.stream)
                self._placed.append(event)
        return []

    def wait(self, layer: int) -> None:
        if self._placed:
            torch.cuda.current_stream().wait_event(self._placed[layer])

    def finish(self) -> None:
        if self._slots.stream is not None:
            torch.cuda.current_stream().wait_stream(self._slots.stream)

    def _layout(self, layer: int) -> _Layout:
        """The same for layers that are stored with the same bits; describing it to the device takes time."""
        kind = tuple(replace(p.chunk.header.layers[layer], offset=0, crcs=()) for p in self._placements)
        if kind not in self._layouts:
            sizes = [_padded(_layer_bytes(p, layer)) for p in self._placements]
            *starts, size = accumulate(sizes, initial=0)
            tokens = accumulate((p.chunk.tokens for p in self._placements), initial=0)
            k, v = list[StoredRows](), list[StoredRows]()
            for placement, start, first in zip(self._placements, starts, tokens, strict=False):
                for rows, some in zip((k, v), _stored_rows(placement, layer, start, first), strict=True):
                    rows += some
            device = self._rows.device
            self._layouts[kind] = _Layout(tuple(starts), size, batches(k, device), batches(v, device))
        return self._layouts[kind]


def _layer_bytes(placement: Placement, layer: int) -> int:
    """A layer's block of the file, and its exact rows behind it."""
    header = placement.chunk.header
    row = header.kv_heads * (header.key_dim + header.value_dim)
    return _padded(header.layers[layer].block_bytes) + 2 * header.exact_tokens * row


def _stored_rows(placement: Placement, layer: int, start: int, first: int) -> tuple[list[StoredRows], list[StoredRows]]:
    """Keys and values of a chunk whose bytes begin at `start` and whose rows at `first` of the destinations."""
    header = placement.chunk.header
    exact, (k_cut, v_cut) = header.exact_tokens, header.cuts(layer)
    behind = start + _padded(header.layers[layer].block_bytes)
    k_exact = StoredRows(behind, exact, k_cut.channels, 16, 0, first=first)
    v_exact = replace(k_exact, offset=behind + 2 * exact * k_cut.channels, channels=v_cut.channels)
    k = _packed_rows(k_cut, header.grid, start, first + exact)
    return [k_exact, k], [v_exact, _packed_rows(v_cut, header.grid, k.stop, first + exact)]


def _packed_rows(cut: Cut, grid: str, offset: int, first: int) -> StoredRows:
    widths = cut.widths.astype(np.uint8).tobytes()
    planes = 0 if cut.bits == 16 else cut.bits
    return StoredRows(offset, cut.rows, cut.channels, cut.bits, planes, grid, cut.by_channel, widths, first)


def _fill(buffer: UInt8, placement: Placement, layer: int) -> bool:
    """Writes a chunk's bytes of a layer to the beginning of the buffer; whether they are sound."""
    try:
        at = 0
        for part in placement.chunk.parts(layer):
            buffer[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
    except DamagedChunk:
        return False
    at = _padded(at)
    for rows in placement.chunk.sinks(layer):
        buffer[at : at + rows.nbytes] = np.frombuffer(np.ascontiguousarray(rows).tobytes(), np.uint8)
        at += rows.nbytes
    return True


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
