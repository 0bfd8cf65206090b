"""Placing: packed keys and values of one layer -> float16 rows of a prompt's KV, at their positions.

The CPU form of the load kernel. Its specification is `rotate(dequantize(tensor))` cast to float16; placing does the
same in fewer passes over memory. A long prompt places tens of millions of numbers before its first word appears.
Knows nothing of files, chunks or runtimes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quire_kernels.grids import FLOAT16_MAX, Grid, power_of_two
from quire_kernels.planes import plane_bytes, unpack, unpack_by_width
from quire_kernels.quantize import spread_over_channels, spread_over_tokens
from quire_kernels.rope import Layout, rotate_inplace

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

# Rotation can lengthen one channel of a pair by this much.
_ROTATION_GAIN = float(np.sqrt(2.0))
# Numbers in work at once: as float32 they should stay in a core's second-level cache.
_TILE_NUMBERS = 1 << 17


@dataclass(frozen=True)
class PackedTensor:
    """Rows of one layer's keys or values: the top planes of `bits`-bit codes and the grid they lie on.

    planes: see `planes.pack`; channels are those of all heads.  by_channel: groups run along tokens, as those of keys
    do.  widths: [channels] bits of each, at most `bits`; empty where all have `bits`.
    """

    planes: tuple[UInt8, ...]
    bits: int
    rows: int
    channels: int
    grid: Grid
    by_channel: bool
    widths: UInt8 = field(default_factory=lambda: np.zeros(0, np.uint8))

    def codes(self, start: int, stop: int) -> UInt8:
        """Rows start..stop as codes of as many bits as there are planes [rows, channels]. start: a multiple of 8."""
        if len(self.widths):
            return unpack_by_width(self.planes, self.widths, start, stop)
        first, last = start * self.channels // 8, plane_bytes(stop * self.channels)
        codes = unpack([plane[first:last] for plane in self.planes], (stop - start) * self.channels)
        return codes.reshape(stop - start, self.channels)

    def affine(self) -> tuple[Float32, Float32]:
        """(step, low) of every group: such a code q means low + q * step."""
        kept = len(self.planes)
        if not len(self.widths):
            return self.grid.affine(self.bits, kept)
        widths = self.widths.astype(np.int64)
        read = np.minimum(widths, kept)
        step, low = self.grid.affine(widths, read)
        return step * power_of_two(read - kept), low


Tensor = PackedTensor | Float16  # float16 [rows, channels] where nothing was packed


def dequantize(tensor: PackedTensor) -> Float32:
    """The numbers that are left of a tensor [rows, channels]."""
    spread, length = (spread_over_tokens, tensor.rows) if tensor.by_channel else (spread_over_channels, tensor.channels)
    step, low = (spread(a, length, tensor.grid.GROUP) for a in tensor.affine())
    return tensor.codes(0, tensor.rows) * step + low


def place_keys(keys: Tensor, cos: Float32, sin: Float32, layout: Layout, kv_heads: int, out: Float16) -> None:
    """Unpack, dequantise, rotate and write keys.

    cos, sin: [rows, dims/2] of the final positions.  out: [rows, channels], any strides.
    """
    if not isinstance(keys, PackedTensor):
        k = keys.astype(np.float32)
        rotate_inplace(_by_head(k, kv_heads), cos, sin, layout)
        _write_half(k, out, limit=True)
        return
    for rows, k, limit in _tiles(keys, _ROTATION_GAIN):
        rotate_inplace(_by_head(k, kv_heads), cos[rows], sin[rows], layout)
        _write_half(k, out[rows], limit)


def place_values(values: Tensor, out: Float16) -> None:
    """Unpack, dequantise and write values to out [rows, channels], any strides."""
    if not isinstance(values, PackedTensor):
        out[...] = values
        return
    for rows, v, limit in _tiles(values, gain=1.0):
        _write_half(v, out[rows], limit)


def _tiles(tensor: PackedTensor, gain: float) -> Iterator[tuple[slice, Float32, bool]]:
    """Row ranges of whole groups, their numbers [rows, channels], and whether they may leave float16's range."""
    step, low = tensor.affine()
    limit = _overflows(tensor, step, low, gain)
    group = tensor.grid.GROUP
    tile = max(group, _TILE_NUMBERS // tensor.channels // group * group)
    for start in range(0, tensor.rows, tile):
        rows = slice(start, min(start + tile, tensor.rows))
        x = tensor.codes(rows.start, rows.stop).astype(np.float32)
        if tensor.by_channel:
            groups = slice(rows.start // group, -(-rows.stop // group))
            _affine_by_channel(x, step[groups], low[groups], group)
        else:
            _affine_by_token(x, step[rows], low[rows], group)
        yield rows, x, limit


def _by_head(k: Float32, kv_heads: int) -> Float32:
    """[rows, channels] seen as [rows, kv_heads, head_dim]."""
    return k.reshape(len(k), kv_heads, k.shape[1] // kv_heads)


def _affine_by_channel(k: Float32, step: Float32, low: Float32, group: int) -> None:
    """k [rows, channels] becomes low + k * step, both [token groups, channels]."""
    whole = len(k) // group
    groups = k[: whole * group].reshape(whole, group, k.shape[1])
    groups *= step[:whole, None]
    groups += low[:whole, None]
    if len(k) % group:
        k[whole * group :] *= step[whole]
        k[whole * group :] += low[whole]


def _affine_by_token(v: Float32, step: Float32, low: Float32, group: int) -> None:
    """v [rows, channels] becomes low + v * step, both [rows, channel groups]."""
    whole = v.shape[1] // group
    groups = v[:, : whole * group].reshape(len(v), whole, group)
    groups *= step[:, :whole, None]
    groups += low[:, :whole, None]
    if v.shape[1] % group:
        v[:, whole * group :] *= step[:, whole:]
        v[:, whole * group :] += low[:, whole:]


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
