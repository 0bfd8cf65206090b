"""The PyTorch runtime against the reference decoder and llama.cpp: same scores, same chunks, same answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from quire import config
from quire.session import Session
from quire_engine import gguf, plan
from quire_engine.errors import Aborted, ContextOverflow, ModelError
from quire_engine.generate import Candidates
from quire_engine.kv import codec, drift
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.kv.memory import MemorySource
from quire_engine.kv.transfer import DamagedPlacements, Placement
from quire_engine.plan import Mask, Prompt, Segment
from quire_engine.runtimes import base, choose, torch_device
from quire_engine.runtimes.base import Runtime
from quire_engine.runtimes.torch_decoder import Decoder, Tile
from quire_engine.runtimes.torch_gpu import TorchRuntime
from quire_engine.types import Answered, BitPlan, ChunkKV, Float16, Float32, Text
from stitching import (
    KINDS,
    ROUNDING,
    LoadLlama,
    distance,
    full,
    place,
    prompt_of,
    readers,
    some_tokens,
    stitched,
    stored,
    tried_out,
)

HERE = Path(__file__).parents[2]
Tiny = Callable[[str], Path]
Load = Callable[[str], TorchRuntime]


@pytest.fixture(scope="module")
def load(tiny: Tiny) -> Load:
    """A runtime of each kind, made once."""
    made: dict[str, TorchRuntime] = {}

    def runtime(kind: str) -> TorchRuntime:
        if kind not in made:
            made[kind] = TorchRuntime.load(tiny(kind))
        made[kind].rewind(0)
        return made[kind]

    return runtime


def some(prompt: Prompt, share: float) -> list[Mask]:
    """Scattered tokens of every chunk."""
    random = np.random.default_rng(5)
    return [random.random(len(chunk)) < share for chunk in prompt.chunks]


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_reference_and_of_llama_cpp(load: Load, load_llama: LoadLlama, kind: str) -> None:
    runtime, prompt = load(kind), prompt_of()
    scores = full(runtime, prompt)
    with torch.no_grad():
        reference = runtime.model.logits(runtime.model.read(prompt.tokens).hidden[0, -1]).numpy()
    assert distance(scores, reference) < 1e-3
    assert distance(scores, full(load_llama(kind), prompt)) < ROUNDING
    assert scores.std() > 1


def test_reading_in_parts_is_reading_at_once(load: Load) -> None:
    runtime, tokens = load("qwen3"), some_tokens(700, 4)
    at_once = runtime.extend(tokens)
    runtime.rewind(0)
    for part in (tokens[:1], tokens[1:3], tokens[3:640], *([token] for token in tokens[640:])):
        scores = runtime.extend(part)
    assert runtime.live_tokens == 700
    assert distance(scores, at_once) < 1e-3


# Stitching


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_everything_is_full_prefill(load: Load, kind: str) -> None:
    runtime, prompt = load(kind), prompt_of()
    chunks, expected = readers(runtime, prompt), full(runtime, prompt)
    everything = [np.ones(len(chunk), dtype=bool) for chunk in prompt.chunks]
    assert distance(stitched(runtime, prompt, chunks, everything), expected) < ROUNDING / 3  # the preamble is reused
    assert distance(stitched(runtime, prompt, chunks, [~mask for mask in everything]), expected) > 0.5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scattered_tokens_see_stored_and_fresh_rows_up_to_their_own(load: Load, kind: str) -> None:
    """Against the reference, which reads the same tokens between the same stored rows; too few of them for a drift."""
    runtime, prompt = load(kind), prompt_of()
    chunks = readers(runtime, prompt)
    masks = [np.zeros(len(chunk), dtype=bool) for chunk in prompt.chunks]
    masks[0][[3, 4, 30, 59]] = masks[1][[0, 17, 18, 44]] = True
    place(runtime, prompt, chunks)
    k_pre, v = runtime_rows(runtime, prompt)
    runtime.execute(plan.stitch(prompt, masks))
    again = np.flatnonzero(np.concatenate([np.zeros(11, dtype=bool), *masks]))
    kept = np.setdiff1d(np.arange(prompt.context_tokens), again)
    past = runtime.model.place(list(k_pre[:, kept]), list(v[:, kept]), kept)
    with torch.no_grad():
        reading = runtime.model.read([prompt.tokens[place] for place in again], past, again)
    k_now, v_now = runtime.rows(0, prompt.context_tokens)
    expected = reading.stored()
    assert distance(k_now[:, again], expected[0]) < 0.01
    assert distance(v_now[:, again], expected[1]) < 0.01
    assert distance(k_now[:, kept], k_pre[:, kept]) < 0.01
    assert distance(k_now[1, again], k_pre[1, again]) > 0.1


def runtime_rows(runtime: TorchRuntime, prompt: Prompt) -> tuple[Float16, Float16]:
    """What is placed, before RoPE."""
    return runtime.rows(0, prompt.context_tokens)


def test_drift_is_corrected_as_the_specification_says(load: Load) -> None:
    """In a model of two layers the first one's rows do not drift, so before or after its attention is all the same."""
    runtime, prompt = load("llama"), prompt_of()
    masks = some(prompt, 0.4)
    made = plan.stitch(prompt, masks)
    place(runtime, prompt, readers(runtime, prompt))
    k_pre, v = runtime_rows(runtime, prompt)
    runtime.execute(made)
    k_now, v_now = runtime.rows(0, prompt.context_tokens)
    again = np.concatenate([np.zeros(11, dtype=bool), *masks])
    k_rot, k_rot_now = ([rotated_rows(runtime, rows) for rows in keys] for keys in (k_pre, k_now))
    values = [rows.reshape(len(rows), -1) for rows in v.copy()]
    fresh_v = [rows[again].reshape(again.sum(), -1) for rows in v_now]
    fresh_k = [rows[again] for rows in k_rot_now]
    likely = k_rot[drift.middle(2)]
    correction = drift.Correction.of(made, runtime.shape, likely)
    assert correction is not None
    k_rot = [correction.settled("k", *rows) for rows in zip(k_rot, fresh_k, strict=True)]
    values = [correction.settled("v", *rows) for rows in zip(values, fresh_v, strict=True)]
    for layer in range(2):
        assert distance(k_rot_now[layer][~again], k_rot[layer][~again]) < 0.02
        assert distance(v_now[layer, ~again].reshape(values[layer][~again].shape), values[layer][~again]) < 0.02
    assert distance(k_now[1, ~again], k_pre[1, ~again]) > 0.1


