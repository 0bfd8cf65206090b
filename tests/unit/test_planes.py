"""Bit planes: exact for every width and length, and laid out as documented."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_kernels.planes import pack, plane_bytes, unpack


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
