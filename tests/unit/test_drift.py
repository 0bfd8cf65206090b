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


@pytest.mark.parametrize("recomputed", [(10, 8, 30), (40, 0, 9), (7, 12, 1)])
def test_reused_keys_move_by_a_share_of_their_chunks_mean_change(recomputed: tuple[int, ...]) -> None:
    random = np.random.default_rng(3)
    made = stitched(recomputed)
    tokens = made.prompt.context_tokens
    stored = [random.normal(size=(tokens, HEADS * DIM)).astype(np.float16) for _ in range(LAYERS)]
    again = np.concatenate([np.arange(span.start, span.stop) for span in made.recomputed])
    fresh = [random.normal(size=(len(again), HEADS * DIM)).astype(np.float16) for _ in range(LAYERS)]
    corrected = [keys.copy() for keys in stored]
    drift.correct(made, SHAPE, corrected, fresh)
    for layer in range(LAYERS):
        expected = before_rope(stored[layer], np.arange(tokens))
        fresh_rows = dict(zip(again.tolist(), before_rope(fresh[layer], again), strict=True))
        start = PREAMBLE
        for length, count in zip(LENGTHS, recomputed, strict=True):
            first_again = start + length - count
            if count >= drift.EVIDENCE_TOKENS:
                changes = [fresh_rows[row] - expected[row] for row in range(first_again, start + length)]
                expected[start:first_again] += drift.SHARE * np.mean(changes, axis=0)
            start += length
        got = before_rope(corrected[layer], np.arange(tokens))
        np.testing.assert_allclose(got, expected, atol=5e-3)
        untouched = [*range(PREAMBLE), *again]
        np.testing.assert_array_equal(corrected[layer][untouched], stored[layer][untouched])
