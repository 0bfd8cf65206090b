"""The kernels of `device_pack`: one finds the extremes of groups, one rounds to their points and writes bit planes.

A program writes the same bytes of all planes of a layer; where channels have widths of their own those bytes belong to
other numbers in each plane, and a program writes one of them. Knows nothing of how points are fitted (`device_pack`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.ahead import Build
from quire_kernels.device_pack import Alike, sequence
from quire_kernels.grids import GRIDS
from quire_kernels.stored import FIELDS, FIRST_HELD, FIRST_PLANE, StoredRows, entry

TILE_ROWS, TILE_CHANNELS = 16, 32  # of a program that finds extremes, along the axis that it does not reduce
BYTES = 128  # of a program that writes planes
_FIELDS, _FIRST_PLANE, _FIRST_HELD = tl.constexpr(FIELDS), tl.constexpr(FIRST_PLANE), tl.constexpr(FIRST_HELD)


@triton.jit
def _extremes(
    x, order, layers, low, high, rows, channels, layer_stride, row_stride,
    by_channel: tl.constexpr, row_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """low, high: float32 [layers, *groups]. A program has one group's extent along the axis that is reduced."""
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    token = tl.load(order + row, mask=row < rows, other=0).to(tl.int64)
    numbers = x + tl.load(layers + tl.program_id(2)).to(tl.int64) * layer_stride
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    at = numbers + token[:, None] * row_stride + channel[None, :]
    smallest = tl.load(at, mask=mask, other=float("inf")).to(tl.float32)
    largest = tl.where(mask, smallest, float("-inf"))
    if by_channel:
        at_group = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * channels + channel
        tl.store(low + at_group, tl.min(smallest, 0), mask=channel < channels)
        tl.store(high + at_group, tl.max(largest, 0), mask=channel < channels)
    else:
        at_group = (tl.program_id(2).to(tl.int64) * rows + row) * tl.num_programs(1) + tl.program_id(1)
        tl.store(low + at_group, tl.min(smallest, 1), mask=row < rows)
        tl.store(high + at_group, tl.max(largest, 1), mask=row < rows)


