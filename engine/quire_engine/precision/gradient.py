"""KVmix's importance of layers: how large the loss gradients on their key and value projections are.

As published (arXiv 2506.08018), with what is wrong in its public code left out: one forward and one backward pass per
prompt give the norms of all layers at once, and labels are shifted once. Prompts are read one by one, so there is no
padding that could count. Knows nothing of where prompts come from, or which bits follow (`plans.kvmix`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quire_engine.errors import Aborted, QuireError
from quire_engine.runtimes.transformer import Layer, Linear, Transformer
from quire_engine.types import Float32


@dataclass(frozen=True)
class Importance:
    """L2 norm of the language model's loss gradient on every layer's projections, mean over prompts; [layers]."""

    k: Float32
    v: Float32


def importance(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Importance:
    """One forward and one backward pass per prompt, each of at least two tokens.

    on_progress: prompts done, and all of them.  Raises Aborted between two prompts when should_stop() is true,
    QuireError when the model's numbers overflow.
    """
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError("a profile needs prompts, and a prompt two tokens")
    model = replace(model, layers=tuple(_with_leaves(layer) for layer in model.layers))
    norms = np.empty((len(prompts), 2, len(model.layers)), np.float32)
    for index, prompt in enumerate(prompts):
        if should_stop():
            raise Aborted
        norms[index] = _norms(model, prompt)
        on_progress(index + 1, len(prompts))
    if not np.isfinite(norms).all():
        raise QuireError(
            "The model's numbers overflow, so its layers cannot be compared.",
            "Check the model file; another quantisation of the same model may behave.",
        )
    return Importance(*norms.mean(axis=0, dtype=np.float64).astype(np.float32))


def _with_leaves(layer: Layer) -> Layer:
    """The layer with the same numbers, of which gradients are asked for the key and value projections alone."""

    def leaf(linear: Linear) -> Linear:
        return replace(linear, weight=linear.numbers.detach().requires_grad_())

    return replace(layer, attn_k=leaf(layer.attn_k), attn_v=leaf(layer.attn_v))


@torch.enable_grad()
def _norms(model: Transformer, prompt: Sequence[int]) -> Float32:
    """Of one prompt: [keys and values, layers]."""
    weights = [layer.attn_k.numbers for layer in model.layers] + [layer.attn_v.numbers for layer in model.layers]
    gradients = torch.autograd.grad(loss(model, prompt), weights)
    norms: Float32 = torch.stack([gradient.norm() for gradient in gradients]).reshape(2, -1).numpy()
    return norms


def loss(model: Transformer, prompt: Sequence[int]) -> Tensor:
    """Mean negative log probability of every token but the first, given those before it."""
    logits = model.logits(model.read(prompt).hidden[0, :-1])
    return functional.cross_entropy(logits, torch.tensor(prompt[1:]))
