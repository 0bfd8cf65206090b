"""The reference decoder against llama.cpp: the same scores, and KV that either reads and the other serves."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gguf as gguf_package
import llama_cpp.llama_cpp as c
import numpy as np
import pytest
import torch

from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.kv import transfer
from quire_engine.kv.format import ChunkReader
from quire_engine.kv.transfer import Placement
from quire_engine.runtimes.llama_context import LlamaContext, LlamaModel
from quire_engine.runtimes.llama_cpp import LlamaCppRuntime
from quire_engine.runtimes.transformer import Placed, Transformer
from quire_engine.types import Float32
from quire_kernels import rope
from stitching import KINDS, ROUNDING, LoadLlama, distance, llama_of, some_tokens, stored, written
from tiny_gguf import write_tiny_gguf

QUANTISED = {"Q2_K": 10, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7, "Q5_1": 9, "IQ4_XS": 30, "BF16": 32}
Tiny = Callable[[str], Path]


def llama_scores(path: Path, tokens: Sequence[int]) -> Float32:
    """llama.cpp's scores after every token, [tokens, vocabulary]."""
    model = LlamaModel(path)
    context = LlamaContext(model, 1024, 1, threads=1)
    count = len(tokens)
    ids, positions = np.asarray(tokens, np.int32), np.arange(count, dtype=np.int32)
    context._decode(ids, positions, np.zeros(count, np.int32), np.ones(count, np.int8))
    scores = np.ctypeslib.as_array(c.llama_get_logits(context.handle), (count, model.vocabulary_size)).copy()
    context.close()
    return np.asarray(scores, np.float32)


@torch.no_grad()
def scores_of(model: Transformer, tokens: Sequence[int]) -> Float32:
    return np.asarray(model.logits(model.read(tokens).hidden[0]).numpy())


def kl(reference: Float32, other: Float32) -> float:
    """Mean over tokens."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_exact_weights_give_llama_cpps_scores(tiny: Tiny, kind: str) -> None:
    tokens = some_tokens(200, 3)
    reference = llama_scores(tiny(kind), tokens)
    scores = scores_of(Transformer.load(tiny(kind)), tokens)
    assert kl(reference, scores) < 1e-5
    swapped = (*tokens[:50], tokens[51], tokens[50], *tokens[52:])
    assert kl(reference, scores_of(Transformer.load(tiny(kind)), swapped)) > 0.01, "the order matters"


@pytest.mark.parametrize("kind", ["qwen2", "linear", "factors"])
def test_rotation_is_the_kernels_and_spares_the_channels_beyond_it(tiny: Tiny, kind: str) -> None:
    """llama.cpp itself refuses these architectures with fewer rotated channels than a head has."""
    shape = gguf.shape(gguf.read(tiny(kind)))
    part = replace(shape.rope, dims=8, factors=shape.rope.factors[:4])
    model = replace(Transformer.load(tiny(kind)), shape=replace(shape, rope=part))
    k_pre, positions = np.random.default_rng(1).standard_normal((5, 2, 16)).astype(np.float32), [3, 0, 900, 7, 41]
    cos, sin = transfer.angles(positions, part)
    np.testing.assert_allclose(model.rotate(k_pre, positions), rope.rotate(k_pre, cos, sin, part.layout), atol=1e-5)
    np.testing.assert_array_equal(model.rotate(k_pre, positions)[..., 8:], k_pre[..., 8:])


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_read(tmp_path: Path, name: str) -> None:
    """llama.cpp's own quantiser against the decoder's reading; llama.cpp also rounds what it multiplies with them."""
    path, quantised = write_tiny_gguf(tmp_path / "wide.gguf", heads=16), tmp_path / f"{name}.gguf"
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = QUANTISED[name]
    assert c.llama_model_quantize(bytes(path), bytes(quantised), ctypes.byref(parameters)) == 0
    types = {tensor.ggml_type for tensor in gguf.read(quantised).tensors.values()}
    assert types > {0}, "more than one type"
    tokens = some_tokens(100, 3)
    reference, scores = llama_scores(quantised, tokens), scores_of(Transformer.load(quantised), tokens)
    exact = scores_of(Transformer.load(path), tokens)
    assert kl(reference, scores) < 0.02
    assert kl(reference, scores) < kl(reference, exact) / 2
    print(name, kl(reference, scores), kl(reference, exact))


@pytest.fixture(scope="module")
def real(smollm: Path) -> Transformer:
    return Transformer.load(smollm)


def test_a_real_model_stays_at_llama_cpps_own_noise(smollm: Path, real: Transformer) -> None:
    text = Path(__file__).read_text()
    tokens = LlamaModel(smollm, vocabulary_only=True).tokenize(text)[:200]
    assert kl(llama_scores(smollm, tokens), scores_of(real, tokens)) < 0.008


# KV goes both ways


GUARD, CHUNK, QUESTION = some_tokens(11, 1), some_tokens(80, 2), some_tokens(9, 3)


def served(runtime: LlamaCppRuntime, *chunks: ChunkReader) -> Float32:
    """The question's scores behind these chunks, served by llama.cpp."""
    runtime.rewind(0)
    placements, start = [], 0
    for index, chunk in enumerate(chunks):
        placements.append(Placement(str(index), chunk, start))
        start += chunk.tokens
    runtime.place(placements)
    runtime.adopt()
    return runtime.extend(QUESTION)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_serves_what_the_decoder_encoded(load_llama: LoadLlama, tiny: Tiny, kind: str) -> None:
    runtime, model = load_llama(kind), Transformer.load(tiny(kind))
    theirs = [stored(runtime, (), GUARD), stored(runtime, GUARD, CHUNK)]
    ours = [stored(model, (), GUARD), stored(model, GUARD, CHUNK)]
    expected = served(runtime, *theirs)
    assert distance(served(runtime, *ours), expected) < ROUNDING
    mistaken = [ours[0], stored(model, (), CHUNK)]
    assert distance(served(runtime, *mistaken), expected) > 1, "the chunk's rows decide what is said"


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_serves_what_llama_cpp_encoded(load_llama: LoadLlama, tiny: Tiny, kind: str) -> None:
    runtime, model = load_llama(kind), Transformer.load(tiny(kind))
    expected = scores_of(model, (*GUARD, *CHUNK, *QUESTION))[-1]
    pieces = [runtime.encode((), GUARD), runtime.encode(GUARD, CHUNK)]
    k_pre, v = (np.concatenate(rows, axis=1) for rows in zip(*pieces, strict=True))
    with torch.no_grad():
        reading = model.read(QUESTION, model.place(k_pre, v, range(len(GUARD + CHUNK))))
    assert distance(model.logits(reading.hidden[0, -1]).numpy(), expected) < ROUNDING


