"""The bytes of one stored chunk, format version 1, described for a second reader in docs/kv-format.md.

Knows nothing of files and directories (`store`), nor how numbers became codes (`codec`). Everything is
little-endian and covered by a CRC-32 that is checked before a byte is used: header, front (order, scores,
sinks), and in a layer each part by itself, so that a reader may leave out low planes. What does not check out
raises DamagedChunk. Sections are aligned as far as that costs next to nothing (docs/decisions/chunk_alignment.md).
"""

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from quire_engine.errors import DamagedChunk
from quire_engine.kv import codec
from quire_engine.kv.codec import Order, PackedChunk, PackedLayer
from quire_engine.kv.parts import Cut, from_parts, to_parts
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32, GridName
from quire_kernels.grids import GRIDS

VERSION = 1
ALIGNMENTS = (4096, 512, 64)  # pages, sectors, cache lines
KEY_BYTES = 32
ALL_PLANES = 8

_MAGIC = b"QUIRE-KV"
# magic, version, header bytes, file bytes, key, tokens, sinks, layers, KV heads, key dim, value dim,
# scores, grid, alignment, front CRC
_FIXED = struct.Struct("<8sIIQ32s10I")
BEGINNING_BYTES = _FIXED.size
_SCORE = struct.Struct("<28sf")  # name, scale
# K bits, V bits, flags, block bytes, block offset, CRCs of the K parts, CRCs of the V parts
_PARTS = 9  # grid and up to eight planes; float16 rows use only the first
_LAYER = struct.Struct(f"<BBHIQ{2 * _PARTS}I")
_CRC = struct.Struct("<I")
_GRID_NUMBERS: tuple[GridName, ...] = ("midrise", "minmax")
_K_WIDTHS, _V_BY_CHANNEL = 1, 2  # a layer's flags
_SHARE = 100  # padding stays below this part of a file, unless even the smallest alignment takes more


class ByteSource(Protocol):
    """Where a reader takes its bytes from. May be read by several threads at once."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes there; fewer where the source ends. Raises DamagedChunk when they cannot be read."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class LayerEntry:
    """Where one layer lies, and how its numbers do; crcs are those of K's parts and V's, by _PARTS each."""

    k_bits: int
    v_bits: int
    k_widths: bytes
    v_by_channel: bool
    block_bytes: int
    offset: int
    crcs: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What is known of a chunk before its numbers are read.

    key: 32 bytes, the address of the chunk, so that a file under another name is not mistaken for it.
    sinks: as the plan has them; a short chunk has fewer tokens.  scores: name and scale of every stored score.
    alignment: of the front and of every layer.
    """

    key: bytes
    tokens: int
    sinks: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scores: tuple[tuple[str, float], ...]
    layers: tuple[LayerEntry, ...]
    grid: GridName
    alignment: int
    front_crc: int
    header_bytes: int
    file_bytes: int

    @property
    def plan(self) -> BitPlan:
        k_bits, v_bits = tuple(e.k_bits for e in self.layers), tuple(e.v_bits for e in self.layers)
        widths = tuple(e.k_widths for e in self.layers)
        by_channel = tuple(i for i, e in enumerate(self.layers) if e.v_by_channel)
        return BitPlan(k_bits, v_bits, self.grid, self.sinks, widths if any(widths) else (), by_channel)

    @property
    def exact_tokens(self) -> int:
        """Tokens at the beginning that are stored exactly."""
        return min(self.sinks, self.tokens)

    def cuts(self, layer: int) -> tuple[Cut, Cut]:
        """How a layer's keys and values are cut up."""
        e, rows, kind = self.layers[layer], self.tokens - self.exact_tokens, GRIDS[self.grid]
        widths = np.frombuffer(e.k_widths, np.uint8)
        return (
            Cut(rows, self.kv_heads * self.key_dim, kind, e.k_bits, True, widths),
            Cut(rows, self.kv_heads * self.value_dim, kind, e.v_bits, e.v_by_channel, widths[:0]),
        )

    @property
    def front_bytes(self) -> int:
        """Order, scores and sinks, with the padding behind them."""
        row = self.kv_heads * (self.key_dim + self.value_dim)
        numbers = self.tokens * (1 + len(self.scores)) + len(self.layers) * self.exact_tokens * row
        return _padded(2 * numbers, self.alignment)


