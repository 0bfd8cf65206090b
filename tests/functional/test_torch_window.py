"""The PyTorch runtime with a packed window: what `LiveKV` specifies, and whole conversations over packed rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from quire_engine import plan
from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.kv.memory import MemorySource
from quire_engine.kv.transfer import Placement
from quire_engine.kv.window import GROUP, LiveKV, Window, usual_plan
from quire_engine.plan import Prompt, Segment
from quire_engine.runtimes.torch_gpu import TorchRuntime
from quire_engine.runtimes.torch_window import PackedKV
from quire_engine.runtimes.transformer import Transformer
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32
from stitching import ROUNDING, distance, some_tokens

WINDOW = Window(40)
Tiny = Callable[[str], Path]


def stored(k_pre: Float16, v: Float16) -> ChunkReader:
    tokens = k_pre.shape[1]
    packed = codec.encode(ChunkKV(k_pre, v, {}), BitPlan.exact(len(k_pre)), codec.text_order(tokens))
    return ChunkReader(MemorySource(to_bytes(packed, bytes(32))))


def continued(model: Transformer, live: TorchRuntime, like_gpu: bool = False) -> TorchRuntime:
    """A runtime without a window over the rows that another one holds, packed ones as they are unpacked."""
    plain = TorchRuntime(model, like_gpu=like_gpu)
    plain.place([Placement("live", stored(*live.rows(0, live.live_tokens)), 0)])
    plain.adopt()
    return plain


def answer(runtime: TorchRuntime, tokens: Sequence[int]) -> Float32:
    return np.stack([runtime.extend([token]) for token in tokens])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_token_by_token_it_is_what_the_specification_says(tiny: Tiny, kind: str) -> None:
    model = Transformer.load(tiny(kind))
    runtime, plain = TorchRuntime(model, window=WINDOW), TorchRuntime(model)
    live = LiveKV(model.shape, usual_plan(model.shape.layers), WINDOW)
    tokens = some_tokens(250, 1)
    expected = np.stack([model.extend([token], live) for token in tokens])
    found = answer(runtime, tokens)
    assert runtime._kv.packed_tokens == live.packed_tokens - 4 == 3 * GROUP
    exact = answer(plain, tokens)
    packing = 4 + 40 + GROUP  # tokens before the first group is packed
    assert distance(found[:packing], exact[:packing]) < 1e-3
    assert distance(found[:packing], expected[:packing]) < ROUNDING
    # A number that float16 rounds across a border gets the next code, so the two differ a little; packing differs more.
    off, packed = (np.square(found - other)[packing:].mean() ** 0.5 for other in (expected, exact))
    assert off < packed / 3


@pytest.mark.parametrize("like_gpu", [False, True])
def test_a_conversation_goes_on_over_packed_rows(tiny: Tiny, like_gpu: bool) -> None:
    """A turn with passages, packed while it is answered; then another one, against the same rows unpacked."""
    model = Transformer.load(tiny("qwen2"))
    runtime = TorchRuntime(model, like_gpu=like_gpu, window=WINDOW)
    runtime.extend(some_tokens(170, 2))
    answer(runtime, some_tokens(70, 3))
    assert runtime._kv.packed_tokens == 3 * GROUP
    plain = continued(model, runtime, like_gpu)
    assert plain.live_tokens == runtime.live_tokens == 240
    chunk = stored(*runtime.encode(some_tokens(9, 4), some_tokens(90, 5)))
    asked = Prompt(Segment(some_tokens(6, 6)), (Segment(some_tokens(90, 5), "c"),), Segment(some_tokens(7, 7)), 240)
    mask = np.random.default_rng(8).random(90) < 0.3
    masses, scores, rows = [], [], []
    for one in (runtime, plain):
        one.extend(asked.opening.tokens)
        one.place([Placement("c", chunk, asked.starts[1])])
        masses.append(one.probe(asked.question.tokens, asked.context_tokens))
        one.execute(plan.stitch(asked, [mask]))
        scores.append(one.extend(asked.question.tokens))
        rows.append(one.rows(200, one.live_tokens))
    np.testing.assert_allclose(masses[0], masses[1], atol=0.02)
    assert distance(*scores) < ROUNDING
    assert distance(rows[0][0], rows[1][0]) < ROUNDING
    assert distance(rows[0][1], rows[1][1]) < ROUNDING
    after = answer(runtime, some_tokens(30, 9))
    assert runtime._kv.packed_tokens == 5 * GROUP
    assert distance(after, answer(plain, some_tokens(30, 9))) < 1, "rounding again, and no more"


@pytest.mark.parametrize("tokens", [0, 3, 4, 40, 68, 100, 150, 239])
def test_going_back_leaves_the_rows_as_they_are(tiny: Tiny, tokens: int) -> None:
    model = Transformer.load(tiny("llama"))
    runtime = TorchRuntime(model, window=WINDOW)
    answer(runtime, some_tokens(240, 3))
    before = runtime.rows(0, 240)
    assert runtime.rewind(tokens) == runtime.live_tokens == tokens
    assert runtime._kv.packed_tokens == GROUP * (max(0, tokens - 4) // GROUP if tokens < 196 else 3)
    for now, then in zip(runtime.rows(0, tokens), before, strict=True):
        assert now.shape[1] == tokens
        assert not tokens or distance(now, then[:, :tokens]) < 1e-3
    plain = continued(model, runtime) if tokens else TorchRuntime(model)
    assert distance(runtime.extend(some_tokens(20, 11)), plain.extend(some_tokens(20, 11))) < ROUNDING


def test_room_is_taken_for_what_is_exact_alone(tiny: Tiny) -> None:
    model = Transformer.load(tiny("llama"))
    runtime, plain = TorchRuntime(model, window=WINDOW), TorchRuntime(model)
    for turn in range(6):
        for one in (runtime, plain):
            one.reserve(890 * (turn + 1))
            one.extend(some_tokens(880, turn))
            one.extend([7])
    assert plain._kv.cells == 6 * 1024
    assert runtime._kv.cells == 1024
    assert runtime._kv.memory_bytes < 0.4 * plain._kv.memory_bytes
    assert runtime._kv.packed_tokens > 5000
    runtime.reserve(8000)
    assert distance(runtime.extend([9]), plain.extend([9])) < 1


def test_plans_that_a_window_cannot_hold_are_refused(tiny: Tiny) -> None:
    shape = Transformer.load(tiny("llama")).shape
    for refused in (BitPlan.exact(2), BitPlan((3, 3), (2, 2), "minmax"), BitPlan((4, 4), (4, 4), k_widths=(b"", b""))):
        with pytest.raises(ValueError, match="mid-rise"):
            PackedKV(shape, 64, torch.device("cpu"), torch.float32, refused, WINDOW)
