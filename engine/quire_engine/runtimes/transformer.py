"""The reference: a decoder in plain PyTorch, float32 and differentiable, over the weights of a GGUF file.

    model = Transformer.load(path)
    context = model.read(tokens)                           from the beginning
    past = model.place(context.k_pre, context.v, context.positions)
    model.logits(model.read(question, past).hidden)        [batch, tokens, vocabulary]

It gives llama.cpp's logits and shares its KV: keys are handed out before RoPE, in GGUF's own channel order. A token at
position p sees the keys at positions 0..p, wherever they come from and in whatever order they lie. Clarity comes before
speed; every weight takes four bytes, unless blocks are asked for. Knows nothing of tokenizing, chunks, files of KV or
plans.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from quire_engine import gguf
from quire_engine.kv import transfer
from quire_engine.runtimes.weights import Blocks, Matrix, Weights, numbers
from quire_engine.types import Float16, Float32, ModelShape, Rope

Array = Tensor | npt.NDArray[np.floating]
Positions = Sequence[int] | npt.NDArray[np.integer]


class Past(Protocol):
    """KV that stands before or between the tokens that are read."""

    @property
    def positions(self) -> Positions:
        """Of every row, in any order."""

    def rows(self, layer: int) -> tuple[Array, Array]:
        """Rotated keys and values of one layer: [rows, kv_heads, dim], or [batch, rows, kv_heads, dim]."""


@dataclass(frozen=True)
class Placed:
    """KV at its positions, per layer as `Past.rows` gives it. A layer may hold a batch where the others hold one."""

    positions: Positions
    k_rot: tuple[Array, ...]
    v: tuple[Array, ...]

    def rows(self, layer: int) -> tuple[Array, Array]:
        return self.k_rot[layer], self.v[layer]

    def with_layer(self, layer: int, k_rot: Array, v: Array) -> "Placed":
        """The same with other rows in one layer."""

        def swap(all_layers: tuple[Array, ...], one: Array) -> tuple[Array, ...]:
            return (*all_layers[:layer], one, *all_layers[layer + 1 :])

        return replace(self, k_rot=swap(self.k_rot, k_rot), v=swap(self.v, v))


class Growing(Past, Protocol):
    """KV that grows with what is read, such as a conversation's."""

    def append(self, k_pre: Float16, v: Float16) -> None:
        """Rows of the next positions, [layers, tokens, kv_heads, dim]."""


@dataclass(frozen=True)
class Reading:
    """What reading some tokens gave.

    hidden: [batch, tokens, width], the output of the last layer that ran.
    k_pre, v: per layer that ran [batch, tokens, kv_heads, dim]; keys before RoPE (and after Qwen3's norm).
    """

    positions: Positions
    hidden: Tensor
    k_pre: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    def stored(self) -> tuple[Float16, Float16]:
        """k_pre and v of the first text of the batch, [layers, tokens, kv_heads, dim], as every runtime stores them."""
        k_pre, v = (
            torch.stack([layer[0] for layer in layers]).detach().half().numpy() for layers in (self.k_pre, self.v)
        )
        return k_pre, v


@dataclass(frozen=True)
class Linear:
    weight: Matrix  # [out, in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(self.weight, Blocks):
            return functional.linear(x, self.weight, self.bias)
        y = self.weight.times(x)
        return y if self.bias is None else y + self.bias

    @property
    def numbers(self) -> Tensor:
        """Of the weight, whatever it is kept as."""
        return numbers(self.weight)