def rotated_rows(runtime: TorchRuntime, k_pre: Float16) -> Float16:
    """One layer's keys from position 0 on as the specification takes them, [rows, channels]."""
    rotated = runtime.model.rotate(k_pre.astype(np.float32), range(len(k_pre)))
    return np.asarray(rotated.half().numpy()).reshape(len(k_pre), -1)


def test_a_second_turn_stands_behind_the_first(load: Load) -> None:
    """All of it recomputed, which is reading everything anew; then without the second turn."""
    runtime, first = load("qwen2"), prompt_of()
    full(runtime, first)
    chunk, position = Segment(some_tokens(50, 31), "later"), runtime.live_tokens
    second = Prompt(Segment(some_tokens(5, 30)), (chunk,), Segment(some_tokens(7, 32)), position)
    stored_chunk = stored(runtime, first.opening.tokens, chunk.tokens)
    runtime.extend(second.opening.tokens)
    runtime.place([Placement("later", stored_chunk, second.starts[1])])
    runtime.execute(plan.stitch(second, [np.ones(50, dtype=bool)]))
    scores = runtime.extend(second.question.tokens)
    runtime.rewind(0)
    assert distance(scores, runtime.extend((*first.tokens, *second.tokens))) < 1e-3
    assert runtime.rewind(position) == position
    again = runtime.extend(first.question.tokens)
    runtime.rewind(0)
    assert distance(again, runtime.extend((*first.tokens, *first.question.tokens))) < 1e-3


def test_room_grows_and_everything_stays(load: Load, tiny: Tiny) -> None:
    runtime, prompt = TorchRuntime.load(tiny("llama")), prompt_of()
    chunks = readers(runtime, prompt)
    expected = stitched(runtime, prompt, chunks, some(prompt, 0.3))
    place(runtime, prompt, chunks)
    runtime.reserve(1500)  # which is more than it began with
    runtime.execute(plan.stitch(prompt, some(prompt, 0.3)))
    runtime.reserve(2500)
    assert distance(runtime.extend(prompt.question.tokens), expected) == 0


# As on a graphics device: packed bytes go there, layer by layer, while it computes

MIXED = (bytes([4, 3, 2, 0] * 8), bytes([5, 1, 3, 3] * 8))
PLANS = {
    "as it is": BitPlan.uniform(2, 16, 16),
    "few bits": BitPlan((4, 2), (3, 8)),
    "mixed": BitPlan((4, 5), (3, 2), k_widths=MIXED, v_by_channel=(1,)),
    "minmax": BitPlan((3, 2), (4, 2), "minmax"),
}


