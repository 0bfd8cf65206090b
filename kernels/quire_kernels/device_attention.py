"""Selective attention on a device: a few scattered queries, each at its own position, over a whole prompt's KV.

A query at position p sees the rows 0..p and nothing else, whatever stands behind them. The specification is in
PyTorch's operations, which materialise [queries, rows] in slices; `triton_attention` is the kernel.
Knows nothing of models; queries and keys are rotated.
"""

import torch
from torch import Tensor

from quire_kernels import dispatch

NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 256
# Logits in work at once.
_SLICE_NUMBERS = 1 << 24


def attend(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, form: dispatch.Wish = "auto") -> Tensor:
    """What each query gathers: [queries, heads, value_dim] in q's type.

    q: [queries, heads, dim].  positions: int32 [queries], 0 to rows - 1, in any order; rising ones are fast, because
    neighbours then stop at about the same row.  k: [rows, kv_heads, dim], v: [rows, kv_heads, value_dim], row i at
    position i, channels contiguous; query head h reads KV head h // (heads / kv_heads).  dim: up to 256.
    Floor: 2 * heads * (dim + value_dim) operations for every pair of a query and a row it sees; in bytes, k and v up to
    the last position, q and the result once.  Raises ValueError when the arguments do not fit together.
    """
    _check(q, positions, k, v)
    if not len(q):
        return q.new_empty(0, q.shape[1], v.shape[2])
    if dispatch.choose(q.device, form) == "triton":
        from quire_kernels import triton_attention

        return triton_attention.launch(q, positions, k, v)
    at_once = max(1, _SLICE_NUMBERS // (q.shape[1] * len(k)))
    slices = range(0, len(q), at_once)
    return torch.cat([_attend(q[i : i + at_once], positions[i : i + at_once], k, v) for i in slices])


def _attend(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv_heads, dim = k.shape[1:]
    grouped = q.reshape(len(q), kv_heads, -1, dim).permute(1, 2, 0, 3).to(torch.float32)  # [kv_heads, group, n, dim]
    logits = grouped @ k.permute(1, 2, 0)[:, None].to(torch.float32) * dim**-0.5
    seen = torch.arange(len(k), device=k.device) <= positions[:, None]
    weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    # Rows that no query sees may hold anything, even what is not a number.
    values = v.masked_fill(~seen.any(dim=0)[:, None, None], 0).permute(1, 0, 2)[:, None].to(torch.float32)
    gathered: Tensor = weights @ values
    return gathered.permute(2, 0, 1, 3).reshape(len(q), q.shape[1], -1).to(q.dtype)


def _check(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
    if len({tensor.device for tensor in (q, positions, k, v)}) > 1:
        raise ValueError(f"everything must be on one device: {[str(x.device) for x in (q, positions, k, v)]}")
    if not all(x.dim() == 3 and x.dtype == q.dtype and x.stride(2) == 1 for x in (q, k, v)):
        raise ValueError("q, k and v are of one type, [n, heads, dim] with contiguous channels")
    if q.dtype not in NUMBER_TYPES:
        raise ValueError(f"numbers are float16, bfloat16 or float32, not {q.dtype}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k.shape)} and values {tuple(v.shape)}")
    if not (1 <= k.shape[2] <= MAX_DIM and 1 <= v.shape[2] <= MAX_DIM and len(k)):
        raise ValueError(f"there are keys, and heads have up to {MAX_DIM} channels: {tuple(k.shape)}, {tuple(v.shape)}")
    if positions.dtype != torch.int32 or positions.shape != (len(q),) or not positions.is_contiguous():
        raise ValueError(f"positions are {len(q)} int32, not {positions.dtype} {tuple(positions.shape)}")
