"""The llama.cpp runtime on tiny models: stitched KV gives what full prefill gives, for every kind of RoPE.

The models' weights are float32 or float16 and random, so logits are compared as numbers.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from quire_engine import gguf, plan
from quire_engine.errors import Aborted
from quire_engine.kv import drift, transfer
from quire_engine.plan import Prompt, Segment
from quire_engine.runtimes import llama_cpp, llama_state
from quire_engine.runtimes.base import Runtime
from quire_engine.runtimes.llama_context import LlamaContext, LlamaModel
from quire_engine.runtimes.llama_cpp import FIRST_GUARD, FIRST_SPAN, LIVE, MAX_SPANS, LlamaCppRuntime
from quire_engine.runtimes.torch_gpu import TorchRuntime
from quire_engine.runtimes.transformer import Transformer
from quire_engine.selection import probe
from quire_engine.types import Float16
from quire_kernels import rope
from stitching import (
    KINDS,
    ROUNDING,
    LoadLlama,
    distance,
    everything,
    full,
    place,
    prompt_of,
    readers,
    some_tokens,
    stitched,
    stored,
)

Tiny = Callable[[str], Path]


@pytest.fixture
def llama(load_llama: LoadLlama) -> LlamaCppRuntime:
    return load_llama("llama")


def live_rows(runtime: LlamaCppRuntime, tokens: int) -> tuple[Float16, Float16]:
    """K before RoPE and V of the live sequence."""
    return runtime._rows(LIVE, 0, tokens, runtime.shape.layers)


# Against full prefill


@pytest.mark.parametrize("kind", KINDS)
def test_exact_rows_behind_the_preamble_give_full_prefills_logits(load_llama: LoadLlama, kind: str) -> None:
    """One chunk directly behind the preamble was encoded in just the context it gets: nothing is approximated."""
    runtime, prompt = load_llama(kind), prompt_of(chunks=[80])
    expected = full(runtime, prompt)
    chunks = readers(runtime, prompt)
    logits = stitched(runtime, prompt, chunks, everything(prompt, False))
    assert expected.std() > 1
    assert distance(logits, expected) < ROUNDING
    # The test can fail: without the chunk's real rows the logits are elsewhere.
    other = [chunks[0], stored(runtime, prompt.opening.tokens, some_tokens(80, 55))]
    assert distance(stitched(runtime, prompt, other, everything(prompt, False)), expected) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_everything_is_full_prefill(load_llama: LoadLlama, kind: str) -> None:
    """Every recomputed token sees all recomputed tokens before it, and none after it."""
    runtime, prompt = load_llama(kind), prompt_of()
    expected = full(runtime, prompt)
    chunks = readers(runtime, prompt)
    logits = stitched(runtime, prompt, chunks, everything(prompt, True))
    assert distance(logits, expected) < ROUNDING
    reused = stitched(runtime, prompt, chunks, everything(prompt, False))
    assert distance(reused, expected) > 1, "reuse of a second chunk must differ, or nothing was tested"


def test_without_a_preamble(llama: LlamaCppRuntime) -> None:
    """A base model without BOS: the first span starts at position 0."""
    prompt = prompt_of(preamble=0)
    expected = full(llama, prompt)
    chunks = readers(llama, prompt)
    assert distance(stitched(llama, prompt, chunks, everything(prompt, True)), expected) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_moved_chunk_are_those_of_layer_0_there(load_llama: LoadLlama, kind: str) -> None:
    """Layer 0's keys before RoPE depend on the token alone, so moving must give what full prefill computes there."""
    runtime, prompt = load_llama(kind), prompt_of(chunks=[37, 50])
    tokens = prompt.context_tokens
    full(runtime, prompt)
    k_full, v_full = live_rows(runtime, tokens)
    stitched(runtime, prompt, readers(runtime, prompt), everything(prompt, False))
    k, v = live_rows(runtime, tokens)
    scale = np.abs(k_full[0]).max()
    assert distance(k[0], k_full[0]) < 0.003 * scale
    assert distance(v[0], v_full[0]) < 0.003 * scale
    second = slice(prompt.starts[2], tokens)
    assert distance(k[1, second], k_full[1, second]) > 0.05 * scale, "deeper layers do depend on the context"


