"""Mid-rise affine quantisation of keys and values, with one-byte metadata.

Knows nothing of bit planes, positions or files. A group of 64 numbers shares a step and a centre; a b-bit
code q stands for the middle of its cell:

    x ~ centre + (q + 1/2 - 2^(b-1)) * step,   error <= step / 2

Because the grid is symmetric about the centre, the top p bits of a code are a p-bit code on the same centre
with step * 2^(b-p), as good as if it had been quantised to p bits. Keys form groups along tokens, one channel
each (their outliers are channels); values along channels, one token each. (KIVI, arXiv 2402.02750.)

A step is stored as an e4m3 float times one float32 `master`, rounded up so that the grid still covers its
group. A centre is stored as an int8 multiple of `unit`, counted from `middle`; both exist per channel for
keys, once for values. Codes are computed against the *decoded* metadata, so its rounding widens the cells a
little (4 % on average) and never misplaces them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]

GROUP = 64

E4M3_MAX = 448.0
_E4M3_LARGEST_CODE = 126  # 127 is not a number


def _e4m3_table() -> Float32:
    """All 256 values of the OCP 8-bit float E4M3 (OFP8 specification 1.0): bias 7, no infinities, one NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


E4M3 = _e4m3_table()


def e4m3_decode(codes: UInt8) -> Float32:
    """E4M3 codes -> their values, same shape."""
    return E4M3[codes]


def e4m3_encode_up(x: Float32) -> UInt8:
    """The smallest E4M3 code whose value is at least x, for x in 0..448, same shape; larger x gives 448."""
    codes = np.searchsorted(E4M3[: _E4M3_LARGEST_CODE + 1], x, side="left")
    return np.minimum(codes, _E4M3_LARGEST_CODE).astype(np.uint8)


@dataclass(frozen=True)
class Grid:
    """Where the codes of one tensor lie.

    Groups are [token groups, channels] for keys and [tokens, channel groups] for values.
    """

    master: np.float32
    middle: Float16  # [channels] for keys, [1] for values
    unit: Float16  # like middle
    scales: UInt8  # [groups], e4m3
    zeros: Int8  # [groups]

    def centres(self) -> Float32:
        """The centre of every group."""
        return self.middle.astype(np.float32) + self.zeros * self.unit.astype(np.float32)

    def steps(self) -> Float32:
        """The width of a full-width code's cell, for every group."""
        return e4m3_decode(self.scales) * self.master

    def affine(self, bits: int, planes: int) -> tuple[Float32, Float32]:
        """(step, low) of every group: the top `planes` bits q of a `bits`-bit code mean low + q * step."""
        step = self.steps() * np.float32(2 ** (bits - planes))
        return step, self.centres() + step * np.float32(0.5 - 2 ** (planes - 1))


def quantize_keys(k_pre: npt.NDArray[np.floating], bits: int) -> tuple[UInt8, Grid]:
    """Keys [tokens, channels] -> codes of the same shape, below 2**bits, and their grid.

    Numbers must be finite, and there must be some. The last group holds whatever tokens are left over.
    """
    x = np.asarray(k_pre, np.float32)
    starts = np.arange(0, len(x), GROUP)
    low, high = np.minimum.reduceat(x, starts, axis=0), np.maximum.reduceat(x, starts, axis=0)
    grid = _fit(low, high, bits, shared_axis=0)
    return _encode(x, bits, *(spread_over_tokens(a, len(x)) for a in (grid.centres(), grid.steps()))), grid


def quantize_values(v: npt.NDArray[np.floating], bits: int) -> tuple[UInt8, Grid]:
    """Values [tokens, channels] -> codes of the same shape, below 2**bits, and their grid.

    Numbers must be finite, and there must be some. Channels are those of all heads in a row; the last group
    holds whatever channels are left over.
    """
    x = np.asarray(v, np.float32)
    starts = np.arange(0, x.shape[1], GROUP)
    low, high = np.minimum.reduceat(x, starts, axis=1), np.maximum.reduceat(x, starts, axis=1)
    grid = _fit(low, high, bits, shared_axis=None)
    return _encode(x, bits, *(spread_over_channels(a, x.shape[1]) for a in (grid.centres(), grid.steps()))), grid


def dequantize_keys(codes: UInt8, grid: Grid, bits: int, planes: int) -> Float32:
    """The top `planes` bits of `bits`-bit key codes [tokens, channels] -> numbers of the same shape."""
    step, low = (spread_over_tokens(a, len(codes)) for a in grid.affine(bits, planes))
    return codes * step + low


def dequantize_values(codes: UInt8, grid: Grid, bits: int, planes: int) -> Float32:
    """The top `planes` bits of `bits`-bit value codes [tokens, channels] -> numbers of the same shape."""
    step, low = (spread_over_channels(a, codes.shape[1]) for a in grid.affine(bits, planes))
    return codes * step + low


def spread_over_tokens(per_group: Float32, tokens: int) -> Float32:
    """[token groups, channels] -> [tokens, channels]."""
    return np.repeat(per_group, GROUP, axis=0)[:tokens]


def spread_over_channels(per_group: Float32, channels: int) -> Float32:
    """[tokens, channel groups] -> [tokens, channels]."""
    return np.repeat(per_group, GROUP, axis=1)[:, :channels]


def _fit(low: Float32, high: Float32, bits: int, shared_axis: int | None) -> Grid:
    """The grid of groups with these extremes; groups along shared_axis (None: all) share middle and unit."""
    centre = (low + high) / 2
    top, bottom = centre.max(shared_axis, keepdims=True), centre.min(shared_axis, keepdims=True)
    middle = ((top + bottom) / 2).astype(np.float16)
    unit = _float16_up((top - bottom) / 2 + abs((top + bottom) / 2 - middle), 1 / 127)
    zeros = np.rint(_divide(centre - middle, unit.astype(np.float32))).astype(np.int8)
    off_centre = middle.astype(np.float32) + zeros * unit.astype(np.float32)
    step = np.maximum(high - off_centre, off_centre - low) / np.float32(2 ** (bits - 1))
    master = np.float32(step.max() / E4M3_MAX)
    scales = e4m3_encode_up(_divide(step, np.broadcast_to(master, step.shape)))
    return Grid(master, middle.ravel(), unit.ravel(), scales, zeros)


def _encode(x: Float32, bits: int, centre: Float32, step: Float32) -> UInt8:
    """The cells that x falls into; numbers that float rounding left an ulp outside go to the nearest one."""
    cell = np.floor(_divide(x - centre, step) + np.float32(2 ** (bits - 1)))
    codes: UInt8 = np.clip(cell, 0, 2**bits - 1).astype(np.uint8)
    return codes


def _divide(a: Float32, b: Float32) -> Float32:
    """a / b, and 0 where b is 0: there all of a group's numbers are equal and sit on its centre."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _float16_up(x: Float32, factor: float) -> Float16:
    """x * factor in float16, never rounded down."""
    exact = x * np.float32(factor)
    nearest = exact.astype(np.float16)
    return np.where(nearest < exact, np.nextafter(nearest, np.float16(np.inf)), nearest).astype(np.float16)
