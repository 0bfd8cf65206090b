"""Token scores from how much a token's KV depends on what stands before its chunk.

A chunk is read twice: behind the preamble, as it is stored, and behind the preamble and unrelated text. Tokens whose
KV differs are those that reuse gets wrong. Offline, and knows nothing of the question. The second reading stops
after the first layers: they rank tokens as all layers do (docs/decisions/selection.md), at a fraction of the cost.
"""

import numpy as np

from quire_engine.types import Float16, Float32

UNRELATED_TEXT = """\
The lighthouse keeper wrote down the weather every morning before breakfast. On calm days the page held a single line;
in winter it filled with wind and broken glass. Years later a teacher found the book in a market and read it aloud to
her class. Nobody in the room had seen the sea, yet they argued for an hour about whether the storm of that November
had come from the north or from the west, and which boats would have reached the harbour in time.

"""
UNRELATED_TOKENS = 96
_NEVER_ZERO = 1e-3  # layer 0 depends on the token alone and does not differ at all


def early_layers(layers: int) -> int:
    """How many layers the second reading computes."""
    return min(layers, max(2, round(layers / 4)))  # layer 0 depends on the token alone


def score(first: tuple[Float16, Float16], second: tuple[Float16, Float16]) -> Float32:
    """Score per token [tokens]: deviation of K and of V between two readings, each relative to its layer's mean,
    summed, mean over layers.

    first, second: K before RoPE and V, [layers, tokens, kv_heads, dim] each; as many layers as `second` has.
    """
    layers = len(second[0])
    total = np.zeros(second[0].shape[1], dtype=np.float32)
    for a, b in zip(first, second, strict=True):
        for layer in range(layers):
            difference = a[layer].astype(np.float32) - b[layer].astype(np.float32)
            deviation = np.sqrt(np.square(difference).sum(axis=(1, 2)))
            total += deviation / (_NEVER_ZERO + deviation.mean())
    return total / np.float32(layers)