def to_bytes(chunk: PackedChunk, key: bytes) -> bytes:
    """The whole file. Raises ValueError when the key has not 32 bytes or a score's name 1 to 28."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    if too_long := [name for name in chunk.scores if not 1 <= len(name.encode()) <= 28]:
        raise ValueError(f"a score's name has 1 to 28 bytes: {too_long}")
    scales = {name: float(abs(score).max()) or 1.0 for name, score in chunk.scores.items()}
    plan = chunk.plan
    widths = plan.k_widths or (b"",) * len(chunk.layers)
    header_bytes = _FIXED.size + _SCORE.size * len(scales) + _LAYER.size * len(chunk.layers) + _CRC.size
    header_bytes += sum(-(-len(w) // 2) for w in widths)
    front = _front(chunk, scales)
    parts = [(to_parts(layer.k), to_parts(layer.v)) for layer in chunk.layers]
    alignment = _alignment([header_bytes, len(front), *(sum(map(len, k + v)) for k, v in parts)])
    header_bytes, front = _padded(header_bytes, alignment), _pad(front, alignment)
    blocks = [_block(k, v, alignment) for k, v in parts]
    entries, offset = [], header_bytes + len(front)
    for i, (block, crcs) in enumerate(blocks):
        by_channel = i in plan.v_by_channel
        entries.append(LayerEntry(plan.k_bits[i], plan.v_bits[i], widths[i], by_channel, len(block), offset, crcs))
        offset += len(block)
    header = Header(
        key,
        tokens=len(chunk.order),
        sinks=plan.sinks,
        kv_heads=chunk.kv_heads,
        key_dim=chunk.key_dim,
        value_dim=chunk.value_dim,
        scores=tuple(scales.items()),
        layers=tuple(entries),
        grid=plan.grid,
        alignment=alignment,
        front_crc=zlib.crc32(front),
        header_bytes=header_bytes,
        file_bytes=offset,
    )
    return b"".join([_header_bytes(header), front, *(block for block, _ in blocks)])


def encoded(kv: ChunkKV, plan: BitPlan, key: str) -> bytes:
    """The whole file of a chunk packed by a plan, rows in the order of the text. key: 64 hex digits."""
    return to_bytes(codec.encode(kv, plan, codec.text_order(kv.tokens)), bytes.fromhex(key))


def sizes(beginning: bytes) -> tuple[int, int]:
    """Tokens of a chunk, and numbers that were stored of them, by its first BEGINNING_BYTES, unchecked: good for
    statistics. Zeros when it does not begin like a chunk."""
    if len(beginning) < BEGINNING_BYTES or not beginning.startswith(_MAGIC):
        return 0, 0
    fixed = _FIXED.unpack_from(beginning)
    tokens, _sinks, layers, kv_heads, key_dim, value_dim = fixed[5:11]
    numbers = tokens * layers * kv_heads * (key_dim + value_dim)
    return (tokens, numbers) if numbers < 1 << 62 else (0, 0)


class ChunkReader:
    """Reads one stored chunk, as a whole or layer by layer, from any thread.

    Opening checks the header and reads the front; a layer is read and checked when asked for.
    Raises DamagedChunk, at opening or later, when bytes are missing, wrong, or of another format version.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._checked = False
        self._holders, self._lock = 1, Lock()
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
        entry, (k_cut, v_cut) = self.header.layers[index], self.header.cuts(index)
        k_lengths, v_lengths = k_cut.part_lengths, v_cut.part_lengths
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
            from_parts(k, k_cut),
            from_parts(v, v_cut),
        )

    def chunk(self) -> PackedChunk:
        """All layers with all planes."""
        h = self.header
        layers = tuple(self.layer(i) for i in range(len(h.layers)))
        return PackedChunk(h.plan, h.kv_heads, h.key_dim, h.value_dim, self.order, self.scores, layers)

    def check(self) -> None:
        """Reads all of it, and trusts it from then on: for sources whose bytes cannot change. Raises DamagedChunk."""
        for layer in range(len(self.header.layers)):
            self.layer(layer)
        self._checked = True

    def parts(self, index: int) -> list[memoryview]:
        """A layer's bytes as they lie in the file, keys' parts and then values', checked; `header.cuts` says what they
        are."""
        entry, (k_cut, v_cut) = self.header.layers[index], self.header.cuts(index)
        k_lengths, v_lengths = k_cut.part_lengths, v_cut.part_lengths
        if v_lengths:
            v_lengths[-1] += entry.block_bytes - sum(k_lengths + v_lengths)
        crcs = (*entry.crcs[: len(k_lengths)], *entry.crcs[_PARTS : _PARTS + len(v_lengths)])
        return self._read_parts(entry.offset, [*k_lengths, *v_lengths], crcs, index)

    def sinks(self, index: int) -> tuple[Float16, Float16]:
        """A layer's rows that are stored exactly, keys before RoPE and values, [sinks, kv_heads * dim]."""
        return self._k_sinks[index], self._v_sinks[index]

    def hold(self) -> None:
        """Stays open until it is closed once more."""
        with self._lock:
            self._holders += 1

    def close(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
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
            + [len(h.layers) * h.exact_tokens * h.kv_heads * dim for dim in (h.key_dim, h.value_dim)]
        )
        order, *scores, k_sinks, v_sinks, _padding = np.split(front, ends)
        self.order: Order = order.view("<u2")
        self.scores: dict[str, Float32] = {
            name: score.astype(np.float32) * np.float32(scale)
            for (name, scale), score in zip(h.scores, scores, strict=True)
        }
        self._k_sinks = k_sinks.reshape(len(h.layers), h.exact_tokens, h.kv_heads * h.key_dim)
        self._v_sinks = v_sinks.reshape(len(h.layers), h.exact_tokens, h.kv_heads * h.value_dim)

    def _read_parts(self, offset: int, lengths: list[int], crcs: Iterable[int], layer: int) -> list[memoryview]:
        """Neighbouring parts of a layer in one read, each checked."""
        run = memoryview(_read_exactly(self._source, offset, sum(lengths)))
        parts, start = [], 0
        for length, crc in zip(lengths, crcs, strict=False):  # unused checksums stay zero
            part = run[start : start + length]
            if not self._checked:
                _check(part, crc, f"layer {layer}")
            parts.append(part)
            start += length
        return parts