def test_chunks_change_places(llama: LlamaCppRuntime) -> None:
    """The same stored chunks serve both orders, and the orders differ."""
    prompt = prompt_of()
    turned = Prompt(prompt.opening, prompt.chunks[::-1], prompt.question)
    expected, expected_turned = full(llama, prompt), full(llama, turned)
    head, a, b = readers(llama, prompt)
    nothing = everything(prompt, False)
    logits = stitched(llama, prompt, [head, a, b], nothing)
    logits_turned = stitched(llama, turned, [head, b, a], nothing[::-1])
    again = stitched(llama, prompt, [head, a, b], nothing)
    assert distance(logits, logits_turned) > 0.1
    assert distance(logits, again) == 0
    for stitched_logits, full_logits, other in (
        (logits, expected, expected_turned),
        (logits_turned, expected_turned, expected),
    ):
        assert distance(stitched_logits, full_logits) < distance(stitched_logits, other)


def test_recomputing_more_comes_closer(llama: LlamaCppRuntime) -> None:
    """Recomputing the later half of the second chunk, then all of it."""
    prompt = prompt_of()
    full(llama, prompt)
    k_full, _ = live_rows(llama, prompt.context_tokens)
    chunks = readers(llama, prompt)
    errors = []
    for share in (0.0, 0.5, 1.0):
        masks = everything(prompt, False)
        masks[1][: int(share * len(masks[1]))] = True
        stitched(llama, prompt, chunks, masks)
        k, _ = live_rows(llama, prompt.context_tokens)
        errors.append(float(np.linalg.norm((k - k_full).astype(np.float32))))
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]
    assert errors[2] < 0.05 * errors[0]


# Spans

FEW = drift.EVIDENCE_TOKENS - 1  # recomputed tokens that shift no others


def rows_with_spans(runtime: Runtime, prompt: Prompt, spans: Sequence[tuple[int, int]]) -> Float16:
    """The live keys after recomputing some spans of positions."""
    mask = np.zeros(prompt.context_tokens, dtype=bool)
    for start, stop in spans:
        mask[start:stop] = True
    masks = [mask[a:b] for a, b in pairwise(prompt.starts[1:])]
    chunks = readers(runtime, prompt)
    stitched(runtime, prompt, chunks, masks)
    return runtime.rows(0, prompt.context_tokens)[0]


def test_a_later_chunk_never_changes_an_earlier_row(llama: LlamaCppRuntime) -> None:
    """Spans are decoded together, but each sees only what stands before it."""
    prompt, spans = prompt_of(), [(15, 25), (40, 50), (80, 100)]
    other_chunk = Segment(some_tokens(45, 77), "other")
    other = Prompt(prompt.opening, (prompt.chunks[0], other_chunk), prompt.question)
    rows, other_rows = (rows_with_spans(llama, one, spans) for one in (prompt, other))
    second = prompt.starts[2]
    assert distance(rows[:, :second], other_rows[:, :second]) < 0.02
    assert distance(rows[:, second:], other_rows[:, second:]) > 0.1


@pytest.mark.parametrize("recomputed", [FEW, 10])
def test_an_earlier_chunk_changes_recomputed_rows_and_the_drift_they_show(
    llama: LlamaCppRuntime, recomputed: int
) -> None:
    prompt = prompt_of()
    other = Prompt(prompt.opening, (Segment(some_tokens(60, 77), "o"), prompt.chunks[1]), prompt.question)
    again = range(90, 90 + recomputed)
    rows, other_rows = (rows_with_spans(llama, one, [(again.start, again.stop)]) for one in (prompt, other))
    reused = [*range(71, again.start), *range(again.stop, prompt.context_tokens)]
    assert distance(rows[1, again], other_rows[1, again]) > 0.1
    if recomputed == FEW:
        assert distance(rows[:, reused], other_rows[:, reused]) < 0.02
    else:
        assert distance(rows[0, reused], other_rows[0, reused]) < 0.01, "layer 0 does not depend on the context"
        assert distance(rows[1, reused], other_rows[1, reused]) > 0.1


