"""The question's own attention over reused rows: which tokens does it look at?

Measured as the best single signal for choosing what to recompute (docs/decisions/selection.md). Works on queries and
keys that a runtime captured; knows nothing of how.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from quire_engine.types import Float16, Float32, ModelShape
from quire_kernels import attention


def probed_layers(layers: int) -> range:
    """The layers whose attention is read: the fourth fifth, so that a probe can stop before the last one."""
    return range(layers * 3 // 5, max(layers * 3 // 5 + 1, layers * 4 // 5))


def mass(queries: Mapping[int, Float32], k_rot: Sequence[Float16], shape: ModelShape, tokens: int) -> Float32:
    """Attention mass per row [tokens]: the softmax weight summed over the question's tokens, the largest over heads,
    mean over layers.

    queries: layer -> flat rotated queries of [question, heads, key_dim].
    k_rot: per layer [rows, kv_heads * key_dim]; the first `tokens` rows are read.
    """
    total = np.zeros(tokens, dtype=np.float32)
    for layer, flat in queries.items():
        q_rot = flat.reshape(-1, shape.heads, shape.key_dim)
        keys = k_rot[layer][:tokens].reshape(tokens, shape.kv_heads, shape.key_dim)
        total += attention.mass(q_rot, keys).max(axis=0)
    return total / np.float32(len(queries))
