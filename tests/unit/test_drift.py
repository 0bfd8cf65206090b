"""Drift: reused keys follow what the recomputed ones of their chunk show, before RoPE, chunk by chunk."""

import numpy as np
import numpy.typing as npt
import pytest

from quire_engine import plan
from quire_engine.kv import drift, transfer
from quire_engine.plan import Prompt, Segment, StitchPlan
from quire_engine.types import Float16, Float32, ModelShape, Rope
from quire_kernels import rope

LAYERS, HEADS, DIM = 3, 2, 8
SHAPE = ModelShape(
    architecture="llama",
    layers=LAYERS,
    heads=4,
    kv_heads=HEADS,
    key_dim=DIM,
    value_dim=DIM,
    context_tokens=512,
    rope=Rope(dims=DIM, base=10000.0, layout="halves"),
)
LENGTHS = (40, 24, 30)
PREAMBLE = 5


def stitched(recomputed: tuple[int, ...]) -> StitchPlan:
    """A prompt of three chunks of which the last `recomputed` tokens are computed again."""
    chunks = tuple(Segment(tuple(range(length)), "key") for length in LENGTHS)
    prompt = Prompt(Segment(tuple(range(PREAMBLE)), "key"), chunks, Segment((1,)))
    masks = [np.arange(length) >= length - again for length, again in zip(LENGTHS, recomputed, strict=True)]
    return plan.stitch(prompt, masks)


def before_rope(keys: Float16, positions: npt.ArrayLike) -> Float32:
    cos, sin = transfer.angles(positions, SHAPE.rope)
    return rope.unrotate(keys.reshape(-1, HEADS, DIM), cos, sin, SHAPE.rope.layout)


def drift_of(row: int, keys: Float32, stored: Float32, fresh: dict[int, Float32]) -> Float32:
    """One row at a time, over every recomputed one. keys: of the middle layer, before RoPE; as `stored` all rows that
    were read alone, from the second chunk on."""
    mean = keys.mean(axis=0)
    of_chunk = np.repeat([1, 2], LENGTHS[1:])

    def cosine(a: Float32, b: Float32) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    nats = np.array(
        [
            6 * cosine(keys[row] - mean, keys[other] - mean)
            + 2 * (of_chunk[row] == of_chunk[other])
            - abs(row - other) / 30
            for other in fresh
        ]
    )
    weights = np.exp(nats - nats.max())
    changes = np.stack([fresh[other] - stored[other] for other in fresh])
    return np.asarray((weights / weights.sum()) @ changes, dtype=np.float32)


@pytest.mark.parametrize("recomputed", [(10, 8, 30), (40, 0, 9), (7, 12, 1), (0, 24, 29)])
def test_reused_rows_move_by_a_share_of_what_rows_like_them_show(recomputed: tuple[int, ...]) -> None:
    random = np.random.default_rng(3)
    made = stitched(recomputed)
    tokens = made.prompt.context_tokens
    again = np.concatenate([np.arange(span.start, span.stop) for span in made.recomputed])
    k, v = ([random.normal(size=(tokens, HEADS * DIM)).astype(np.float16) for _ in range(LAYERS)] for _ in range(2))
    fresh_k, fresh_v = (
        [random.normal(size=(len(again), HEADS * DIM)).astype(np.float16) for _ in range(LAYERS)] for _ in range(2)
    )
    correction = drift.Correction.of(made, SHAPE, k[drift.middle(LAYERS)])
    assert correction is not None
    now_k = [correction.settled("k", *rows) for rows in zip(k, fresh_k, strict=True)]
    now_v = [correction.settled("v", *rows) for rows in zip(v, fresh_v, strict=True)]
    isolated = PREAMBLE + LENGTHS[0]
    reused = [row for row in range(isolated, tokens) if row not in again]
    alike = before_rope(k[drift.middle(LAYERS)], np.arange(tokens)).reshape(tokens, -1)[isolated:]
    for layer in range(LAYERS):
        keys, new_keys = (before_rope(rows[layer], np.arange(tokens)).reshape(tokens, -1) for rows in (k, now_k))
        rotated = before_rope(fresh_k[layer], again).reshape(len(again), -1)
        values, new_values = v[layer].astype(np.float32), now_v[layer].astype(np.float32)
        for stored, new, fresh, share in (
            (keys, new_keys, rotated, drift.KEYS),
            (values, new_values, fresh_v[layer].astype(np.float32), drift.VALUES),
        ):
            shown = {int(row) - isolated: fresh[at] for at, row in enumerate(again) if row >= isolated}
            for row in reused:
                moved = share * drift_of(row - isolated, alike, stored[isolated:], shown)
                np.testing.assert_allclose(new[row] - stored[row], moved, atol=6e-3)
        for before, after in ((k, now_k), (v, now_v)):
            untouched = [*range(isolated), *again]
            np.testing.assert_array_equal(after[layer][untouched], before[layer][untouched])


def test_too_few_recomputed_tokens_show_nothing() -> None:
    assert drift.Neighbours.of(stitched((40, drift.EVIDENCE_TOKENS - 1, 0))) is None, "those of an intact chunk too"
    assert drift.Neighbours.of(stitched((0, 24, 30))) is None, "nothing is reused that could drift"
    assert drift.Neighbours.of(stitched((0, drift.EVIDENCE_TOKENS, 0))) is not None


def test_rows_that_are_asked_about_learn_the_same_as_among_all() -> None:
    random = np.random.default_rng(5)
    made = stitched((10, 8, 12))
    k = [random.normal(size=(made.prompt.context_tokens, HEADS * DIM)).astype(np.float16) for _ in range(2)]
    fresh = random.normal(size=(30, HEADS * DIM)).astype(np.float16)
    everywhere = drift.Correction.of(made, SHAPE, k[0])
    some = drift.Correction.of(made, SHAPE, k[0], since=55, until=80)
    assert everywhere is not None
    assert some is not None
    expected, got = (one.settled("k", k[1], fresh) for one in (everywhere, some))
    np.testing.assert_allclose(got[55:80], expected[55:80], atol=2e-3)
    np.testing.assert_array_equal(np.delete(got, slice(55, 80), axis=0), np.delete(k[1], slice(55, 80), axis=0))


def test_a_long_prompt_learns_from_what_stands_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with few candidates leave out only what would have weighed next to nothing."""
    random = np.random.default_rng(4)
    chunk = Segment(tuple(range(3000)), "key")
    prompt = Prompt(Segment((1,), "key"), (Segment((2,), "key"), chunk), Segment((3,)))
    mask = np.arange(3000) % 200 < 9
    mask[1000:2000] = False  # further from any recomputed token than the reach
    made = plan.stitch(prompt, [np.zeros(1, dtype=bool), mask])
    stored = random.normal(size=(3000, 16)).astype(np.float32)
    near = drift.Neighbours.of(made)
    assert near is not None
    assert near.bias.shape[2] < mask.sum() / 2
    changed = random.normal(size=(int(mask.sum()), 16)).astype(np.float32)
    got = near.drift(near.weights(stored), changed)
    monkeypatch.setattr(drift, "REACH_TOKENS", 3000)
    everything = drift.Neighbours.of(made)
    assert everything is not None
    near_some = (near.reused < 1000) | (near.reused >= 2000)
    np.testing.assert_allclose(
        got[near_some], everything.drift(everything.weights(stored), changed)[near_some], atol=0.05
    )
    assert np.isfinite(got).all()
    assert np.abs(got[~near_some]).mean() > 0.1, "the nearest there are, however far"