def test_a_recomputed_span_equals_a_run_over_the_rows_before_it(llama: LlamaCppRuntime) -> None:
    """Recomputing only the last span is continuing the stitched context token by token."""
    prompt = prompt_of()
    start = prompt.context_tokens - FEW
    rows = rows_with_spans(llama, prompt, [(start, prompt.context_tokens)])
    short = Prompt(
        prompt.opening,
        (prompt.chunks[0], Segment(prompt.chunks[1].tokens[:-FEW], "short")),
        Segment(prompt.tokens[start : start + FEW]),
    )
    stitched(llama, short, readers(llama, short), everything(short, False))
    assert distance(rows, live_rows(llama, prompt.context_tokens)[0]) < 0.01


SCATTERED = [(15, 16), (30, 32), (74, 75), (88, 90), (109, 110)]  # FEW tokens


def test_scattered_tokens_see_stored_and_fresh_rows_up_to_their_own(load_llama: LoadLlama, tiny: Tiny) -> None:
    """Against a model that reads the same tokens between the same stored rows. Below the third layer all that a token
    sees of another is what the token alone decides."""
    runtime, prompt = load_llama("deep"), prompt_of()
    stored_rows = rows_with_spans(runtime, prompt, [])
    values = live_rows(runtime, prompt.context_tokens)[1]
    rows = rows_with_spans(runtime, prompt, SCATTERED)
    again = np.concatenate([np.arange(*span) for span in SCATTERED])
    kept = np.setdiff1d(np.arange(prompt.context_tokens), again)
    reference = Transformer.load(tiny("deep"))
    with torch.no_grad():
        past = reference.place(list(stored_rows[:, kept]), list(values[:, kept]), kept)
        expected, _ = reference.read([prompt.tokens[place] for place in again], past, again).stored()
    assert distance(rows[:, again], expected) < ROUNDING
    assert distance(rows[:, kept], stored_rows[:, kept]) < 0.01
    alone = [rows_with_spans(runtime, prompt, [span])[:, slice(*span)] for span in SCATTERED]
    assert distance(np.concatenate(alone, axis=1)[3], expected[3]) > 2 * ROUNDING, "which then would have been stale"


def test_drift_is_taken_back_before_the_layers_spans_attend(load_llama: LoadLlama, tiny: Tiny) -> None:
    """As in PyTorch's runtime, whose parts are tested one by one."""
    runtime, prompt = load_llama("deep"), prompt_of()
    other = TorchRuntime(Transformer.load(tiny("deep")))
    spans = [(20, 25), (75, 81), (90, 99)]
    rows = rows_with_spans(runtime, prompt, spans)
    expected = rows_with_spans(other, prompt, spans)
    untouched = rows_with_spans(runtime, prompt, [])
    assert distance(rows, expected) < 2 * ROUNDING
    assert distance(rows, untouched) > 10 * ROUNDING


