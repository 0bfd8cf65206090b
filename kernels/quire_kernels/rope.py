"""Rotary position embedding: turns keys to a position, or back.

Knows nothing of models or files; what a model's GGUF says about RoPE arrives as plain numbers.
Angles follow llama.cpp (`ggml_rope_ext`): theta_i = position * scale * base^(-2i/dims) / factor_i.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Layout = Literal["adjacent", "halves"]


def angles(
    positions: npt.ArrayLike, dims: int, base: float, scale: float = 1.0, factors: Sequence[float] = ()
) -> tuple[Float32, Float32]:
    """Cosines and sines for every position and channel pair, two float32 arrays [tokens, dims/2].

    positions: token indices [tokens].  dims: rotated channels per head, even.  base: theta.  scale: position
    multiplier.  factors: frequency divisors [dims/2] (Llama 3), empty for none.
    Raises ValueError when dims is odd or the factors are not one per pair.
    """
    if dims % 2:
        raise ValueError(f"RoPE rotates pairs of channels, so dims cannot be {dims}")
    if len(factors) not in (0, dims // 2):
        raise ValueError(f"{len(factors)} frequency factors for {dims // 2} channel pairs")
    frequencies = scale * base ** (-2.0 * np.arange(dims // 2) / dims)
    if factors:
        frequencies = frequencies / np.asarray(factors, np.float64)
    # float64 until here: at position 100,000 a float32 angle is off by up to 0.004 radians.
    theta = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.cos(theta).astype(np.float32), np.sin(theta).astype(np.float32)


def rotate(k_pre: npt.NDArray[np.floating], cos: Float32, sin: Float32, layout: Layout) -> Float32:
    """Keys before RoPE -> keys at their positions, both [tokens, kv_heads, head_dim]; the result is float32.

    cos, sin: [tokens, dims/2] from `angles`; channels from dims on pass through unchanged.
    layout: "adjacent" pairs channels (0,1), (2,3)...; "halves" pairs (0, dims/2), (1, dims/2 + 1)...
    """
    k = np.array(k_pre, np.float32, order="C")
    rotate_inplace(k, cos, sin, layout)
    return k


def unrotate(k_rot: npt.NDArray[np.floating], cos: Float32, sin: Float32, layout: Layout) -> Float32:
    """The inverse of `rotate`: keys at their positions -> keys before RoPE."""
    return rotate(k_rot, cos, -sin, layout)


def rotate_inplace(k: Float32, cos: Float32, sin: Float32, layout: Layout) -> None:
    """`rotate` that overwrites k, a float32 array [tokens, kv_heads, head_dim] with contiguous channels."""
    pairs = cos.shape[1]
    c, s = cos[:, None, :], sin[:, None, :]  # [tokens, 1, pairs], the same for every head
    if layout == "adjacent":
        # A pair of neighbours is a complex number and its rotation one complex product: a single pass.
        k_complex = k[..., : 2 * pairs].view(np.complex64)
        k_complex *= c + 1j * s
        return
    first, second = k[..., :pairs], k[..., pairs : 2 * pairs]
    rotated_first = first * c - second * s
    second *= c
    second += first * s
    first[...] = rotated_first
