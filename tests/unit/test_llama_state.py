"""The layout of llama.cpp's state blob, without llama.cpp."""

import struct

import numpy as np
import pytest

from quire_engine.errors import QuireError
from quire_engine.runtimes import llama_state
from quire_engine.types import ModelShape, Rope

SHAPE = ModelShape("llama", 3, 4, 2, 8, 6, 128, Rope("adjacent", 8, 1e4))
CELLS, MAGIC = 5, 0xAF143CEE
META = 16
SECTION = META + 12 * CELLS  # transposed V, layers
FIRST_ROWS = SECTION + 8


def filled() -> llama_state.SequenceState:
    """Every number of it says where it belongs."""
    state = llama_state.empty(SHAPE, CELLS, MAGIC)
    state.positions[:] = 10 + np.arange(CELLS)
    for layer in range(SHAPE.layers):
        state.k_rot[layer][:] = 100 * layer + np.arange(CELLS)[:, None] + np.arange(16) / 16
        state.v[layer][:] = -100 * layer - np.arange(CELLS)[:, None] - np.arange(12) / 16
    return state


def test_what_is_written_into_the_views_is_parsed_out_of_the_blob() -> None:
    state = filled()
    again = llama_state.parse(np.frombuffer(state.blob.tobytes(), np.uint8), SHAPE)
    assert again.positions.tolist() == [10, 11, 12, 13, 14]
    for layer in range(SHAPE.layers):
        assert again.k_rot[layer].shape == (CELLS, 16)
        assert again.v[layer].shape == (CELLS, 12)
        np.testing.assert_array_equal(again.k_rot[layer], state.k_rot[layer])
        np.testing.assert_array_equal(again.v[layer], state.v[layer])
    assert llama_state.magic_of(state.blob) == MAGIC


def test_the_bytes_are_the_documented_ones() -> None:
    data = filled().blob.tobytes()
    assert struct.unpack_from("<IiII", data) == (MAGIC, 0, 1, CELLS)
    cells = [struct.unpack_from("<iIi", data, META + 12 * cell) for cell in range(CELLS)]
    assert cells == [(10 + cell, 1, 0) for cell in range(CELLS)]
    assert struct.unpack_from("<II", data, SECTION) == (0, 3)
    k_rows, v_rows = 12 + CELLS * 32, 12 + CELLS * 24
    for layer in range(3):
        at = FIRST_ROWS + layer * k_rows
        assert struct.unpack_from("<iQ", data, at) == (1, 32)
        assert struct.unpack_from("<e", data, at + 12 + 32)[0] == 100 * layer + 1
        at = FIRST_ROWS + 3 * k_rows + layer * v_rows
        assert struct.unpack_from("<iQ", data, at) == (1, 24)
        assert struct.unpack_from("<e", data, at + 12 + 24)[0] == -100 * layer - 1
    assert len(data) == FIRST_ROWS + 3 * (k_rows + v_rows)


def test_no_cells() -> None:
    state = llama_state.empty(SHAPE, 0, MAGIC)
    assert llama_state.parse(state.blob, SHAPE).positions.shape == (0,)


@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (8, struct.pack("<I", 2), "streams 2"),
        (SECTION, struct.pack("<I", 1), "transposed V 1"),
        (SECTION + 4, struct.pack("<I", 4), "layers 4"),
        (FIRST_ROWS, struct.pack("<i", 8), "row type 8"),
        (FIRST_ROWS + 4, struct.pack("<Q", 34), "34 bytes; expected float16, 32"),
    ],
)
def test_another_layout_is_refused(offset: int, value: bytes, what: str) -> None:
    blob = filled().blob
    blob[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    with pytest.raises(QuireError, match="lays out its KV differently") as refused:
        llama_state.parse(blob, SHAPE)
    assert what in refused.value.details


def test_another_shape_is_refused() -> None:
    other = ModelShape("llama", 3, 4, 1, 8, 6, 128, SHAPE.rope)
    with pytest.raises(QuireError, match="lays out its KV differently"):
        llama_state.parse(filled().blob, other)


def test_bytes_too_many_are_refused() -> None:
    blob = np.concatenate([filled().blob, np.zeros(4, np.uint8)])
    with pytest.raises(QuireError) as refused:
        llama_state.parse(blob, SHAPE)
    assert refused.value.details == "4 bytes too many"


@pytest.mark.parametrize("left", [0, 8, 40, SECTION, FIRST_ROWS + 4, FIRST_ROWS + 100, -1])
def test_a_blob_that_ends_early_is_refused(left: int) -> None:
    with pytest.raises(QuireError, match="lays out its KV differently"):
        llama_state.parse(filled().blob[:left], SHAPE)
