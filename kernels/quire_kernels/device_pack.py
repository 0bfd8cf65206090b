"""Packing on a device: fresh keys and values of all layers of a chunk -> the bytes of their parts, and token scores.

The specification is `quantize`, `grids` and `planes` in NumPy, and every byte is theirs. What reads all numbers, for
their extremes and again for their codes, is a kernel (`triton_pack`) or PyTorch's operations; a grid has a 64th of the
numbers and is fitted by PyTorch's operations, for all layers at once. docs/kv-format.md describes the bytes.
Knows nothing of files, of models, or of which rows are sinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_kernels import dispatch
from quire_kernels.device_place import e4m3, power_of_two
from quire_kernels.grids import E4M3, E4M3_MAX, FLOAT16_MAX, GRIDS
from quire_kernels.stored import StoredRows, places

_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Packing:
    """How one layer's keys or values are packed; see StoredRows."""

    bits: int
    grid: str = "midrise"
    by_channel: bool = True
    widths: bytes = b""


@dataclass(frozen=True)
class Packed:
    """The bytes of some layers one after another, uint8; each layer's grid and planes as its `StoredRows` says."""

    data: Tensor
    layers: tuple[StoredRows, ...]


@dataclass(frozen=True)
class Alike:
    """Layers that one launch packs: their numbers in x, their points, and where their bytes go.

    step, first: float32 [layers, *groups].
    """

    numbers: tuple[int, ...]
    parts: tuple[StoredRows, ...]
    step: Tensor
    first: Tensor


def pack(x: Tensor, order: Tensor, packings: Sequence[Packing], form: dispatch.Wish = "auto") -> Packed:
    """Pack keys before RoPE, or values: the same bytes as the codec's.

    x: [layers, tokens, channels], contiguous channels, all numbers finite.  order: int32 [rows], the token of every
    row; tokens outside of it (sinks) are left out.  packings: of each layer; with 16 bits its rows are only copied.
    Floor in bytes: x is read twice, the packed bytes are written once.
    Raises ValueError when the arguments do not fit together.
    """
    _check(x, order, packings)
    layers, offset = [], 0
    for packing in packings:
        of_all = packing.bits if packing.bits != 16 else 0
        kind = (packing.grid, packing.by_channel, packing.widths)
        layers.append(StoredRows(offset, len(order), x.shape[2], packing.bits, of_all, *kind))
        offset = layers[-1].stop
    data = torch.empty(offset, dtype=torch.uint8, device=x.device)
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, part in enumerate(layers):
        if part.exact:
            rows = x[number, order.to(torch.int64)].to(torch.float16)
            data[part.offset : part.stop] = rows.contiguous().view(torch.uint8).flatten()
        elif part.rows:
            alike.setdefault((part.grid, part.by_channel, bool(part.widths)), []).append(number)
    chosen = dispatch.choose(x.device, form)
    for numbers in alike.values():
        _pack_alike(x, order, tuple(numbers), tuple(layers[n] for n in numbers), data, chosen)
    return Packed(data, tuple(layers))


def spectral(k_pre: Tensor, v: Tensor, alpha: float = 0.5, high: bool = False) -> Tensor:
    """CacheTune's score per token, float32 [tokens], or its complement: `selection.spectral.score` on a device.

    k_pre, v: [layers, tokens, channels].  Equal to the specification up to rounding: its Fourier transform is another
    one, so tokens whose scores differ in the seventh digit may change places.
    """
    norms = (_band_norms(k_pre, alpha, high) + _band_norms(v, alpha, high)) / 2
    return (norms / norms.sum(1, keepdim=True).clamp(min=1e-12)).mean(0)


def _pack_alike(
    x: Tensor, order: Tensor, numbers: tuple[int, ...], parts: tuple[StoredRows, ...], data: Tensor, form: dispatch.Form
) -> None:
    if form == "triton":
        from quire_kernels import triton_pack

        low, high = triton_pack.extremes(x, order, numbers, parts[0])
    else:
        low, high = _extremes(x, order, numbers, parts[0])
    bits = bits_of(parts, x.device)
    fields, step, first = (fit_midrise if parts[0].grid == "midrise" else _fit_minmax)(low, high, bits, parts[0])
    for i, part in enumerate(parts):
        grid = torch.cat([field[i].contiguous().view(torch.uint8).flatten() for field in fields])
        data[part.offset : part.offset + part.grid_bytes] = grid
    alike = Alike(numbers, parts, step, first)
    if form == "triton":
        triton_pack.write_planes(x, order, alike, data)
    else:
        _write_planes(x, order, alike, data)


def bits_of(parts: Sequence[StoredRows], device: torch.device) -> Tensor:
    """[layers, 1, 1], or of every channel [layers, 1, channels]."""
    return torch.tensor([[list(part.widths) or [part.bits]] for part in parts], dtype=torch.int32, device=device)


