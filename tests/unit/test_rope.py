"""RoPE against a loop over pairs, and against its own inverse."""

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_kernels.rope import Layout, angles, rotate, unrotate

LAYOUTS = get_args(Layout)


def rotate_slowly(
    k: np.ndarray,
    positions: list[int],
    dims: int,
    base: float,
    scale: float,
    factors: list[float],
    layout: Layout,
) -> np.ndarray:
    out = k.astype(np.float64)
    for token, position in enumerate(positions):
        for pair in range(dims // 2):
            theta = position * scale * base ** (-2 * pair / dims) / factors[pair]
            i, j = (2 * pair, 2 * pair + 1) if layout == "adjacent" else (pair, pair + dims // 2)
            a, b = k[token, :, i].astype(np.float64), k[token, :, j].astype(np.float64)
            out[token, :, i] = a * math.cos(theta) - b * math.sin(theta)
            out[token, :, j] = a * math.sin(theta) + b * math.cos(theta)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "dims"), [(8, 8), (64, 64), (16, 8), (2, 2)])
def test_equals_the_loop_over_pairs(layout: Layout, head_dim: int, dims: int) -> None:
    rng = np.random.default_rng(head_dim)
    k_pre = rng.standard_normal((5, 3, head_dim)).astype(np.float32)
    positions, factors = [0, 1, 17, 4095, 131071], list(rng.uniform(1, 8, dims // 2))
    cos, sin = angles(positions, dims, 10000.0, 0.25, factors)
    expected = rotate_slowly(k_pre, positions, dims, 10000.0, 0.25, factors, layout)
    np.testing.assert_allclose(rotate(k_pre, cos, sin, layout), expected, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 5),
    start=st.integers(0, 1_000_000),
    seed=st.integers(0, 999),
)
def test_unrotate_undoes_rotate(
    layout: Layout, tokens: int, heads: int, pairs: int, rest: int, start: int, seed: int
) -> None:
    k_pre = np.random.default_rng(seed).standard_normal((tokens, heads, 2 * pairs + rest)).astype(np.float32)
    before = k_pre.copy()
    cos, sin = angles(np.arange(start, start + tokens), 2 * pairs, 10000.0)
    k_rot = rotate(k_pre, cos, sin, layout)
    np.testing.assert_array_equal(k_pre, before)
    np.testing.assert_allclose(unrotate(k_rot, cos, sin, layout), k_pre, atol=4e-6)
    np.testing.assert_array_equal(k_rot[..., 2 * pairs :], k_pre[..., 2 * pairs :])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_distance_between_query_and_key_counts(layout: Layout) -> None:
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 64)).astype(np.float32)
    near, far = (
        rotate(q, *angles([offset + 30], 64, 1e4), layout).ravel()
        @ rotate(k, *angles([offset], 64, 1e4), layout).ravel()
        for offset in (0, 8000)
    )
    assert near == pytest.approx(far, abs=1e-4)
    assert near != pytest.approx(float(q.ravel() @ k.ravel()), abs=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_position_zero_changes_nothing(layout: Layout) -> None:
    k_pre = np.random.default_rng(2).standard_normal((1, 2, 16)).astype(np.float32)
    np.testing.assert_array_equal(rotate(k_pre, *angles([0], 16, 1e4), layout), k_pre)


def test_far_positions_keep_their_precision() -> None:
    cos, sin = angles([1_000_003], 4, 10000.0)
    theta = 1_000_003 * 10000.0**-0.5
    assert cos[0] == pytest.approx([math.cos(1_000_003), math.cos(theta)], abs=1e-7)
    assert sin[0] == pytest.approx([math.sin(1_000_003), math.sin(theta)], abs=1e-7)


def test_refuses_what_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="dims cannot be 7"):
        angles([0], 7, 1e4)
    with pytest.raises(ValueError, match="3 frequency factors for 4"):
        angles([0], 8, 1e4, 1.0, [1.0, 2.0, 3.0])
