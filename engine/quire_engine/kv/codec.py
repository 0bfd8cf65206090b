"""A chunk's KV, packed layer by layer, and back.

Decides what is quantised and what is kept exactly; the arithmetic is in quire_kernels. Knows nothing of bytes
on disk (`format`), of where they lie (`store`), or of models.

The first tokens of a chunk ("sinks") attract attention and their numbers are many times larger than the
others', so they are kept in float16 and stay out of the quantisation groups. The other rows may be stored in
another order than the text's, so that a loader can skip tokens as one run of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire_engine.errors import QuireError
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32
from quire_kernels.place import FLOAT16_MAX, PackedTensor, Tensor, place_keys, place_values
from quire_kernels.planes import pack, unpack
from quire_kernels.quantize import (
    Grid,
    UInt8,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from quire_kernels.rope import Layout

Order = npt.NDArray[np.uint16]
Quantizer = Callable[[Float16, int], tuple[UInt8, Grid]]
Dequantizer = Callable[[UInt8, Grid, int, int], Float32]

SINKS = 4
MAX_TOKENS = 1 << 16  # token numbers are stored in 16 bits


@dataclass(frozen=True)
class PackedLayer:
    """One layer of a chunk: its first rows exactly, the others packed (float16 where the plan says 16).

    order: token of every row; the sinks come first and are the first tokens of the text.
    """

    kv_heads: int
    order: Order  # [tokens]
    k_sinks: Float16  # [sinks, kv_heads * key_dim], before RoPE
    v_sinks: Float16  # [sinks, kv_heads * value_dim]
    k: Tensor  # [rows, kv_heads * key_dim], before RoPE
    v: Tensor  # [rows, kv_heads * value_dim]


@dataclass(frozen=True)
class PackedChunk:
    """All layers of a chunk, and what is known about its tokens."""

    plan: BitPlan
    kv_heads: int
    key_dim: int
    value_dim: int
    order: Order  # [tokens]
    scores: dict[str, Float32]  # name -> [tokens], in text order
    layers: tuple[PackedLayer, ...]


def text_order(tokens: int) -> Order:
    """The order in which row i is token i."""
    return np.arange(tokens, dtype=np.uint16)


def score_order(score: Float32) -> Order:
    """The sinks first, then tokens by falling score: those that a loader recomputes form one run of rows."""
    sinks = min(SINKS, len(score))
    by_score = np.argsort(-score[sinks:], kind="stable") + sinks
    return np.concatenate([np.arange(sinks), by_score]).astype(np.uint16)


def encode(kv: ChunkKV, plan: BitPlan, order: Order) -> PackedChunk:
    """Pack a chunk by the plan, rows in the given order (`text_order` unless a loader wants another).

    Raises QuireError when the chunk holds numbers that are not finite, ValueError when the arguments do not
    fit together.
    """
    _check(kv, plan, order)
    if not (np.isfinite(kv.k_pre).all() and np.isfinite(kv.v).all()):
        raise QuireError(
            "The model produced keys or values that are not numbers, so this passage cannot be stored.",
            hint="Check the model file; another quantisation of the same model may behave.",
        )
    layers, _, kv_heads, key_dim = kv.k_pre.shape
    packed = tuple(_encode_layer(kv.k_pre[i], kv.v[i], plan.k_bits[i], plan.v_bits[i], order) for i in range(layers))
    return PackedChunk(plan, kv_heads, key_dim, kv.v.shape[3], order, kv.scores, packed)


def decode(chunk: PackedChunk) -> ChunkKV:
    """The chunk as float16 in text order: sinks bit for bit, the rest within half a cell of the original."""
    keys, values = zip(*(decode_layer(layer) for layer in chunk.layers), strict=True)
    return ChunkKV(np.stack(keys), np.stack(values), chunk.scores)


def decode_layer(layer: PackedLayer) -> tuple[Float16, Float16]:
    """One layer's keys before RoPE and values, [tokens, kv_heads, dim], in text order."""
    keys = np.concatenate([layer.k_sinks, _decode_tensor(layer.k, dequantize_keys)])
    values = np.concatenate([layer.v_sinks, _decode_tensor(layer.v, dequantize_values)])
    row_of_token = np.argsort(layer.order)
    by_head = (len(row_of_token), layer.kv_heads, -1)
    return keys[row_of_token].reshape(by_head), values[row_of_token].reshape(by_head)


