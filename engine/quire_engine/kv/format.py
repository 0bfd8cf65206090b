"""The bytes of one stored chunk, format version 1, described for a second reader in docs/kv-format.md.

Knows nothing of files and directories (`store`), nor how numbers became codes (`codec`). Everything is
little-endian and covered by a CRC-32 that is checked before a byte is used: header, front (order, scores,
sinks), and in a layer each part by itself, so that a reader may leave out low planes. What does not check out
raises DamagedChunk.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from quire_engine.errors import DamagedChunk
from quire_engine.kv.codec import Order, PackedChunk, PackedLayer
from quire_engine.types import BitPlan, Float16, Float32
from quire_kernels.place import PackedTensor, Tensor
from quire_kernels.planes import plane_bytes
from quire_kernels.quantize import GROUP, Grid

VERSION = 1
PAGE_BYTES = 4096
KEY_BYTES = 32
ALL_PLANES = 8

_MAGIC = b"QUIRE-KV"
# magic, version, header bytes, file bytes, key, tokens, sinks, layers, KV heads, key dim, value dim,
# scores, front CRC
_FIXED = struct.Struct("<8sIIQ32s8I")
_SCORE = struct.Struct("<28sf")  # name, scale
# K bits, V bits, zero, block bytes, block offset, CRCs of the K parts, CRCs of the V parts
_PARTS = 9  # grid and up to eight planes; float16 rows use only the first
_LAYER = struct.Struct(f"<BBHIQ{2 * _PARTS}I")
_CRC = struct.Struct("<I")


class ByteSource(Protocol):
    """Where a reader takes its bytes from. May be read by several threads at once."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there; fewer where the source ends. Raises DamagedChunk when they cannot be read."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Cut:
    """How the packed rows of one layer's keys or values are cut up: `shared` middles and units, groups."""

    rows: int
    channels: int
    shared: int
    groups: tuple[int, int]

    def part_lengths(self, bits: int) -> list[int]:
        """Bytes of the grid and of every plane; or of the float16 rows; nothing when there are no rows."""
        if not self.rows:
            return []
        if bits == 16:
            return [2 * self.rows * self.channels]
        grid = 4 + 4 * self.shared + 2 * self.groups[0] * self.groups[1]
        return [grid] + [plane_bytes(self.rows * self.channels)] * bits


@dataclass(frozen=True)
class LayerEntry:
    """Where one layer lies; crcs are those of K's parts and V's, by _PARTS each."""

    k_bits: int
    v_bits: int
    block_bytes: int
    offset: int
    crcs: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What is known of a chunk before its numbers are read.

    key: 32 bytes, the address of the chunk, so that a file under another name is not mistaken for it.
    scores: name and scale of every stored score.
    """

    key: bytes
    tokens: int
    sinks: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scores: tuple[tuple[str, float], ...]
    layers: tuple[LayerEntry, ...]
    front_crc: int
    header_bytes: int
    file_bytes: int

    @property
    def plan(self) -> BitPlan:
        return BitPlan(tuple(e.k_bits for e in self.layers), tuple(e.v_bits for e in self.layers))

    @property
    def k_cut(self) -> _Cut:
        rows, channels = self.tokens - self.sinks, self.kv_heads * self.key_dim
        return _Cut(rows, channels, channels, (-(-rows // GROUP), channels))

    @property
    def v_cut(self) -> _Cut:
        rows, channels = self.tokens - self.sinks, self.kv_heads * self.value_dim
        return _Cut(rows, channels, 1, (rows, -(-channels // GROUP)))

    @property
    def front_bytes(self) -> int:
        """Order, scores and sinks, with the padding behind them."""
        row = self.kv_heads * (self.key_dim + self.value_dim)
        return _padded(2 * (self.tokens * (1 + len(self.scores)) + len(self.layers) * self.sinks * row))


def to_bytes(chunk: PackedChunk, key: bytes) -> bytes:
    """The whole file. Raises ValueError when the key has not 32 bytes or a score's name 1 to 28."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    if too_long := [name for name in chunk.scores if not 1 <= len(name.encode()) <= 28]:
        raise ValueError(f"a score's name has 1 to 28 bytes: {too_long}")
    scales = {name: float(abs(score).max()) or 1.0 for name, score in chunk.scores.items()}
    front = _pad(_front(chunk, scales))
    blocks = [_block(layer) for layer in chunk.layers]
    header_bytes = _padded(_FIXED.size + _SCORE.size * len(scales) + _LAYER.size * len(blocks) + _CRC.size)
    entries, offset = [], header_bytes + len(front)
    for i, (block, crcs) in enumerate(blocks):
        entries.append(LayerEntry(chunk.plan.k_bits[i], chunk.plan.v_bits[i], len(block), offset, crcs))
        offset += len(block)
    header = Header(
        key,
        tokens=len(chunk.order),
        sinks=len(chunk.layers[0].k_sinks),
        kv_heads=chunk.kv_heads,
        key_dim=chunk.key_dim,
        value_dim=chunk.value_dim,
        scores=tuple(scales.items()),
        layers=tuple(entries),
        front_crc=zlib.crc32(front),
        header_bytes=header_bytes,
        file_bytes=offset,
    )
    return b"".join([_header_bytes(header), front, *(block for block, _ in blocks)])


