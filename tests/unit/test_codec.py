"""Whole chunks through the codec and into place: exact sinks, odd shapes, fast placing equals slow."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire_engine.errors import QuireError
from quire_engine.kv import codec
from quire_engine.types import BitPlan, ChunkKV
from quire_kernels.place import PackedTensor, place_values
from quire_kernels.planes import unpack
from quire_kernels.quantize import dequantize_keys, dequantize_values
from quire_kernels.rope import Layout, angles, rotate

WIDTHS = [*range(1, 9), 16]


def some_chunk(tokens: int, layers: int = 2, heads: int = 2, key_dim: int = 8, value_dim: int = 8) -> ChunkKV:
    rng = np.random.default_rng(tokens * 1000 + key_dim)
    return ChunkKV(
        rng.standard_normal((layers, tokens, heads, key_dim)).astype(np.float16),
        rng.standard_normal((layers, tokens, heads, value_dim)).astype(np.float16),
        {"spectral": rng.random(tokens).astype(np.float32)},
    )


def encode(kv: ChunkKV, k_bits: int, v_bits: int) -> codec.PackedChunk:
    plan = BitPlan.uniform(len(kv.k_pre), k_bits, v_bits)
    return codec.encode(kv, plan, codec.text_order(kv.tokens))


def place(packed: codec.PackedChunk, start: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """All layers at positions start, start + 1, ..., as [layers, tokens, channels]."""
    tokens, layers = len(packed.order), len(packed.layers)
    cos, sin = angles(np.arange(start, start + tokens), packed.key_dim, 10000.0)
    k = np.full((layers, tokens, packed.kv_heads * packed.key_dim), np.nan, np.float16)
    v = np.full((layers, tokens, packed.kv_heads * packed.value_dim), np.nan, np.float16)
    for i, layer in enumerate(packed.layers):
        codec.place_layer(layer, cos, sin, layout, k[i], v[i])
    return k, v


def steps_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many float16 numbers lie between a and b."""

    def ordinal(x: np.ndarray) -> np.ndarray:
        bits = x.view(np.int16).astype(np.int32)
        return np.asarray(np.where(bits < 0, -(bits & 0x7FFF), bits))

    return np.asarray(abs(ordinal(a) - ordinal(b)))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 150),
    heads=st.integers(1, 3),
    key_dim=st.sampled_from([2, 8, 10, 64]),
    value_dim=st.sampled_from([1, 8, 33, 64]),
    k_bits=st.sampled_from(WIDTHS),
    v_bits=st.sampled_from(WIDTHS),
    layout=st.sampled_from(get_args(Layout)),
)
def test_any_shape_comes_back_and_is_placed(
    tokens: int, heads: int, key_dim: int, value_dim: int, k_bits: int, v_bits: int, layout: Layout
) -> None:
    kv = some_chunk(tokens, 1, heads, key_dim, value_dim)
    packed = encode(kv, k_bits, v_bits)
    back = codec.decode(packed)
    for name, bits in (("k_pre", k_bits), ("v", v_bits)):
        before, after = getattr(kv, name), getattr(back, name)
        assert before.shape == after.shape
        spread = float(np.ptp(before.astype(np.float32)))
        limit = 0.0 if bits == 16 else 1.15 * spread / 2**bits / 2 + spread / 100
        assert abs(after.astype(np.float32) - before).max() <= limit
        np.testing.assert_array_equal(after[:, : codec.SINKS], before[:, : codec.SINKS])
    k, v = place(packed, 1234, layout)
    cos, sin = angles(np.arange(1234, 1234 + tokens), key_dim, 10000.0)
    expected = rotate(back.k_pre[0], cos, sin, layout).reshape(tokens, -1)
    np.testing.assert_allclose(k[0], expected, atol=4e-3)
    np.testing.assert_allclose(v[0], back.v[0].reshape(tokens, -1), atol=4e-3)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_fast_placing_is_the_slow_way_but_for_ties(layout: Layout) -> None:
    """Larger than a tile, so that tiles meet; a different rounding of ties is all that may differ."""
    kv = some_chunk(700, 1, 4, 64, 64)
    packed = encode(kv, 4, 3)
    layer = packed.layers[0]
    k, v = place(packed, 5000, layout)
    cos, sin = angles(np.arange(5000, 5700), 64, 10000.0)
    assert isinstance(layer.k, PackedTensor)
    assert isinstance(layer.v, PackedTensor)
    k_pre = dequantize_keys(unpack(layer.k.planes, 696 * 256).reshape(696, 256), layer.k.grid, 4, 4)
    k_slow = rotate(k_pre.reshape(696, 4, 64), cos[4:], sin[4:], layout).astype(np.float16)
    v_codes = unpack(layer.v.planes, 696 * 256).reshape(696, 256)
    v_slow = dequantize_values(v_codes, layer.v.grid, 3, 3).astype(np.float16)
    for fast, slow in ((k[0, 4:], k_slow.reshape(696, 256)), (v[0, 4:], v_slow)):
        assert steps_between(fast, slow).max() <= 1
        assert (fast != slow).mean() < 0.01