def test_a_real_models_chunks_go_both_ways(smollm: Path, real: Transformer) -> None:
    runtime, model = llama_of(smollm), real
    text = runtime.model.tokenize(Path(__file__).read_text())
    guard, chunk, question = text[:20], text[20:150], text[150:170]
    ours, theirs = model.encode(guard, chunk), runtime.encode(guard, chunk)
    assert distance(ours[0], theirs[0]) < 0.05 * np.abs(theirs[0]).max()
    opening = runtime.encode((), guard)
    scores = []
    for rows in (theirs, ours):
        runtime.rewind(0)
        runtime.place([Placement("g", written(*opening), 0), Placement("c", written(*rows), len(guard))])
        runtime.adopt()
        scores.append(runtime.extend(question))
    runtime.close()
    k_pre, v = (np.concatenate(pair, axis=1) for pair in zip(opening, theirs, strict=True))
    with torch.no_grad():
        reading = model.read(question, model.place(k_pre, v, range(150)))
        scores.append(model.logits(reading.hidden[0, -1]).numpy())
    assert kl(scores[0][None], scores[1][None]) < 0.01
    assert kl(scores[0][None], scores[2][None]) < 0.02


# How it may be read


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Transformer:
    return Transformer.load(tiny("qwen3"))


@torch.no_grad()
def test_a_layer_may_hold_a_batch_and_only_the_layers_above_it_run_again(model: Transformer) -> None:
    """What the search for precision does, against reading everything anew for every variant."""
    k_pre, v = (torch.from_numpy(rows).float() for rows in model.encode((), CHUNK))
    places = range(len(CHUNK))
    past, positions = model.place(list(k_pre), list(v), places), range(len(CHUNK), len(CHUNK + QUESTION))
    below = model.run(model.embed(QUESTION), positions, past, stop=1)
    variants = torch.stack([k_pre[1], k_pre[1].round(), k_pre[1] + 0.3])
    keys = model.rotate(variants, places)
    together = model.run(below.hidden, positions, past.with_layer(1, keys, past.v[1]), first=1)
    assert together.hidden.shape[0] == 3
    for index in range(3):
        alone = model.read(QUESTION, past.with_layer(1, keys[index], past.v[1]))
        torch.testing.assert_close(together.hidden[index], alone.hidden[0], rtol=1e-4, atol=1e-4)
    assert distance(together.hidden[0].numpy(), together.hidden[2].numpy()) > 0.1
    values = torch.stack([v[1], v[1] + 0.3])
    together = model.run(below.hidden, positions, past.with_layer(1, keys[0], values), first=1)
    alone = model.read(QUESTION, past.with_layer(1, keys[0], values[1]))
    torch.testing.assert_close(together.hidden[1], alone.hidden[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_texts_of_a_batch_do_not_see_each_other(model: Transformer) -> None:
    texts = [some_tokens(30, seed) for seed in (4, 5)]
    together = model.run(model.embed(texts), range(30))
    for index, text in enumerate(texts):
        torch.testing.assert_close(together.hidden[index], model.read(text).hidden[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_token_sees_the_positions_up_to_its_own_and_no_other(model: Transformer) -> None:
    """Tokens read in any order between rows in any order; exact rows make every result full prefill's."""
    tokens = (*GUARD, *CHUNK)
    whole = model.read(tokens)
    order = np.random.default_rng(7).permutation(len(tokens))
    again, kept = order[:30], order[30:]
    past = model.place([k[0, kept] for k in whole.k_pre], [v[0, kept] for v in whole.v], kept)
    reading = model.read([tokens[place] for place in again], past, positions=again)
    torch.testing.assert_close(reading.hidden[0], whole.hidden[0, again], rtol=1e-3, atol=1e-3)
    # Another row at position 50 changes what stands after it and nothing before it.
    changed = Placed(
        past.positions, tuple(k + 0.5 * torch.from_numpy(kept == kept.max())[:, None, None] for k in past.k_rot), past.v
    )
    moved = (model.read([tokens[place] for place in again], changed, positions=again).hidden - reading.hidden)[0]
    assert moved[torch.from_numpy(again < kept.max())].abs().max() == 0
    later = some_tokens(3, 8)
    assert distance(model.read(later, changed).hidden.numpy(), model.read(later, past).hidden.numpy()) > 1e-3


def test_encoding_gives_the_early_layers_alone(model: Transformer) -> None:
    k_pre, v = model.encode(GUARD, CHUNK)
    assert k_pre.dtype == v.dtype == np.float16
    assert k_pre.shape == v.shape == (2, 80, 2, 16)
    early, _ = model.encode(GUARD, CHUNK, layers=1)
    np.testing.assert_array_equal(early, k_pre[:1])


# Refusals


def test_without_pytorch_answers_work_and_plans_say_why(tiny: Tiny) -> None:
    script = f"""
import sys
sys.modules["torch"] = None  # as where it is not installed
from pathlib import Path
from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.runtimes import choose
path = Path({str(tiny("llama"))!r})
runtime = choose.runtime(path, gguf.shape(gguf.read(path)), threads=1, stitching=True)
print(len(runtime.extend([9, 10, 11])))
try:
    choose.reference(path)
except ModelError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[1:] == ["Precision plans need PyTorch, which is not installed here."], done.stderr
    assert int(done.stdout.splitlines()[0]) > 256


def test_architectures_it_does_not_know_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="gemma"):
        Transformer.load(tiny("gemma"))


def test_parts_it_does_not_know_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """A mixture of experts calls itself llama too."""
    reader, path = gguf_package.GGUFReader(tiny("llama")), tmp_path / "experts.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    for key, kind in (("block_count", "uint32"), ("attention.head_count", "uint32"), ("embedding_length", "uint32")):
        getattr(writer, f"add_{kind}")(f"llama.{key}", int(reader.fields[f"llama.{key}"].contents()))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("blk.1.ffn_gate_inp.weight", np.ones((8, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_gate_inp\.weight"):
        Transformer.load(path)


def test_a_file_that_ends_early_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny("llama").read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"output\.weight"):
        Transformer.load(path)