class ChunkReader:
    """Reads one stored chunk, as a whole or layer by layer, from any thread.

    Opening checks the header and reads the front; a layer is read and checked when asked for.
    Raises DamagedChunk, at opening or later, when bytes are missing, wrong, or of another format version.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.header = _read_header(source)
        front = _read_exactly(source, self.header.header_bytes, self.header.front_bytes)
        _check(front, self.header.front_crc, "its order, scores or sinks")
        self._parse_front(np.frombuffer(front, "<f2"))

    @property
    def tokens(self) -> int:
        return self.header.tokens

    def layer(self, index: int, k_planes: int = ALL_PLANES, v_planes: int = ALL_PLANES) -> PackedLayer:
        """One layer, with at most so many top planes (1..8) of keys and values; the others are not read."""
        if min(k_planes, v_planes) < 1:
            raise ValueError("a layer cannot be read without planes")
        entry, k_cut, v_cut = self.header.layers[index], self.header.k_cut, self.header.v_cut
        k_lengths, v_lengths = k_cut.part_lengths(entry.k_bits), v_cut.part_lengths(entry.v_bits)
        v_offset = entry.offset + sum(k_lengths)
        if v_lengths:  # the last part reaches to the block's end
            v_lengths[-1] += entry.block_bytes - sum(k_lengths + v_lengths)
        k = self._read_parts(entry.offset, k_lengths[: 1 + k_planes], entry.crcs[:_PARTS], index)
        v = self._read_parts(v_offset, v_lengths[: 1 + v_planes], entry.crcs[_PARTS:], index)
        return PackedLayer(
            self.header.kv_heads,
            self.order,
            self._k_sinks[index],
            self._v_sinks[index],
            _tensor(k, k_cut, entry.k_bits),
            _tensor(v, v_cut, entry.v_bits),
        )

    def chunk(self) -> PackedChunk:
        """All layers with all planes."""
        h = self.header
        layers = tuple(self.layer(i) for i in range(len(h.layers)))
        return PackedChunk(h.plan, h.kv_heads, h.key_dim, h.value_dim, self.order, self.scores, layers)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse_front(self, front: Float16) -> None:
        h = self.header
        ends = np.cumsum(
            [h.tokens]
            + [h.tokens] * len(h.scores)
            + [len(h.layers) * h.sinks * h.kv_heads * dim for dim in (h.key_dim, h.value_dim)]
        )
        order, *scores, k_sinks, v_sinks, _padding = np.split(front, ends)
        self.order: Order = order.view("<u2")
        self.scores: dict[str, Float32] = {
            name: score.astype(np.float32) * np.float32(scale)
            for (name, scale), score in zip(h.scores, scores, strict=True)
        }
        self._k_sinks = k_sinks.reshape(len(h.layers), h.sinks, h.kv_heads * h.key_dim)
        self._v_sinks = v_sinks.reshape(len(h.layers), h.sinks, h.kv_heads * h.value_dim)

    def _read_parts(self, offset: int, lengths: list[int], crcs: Iterable[int], layer: int) -> list[memoryview]:
        """Neighbouring parts of a layer in one read, each checked."""
        run = memoryview(_read_exactly(self._source, offset, sum(lengths)))
        parts, start = [], 0
        for length, crc in zip(lengths, crcs, strict=False):  # unused checksums stay zero
            part = run[start : start + length]
            _check(part, crc, f"layer {layer}")
            parts.append(part)
            start += length
        return parts


def _front(chunk: PackedChunk, scales: dict[str, float]) -> bytes:
    scores = [(score / np.float32(scales[name])).astype("<f2") for name, score in chunk.scores.items()]
    sinks = [layer.k_sinks.astype("<f2") for layer in chunk.layers]
    sinks += [layer.v_sinks.astype("<f2") for layer in chunk.layers]
    return b"".join(a.tobytes() for a in [chunk.order.astype("<u2"), *scores, *sinks])


def _block(layer: PackedLayer) -> tuple[bytes, tuple[int, ...]]:
    """One layer's bytes and the checksums of its parts."""
    k, v = _tensor_parts(layer.k), _tensor_parts(layer.v)
    if v:
        v[-1] += bytes(-sum(map(len, k + v)) % PAGE_BYTES)  # padding, under the last part's checksum
    crcs = [[zlib.crc32(part) for part in parts] for parts in (k, v)]
    return b"".join(k + v), tuple(crc for own in crcs for crc in own + [0] * (_PARTS - len(own)))


