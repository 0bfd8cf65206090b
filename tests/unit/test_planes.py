"""Bit planes: exact for every width and length, and laid out as documented."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_kernels.planes import channels_in_planes, pack, pack_by_width, plane_bytes, unpack, unpack_by_width


def some_codes(n: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, n, dtype=np.uint8)


@given(n=st.integers(1, 5000), bits=st.integers(1, 8), seed=st.integers(0, 999))
def test_unpack_undoes_pack(n: int, bits: int, seed: int) -> None:
    codes = some_codes(n, bits, seed)
    planes = pack(codes, bits)
    assert planes.shape == (bits, plane_bytes(n))
    np.testing.assert_array_equal(unpack(planes, n), codes)


@given(n=st.integers(1, 300), bits=st.integers(1, 8), data=st.data())
def test_top_planes_are_the_top_bits(n: int, bits: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, bits))
    codes = some_codes(n, bits, n)
    np.testing.assert_array_equal(unpack(pack(codes, bits)[:kept], n), codes >> (bits - kept))


def test_every_length_up_to_a_few_bytes_at_every_width() -> None:
    for bits in range(1, 9):
        for n in range(1, 34):
            codes = some_codes(n, bits, n)
            np.testing.assert_array_equal(unpack(pack(codes, bits), n), codes)


def test_layout_is_msb_plane_first_and_lsb_bit_first() -> None:
    codes = np.array([0b100, 0b001, 0b110, 0, 0, 0, 0, 0, 0b111], np.uint8)
    assert pack(codes, 3).tolist() == [[0b00000101, 1], [0b00000100, 1], [0b00000010, 1]]


def test_planes_cut_out_of_a_larger_array_unpack_too() -> None:
    codes = some_codes(640, 5, 0)
    np.testing.assert_array_equal(unpack(pack(codes, 5)[:, 10:30], 160), codes[80:240])


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(np.zeros(8, np.uint8), bits)


def some_codes_by_width(widths: np.ndarray, rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 2 ** widths.astype(int), (rows, len(widths)), dtype=np.uint8)


WIDTHS = st.lists(st.integers(0, 8), min_size=1, max_size=40).map(lambda widths: np.array(widths, np.uint8))


@given(widths=WIDTHS, rows=st.integers(1, 90), data=st.data())
def test_channels_of_any_widths_come_back_whole_and_in_part(widths: np.ndarray, rows: int, data: st.DataObject) -> None:
    codes = some_codes_by_width(widths, rows)
    planes = pack_by_width(codes, widths)
    assert [len(plane) for plane in planes] == [plane_bytes(rows * held) for held in channels_in_planes(widths)]
    top = data.draw(st.integers(0, len(planes)))
    start = data.draw(st.integers(0, (rows - 1) // 8)) * 8
    stop = data.draw(st.integers(start + 1, rows))
    read = np.minimum(widths, top)
    # Aligned at the top: the bits that a narrow channel does not have are zeros.
    expected = codes >> (widths - read) << (top - read)
    np.testing.assert_array_equal(unpack_by_width(planes[:top], widths, start, stop), expected[start:stop])


@pytest.mark.parametrize("rows", [1, 7, 8, 508])
def test_one_channel_may_have_all_the_bits(rows: int) -> None:
    for widths in ([8], [0, 0, 0, 8], [1, 0], [0, 3, 0, 0, 0, 0, 0, 0, 0]):
        of_channels = np.array(widths, np.uint8)
        codes = some_codes_by_width(of_channels, rows)
        planes = pack_by_width(codes, of_channels)
        assert [len(plane) for plane in planes] == [plane_bytes(rows)] * max(widths)
        np.testing.assert_array_equal(unpack_by_width(planes, of_channels, 0, rows), codes)


@given(rows=st.integers(1, 60), channels=st.integers(1, 20), bits=st.integers(1, 8))
def test_channels_of_equal_widths_lie_as_if_they_had_none_of_their_own(rows: int, channels: int, bits: int) -> None:
    widths = np.full(channels, bits, np.uint8)
    codes = some_codes_by_width(widths, rows)
    np.testing.assert_array_equal(pack_by_width(codes, widths), pack(codes.ravel(), bits))


def test_channels_lie_by_falling_width_and_equal_ones_in_their_order() -> None:
    codes = np.array([[0b1, 0b101, 0, 0b0, 0b11], [0b0, 0b010, 0, 0b1, 0b00]], np.uint8)
    widths = np.array([1, 3, 0, 1, 2], np.uint8)
    # Plane 0: channels 1, 4, 0, 3 of both rows; plane 1: channels 1 and 4; plane 2: channel 1.
    assert [plane.tolist() for plane in pack_by_width(codes, widths)] == [[0b1000_0111], [0b0110], [0b01]]
