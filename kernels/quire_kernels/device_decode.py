"""Decode attention on a device: the latest token, or a few, over a live window: older rows packed, recent ones exact.

KVmix's window (`quire_engine.kv.window`) as one layer's tensors. Rows are packed 64 tokens at a time into bit planes,
keys before RoPE and channel by channel, values by token or by channel; a step and a first point say what codes mean.
The specification unpacks everything, in PyTorch's operations; `triton_decode` is the kernel and unpacks in registers.
With no group packed it is decode attention over an ordinary cache.
Knows nothing of models, or of when a group is packed.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quire_kernels import device_pack, dispatch
from quire_kernels.device_place import Angles, rotate
from quire_kernels.place import PackedTensor
from quire_kernels.stored import StoredRows

GROUP = 64  # tokens packed together, and channels of a token that share a grid
NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedGroups:
    """Room for groups of 64 tokens of one layer; channels are those of all heads.

    k_planes, v_planes: uint8 [groups, bits, 64 * channels / 8], see `planes.pack`.  k_step, k_first: float [groups,
    key channels]: a code q means first + q * step.  v_step, v_first: float [groups, 64, value channels / 64 rounded
    up], or [groups, value channels] for values by channel.
    """

    k_planes: Tensor
    k_step: Tensor
    k_first: Tensor
    v_planes: Tensor
    v_step: Tensor
    v_first: Tensor

    @classmethod
    def empty(
        cls,
        groups: int,
        k_channels: int,
        v_channels: int,
        k_bits: int,
        v_bits: int,
        device: torch.device | str,
        v_by_channel: bool = False,
        numbers: torch.dtype = torch.float16,
    ) -> Self:
        """numbers: the type of steps and first points; float16 is as fine as the numbers that were packed."""

        def planes(bits: int, channels: int) -> Tensor:
            return torch.zeros(groups, bits, GROUP * channels // 8, dtype=torch.uint8, device=device)

        def grid(*extent: int) -> Tensor:
            return torch.zeros(groups, *extent, dtype=numbers, device=device)

        of_v = (v_channels,) if v_by_channel else (GROUP, -(-v_channels // GROUP))
        k_grid, v_grid = (grid(k_channels), grid(k_channels)), (grid(*of_v), grid(*of_v))
        return cls(planes(k_bits, k_channels), *k_grid, planes(v_bits, v_channels), *v_grid)

    @property
    def v_by_channel(self) -> bool:
        return self.v_step.dim() == 2

    def put(self, group: int, k: PackedTensor, v: PackedTensor) -> None:
        """Fill a group with 64 packed rows, of equal widths, as the codec makes them."""
        ours = ((k, self.k_planes, self.k_step, self.k_first), (v, self.v_planes, self.v_step, self.v_first))
        for tensor, planes, steps, firsts in ours:
            if tensor.rows != GROUP or len(tensor.widths) or len(tensor.planes) != planes.shape[1]:
                raise ValueError(f"a group is {GROUP} rows of {planes.shape[1]} bits")
            for plane, data in enumerate(tensor.planes):
                planes[group, plane] = torch.from_numpy(data.copy())
            step, first = (torch.from_numpy(x) for x in tensor.affine())
            times = GROUP // tensor.grid.GROUP
            if tensor.by_channel != (steps.dim() == 2) or (times > 1 and tensor.by_channel):
                raise ValueError("groups run along the other axis, or are shorter than 64 tokens")
            steps[group], firsts[group] = (x.reshape(steps[group].shape) for x in (step, first))

    def fill(self, first: int, k: Tensor, v: Tensor) -> None:
        """Pack rows into the groups from `first` on, the bytes that `put` is given by the codec.

        k, v: float32 [groups * 64, channels], keys before RoPE; all numbers finite.
        """
        to_k = (k, self.k_planes, self.k_step, self.k_first, True)
        to_v = (v, self.v_planes, self.v_step, self.v_first, self.v_by_channel)
        for rows, planes, steps, firsts, by_channel in (to_k, to_v):
            groups = rows.reshape(-1, GROUP, rows.shape[1])
            at = slice(first, first + len(groups))
            planes[at], step, least = _packed(groups, planes.shape[1], by_channel)
            steps[at], firsts[at] = (x.reshape(steps[at].shape) for x in (step, least))


@dataclass(frozen=True)
class LiveRows:
    """One layer's KV of a conversation: tokens 0, 1, 2...

    k, v: exact rows [room, kv_heads, dim], rotated; first the `sinks` tokens before the packed ones, then those after
    them.  filled: int32 [2], how many groups are packed and how many rows are exact; on the device, so that a recorded
    graph of kernels (CUDA graph) goes on being right.  angles: of all positions.
    """

    packed: PackedGroups
    k: Tensor
    v: Tensor
    filled: Tensor
    angles: Angles
    sinks: int = 0


def attend(q: Tensor, rows: LiveRows, form: dispatch.Wish = "auto", splits: int | None = None) -> Tensor:
    """What each of the latest tokens gathers, [queries, heads, value_dim] in q's type.

    q: rotated, [queries, heads, dim], of the last `queries` exact rows; each sees itself and all before it. Query head
    h reads KV head h // (heads / kv_heads).  splits: parts of the rows that are worked on side by side; without a
    number the device's own.  Floor in bytes: the filled part of `rows`, once.  PyTorch's form waits for the device, to
    learn how much is filled.  Raises ValueError when the arguments do not fit together.
    """
    _check(q, rows)
    if dispatch.choose(q.device, form) == "triton" and fits_kernel(q, rows):
        from quire_kernels import triton_decode

        return triton_decode.launch(q, rows, splits)
    return _attend(q, rows)


def fits_kernel(q: Tensor, rows: LiveRows) -> bool:
    """Whether the kernel can: heads of whole bytes on either side of their middle, turned entirely."""
    queries, heads, dim = q.shape
    kv_heads, v_dim = rows.v.shape[1:]
    few = queries * heads // kv_heads <= 64
    return few and dim % 16 == 0 and v_dim % 8 == 0 and max(dim, v_dim) <= 256 and 2 * rows.angles.cos.shape[1] == dim


def _attend(q: Tensor, rows: LiveRows) -> Tensor:
    groups, exact = (int(n) for n in rows.filled.tolist())
    queries, heads, dim = q.shape
    kv_heads = rows.k.shape[1]
    k_old, v_old = unpacked(rows, groups)
    k = torch.cat([k_old, rows.k[:exact].to(torch.float32)]).permute(1, 2, 0)[:, None]
    v = torch.cat([v_old, rows.v[:exact].to(torch.float32)]).permute(1, 0, 2)[:, None]
    grouped = q.reshape(queries, kv_heads, -1, dim).permute(1, 2, 0, 3).to(torch.float32)
    logits = grouped @ k * dim**-0.5  # [kv_heads, group, queries, rows]
    last = k.shape[-1] - queries + torch.arange(queries, device=q.device)
    behind = torch.arange(k.shape[-1], device=q.device) > last[:, None]
    weights = logits.masked_fill(behind, float("-inf")).softmax(dim=-1)
    gathered: Tensor = weights @ v
    return gathered.permute(2, 0, 1, 3).reshape(queries, heads, -1).to(q.dtype)


def unpacked(rows: LiveRows, groups: int) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of the first so many groups, float32 [tokens, kv_heads, dim]."""
    packed, tokens = rows.packed, groups * GROUP
    k_step, k_first = (x[:groups, None].to(torch.float32) for x in (packed.k_step, packed.k_first))
    k = _codes(packed.k_planes[:groups]) * k_step + k_first
    v_step, v_first = (x[:groups].to(torch.float32) for x in (packed.v_step, packed.v_first))
    v = _codes(packed.v_planes[:groups])
    if packed.v_by_channel:
        v_step, v_first = v_step[:, None], v_first[:, None]
    else:
        v_step, v_first = (x.repeat_interleave(GROUP, -1)[..., : v.shape[-1]] for x in (v_step, v_first))
    v = v * v_step + v_first
    positions = rows.sinks + torch.arange(tokens, device=k.device)
    k, v = k.reshape(tokens, *rows.k.shape[1:]), v.reshape(tokens, *rows.v.shape[1:])
    return rotate(k, rows.angles, positions), v


