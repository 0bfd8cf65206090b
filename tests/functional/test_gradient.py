"""KVmix's profile against finite differences, its rule, and how it runs on the real model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quire_engine.errors import Aborted, QuireError
from quire_engine.precision import gradient, plans
from quire_engine.runtimes.llama_context import LlamaModel
from quire_engine.runtimes.transformer import Transformer
from tiny_gguf import write_tiny_gguf

CALIBRATION = Path(__file__).parents[2] / "assets" / "calibration.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """Qwen2, whose biases are none of the profile's business, with layers that differ in importance."""
    return Transformer.load(write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", "qwen2", layers=3))


def prompt_of(tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(5, 300, tokens).tolist())


def moved(model: Transformer, index: int, name: str, direction: torch.Tensor) -> Transformer:
    """The model with one projection's weights moved."""
    layer = model.layers[index]
    k, v = layer.attn_k, layer.attn_v
    if name == "attn_k":
        k = replace(k, weight=k.numbers + direction)
    else:
        v = replace(v, weight=v.numbers + direction)
    layers = list(model.layers)
    layers[index] = replace(layer, attn_k=k, attn_v=v)
    return replace(model, layers=tuple(layers))


def test_norms_are_those_of_every_layers_own_gradient(model: Transformer) -> None:
    """One backward pass for all layers against one per layer and projection, the straightforward way."""
    prompt = prompt_of(40, 1)
    found = gradient.importance(model, [prompt])
    for index in range(3):
        for name, norms in (("attn_k", found.k), ("attn_v", found.v)):
            step = torch.zeros_like(getattr(model.layers[index], name).weight, requires_grad=True)
            (found_alone,) = torch.autograd.grad(gradient.loss(moved(model, index, name, step), prompt), step)
            assert norms[index] == pytest.approx(float(found_alone.norm()), rel=1e-4)


@torch.no_grad()
def test_a_norm_is_how_fast_the_loss_grows_along_the_gradient(model: Transformer) -> None:
    """Without automatic differentiation in the way: a small step along the gradient, there and back."""
    prompt = prompt_of(40, 1)
    found = gradient.importance(model, [prompt])
    for index, name, norm in ((0, "attn_k", found.k[0]), (2, "attn_k", found.k[2]), (1, "attn_v", found.v[1])):
        step = torch.zeros_like(getattr(model.layers[index], name).weight, requires_grad=True)
        with torch.enable_grad():
            (direction,) = torch.autograd.grad(gradient.loss(moved(model, index, name, step), prompt), step)
        direction *= 3e-2 / direction.norm()
        there, back = (float(gradient.loss(moved(model, index, name, s * direction), prompt)) for s in (1, -1))
        assert (there - back) / 6e-2 == pytest.approx(norm, rel=0.02)


@torch.no_grad()
def test_the_loss_is_that_of_the_next_token(model: Transformer) -> None:
    """Labels are shifted once: token by token, the probability of what does follow."""
    prompt = prompt_of(12, 2)
    surprises = []
    for place in range(1, len(prompt)):
        scores = model.logits(model.read(prompt[:place]).hidden[0, -1])
        surprises.append(-float(torch.log_softmax(scores, dim=-1)[prompt[place]]))
    assert float(gradient.loss(model, prompt)) == pytest.approx(float(np.mean(surprises)), rel=1e-4)


def test_norms_are_means_over_prompts_in_any_order_and_length(model: Transformer) -> None:
    texts = [prompt_of(40, 1), prompt_of(7, 2), prompt_of(25, 3)]
    alone = [gradient.importance(model, [text]) for text in texts]
    together, turned = gradient.importance(model, texts), gradient.importance(model, texts[::-1])
    np.testing.assert_allclose(together.k, np.mean([one.k for one in alone], axis=0), rtol=1e-5)
    np.testing.assert_allclose(together.v, np.mean([one.v for one in alone], axis=0), rtol=1e-5)
    np.testing.assert_allclose(turned.k, together.k, rtol=1e-5)
    np.testing.assert_allclose(turned.v, together.v, rtol=1e-5)
    assert abs(alone[0].k / alone[2].k - 1).max() > 0.02, "prompts differ, so this says something"


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    gradient.importance(model, [prompt_of(10, 1)])
    assert not any(
        weight.requires_grad for layer in model.layers for weight in (layer.attn_k.numbers, layer.attn_v.numbers)
    )


@pytest.mark.parametrize(("layers", "favoured"), [(1, 1), (2, 1), (9, 1), (10, 2), (19, 2), (24, 4), (30, 6), (32, 6)])
def test_the_published_rule(layers: int, favoured: int) -> None:
    """Two rounded tenths of the layers, keys and values each by their own rank. Of 32 layers: 2.19 and 2.38 bits."""
    random = np.random.default_rng(layers)
    k, v = (random.permutation(layers).astype(np.float32) for _ in range(2))
    plan = plans.kvmix(k, v)
    assert [bits == 3 for bits in plan.k_bits] == (k >= layers - favoured).tolist()
    assert [bits == 4 for bits in plan.v_bits] == (v >= layers - favoured).tolist()
    assert set(plan.k_bits) <= {2, 3}
    assert set(plan.v_bits) <= {2, 4}
    assert (plan.grid, plan.sinks) == ("minmax", 0)
    if layers == 32:
        assert (sum(plan.k_bits), sum(plan.v_bits)) == (32 * 2.1875, 32 * 2.375)


def test_progress_and_stopping(model: Transformer) -> None:
    seen: list[tuple[int, int]] = []
    texts = [prompt_of(8, seed) for seed in range(3)]
    gradient.importance(model, texts, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    with pytest.raises(Aborted):
        gradient.importance(model, texts, lambda done, total: seen.append((done, total)), lambda: len(seen) == 2)
    assert seen == [(1, 3), (2, 3)]


def test_what_cannot_be_profiled_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="two tokens"):
        gradient.importance(model, [prompt_of(8, 1), (9,)])
    broken = moved(model, 0, "attn_v", torch.full_like(model.layers[0].attn_v.numbers, torch.inf))
    with pytest.raises(QuireError, match="overflow"):
        gradient.importance(broken, [prompt_of(8, 1)])


def test_the_real_model_is_profiled(smollm: Path) -> None:
    tokens = LlamaModel(smollm, vocabulary_only=True).tokenize(CALIBRATION.read_text())
    pieces = (tokens[:128], tokens[128:256])
    found = gradient.importance(Transformer.load(smollm), pieces)
    assert found.k.shape == found.v.shape == (30,)
    assert min(found.k.min(), found.v.min()) > 0
    assert np.median(found.v / found.k) > 2, "values matter more to the loss than keys, in every published profile"
    plan = plans.kvmix(found.k, found.v)
    assert (plan.k_bits.count(3), plan.v_bits.count(4)) == (6, 6)
