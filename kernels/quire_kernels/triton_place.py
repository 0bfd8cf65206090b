"""The kernel of `device_place`: one program places a few rows of one head.

It reads a byte of a plane once for the eight channels in it where heads are whole bytes, else once for each channel.
Bytes may lie at any address, so float16 is put together from two of them. Knows nothing of checks (`device_place`).
"""

from math import gcd
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.ahead import Build
from quire_kernels.device_place import Angles
from quire_kernels.grids import FLOAT16_MAX, GRIDS
from quire_kernels.stored import FIELDS, FIRST_HELD, FIRST_PLANE, Batch

# Of a program. Both divide the groups of every grid, so that a program of keys meets one group; channels with widths of
# their own take more registers, and spill with 32 rows.
ROWS, ROWS_BY_WIDTH = 32, 16
_FIELDS, _FIRST_PLANE, _FIRST_HELD = tl.constexpr(FIELDS), tl.constexpr(FIRST_PLANE), tl.constexpr(FIRST_HELD)
_LIMIT = tl.constexpr(FLOAT16_MAX)
_TURNS = {"halves": 1, "adjacent": 2}


@triton.jit
def _half(at, mask):
    """Float16 at any address, as float32."""
    low = tl.load(at, mask=mask, other=0).to(tl.uint16)
    high = tl.load(at + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _float(at):
    """Float32 at any address."""
    word = tl.load(at).to(tl.uint32) | (tl.load(at + 1).to(tl.uint32) << 8)
    word |= (tl.load(at + 2).to(tl.uint32) << 16) | (tl.load(at + 3).to(tl.uint32) << 24)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(codes):
    return (codes.to(tl.uint16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _codes(
    data, entry, places, widths, row, in_rows, start, channels,
    count: tl.constexpr, padded: tl.constexpr, planes: tl.constexpr, by_byte: tl.constexpr, by_width: tl.constexpr,
):  # fmt: skip
    """Codes of channels start .. start + count, float32 [rows, padded]."""
    if by_byte:
        byte = tl.arange(0, padded // 8)
        at = ((row * channels + start) // 8)[:, None] + byte[None, :]
        mask = in_rows[:, None] & (byte < count // 8)[None, :]
        bit = tl.arange(0, 8)
        eights = tl.zeros([row.shape[0], padded // 8, 8], tl.int32)
        for plane in tl.static_range(planes):
            packed = tl.load(data + tl.load(entry + _FIRST_PLANE + plane) + at, mask=mask, other=0).to(tl.int32)
            eights = (eights << 1) | ((packed[:, :, None] >> bit[None, None, :]) & 1)
        codes = tl.reshape(eights, [row.shape[0], padded])
    else:
        offset = tl.arange(0, padded)
        mask = in_rows[:, None] & (offset < count)[None, :]
        place = start + offset
        width = tl.full([padded], planes, tl.int32)
        if by_width:
            width = tl.load(widths + start + offset, mask=offset < count, other=0).to(tl.int32)
            place = tl.load(places + start + offset, mask=offset < count, other=0)
        codes = tl.zeros([row.shape[0], padded], tl.int32)
        for plane in tl.static_range(planes):
            held = tl.load(entry + _FIRST_HELD + plane).to(tl.int32)
            at = (row * held)[:, None] + place[None, :]
            there = mask & (width > plane)[None, :]
            packed = tl.load(data + tl.load(entry + _FIRST_PLANE + plane) + at // 8, mask=there, other=0).to(tl.int32)
            codes = (codes << 1) | ((packed >> (at % 8)) & 1)
    return codes.to(tl.float32)


@triton.jit
def _affine_by_channel(
    data, entry, widths, rows, first_row, start, channels,
    count: tl.constexpr, padded: tl.constexpr, planes: tl.constexpr, midrise: tl.constexpr, group: tl.constexpr,
    by_width: tl.constexpr,
):  # fmt: skip
    """(step, low) of channels start .. start + count in the group of a program's rows, [1, padded]."""
    channel = start + tl.arange(0, padded)
    mask = tl.arange(0, padded) < count
    grid = data + tl.load(entry)
    at = (first_row // group) * channels + channel
    groups = tl.cdiv(rows, group) * channels
    bits = tl.zeros([padded], tl.int32) + tl.load(entry + 4).to(tl.int32)
    if by_width:
        bits = tl.load(widths + channel, mask=mask, other=1).to(tl.int32)
    if midrise:
        scales = grid + 4 + 4 * channels
        step = _e4m3(tl.load(scales + at, mask=mask, other=0)) * _float(grid)
        zero = tl.load(scales + groups + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        centre = _half(grid + 4 + 2 * channel, mask) + zero * _half(grid + 4 + 2 * channels + 2 * channel, mask)
        first = centre + step * (0.5 - _power_of_two(bits - 1))
    else:
        step, first = _half(grid + 2 * at, mask), _half(grid + 2 * (groups + at), mask)
    read = tl.minimum(bits, planes)
    merged = _power_of_two(bits - read)
    low = first + step * ((merged - 1.0) * 0.5)
    step = step * merged
    if by_width:  # codes are aligned at the top
        step = step * _power_of_two(read - planes)
    return step[None, :], low[None, :]


@triton.jit
def _affine_by_token(
    data, entry, rows, row, in_rows, start, channels,
    count: tl.constexpr, padded: tl.constexpr, planes: tl.constexpr, midrise: tl.constexpr, group: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    """(step, low) of channels start .. start + count, [rows, padded]; `span` neighbours share a group."""
    run = tl.arange(0, padded // span)
    mask = in_rows[:, None] & (run * span < count)[None, :]
    grid = data + tl.load(entry)
    per_row = tl.cdiv(channels, group)
    at = (row * per_row)[:, None] + ((start + run * span) // group)[None, :]
    groups = rows * per_row
    bits = tl.load(entry + 4).to(tl.int32)
    if midrise:
        step = _e4m3(tl.load(grid + 8 + at, mask=mask, other=0)) * _float(grid)
        zero = tl.load(grid + 8 + groups + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        centre = _half(grid + 4, True) + zero * _half(grid + 6, True)
        first = centre + step * (0.5 - _power_of_two(bits - 1))
    else:
        step, first = _half(grid + 2 * at, mask), _half(grid + 2 * (groups + at), mask)
    merged = _power_of_two(bits - planes)
    low = first + step * ((merged - 1.0) * 0.5)
    return _spread(step * merged, span), _spread(low, span)


@triton.jit
def _spread(x, times: tl.constexpr):
    """[rows, runs] -> [rows, runs * times]."""
    runs: tl.constexpr = x.shape[1]
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], runs, times])
    return tl.reshape(wide, [x.shape[0], runs * times])


@triton.jit
def _numbers(
    data, entry, places, widths, bias, rows, first_row, row, in_rows, start, channels,
    count: tl.constexpr, padded: tl.constexpr, planes: tl.constexpr, midrise: tl.constexpr, group: tl.constexpr,
    span: tl.constexpr, by_channel: tl.constexpr, by_width: tl.constexpr, by_byte: tl.constexpr, even: tl.constexpr,
    biased: tl.constexpr,
):  # fmt: skip
    """Channels start .. start + count of a program's rows, with the bias, float32 [rows, padded]; no planes: exact."""
    offset = tl.arange(0, padded)
    if planes == 0:
        at = (row * channels + start)[:, None] + offset[None, :]
        mask = in_rows[:, None] & (offset < count)[None, :]
        if even:
            exact = (data + tl.load(entry)).to(tl.pointer_type(tl.float16))
            x = tl.load(exact + at, mask=mask, other=0.0).to(tl.float32)
        else:
            x = _half(data + tl.load(entry) + 2 * at, mask)
    else:
        codes = _codes(
            data, entry, places, widths, row, in_rows, start, channels, count, padded, planes, by_byte, by_width
        )  # fmt: skip
        if by_channel:
            step, low = _affine_by_channel(
                data, entry, widths, rows, first_row, start, channels, count, padded, planes, midrise, group, by_width
            )  # fmt: skip
        else:
            step, low = _affine_by_token(
                data, entry, rows, row, in_rows, start, channels, count, padded, planes, midrise, group, span
            )  # fmt: skip
        x = codes * step + low
    if biased:
        of_chunk = bias + tl.load(entry + 3) * channels + start
        x += tl.load(of_chunk + offset, mask=offset < count, other=0.0)[None, :]
    return x


@triton.jit
def _write(x, out, to, inside, start, row_stride, count: tl.constexpr):
    """x [rows, padded] to channels start .. start + count of one head's rows `to`."""
    offset = tl.arange(0, x.shape[1])
    if out.dtype.element_ty == tl.float16:
        x = tl.minimum(tl.maximum(x, -_LIMIT), _LIMIT)
    at = (to.to(tl.int64) * row_stride + start)[:, None] + offset[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside[:, None] & (offset < count)[None, :])


@triton.jit
def _place(
    data, table, places, widths, rows, cos, sin, bias, out, out_rows, channels, row_stride, head_stride,
    dim: tl.constexpr, pairs: tl.constexpr, turn: tl.constexpr, planes: tl.constexpr, midrise: tl.constexpr,
    group: tl.constexpr, span: tl.constexpr, by_channel: tl.constexpr, by_width: tl.constexpr, by_byte: tl.constexpr,
    even: tl.constexpr, biased: tl.constexpr, pair_block: tl.constexpr, rest_block: tl.constexpr,
    row_block: tl.constexpr,
):  # fmt: skip
    """turn: 0 not, 1 halves, 2 adjacent. Channels behind 2 * pairs are not turned."""
    entry = table + tl.program_id(2) * _FIELDS
    first_row, count = tl.program_id(0) * row_block, tl.load(entry + 1).to(tl.int32)
    if first_row >= count:
        return
    row = first_row + tl.arange(0, row_block)
    in_rows = row < count
    start = tl.program_id(1) * dim
    out_head = out + tl.program_id(1).to(tl.int64) * head_stride
    to = tl.load(rows + tl.load(entry + 2) + row, mask=in_rows, other=-1)
    inside = in_rows & (to >= 0) & (to < out_rows)
    if turn > 0:
        pair = tl.arange(0, pair_block)
        at = (to.to(tl.int64) * pairs)[:, None] + pair[None, :]
        turned = inside[:, None] & (pair < pairs)[None, :]
        c, s = tl.load(cos + at, mask=turned, other=0.0), tl.load(sin + at, mask=turned, other=0.0)
    if turn == 1:
        a = _numbers(
            data, entry, places, widths, bias, count, first_row, row, inside, start, channels, pairs, pair_block,
            planes, midrise, group, span, by_channel, by_width, by_byte, even, biased,
        )  # fmt: skip
        b = _numbers(
            data, entry, places, widths, bias, count, first_row, row, inside, start + pairs, channels, pairs,
            pair_block, planes, midrise, group, span, by_channel, by_width, by_byte, even, biased,
        )  # fmt: skip
        _write(a * c - b * s, out_head, to, inside, 0, row_stride, pairs)
        _write(b * c + a * s, out_head, to, inside, pairs, row_stride, pairs)
    if turn == 2:
        both = _numbers(
            data, entry, places, widths, bias, count, first_row, row, inside, start, channels, 2 * pairs,
            2 * pair_block, planes, midrise, group, span, by_channel, by_width, by_byte, even, biased,
        )  # fmt: skip
        a, b = tl.split(tl.reshape(both, [row_block, pair_block, 2]))
        both = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [row_block, 2 * pair_block])
        _write(both, out_head, to, inside, 0, row_stride, 2 * pairs)
    if dim > 2 * pairs:
        rest = _numbers(
            data, entry, places, widths, bias, count, first_row, row, inside, start + 2 * pairs, channels,
            dim - 2 * pairs, rest_block, planes, midrise, group, span, by_channel, by_width, by_byte, even, biased,
        )  # fmt: skip
        _write(rest, out_head, to, inside, 2 * pairs, row_stride, dim - 2 * pairs)


def launch(data: Tensor, batch: Batch, rows: Tensor, out: Tensor, angles: Angles | None, bias: Tensor | None) -> None:
    """`device_place.place` with arguments that fit together."""
    kind, heads, dim = batch.kind, out.shape[1], out.shape[2]
    pairs = 0 if angles is None else angles.cos.shape[1]
    constants = constants_of(
        dim,
        pairs,
        "" if angles is None else angles.layout,
        planes=0 if kind.exact else kind.planes,
        grid=kind.grid,
        by_channel=kind.by_channel,
        by_width=bool(kind.widths),
        even=data.data_ptr() % 2 == 0 and all(part.offset % 2 == 0 for part in batch.parts),
        biased=bias is not None,
    )
    cos, sin = (rows, rows) if angles is None else (angles.cos, angles.sin)  # never read without angles
    grid = (triton.cdiv(batch.longest, constants["row_block"]), heads, len(batch.parts))
    _place[grid](
        data, batch.table, batch.places, batch.widths, rows, cos, sin, rows if bias is None else bias, out,
        len(out), kind.channels, out.stride(0), out.stride(1), **constants,
        enable_fp_fusion=False,  # the numbers of the specification, to the last bit
    )  # fmt: skip


def constants_of(
    dim: int,
    pairs: int,
    layout: str,
    planes: int,
    grid: str,
    by_channel: bool,
    by_width: bool,
    even: bool,
    biased: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    group = GRIDS[grid].GROUP
    # Every beginning of a run of channels must be a whole byte: of heads, of second halves, of what is not turned.
    by_byte = not by_width and all(n % 8 == 0 for n in (dim, pairs))
    return {
        "dim": dim,
        "pairs": pairs,
        "turn": _TURNS.get(layout, 0),
        "planes": planes,
        "midrise": grid == "midrise",
        "group": group,
        "span": gcd(dim, group),
        "by_channel": by_channel,
        "by_width": by_width,
        "by_byte": by_byte,
        "even": even,
        "biased": biased,
        "pair_block": _block(pairs, by_byte),
        "rest_block": _block(dim - 2 * pairs, by_byte),
        "row_block": ROWS_BY_WIDTH if by_width else ROWS,
    }


def _block(channels: int, by_byte: bool) -> int:
    return int(max(8 if by_byte else 1, triton.next_power_of_2(max(channels, 1))))


def _build(name: str, out: str, **form: object) -> Build:
    pointers = {"data": "*u8", "table": "*i64", "places": "*i32", "widths": "*u8", "rows": "*i32", "out": f"*{out}"}
    pointers |= {"cos": "*fp32", "sin": "*fp32", "bias": "*fp32"}
    sizes = dict.fromkeys(("out_rows", "channels", "row_stride", "head_stride"), "i32")
    plain = {"by_width": False, "even": True, "biased": False, "grid": "midrise", "by_channel": True}
    constants = constants_of(**{**plain, **form})  # type: ignore[arg-type]
    return Build(name, _place, pointers | sizes, constants, unaligned=("out_rows",))


BUILDS = (
    _build("place keys, 4 bits, halves", "fp16", dim=128, pairs=64, layout="halves", planes=4),
    _build("place keys, 4 bits, adjacent, bias", "bf16", dim=128, pairs=64, layout="adjacent", planes=4, biased=True),
    _build("place keys, widths to 4", "fp16", dim=128, pairs=64, layout="halves", planes=4, by_width=True),
    _build("place values, 3 bits", "fp16", dim=128, pairs=0, layout="", planes=3, by_channel=False),
    _build("place exact keys", "fp16", dim=128, pairs=64, layout="halves", planes=0),
)
