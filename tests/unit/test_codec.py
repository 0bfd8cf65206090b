"""Whole chunks through the codec and into place: exact sinks, odd shapes, fast placing equals slow."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, cast, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire_engine.errors import QuireError
from quire_engine.kv import codec
from quire_engine.types import BitPlan, ChunkKV, GridName
from quire_kernels.place import PackedTensor, Tensor, dequantize, place_values
from quire_kernels.rope import Layout, angles, rotate

WIDTHS = [*range(1, 9), 16]


def some_chunk(tokens: int, layers: int = 2, heads: int = 2, key_dim: int = 8, value_dim: int = 8) -> ChunkKV:
    rng = np.random.default_rng(tokens * 1000 + key_dim)
    return ChunkKV(
        rng.standard_normal((layers, tokens, heads, key_dim)).astype(np.float16),
        rng.standard_normal((layers, tokens, heads, value_dim)).astype(np.float16),
        {"spectral": rng.random(tokens).astype(np.float32)},
    )


def encode(kv: ChunkKV, k_bits: int, v_bits: int, grid: GridName = "midrise", sinks: int = 4) -> codec.PackedChunk:
    plan = replace(BitPlan.uniform(len(kv.k_pre), k_bits, v_bits), grid=grid, sinks=sinks)
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
    grid=st.sampled_from(get_args(GridName)),
    sinks=st.sampled_from([0, 1, 4, 63, 255]),
    layout=st.sampled_from(get_args(Layout)),
)
def test_any_shape_comes_back_and_is_placed(
    tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    k_bits: int,
    v_bits: int,
    grid: GridName,
    sinks: int,
    layout: Layout,
) -> None:
    kv = some_chunk(tokens, 1, heads, key_dim, value_dim)
    packed = encode(kv, k_bits, v_bits, grid, sinks)
    back = codec.decode(packed)
    for name, bits in (("k_pre", k_bits), ("v", v_bits)):
        before, after = getattr(kv, name), getattr(back, name)
        assert before.shape == after.shape
        spread = float(np.ptp(before.astype(np.float32)))
        cells = 2**bits - (grid == "minmax")
        limit = 0.0 if bits == 16 else 1.15 * spread / cells / 2 + spread / 100
        assert abs(after.astype(np.float32) - before).max() <= limit
        np.testing.assert_array_equal(after[:, :sinks], before[:, :sinks])
    k, v = place(packed, 1234, layout)
    cos, sin = angles(np.arange(1234, 1234 + tokens), key_dim, 10000.0)
    expected = rotate(back.k_pre[0], cos, sin, layout).reshape(tokens, -1)
    np.testing.assert_allclose(k[0], expected, atol=4e-3)
    np.testing.assert_allclose(v[0], back.v[0].reshape(tokens, -1), atol=4e-3)


@pytest.mark.parametrize("grid", get_args(GridName))
@pytest.mark.parametrize("layout", get_args(Layout))
def test_fast_placing_is_the_slow_way_but_for_ties(layout: Layout, grid: GridName) -> None:
    """Larger than a tile, so that tiles meet; a different rounding of ties is all that may differ."""
    kv = some_chunk(700, 1, 4, 64, 64)
    packed = encode(kv, 4, 3, grid)
    layer = packed.layers[0]
    k, v = place(packed, 5000, layout)
    cos, sin = angles(np.arange(5000, 5700), 64, 10000.0)
    assert isinstance(layer.k, PackedTensor)
    assert isinstance(layer.v, PackedTensor)
    k_slow = rotate(dequantize(layer.k).reshape(696, 4, 64), cos[4:], sin[4:], layout).astype(np.float16)
    v_slow = dequantize(layer.v).astype(np.float16)
    for fast, slow in ((k[0, 4:], k_slow.reshape(696, 256)), (v[0, 4:], v_slow)):
        assert steps_between(fast, slow).max() <= 1
        # The points of a min/max grid are sums of float16 numbers, among which ties are common.
        assert (fast != slow).mean() < (0.01 if grid == "midrise" else 0.05)


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


@pytest.mark.parametrize("grid", get_args(GridName))
@pytest.mark.parametrize("bits", [1, 3, 16])
def test_numbers_beyond_float16_are_limited_not_infinite(bits: int, grid: GridName) -> None:
    """Rotation lengthens channels, and the middle of a cell may lie beyond the numbers in it."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-65504, 65504, (1, 80, 1, 1))
    rows = (65504 - (65504 - low) * rng.choice([0.0, 0.01, 1.0], (1, 80, 1, 8))).astype(np.float16)
    packed = encode(ChunkKV(rows, rows, {}), bits, bits, grid)
    k, v = place(packed, 777, "halves")
    assert np.isfinite(k).all()
    assert np.isfinite(v).all()
    assert abs(k.astype(np.float32)).max() == 65504  # a pair turned towards one channel does not fit


