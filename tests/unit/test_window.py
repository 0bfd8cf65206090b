"""The live window: which tokens are packed, what that saves, and that the others stay as they are."""

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_engine.kv import transfer
from quire_engine.kv.window import GROUP, LiveKV, Window
from quire_engine.types import BitPlan, Float16, ModelShape, Rope
from quire_kernels import rope

SHAPE = ModelShape("llama", 2, 16, 8, 64, 64, 4096, Rope("adjacent", 64, 10000.0))
PLAN = BitPlan((4, 3), (4, 2), sinks=4)
WINDOW = Window(100)
ROWS = tuple(
    np.random.default_rng(seed).standard_normal((2, 2000, 8, 64)).astype(np.float16) for seed in (1, 2)
)  # k_pre, v


def grown(tokens: int, step: int, plan: BitPlan = PLAN, window: Window = WINDOW) -> LiveKV:
    live = LiveKV(SHAPE, plan, window)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        live.append(ROWS[0][:, start:stop], ROWS[1][:, start:stop])
    return live


def exact(layer: int, tokens: int) -> tuple[Float16, Float16]:
    cos, sin = transfer.angles(range(tokens), SHAPE.rope)
    return rope.rotate(ROWS[0][layer, :tokens], cos, sin, "adjacent").astype(np.float16), ROWS[1][layer, :tokens]


@given(recent=st.integers(0, 500), tokens=st.integers(0, 5000), more=st.integers(0, 300))
def test_what_is_packed_is_whole_groups_outside_the_window_and_stays_packed(
    recent: int, tokens: int, more: int
) -> None:
    window = Window(recent)
    packed = window.groups(tokens) * GROUP
    assert 0 <= packed <= max(0, tokens - recent) < packed + GROUP
    assert window.groups(tokens + more) >= window.groups(tokens)


def test_memory_per_token_falls_as_the_conversation_grows() -> None:
    """From 16 bits per value towards what the plan says, grids included; the bytes are those of Python's allocator."""
    per_token = []
    full = 2 * SHAPE.values_per_token
    for tokens in (100, 400, 800, 1600):
        tracemalloc.start()
        live = grown(tokens, 1 if tokens == 400 else 50)
        allocated, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert live.memory_bytes < allocated < 1.1 * live.memory_bytes, "nothing else is kept but Python's objects"
        per_token.append(live.memory_bytes / tokens)
    assert per_token[0] == full
    assert all(later < 0.8 * earlier for earlier, later in pairwise(per_token))
    assert per_token[-1] < 0.35 * full
    never = grown(1600, 50, window=Window(10_000))
    assert never.memory_bytes == 1600 * full, "without a window nothing is saved"


def test_sinks_and_recent_tokens_are_exact_and_the_others_close() -> None:
    live = grown(400, 50)
    assert live.positions == range(400)
    assert live.packed_tokens == 4 + 4 * GROUP
    for layer in range(2):
        for found, true in zip(live.rows(layer), exact(layer, 400), strict=True):
            exactly = [*range(4), *range(live.packed_tokens, 400)]
            np.testing.assert_allclose(found[exactly], true[exactly], atol=0.003)
            middle = slice(4, live.packed_tokens)
            wrong, right = ((found - true)[middle].astype(np.float32), true[middle].astype(np.float32))
            error = np.linalg.norm(wrong) / np.linalg.norm(right)
            assert 0.02 < error < 0.5
            assert all(np.corrcoef(found[t].ravel(), true[t].ravel())[0, 1] > 0.8 for t in range(4, 400))


def test_rows_do_not_depend_on_how_the_tokens_came() -> None:
    """One at a time, as an answer grows, or all at once, as a prompt is read: no group is packed twice."""
    for layer in range(2):
        slowly, fast, at_once = (grown(333, step).rows(layer) for step in (1, 70, 333))
        for other in (fast, at_once):
            np.testing.assert_array_equal(slowly[0], other[0])
            np.testing.assert_array_equal(slowly[1], other[1])


@pytest.mark.parametrize(
    "plan",
    [
        BitPlan.exact(2),
        replace(PLAN, grid="minmax", sinks=0),
        replace(PLAN, sinks=9),
        replace(PLAN, k_widths=(b"", bytes([3, 2, 2, 3]) * 128), v_by_channel=(1,)),
    ],
)
def test_every_plan(plan: BitPlan) -> None:
    live = grown(300, 41, plan)
    assert live.packed_tokens == plan.sinks + (300 - plan.sinks - 100) // GROUP * GROUP
    k_rot, v = live.rows(1)
    true_k, true_v = exact(1, 300)
    tolerance = 0.003 if plan.k_bits[0] == 16 else 1.5
    np.testing.assert_allclose(k_rot, true_k, atol=tolerance)
    np.testing.assert_allclose(v, true_v, atol=tolerance)


def test_an_empty_conversation() -> None:
    live = LiveKV(SHAPE, PLAN, Window())
    assert live.positions == range(0)
    assert live.memory_bytes == 0
    assert [rows.shape for rows in live.rows(0)] == [(0, 8, 64), (0, 8, 64)]
