"""The kernel of `device_attention`: flash attention for scattered queries.

A tile is a few neighbouring queries with all heads that share a KV head, so that a key is read once for all of them. It
stops at its own largest position, and needs no mask below its smallest. The tiles that reach furthest start first:
what starts last is short. Knows nothing of checks (`device_attention`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.ahead import Build

WARPS, STAGES = 8, 2
_LOG2_E = 1.4426950408889634


@triton.jit
def _step(
    q, k, v, highest, weight, total, position, scale, start, last, k_stride, v_stride,
    dim: tl.constexpr, v_dim: tl.constexpr, masked: tl.constexpr, key_block: tl.constexpr, dim_block: tl.constexpr,
    v_block: tl.constexpr,
):  # fmt: skip
    """A block of keys taken into the running maximum, weight and total of every query (online softmax)."""
    key = start + tl.arange(0, key_block)
    channel, v_channel = tl.arange(0, dim_block), tl.arange(0, v_block)
    row = key.to(tl.int64)
    k_at = k + row[None, :] * k_stride + channel[:, None]
    v_at = v + row[:, None] * v_stride + v_channel[None, :]
    if masked:  # behind the tile's last position the buffer may hold anything
        there = key <= last
        keys = tl.load(k_at, mask=there[None, :] & (channel < dim)[:, None], other=0.0)
        values = tl.load(v_at, mask=there[:, None] & (v_channel < v_dim)[None, :], other=0.0)
    else:
        keys = tl.load(k_at, mask=(channel < dim)[:, None], other=0.0)
        values = tl.load(v_at, mask=(v_channel < v_dim)[None, :], other=0.0)
    logits = tl.dot(q, keys, input_precision="ieee")
    if masked:
        logits = tl.where(key[None, :] <= position[:, None], logits, float("-inf"))
    # Key 0 is in the first block and every query sees it: no maximum stays at minus infinity.
    new = tl.maximum(highest, tl.max(logits, axis=1) * scale)
    powers = tl.exp2(logits * scale - new[:, None])
    kept = tl.exp2(highest - new)
    weight = weight * kept + tl.sum(powers, axis=1)
    total = tl.dot(powers.to(values.dtype), values, total * kept[:, None], input_precision="ieee")
    return new, weight, total


@triton.jit
def _attend(
    q, positions, k, v, out, queries, scale,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, dim_block: tl.constexpr, v_block: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tile * row_block + tl.arange(0, row_block)
    inside = row < queries * group
    # Rows beyond the last repeat it, and leave the tile's smallest position as it is.
    query = tl.minimum(row // group, queries - 1)
    head = kv_head * group + row % group
    position = tl.load(positions + query)
    first, last = tl.min(position, axis=0), tl.max(position, axis=0)
    channel, v_channel = tl.arange(0, dim_block), tl.arange(0, v_block)
    at = query.to(tl.int64) * q_stride + head * q_head_stride
    mine = tl.load(q + at[:, None] + channel[None, :], mask=(channel < dim)[None, :], other=0.0)
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    highest = tl.full([row_block], float("-inf"), tl.float32)
    weight = tl.zeros([row_block], tl.float32)
    total = tl.zeros([row_block, v_block], tl.float32)
    seen_by_all = (first + 1) // key_block * key_block
    for start in range(0, seen_by_all, key_block):
        highest, weight, total = _step(
            mine, k, v, highest, weight, total, position, scale, start, last, k_stride, v_stride,
            dim, v_dim, False, key_block, dim_block, v_block,
        )  # fmt: skip
    for start in range(seen_by_all, last + 1, key_block):
        highest, weight, total = _step(
            mine, k, v, highest, weight, total, position, scale, start, last, k_stride, v_stride,
            dim, v_dim, True, key_block, dim_block, v_block,
        )  # fmt: skip
    to = out + (query.to(tl.int64) * heads + head)[:, None] * v_dim + v_channel[None, :]
    result = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(to, result, mask=inside[:, None] & (v_channel < v_dim)[None, :])


def launch(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`device_attention.attend` with arguments that fit together."""
    queries, heads, dim = q.shape
    kv_heads, v_dim = v.shape[1:]
    out = torch.empty(queries, heads, v_dim, dtype=q.dtype, device=q.device)
    constants = constants_of(heads, kv_heads, dim, v_dim, q.element_size())
    grid = (triton.cdiv(queries * (heads // kv_heads), constants["row_block"]), kv_heads)
    _attend[grid](
        q, positions, k, v, out, queries, dim**-0.5 * _LOG2_E,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        **constants, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def constants_of(heads: int, kv_heads: int, dim: int, v_dim: int, number_bytes: int) -> dict[str, int]:
    """What the kernel is compiled for: such that two stages of blocks fit 99 KiB of shared memory."""
    dim_block, v_block = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    wide = max(dim_block, v_block) * number_bytes > 256
    return {
        "heads": heads,
        "group": heads // kv_heads,
        "dim": dim,
        "v_dim": v_dim,
        "row_block": 64 if wide else 128,
        "key_block": 32 if wide else 64,
        "dim_block": dim_block,
        "v_block": v_block,
    }


def _build(name: str, number: str, heads: int, kv_heads: int, dim: int) -> Build:
    types = {"q": f"*{number}", "k": f"*{number}", "v": f"*{number}", "out": f"*{number}", "positions": "*i32"}
    strides = ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride")
    types |= {"queries": "i32", "scale": "fp32"} | dict.fromkeys(strides, "i32")
    constants = constants_of(heads, kv_heads, dim, dim, number_bytes=2)
    return Build(f"attention {name}", _attend, types, constants, ("queries",), WARPS, STAGES)


BUILDS = (
    _build("128 channels, 32/8 heads, bf16", "bf16", 32, 8, 128),
    _build("64 channels, 9/3 heads", "fp16", 9, 3, 64),
    _build("80 channels, 32/32 heads", "fp16", 32, 32, 80),
    _build("256 channels, 8/4 heads", "fp16", 8, 4, 256),
)
