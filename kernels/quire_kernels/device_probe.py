"""Attention mass on a device: how much the question's queries look at each of many keys, without the matrix of both.

The specification is `attention.mass` in NumPy, followed by the largest or the mean over heads; here it stands in
PyTorch's operations, and in `triton_probe` as a kernel. Knows nothing of models; queries and keys are already rotated.
"""

from typing import Literal

import torch
from torch import Tensor

from quire_kernels import dispatch

Over = Literal["max", "mean"]

_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def mass(q_rot: Tensor, k_rot: Tensor, over: Over = "max", form: dispatch.Wish = "auto") -> Tensor:
    """Softmax weight per key, summed over the queries, then the largest or the mean over heads: float32 [keys].

    q_rot: [queries, heads, dim].  k_rot: [keys, kv_heads, dim], all of them before every query; query head h reads KV
    head h // (heads / kv_heads).  The queries' attention to one another is left out.  Any strides but the last.
    Floor: keys are read twice; 4 * queries * heads * keys * dim multiply-adds, since weights are computed once for
    their sums and once to be added up.  Raises ValueError when the arguments do not fit together.
    """
    _check(q_rot, k_rot, over)
    if dispatch.choose(k_rot.device, form) == "triton":
        from quire_kernels import triton_probe

        return triton_probe.launch(q_rot, k_rot, over)
    return _mass(q_rot, k_rot, over)


def _mass(q_rot: Tensor, k_rot: Tensor, over: Over) -> Tensor:
    """One KV head at a time: so the matrix stays [queries * heads of one, keys]."""
    heads, dim = q_rot.shape[1:]
    of_one = heads // k_rot.shape[1]
    found = []
    for kv_head in range(k_rot.shape[1]):
        q = q_rot[:, kv_head * of_one : (kv_head + 1) * of_one].float()
        weights = torch.softmax(torch.einsum("qhd,kd->qhk", q, k_rot[:, kv_head].float()) * dim**-0.5, dim=-1)
        per_head = weights.sum(0)
        found.append(per_head.amax(0) if over == "max" else per_head.sum(0))
    of_kv_heads = torch.stack(found)
    return of_kv_heads.amax(0) if over == "max" else of_kv_heads.sum(0) / heads


def _check(q_rot: Tensor, k_rot: Tensor, over: Over) -> None:
    if over not in ("max", "mean"):
        raise ValueError(f"over heads it is max or mean, not {over!r}")
    if q_rot.device != k_rot.device or q_rot.dtype != k_rot.dtype or q_rot.dtype not in _TYPES:
        raise ValueError(f"queries and keys are floats of one type on one device: {q_rot.dtype}, {k_rot.dtype}")
    if q_rot.dim() != 3 or k_rot.dim() != 3 or 0 in q_rot.shape or 0 in k_rot.shape:
        raise ValueError(f"there are queries and keys, [n, heads, dim]: {tuple(q_rot.shape)}, {tuple(k_rot.shape)}")
    if q_rot.shape[1] % k_rot.shape[1] or q_rot.shape[2] != k_rot.shape[2]:
        raise ValueError(f"queries {tuple(q_rot.shape)} do not fit keys {tuple(k_rot.shape)}")
    if q_rot.stride(2) != 1 or k_rot.stride(2) != 1:
        raise ValueError("channels of queries and keys are contiguous")