@dataclass(frozen=True)
class Norm:
    """Root mean square norm over the last dimension."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, under llama.cpp's names."""

    attn_norm: Norm
    attn_q: Linear
    attn_k: Linear
    attn_v: Linear
    attn_q_norm: Callable[[Tensor], Tensor]  # of every head; Qwen3 alone has them
    attn_k_norm: Callable[[Tensor], Tensor]
    attn_output: Linear
    ffn_norm: Norm
    ffn_gate: Linear
    ffn_up: Linear
    ffn_down: Linear

    def projections(self, hidden: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys before RoPE, and values, [..., tokens, heads, dim], of the layer's input."""
        x = self.attn_norm(hidden)
        return (
            self.attn_q_norm(_heads(self.attn_q(x), shape.heads)),
            self.attn_k_norm(_heads(self.attn_k(x), shape.kv_heads)),
            _heads(self.attn_v(x), shape.kv_heads),
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        x = self.ffn_norm(x)
        return self.ffn_down(functional.silu(self.ffn_gate(x)) * self.ffn_up(x))


@dataclass(frozen=True)
class Transformer:
    shape: ModelShape
    embedding: Matrix  # [vocabulary, width]
    layers: tuple[Layer, ...]
    output_norm: Norm
    output: Linear

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
    ) -> Self:
        """All weights, as numbers of one type; packed: matrices as the file's blocks where the kernels know them.

        What stands below reads and attends in float32 on the CPU; other devices and types are for runtimes that take
        the weights alone.  Raises ModelError for a file or an architecture that cannot be read.
        """
        header = gguf.read(path)
        weights = Weights(header, torch.device(device), dtype, packed)
        shape = gguf.shape(header)
        build = _Builder(weights, header.number("attention.layer_norm_rms_epsilon", 1e-5))
        embedding = weights.matrix("token_embd.weight")
        model = cls(
            shape,
            embedding,
            tuple(build.layer(f"blk.{index}") for index in range(shape.layers)),
            build.norm("output_norm"),
            build.linear("output") if weights.has("output.weight") else Linear(embedding, None),
        )
        weights.refuse_unread()
        return model

    # Reading

    def read(self, tokens: Sequence[int], behind: Past | None = None, positions: Positions | None = None) -> Reading:
        """Reads tokens behind, or between, what stands there already; without positions, after its last one."""
        if positions is None:
            first = int(max(behind.positions, default=-1)) + 1 if behind is not None else 0
            positions = range(first, first + len(tokens))
        return self.run(self.embed(tokens), positions, behind)

    def run(
        self, hidden: Tensor, positions: Positions, behind: Past | None = None, first: int = 0, stop: int | None = None
    ) -> Reading:
        """Layers first..stop (to the top where None) over the input of layer `first`, [batch, tokens, width].

        The batches of hidden and of every layer of `behind` are equal or 1; the rows of `behind` in layers that do not
        run are not asked for.
        """
        keys, values = [], []
        for index in range(first, self.shape.layers if stop is None else stop):
            hidden, k_pre, v = self._layer(index, hidden, positions, behind)
            keys.append(k_pre)
            values.append(v)
        return Reading(positions, hidden, tuple(keys), tuple(values))

    def embed(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """The input of layer 0, [batch, tokens, width], of one text or of several equally long ones."""
        ids = torch.as_tensor(tokens)
        return self.embedding[ids if ids.dim() == 2 else ids[None]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., vocabulary], from the output of the top layer."""
        return self.output(self.output_norm(hidden))

    # KV

    @torch.no_grad()
    def encode(self, guard: Sequence[int], tokens: Sequence[int], layers: int | None = None) -> tuple[Float16, Float16]:
        """As `Runtime.encode`: K before RoPE and V of `tokens` read behind `guard`, of the first so many layers."""
        both = self.embed([*guard, *tokens])
        k_pre, v = self.run(both, range(both.shape[1]), stop=layers).stored()
        return k_pre[:, len(guard) :], v[:, len(guard) :]

    def place(self, k_pre: Iterable[Array], v: Iterable[Array], positions: Positions) -> Placed:
        """Rows of every layer, keys before RoPE, at these positions: what `encode` or another runtime gave."""
        return Placed(positions, tuple(self.rotate(layer, positions) for layer in k_pre), tuple(v))

    def rotate(self, k_pre: Array, positions: Positions) -> Tensor:
        """Keys or queries [..., tokens, heads, dim] turned to their positions."""
        cos, sin = transfer.angles(np.asarray(positions), self.shape.rope)
        c, s = torch.from_numpy(cos)[:, None], torch.from_numpy(sin)[:, None]  # the same for every head
        return turned(_tensor(k_pre), c, s, self.shape.rope)

    @torch.no_grad()
    def extend(self, tokens: Sequence[int], live: Growing) -> Float32:
        """Reads tokens behind a conversation, whose KV grows by theirs; scores of the next token [vocabulary]."""
        reading = self.read(tokens, live)
        live.append(*reading.stored())
        scores: Float32 = self.logits(reading.hidden[0, -1]).numpy()
        return scores

    def _layer(
        self, index: int, hidden: Tensor, positions: Positions, behind: Past | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layers[index]
        q, k_pre, v = layer.projections(hidden, self.shape)
        attended = self._attend(index, self.rotate(q, positions), self.rotate(k_pre, positions), v, positions, behind)
        hidden = hidden + layer.attn_output(attended.flatten(-2))
        return hidden + layer.feed_forward(hidden), k_pre, v

    def _attend(
        self, index: int, q_rot: Tensor, k_rot: Tensor, v: Tensor, positions: Positions, behind: Past | None
    ) -> Tensor:
        """[batch, tokens, heads, value_dim]; every tensor is [batch, tokens, heads, dim]."""
        q_positions = k_positions = np.asarray(positions)
        if behind is not None and len(behind.positions):
            k_positions = np.concatenate([np.asarray(behind.positions), q_positions])
            past_k, past_v = behind.rows(index)
            k_rot, v = _join(past_k, k_rot), _join(past_v, v)
        visible = torch.from_numpy(k_positions <= q_positions[:, None])
        batch = max(len(x) for x in (q_rot, k_rot, v))  # one text may meet a batch of keys, or of values alone
        q, k, v = (x.expand(batch, -1, -1, -1).transpose(1, 2) for x in (q_rot, k_rot, v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return attended.transpose(1, 2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[..., heads * dim] -> [..., heads, dim]."""
    return x.view(*x.shape[:-1], heads, -1)


def _join(past: Array, own: Tensor) -> Tensor:
    """[batch, past rows + own rows, kv_heads, dim]; past may lack the batch."""
    rows = _tensor(past)
    rows = rows if rows.dim() == 4 else rows[None]
    batch = max(len(rows), len(own))
    return torch.cat([rows.expand(batch, -1, -1, -1), own.expand(batch, -1, -1, -1)], dim=1)


def turned(x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
    """Keys or queries [..., tokens, heads, dim] rotated by [tokens, 1, dims/2]. The specification is
    quire_kernels.rope."""
    first, rest = x[..., : rope.dims], x[..., rope.dims :]
    if rope.layout == "adjacent":
        a, b = first[..., ::2], first[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = first.chunk(2, dim=-1)
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((pairs, rest), dim=-1)


def _tensor(x: Array) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32)


@dataclass(frozen=True)
class _Builder:
    """Makes parts of the decoder from weights, by llama.cpp's names."""

    weights: Weights
    epsilon: float

    def layer(self, block: str) -> Layer:
        return Layer(
            self.norm(f"{block}.attn_norm"),
            self.linear(f"{block}.attn_q"),
            self.linear(f"{block}.attn_k"),
            self.linear(f"{block}.attn_v"),
            self._norm_if_any(f"{block}.attn_q_norm"),
            self._norm_if_any(f"{block}.attn_k_norm"),
            self.linear(f"{block}.attn_output"),
            self.norm(f"{block}.ffn_norm"),
            self.linear(f"{block}.ffn_gate"),
            self.linear(f"{block}.ffn_up"),
            self.linear(f"{block}.ffn_down"),
        )

    def linear(self, name: str) -> Linear:
        bias = f"{name}.bias"
        return Linear(
            self.weights.matrix(f"{name}.weight"), self.weights.tensor(bias) if self.weights.has(bias) else None
        )

    def norm(self, name: str) -> Norm:
        return Norm(self.weights.tensor(f"{name}.weight"), self.epsilon)

    def _norm_if_any(self, name: str) -> Callable[[Tensor], Tensor]:
        return self.norm(name) if self.weights.has(f"{name}.weight") else _unchanged
