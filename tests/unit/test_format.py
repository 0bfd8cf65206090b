"""The file format: its exact bytes, every damaged bit found, and reading it in parts."""

import hashlib
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire_engine.errors import DamagedChunk
from quire_engine.kv import codec
from quire_engine.kv.format import PAGE_BYTES, ChunkReader, to_bytes
from quire_engine.types import BitPlan, ChunkKV
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


def test_golden_bytes() -> None:
    """A change here is a new format version: files that people have would no longer be read."""
    assert len(TINY_BYTES) == 3 * PAGE_BYTES
    assert hashlib.sha256(TINY_BYTES).hexdigest() == "8b7a94a76ba5a18486c9c6b70253fd382dde6b87f70a9928220ca98dd5eb5ac7"


def test_fields_lie_where_the_document_says() -> None:
    """A second reader, written from docs/kv-format.md with nothing but struct."""
    data = TINY_BYTES
    assert data[:8] == b"QUIRE-KV"
    assert struct.unpack_from("<II", data, 8) == (1, 4096)
    assert struct.unpack_from("<Q", data, 16) == (12288,)
    assert data[24:56] == KEY
    assert struct.unpack_from("<7I", data, 56) == (7, 4, 1, 1, 8, 8, 1)
    assert struct.unpack_from("<I", data, 84) == (zlib.crc32(data[4096:8192]),)
    name, scale = struct.unpack_from("<28sf", data, 88)
    assert (name.rstrip(b"\0"), scale) == (b"spectral", 1.0)
    assert struct.unpack_from("<BBHIQ", data, 120) == (2, 1, 0, 4096, 8192)
    k_crcs, v_crcs = struct.unpack_from("<9I", data, 136), struct.unpack_from("<9I", data, 172)
    assert struct.unpack_from("<I", data, 4092) == (zlib.crc32(data[:4092]),)

    assert struct.unpack_from("<7H", data, 4096) == (0, 1, 2, 3, 4, 5, 6)
    assert struct.unpack_from("<7e", data, 4110) == (0.0, 0.5, 1.0, 0.25, 0.75, 0.0, 0.5)
    assert struct.unpack_from("<8e", data, 4124) == tuple((i * 37 % 101 - 50) / 16 for i in range(8))
    assert struct.unpack_from("<8e", data, 4188) == tuple((i * 53 % 89 - 44) / 32 for i in range(8))
    assert not any(data[4252:8192])

    k_grid, k_planes, v_grid = data[8192:8244], (data[8244:8247], data[8247:8250]), data[8250:8264]
    assert [zlib.crc32(part) for part in (k_grid, *k_planes)] == list(k_crcs[:3])
    assert zlib.crc32(v_grid) == v_crcs[0]
    assert zlib.crc32(data[8264:12288]) == v_crcs[1]  # the last plane, and padding to the block's end
    assert not any(k_crcs[3:] + v_crcs[2:])
    assert not any(data[8267:])

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
)
def test_what_is_written_is_read(tokens: int, bits: list[tuple[int, int]], heads: int, dim: int) -> None:
    k_bits, v_bits = zip(*bits, strict=True)
    chunk = some_chunk(tokens, BitPlan(k_bits, v_bits), heads, dim)
    reader = ChunkReader(Memory(to_bytes(chunk, KEY)))
    assert (reader.tokens, reader.header.key) == (tokens, KEY)
    assert_same(reader.chunk(), chunk)
    np.testing.assert_allclose(reader.scores["spectral"], chunk.scores["spectral"], rtol=1e-3)


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
    assert reader.header.header_bytes == 2 * PAGE_BYTES
    assert all(entry.offset % PAGE_BYTES == 0 for entry in reader.header.layers)
    assert_same(reader.chunk(), chunk)


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


def test_damage_in_a_plane_that_is_not_read_does_no_harm() -> None:
    source = Memory(to_bytes(some_chunk(68, BitPlan((4,), (4,))), KEY))
    reader = ChunkReader(source)
    source.data[-PAGE_BYTES + 100] ^= 1  # K's grid
    with pytest.raises(DamagedChunk, match="layer 0"):
        reader.layer(0, 1, 1)
    source.data[-PAGE_BYTES + 100] ^= 1
    source.data[-1] ^= 1  # padding, counted with V's last plane
    reader.layer(0, 4, 3)
    with pytest.raises(DamagedChunk, match="layer 0"):
        reader.layer(0)


def test_every_flipped_bit_is_noticed() -> None:
    """All bits of a whole file, padding included. Layers are checked when read: one reader does for them."""
    source = Memory(TINY_BYTES)
    opened = ChunkReader(source)
    unnoticed = []
    for bit in range(8 * len(TINY_BYTES)):
        byte, mask = bit // 8, 1 << bit % 8
        source.data[byte] ^= mask
        try:
            if byte < 2 * PAGE_BYTES:
                ChunkReader(source)
            else:
                opened.layer(0)
            unnoticed.append(bit)
        except DamagedChunk:
            pass
        source.data[byte] ^= mask
    assert unnoticed == []
    assert_same(ChunkReader(source).chunk(), TINY)


def test_every_truncation_is_noticed_at_opening() -> None:
    data = to_bytes(some_chunk(200, BitPlan.uniform(3, 8, 16), heads=2), KEY)
    assert len(data) > 10 * PAGE_BYTES
    for length in [0, 1, 50, 91, 92, 100, *range(PAGE_BYTES, len(data), PAGE_BYTES), len(data) - 1]:
        with pytest.raises(DamagedChunk):
            ChunkReader(Memory(data[:length]))
    with pytest.raises(DamagedChunk, match="instead of"):
        ChunkReader(Memory(data + b"\0"))


def test_a_file_cut_while_open_is_noticed() -> None:
    source = Memory(TINY_BYTES)
    reader = ChunkReader(source)
    del source.data[2 * PAGE_BYTES + 10 :]
    with pytest.raises(DamagedChunk, match=f"ends at byte {2 * PAGE_BYTES + 10}"):
        reader.layer(0)


def test_other_versions_are_refused_by_number() -> None:
    source = Memory(TINY_BYTES)
    source.data[8] = 7
    with pytest.raises(DamagedChunk, match=r"format version 7.*reads version 1") as refusal:
        ChunkReader(source)
    assert refusal.value.hint


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