def _codes(planes: Tensor) -> Tensor:
    """uint8 [groups, bits, bytes] -> float32 [groups, 64, channels]."""
    bit = torch.arange(8, dtype=torch.uint8, device=planes.device)
    codes = torch.zeros(planes.shape[0], planes.shape[2], 8, dtype=torch.uint8, device=planes.device)
    for plane in range(planes.shape[1]):
        codes = codes << 1 | planes[:, plane, :, None] >> bit & 1
    return codes.reshape(len(planes), GROUP, planes.shape[2] * 8 // GROUP).to(torch.float32)


def _packed(x: Tensor, bits: int, by_channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Planes, steps and first points of [groups, 64, channels], each group by itself."""
    axis = 1 if by_channel else 2
    runs = torch.split(x, GROUP, axis)
    low, high = (torch.stack([of(run, axis) for run in runs], axis) for of in (torch.amin, torch.amax))
    kind = StoredRows(0, GROUP, x.shape[2], bits, bits, by_channel=by_channel)
    _, step, first = device_pack.fit_midrise(low, high, device_pack.bits_of([kind] * len(x), x.device), kind)
    step_of, first_of = (a.repeat_interleave(GROUP, axis).narrow(axis, 0, x.shape[axis]) for a in (step, first))
    codes = torch.round(device_pack.divide(x - first_of, step_of)).clamp(0, (1 << bits) - 1).to(torch.int32)
    eights = codes.reshape(len(x), -1, 8)
    weights = 1 << torch.arange(8, dtype=torch.int32, device=x.device)
    planes = [((eights >> (bits - 1 - plane) & 1) * weights).sum(-1).to(torch.uint8) for plane in range(bits)]
    return torch.stack(planes, 1), step, first


def _check(q: Tensor, rows: LiveRows) -> None:
    packed, k, v, cos = rows.packed, rows.k, rows.v, rows.angles.cos
    used = [q, *vars(packed).values(), k, v, rows.filled, cos, rows.angles.sin]
    if len({tensor.device for tensor in used}) > 1:
        raise ValueError(f"everything must be on one device: {[str(tensor.device) for tensor in used]}")
    if not all(x.dim() == 3 and x.dtype == q.dtype and x.stride(2) == 1 for x in (q, k, v)):
        raise ValueError("q and the exact rows are of one type, [n, heads, dim] with contiguous channels")
    if q.dtype not in NUMBER_TYPES or not len(q):
        raise ValueError(f"there are queries in float16, bfloat16 or float32: {q.dtype} {tuple(q.shape)}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)} and values {tuple(v.shape)}")
    if rows.filled.dtype != torch.int32 or rows.filled.shape != (2,):
        raise ValueError("filled is two int32: packed groups and exact rows")
    if rows.angles.sin.shape != cos.shape or cos.dtype != torch.float32 or not cos.is_contiguous():
        raise ValueError(f"angles are contiguous float32 [positions, dims/2], not {cos.dtype} {tuple(cos.shape)}")
    _check_packed(packed, k.shape[1] * k.shape[2], v.shape[1] * v.shape[2])


def _check_packed(packed: PackedGroups, k_channels: int, v_channels: int) -> None:
    if not all(x.is_contiguous() for x in vars(packed).values()):
        raise ValueError("packed groups are contiguous")
    of_v = (v_channels,) if packed.v_by_channel else (GROUP, -(-v_channels // GROUP))
    parts = ((packed.k_planes, packed.k_step, packed.k_first, k_channels, (k_channels,)),
             (packed.v_planes, packed.v_step, packed.v_first, v_channels, of_v))  # fmt: skip
    for planes, step, first, channels, extent in parts:
        groups, bits, length = planes.shape
        if planes.dtype != torch.uint8 or not 1 <= bits <= 8 or length != GROUP * channels // 8:
            raise ValueError(f"planes are uint8 [groups, 1..8, {GROUP * channels // 8}], not {tuple(planes.shape)}")
        if not step.shape == first.shape == (groups, *extent) or step.dtype != first.dtype:
            raise ValueError(f"steps and first points are {(groups, *extent)}, not {tuple(step.shape)}")