@pytest.mark.parametrize("grid", get_args(GridName))
def test_fewer_planes_cost_precision_only(grid: GridName) -> None:
    kv = some_chunk(100, 1, 1, 64, 64)
    whole = encode(kv, 6, 6, grid).layers[0].v
    assert isinstance(whole, PackedTensor)
    errors = []
    for planes in range(1, 7):
        top = replace(whole, planes=whole.planes[:planes])
        out = np.empty((96, 64), np.float16)
        place_values(top, out)
        errors.append(float(np.std(out.astype(np.float32) - kv.v[0, 4:, 0])))
    ratios = np.array(errors[:-1]) / errors[1:]
    assert (ratios > 1.5).all()
    assert errors[-1] < 0.03


def test_rows_by_score_are_placed_in_text_order() -> None:
    kv = some_chunk(90)
    order = codec.score_order(kv.scores["spectral"], 4)
    assert order[:4].tolist() == [0, 1, 2, 3]
    assert (np.diff(kv.scores["spectral"][order[4:]]) <= 0).all()
    packed = codec.encode(kv, BitPlan.exact(2), order)
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


def random_widths(channels: int, seed: int) -> bytes:
    """Any widths, of which one at least is not 0."""
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, rng.integers(2, 10), channels, dtype=np.uint8)
    widths[rng.integers(channels)] = max(1, widths.max())
    return bytes(widths)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 150),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 10, 64]),
    v_bits=st.sampled_from(WIDTHS),
    sinks=st.sampled_from([0, 4, 63, 255]),
    layout=st.sampled_from(get_args(Layout)),
    by_score=st.booleans(),
    top=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_key_channels_of_their_own_widths_and_values_by_channel(
    tokens: int, heads: int, dim: int, v_bits: int, sinks: int, layout: Layout, by_score: bool, top: int, seed: int
) -> None:
    """The first layer has both, the second neither."""
    widths = random_widths(heads * dim, seed)
    kv = some_chunk(tokens, 2, heads, dim, dim)
    plan = BitPlan((max(widths), 4), (v_bits, v_bits), "midrise", sinks, (widths, b""), (0,))
    order = codec.score_order(kv.scores["spectral"], sinks) if by_score else codec.text_order(tokens)
    packed = codec.encode(kv, plan, order)
    back = codec.decode(packed)
    for name, bits in (("k_pre", np.frombuffer(widths, np.uint8)), ("v", np.full(heads * dim, v_bits))):
        before, after = (getattr(a, name)[0].reshape(tokens, -1).astype(np.float32) for a in (kv, back))
        np.testing.assert_array_equal(after[:sinks], before[:sinks])
        spread = np.ptp(before[sinks:], axis=0) if sinks < tokens else 0
        # Steps and centres are rounded: that may widen a cell by an eighth and then some.
        limit = np.where(bits == 16, 0, 1.15 * spread / 2.0**bits / 2 + spread / 100 + 2e-3)
        assert (abs(after - before) <= limit).all()
    plain = codec.encode(kv, replace(plan, k_widths=(), v_by_channel=()), order)
    np.testing.assert_array_equal(back.k_pre[1], codec.decode(plain).k_pre[1])
    np.testing.assert_array_equal(back.v[1], codec.decode(plain).v[1])
    packed = replace(packed, layers=tuple(with_top_planes(layer, top) for layer in packed.layers))
    back = codec.decode(packed)
    cos, sin = angles(np.arange(777, 777 + tokens), dim, 10000.0)
    for layer, k, v in zip(range(2), *place(packed, 777, layout), strict=True):
        expected = rotate(back.k_pre[layer], cos, sin, layout).reshape(tokens, -1)
        np.testing.assert_allclose(k, expected, atol=8e-3)
        np.testing.assert_allclose(v, back.v[layer].reshape(tokens, -1), atol=8e-3)


def with_top_planes(layer: codec.PackedLayer, top: int) -> codec.PackedLayer:
    def cut(tensor: Tensor) -> Tensor:
        return replace(tensor, planes=tensor.planes[:top]) if isinstance(tensor, PackedTensor) else tensor

    return replace(layer, k=cut(layer.k), v=cut(layer.v))


def test_tiles_of_mixed_widths_meet() -> None:
    """More rows than a tile holds, and not a multiple of 8; what is left of each channel has its own precision."""
    kv = some_chunk(1000, 1, 4, 64, 64)
    widths = random_widths(256, 5)
    packed = codec.encode(
        kv, BitPlan((max(widths),), (3,), k_widths=(widths,), v_by_channel=(0,)), codec.text_order(1000)
    )
    back = codec.decode(packed)
    k, v = place(packed, 0, "halves")
    cos, sin = angles(np.arange(1000), 64, 10000.0)
    np.testing.assert_allclose(k[0], rotate(back.k_pre[0], cos, sin, "halves").reshape(1000, -1), atol=4e-3)
    np.testing.assert_allclose(v[0], back.v[0].reshape(1000, -1), atol=4e-3)
    errors = np.std((back.k_pre[0] - kv.k_pre[0]).reshape(1000, -1)[4:].astype(np.float32), axis=0)
    of_width = [errors[np.frombuffer(widths, np.uint8) == width].mean() for width in range(max(widths) + 1)]
    assert all(1.2 < worse / better < 2.2 for worse, better in pairwise(of_width))