@pytest.mark.parametrize("count", [1, 3])
def test_batches_of_spans_see_the_earlier_ones(
    load_llama: LoadLlama, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    runtime, prompt = load_llama("deep"), prompt_of()
    together = rows_with_spans(runtime, prompt, SCATTERED)
    monkeypatch.setattr(llama_cpp, "MAX_SPANS", count)
    assert distance(rows_with_spans(runtime, prompt, SCATTERED), together) < ROUNDING


def test_batches_of_spans_learn_from_each_other(load_llama: LoadLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the last span of a batch learns nothing of later ones; what stands behind it, of all."""
    runtime, prompt = load_llama("deep"), prompt_of()
    spans = [(20, 25), (75, 84), (100, 110)]
    together = rows_with_spans(runtime, prompt, spans)
    monkeypatch.setattr(llama_cpp, "MAX_SPANS", 2)
    batches = rows_with_spans(runtime, prompt, spans)
    untouched = rows_with_spans(runtime, prompt, [])
    assert distance(batches[:2], together[:2]) < ROUNDING, "final rows learn from every span"
    assert distance(batches[3], together[3]) < distance(batches[3], untouched[3]) / 2


def test_more_spans_than_sequences(llama: LlamaCppRuntime) -> None:
    prompt = prompt_of(chunks=[3 * MAX_SPANS, 60])
    spans = [(start, start + 1) for start in range(12, 12 + 2 * (MAX_SPANS + 20), 2)]
    rows, untouched = rows_with_spans(llama, prompt, spans), rows_with_spans(llama, prompt, [])
    assert distance(rows, untouched) < 0.02, "the first chunk stands where it was read"


def test_placed_rows_are_found_wherever_llama_cpp_keeps_them(llama: LlamaCppRuntime) -> None:
    """In a cache that has room for them only in holes of one cell."""
    prompt, spans = prompt_of(), [(15, 25), (80, 100)]
    expected = rows_with_spans(llama, prompt, spans)
    full_of_holes = LlamaCppRuntime(llama.model, llama.shape, threads=1)
    there, gone = FIRST_GUARD + 2, FIRST_GUARD + 3
    for position in range(480):
        for sequence in (there, gone):
            full_of_holes._context.decode((7,), position, sequence)
    full_of_holes._context.remove(gone)
    place(full_of_holes, prompt, readers(full_of_holes, prompt))
    assert np.flatnonzero(np.diff(full_of_holes._cells) != 1).size > 10
    found = rows_with_spans(full_of_holes, prompt, spans)
    full_of_holes.close()
    assert distance(found, expected) < 0.02


def test_what_fails_between_two_layers_is_raised(llama: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, spans = prompt_of(), [(15, 25), (80, 100)]
    expected = rows_with_spans(llama, prompt, spans)
    with monkeypatch.context() as patch:
        patch.setattr(drift.Correction, "settled", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows_with_spans(llama, prompt, spans)
    assert distance(rows_with_spans(llama, prompt, spans), expected) < 0.02


def test_spans_longer_than_a_batch(llama: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of()
    expected = full(llama, prompt)
    chunks = readers(llama, prompt)
    monkeypatch.setattr(llama._context, "batch_tokens", 7)
    assert distance(stitched(llama, prompt, chunks, everything(prompt, True)), expected) < ROUNDING


# Encoding


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_stopping_early_gives_the_same_early_layers(load_llama: LoadLlama, kind: str) -> None:
    runtime = load_llama(kind)
    guard, tokens = some_tokens(20, 1), some_tokens(50, 2)
    k, v = runtime.encode(guard, tokens)
    assert k.shape == v.shape == (2, 50, 2, 16)
    k_early, v_early = runtime.encode(guard, tokens, layers=1)
    assert k_early.shape == v_early.shape == (1, 50, 2, 16)
    np.testing.assert_array_equal(k_early, k[:1])
    np.testing.assert_array_equal(v_early, v[:1])
    again, _ = runtime.encode(guard, tokens)
    np.testing.assert_array_equal(again, k)


def test_encoding_forgets_nothing_and_mixes_nothing_up(llama: LlamaCppRuntime) -> None:
    """Chunk after chunk behind two guards gives what each gives alone."""
    guards = [(), some_tokens(20, 1), some_tokens(33, 2)]
    chunks = [some_tokens(30, 10 + i) for i in range(3)]
    together = {(g, c): llama.encode(guards[g], chunks[c])[0] for c in range(3) for g in range(3)}
    for (g, c), k in together.items():
        llama.reserve(4096)
        llama.rewind(0)
        assert distance(llama.encode(guards[g], chunks[c])[0], k) < 0.01
    assert distance(together[1, 0][1], together[2, 0][1]) > 0.1


def test_encoding_makes_room_for_itself(llama: LlamaCppRuntime) -> None:
    small = LlamaCppRuntime(llama.model, llama.shape, threads=1)
    guard, tokens = some_tokens(900, 1), some_tokens(600, 2)
    assert distance(small.encode(guard, tokens)[0], llama.encode(guard, tokens)[0]) < 0.01
    small.close()


# The probe


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "head8"])
def test_the_probe_is_the_questions_softmax_attention(load_llama: LoadLlama, kind: str) -> None:
    """Against queries captured in a plain run over the same context, and keys rotated by the specification."""
    runtime, prompt = load_llama(kind), prompt_of(chunks=[50])
    shape, context, question = runtime.shape, prompt.context_tokens, prompt.question.tokens
    (layer,) = probe.probed_layers(shape.layers)
    place(runtime, prompt, readers(runtime, prompt))
    mass = runtime.probe(question, context)

    plain = LlamaContext(runtime.model, 1024, 1, threads=1)
    plain.decode(prompt.tokens[:context], np.arange(context), 0)
    with plain.capturing_queries([layer]) as captured:
        plain.decode(question, context + np.arange(len(question)), 0)
    plain.close()
    q = np.concatenate(captured[layer]).reshape(len(question), shape.heads, shape.key_dim)
    runtime.reserve(4096)
    runtime.rewind(0)
    k_pre, _ = runtime.encode((), prompt.tokens[:context])
    cos, sin = transfer.angles(np.arange(context), shape.rope)
    k = rope.rotate(k_pre[layer], cos, sin, shape.rope.layout)
    expected = np.zeros((shape.heads, context))
    for head in range(shape.heads):
        logits = q[:, head] @ k[:, head * shape.kv_heads // shape.heads].T / np.sqrt(shape.key_dim)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected[head] = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
    np.testing.assert_allclose(mass, expected.max(axis=0), rtol=0.02, atol=1e-3)
    assert mass.max() > 5 * np.median(mass), "attention is uneven, so this says something"


def test_a_probe_leaves_no_trace(llama: LlamaCppRuntime) -> None:
    prompt = prompt_of()
    chunks = readers(llama, prompt)
    without = stitched(llama, prompt, chunks, everything(prompt, False))
    place(llama, prompt, chunks)
    mass = llama.probe(some_tokens(30, 5), prompt.context_tokens)
    np.testing.assert_allclose(llama.probe(some_tokens(30, 5), prompt.context_tokens), mass, rtol=1e-3)
    llama.execute(plan.stitch(prompt, everything(prompt, False)))
    assert distance(llama.extend(prompt.question.tokens), without) < 1e-4


# Stopping


class Countdown:
    """A stop check that turns true after some asking."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def aborts(runtime: LlamaCppRuntime, asked: int, work: Callable[[], object]) -> None:
    """Work is aborted after `asked` questions whether to stop."""
    with pytest.raises(Aborted), runtime.abortable(Countdown(asked)):
        work()


@pytest.mark.parametrize("asked", [0, 3, 20])
def test_an_aborted_encoding_leaves_the_runtime_usable(llama: LlamaCppRuntime, asked: int) -> None:
    guard, tokens = some_tokens(20, 1), some_tokens(50, 2)
    expected, _ = llama.encode(guard, tokens)
    llama.reserve(4096)
    llama.rewind(0)
    aborts(llama, asked, lambda: [llama.encode(guard, tokens) for _ in range(50)])
    np.testing.assert_array_equal(llama.encode(guard, tokens)[0], expected)
    with llama.abortable(lambda: False):
        np.testing.assert_array_equal(llama.encode(guard, tokens)[0], expected)


def test_an_encoding_aborted_anywhere_in_a_long_guard(llama: LlamaCppRuntime) -> None:
    """llama.cpp keeps the finished part of a long batch; it must not be taken for the guard, nor be in the way."""
    guard, tokens = some_tokens(1300, 1), some_tokens(50, 2)
    expected, _ = llama.encode(guard, tokens)
    for asked in range(0, 140, 20):
        llama.reserve(4096)
        llama.rewind(0)
        aborts(llama, asked, lambda: [llama.encode(guard, tokens) for _ in range(50)])
        np.testing.assert_array_equal(llama.encode(guard, tokens)[0], expected)


def test_an_aborted_prefill_leaves_the_runtime_usable(llama: LlamaCppRuntime) -> None:
    prompt = prompt_of(chunks=[1400, 45])
    expected = full(llama, prompt)
    for asked in (1, 30, 60):
        llama.reserve(4096)
        llama.rewind(0)
        aborts(llama, asked, lambda: llama.execute(plan.compute_all(prompt)))
        chunks = readers(llama, prompt)
        assert distance(stitched(llama, prompt, chunks, everything(prompt, True)), expected) < ROUNDING


def test_an_aborted_stitch_leaves_the_runtime_usable(llama: LlamaCppRuntime) -> None:
    prompt = prompt_of()
    chunks = readers(llama, prompt)
    expected = stitched(llama, prompt, chunks, everything(prompt, True))
    place(llama, prompt, chunks)
    aborts(llama, 3, lambda: llama.probe(prompt.question.tokens, prompt.context_tokens))
    place(llama, prompt, chunks)
    aborts(llama, 10, lambda: llama.execute(plan.stitch(prompt, everything(prompt, True))))
    assert distance(stitched(llama, prompt, chunks, everything(prompt, True)), expected) < 1e-4


def alone(model: Path, script: str) -> str:
    """What a script prints in a process of its own, because what it tests has died of a segmentation fault."""
    head = f"""
from pathlib import Path
from quire_engine import gguf
from quire_engine.errors import Aborted, ModelError
from quire_engine.runtimes import llama_context
from quire_engine.runtimes.llama_context import LlamaModel
from quire_engine.runtimes.llama_cpp import LlamaCppRuntime
path = Path({str(model)!r})
runtime = LlamaCppRuntime(LlamaModel(path), gguf.shape(gguf.read(path)), 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr or f"signal {-done.returncode}"
    return done.stdout


def test_growing_while_abortable(tiny: Tiny) -> None:
    """The context is replaced by a larger one inside the block."""
    script = """
asked = []
with runtime.abortable(lambda: bool(asked.append(1))):
    runtime.encode([9] * 900, [10] * 600)
assert len(asked) > 10, "the larger context asks too"
try:
    with runtime.abortable(lambda: True):
        runtime.encode([9] * 3000, [10] * 600)
except Aborted:
    print("aborted")
runtime.encode([9] * 3000, [10] * 600)
"""
    assert alone(tiny("llama"), script) == "aborted\n"


@pytest.mark.parametrize("work", ["runtime.reserve(1_000_000)", "runtime.encode([9] * 3000, [10])"])
def test_no_memory_for_a_larger_context(tiny: Tiny, work: str) -> None:
    """The next, smaller work finds a context again."""
    script = f"""
create = llama_context.c.llama_init_from_model
llama_context.c.llama_init_from_model = lambda model, parameters: None
try:
    with runtime.abortable(lambda: False):
        {work}
except ModelError as error:
    print(error)
llama_context.c.llama_init_from_model = create
runtime.encode([9] * 30, [10] * 6)
runtime.reserve(100)
runtime.encode([9] * 30, [10] * 6)
"""
    assert alone(tiny("llama"), script).startswith("llama.cpp could not make a context of ")


# Extending


def test_extending_token_by_token_is_extending_at_once(llama: LlamaCppRuntime) -> None:
    prompt = prompt_of()
    at_once = full(llama, prompt)
    llama.reserve(4096)
    llama.rewind(0)
    llama.execute(plan.compute_all(prompt))
    for token in prompt.question.tokens:
        logits = llama.extend((token,))
    assert distance(logits, at_once) < ROUNDING


def test_a_state_blob_of_llama_cpp_round_trips(llama: LlamaCppRuntime) -> None:
    """Read, parsed, written into another sequence, read again: the same rows."""
    context = LlamaContext(llama.model, 1024, 2, threads=1)
    context.decode(some_tokens(40, 3), np.arange(40), 0)
    blob = context.read_state(0)
    state = llama_state.parse(blob, llama.shape)
    assert state.positions.tolist() == list(range(40))
    context.write_state(1, blob)
    again = llama_state.parse(context.read_state(1), llama.shape)
    for layer in range(llama.shape.layers):
        np.testing.assert_array_equal(again.k_rot[layer], state.k_rot[layer])
        np.testing.assert_array_equal(again.v[layer], state.v[layer])
    rebuilt = llama_state.empty(llama.shape, 40, llama_state.magic_of(blob))
    assert rebuilt.blob.size == blob.size
    context.close()


def test_models_that_only_prefill_get_one_sequence(tiny: Tiny) -> None:
    path = tiny("gemma")
    runtime = LlamaCppRuntime(LlamaModel(path), gguf.shape(gguf.read(path)), threads=1, stitching=False)
    prompt = prompt_of()
    runtime.reserve(4096)
    logits = full(runtime, prompt)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    assert runtime._sequences == 1 < FIRST_SPAN
    runtime.close()
