"""The quantiser: error of at most half a cell on either grid, and its edges."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_kernels import grids
from quire_kernels import quantize as q
from quire_kernels.grids import GRIDS, Grid, MidRise, MinMax, UInt8
from quire_kernels.place import PackedTensor, dequantize
from quire_kernels.planes import pack

Codec = tuple[
    Callable[..., tuple[UInt8, Grid]], Callable[..., grids.Float32], Callable[[grids.Float32, int, int], grids.Float32]
]


def _dequantize(codes: UInt8, grid: Grid, bits: int, planes: int, by_channel: bool) -> grids.Float32:
    """What the top planes of bits-bit codes stand for."""
    planes_read = tuple(pack(codes.ravel(), bits)[:planes])
    return dequantize(PackedTensor(planes_read, bits, len(codes), codes.shape[1], grid, by_channel))


dequantize_keys, dequantize_values = partial(_dequantize, by_channel=True), partial(_dequantize, by_channel=False)
KEYS: Codec = (q.quantize_keys, dequantize_keys, q.spread_over_tokens)
VALUES: Codec = (q.quantize_values, dequantize_values, q.spread_over_channels)
BOTH = pytest.mark.parametrize("codec", [KEYS, VALUES], ids=["keys", "values"])
KINDS = pytest.mark.parametrize("kind", GRIDS.values(), ids=GRIDS.keys())


@BOTH
@KINDS
@given(
    tokens=st.integers(1, 140),
    channels=st.integers(1, 140),
    bits=st.integers(1, 8),
    seed=st.integers(0, 999),
    exponent=st.integers(-12, 6),
)
def test_error_is_at_most_half_a_cell(
    codec: Codec, kind: type[Grid], tokens: int, channels: int, bits: int, seed: int, exponent: int
) -> None:
    quantize, dequantize, spread = codec
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, channels)) * 10.0 ** rng.uniform(-1, 1, channels) * 2.0**exponent).astype(
        np.float16
    )
    codes, grid = quantize(x, bits, kind)
    assert codes.max() < 2**bits
    for planes in range(1, bits + 1):
        error = abs(dequantize(codes, grid, bits, planes) - x)
        step, _ = grid.affine(bits, planes)
        half_cell = spread(step, tokens if codec is KEYS else channels, kind.GROUP) / 2
        assert (error <= half_cell * 1.0001 + abs(x.astype(np.float32)) * 1e-6).all()


@BOTH
@KINDS
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_equal_numbers_come_back_as_they_were(codec: Codec, kind: type[Grid], bits: int) -> None:
    quantize, dequantize, _ = codec
    for number in (0.0, 1.5, -65504.0, 6e-8):
        x = np.full((70, 24), number, np.float16)
        codes, grid = quantize(x, bits, kind)
        for planes in range(1, bits + 1):
            decoded = dequantize(codes, grid, bits, planes)
            np.testing.assert_array_equal(decoded, x.astype(np.float32))


@given(tokens=st.integers(1, 140), channels=st.integers(1, 40), seed=st.integers(0, 999), data=st.data())
def test_channels_of_their_own_widths_err_by_half_a_cell_of_their_own(
    tokens: int, channels: int, seed: int, data: st.DataObject
) -> None:
    widths = np.array(data.draw(st.lists(st.integers(0, 8), min_size=channels, max_size=channels)))
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, channels)) * 10.0 ** rng.uniform(-1, 1, channels)).astype(np.float16)
    codes, grid = q.quantize_keys(x, widths)
    assert (codes < 2**widths).all()
    starts = np.arange(0, tokens, grid.GROUP)
    half_range = (np.maximum.reduceat(x, starts) - np.minimum.reduceat(x, starts).astype(np.float32)) * np.float32(0.5)
    for top in range(1, 9):
        read = np.minimum(widths, top)
        step, first = (q.spread_over_tokens(a, tokens, grid.GROUP) for a in grid.affine(widths, read))
        error = abs((codes >> (widths - read)) * step + first - x)
        # A centre is off by half of 1/127 of its channel's range of centres.
        limit = np.where(
            read > 0, step / 2, q.spread_over_tokens(half_range, tokens, grid.GROUP) + np.ptp(x, axis=0) / 250
        )
        assert (error <= limit * 1.0001 + abs(x.astype(np.float32)) * 2e-3 * (read == 0) + 1e-6).all()


def test_a_channel_without_bits_does_not_coarsen_the_steps_of_others() -> None:
    """One-byte steps reach 1 : 200,000, the last octaves of it coarsely."""
    x = np.random.default_rng(3).standard_normal((64, 2)).astype(np.float16)
    alone, beside = (q.quantize_keys(a, np.array([0, 8]))[1].points(np.array([0, 8])) for a in (x, x * [1000, 1]))
    np.testing.assert_array_equal(alone[0][:, 1], beside[0][:, 1])
    assert beside[0][0, 0] == 0


def test_an_idle_channel_next_to_busy_ones_is_nearly_exact() -> None:
    x = np.random.default_rng(7).standard_normal((512, 128)).astype(np.float16)
    x[:, 3] = -7.25
    x[64:128, 4] = 2.5  # idle in one group only: its centre is a multiple of the channel's unit
    codes, grid = q.quantize_keys(x, 4)
    assert isinstance(grid, MidRise)
    decoded = dequantize_keys(codes, grid, 4, 4)
    np.testing.assert_array_equal(decoded[:, 3], np.float32(-7.25))
    np.testing.assert_allclose(decoded[64:128, 4], 2.5, atol=float(grid.unit[4]) / 16)


@BOTH
@KINDS
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_ends_of_float16_give_no_infinities(codec: Codec, kind: type[Grid], bits: int) -> None:
    quantize, dequantize, _ = codec
    x = np.random.default_rng(0).choice(np.array([-65504, 65504, 0, 6e-8, -6e-8], np.float16), (100, 40))
    with np.errstate(all="raise", under="ignore"):
        codes, grid = quantize(x, bits, kind)
        decoded = dequantize(codes, grid, bits, bits)
    assert np.isfinite(decoded).all()
    points = 2**bits if kind is MidRise else 2**bits - 1
    assert abs(decoded - x.astype(np.float32)).max() <= 65504 / points * 1.15


@BOTH
@KINDS
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_smallest_numbers_of_float16_keep_their_differences(codec: Codec, kind: type[Grid], bits: int) -> None:
    quantize, dequantize, _ = codec
    x = (np.random.default_rng(1).integers(-20, 21, (70, 40)) * 2.0**-24).astype(np.float16)
    codes, grid = quantize(x, bits, kind)
    step, _ = grid.points(bits)
    assert step.min() > 0
    assert abs(dequantize(codes, grid, bits, bits) - x).max() <= step.max() / 2
    assert bits > 1 or len(np.unique(codes)) == 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_min_max_points_are_the_extremes_of_their_group(bits: int) -> None:
    """Exactly so where the step is a float16 number, else the maximum is within the rounding of the steps."""
    ramp = (np.arange(2**bits) * 0.25 - 7).astype(np.float16)
    x = np.resize(ramp, (32, 1)) if bits < 6 else np.array([ramp[0], ramp[-1]] * 16).reshape(32, 1)
    codes, grid = q.quantize_keys(x, bits, MinMax)
    assert isinstance(grid, MinMax)
    assert (grid.steps.item(), grid.minima.item()) == (0.25, -7)
    np.testing.assert_array_equal(dequantize_keys(codes, grid, bits, bits), x.astype(np.float32))
    awkward = np.array([[-0.1], [1 / 3], [0.2]], np.float16)
    codes, grid = q.quantize_keys(awkward, bits, MinMax)
    decoded = dequantize_keys(codes, grid, bits, bits)
    assert decoded[0] == awkward[0]
    assert decoded[1] == pytest.approx(float(awkward[1, 0]), rel=2**-10)


def test_groups_are_64_or_32_numbers_of_one_channel_or_one_token() -> None:
    x = np.random.default_rng(0).standard_normal((130, 72)).astype(np.float16)
    assert [q.quantize_keys(x, 4, kind)[1].points(4)[0].shape for kind in (MidRise, MinMax)] == [(3, 72), (5, 72)]
    assert [q.quantize_values(x, 4, kind)[1].points(4)[0].shape for kind in (MidRise, MinMax)] == [(130, 2), (130, 3)]
    changed = x.copy()
    changed[70, 5] *= 100
    before, after = (dequantize_keys(*q.quantize_keys(a, 4, MinMax), 4, 4) for a in (x, changed))
    assert {(row // 32, channel) for row, channel in np.argwhere(before != after)} == {(2, 5)}
    before, after = (dequantize_values(*q.quantize_values(a, 4, MinMax), 4, 4) for a in (x, changed))
    assert {(row, channel // 32) for row, channel in np.argwhere(before != after)} == {(70, 0)}


def test_e4m3_has_the_values_of_its_specification() -> None:
    codes = np.array([0x00, 0x01, 0x07, 0x08, 0x38, 0x39, 0x7E, 0xB8, 0xFE], np.uint8)
    assert grids.e4m3_decode(codes).tolist() == [0, 2**-9, 7 * 2**-9, 2**-6, 1, 1.125, 448, -1, -448]
    assert np.flatnonzero(np.isnan(grids.E4M3)).tolist() == [0x7F, 0xFF]


def test_e4m3_encodes_its_own_values_exactly() -> None:
    codes = np.arange(127, dtype=np.uint8)
    np.testing.assert_array_equal(grids.e4m3_encode_up(grids.e4m3_decode(codes)), codes)


@given(st.floats(0, 448, width=32))
def test_e4m3_rounds_up_to_the_next_value(x: float) -> None:
    code = int(grids.e4m3_encode_up(np.array([x], np.float32))[0])
    assert grids.E4M3[code] >= x
    assert code == 0 or grids.E4M3[code - 1] < x
