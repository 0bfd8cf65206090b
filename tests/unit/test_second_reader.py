"""A second reader of the chunk file, written from docs/kv-format.md alone: struct, zlib, NumPy, nothing of Quire's.

Only the tests below it know the first reader and the writer.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.kv.memory import MemorySource
from quire_engine.types import BitPlan, ChunkKV, GridName

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tensor:
    """Keys or values of one layer, cut up as the document says. grid: 0 mid-rise, 1 min/max.

    widths: of key channels, where they have any.
    """

    rows: int
    channels: int
    bits: int
    grid: int
    along_tokens: bool
    widths: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        return (64, 32)[self.grid]

    @property
    def groups(self) -> tuple[int, int]:
        if self.along_tokens:
            return -(-self.rows // self.group), self.channels
        return self.rows, -(-self.channels // self.group)

    @property
    def shared(self) -> int:
        return self.channels if self.along_tokens else 1

    @property
    def lengths(self) -> list[int]:
        if not self.rows:
            return []
        if self.bits == 16:
            return [2 * self.rows * self.channels]
        groups = self.groups[0] * self.groups[1]
        grid = (4 + 4 * self.shared + 2 * groups, 4 * groups)[self.grid]
        return [grid] + [-(-self.rows * len(self.held(plane)) // 8) for plane in range(self.bits)]

    def held(self, plane: int) -> list[int]:
        """The channels of a plane, in the order of its numbers."""
        if not self.widths:
            return list(range(self.channels))
        sequence = [c for width in range(8, -1, -1) for c in range(self.channels) if self.widths[c] == width]
        return [c for c in sequence if self.widths[c] > plane]

    def numbers(self, parts: list[bytes]) -> Array:
        """The parts, of which low planes may be missing, as [rows, channels]."""
        if not self.rows or self.bits == 16:
            exact = np.frombuffer(b"".join(parts), "<f2", self.rows * self.channels)
            return exact.reshape(self.rows, self.channels).astype(np.float64)
        step, first = self.points(parts[0])
        if self.along_tokens:
            step, first = (np.repeat(a, self.group, axis=0)[: self.rows] for a in (step, first))
        else:
            step, first = (np.repeat(a, self.group, axis=1)[:, : self.channels] for a in (step, first))
        q = np.zeros((self.rows, self.channels))
        for plane, part in enumerate(parts[1:]):
            data, held = np.frombuffer(part, np.uint8), self.held(plane)
            i = np.arange(self.rows * len(held))
            q[:, held] = 2 * q[:, held] + (data[i // 8] >> (i % 8) & 1).reshape(self.rows, -1)
        b, p = self.bits_of_channels, np.minimum(self.bits_of_channels, len(parts) - 1)
        return np.asarray(first + (2 ** (b - p) * (q + 0.5) - 0.5) * step)

    @property
    def bits_of_channels(self) -> Array:
        return np.array(self.widths or [self.bits] * self.channels, float)

    def points(self, grid: bytes) -> tuple[Array, Array]:
        """(step, first) of every group."""
        n, groups = self.shared, self.groups[0] * self.groups[1]
        if self.grid == 1:
            step, first = (np.frombuffer(grid, "<f2", groups, at).astype(np.float64) for at in (0, 2 * groups))
            return step.reshape(self.groups), first.reshape(self.groups)
        (master,) = struct.unpack_from("<f", grid)
        middle, unit = (np.frombuffer(grid, "<f2", n, at).astype(np.float64) for at in (4, 4 + 2 * n))
        scales = np.frombuffer(grid, np.uint8, groups, 4 + 4 * n).reshape(self.groups)
        zeros = np.frombuffer(grid, np.int8, groups, 4 + 4 * n + groups).reshape(self.groups)
        exponent, mantissa = scales >> 3 & 15, scales & 7
        e4m3 = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7), mantissa / 8 * 2.0**-6)
        step = e4m3 * master
        bits = self.bits_of_channels if self.widths else self.bits
        return step, middle + zeros * unit + (0.5 - 2.0 ** (bits - 1)) * step


class SecondReader:
    def __init__(self, data: bytes) -> None:
        assert data[:8] == b"QUIRE-KV"
        version, self.header_bytes, file_bytes = struct.unpack_from("<IIQ", data, 8)
        assert version == 1
        assert file_bytes == len(data)
        (crc,) = struct.unpack_from("<I", data, self.header_bytes - 4)
        assert crc == zlib.crc32(data[: self.header_bytes - 4])
        self.data, self.key = data, data[24:56]
        numbers = struct.unpack_from("<10I", data, 56)
        self.tokens, self.asked_sinks, self.layers, self.heads, self.key_dim, self.value_dim = numbers[:6]
        scores, self.grid, front_crc = numbers[6], numbers[7], numbers[9]
        self.alignment: int = numbers[8]
        assert self.grid in (0, 1)
        self.sinks = min(self.asked_sinks, self.tokens)
        self.ck, self.cv = self.heads * self.key_dim, self.heads * self.value_dim
        front_bytes = self.pad(2 * self.tokens * (1 + scores) + 2 * self.layers * self.sinks * (self.ck + self.cv))
        front = data[self.header_bytes : self.header_bytes + front_bytes]
        assert front_crc == zlib.crc32(front)
        self.read_front(front, [struct.unpack_from("<28sf", data, 96 + 32 * i) for i in range(scores)])
        self.entries = [struct.unpack_from("<BBHIQ18I", data, 96 + 32 * scores + 88 * i) for i in range(self.layers)]
        self.check_that_nothing_lies_between(front_bytes, self.read_widths(96 + 32 * scores + 88 * self.layers))

    def pad(self, length: int) -> int:
        return (length + self.alignment - 1) // self.alignment * self.alignment

    def read_front(self, front: bytes, scores: list[tuple[bytes, float]]) -> None:
        t, s = self.tokens, self.sinks
        self.order = np.frombuffer(front, "<u2", t)
        assert self.order[:s].tolist() == list(range(s))
        assert sorted(self.order.tolist()) == list(range(t))
        self.scores = {
            name.rstrip(b"\0").decode(): np.frombuffer(front, "<f2", t, 2 * t * (1 + i)).astype(np.float64) * scale
            for i, (name, scale) in enumerate(scores)
        }
        at = 2 * t * (1 + len(scores))
        k_sinks = np.frombuffer(front, "<f2", self.layers * s * self.ck, at)
        v_sinks = np.frombuffer(front, "<f2", self.layers * s * self.cv, at + k_sinks.nbytes)
        assert not any(front[at + k_sinks.nbytes + v_sinks.nbytes :])
        self.k_sinks = k_sinks.reshape(self.layers, s, self.ck)
        self.v_sinks = v_sinks.reshape(self.layers, s, self.cv)

    def read_widths(self, at: int) -> int:
        """Where they end."""
        self.widths: list[tuple[int, ...]] = []
        for k_bits, _, flags, *_ in self.entries:
            assert flags in (0, 1, 2, 3)
            own: list[int] = []
            if flags & 1:
                for byte in self.data[at : at + (self.ck + 1) // 2]:
                    own += [byte % 16, byte // 16]
                at += (self.ck + 1) // 2
                assert not any(own[self.ck :])
                own = own[: self.ck]
                assert (max(own), self.grid) == (k_bits, 0)
            self.widths.append(tuple(own))
        return at

    def check_that_nothing_lies_between(self, front_bytes: int, end_of_entries: int) -> None:
        assert self.header_bytes == self.pad(end_of_entries + 4)
        assert not any(self.data[end_of_entries : self.header_bytes - 4])
        offset = self.header_bytes + front_bytes
        for entry in self.entries:
            assert entry[4] == offset
            offset += entry[3]
        assert offset == len(self.data)

    def layer(self, index: int, planes: int = 8) -> tuple[Array, Array]:
        """Keys before RoPE and values, [tokens, channels] in text order."""
        k_bits, v_bits, flags, block_bytes, offset, *crcs = self.entries[index]
        rows = self.tokens - self.sinks
        k = Tensor(rows, self.ck, k_bits, self.grid, along_tokens=True, widths=self.widths[index])
        v = Tensor(rows, self.cv, v_bits, self.grid, along_tokens=bool(flags & 2))
        parts = list(self.cut(k.lengths, v.lengths, block_bytes, offset))
        assert block_bytes == self.pad(sum(k.lengths + v.lengths))
        n = len(k.lengths)
        assert crcs == self.checksums(parts[:n]) + self.checksums(parts[n:])
        k_rows = np.concatenate([self.k_sinks[index], k.numbers(parts[:n][: 1 + planes])])
        v_rows = np.concatenate([self.v_sinks[index], v.numbers(parts[n:][: 1 + planes])])
        keys, values = np.empty_like(k_rows), np.empty_like(v_rows)
        keys[self.order], values[self.order] = k_rows, v_rows
        return keys, values

    def cut(self, k: list[int], v: list[int], block_bytes: int, offset: int) -> Iterator[bytes]:
        lengths = k + v
        if lengths:
            lengths[-1] += block_bytes - sum(lengths)
        for length in lengths:
            yield self.data[offset : offset + length]
            offset += length

    @staticmethod
    def checksums(parts: list[bytes]) -> list[int]:
        return [zlib.crc32(part) for part in parts] + [0] * (9 - len(parts))


def some_chunk(plan: BitPlan, tokens: int, heads: int, key_dim: int, value_dim: int, by_score: bool) -> ChunkKV:
    rng = np.random.default_rng(tokens + 100 * heads + key_dim)
    layers = len(plan.k_bits)
    k_pre = rng.standard_normal((layers, tokens, heads, key_dim)) * 10.0 ** rng.uniform(-2, 2, (heads, key_dim))
    v = rng.standard_normal((layers, tokens, heads, value_dim))
    scores = {"spectral": rng.random(tokens), "sensitivity": rng.random(tokens) * 1e-9} if by_score else {}
    named = {name: score.astype(np.float32) for name, score in scores.items()}
    return ChunkKV(k_pre.astype(np.float16), v.astype(np.float16), named)


BITS = st.sampled_from([*range(1, 9), 16])


def plans(layers: int, channels: int) -> st.SearchStrategy[BitPlan]:
    """Any plan; on the mid-rise grid some layers have widths."""

    def plan(grid: GridName, k_bits: list[int], v_bits: list[int], own: list[list[int]], flags: list[bool]) -> BitPlan:
        widths = tuple(bytes(w) if any(w) and b < 16 else b"" for w, b in zip(own, k_bits, strict=True))
        if grid == "minmax" or not any(widths):
            widths = ()
        of_layers = zip(k_bits, widths or [b""] * layers, strict=True)
        by_channel = tuple(layer for layer in range(layers) if flags[layer])
        return BitPlan(
            tuple(max(w) if w else b for b, w in of_layers), tuple(v_bits), grid, 4, widths, v_by_channel=by_channel
        )

    def every(of_layer: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(of_layer, min_size=layers, max_size=layers)

    widths: st.SearchStrategy[list[int]] = st.just([]) | st.lists(
        st.integers(0, 8), min_size=channels, max_size=channels
    )
    return st.builds(plan, st.sampled_from(get_args(GridName)), *map(every, (BITS, BITS, widths, st.booleans())))


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(1, 140),
    layers=st.integers(1, 3),
    sinks=st.sampled_from([0, 4, 70, 255]),
    heads=st.integers(1, 3),
    key_dim=st.sampled_from([2, 5, 8, 40, 64]),
    value_dim=st.sampled_from([1, 8, 64]),
    by_score=st.booleans(),
    planes=st.integers(1, 8),
    data=st.data(),
)
def test_both_readers_see_the_same(
    tokens: int,
    layers: int,
    sinks: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    by_score: bool,
    planes: int,
    data: st.DataObject,
) -> None:
    plan = replace(data.draw(plans(layers, heads * key_dim)), sinks=sinks)
    kv = some_chunk(plan, tokens, heads, key_dim, value_dim, by_score)
    order = codec.score_order(kv.scores["spectral"], sinks) if by_score else codec.text_order(tokens)
    key = bytes(range(100, 132))
    written = to_bytes(codec.encode(kv, plan, order), key)
    first, second = ChunkReader(MemorySource(written)), SecondReader(written)
    assert first.header.plan == plan
    assert (second.key, second.asked_sinks, second.grid) == (key, sinks, get_args(GridName).index(plan.grid))
    assert (second.heads, second.key_dim, second.value_dim) == (heads, key_dim, value_dim)
    np.testing.assert_array_equal(second.order, order)
    for name, score in kv.scores.items():
        np.testing.assert_allclose(second.scores[name], score, rtol=1e-3, atol=1e-3 * score.max())
    for layer in range(layers):
        for read in {planes, 8}:
            ours = codec.decode_layer(first.layer(layer, read, read))
            for one, other in zip(ours, second.layer(layer, read), strict=True):
                # Ours went through float32 and ended as float16.
                scale = np.maximum(abs(other).max(0), 2.0**-14)
                assert (abs(one.reshape(other.shape) - other) <= scale * 2.0**-10).all()


def test_the_second_reader_finds_the_numbers_that_were_written() -> None:
    """Against the original, so that two readers with the same mistake are found out."""
    for grid in get_args(GridName):
        plan = replace(BitPlan.uniform(2, 8, 8), grid=grid)
        kv = some_chunk(plan, 90, 2, 8, 8, by_score=True)
        order = codec.score_order(kv.scores["spectral"], 4)
        reader = SecondReader(to_bytes(codec.encode(kv, plan, order), bytes(32)))
        for layer in range(2):
            keys, values = reader.layer(layer)
            for read, written, along in ((keys, kv.k_pre[layer], 0), (values, kv.v[layer], 1)):
                exact = written.reshape(90, -1).astype(np.float64)
                np.testing.assert_array_equal(read[:4], exact[:4])
                assert (abs(read - exact) <= np.ptp(exact, axis=along, keepdims=True) / 255 / 2 * 1.15).all()


def test_the_second_reader_finds_every_channel_in_its_own_precision() -> None:
    """Against the original, too: exact sinks, half a cell of each channel's own width, values along tokens."""
    widths = bytes([8, 0, 3, 1, 8, 2, 0, 5, 8, 4, 4, 6])
    plan = BitPlan((8,), (6,), k_widths=(widths,), v_by_channel=(0,))
    kv = some_chunk(plan, 50, 2, 6, 6, by_score=True)
    order = codec.score_order(kv.scores["spectral"], 4)
    reader = SecondReader(to_bytes(codec.encode(kv, plan, order), bytes(32)))
    for (read, written), bits in zip(
        zip(reader.layer(0), (kv.k_pre[0], kv.v[0]), strict=True), (list(widths), 6), strict=True
    ):
        exact = written.reshape(50, -1).astype(np.float64)
        np.testing.assert_array_equal(read[:4], exact[:4])
        half_cell = np.ptp(exact[4:], axis=0) / 2.0 ** np.array(bits) / 2
        assert (abs(read - exact) <= half_cell * 1.15 + 2e-3 * abs(exact).max(0)).all()


def test_the_second_reader_notices_other_bytes() -> None:
    plan = BitPlan.uniform(1, 3, 2)
    data = bytearray(to_bytes(codec.encode(some_chunk(plan, 9, 1, 8, 8, True), plan, codec.text_order(9)), bytes(32)))
    data[-1] ^= 1
    with pytest.raises(AssertionError):
        SecondReader(bytes(data)).layer(0)