def place_layer(layer: PackedLayer, cos: Float32, sin: Float32, layout: Layout, out_k: Float16, out_v: Float16) -> None:
    """Write one layer at its final positions, in text order.

    cos, sin: [tokens, dims/2] of the final positions, from `rope.angles`.
    out_k, out_v: float16 [tokens, kv_heads * dim], any strides; every row is overwritten.
    """
    if np.array_equal(layer.order, text_order(len(layer.order))):
        _place_rows(layer, cos, sin, layout, out_k, out_v)
        return
    k_rows, v_rows = np.empty(out_k.shape, np.float16), np.empty(out_v.shape, np.float16)
    _place_rows(layer, cos[layer.order], sin[layer.order], layout, k_rows, v_rows)
    out_k[layer.order], out_v[layer.order] = k_rows, v_rows


def _check(kv: ChunkKV, plan: BitPlan, order: Order) -> None:
    layers, tokens = kv.k_pre.shape[:2]
    if not 1 <= tokens <= MAX_TOKENS or kv.v.shape[:3] != kv.k_pre.shape[:3]:
        raise ValueError(f"a chunk has 1 to {MAX_TOKENS} tokens and equal rows: {kv.k_pre.shape}, {kv.v.shape}")
    if not len(plan.k_bits) == len(plan.v_bits) == layers:
        raise ValueError(f"a plan for {len(plan.k_bits)}/{len(plan.v_bits)} layers cannot pack {layers}")
    if unknown := set(plan.k_bits + plan.v_bits) - {*range(1, 9), 16}:
        raise ValueError(f"a layer is stored with 1 to 8 or 16 bits, not {sorted(unknown)}")
    sinks = min(SINKS, tokens)
    if not np.array_equal(np.sort(order), text_order(tokens)) or list(order[:sinks]) != list(range(sinks)):
        raise ValueError("the order must name every token once and begin with the sinks")
    if wrong := [n for n, score in kv.scores.items() if score.shape != (tokens,) or not np.isfinite(score).all()]:
        raise ValueError(f"scores {wrong} do not have one finite number for each of {tokens} tokens")


def _encode_layer(k_pre: Float16, v: Float16, k_bits: int, v_bits: int, order: Order) -> PackedLayer:
    """k_pre, v: [tokens, kv_heads, dim] in text order."""
    tokens, kv_heads, _ = k_pre.shape
    sinks = min(SINKS, tokens)
    k_rows, v_rows = k_pre.reshape(tokens, -1)[order], v.reshape(tokens, -1)[order]
    return PackedLayer(
        kv_heads,
        order,
        k_rows[:sinks],
        v_rows[:sinks],
        _encode_tensor(k_rows[sinks:], k_bits, quantize_keys),
        _encode_tensor(v_rows[sinks:], v_bits, quantize_values),
    )


def _encode_tensor(rows: Float16, bits: int, quantize: Quantizer) -> Tensor:
    if bits == 16 or not len(rows):
        return rows
    codes, grid = quantize(rows, bits)
    return PackedTensor(pack(codes.ravel(), bits), bits, len(rows), rows.shape[1], grid)


def _decode_tensor(tensor: Tensor, dequantize: Dequantizer) -> Float16:
    if not isinstance(tensor, PackedTensor):
        return tensor
    codes = unpack(tensor.planes, tensor.rows * tensor.channels).reshape(tensor.rows, tensor.channels)
    numbers = dequantize(codes, tensor.grid, tensor.bits, len(tensor.planes))
    return np.clip(numbers, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def _place_rows(layer: PackedLayer, cos: Float32, sin: Float32, layout: Layout, out_k: Float16, out_v: Float16) -> None:
    """Write the rows as they are stored; cos and sin in the same order."""
    sinks = len(layer.k_sinks)
    place_keys(layer.k_sinks, cos[:sinks], sin[:sinks], layout, layer.kv_heads, out_k[:sinks])
    place_keys(layer.k, cos[sinks:], sin[sinks:], layout, layer.kv_heads, out_k[sinks:])
    place_values(layer.v_sinks, out_v[:sinks])
    place_values(layer.v, out_v[sinks:])