def _tensor_parts(tensor: Tensor) -> list[bytes]:
    if not isinstance(tensor, PackedTensor):
        return [tensor.astype("<f2").tobytes()] if len(tensor) else []
    grid = tensor.grid
    arrays = (
        np.asarray(grid.master, "<f4"),
        grid.middle.astype("<f2"),
        grid.unit.astype("<f2"),
        grid.scales,
        grid.zeros,
    )
    return [b"".join(a.tobytes() for a in arrays), *(plane.tobytes() for plane in tensor.planes)]


def _tensor(parts: list[memoryview], cut: _Cut, bits: int) -> Tensor:
    """The inverse of _tensor_parts; the last part may have padding behind it."""
    shape, count = (cut.rows, cut.channels), cut.groups[0] * cut.groups[1]
    if not cut.rows or bits == 16:
        return np.frombuffer(parts[0] if parts else b"", "<f2", cut.rows * cut.channels).reshape(shape)
    centres = 4 + 4 * cut.shared
    grid = Grid(
        master=np.frombuffer(parts[0], "<f4", 1)[0],
        middle=np.frombuffer(parts[0], "<f2", cut.shared, 4),
        unit=np.frombuffer(parts[0], "<f2", cut.shared, 4 + 2 * cut.shared),
        scales=np.frombuffer(parts[0], "u1", count, centres).reshape(cut.groups),
        zeros=np.frombuffer(parts[0], "i1", count, centres + count).reshape(cut.groups),
    )
    planes = [np.frombuffer(part, np.uint8, plane_bytes(cut.rows * cut.channels)) for part in parts[1:]]
    return PackedTensor(np.stack(planes), bits, *shape, grid)


def _header_bytes(h: Header) -> bytes:
    fixed = _FIXED.pack(
        _MAGIC,
        VERSION,
        h.header_bytes,
        h.file_bytes,
        h.key,
        h.tokens,
        h.sinks,
        len(h.layers),
        h.kv_heads,
        h.key_dim,
        h.value_dim,
        len(h.scores),
        h.front_crc,
    )
    scores = [_SCORE.pack(name.encode(), scale) for name, scale in h.scores]
    layers = [_LAYER.pack(e.k_bits, e.v_bits, 0, e.block_bytes, e.offset, *e.crcs) for e in h.layers]
    body = b"".join([fixed, *scores, *layers]).ljust(h.header_bytes - _CRC.size, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def _read_header(source: ByteSource) -> Header:
    fixed = _FIXED.unpack(_read_exactly(source, 0, _FIXED.size))
    magic, version, header_bytes, file_bytes, key, *sizes, scores, front_crc = fixed
    tokens, sinks, layers, kv_heads, key_dim, value_dim = sizes
    if magic != _MAGIC:
        raise _damaged("it does not begin like a chunk")
    if version != VERSION:
        raise _damaged(f"it has format version {version}, and this Quire reads version {VERSION}")
    if file_bytes != source.size_bytes:
        raise _damaged(f"it has {source.size_bytes} bytes instead of {file_bytes}")
    body = _read_exactly(source, 0, min(header_bytes, file_bytes))
    # Compared as bytes: a damaged header length may leave anything at all in body.
    if body[-_CRC.size :] != _CRC.pack(zlib.crc32(body[: -_CRC.size])):
        raise _damaged("the checksum of its header is wrong")
    first_layer = _FIXED.size + scores * _SCORE.size
    named = _SCORE.iter_unpack(body[_FIXED.size : first_layer])
    entries = _LAYER.iter_unpack(body[first_layer : first_layer + layers * _LAYER.size])
    return Header(
        key=key,
        tokens=tokens,
        sinks=sinks,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scores=tuple((name.rstrip(b"\0").decode(), scale) for name, scale in named),
        layers=tuple(
            LayerEntry(k_bits, v_bits, block_bytes, offset, tuple(crcs))
            for k_bits, v_bits, _zero, block_bytes, offset, *crcs in entries
        ),
        front_crc=front_crc,
        header_bytes=header_bytes,
        file_bytes=file_bytes,
    )


def _read_exactly(source: ByteSource, offset: int, length: int) -> bytes:
    data = source.read(offset, length)
    if len(data) != length:
        raise _damaged(f"it ends at byte {offset + len(data)}")
    return data


def _check(data: bytes | memoryview, crc: int, what: str) -> None:
    if zlib.crc32(data) != crc:
        raise _damaged(f"the checksum of {what} is wrong")


def _damaged(reason: str) -> DamagedChunk:
    return DamagedChunk(
        f"A stored passage cannot be used: {reason}.", hint="It is computed again; nothing needs to be done."
    )


def _padded(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _pad(data: bytes) -> bytes:
    return data.ljust(_padded(len(data)), b"\0")
