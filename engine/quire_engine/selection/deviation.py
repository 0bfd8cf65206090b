"""Token scores from how far stored values are from those of this very prompt: CacheBlend's rule (arXiv 2405.16444).

Online: the first layers of the whole context are computed again for every question, which costs their share of a full
prefill. Knows nothing of how.
"""

import numpy as np

from quire_engine.types import Float16, Float32


def compared_layers(layers: int) -> int:
    """How many layers are computed: the first depends on the token alone, the next two show what stands before it."""
    return min(layers, 3)


def score(fresh_v: Float16, stored_v: Float16) -> Float32:
    """L2 norm per token [tokens] of the difference over heads, channels and layers, the first of several left out: all
    that differs there is the rounding of stored values.

    fresh_v, stored_v: [layers, tokens, kv_heads, dim].
    """
    differing = slice(1, None) if len(fresh_v) > 1 else slice(None)
    difference = fresh_v[differing].astype(np.float32) - stored_v[differing].astype(np.float32)
    return np.asarray(np.sqrt(np.square(difference).sum(axis=(0, 2, 3))), dtype=np.float32)
