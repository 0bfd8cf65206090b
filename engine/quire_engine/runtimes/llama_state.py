"""The layout of llama.cpp's per-sequence state blob, as arrays that can be filled or read in place.

Belongs to one exact version of llama.cpp (pinned in pyproject.toml); the runtime's self-test proves the round trip
on the installed one. For a unified cache with flash attention (V rows contiguous), little-endian:

    u32 magic, i32 sequence, u32 streams = 1, u32 cells, cells x (i32 position, u32 1, i32 sequence),
    u32 v_transposed = 0, u32 layers, layers x (i32 type, u64 row bytes, K rows), layers x (same for V)

Knows nothing of chunks. K rows in it are rotated.
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire_engine.errors import QuireError
from quire_engine.types import Float16, ModelShape

_HEADER = struct.Struct("<IiII")
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
_SECTION = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")
_F16 = 1


@dataclass(frozen=True)
class SequenceState:
    """A blob and the views into it: filling the views fills the blob."""

    blob: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.int32]  # [cells], a view
    k_rot: tuple[Float16, ...]  # per layer [cells, kv_heads * key_dim], views
    v: tuple[Float16, ...]  # per layer [cells, kv_heads * value_dim], views


def magic_of(blob: npt.NDArray[np.uint8]) -> int:
    return int(_HEADER.unpack_from(blob.data)[0])


def empty(shape: ModelShape, cells: int, magic: int) -> SequenceState:
    """A blob for `cells` rows whose headers are written and whose positions and rows are still to be filled."""
    k_row, v_row = 2 * shape.kv_heads * shape.key_dim, 2 * shape.kv_heads * shape.value_dim
    size = _HEADER.size + cells * _CELL.itemsize + _SECTION.size
    size += shape.layers * (2 * _ROWS.size + cells * (k_row + v_row))
    blob = np.empty(size, dtype=np.uint8)
    _HEADER.pack_into(blob.data, 0, magic, 0, 1, cells)
    meta = blob[_HEADER.size : _HEADER.size + cells * _CELL.itemsize].view(_CELL)
    meta["sequences"], meta["sequence"] = 1, 0
    offset = _HEADER.size + meta.nbytes
    _SECTION.pack_into(blob.data, offset, 0, shape.layers)
    offset += _SECTION.size
    for row in [k_row] * shape.layers + [v_row] * shape.layers:
        _ROWS.pack_into(blob.data, offset, _F16, row)
        offset += _ROWS.size + cells * row
    return parse(blob, shape)


def parse(blob: npt.NDArray[np.uint8], shape: ModelShape) -> SequenceState:
    """Views into a blob. Raises QuireError when it does not have the expected layout."""
    try:
        return _parse(blob, shape)
    except (struct.error, ValueError, IndexError) as error:
        raise unexpected(f"{blob.size} bytes: {error}") from error


def _parse(blob: npt.NDArray[np.uint8], shape: ModelShape) -> SequenceState:
    _, _, streams, cells = _HEADER.unpack_from(blob.data)
    meta = blob[_HEADER.size : _HEADER.size + cells * _CELL.itemsize].view(_CELL)
    offset = _HEADER.size + meta.nbytes
    v_transposed, layers = _SECTION.unpack_from(blob.data, offset)
    if (streams, v_transposed, layers) != (1, 0, shape.layers):
        raise unexpected(f"streams {streams}, transposed V {v_transposed}, layers {layers}")
    offset += _SECTION.size
    views: list[Float16] = []
    for width in [shape.kv_heads * shape.key_dim] * layers + [shape.kv_heads * shape.value_dim] * layers:
        kind, row = _ROWS.unpack_from(blob.data, offset)
        if (kind, row) != (_F16, 2 * width):
            raise unexpected(f"row type {kind}, {row} bytes; expected float16, {2 * width}")
        offset += _ROWS.size
        rows = blob[offset : offset + cells * row]
        views.append(rows.view(np.float16).reshape(cells, width))
        offset += rows.nbytes
    if offset != blob.size:
        raise unexpected(f"{blob.size - offset} bytes too many")
    return SequenceState(blob, meta["position"], tuple(views[:layers]), tuple(views[layers:]))


def unexpected(details: str) -> QuireError:
    """What the pinned version of llama.cpp does, the installed one does not."""
    return QuireError(
        "This build of llama.cpp lays out its KV differently, so stored KV cannot be used.",
        "Reinstall Quire with the llama-cpp-python version that it names.",
        details,
    )
