"""Token scores from a chunk's own KV in the frequency domain: CacheTune's rule (arXiv 2605.24022), and its complement.

Offline: computed once per chunk while it is encoded, and known by a name: `spectral`, `highpass`, or with another share
of frequencies `spectral:0.3`. Knows nothing of the question.
"""

import numpy as np

from quire_engine.types import Float16, Float32

ALPHA = 0.5  # the published share of frequency bins that is kept
NAMES = ("spectral", "highpass")


def canonical(name: str) -> str:
    """The one spelling of a score's name. Raises ValueError for what is none."""
    band, given, share = name.partition(":")
    alpha = float(share) if given else ALPHA
    if band not in NAMES or not 0 < alpha < 1:
        raise ValueError(f"{name!r} is no band of frequencies")
    return band if alpha == ALPHA else f"{band}:{alpha:g}"


def named(name: str, k_pre: Float16, v: Float16) -> Float32:
    """The score of a canonical name."""
    band, given, share = name.partition(":")
    return score(k_pre, v, float(share) if given else ALPHA, high=band == "highpass")


def score(k_pre: Float16, v: Float16, alpha: float = ALPHA, high: bool = False) -> Float32:
    """Score per token [tokens], summing to 1 (0 for a single token): per layer, the norm of the low-passed K and V over
    heads and channels, averaged, as a share of the layer's sum over tokens; then the mean over layers.

    k_pre, v: [layers, tokens, kv_heads, dim].  alpha: share of rFFT bins along the token axis that is low.
    high: keep the others.
    """
    shares = np.zeros(k_pre.shape[1], dtype=np.float32)
    for layer_k, layer_v in zip(k_pre, v, strict=True):
        norms = (_band_norms(layer_k, alpha, high) + _band_norms(layer_v, alpha, high)) / 2
        shares += norms / max(float(norms.sum()), 1e-12)
    return shares / np.float32(len(k_pre))


def _band_norms(x: Float16, alpha: float, high: bool) -> Float32:
    """L2 norm per token [tokens] of x [tokens, kv_heads, dim] after keeping only the low frequencies, or the high."""
    tokens = len(x)
    spectrum = np.fft.rfft(x.reshape(tokens, -1).astype(np.float32), axis=0)
    cut = int(alpha * len(spectrum))
    spectrum[slice(cut) if high else slice(cut, None)] = 0
    kept = np.fft.irfft(spectrum, n=tokens, axis=0)
    return np.asarray(np.linalg.norm(kept, axis=1), dtype=np.float32)
