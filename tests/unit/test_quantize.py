"""The quantiser: error of at most half a cell, the distortion of the design's table, and its edges."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_kernels import quantize as q

Codec = tuple[Callable[..., tuple[np.ndarray, q.Grid]], Callable[..., np.ndarray], Callable[..., np.ndarray]]
KEYS: Codec = (q.quantize_keys, q.dequantize_keys, q.spread_over_tokens)
VALUES: Codec = (q.quantize_values, q.dequantize_values, q.spread_over_channels)
BOTH = pytest.mark.parametrize("codec", [KEYS, VALUES], ids=["keys", "values"])


def synthetic_keys(seed: int, tokens: int = 512, channels: int = 128) -> np.ndarray:
    """The generator of the design's error table: 4 of 128 channels carry 73 % of the energy, tokens AR(1).

    The table does not give its AR coefficient; .4 reproduces its min/max rows, which the next test checks.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((tokens, channels))
    rows = [noise[0]]
    for fresh in noise[1:]:
        rows.append(0.4 * rows[-1] + np.sqrt(1 - 0.4**2) * fresh)
    energy = np.full(channels, 0.27 / (channels - 4))
    energy[rng.permutation(channels)[:4]] = 0.73 / 4
    deviation = np.sqrt(energy)
    x = np.stack(rows) * deviation + 2 * deviation * rng.standard_normal(channels)
    return np.asarray(x, np.float16)


def top(codes: np.ndarray, bits: int, planes: int) -> q.UInt8:
    """The top planes of bits-bit codes."""
    return np.asarray(codes >> (bits - planes), np.uint8)


def relative_error(decoded: np.ndarray, x: np.ndarray) -> float:
    """Noise over channel-centred energy, as a ratio of L2 norms."""
    x = x.astype(np.float64)
    return float(np.linalg.norm(decoded - x) / np.linalg.norm(x - x.mean(0)))


def min_max(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Round-to-endpoint min/max with exact metadata, the table's baseline."""
    blocks = x.astype(np.float64).reshape(-1, group, x.shape[1])
    low = blocks.min(1, keepdims=True)
    step = (blocks.max(1, keepdims=True) - low) / (2**bits - 1)
    return np.asarray(low + np.rint((blocks - low) / step) * step).reshape(x.shape)


@pytest.mark.parametrize(("bits", "group", "table"), [(2, 32, 0.382), (4, 32, 0.076), (2, 64, 0.443), (3, 64, 0.189)])
def test_the_generator_is_that_of_the_table(bits: int, group: int, table: float) -> None:
    error = np.mean([relative_error(min_max(x, bits, group), x) for x in map(synthetic_keys, range(3))])
    assert error == pytest.approx(table, rel=0.03)


@pytest.mark.parametrize(("planes", "table"), [(2, 0.345), (3, 0.173), (4, 0.087)])
def test_key_distortion_is_that_of_the_table(planes: int, table: float) -> None:
    """Top planes of 4-bit codes; one-byte metadata may cost the table's 3 %, and a little for chance."""
    errors = []
    for x in map(synthetic_keys, range(3)):
        codes, grid = q.quantize_keys(x, 4)
        errors.append(relative_error(q.dequantize_keys(top(codes, 4, planes), grid, 4, planes), x))
    assert np.mean(errors) == pytest.approx(table, rel=0.04)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_bit_halves_the_error(bits: int) -> None:
    x = synthetic_keys(5)
    codes, grid = q.quantize_keys(x, bits)
    error = relative_error(q.dequantize_keys(codes, grid, bits, bits), x)
    assert error == pytest.approx(0.71 if bits == 1 else 1.41 / 2**bits, rel=0.06)


@pytest.mark.parametrize("bits", [2, 3])
def test_top_planes_are_as_good_as_native_codes(bits: int) -> None:
    x = synthetic_keys(6)
    wide, native = q.quantize_keys(x, 4), q.quantize_keys(x, bits)
    cut = relative_error(q.dequantize_keys(top(wide[0], 4, bits), wide[1], 4, bits), x)
    assert cut == pytest.approx(relative_error(q.dequantize_keys(*native, bits, bits), x), rel=0.02)


@BOTH
@given(
    tokens=st.integers(1, 140),
    channels=st.integers(1, 140),
    bits=st.integers(1, 8),
    seed=st.integers(0, 999),
    exponent=st.integers(-12, 6),
)
def test_error_is_at_most_half_a_cell(
    codec: Codec, tokens: int, channels: int, bits: int, seed: int, exponent: int
) -> None:
    quantize, dequantize, spread = codec
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, channels)) * 10.0 ** rng.uniform(-1, 1, channels) * 2.0**exponent).astype(
        np.float16
    )
    codes, grid = quantize(x, bits)
    assert codes.max() < 2**bits
    for planes in range(1, bits + 1):
        error = abs(dequantize(top(codes, bits, planes), grid, bits, planes) - x)
        half_cell = spread(grid.steps(), tokens if codec is KEYS else channels) * 2.0 ** (bits - planes) / 2
        assert (error <= half_cell * 1.0001 + abs(x.astype(np.float32)) * 1e-6).all()