def packed(runtime: Runtime, guard: Sequence[int], tokens: Sequence[int], bits: BitPlan) -> ChunkReader:
    """Rows stored by falling score, as some chunks are."""
    kv = ChunkKV(*runtime.encode(guard, tokens), {})
    order = codec.score_order(np.random.default_rng(9).random(len(tokens), dtype=np.float32), bits.sinks)
    return ChunkReader(MemorySource(to_bytes(codec.encode(kv, bits, order), bytes(32))))


@pytest.mark.parametrize("bits", PLANS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_device_makes_of_packed_bytes_what_the_codec_does(load: Load, kind: str, bits: str) -> None:
    runtime, prompt = load(kind), prompt_of(chunks=(60, 130, 3))
    alike = TorchRuntime(runtime.model, like_gpu=True)
    guard = prompt.opening.tokens
    chunks = [stored(runtime, (), guard)]
    chunks += [packed(runtime, guard, chunk.tokens, PLANS[bits]) for chunk in prompt.chunks]
    masks = some(prompt, 0.3)
    expected = stitched(runtime, prompt, chunks, masks)
    place(alike, prompt, chunks)
    for chunk in chunks:
        chunk.close()  # whoever opened them does not wait
    np.testing.assert_allclose(
        alike.probe(prompt.question.tokens, prompt.context_tokens), probed(runtime, prompt, chunks), atol=0.02
    )
    alike.execute(plan.stitch(prompt, masks))
    scores = alike.extend(prompt.question.tokens)
    assert distance(scores, expected) < ROUNDING
    for token in (5, 90, 91):  # and on, token by token
        assert distance(alike.extend([token]), runtime.extend([token])) < ROUNDING


def probed(runtime: TorchRuntime, prompt: Prompt, chunks: Sequence[ChunkReader]) -> Float32:
    before = runtime.live_tokens
    try:
        other = TorchRuntime(runtime.model)
        place(other, prompt, chunks)
        return other.probe(prompt.question.tokens, prompt.context_tokens)
    finally:
        assert runtime.live_tokens == before


@pytest.mark.parametrize("layer", [0, 1])
def test_damage_is_told_where_the_layer_is_wanted(load: Load, layer: int) -> None:
    runtime, prompt = TorchRuntime(load("llama").model, like_gpu=True), prompt_of()
    chunks, expected = readers(runtime, prompt), full(runtime, prompt)
    data = bytearray(to_bytes(chunks[2].chunk(), bytes(32)))
    data[chunks[2].header.layers[layer].offset + 40] ^= 1
    damaged = ChunkReader(MemorySource(bytes(data)))
    with pytest.raises(DamagedPlacements) as told:  # noqa: PT012  which of the two is the question
        place(runtime, prompt, [*chunks[:2], damaged])
        assert layer == 1
        runtime.execute(plan.stitch(prompt, some(prompt, 0.3)))
    assert told.value.keys == ("chunk1",)
    assert distance(full(runtime, prompt), expected) == 0
    masks = some(prompt, 0.3)
    assert distance(stitched(runtime, prompt, chunks, masks), stitched(load("llama"), prompt, chunks, masks)) < ROUNDING


def test_decoding_goes_on_over_the_rows_it_can_see_and_into_new_room(load: Load) -> None:
    runtime, plain = TorchRuntime(load("qwen3").model, like_gpu=True), load("qwen3")
    tokens = some_tokens(1020, 12)
    assert distance(runtime.extend(tokens), plain.extend(tokens)) < 1e-3
    for token in range(20, 28):
        assert distance(runtime.extend([token]), plain.extend([token])) < 1e-3
    assert runtime.rewind(1000) == plain.rewind(1000) == 1000
    assert distance(runtime.extend([7]), plain.extend([7])) < 1e-3


@pytest.mark.parametrize("like_gpu", [False, True])
@pytest.mark.parametrize("count", [1, 200, 1000])
def test_candidates_picked_on_the_device_are_those_of_the_scores(
    load: Load, monkeypatch: pytest.MonkeyPatch, count: int, like_gpu: bool
) -> None:
    """Also where many scores are equal, as they are in 16 bits."""
    runtime = TorchRuntime(load("llama").model, like_gpu=like_gpu)
    full(runtime, prompt_of())
    assert isinstance(runtime, base.Picking)
    monkeypatch.setattr(Decoder, "scores", lambda self, hidden: (4 * self.model.logits(hidden)).round())
    expected = Candidates.of(runtime.extend((7,)), count)
    runtime.rewind(runtime.live_tokens - 1)
    found = base.likeliest(runtime, (7,), count)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.scores.tolist() == expected.scores.tolist()
    assert count == 1 or len(set(expected.scores)) < len(expected.scores)


# With llama.cpp


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_one_runtime_are_the_others(load: Load, load_llama: LoadLlama, kind: str) -> None:
    ours, theirs, prompt = load(kind), load_llama(kind), prompt_of()
    nothing = [np.zeros(len(chunk), dtype=bool) for chunk in prompt.chunks]
    of_ours, of_theirs = readers(ours, prompt), readers(theirs, prompt)
    scores = [stitched(r, prompt, chunks, nothing) for r in (ours, theirs) for chunks in (of_ours, of_theirs)]
    for other in scores[1:]:
        assert distance(scores[0], other) < 2 * ROUNDING
    turned = Prompt(prompt.opening, prompt.chunks[::-1], prompt.question)
    assert distance(stitched(ours, turned, [of_theirs[0], *of_theirs[:0:-1]], nothing[::-1]), scores[0]) > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_probe_is_llama_cpps_and_leaves_no_trace(load: Load, load_llama: LoadLlama, kind: str) -> None:
    ours, theirs, prompt = load(kind), load_llama(kind), prompt_of()
    chunks = readers(ours, prompt)
    nothing = [np.zeros(len(chunk), dtype=bool) for chunk in prompt.chunks]
    expected = stitched(ours, prompt, chunks, nothing)
    for position in (prompt.context_tokens, prompt.context_tokens - 20):
        masses = []
        for runtime in (ours, theirs):
            place(runtime, prompt, chunks)
            masses.append(runtime.probe(prompt.question.tokens, position))
        assert masses[0].shape == (position,)
        np.testing.assert_allclose(masses[0], masses[1], atol=0.02)
        ours.execute(plan.stitch(prompt, nothing))
        assert distance(ours.extend(prompt.question.tokens), expected) == 0


def test_encoding_early_layers_and_behind_many_guards(load: Load) -> None:
    runtime, chunk = load("qwen2"), some_tokens(70, 8)
    guards = [some_tokens(count, count) for count in (9, 12, 15, 18, 21, 24)]
    first = [runtime.encode(guard, chunk) for guard in guards]
    for guard, (k_pre, v) in zip(guards, first, strict=True):
        k_again, v_again = runtime.encode(guard, chunk)
        expected = runtime.model.encode(guard, chunk)
        assert distance(k_again, k_pre) == distance(v_again, v) == 0
        assert distance(k_pre, expected[0]) < 0.01
        assert distance(v, expected[1]) < 0.01
    early, _ = runtime.encode(guards[0], chunk, layers=1)
    np.testing.assert_array_equal(early, first[0][0][:1])


def test_attention_as_on_a_device(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for scattered tokens (interpreted here), and a mask that is not spelt out for neighbours."""
    plain, prompt = load("llama"), prompt_of()
    runtime, chunks, masks = TorchRuntime(plain.model), readers(plain, prompt), some(prompt, 0.3)
    expected, whole = stitched(plain, prompt, chunks, masks), full(plain, prompt)
    decoder = runtime._decoder
    monkeypatch.setenv("QUIRE_KERNELS", "triton")
    assert decoder._has_kernel
    assert distance(stitched(runtime, prompt, chunks, masks), expected) < 1e-3

    def contiguous(positions: np.ndarray, _: torch.Tensor) -> tuple[Tile, ...]:
        count, stop = len(positions), int(positions[-1]) + 1
        return (Tile(slice(0, count), stop, causal_lower_right(count, stop)),)

    monkeypatch.setattr(decoder, "_contiguous", contiguous)
    assert distance(full(runtime, prompt), whole) < 1e-3


# Abort


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_an_abort_comes_before_the_next_layer_and_leaves_the_runtime_usable(load: Load, asked: int) -> None:
    runtime, prompt = load("llama"), prompt_of()
    chunks, expected = readers(runtime, prompt), full(runtime, prompt)
    runtime.rewind(prompt.starts[1])

    def work() -> None:
        runtime.encode(some_tokens(5 + asked, 6), some_tokens(40, 7))
        place(runtime, prompt, chunks)
        runtime.probe(prompt.question.tokens, prompt.context_tokens)
        runtime.execute(plan.stitch(prompt, some(prompt, 0.5)))

    def at(number: int, calls: Iterator[int]) -> Callable[[], bool]:
        return lambda: next(calls) == number

    layers = runtime.shape.layers
    for stop_at in range(asked, 4 * layers, 3):  # guard, chunk, probe, plan
        calls = iter(range(1, 100))
        runtime._guards.clear()
        with pytest.raises(Aborted), runtime.abortable(at(stop_at, calls)):
            work()
        assert next(calls) == stop_at + 1, "nothing was computed after it"
    runtime.rewind(0)
    assert distance(full(runtime, prompt), expected) == 0
    again = readers(runtime, prompt)
    masks = some(prompt, 0.3)
    assert distance(stitched(runtime, prompt, again, masks), stitched(runtime, prompt, chunks, masks)) == 0


# Which runtime


def header(path: Path) -> gguf.Gguf:
    return gguf.read(path)


def test_the_setting_the_model_and_the_device_decide(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "device", lambda: None)
    model = header(tiny("llama"))
    for wish, expected in (("auto", ("llama.cpp", "")), ("llama.cpp", ("llama.cpp", "")), ("torch", ("torch", "cpu"))):
        choice = choose.choose(wish, model)
        assert (choice.runtime, choice.device) == expected
        assert choice.reason.endswith((".", "device."))
    assert choose.choose("torch", header(tiny("gemma"))).runtime == "llama.cpp"
    monkeypatch.setattr(choose, "device", lambda: torch_device.Device("Titan", 10**10))
    assert choose.choose("auto", model) == choose.Choice("torch", "cuda", "Runtime: PyTorch on Titan.")
    monkeypatch.setattr(choose, "device", lambda: torch_device.Device("Titan", 10**4))
    assert "too little memory" in choose.choose("auto", model).reason
    assert choose.choose("auto", model).runtime == "llama.cpp"


def test_what_does_not_fit_a_device_is_refused_before_it_is_tried() -> None:
    torch_device.check_weights(10**12, None)
    torch_device.check_rows(10**6, 0, 10**9, None)
    torch_device.check_weights(4 * 10**9, 8 * 10**9)
    with pytest.raises(ModelError, match=r"16\.0 GB"):
        torch_device.check_weights(16 * 10**9, 8 * 10**9)
    torch_device.check_rows(131_072, 1024, 21_504, 4 * 10**9)
    with pytest.raises(ContextOverflow) as refused:
        torch_device.check_rows(131_072, 1024, 40_960, 4 * 10**9, 1024)
    assert "22,528 tokens fit" in refused.value.hint
    torch_device.check_rows(131_072, 1024, 22_528, 4 * 10**9, 1024)
    with pytest.raises(ContextOverflow):
        torch_device.check_rows(131_072, 1024, 23_552, 4 * 10**9, 1024)


# The whole way


LIGHTHOUSE, GARDEN = (HERE / "assets" / "sample" / name for name in ("lighthouse.md", "garden.md"))
ASKED = {LIGHTHOUSE: "How high is the tower?", GARDEN: "How much water does the barrel hold?"}


def test_the_sample_folder_gets_llama_cpps_answers() -> None:
    """Each runtime reads one text and serves both, stitched and exactly; with a window as without."""
    answers: dict[tuple[str, Path], set[str]] = {}
    for name, added, window, about in (
        ("torch", [LIGHTHOUSE], 0, [LIGHTHOUSE]),
        ("llama.cpp", [LIGHTHOUSE, GARDEN], 0, [LIGHTHOUSE, GARDEN]),
        ("torch", [LIGHTHOUSE, GARDEN], 32, [LIGHTHOUSE, GARDEN]),
    ):
        with Session(config.load({"runtime": name, "max_tokens": 12, "live_window": window})) as session:
            tried_out(session.engine)
            for file in added:
                session.library.add_root(file)
            session.index(added, lambda _: None)
            before = session.engine.written_bytes
            session.cache(lambda _: None, lambda: False)
            assert (session.engine.written_bytes > before) == (window == 0), "everything was there, at the same address"
            assert session.engine.runtime.name == name
            asked: list[tuple[config.Dial, Path]] = [("exact", LIGHTHOUSE), *(("balanced", file) for file in about)]
            for dial, file in asked:
                session.settings = replace(session.settings, dial=dial)
                events = list(session.ask(ASKED[file], within=file))
                assert isinstance(events[-1], Answered)
                assert (events[-1].tokens.reused > 0) == (dial == "balanced")
                said = "".join(event.text for event in events if isinstance(event, Text))
                answers.setdefault((dial, file), set()).add(said)
    assert len(answers) == 3
    assert all(len(said) == 1 for said in answers.values()), answers
    assert any("34 metres" in said for of_one in answers.values() for said in of_one)
    assert any("900 litres" in said for of_one in answers.values() for said in of_one)