@triton.jit
def _planes(
    x, order, layers, table, channel_at, widths, step, first, data, rows, channels, layer_stride, row_stride,
    by_channel: tl.constexpr, by_width: tl.constexpr, group: tl.constexpr, byte_block: tl.constexpr,
):  # fmt: skip
    """channel_at, widths: int32 [layers, channels], the channel at each place of the planes and the bits of each."""
    entry, layer = table + tl.program_id(2) * _FIELDS, tl.program_id(2).to(tl.int64)
    bits, plane = tl.load(entry + 4).to(tl.int32), tl.program_id(1)
    if plane >= bits:
        return
    held = tl.load(entry + _FIRST_HELD + plane).to(tl.int32)
    byte = tl.program_id(0) * byte_block + tl.arange(0, byte_block)
    bit = tl.arange(0, 8)
    number = byte[:, None] * 8 + bit[None, :]
    mask = number < rows * held
    row = number // held
    channel = number % held
    width = tl.zeros([byte_block, 8], tl.int32) + bits
    if by_width:
        channel = tl.load(channel_at + layer * channels + channel, mask=mask, other=0)
        width = tl.load(widths + layer * channels + channel, mask=mask, other=1)
    token = tl.load(order + row, mask=mask, other=0).to(tl.int64)
    numbers = x + tl.load(layers + layer).to(tl.int64) * layer_stride
    value = tl.load(numbers + token * row_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if by_channel:
        at = (layer * tl.cdiv(rows, group) + row // group) * channels + channel
    else:
        at = (layer * rows + row) * tl.cdiv(channels, group) + channel // group
    size = tl.load(step + at, mask=mask, other=0.0)
    steps = tl.div_rn(value - tl.load(first + at, mask=mask, other=0.0), tl.where(size > 0, size, 1.0))
    # Adding and taking away 1.5 * 2^23 leaves a whole number, halves to even.
    code = ((tl.where(size > 0, steps, 0.0) + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(mask, tl.minimum(tl.maximum(code, 0), (1 << width) - 1), 0)
    there = byte < (rows * held + 7) // 8
    if by_width:
        packed = tl.sum(((code >> (width - 1 - plane)) & 1) << bit[None, :], 1)
        tl.store(data + tl.load(entry + _FIRST_PLANE + plane) + byte, packed.to(tl.uint8), mask=there)
    else:
        for each in range(bits):
            packed = tl.sum(((code >> (bits - 1 - each)) & 1) << bit[None, :], 1)
            tl.store(data + tl.load(entry + _FIRST_PLANE + each) + byte, packed.to(tl.uint8), mask=there)


def extremes(x: Tensor, order: Tensor, numbers: tuple[int, ...], part: StoredRows) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of every group of layers `numbers`, float32 [layers, *groups]."""
    group = GRIDS[part.grid].GROUP
    row_block, channel_block = (group, TILE_CHANNELS) if part.by_channel else (TILE_ROWS, group)
    low = torch.empty(len(numbers), *part.groups, dtype=torch.float32, device=x.device)
    high = torch.empty_like(low)
    grid = (triton.cdiv(part.rows, row_block), triton.cdiv(part.channels, channel_block), len(numbers))
    _extremes[grid](
        x, order, _whole(numbers, x), low, high, part.rows, part.channels, x.stride(0), x.stride(1),
        by_channel=part.by_channel, row_block=row_block, channel_block=channel_block,
    )  # fmt: skip
    return low, high


def write_planes(x: Tensor, order: Tensor, alike: Alike, data: Tensor) -> None:
    """Codes of all layers of `alike`, as planes where their parts say."""
    part, by_width = alike.parts[0], bool(alike.parts[0].widths)
    table = torch.tensor([entry(each) for each in alike.parts], dtype=torch.int64).to(x.device)
    channel_at = widths = order
    if by_width:
        channel_at = torch.stack([sequence(each) for each in alike.parts]).to(x.device, torch.int32)
        widths = torch.tensor([list(each.widths) for each in alike.parts], dtype=torch.int32).to(x.device)
    most = max(each.bits for each in alike.parts) if by_width else 1
    grid = (triton.cdiv(triton.cdiv(part.rows * part.channels, 8), BYTES), most, len(alike.parts))
    _planes[grid](
        x, order, _whole(alike.numbers, x), table, channel_at, widths, alike.step.contiguous(),
        alike.first.contiguous(), data, part.rows, part.channels, x.stride(0), x.stride(1),
        by_channel=part.by_channel, by_width=by_width, group=GRIDS[part.grid].GROUP, byte_block=BYTES,
        enable_fp_fusion=False,
    )  # fmt: skip


def _whole(numbers: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).to(like.device)


_SIZES = dict.fromkeys(("rows", "channels", "layer_stride", "row_stride"), "i32")
_KEYS = {"by_channel": True, "row_block": 64, "channel_block": TILE_CHANNELS}
_VALUES = {"by_channel": False, "row_block": TILE_ROWS, "channel_block": 64}
_FOUND = {"x": "*fp16", "order": "*i32", "layers": "*i32", "low": "*fp32", "high": "*fp32", **_SIZES}
_WRITTEN = {"x": "*fp16", "order": "*i32", "layers": "*i32", "table": "*i64", "channel_at": "*i32", "widths": "*i32"}
_WRITTEN |= {"step": "*fp32", "first": "*fp32", "data": "*u8", **_SIZES}
_PLANES = {"by_channel": True, "by_width": False, "group": 64, "byte_block": BYTES}
BUILDS = (
    Build("pack, extremes of keys", _extremes, _FOUND, _KEYS, ("rows",)),
    Build("pack, extremes of values", _extremes, _FOUND, _VALUES, ("rows",)),
    Build("pack, planes of keys", _planes, _WRITTEN, _PLANES, ("rows",)),
    Build("pack, planes by width", _planes, _WRITTEN, {**_PLANES, "by_width": True}, ("rows",)),
    Build("pack, planes of values", _planes, _WRITTEN, {**_PLANES, "by_channel": False}, ("rows",)),
)