@BOTH
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_equal_numbers_come_back_as_they_were(codec: Codec, bits: int) -> None:
    quantize, dequantize, _ = codec
    for number in (0.0, 1.5, -65504.0, 6e-8):
        x = np.full((70, 24), number, np.float16)
        codes, grid = quantize(x, bits)
        np.testing.assert_array_equal(dequantize(codes, grid, bits, bits), x.astype(np.float32))


def test_an_idle_channel_next_to_busy_ones_is_nearly_exact() -> None:
    x = synthetic_keys(7)
    x[:, 3] = -7.25
    x[64:128, 4] = 2.5  # idle in one group only: its centre is a multiple of the channel's unit
    codes, grid = q.quantize_keys(x, 4)
    decoded = q.dequantize_keys(codes, grid, 4, 4)
    np.testing.assert_array_equal(decoded[:, 3], np.float32(-7.25))
    np.testing.assert_allclose(decoded[64:128, 4], 2.5, atol=float(grid.unit[4]) / 16)


@BOTH
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_ends_of_float16_give_no_infinities(codec: Codec, bits: int) -> None:
    quantize, dequantize, _ = codec
    x = np.random.default_rng(0).choice(np.array([-65504, 65504, 0, 6e-8, -6e-8], np.float16), (100, 40))
    with np.errstate(all="raise", under="ignore"):
        codes, grid = quantize(x, bits)
        decoded = dequantize(codes, grid, bits, bits)
    assert np.isfinite(decoded).all()
    assert abs(decoded - x.astype(np.float32)).max() <= 65504 / 2**bits * 1.15


def test_e4m3_has_the_values_of_its_specification() -> None:
    codes = np.array([0x00, 0x01, 0x07, 0x08, 0x38, 0x39, 0x7E, 0xB8, 0xFE], np.uint8)
    assert q.e4m3_decode(codes).tolist() == [0, 2**-9, 7 * 2**-9, 2**-6, 1, 1.125, 448, -1, -448]
    assert np.flatnonzero(np.isnan(q.E4M3)).tolist() == [0x7F, 0xFF]


def test_e4m3_encodes_its_own_values_exactly() -> None:
    codes = np.arange(127, dtype=np.uint8)
    np.testing.assert_array_equal(q.e4m3_encode_up(q.e4m3_decode(codes)), codes)


@given(st.floats(0, 448, width=32))
def test_e4m3_rounds_up_to_the_next_value(x: float) -> None:
    code = int(q.e4m3_encode_up(np.array([x], np.float32))[0])
    assert q.E4M3[code] >= x
    assert code == 0 or q.E4M3[code - 1] < x
