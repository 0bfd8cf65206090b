"""The file format: its exact bytes, its size, every damaged bit found, and reading it in parts."""

import hashlib
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire_engine.errors import DamagedChunk
from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.types import BitPlan, ChunkKV, GridName
from quire_kernels.place import PackedTensor

KEY = bytes(range(32))


class Memory:
    """A ByteSource whose bytes a test may change."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.reads: list[tuple[int, int]] = []

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return bytes(self.data[offset : offset + length])

    def close(self) -> None:
        pass


def some_chunk(tokens: int, plan: BitPlan, heads: int = 1, dim: int = 8) -> codec.PackedChunk:
    """Arithmetic instead of random numbers, so that the bytes are the same with every NumPy."""
    shape = (len(plan.k_bits), tokens, heads, dim)
    ramp = np.arange(np.prod(shape)).reshape(shape)
    kv = ChunkKV(
        ((ramp * 37 % 101 - 50) / 16).astype(np.float16),
        ((ramp * 53 % 89 - 44) / 32).astype(np.float16),
        {"spectral": (np.arange(tokens) * 7 % 5 / 4).astype(np.float32)},
    )
    return codec.encode(kv, plan, codec.text_order(tokens))


def assert_same(a: codec.PackedChunk, b: codec.PackedChunk) -> None:
    assert (a.plan, a.kv_heads, a.key_dim, a.value_dim) == (b.plan, b.kv_heads, b.key_dim, b.value_dim)
    np.testing.assert_array_equal(a.order, b.order)
    assert list(a.scores) == list(b.scores)
    one, other = codec.decode(a), codec.decode(b)
    np.testing.assert_array_equal(one.k_pre, other.k_pre)
    np.testing.assert_array_equal(one.v, other.v)


TINY = some_chunk(7, BitPlan((2,), (1,)))
TINY_BYTES = to_bytes(TINY, KEY)
TINY_MIN_MAX = to_bytes(some_chunk(7, BitPlan((2,), (1,), "minmax", 2)), KEY)
OWN_WIDTHS = BitPlan((2, 3), (1, 2), "midrise", 2, (b"", bytes([3, 0, 1, 2, 1, 3, 0, 2, 1])), (1,))
"""The second layer: nine key channels with widths, values by channel."""
TINY_WIDTHS = to_bytes(some_chunk(7, OWN_WIDTHS, dim=9), KEY)


def test_golden_bytes() -> None:
    """A change here is a new format version: files that people have would no longer be read."""
    assert TINY_BYTES[:144].hex(" ", -16).split() == [
        "51554952452d4b560100000000010000",  # QUIRE-KV, version 1, 256 bytes of header
        "40020000000000000001020304050607",  # 576 bytes; the key
        "08090a0b0c0d0e0f1011121314151617",
        "18191a1b1c1d1e1f0700000004000000",  # 7 tokens, 4 of them exact
        "01000000010000000800000008000000",  # 1 layer, 1 KV head, 8 and 8 channels
        "01000000000000004000000020403c83",  # 1 score, mid-rise, aligned to 64; the front's checksum
        "737065637472616c0000000000000000",  # spectral
        "0000000000000000000000000000803f",  # its scale
        "0201000080000000c001000000000000",  # 2 and 1 bits, 128 bytes at 448; then checksums
    ]
    assert hashlib.sha256(TINY_BYTES).hexdigest() == "0238dff97c23bb9e1ff198231c5e733bf1426a1588d466337046db46b2e61e13"
    assert (
        hashlib.sha256(TINY_MIN_MAX).hexdigest() == "7d8c23c2b318329b7cc8948ff1498087abf95797bd7b7dd3f32af72a19a34464"
    )


def test_golden_bytes_of_widths_and_values_by_channel() -> None:
    assert struct.unpack_from("<BBHIQ", TINY_WIDTHS, 128) == (2, 1, 0, 128, 512)
    assert struct.unpack_from("<BBHIQ", TINY_WIDTHS, 216) == (3, 2, 1 | 2, 192, 640)
    assert TINY_WIDTHS[304:309].hex() == "0321312001"  # 3, 0; 1, 2; ..., low halves first; nothing beside the ninth
    assert not any(TINY_WIDTHS[309:316])
    assert hashlib.sha256(TINY_WIDTHS).hexdigest() == "c8d526962d7b9d8e6b4e26331a30b610ea4e982b92a87803fa21c831513bf56a"
    header = ChunkReader(Memory(TINY_WIDTHS)).header
    lengths = [cut.part_lengths for cut in header.cuts(1)]
    assert lengths == [[4 + 6 * 9, 5, 3, 2], [4 + 6 * 9, 6, 6]]  # planes of 7, 4 and 2 channels of 5 rows


def test_fields_lie_where_the_document_says() -> None:
    """Read with nothing but struct, number by number."""
    data = TINY_BYTES
    assert data[:8] == b"QUIRE-KV"
    assert struct.unpack_from("<II", data, 8) == (1, 256)
    assert struct.unpack_from("<Q", data, 16) == (576,)
    assert data[24:56] == KEY
    assert struct.unpack_from("<9I", data, 56) == (7, 4, 1, 1, 8, 8, 1, 0, 64)
    assert struct.unpack_from("<I", data, 92) == (zlib.crc32(data[256:448]),)
    name, scale = struct.unpack_from("<28sf", data, 96)
    assert (name.rstrip(b"\0"), scale) == (b"spectral", 1.0)
    assert struct.unpack_from("<BBHIQ", data, 128) == (2, 1, 0, 128, 448)
    k_crcs, v_crcs = struct.unpack_from("<9I", data, 144), struct.unpack_from("<9I", data, 180)
    assert struct.unpack_from("<I", data, 252) == (zlib.crc32(data[:252]),)

    assert struct.unpack_from("<7H", data, 256) == (0, 1, 2, 3, 4, 5, 6)
    assert struct.unpack_from("<7e", data, 270) == (0.0, 0.5, 1.0, 0.25, 0.75, 0.0, 0.5)
    assert struct.unpack_from("<8e", data, 284) == tuple((i * 37 % 101 - 50) / 16 for i in range(8))
    assert struct.unpack_from("<8e", data, 348) == tuple((i * 53 % 89 - 44) / 32 for i in range(8))
    assert not any(data[412:448])

    k_grid, k_planes, v_grid = data[448:500], (data[500:503], data[503:506]), data[506:520]
    assert [zlib.crc32(part) for part in (k_grid, *k_planes)] == list(k_crcs[:3])
    assert zlib.crc32(v_grid) == v_crcs[0]
    assert zlib.crc32(data[520:576]) == v_crcs[1]  # the last plane, and padding to the block's end
    assert not any(k_crcs[3:] + v_crcs[2:])
    assert not any(data[523:])

    k_pre = [[((32 + 8 * row + channel) * 37 % 101 - 50) / 16 for channel in range(8)] for row in range(3)]
    master, *rest = struct.unpack("<f8e8e8B8b", k_grid)
    middle, unit, scales, zeros = rest[:8], rest[8:16], rest[16:24], rest[24:]
    for row in range(3):
        for channel in range(8):
            i = 8 * row + channel
            high, low = (plane[i // 8] >> (i % 8) & 1 for plane in k_planes)
            e4m3 = scales[channel]
            step = master * (8 + e4m3 % 8) * 2.0 ** ((e4m3 >> 3) - 10)
            x = middle[channel] + unit[channel] * zeros[channel] + (2 * high + low + 0.5 - 2) * step
            assert abs(x - k_pre[row][channel]) <= step / 2 + 1e-5


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 140),
    bits=st.lists(st.tuples(*[st.sampled_from([*range(1, 9), 16])] * 2), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 40, 64]),
    grid=st.sampled_from(get_args(GridName)),
    sinks=st.sampled_from([0, 1, 4, 70, 255]),
)
def test_what_is_written_is_read(
    tokens: int, bits: list[tuple[int, int]], heads: int, dim: int, grid: GridName, sinks: int
) -> None:
    k_bits, v_bits = zip(*bits, strict=True)
    chunk = some_chunk(tokens, BitPlan(k_bits, v_bits, grid, sinks), heads, dim)
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    assert (reader.tokens, reader.header.key) == (tokens, KEY)
    assert_same(reader.chunk(), chunk)
    np.testing.assert_allclose(reader.scores["spectral"], chunk.scores["spectral"], rtol=1e-3)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 80),
    channels=st.integers(1, 21),
    sinks=st.sampled_from([0, 4, 100]),
    layers=st.integers(1, 3),
    data=st.data(),
)
def test_plans_of_widths_and_values_by_channel_come_back(
    tokens: int, channels: int, sinks: int, layers: int, data: st.DataObject
) -> None:
    of_channels = st.lists(st.integers(0, 8), min_size=channels, max_size=channels).filter(any).map(bytes)
    widths = data.draw(st.lists(of_channels | st.just(b""), min_size=layers, max_size=layers).filter(any).map(tuple))
    k_bits = tuple(max(own, default=5) for own in widths)
    by_channel = tuple(sorted(data.draw(st.sets(st.integers(0, layers - 1)))))
    plan = BitPlan(k_bits, (3,) * layers, "midrise", sinks, widths, by_channel)
    chunk = some_chunk(tokens, plan, heads=1, dim=channels)
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    assert reader.header.plan == plan
    assert_same(reader.chunk(), chunk)
    top = data.draw(st.integers(1, 8))
    for kept, whole in zip((reader.layer(layer, top, top) for layer in range(layers)), chunk.layers, strict=True):
        for some, every in ((kept.k, whole.k), (kept.v, whole.v)):
            if isinstance(some, PackedTensor) and isinstance(every, PackedTensor):
                assert [plane.tobytes() for plane in some.planes] == [plane.tobytes() for plane in every.planes[:top]]
                np.testing.assert_array_equal(some.widths, every.widths)


def test_scores_of_any_size_fit_float16() -> None:
    scores = {"huge": np.array([3e30, 1e30, 0]), "tiny": np.array([2e-30, 0, -1e-30]), "none": np.zeros(3)}
    ones = np.ones((1, 3, 1, 8), np.float16)
    kv = ChunkKV(ones, ones, {name: score.astype(np.float32) for name, score in scores.items()})
    chunk = codec.encode(kv, BitPlan((4,), (4,)), codec.text_order(3))
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    assert list(reader.scores) == list(scores)
    for name, score in scores.items():
        np.testing.assert_allclose(reader.scores[name], score, rtol=1e-3)


def test_a_model_of_many_layers_gets_a_longer_header() -> None:
    chunk = some_chunk(6, BitPlan.uniform(80, 4, 3))
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    assert reader.header.header_bytes >= 96 + 32 + 80 * 88 + 4
    assert_same(reader.chunk(), chunk)


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "plan", "alignment"),
    [
        (512, 4, 128, BitPlan.uniform(8, 8, 8), 4096),
        (512, 3, 64, BitPlan.uniform(8, 4, 3), 512),
        (176, 3, 64, BitPlan.uniform(8, 4, 3), 64),
        (3, 1, 8, BitPlan.uniform(8, 4, 3), 64),
    ],
)
def test_sections_are_aligned_as_far_as_that_is_cheap(
    tokens: int, heads: int, dim: int, plan: BitPlan, alignment: int
) -> None:
    data = to_bytes(some_chunk(tokens, plan, heads, dim), KEY)
    header = ChunkReader(Memory(data)).header
    assert header.alignment == alignment
    sections = [(0, header.header_bytes), (header.header_bytes, header.front_bytes)]
    sections += [(layer.offset, layer.block_bytes) for layer in header.layers]
    assert all(start % alignment == 0 and length % alignment == 0 for start, length in sections)
    assert sections[-1][0] + sections[-1][1] == len(data)
    packed = len(header.layers) * sum(sum(cut.part_lengths) for cut in header.cuts(0))
    padding = sum(layer.block_bytes for layer in header.layers) - packed
    assert padding < (0.01 * len(data) if alignment > 64 else 64 * len(header.layers))


@pytest.mark.parametrize(
    ("plan", "documented"),
    [
        (BitPlan.uniform(30, 8, 4), [7.21, 6.62, 6.49, 6.38]),
        (BitPlan.uniform(30, 4, 3), [4.83, 4.15, 3.99, 3.90]),
        (BitPlan.uniform(30, 2, 2), [3.41, 2.69, 2.51, 2.40]),
        (replace(BitPlan.uniform(30, 4, 3), k_widths=(bytes([2, 0, 1, 4, 2, 3]) * 32,) * 30), [3.92, 3.19, 3.01, 2.91]),
    ],
)
def test_sizes_are_those_of_the_document(plan: BitPlan, documented: list[float]) -> None:
    measured = []
    for tokens in (64, 176, 300, 512):
        numbers = np.zeros((30, tokens, 3, 64), np.float16)
        scores = {name: np.zeros(tokens, np.float32) for name in ("spectral", "sensitivity")}
        chunk = codec.encode(ChunkKV(numbers, numbers, scores), plan, codec.text_order(tokens))
        measured.append(8 * len(to_bytes(chunk, KEY)) / (2 * numbers.size))
    assert measured == pytest.approx(documented, abs=0.005001)


def test_a_stored_order_comes_back() -> None:
    order = np.array([0, 1, 2, 3, 9, 5, 7, 4, 6, 8], np.uint16)
    kv = codec.decode(some_chunk(10, BitPlan((16,), (16,))))
    chunk = codec.encode(kv, BitPlan((16,), (16,)), order)
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    np.testing.assert_array_equal(reader.order, order)
    np.testing.assert_array_equal(codec.decode(reader.chunk()).k_pre, kv.k_pre)


def test_fewer_planes_read_fewer_bytes_and_keep_the_top_bits() -> None:
    chunk = some_chunk(68, BitPlan.uniform(2, 6, 4), heads=2, dim=64)
    source = Memory(to_bytes(chunk, KEY))
    reader = ChunkReader(source)
    whole = reader.layer(1)
    source.reads.clear()
    top = reader.layer(1, k_planes=3, v_planes=1)
    plane_bytes = 64 * 128 // 8
    assert [length for _, length in source.reads] == [4 + 6 * 128 + 3 * plane_bytes, 8 + 4 * 64 + plane_bytes]
    for cut, full, kept in ((top.k, whole.k, 3), (top.v, whole.v, 1)):
        assert isinstance(cut, PackedTensor)
        assert isinstance(full, PackedTensor)
        assert cut.bits == full.bits
        np.testing.assert_array_equal(cut.planes, full.planes[:kept])
    with pytest.raises(ValueError, match="without planes"):
        reader.layer(0, v_planes=0)


def test_fewer_planes_of_mixed_widths_read_fewer_bytes() -> None:
    plan = BitPlan((4,), (3,), k_widths=(bytes([2, 0, 1, 4]) * 32,))
    source = Memory(to_bytes(some_chunk(68, plan, heads=2, dim=64), KEY))
    reader = ChunkReader(source)
    for planes, of_planes in ((1, 96), (2, 96 + 64), (3, 96 + 64 + 32), (8, 96 + 64 + 32 + 32)):
        source.reads.clear()
        reader.layer(0, k_planes=planes)
        assert source.reads[0][1] == 4 + 6 * 128 + 64 * of_planes // 8


def test_damage_in_a_plane_that_is_not_read_does_no_harm() -> None:
    source = Memory(to_bytes(some_chunk(68, BitPlan((4,), (4,))), KEY))
    reader = ChunkReader(source)
    grid = reader.header.layers[0].offset
    source.data[grid] ^= 1
    with pytest.raises(DamagedChunk, match="layer 0"):
        reader.layer(0, 1, 1)
    source.data[grid] ^= 1
    source.data[-1] ^= 1  # padding, counted with V's last plane
    reader.layer(0, 4, 3)
    with pytest.raises(DamagedChunk, match="layer 0"):
        reader.layer(0)


def unnoticed_flips(data: bytes, places: Iterable[int]) -> list[int]:
    """Bits of a file that change and are used nevertheless, by a reader that opens it anew for each."""
    source, unnoticed = Memory(data), []
    for bit in places:
        source.data[bit // 8] ^= 1 << bit % 8
        try:
            with ChunkReader(source) as reader:
                for layer in range(len(reader.header.layers)):
                    reader.layer(layer)
            unnoticed.append(bit)
        except DamagedChunk:
            pass
        source.data[bit // 8] ^= 1 << bit % 8
    assert bytes(source.data) == data
    return unnoticed


@pytest.mark.parametrize("data", [TINY_BYTES, TINY_MIN_MAX, TINY_WIDTHS], ids=[*get_args(GridName), "widths"])
def test_every_flipped_bit_is_noticed(data: bytes) -> None:
    """All bits of a whole file: header, front, layers, padding."""
    assert unnoticed_flips(data, range(8 * len(data))) == []
    ChunkReader(Memory(data)).chunk()


def test_a_flipped_bit_anywhere_in_a_larger_file_is_noticed() -> None:
    plan = replace(BitPlan((3, 16, 8), (2, 5, 16)), sinks=1)
    data = to_bytes(some_chunk(40, plan, heads=2), KEY)
    assert unnoticed_flips(data, range(3, 8 * len(data), 101)) == []


def test_every_truncation_is_noticed_at_opening() -> None:
    data = to_bytes(some_chunk(200, BitPlan.uniform(3, 8, 16), heads=2), KEY)
    header_bytes = ChunkReader(Memory(data)).header.header_bytes
    assert len(data) > 7 * 4096
    for length in [*range(header_bytes + 1), *range(4096, len(data), 4096), len(data) - 1]:
        with pytest.raises(DamagedChunk):
            ChunkReader(Memory(data[:length]))
    for length in range(len(TINY_WIDTHS)):
        with pytest.raises(DamagedChunk):
            ChunkReader(Memory(TINY_WIDTHS[:length]))
    with pytest.raises(DamagedChunk, match="instead of"):
        ChunkReader(Memory(data + b"\0"))


def test_a_file_cut_while_open_is_noticed() -> None:
    source = Memory(TINY_BYTES)
    reader = ChunkReader(source)
    del source.data[458:]
    with pytest.raises(DamagedChunk, match="ends at byte 458"):
        reader.layer(0)


def test_other_versions_are_refused_by_number() -> None:
    source = Memory(TINY_BYTES)
    source.data[8] = 7
    with pytest.raises(DamagedChunk, match=r"format version 7.*reads version 1") as refusal:
        ChunkReader(source)
    assert refusal.value.hint


def test_grids_that_are_not_known_are_refused() -> None:
    source = Memory(TINY_BYTES)
    source.data[84] = 2
    source.data[252:256] = struct.pack("<I", zlib.crc32(source.data[:252]))
    with pytest.raises(DamagedChunk, match="grid 2"):
        ChunkReader(source)


def test_other_files_are_refused() -> None:
    with pytest.raises(DamagedChunk, match="begin like a chunk"):
        ChunkReader(Memory(b"GGUF" + bytes(5000)))


def test_layers_can_be_read_by_several_threads() -> None:
    chunk = some_chunk(120, BitPlan.uniform(8, 5, 3), heads=2, dim=64)
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    with ThreadPoolExecutor(4) as pool:
        layers = list(pool.map(reader.layer, [*range(8)] * 10))
    for i, layer in enumerate(layers):
        k, v = codec.decode_layer(layer)
        k_expected, v_expected = codec.decode_layer(chunk.layers[i % 8])
        np.testing.assert_array_equal(k, k_expected)
        np.testing.assert_array_equal(v, v_expected)


def test_keys_and_names_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        to_bytes(TINY, bytes(31))
    ones = np.ones((1, 3, 1, 8), np.float16)
    kv = ChunkKV(ones, ones, {"x" * 29: np.ones(3, np.float32)})
    long_name = codec.encode(kv, BitPlan((4,), (4,)), codec.text_order(3))
    with pytest.raises(ValueError, match="1 to 28 bytes"):
        to_bytes(long_name, KEY)
