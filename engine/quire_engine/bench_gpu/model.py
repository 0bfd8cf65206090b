"""A model of random weights in memory, in the shape of Llama 3's 8 billion parameters: 16-bit, or kept as Q4_K blocks.

Knows nothing of what is measured with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from quire_engine.bench_gpu.clock import Bench
from quire_engine.runtimes import torch_device
from quire_engine.runtimes.transformer import Layer, Linear, Norm, Transformer
from quire_engine.runtimes.weights import Blocks, Matrix, numbers
from quire_engine.types import ModelShape, Rope
from quire_kernels.device_weights import FORMATS, Packed

Weights = Literal["bf16", "q4_k"]
_Part = TypeVar("_Part")
_EPSILON = 1e-5
_ROOMY_BYTES = 36 << 30


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int

    @property
    def dim(self) -> int:
        return self.width // self.heads


EIGHT_BILLION = Sizes(32, 4096, 32, 8, 14336, 128_256)
TINY = Sizes(3, 256, 8, 2, 512, 320)


def sizes(bench: Bench) -> Sizes:
    return TINY if bench.quick else EIGHT_BILLION


def shape_of(bench: Bench) -> ModelShape:
    of = sizes(bench)
    rope = Rope("adjacent", of.dim, 500_000.0)
    return ModelShape("llama", of.layers, of.heads, of.kv_heads, of.dim, of.dim, 1 << 17, rope)


@torch.no_grad()
def make(bench: Bench, weights: Weights) -> Transformer:
    """Numbers whose sizes neither grow nor vanish on the way up."""
    of, shape, device = sizes(bench), shape_of(bench), bench.device
    kind = torch_device.number_type(device)
    torch.manual_seed(1)
    matrix = _dense(device, kind) if weights == "bf16" else _packed(device, kind, of.hidden * of.width)

    def linear(rows: int, columns: int) -> Linear:
        return Linear(matrix(rows, columns, columns**-0.5), None)

    def norm() -> Norm:
        return Norm(torch.ones(of.width, dtype=kind, device=device), _EPSILON)

    kv = of.kv_heads * of.dim
    layers = tuple(
        Layer(
            attn_norm=norm(),
            attn_q=linear(of.width, of.width),
            attn_k=linear(kv, of.width),
            attn_v=linear(kv, of.width),
            attn_q_norm=_unchanged,
            attn_k_norm=_unchanged,
            attn_output=linear(of.width, of.width),
            ffn_norm=norm(),
            ffn_gate=linear(of.hidden, of.width),
            ffn_up=linear(of.hidden, of.width),
            ffn_down=linear(of.width, of.hidden),
        )
        for _ in range(of.layers)
    )
    embedding = matrix(of.vocabulary, of.width, 1.0)
    return Transformer(shape, embedding, layers, norm(), linear(of.vocabulary, of.width))


def fitting(bench: Bench) -> Weights:
    """16-bit weights where the device has room for them and for long prompts, else Q4_K."""
    free = torch_device.free_bytes(bench.device)
    return "bf16" if free is None or free > _ROOMY_BYTES else "q4_k"


def copied(transformer: Transformer, device: torch.device, kind: torch.dtype) -> Transformer:
    """The same 16-bit weights elsewhere."""

    def moved(part: _Part) -> _Part:
        if isinstance(part, Linear):
            return replace(part, weight=part.numbers.to(device, kind))
        return replace(part, weight=part.weight.to(device, kind)) if isinstance(part, Norm) else part

    layers = (Layer(**{name: moved(part) for name, part in vars(layer).items()}) for layer in transformer.layers)
    return replace(
        transformer,
        embedding=numbers(transformer.embedding).to(device, kind),
        layers=tuple(layers),
        output_norm=moved(transformer.output_norm),
        output=moved(transformer.output),
    )


def read_bytes(model: Transformer) -> int:
    """Of weights that one token needs: all but the embedding."""
    products = [
        linear.weight
        for layer in model.layers
        for linear in (layer.attn_q, layer.attn_k, layer.attn_v, layer.attn_output, layer.ffn_gate, layer.ffn_up,
                       layer.ffn_down)
    ]  # fmt: skip
    return sum(weight.nbytes for weight in (*products, model.output.weight))


def q4_k(rows: int, columns: int, deviation: float, device: torch.device) -> Tensor:
    """Blocks with all bits at random but for the two float16 scales, which give numbers about as large."""
    data = torch.randint(0, 256, (rows, columns // 256, 144), dtype=torch.uint8, device=device)
    step = deviation / (32 * 4.6)  # steps are around 32, codes have a deviation of 4.6
    scales = torch.tensor([step, 7.5 * step], dtype=torch.float16, device=device)
    data[:, :, :4] = scales.view(torch.uint8)
    return data.reshape(rows, -1)


Make = Callable[[int, int, float], Matrix]
"""Of rows, columns, and the deviation of the numbers."""


def _dense(device: torch.device, kind: torch.dtype) -> Make:
    return lambda rows, columns, size: torch.randn(rows, columns, dtype=kind, device=device).mul_(size)


def _packed(device: torch.device, kind: torch.dtype, most: int) -> Make:
    scratch = torch.empty(most, dtype=kind, device=device)
    return lambda rows, columns, size: Blocks(Packed(q4_k(rows, columns, size, device), FORMATS["Q4_K"]), scratch)


def _unchanged(x: Tensor) -> Tensor:
    return x
