"""Grids: where the codes of a tensor lie. Evenly spaced points, shared by a group of neighbouring numbers.

Two kinds. `MidRise` is Quire's own. The points of a group are the middles of the 2^b cells between its extremes:

    x ~ centre + (q + 1/2 - 2^(b-1)) * step,   error <= step / 2

Its steps and centres take one byte each. A step is an e4m3 float times one float32 `master`, rounded up so that the
cells still cover the group. A centre is an int8 multiple of `unit`, counted from `middle`; both exist per channel for
keys, once for values. Steps are fitted to the *decoded* centres, so their rounding widens the cells a little (4 % on
average) and never misplaces them.

`MinMax` is KVmix's (arXiv 2506.08018), with its codes packed as densely as any others: the first and the last point of
a group are its extremes, step and minimum are float16.

Either way the top p bits of a code are a p-bit code: they stand for the middle of the 2^(b-p) points that share them.
Knows nothing of how groups are formed, of bit planes or of files.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]
Bits = int | npt.NDArray[np.int64]  # of all codes, or of each channel's [channels]

FLOAT16_MAX = 65504.0
E4M3_MAX = 448.0
_E4M3_LARGEST_CODE = 126  # 127 is not a number


class Grid(ABC):
    """Points for the codes of one tensor. Groups are [token groups, channels] for keys and [tokens, channel groups]
    for values."""

    GROUP: ClassVar[int]
    """Numbers that share their points."""

    @classmethod
    @abstractmethod
    def fit(cls, low: Float32, high: Float32, bits: Bits, shared_axis: int | None) -> Self:
        """The grid of groups with these extremes, within float16's range.

        shared_axis: groups along it (None: all) may share what a grid does not keep for each of them.
        """

    @abstractmethod
    def points(self, bits: Bits) -> tuple[Float32, Float32]:
        """(step, first) of every group: a `bits`-bit code q means first + q * step."""

    def affine(self, bits: Bits, planes: Bits) -> tuple[Float32, Float32]:
        """(step, first) of every group: the top `planes` bits q of a `bits`-bit code mean first + q * step."""
        step, first = self.points(bits)
        merged = power_of_two(bits - planes)
        return step * merged, first + step * ((merged - 1) * np.float32(0.5))


@dataclass(frozen=True)
class MidRise(Grid):
    """Points in the middles of equal cells, one byte for a group's step and one for its centre."""

    GROUP: ClassVar[int] = 64

    master: np.float32
    middle: Float16  # [channels] for keys, [1] for values
    unit: Float16  # like middle
    scales: UInt8  # [groups], e4m3
    zeros: Int8  # [groups]

    @classmethod
    def fit(cls, low: Float32, high: Float32, bits: Bits, shared_axis: int | None) -> Self:
        centre = (low + high) / 2
        top, bottom = centre.max(shared_axis, keepdims=True), centre.min(shared_axis, keepdims=True)
        middle = ((top + bottom) / 2).astype(np.float16)
        unit = _float16_up((top - bottom) / 2 + abs((top + bottom) / 2 - middle), 1 / 127)
        zeros = np.rint(divide(centre - middle, unit.astype(np.float32))).astype(np.int8)
        off_centre = middle.astype(np.float32) + zeros * unit.astype(np.float32)
        step = np.maximum(high - off_centre, off_centre - low) / power_of_two(bits - 1)
        step *= np.asarray(bits) > 0  # no bits need no step, and leave the master to the others
        master = np.float32(step.max() / E4M3_MAX)
        scales = e4m3_encode_up(divide(step, np.broadcast_to(master, step.shape)))
        return cls(master, middle.ravel(), unit.ravel(), scales, zeros)

    def points(self, bits: Bits) -> tuple[Float32, Float32]:
        centre = self.middle.astype(np.float32) + self.zeros * self.unit.astype(np.float32)
        step = e4m3_decode(self.scales) * self.master
        return step, centre + step * (np.float32(0.5) - power_of_two(bits - 1))


@dataclass(frozen=True)
class MinMax(Grid):
    """Points from a group's minimum to its maximum, two bytes for a group's step and two for its minimum."""

    GROUP: ClassVar[int] = 32

    steps: Float16  # [groups]
    minima: Float16  # [groups]

    @classmethod
    def fit(cls, low: Float32, high: Float32, bits: Bits, shared_axis: int | None) -> Self:
        """A step is rounded up: so the points reach the maximum, and a range of float16's smallest number keeps one.

        Only one bit for more than half of float16's range needs a step beyond it. The largest float16 does as well:
        no number is further than half of that range from one of the two points.
        """
        minima = -_float16_up(-low, 1.0)
        spread = high - minima.astype(np.float32)
        steps = _float16_up(np.minimum(spread / (power_of_two(bits) - 1), np.float32(FLOAT16_MAX)), 1.0)
        return cls(steps, minima)

    def points(self, bits: Bits) -> tuple[Float32, Float32]:
        return self.steps.astype(np.float32), self.minima.astype(np.float32)


GRIDS: dict[str, type[Grid]] = {"midrise": MidRise, "minmax": MinMax}
"""By the names that plans use."""


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


def power_of_two(exponent: Bits) -> Float32:
    """2**exponent, exactly, for negative ones too."""
    power: Float32 = np.ldexp(np.float32(1), exponent)
    return power


def divide(a: Float32, b: Float32) -> Float32:
    """a / b, and 0 where b is 0: there all of a group's numbers are equal and sit on its first point."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _float16_up(x: Float32, factor: float) -> Float16:
    """x * factor in float16, never rounded down."""
    exact = x * np.float32(factor)
    nearest = exact.astype(np.float16)
    return np.nextafter(nearest, np.float16(np.inf), out=nearest.copy(), where=nearest < exact)