def test_every_float16_survives_placing_at_position_zero() -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = numbers[np.isfinite(numbers)].reshape(1, -1, 1, 8)
    for start in range(0, finite.shape[1], 2000):
        rows = finite[:, start : start + 2000]
        packed = encode(ChunkKV(rows, rows, {}), 16, 16)
        cos, sin = np.ones((rows.shape[1], 4), np.float32), np.zeros((rows.shape[1], 4), np.float32)
        k, v = np.empty((2, rows.shape[1], 8), np.float16)
        codec.place_layer(packed.layers[0], cos, sin, "adjacent", k, v)
        np.testing.assert_array_equal(k, rows[0, :, 0])
        np.testing.assert_array_equal(v, rows[0, :, 0])


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_numbers_beyond_float16_are_limited_not_infinite(bits: int) -> None:
    """Rotation lengthens channels, and the middle of a cell may lie beyond the numbers in it."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-65504, 65504, (1, 80, 1, 1))
    rows = (65504 - (65504 - low) * rng.choice([0.0, 0.01, 1.0], (1, 80, 1, 8))).astype(np.float16)
    packed = encode(ChunkKV(rows, rows, {}), bits, bits)
    k, v = place(packed, 777, "halves")
    assert np.isfinite(k).all()
    assert np.isfinite(v).all()
    assert abs(k.astype(np.float32)).max() == 65504  # a pair turned towards one channel does not fit


def test_fewer_planes_cost_precision_only() -> None:
    kv = some_chunk(100, 1, 1, 64, 64)
    whole = encode(kv, 6, 6).layers[0].v
    assert isinstance(whole, PackedTensor)
    errors = []
    for planes in range(1, 7):
        top = PackedTensor(whole.planes[:planes], whole.bits, whole.rows, whole.channels, whole.grid)
        out = np.empty((96, 64), np.float16)
        place_values(top, out)
        errors.append(float(np.std(out.astype(np.float32) - kv.v[0, 4:, 0])))
    ratios = np.array(errors[:-1]) / errors[1:]
    assert (ratios > 1.5).all()
    assert errors[-1] < 0.03


def test_rows_by_score_are_placed_in_text_order() -> None:
    kv = some_chunk(90)
    order = codec.score_order(kv.scores["spectral"])
    assert order[:4].tolist() == [0, 1, 2, 3]
    assert (np.diff(kv.scores["spectral"][order[4:]]) <= 0).all()
    packed = codec.encode(kv, BitPlan.uniform(2, 16, 16), order)
    np.testing.assert_array_equal(packed.layers[0].k, kv.k_pre[0].reshape(90, -1)[order[4:]])
    for ours, straight in zip(place(packed, 50, "adjacent"), place(encode(kv, 16, 16), 50, "adjacent"), strict=True):
        np.testing.assert_array_equal(ours, straight)
    back = codec.decode(packed)
    np.testing.assert_array_equal(back.k_pre, kv.k_pre)
    np.testing.assert_array_equal(back.v, kv.v)


def test_widths_may_differ_by_layer_and_kind() -> None:
    kv = some_chunk(40, layers=3)
    packed = codec.encode(kv, BitPlan((8, 16, 2), (1, 3, 16)), codec.text_order(40))
    kinds = [layer.k.bits if isinstance(layer.k, PackedTensor) else 16 for layer in packed.layers]
    assert kinds == [8, 16, 2]
    np.testing.assert_array_equal(codec.decode(packed).k_pre[1], kv.k_pre[1])
    np.testing.assert_array_equal(codec.decode(packed).v[2], kv.v[2])


def test_an_outlying_first_token_does_not_coarsen_the_others() -> None:
    kv = some_chunk(64)
    calm = codec.decode(encode(kv, 3, 3))
    kv.k_pre[:, 0] *= 1000
    kv.v[:, 2] *= 1000
    wild = codec.decode(encode(kv, 3, 3))
    np.testing.assert_array_equal(wild.k_pre[:, 4:], calm.k_pre[:, 4:])
    np.testing.assert_array_equal(wild.v[:, 4:], calm.v[:, 4:])


def test_placing_writes_into_views_of_a_larger_cache() -> None:
    kv = some_chunk(20, 1)
    packed = encode(kv, 4, 4)
    cos, sin = angles(np.arange(20), 8, 10000.0)
    cache_k, cache_vt = np.zeros((64, 32), np.float16), np.zeros((16, 64), np.float16)  # values transposed
    codec.place_layer(packed.layers[0], cos, sin, "adjacent", cache_k[30:50, 8:24], cache_vt[:, 30:50].T)
    k, v = place(packed, 0, "adjacent")
    np.testing.assert_array_equal(cache_k[30:50, 8:24], k[0])
    np.testing.assert_array_equal(cache_vt[:, 30:50].T, v[0])
    assert not cache_k[:30].any()
    assert not cache_k[:, 24:].any()
    assert not cache_vt[:, 50:].any()


def test_numbers_that_are_none_are_refused() -> None:
    kv = some_chunk(10)
    kv.v[1, 7, 0, 3] = np.inf
    with pytest.raises(QuireError, match="not numbers"):
        encode(kv, 4, 4)


def test_arguments_that_do_not_fit_are_refused() -> None:
    kv, order = some_chunk(10), codec.text_order(10)
    short = ChunkKV(kv.k_pre, kv.v, {"short": np.ones(9, np.float32)})
    with pytest.raises(ValueError, match="3/3 layers cannot pack 2"):
        codec.encode(kv, BitPlan.uniform(3, 4, 4), order)
    with pytest.raises(ValueError, match=r"not \[9, 12\]"):
        codec.encode(kv, BitPlan((9, 4), (4, 12)), order)
    with pytest.raises(ValueError, match="every token once"):
        codec.encode(kv, BitPlan.uniform(2, 4, 4), order[::-1].copy())
    with pytest.raises(ValueError, match="every token once"):
        codec.encode(kv, BitPlan.uniform(2, 4, 4), order[:9])
    with pytest.raises(ValueError, match="'short'"):
        codec.encode(short, BitPlan.uniform(2, 4, 4), order)