def _extremes(x: Tensor, order: Tensor, numbers: tuple[int, ...], part: StoredRows) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of every group, float32 [layers, *groups]."""
    rows = _rows(x, order, numbers)
    group, axis = GRIDS[part.grid].GROUP, 1 if part.by_channel else 2
    runs = torch.split(rows, group, axis)
    return torch.stack([run.amin(axis) for run in runs], axis), torch.stack([run.amax(axis) for run in runs], axis)


def _write_planes(x: Tensor, order: Tensor, alike: Alike, data: Tensor) -> None:
    part = alike.parts[0]
    group, axis = GRIDS[part.grid].GROUP, 1 if part.by_channel else 2
    rows = _rows(x, order, alike.numbers)
    step, first = (
        a.repeat_interleave(group, axis).narrow(axis, 0, rows.shape[axis]) for a in (alike.step, alike.first)
    )
    bits = bits_of(alike.parts, x.device)
    codes = torch.round(divide(rows - first, step)).clamp(min=0)
    codes = torch.minimum(codes, power_of_two(bits) - 1).to(torch.int32)
    for i, part in enumerate(alike.parts):
        # As if all channels had the widest's bits, every first bit the same one; in the planes' order.
        ordered = (codes[i] << (part.bits - bits[i]))[:, sequence(part).to(x.device)]
        begins = part.plane_offsets
        for plane, held in enumerate(part.held):
            ones = (ordered[:, :held] >> (part.bits - 1 - plane) & 1).flatten()
            eights = torch.nn.functional.pad(ones, (0, -len(ones) % 8)).reshape(-1, 8)
            weights = 1 << torch.arange(8, dtype=torch.int32, device=x.device)
            data[begins[plane] : begins[plane + 1]] = (eights * weights).sum(1).to(torch.uint8)


def sequence(part: StoredRows) -> Tensor:
    """The channel at each place of the planes, int64 [channels]."""
    if not part.widths:
        return torch.arange(part.channels)
    return torch.argsort(torch.tensor(places(part.widths)))


def _rows(x: Tensor, order: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return x[list(numbers)][:, order.to(torch.int64)].to(torch.float32)


def fit_midrise(low: Tensor, high: Tensor, bits: Tensor, part: StoredRows) -> tuple[list[Tensor], Tensor, Tensor]:
    """`MidRise.fit` and `points`, operation by operation: the fields in the order of their bytes, step and first."""
    shared = (1,) if part.by_channel else (1, 2)
    centre = (low + high) * 0.5
    top, bottom = centre.amax(shared, keepdim=True), centre.amin(shared, keepdim=True)
    middle = ((top + bottom) * 0.5).to(torch.float16)
    unit = _float16_up(((top - bottom) * 0.5 + ((top + bottom) * 0.5 - middle.float()).abs()) * _single(1 / 127, low))
    zeros = torch.round(divide(centre - middle.float(), unit.float())).to(torch.int8)
    centre = middle.float() + zeros.float() * unit.float()
    step = torch.maximum(high - centre, centre - low) * power_of_two(1 - bits) * (bits > 0)
    master = step.amax((1, 2), keepdim=True) / _single(E4M3_MAX, low)
    table = torch.from_numpy(E4M3[:127]).to(low.device)
    scales = torch.searchsorted(table, divide(step, master).contiguous()).clamp(max=126).to(torch.uint8)
    step = e4m3(scales) * master
    return [master, middle, unit, scales, zeros], step, centre + step * (0.5 - power_of_two(bits - 1))


def _fit_minmax(low: Tensor, high: Tensor, bits: Tensor, part: StoredRows) -> tuple[list[Tensor], Tensor, Tensor]:
    """`MinMax.fit` and `points`."""
    minima = -_float16_up(-low)
    spread = (high - minima.float()) / (power_of_two(bits) - 1)
    steps = _float16_up(spread.clamp(max=FLOAT16_MAX))
    return [steps, minima], steps.float(), minima.float()


def _single(number: float, like: Tensor) -> Tensor:
    """A number on the device: dividing by one of the host's, PyTorch multiplies by its rounded inverse there."""
    return torch.full((), number, dtype=torch.float32, device=like.device)


def divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _float16_up(exact: Tensor) -> Tensor:
    """In float16, never rounded down."""
    nearest = exact.to(torch.float16)
    bits = nearest.view(torch.int16)
    up = torch.where(bits >= 0, bits + 1, bits - 1).to(torch.int16).view(torch.float16)
    return torch.where(nearest.float() < exact, up, nearest)


def _band_norms(x: Tensor, alpha: float, high: bool) -> Tensor:
    """[layers, tokens]: `selection.spectral` for all layers."""
    spectrum = torch.fft.rfft(x.float(), dim=1)
    cut = int(alpha * spectrum.shape[1])
    spectrum[:, slice(cut) if high else slice(cut, None)] = 0
    norms: Tensor = torch.linalg.vector_norm(torch.fft.irfft(spectrum, n=x.shape[1], dim=1), dim=2)
    return norms


def _check(x: Tensor, order: Tensor, packings: Sequence[Packing]) -> None:
    if x.dtype not in _TYPES or x.dim() != 3 or x.stride(2) != 1:
        raise ValueError(f"x is a float tensor [layers, tokens, channels], channels contiguous, not {tuple(x.shape)}")
    if len(packings) != len(x):
        raise ValueError(f"{len(packings)} packings do not fit {len(x)} layers")
    if order.dtype != torch.int32 or order.dim() != 1 or not order.is_contiguous() or len(order) > x.shape[1]:
        raise ValueError(f"order is int32, of at most {x.shape[1]} rows, not {order.dtype} {tuple(order.shape)}")
    if order.device != x.device:
        raise ValueError(f"everything must be on one device: {x.device}, {order.device}")