def _front(chunk: PackedChunk, scales: dict[str, float]) -> bytes:
    scores = [(score / np.float32(scales[name])).astype("<f2") for name, score in chunk.scores.items()]
    sinks = [layer.k_sinks.astype("<f2") for layer in chunk.layers]
    sinks += [layer.v_sinks.astype("<f2") for layer in chunk.layers]
    return b"".join(a.tobytes() for a in [chunk.order.astype("<u2"), *scores, *sinks])


def _alignment(lengths: Sequence[int]) -> int:
    """The largest at which padding costs sections of these lengths next to nothing."""
    affordable = (a for a in ALIGNMENTS if _SHARE * sum(-length % a for length in lengths) < sum(lengths))
    return next(affordable, ALIGNMENTS[-1])


def _block(k: list[bytes], v: list[bytes], alignment: int) -> tuple[bytes, tuple[int, ...]]:
    """One layer's bytes and the checksums of its parts."""
    if v:
        v = [*v[:-1], v[-1] + bytes(-sum(map(len, k + v)) % alignment)]  # padding, under the last part's checksum
    crcs = [[zlib.crc32(part) for part in parts] for parts in (k, v)]
    return b"".join(k + v), tuple(crc for own in crcs for crc in own + [0] * (_PARTS - len(own)))


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
        _GRID_NUMBERS.index(h.grid),
        h.alignment,
        h.front_crc,
    )
    scores = [_SCORE.pack(name.encode(), scale) for name, scale in h.scores]
    layers = [_LAYER.pack(e.k_bits, e.v_bits, _flags(e), e.block_bytes, e.offset, *e.crcs) for e in h.layers]
    widths = [_nibbles(e.k_widths) for e in h.layers]
    body = b"".join([fixed, *scores, *layers, *widths]).ljust(h.header_bytes - _CRC.size, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def _flags(entry: LayerEntry) -> int:
    return (_K_WIDTHS if entry.k_widths else 0) | (_V_BY_CHANNEL if entry.v_by_channel else 0)


def _nibbles(widths: bytes) -> bytes:
    """Two widths a byte, the first in the low half."""
    even = np.frombuffer(widths.ljust(len(widths) + len(widths) % 2, b"\0"), np.uint8)
    return bytes(even[0::2] | even[1::2] << 4)


def _from_nibbles(data: bytes | memoryview, channels: int) -> bytes:
    packed = np.frombuffer(data, np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=1).tobytes()[:channels]


def _read_header(source: ByteSource) -> Header:
    fixed = _FIXED.unpack(_read_exactly(source, 0, _FIXED.size))
    magic, version, header_bytes, file_bytes, key, *sizes, scores, grid, alignment, front_crc = fixed
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
    if grid >= len(_GRID_NUMBERS):
        raise _damaged(f"it has grid {grid}, which this Quire does not know")
    first_layer = _FIXED.size + scores * _SCORE.size
    named = _SCORE.iter_unpack(body[_FIXED.size : first_layer])
    entries = list(_LAYER.iter_unpack(body[first_layer : first_layer + layers * _LAYER.size]))
    widths = _widths(body[first_layer + layers * _LAYER.size :], [entry[2] for entry in entries], kv_heads * key_dim)
    return Header(
        key=key,
        tokens=tokens,
        sinks=sinks,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        scores=tuple((name.rstrip(b"\0").decode(), scale) for name, scale in named),
        layers=tuple(
            LayerEntry(k_bits, v_bits, k_widths, bool(flags & _V_BY_CHANNEL), block_bytes, offset, tuple(crcs))
            for (k_bits, v_bits, flags, block_bytes, offset, *crcs), k_widths in zip(entries, widths, strict=True)
        ),
        grid=_GRID_NUMBERS[grid],
        alignment=alignment,
        front_crc=front_crc,
        header_bytes=header_bytes,
        file_bytes=file_bytes,
    )


def _widths(data: bytes | memoryview, flags: Sequence[int], channels: int) -> list[bytes]:
    """The widths of every layer's key channels, none where they are all the same; they follow one another in data."""
    found, size = [], -(-channels // 2)
    for flag in flags:
        found.append(_from_nibbles(data[:size], channels) if flag & _K_WIDTHS else b"")
        data = data[size:] if flag & _K_WIDTHS else data
    return found


def _read_exactly(source: ByteSource, offset: int, length: int) -> bytes | memoryview:
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


def _padded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def _pad(data: bytes, alignment: int) -> bytes:
    return data.ljust(_padded(len(data), alignment), b"\0")
