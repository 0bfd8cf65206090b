"""What codes cost and lose, on numbers that resemble a model's: the yardstick of tests and of `quire bench codec`.

Knows nothing of models: what a model makes of the lost precision is measured on the model.
"""

from dataclasses import dataclass

import numpy as np

from quire_engine.kv.parts import to_parts
from quire_engine.types import Float16, GridName
from quire_kernels.grids import GRIDS
from quire_kernels.place import PackedTensor, dequantize
from quire_kernels.planes import pack
from quire_kernels.quantize import quantize_keys, quantize_values

TOKENS = 512
CHANNELS = 128
_OUTLIERS, _OUTLIER_ENERGY = 4, 0.73
_MEMORY = 0.4  # of a key for the token before; reproduces the published errors of min/max codes


@dataclass(frozen=True)
class Distortion:
    """error: noise over the energy around each channel's mean, as a ratio of L2 norms.

    bits_per_value: of codes and grid.
    """

    error: float
    bits_per_value: float


def keys(seed: int) -> Float16:
    """[TOKENS, CHANNELS] in which 4 channels carry 73 % of the energy, and tokens resemble the one before."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((TOKENS, CHANNELS))
    rows = [noise[0]]
    for fresh in noise[1:]:
        rows.append(_MEMORY * rows[-1] + np.sqrt(1 - _MEMORY**2) * fresh)
    energy = np.full(CHANNELS, (1 - _OUTLIER_ENERGY) / (CHANNELS - _OUTLIERS))
    energy[rng.permutation(CHANNELS)[:_OUTLIERS]] = _OUTLIER_ENERGY / _OUTLIERS
    deviation = np.sqrt(energy)
    return np.asarray(np.stack(rows) * deviation + 2 * deviation * rng.standard_normal(CHANNELS), np.float16)


def values(seed: int) -> Float16:
    """[TOKENS, CHANNELS] of independent normal numbers."""
    return np.random.default_rng(seed).standard_normal((TOKENS, CHANNELS)).astype(np.float16)


def of_keys(x: Float16, bits: int, planes: int, grid: GridName) -> Distortion:
    """What remains of keys when the top `planes` of `bits`-bit codes are kept."""
    codes, points = quantize_keys(x, bits, GRIDS[grid])
    return _measure(
        x, PackedTensor(tuple(pack(codes.ravel(), bits)[:planes]), bits, len(x), x.shape[1], points, by_channel=True)
    )


def of_values(x: Float16, bits: int, planes: int, grid: GridName) -> Distortion:
    """What remains of values when the top `planes` of `bits`-bit codes are kept."""
    codes, points = quantize_values(x, bits, GRIDS[grid])
    return _measure(
        x, PackedTensor(tuple(pack(codes.ravel(), bits)[:planes]), bits, len(x), x.shape[1], points, by_channel=False)
    )


def _measure(x: Float16, kept: PackedTensor) -> Distortion:
    exact = x.astype(np.float64)
    error = np.linalg.norm(dequantize(kept) - exact) / np.linalg.norm(exact - exact.mean(0))
    return Distortion(float(error), 8 * sum(map(len, to_parts(kept))) / x.size)
