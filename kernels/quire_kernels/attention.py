"""Attention mass: how much a few queries look at each of many keys. Plain NumPy, the specification of the kernel.

Knows nothing of models; queries and keys are already rotated.
"""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def mass(q_rot: Float32, k_rot: npt.NDArray[np.floating]) -> Float32:
    """Softmax weight per head and key, summed over the queries: [heads, keys], each row sums to the query count.

    q_rot: [queries, heads, dim].  k_rot: [keys, kv_heads, dim], all of them before every query; query head h reads
    KV head h // (heads / kv_heads).  The queries' attention to one another is left out.
    Floor: 2 * queries * heads * keys * dim multiply-adds, keys read once.
    """
    queries, heads, dim = q_rot.shape
    kv_heads = k_rot.shape[1]
    if heads % kv_heads or k_rot.shape[2] != dim:
        raise ValueError(f"queries {q_rot.shape} do not fit keys {k_rot.shape}")
    grouped = q_rot.reshape(queries, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)
    keys = k_rot.transpose(1, 2, 0).astype(np.float32)  # [kv_heads, dim, keys]
    logits = grouped.reshape(kv_heads, -1, dim) @ keys
    logits *= dim**-0.5
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits.reshape(heads, queries, -1).sum(axis=1)  # type: ignore[no-any-return]
