"""From a profile to a plan: bits go where they are worth most, and files keep to the budget."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_engine.precision import plans
from quire_engine.precision import profile as profiles
from quire_engine.precision.profile import K_BITS, UNKNOWN, V_BITS, Profile, k_widths, measured_plan, rope_pairs
from quire_engine.types import BitPlan, ModelShape, Rope

LAYERS = 6
SHAPE = ModelShape("llama", LAYERS, 4, 2, 16, 16, 2048, Rope("adjacent", 16, 10000.0))


def profile(seed: int = 0) -> Profile:
    """Noise that falls to a quarter with every bit, from a different height for every tensor."""
    random = np.random.default_rng(seed)
    heights = 10.0 ** random.uniform(-5, -1, (3, LAYERS, 1))
    k = heights[0] / 4 ** np.array(K_BITS)
    v, v_by_channel = heights[1:] / 4 ** np.array(V_BITS)
    weights = 10.0 ** random.uniform(-2, 2, (LAYERS, 16))
    norms = random.random((2, LAYERS))
    return Profile(*(np.asarray(a, np.float32) for a in (weights, k, v, v_by_channel, *norms)))


@pytest.mark.parametrize("layout", ["adjacent", "halves"])
@pytest.mark.parametrize("dims", [16, 8, 6])
def test_pairs_cover_every_channel_once_and_are_those_that_rope_rotates(layout: str, dims: int) -> None:
    shape = replace(SHAPE, rope=Rope(layout, dims, 10000.0))  # type: ignore[arg-type]
    first, second = rope_pairs(shape)
    assert sorted([*first, *second]) == list(range(32))
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    turned = {(0, 1), (2, 3)} if layout == "adjacent" else {(0, dims // 2), (1, dims // 2 + 1)}
    assert {(a + head, b + head) for a, b in turned for head in (0, 16)} <= pairs


@given(bits=st.sampled_from((0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)), seed=st.integers(0, 99))
def test_widths_have_the_mean_asked_for_and_spend_it_on_the_loudest(bits: float, seed: int) -> None:
    weights = np.asarray(10 ** np.random.default_rng(seed).uniform(-3, 3, 16), np.float32)
    widths = np.frombuffer(k_widths(weights, bits, SHAPE), np.uint8)
    first, second = rope_pairs(SHAPE)
    np.testing.assert_array_equal(widths[first], widths[second])
    assert widths.max() <= 8
    assert widths.mean() == pytest.approx(bits, abs=1 / 16)
    by_weight = widths[first][np.argsort(weights)].astype(int)
    assert (np.diff(by_weight) >= 0).all()


def test_equal_channels_have_equal_widths() -> None:
    assert set(k_widths(np.ones(16, np.float32), 3, SHAPE)) == {3}


@pytest.mark.parametrize("budget", [2.3, 2.8, 3.4, 4.5, 6.0])
def test_files_keep_to_the_budget_and_use_it(budget: float) -> None:
    plan = measured_plan(profile(), budget, SHAPE)
    bits = profiles.file_bits_per_value(plan, SHAPE)
    least = profiles.file_bits_per_value(measured_plan(profile(), 0, SHAPE), SHAPE)
    assert bits <= max(budget, least)
    assert bits > budget - 0.35 or bits == least
    assert profiles.file_bits_per_value(plan, SHAPE, tokens=500) < bits


def test_more_bits_never_cost_more_and_go_to_the_sensitive_first() -> None:
    measured = profile(3)
    loud = replace(measured, v=measured.v * np.float32(1e-6), v_by_channel=measured.v_by_channel * np.float32(1e-6))
    small, large = (measured_plan(loud, budget, SHAPE) for budget in (2.8, 4.5))
    assert all(a <= b for a, b in zip(small.v_bits, large.v_bits, strict=True))
    assert np.mean([np.mean(list(w)) for w in small.k_widths]) > np.mean(small.v_bits)


def test_values_are_grouped_as_their_layer_measured_better() -> None:
    measured = profile(1)
    tokens_better = replace(measured, v_by_channel=measured.v * np.float32(2))
    channels_better = replace(measured, v_by_channel=measured.v / np.float32(2))
    assert measured_plan(tokens_better, 3.4, SHAPE).v_by_channel == ()
    assert measured_plan(channels_better, 3.4, SHAPE).v_by_channel == tuple(range(LAYERS))


def test_a_profile_survives_being_kept(tmp_path: Path) -> None:
    kept = profile(2)
    profiles.save(kept, tmp_path / "profile.json")
    back = profiles.load(tmp_path / "profile.json")
    np.testing.assert_allclose(np.log2(back.k_weights), np.log2(kept.k_weights), atol=0.051)
    for name in ("k", "v", "v_by_channel", "k_importance", "v_importance"):
        np.testing.assert_allclose(getattr(back, name), getattr(kept, name), rtol=0.006)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "k": ["x"]}'])
def test_a_profile_that_cannot_be_read_is_none_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    assert profiles.load(tmp_path / "profile.json") is UNKNOWN
    assert profiles.load(tmp_path / "nothing.json") is UNKNOWN


def test_plans_by_name() -> None:
    sizes = [profiles.file_bits_per_value(plans.named(name, SHAPE, profile()), SHAPE) for name in plans.NAMES[:4]]
    assert sizes == sorted(sizes, reverse=True)
    assert plans.named("fp16", SHAPE, profile()) == BitPlan.exact(LAYERS)
    assert plans.named("kvmix", SHAPE, profile()).grid == "minmax"


@pytest.mark.parametrize("name", [*plans.BITS_PER_VALUE, "kvmix"])
def test_a_model_that_was_not_measured_is_stored_safely(name: str) -> None:
    assert plans.named(name, SHAPE, UNKNOWN) == BitPlan.uniform(LAYERS, 8, 8)


def test_the_first_folder_with_a_profile_wins(tmp_path: Path) -> None:
    fingerprint = bytes(range(32))
    name = plans.file_name(fingerprint)
    assert plans.find(fingerprint, (tmp_path / "own", tmp_path / "shipped")) is UNKNOWN
    profiles.save(profile(1), tmp_path / "shipped" / name)
    shipped = plans.find(fingerprint, (tmp_path / "own", tmp_path / "shipped"))
    profiles.save(profile(2), tmp_path / "own" / name)
    own = plans.find(fingerprint, (tmp_path / "own", tmp_path / "shipped"))
    assert not np.array_equal(own.k, shipped.k)
    assert plans.find(bytes(32), (tmp_path / "own", tmp_path / "shipped")) is UNKNOWN
