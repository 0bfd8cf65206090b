"""Keys and values as small codes on a grid.

Keys (before RoPE) form groups along tokens, one channel each (their outliers are channels); values along channels, one
token each (KIVI, arXiv 2402.02750). A code is the point of its group's grid that is nearest. Knows nothing of where
the points lie (`grids`), of bit planes, positions or files.
"""

import numpy as np
import numpy.typing as npt

from quire_kernels.grids import Bits, Float32, Grid, MidRise, UInt8, divide, power_of_two


def quantize_keys(k_pre: npt.NDArray[np.floating], bits: Bits, kind: type[Grid] = MidRise) -> tuple[UInt8, Grid]:
    """Keys [tokens, channels] -> codes of the same shape, below 2**bits, and their grid.

    Numbers must be finite, and there must be some. The last group holds whatever tokens are left over. bits may be 0 on
    a mid-rise grid: then a group's centre is all that remains.
    """
    x = np.asarray(k_pre, np.float32)
    starts = np.arange(0, len(x), kind.GROUP)
    low, high = np.minimum.reduceat(x, starts, axis=0), np.maximum.reduceat(x, starts, axis=0)
    grid = kind.fit(low, high, bits, shared_axis=0)
    step, first = (spread_over_tokens(a, len(x), kind.GROUP) for a in grid.points(bits))
    return _nearest(x, bits, step, first), grid


def quantize_values(v: npt.NDArray[np.floating], bits: int, kind: type[Grid] = MidRise) -> tuple[UInt8, Grid]:
    """Values [tokens, channels] -> codes of the same shape, below 2**bits, and their grid.

    Numbers must be finite, and there must be some. Channels are those of all heads in a row; the last group
    holds whatever channels are left over.
    """
    x = np.asarray(v, np.float32)
    starts = np.arange(0, x.shape[1], kind.GROUP)
    low, high = np.minimum.reduceat(x, starts, axis=1), np.maximum.reduceat(x, starts, axis=1)
    grid = kind.fit(low, high, bits, shared_axis=None)
    step, first = (spread_over_channels(a, x.shape[1], kind.GROUP) for a in grid.points(bits))
    return _nearest(x, bits, step, first), grid


def spread_over_tokens(per_group: Float32, tokens: int, group: int) -> Float32:
    """[token groups, channels] -> [tokens, channels]."""
    return np.repeat(per_group, group, axis=0)[:tokens]


def spread_over_channels(per_group: Float32, channels: int, group: int) -> Float32:
    """[tokens, channel groups] -> [tokens, channels]."""
    return np.repeat(per_group, group, axis=1)[:, :channels]


def _nearest(x: Float32, bits: Bits, step: Float32, first: Float32) -> UInt8:
    """The codes of the points nearest to x; numbers that float rounding left an ulp outside get the last one."""
    codes: UInt8 = np.clip(np.rint(divide(x - first, step)), 0, power_of_two(bits) - 1).astype(np.uint8)
    return codes