def test_a_channel_without_bits_becomes_the_middle_of_its_group() -> None:
    kv = some_chunk(200, 1, 1, 8, 8)
    packed = codec.encode(
        kv, BitPlan((3,), (3,), "midrise", 0, (bytes([3, 0, 3, 3, 3, 3, 0, 3]),)), codec.text_order(200)
    )
    left = codec.decode(packed).k_pre[0, :, 0]
    for start in range(0, 200, 64):
        for channel in (1, 6):
            group = kv.k_pre[0, start : start + 64, 0, channel].astype(np.float32)
            found = left[start : start + 64, channel]
            assert len(np.unique(found)) == 1
            assert found[0] == pytest.approx((group.min() + group.max()) / 2, abs=0.02)


def test_an_outlying_first_token_does_not_coarsen_the_others() -> None:
    kv = some_chunk(64)
    calm = codec.decode(encode(kv, 3, 3))
    kv.k_pre[:, 0] *= 1000
    kv.v[:, 2] *= 1000
    wild = codec.decode(encode(kv, 3, 3))
    np.testing.assert_array_equal(wild.k_pre[:, 4:], calm.k_pre[:, 4:])
    np.testing.assert_array_equal(wild.v[:, 4:], calm.v[:, 4:])


@pytest.mark.parametrize(("sinks", "exact"), [(0, 0), (1, 1), (5, 5), (255, 7)])
def test_as_many_tokens_as_the_plan_says_stay_exact(sinks: int, exact: int) -> None:
    kv = some_chunk(7)
    packed = encode(kv, 1, 1, sinks=sinks)
    assert [len(layer.k_sinks) for layer in packed.layers] == [exact, exact]
    same = (codec.decode(packed).k_pre == kv.k_pre).all(axis=(0, 2, 3))
    assert same.tolist() == [True] * exact + [False] * (7 - exact)


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
    with pytest.raises(ValueError, match="0 to 255 sinks"):
        encode(kv, 4, 4, sinks=256)
    with pytest.raises(ValueError, match="0 to 255 sinks"):
        encode(kv, 4, 4, sinks=-1)
    with pytest.raises(ValueError, match="one of the grids"):
        encode(kv, 4, 4, grid=cast(GridName, "ternary"))
    with pytest.raises(ValueError, match="every token once"):
        codec.encode(kv, BitPlan.uniform(2, 4, 4), order[::-1].copy())
    with pytest.raises(ValueError, match="every token once"):
        codec.encode(kv, BitPlan.uniform(2, 4, 4), order[:9])
    with pytest.raises(ValueError, match="'short'"):
        codec.encode(short, BitPlan.uniform(2, 4, 4), order)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"grid": "minmax"}, "mid-rise grid only"),
        ({"k_widths": (bytes(15) + b"\4",)}, "for every layer"),
        ({"k_widths": (bytes(14) + b"\4", b"")}, "each of 16 key channels"),
        ({"k_widths": (bytes(15) + b"\3", b"")}, "one has 4"),
        ({"k_widths": (bytes(15) + b"\5", b"")}, "one has 4"),
        ({"k_widths": (bytes(16), b"")}, "one has 4"),
        ({"k_widths": (bytes(15) + b"\x10", b""), "k_bits": (16, 4)}, "0 to 8 bits"),
        ({"k_widths": (bytes(15) + b"\x09", b""), "k_bits": (9, 4)}, r"not \[9\]"),
        ({"k_widths": (b"", b"")}, "no k_widths at all"),
        ({"v_by_channel": (2,)}, "layers 0 to 1"),
        ({"v_by_channel": (-1,)}, "layers 0 to 1"),
        ({"v_by_channel": (1, 0)}, "in order"),
        ({"v_by_channel": (1, 1)}, "in order"),
    ],
)
def test_widths_and_layers_that_do_not_fit_are_refused(changes: dict[str, Any], refusal: str) -> None:
    kv, order = some_chunk(10), codec.text_order(10)
    fitting = BitPlan((4, 4), (3, 3), k_widths=(bytes(15) + b"\4", b""), v_by_channel=(0, 1))
    codec.encode(kv, fitting, order)
    with pytest.raises(ValueError, match=refusal):
        codec.encode(kv, replace(fitting, **changes), order)
