"""One layer's keys or values as bytes: a grid, then bit planes, each a part that can be read and checked by itself.

Knows nothing of the file around them (`format`). docs/kv-format.md describes them for a second reader.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quire_kernels.grids import Grid, MidRise, MinMax, UInt8
from quire_kernels.place import PackedTensor, Tensor
from quire_kernels.planes import channels_in_planes, plane_bytes


@dataclass(frozen=True)
class _GridLayout:
    """A grid's fields in the order of their bytes: name, type, and what there is one of (see Cut.extents)."""

    make: Callable[..., Grid]
    fields: tuple[tuple[str, str, str], ...]


_GRID_LAYOUTS: dict[type[Grid], _GridLayout] = {
    MidRise: _GridLayout(
        MidRise,
        (
            ("master", "<f4", "tensor"),
            ("middle", "<f2", "shared"),
            ("unit", "<f2", "shared"),
            ("scales", "u1", "group"),
            ("zeros", "i1", "group"),
        ),
    ),
    MinMax: _GridLayout(MinMax, (("steps", "<f2", "group"), ("minima", "<f2", "group"))),
}


@dataclass(frozen=True)
class Cut:
    """How the packed rows of one layer's keys or values are cut up.

    bits: of the widest channel.  by_channel: groups run along tokens.  widths: see PackedTensor.
    """

    rows: int
    channels: int
    kind: type[Grid]
    bits: int
    by_channel: bool
    widths: UInt8

    @property
    def shared(self) -> int:
        """Middles that groups share."""
        return self.channels if self.by_channel else 1

    @property
    def groups(self) -> tuple[int, int]:
        if self.by_channel:
            return -(-self.rows // self.kind.GROUP), self.channels
        return self.rows, -(-self.channels // self.kind.GROUP)

    @property
    def extents(self) -> dict[str, tuple[int, ...]]:
        """Shape of a grid's field that has one number for the tensor, for what is shared, or for each group."""
        return {"tensor": (), "shared": (self.shared,), "group": self.groups}

    @property
    def part_lengths(self) -> list[int]:
        """Bytes of every part: the grid and the planes; or the float16 rows; nothing when there are no rows."""
        if not self.rows:
            return []
        if self.bits == 16:
            return [2 * self.rows * self.channels]
        fields = _GRID_LAYOUTS[self.kind].fields
        grid = sum(np.dtype(code).itemsize * math.prod(self.extents[extent]) for _, code, extent in fields)
        return [grid, *(plane_bytes(self.rows * channels) for channels in self._channels_in_planes)]

    @property
    def _channels_in_planes(self) -> list[int]:
        return channels_in_planes(self.widths) if len(self.widths) else [self.channels] * self.bits

    def planes(self, parts: Sequence[memoryview]) -> tuple[UInt8, ...]:
        """Parts behind the grid as planes; low ones may be missing."""
        return tuple(
            np.frombuffer(part, np.uint8, plane_bytes(self.rows * channels))
            for part, channels in zip(parts, self._channels_in_planes, strict=False)
        )


def to_parts(tensor: Tensor) -> list[bytes]:
    """The tensor's parts, in the order of `Cut.part_lengths`."""
    if not isinstance(tensor, PackedTensor):
        return [tensor.astype("<f2").tobytes()] if len(tensor) else []
    fields = _GRID_LAYOUTS[type(tensor.grid)].fields
    grid = b"".join(np.asarray(getattr(tensor.grid, name), code).tobytes() for name, code, _ in fields)
    return [grid, *(plane.tobytes() for plane in tensor.planes)]


def from_parts(parts: list[memoryview], cut: Cut) -> Tensor:
    """The inverse of to_parts; low planes may be missing, and the last part may have padding behind it."""
    shape = (cut.rows, cut.channels)
    if not cut.rows or cut.bits == 16:
        return np.frombuffer(parts[0] if parts else b"", "<f2", cut.rows * cut.channels).reshape(shape)
    return PackedTensor(cut.planes(parts[1:]), cut.bits, *shape, _grid(parts[0], cut), cut.by_channel, cut.widths)


def _grid(data: memoryview, cut: Cut) -> Grid:
    layout, offset, fields = _GRID_LAYOUTS[cut.kind], 0, {}
    for name, code, extent in layout.fields:
        shape = cut.extents[extent]
        numbers = np.frombuffer(data, code, math.prod(shape), offset).reshape(shape)
        fields[name] = numbers[()]  # a number where there is only one
        offset += numbers.nbytes
    return layout.make(**fields)
