"""Token scores from a chunk's own KV in the frequency domain: CacheTune's rule (arXiv 2605.24022).

Offline: computed once per chunk while it is encoded. Knows nothing of the question.
"""

import numpy as np

from quire_engine.types import Float16, Float32

ALPHA = 0.5  # the published share of frequency bins that is kept


def score(k_pre: Float16, v: Float16, alpha: float = ALPHA) -> Float32:
    """Score per token [tokens], summing to 1 (0 for a single token): per layer, the norm of the low-passed K and V over
    heads and channels, averaged, as a share of the layer's sum over tokens; then the mean over layers.

    k_pre, v: [layers, tokens, kv_heads, dim].  alpha: share of rFFT bins along the token axis that is kept.
    """
    shares = np.zeros(k_pre.shape[1], dtype=np.float32)
    for layer_k, layer_v in zip(k_pre, v, strict=True):
        norms = (_low_pass_norms(layer_k, alpha) + _low_pass_norms(layer_v, alpha)) / 2
        shares += norms / max(float(norms.sum()), 1e-12)
    return shares / np.float32(len(k_pre))


def _low_pass_norms(x: Float16, alpha: float) -> Float32:
    """L2 norm per token [tokens] of x [tokens, kv_heads, dim] after keeping only the lowest frequencies."""
    tokens = len(x)
    spectrum = np.fft.rfft(x.reshape(tokens, -1).astype(np.float32), axis=0)
    spectrum[int(alpha * len(spectrum)) :] = 0
    smooth = np.fft.irfft(spectrum, n=tokens, axis=0)
    return np.asarray(np.linalg.norm(smooth, axis=1), dtype=np.float32)
