"""Token scores against their formulas written out slowly."""

import math

import numpy as np
import pytest

from quire_engine.selection import deviation, probe, sensitivity, spectral
from quire_engine.types import Float16, ModelShape, Rope
from quire_kernels import attention


def random_kv(layers: int, tokens: int, kv_heads: int, dim: int, seed: int = 0) -> Float16:
    return np.random.default_rng(seed).standard_normal((layers, tokens, kv_heads, dim)).astype(np.float16)


# CacheTune's spectral score


def spectral_slowly(k: Float16, v: Float16, alpha: float, high: bool = False) -> list[float]:
    """Every channel through a discrete Fourier transform written out as sums, low bins kept, or high ones."""
    layers, tokens = k.shape[:2]
    bins = range(tokens // 2 + 1)
    cut = int(alpha * len(bins))
    scores = [0.0] * tokens
    for layer in range(layers):
        norms = np.zeros(tokens)
        for x in (k[layer], v[layer]):
            channels = x.reshape(tokens, -1).astype(np.float64)
            smooth = np.zeros_like(channels)
            for bin_ in bins[cut:] if high else bins[:cut]:
                wave = np.exp(-2j * math.pi * bin_ * np.arange(tokens) / tokens)
                coefficient = wave @ channels  # [channels]
                mirrored = 1 if bin_ == 0 or 2 * bin_ == tokens else 2
                smooth += mirrored * (np.outer(wave.conj(), coefficient)).real / tokens
            norms += np.sqrt(np.square(smooth).sum(axis=1)) / 2
        for token in range(tokens):
            scores[token] += norms[token] / norms.sum() / layers
    return scores


@pytest.mark.parametrize(("tokens", "alpha"), [(2, 0.5), (7, 0.5), (32, 0.5), (33, 0.3), (16, 1.0)])
def test_spectral_equals_the_slow_formula(tokens: int, alpha: float) -> None:
    k, v = random_kv(3, tokens, 2, 4), random_kv(3, tokens, 2, 6, seed=1)
    scores = spectral.score(k, v, alpha)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, spectral_slowly(k, v, alpha), rtol=1e-4)
    assert scores.sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("tokens", "alpha"), [(2, 0.5), (7, 0.5), (32, 0.5), (33, 0.3)])
def test_highpass_equals_the_slow_formula_and_is_the_complement(tokens: int, alpha: float) -> None:
    k, v = random_kv(3, tokens, 2, 4), random_kv(3, tokens, 2, 6, seed=1)
    scores = spectral.score(k, v, alpha, high=True)
    np.testing.assert_allclose(scores, spectral_slowly(k, v, alpha, high=True), rtol=1e-4)
    flat = np.ones_like(k)
    assert spectral.score(flat, flat, alpha, high=True).max() < 1e-3 < spectral.score(flat, flat, alpha).min()


def test_bands_by_name() -> None:
    k, v = random_kv(2, 20, 2, 4), random_kv(2, 20, 2, 4, seed=1)
    for name, expected in {
        "spectral": spectral.score(k, v, 0.5),
        "spectral:0.3": spectral.score(k, v, 0.3),
        "highpass": spectral.score(k, v, 0.5, high=True),
        "highpass:0.2": spectral.score(k, v, 0.2, high=True),
    }.items():
        assert spectral.canonical(name) == name
        np.testing.assert_array_equal(spectral.named(name, k, v), expected)


def test_spectral_follows_slow_changes_only() -> None:
    """A hill over many tokens counts, as much energy flickering from token to token does not."""
    tokens = 64
    k = np.zeros((1, tokens, 1, 2), np.float16)
    k[0, :, 0, 0] = 1.0
    k[0, 16:32, 0, 0] = 3.0
    k[0, 40:56, 0, 1] = 3.0 * np.tile([1, -1], 8)
    scores = spectral.score(k, k)
    assert scores[18:30].min() > 2 * scores[42:54].max()


# CacheBlend's value deviation


def test_value_deviation_is_the_norm_over_all_layers_but_the_first() -> None:
    stored = random_kv(3, 4, 2, 8)
    fresh = stored.copy()
    fresh[0] += np.float16(9)  # rounding of a quantised first layer says nothing
    fresh[1, 2, 0, 0] += np.float16(3)
    fresh[2, 2, 1, 5] -= np.float16(4)
    scores = deviation.score(fresh, stored)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0, 0, 5, 0], rtol=5e-3)


