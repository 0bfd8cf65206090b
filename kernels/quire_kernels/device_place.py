"""Placing on a device: packed rows of many chunks, as the bytes of their files -> rows of a KV buffer, in one pass.

Unpacks, dequantises, adds a bias, turns keys to their positions, casts and scatters. The specification is
`place.dequantize` and `rope.rotate` in NumPy; here it stands in PyTorch's operations, and in `triton_place` as a
kernel. All forms give the same float32 numbers (but for NumPy's complex product, which turns neighbours with one
rounding less), cast to the nearest, ties to even.

There is no checksum here: the file's is a CRC-32, one long chain of dependent steps, which a processor takes while
the bytes are in its hands anyway; and it would guard no more than a bus that has checksums of its own.
Knows nothing of files, chunks or models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quire_kernels import dispatch
from quire_kernels.grids import FLOAT16_MAX, GRIDS
from quire_kernels.rope import Layout
from quire_kernels.stored import Batch, StoredRows

KV_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Angles:
    """RoPE of every row of a KV buffer: `rope.angles` of its positions, float32 [rows, dims/2]."""

    cos: Tensor
    sin: Tensor
    layout: Layout


def place(
    data: Tensor,
    batch: Batch,
    rows: Tensor,
    out: Tensor,
    angles: Angles | None = None,
    bias: Tensor | None = None,
    form: dispatch.Wish = "auto",
) -> None:
    """Write a batch's rows to out[rows]: keys with angles, values without.

    data: uint8 [bytes].  rows: int32, where each row goes; what lies outside of out is left out, so that -1 spares a
    row that is computed anyway.  out: [rows, kv_heads, dim], channels contiguous; float16 is clipped to its range.
    bias: float32 [chunks, kv_heads * dim], added before rotating: what drift takes back.
    Floor in bytes: those of the batch, and of its rows in `out`; angles once.
    Raises ValueError when the arguments do not fit together.
    """
    _check(data, batch, rows, out, angles, bias)
    if dispatch.choose(data.device, form) == "triton":
        from quire_kernels import triton_place

        triton_place.launch(data, batch, rows, out, angles, bias)
        return
    for part in batch.parts:
        _place(data, part, batch, rows, out, angles, bias)


def numbers(data: Tensor, part: StoredRows, places: Tensor) -> Tensor:
    """What is left of stored rows, float32 [rows, channels]: `place.dequantize`. places: see Batch."""
    if part.exact:
        return _halves(data[part.offset : part.stop]).reshape(part.rows, part.channels)
    group = GRIDS[part.grid].GROUP
    step, low = _affine(data, part)
    if part.by_channel:
        step, low = (x.repeat_interleave(group, 0)[: part.rows] for x in (step, low))
    else:
        step, low = (x.repeat_interleave(group, 1)[:, : part.channels] for x in (step, low))
    return _codes(data, part, places).to(torch.float32) * step + low


def _place(
    data: Tensor, part: StoredRows, batch: Batch, rows: Tensor, out: Tensor, angles: Angles | None, bias: Tensor | None
) -> None:
    x = numbers(data, part, batch.places)
    if bias is not None:
        x = x + bias[part.chunk]
    to = rows[part.first : part.first + part.rows].to(torch.int64)
    inside = (to >= 0) & (to < len(out))
    x, to = x[inside].reshape(-1, *out.shape[1:]), to[inside]
    if angles is not None:
        x = rotate(x, angles, to)
    if out.dtype == torch.float16:
        x = x.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    out[to] = x.to(out.dtype)


def rotate(x: Tensor, angles: Angles, rows: Tensor) -> Tensor:
    """Keys [n, heads, dim] turned by the angles of these rows [n]; float32 stays float32."""
    cos, sin = angles.cos[rows][:, None], angles.sin[rows][:, None]
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if angles.layout == "adjacent":
        a, b = turned[..., ::2], turned[..., 1::2]
        return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _codes(data: Tensor, part: StoredRows, places: Tensor) -> Tensor:
    """[rows, channels], as if all channels had as many bits as planes were read."""
    bit = torch.arange(8, dtype=torch.uint8, device=data.device)
    codes = torch.zeros(part.rows, part.channels, dtype=torch.uint8, device=data.device)
    begins = part.plane_offsets
    for plane, held in enumerate(part.held):
        packed = data[begins[plane] : begins[plane + 1]]
        bits = (packed[:, None] >> bit & 1).flatten()[: part.rows * held].reshape(part.rows, held)
        codes[:, :held] |= bits << (part.planes - 1 - plane)
    return codes[:, places.to(torch.int64)] if part.widths else codes


def _affine(data: Tensor, part: StoredRows) -> tuple[Tensor, Tensor]:
    """(step, low) of every group: such a code q means low + q * step. As `PackedTensor.affine`, in the same order."""
    grid = data[part.offset : part.offset + part.grid_bytes]
    if part.grid == "minmax":
        step, first = _halves(grid).reshape(2, *part.groups)
        bits = torch.tensor(part.bits, device=data.device)
    else:
        bits = torch.tensor(list(part.widths) or part.bits, device=data.device)
        step, first = _midrise(grid, part, bits)
    read = bits.clamp(max=part.planes)
    merged = power_of_two(bits - read)
    low = first + step * ((merged - 1) * 0.5)
    return step * merged * power_of_two(read - part.planes), low


def _midrise(grid: Tensor, part: StoredRows, bits: Tensor) -> tuple[Tensor, Tensor]:
    shared = part.channels if part.by_channel else 1
    master = grid[:4].clone().view(torch.float32)
    middle, unit = _halves(grid[4 : 4 + 4 * shared]).reshape(2, shared)
    scales, zeros = grid[4 + 4 * shared :].reshape(2, *part.groups)
    step = e4m3(scales) * master
    centre = middle + zeros.view(torch.int8).to(torch.float32) * unit
    return step, centre + step * (0.5 - power_of_two(bits - 1))


def e4m3(codes: Tensor) -> Tensor:
    """`grids.e4m3_decode` of codes that are not negative: float16 with another bias."""
    return (codes.to(torch.int16) << 7).view(torch.float16).to(torch.float32) * 256


def _halves(data: Tensor) -> Tensor:
    """Bytes as float16, in float32. Copied, because float16 in a buffer of bytes may begin at an odd one."""
    return data.clone().view(torch.float16).to(torch.float32)


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float32, exactly."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _check(data: Tensor, batch: Batch, rows: Tensor, out: Tensor, angles: Angles | None, bias: Tensor | None) -> None:
    used = [data, batch.table, rows, out, *([] if bias is None else [bias])]
    used += [] if angles is None else [angles.cos, angles.sin]
    if len({tensor.device for tensor in used}) > 1:
        raise ValueError(f"everything must be on one device: {[str(tensor.device) for tensor in used]}")
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous() or len(data) < batch.stop:
        raise ValueError(f"data are {batch.stop} or more contiguous bytes, not {data.dtype} {tuple(data.shape)}")
    if rows.dtype != torch.int32 or rows.dim() != 1 or not rows.is_contiguous() or len(rows) < batch.destinations:
        raise ValueError(f"rows are {batch.destinations} or more int32, not {rows.dtype} {tuple(rows.shape)}")
    if out.dtype not in KV_TYPES or out.dim() != 3 or out.stride(2) != 1:
        raise ValueError(
            f"out is a float tensor [rows, kv_heads, dim] with contiguous channels, not {tuple(out.shape)}"
        )
    channels = out.shape[1] * out.shape[2]
    if channels != batch.kind.channels:
        raise ValueError(f"rows of {batch.kind.channels} channels do not fit {out.shape[1]} heads of {out.shape[2]}")
    if angles is not None:
        pairs = angles.cos.shape[-1]
        fits = angles.cos.shape == angles.sin.shape == (len(out), pairs) and 2 <= 2 * pairs <= out.shape[2]
        if not fits or not all(x.dtype == torch.float32 and x.is_contiguous() for x in (angles.cos, angles.sin)):
            raise ValueError(f"angles are contiguous float32 [{len(out)}, dims/2], not {tuple(angles.cos.shape)}")
    if bias is not None and (
        bias.dtype != torch.float32
        or not bias.is_contiguous()
        or bias.dim() != 2
        or bias.shape[1] != channels
        or len(bias) < batch.chunks
    ):
        raise ValueError(f"bias is contiguous float32 [{batch.chunks} or more, {channels}], not {tuple(bias.shape)}")
