"""Placing: packed keys and values of one layer -> float16 rows of a prompt's KV, at their positions.

The CPU form of the load kernel. Knows nothing of files, chunks or runtimes. The specification is one line of
the other modules, `rotate(dequantize_keys(unpack(...)))` cast to float16; this does the same in fewer passes
over memory. A long prompt places tens of millions of numbers before its first word appears.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire_kernels.planes import unpack
from quire_kernels.quantize import GROUP, Grid
from quire_kernels.rope import Layout, rotate_inplace

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

FLOAT16_MAX = 65504.0
# Rotation can lengthen one channel of a pair by this much.
_ROTATION_GAIN = float(np.sqrt(2.0))
# Numbers in work at once: as float32 they should stay in a core's second-level cache.
_TILE_NUMBERS = 1 << 17


@dataclass(frozen=True)
class PackedTensor:
    """Rows of one layer's keys or values: the top planes of `bits`-bit codes and the grid they lie on.

    planes: [at most bits, ceil(rows * channels / 8)], see `planes.pack`; channels are those of all heads.
    """

    planes: UInt8
    bits: int
    rows: int
    channels: int
    grid: Grid


Tensor = PackedTensor | Float16  # float16 [rows, channels] where nothing was packed


def place_keys(keys: Tensor, cos: Float32, sin: Float32, layout: Layout, kv_heads: int, out: Float16) -> None:
    """Unpack, dequantise, rotate and write keys.

    cos, sin: [rows, dims/2] of the final positions.  out: [rows, channels], any strides.
    """
    if not isinstance(keys, PackedTensor):
        k = keys.astype(np.float32)
        rotate_inplace(_by_head(k, kv_heads), cos, sin, layout)
        _write_half(k, out, limit=True)
        return
    step, low = keys.grid.affine(keys.bits, len(keys.planes))
    limit = _overflows(keys, step, low, _ROTATION_GAIN)
    for rows, codes in _tiles(keys):
        k = codes.astype(np.float32)
        groups = slice(rows.start // GROUP, -(-rows.stop // GROUP))
        _affine_keys(k, step[groups], low[groups])
        rotate_inplace(_by_head(k, kv_heads), cos[rows], sin[rows], layout)
        _write_half(k, out[rows], limit)


def place_values(values: Tensor, out: Float16) -> None:
    """Unpack, dequantise and write values to out [rows, channels], any strides."""
    if not isinstance(values, PackedTensor):
        out[...] = values
        return
    step, low = values.grid.affine(values.bits, len(values.planes))
    limit = _overflows(values, step, low, gain=1.0)
    for rows, codes in _tiles(values):
        v = codes.astype(np.float32)
        _affine_values(v, step[rows], low[rows])
        _write_half(v, out[rows], limit)


def _tiles(tensor: PackedTensor) -> Iterator[tuple[slice, UInt8]]:
    """Row ranges of whole groups and their codes [rows, channels]."""
    tile = max(GROUP, _TILE_NUMBERS // tensor.channels // GROUP * GROUP)
    for start in range(0, tensor.rows, tile):
        rows = slice(start, min(start + tile, tensor.rows))
        count = (rows.stop - rows.start) * tensor.channels
        first = start * tensor.channels // 8  # whole: a group has 64 rows
        codes = unpack(tensor.planes[:, first : first + -(-count // 8)], count)
        yield rows, codes.reshape(-1, tensor.channels)


def _by_head(k: Float32, kv_heads: int) -> Float32:
    """[rows, channels] seen as [rows, kv_heads, head_dim]."""
    return k.reshape(len(k), kv_heads, k.shape[1] // kv_heads)


def _affine_keys(k: Float32, step: Float32, low: Float32) -> None:
    """k [rows, channels] becomes low + k * step, both [token groups, channels]."""
    whole = len(k) // GROUP
    groups = k[: whole * GROUP].reshape(whole, GROUP, k.shape[1])
    groups *= step[:whole, None]
    groups += low[:whole, None]
    if len(k) % GROUP:
        k[whole * GROUP :] *= step[whole]
        k[whole * GROUP :] += low[whole]


def _affine_values(v: Float32, step: Float32, low: Float32) -> None:
    """v [rows, channels] becomes low + v * step, both [rows, channel groups]."""
    whole = v.shape[1] // GROUP
    groups = v[:, : whole * GROUP].reshape(len(v), whole, GROUP)
    groups *= step[:, :whole, None]
    groups += low[:, :whole, None]
    if v.shape[1] % GROUP:
        v[:, whole * GROUP :] *= step[:, whole:]
        v[:, whole * GROUP :] += low[:, whole:]


def _overflows(tensor: PackedTensor, step: Float32, low: Float32, gain: float) -> bool:
    """Whether any code of the tensor could leave float16's range; told from the metadata, which is small."""
    high = low + step * np.float32(2 ** len(tensor.planes) - 1)
    return bool(max(abs(low).max(), abs(high).max()) * gain > FLOAT16_MAX)


def _write_half(x: Float32, out: Float16, limit: bool) -> None:
    """Write float32 rows as float16, rounding halves away from zero. Overwrites x.

    limit: clip to float16's range first; without it, numbers outside come out wrong.
    NumPy's own cast takes 2.7 ns a number in software, more than all the rest of placing together.
    """
    if limit:
        np.clip(x, -FLOAT16_MAX, FLOAT16_MAX, out=x)
    # float32's exponent becomes float16's, and what is too small for that becomes subnormal by itself.
    x *= np.float32(2.0**-112)
    bits = x.view(np.uint32)
    sign = bits >> 16
    sign &= 0x8000
    bits += 0x1000  # half a unit of the last place that stays
    bits >>= 13
    bits &= 0x7FFF
    bits |= sign
    np.copyto(out.view(np.uint16), bits, casting="unsafe")