def test_a_model_of_one_layer_has_nothing_else_to_compare() -> None:
    stored = random_kv(1, 4, 1, 4)
    assert deviation.compared_layers(1) == 1
    np.testing.assert_allclose(deviation.score(stored + np.float16(1), stored), np.full(4, 2.0), rtol=5e-3)


# Sensitivity


def test_no_difference_is_no_sensitivity() -> None:
    k, v = random_kv(4, 20, 2, 8), random_kv(4, 20, 2, 8, seed=1)
    np.testing.assert_array_equal(sensitivity.score((k, v), (k[:1], v[:1])), np.zeros(20))


def test_sensitivity_is_the_deviation_relative_to_the_layers_mean() -> None:
    k, v = random_kv(4, 5, 2, 8), random_kv(4, 5, 2, 8, seed=1)
    moved_k, moved_v = k[:2].copy(), v[:2].copy()
    moved_k[0, 3, 1, :4] += np.float16(2)  # a deviation of 4 in one of 5 tokens: 5 times the mean
    moved_v[1, 1, 0, 0] += np.float16(8)
    moved_v[1, 2, 0, 0] -= np.float16(8)  # 8 in two of 5 tokens: 2.5 times the mean each
    scores = sensitivity.score((k, v), (moved_k, moved_v))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.array([0, 2.5, 2.5, 5, 0]) / 2, rtol=5e-3)


@pytest.mark.parametrize(("layers", "early"), [(1, 1), (2, 2), (8, 2), (30, 8), (32, 8)])
def test_early_layers(layers: int, early: int) -> None:
    assert sensitivity.early_layers(layers) == early


# The question's attention


def mass_slowly(q: np.ndarray, k: np.ndarray) -> list[list[float]]:
    """q [queries][heads][dim], k [keys][kv_heads][dim]: a loop over everything."""
    (queries, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    result = [[0.0] * keys for _ in range(heads)]
    for query in range(queries):
        for head in range(heads):
            group = head * kv_heads // heads
            weights = [
                math.exp(sum(float(q[query, head, c]) * float(k[key, group, c]) for c in range(dim)) / math.sqrt(dim))
                for key in range(keys)
            ]
            for key in range(keys):
                result[head][key] += weights[key] / sum(weights)
    return result


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_mass_equals_the_loop(heads: int, kv_heads: int) -> None:
    random = np.random.default_rng(heads)
    q = random.standard_normal((5, heads, 8)).astype(np.float32)
    k = random.standard_normal((11, kv_heads, 8)).astype(np.float16)
    mass = attention.mass(q, k)
    np.testing.assert_allclose(mass, mass_slowly(q, k), rtol=1e-5)
    np.testing.assert_allclose(mass.sum(axis=1), 5.0, rtol=1e-5)


def test_mass_of_huge_logits_is_finite() -> None:
    q, k = np.full((1, 1, 4), 1e4, np.float32), np.array([[[1.0] * 4], [[-1.0] * 4]], np.float32)
    np.testing.assert_array_equal(attention.mass(q, k), [[1.0, 0.0]])


@pytest.mark.parametrize("k_shape", [(5, 3, 8), (5, 2, 4)], ids=["heads", "dim"])
def test_mass_refuses_what_does_not_fit(k_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        attention.mass(np.zeros((2, 4, 8), np.float32), np.zeros(k_shape, np.float32))


def test_probe_takes_the_largest_head_and_the_mean_layer() -> None:
    shape = ModelShape("llama", 4, 4, 2, 8, 8, 128, Rope("adjacent", 8, 1e4))
    random = np.random.default_rng(0)
    rows = [random.standard_normal((10, 16)).astype(np.float16) for _ in range(4)]
    queries = {layer: random.standard_normal(3 * 4 * 8).astype(np.float32) for layer in (1, 2)}
    expected = np.mean(
        [
            np.max(mass_slowly(queries[layer].reshape(3, 4, 8), rows[layer][:7].reshape(7, 2, 8)), axis=0)
            for layer in (1, 2)
        ],
        axis=0,
    )
    np.testing.assert_allclose(probe.mass(queries, rows, shape, 7), expected, rtol=1e-5)


@pytest.mark.parametrize(("layers", "probed"), [(1, [0]), (2, [1]), (4, [2]), (30, list(range(18, 24)))])
def test_probed_layers(layers: int, probed: list[int]) -> None:
    assert list(probe.probed_layers(layers)) == probed
