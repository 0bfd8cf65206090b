"""Packed rows in a device's memory: which bytes of a buffer are what, as docs/kv-format.md lays them out.

A buffer holds bytes of files as they were read. `StoredRows` says on the host where one layer's keys or values of one
chunk begin and what they are; a `Batch` carries the same to the device, for as many chunks as one launch places.
Knows nothing of files, of how the bytes came there, or of placing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quire_kernels.grids import GRIDS
from quire_kernels.planes import channels_in_planes, plane_bytes

MAX_PLANES = 8
# A row of a batch's table: where the grid (or the float16 rows) begins, rows, index of the first destination, row of
# the bias, bits, then for every plane where it begins and how many channels it holds.
FIRST_PLANE, FIRST_HELD = 5, 5 + MAX_PLANES
FIELDS = FIRST_HELD + MAX_PLANES


@dataclass(frozen=True)
class StoredRows:
    """One layer's keys (before RoPE) or values of one chunk: a grid, then its top `planes` bit planes.

    offset: of the first byte.  bits: of a code, 1..8, or 16 for float16 rows, which have neither grid nor planes.
    planes: so many follow, 1..bits; lower ones were not read.  by_channel: groups run along tokens.  widths: bits of
    every channel, empty where all have `bits`.  first: its first row's index among a launch's destinations.
    chunk: its row of a launch's bias.
    """

    offset: int
    rows: int
    channels: int
    bits: int
    planes: int
    grid: str = "midrise"
    by_channel: bool = True
    widths: bytes = b""
    first: int = 0
    chunk: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what docs/kv-format.md does not allow."""
        if min(self.offset, self.rows, self.first, self.chunk) < 0 or self.channels < 1:
            raise ValueError(f"no negative numbers, and at least one channel: {self}")
        if self.bits != 16 and not 1 <= self.planes <= self.bits <= MAX_PLANES:
            raise ValueError(f"rows have 16 bits, or 1 to 8 of which at least one is read: {self}")
        if self.grid not in GRIDS:
            raise ValueError(f"a grid is one of {list(GRIDS)}, not {self.grid!r}")
        if self.widths and (self.exact or self.grid != "midrise" or not self.by_channel):
            raise ValueError("channels have widths of their own on the mid-rise grid by channel only")
        if self.widths and (len(self.widths) != self.channels or max(self.widths) != self.bits):
            raise ValueError(f"each of {self.channels} channels has 0 to {self.bits} bits, and one has {self.bits}")

    @property
    def exact(self) -> bool:
        return self.bits == 16

    @property
    def groups(self) -> tuple[int, int]:
        group = GRIDS[self.grid].GROUP
        return (-(-self.rows // group), self.channels) if self.by_channel else (self.rows, -(-self.channels // group))

    @property
    def held(self) -> list[int]:
        """Channels in each plane that was read."""
        if self.exact:
            return []
        widths = np.frombuffer(self.widths, np.uint8)
        return (channels_in_planes(widths) if len(widths) else [self.channels] * self.bits)[: self.planes]

    @property
    def grid_bytes(self) -> int:
        groups = math.prod(self.groups)
        return 4 * groups if self.grid == "minmax" else 4 + 4 * (self.channels if self.by_channel else 1) + 2 * groups

    @property
    def plane_offsets(self) -> list[int]:
        """Where each plane begins, and where the last one ends; of float16 rows the end alone."""
        if self.exact:
            return [self.offset + 2 * self.rows * self.channels]
        ends = [self.offset + self.grid_bytes]
        for held in self.held:
            ends.append(ends[-1] + plane_bytes(self.rows * held))
        return ends

    @property
    def stop(self) -> int:
        """Offset of the byte behind them."""
        return self.plane_offsets[-1] if self.rows else self.offset


@dataclass(frozen=True)
class Batch:
    """Rows of several chunks that differ in size and place only, described on the device too.

    table: int64 [parts, FIELDS].  places, widths: int32 and uint8 [channels], a channel's place in the planes and its
    bits; empty where all channels have the same.
    """

    parts: tuple[StoredRows, ...]
    table: Tensor
    places: Tensor
    widths: Tensor
    stop: int = field(init=False)  # bytes, destinations and rows of a bias that it needs
    destinations: int = field(init=False)
    chunks: int = field(init=False)
    longest: int = field(init=False)  # rows of a part

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", max(part.stop for part in self.parts))
        object.__setattr__(self, "destinations", max(part.first + part.rows for part in self.parts))
        object.__setattr__(self, "chunks", max(part.chunk for part in self.parts) + 1)
        object.__setattr__(self, "longest", max(part.rows for part in self.parts))

    @property
    def kind(self) -> StoredRows:
        """One of them; the others are alike in all but size and place."""
        return self.parts[0]


def batches(parts: Iterable[StoredRows], device: torch.device | str) -> tuple[Batch, ...]:
    """As few batches as hold all these rows; parts without rows are left out.

    Made once for a prompt, not for every layer: each costs a transfer to the device.
    """
    alike: dict[tuple[object, ...], list[StoredRows]] = {}
    for part in parts:
        if part.rows:
            kind = (part.exact,) if part.exact else (part.planes, part.grid, part.by_channel, part.widths)
            alike.setdefault((part.channels, *kind), []).append(part)
    return tuple(_batch(group, torch.device(device)) for group in alike.values())


def places(widths: bytes) -> list[int]:
    """Where each channel stands in the planes: by falling width, equal ones in their order."""
    order = sorted(range(len(widths)), key=lambda channel: -widths[channel])
    found = [0] * len(widths)
    for place, channel in enumerate(order):
        found[channel] = place
    return found


def _batch(parts: Sequence[StoredRows], device: torch.device) -> Batch:
    widths = parts[0].widths
    table = torch.tensor([entry(part) for part in parts], dtype=torch.int64)
    return Batch(
        tuple(parts),
        table.to(device),
        torch.tensor(places(widths), dtype=torch.int32, device=device),
        torch.tensor(list(widths), dtype=torch.uint8, device=device),
    )


def entry(part: StoredRows) -> list[int]:
    """A row of a table that tells the device about them."""
    unused = [0] * (MAX_PLANES - len(part.held))
    begins = part.plane_offsets[: len(part.held)]
    return [part.offset, part.rows, part.first, part.chunk, part.bits, *begins, *unused, *part.held, *unused]
