"""A chunk's KV, packed layer by layer, and back.

Decides what is quantised and what is kept exactly; the arithmetic is in quire_kernels. Knows nothing of bytes
on disk (`format`), of where they lie (`store`), or of models.

The first tokens of a chunk ("sinks") attract attention and their numbers are many times larger than the
others', so they are kept in float16 and stay out of the quantisation groups; the plan says how many. The other rows
may be stored in another order than the text's, so that a loader can skip tokens as one run of rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire_engine.errors import QuireError
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32
from quire_kernels.grids import FLOAT16_MAX, GRIDS, Grid
from quire_kernels.place import PackedTensor, Tensor, dequantize, place_keys, place_values
from quire_kernels.planes import pack, pack_by_width
from quire_kernels.quantize import quantize_keys, quantize_values
from quire_kernels.rope import Layout

Order = npt.NDArray[np.uint16]

MAX_TOKENS = 1 << 16  # token numbers are stored in 16 bits
MAX_SINKS = 255


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


def score_order(score: Float32, sinks: int) -> Order:
    """The sinks first, then tokens by falling score: those that a loader recomputes form one run of rows."""
    sinks = min(sinks, len(score))
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
    packed = tuple(_encode_layer(kv.k_pre[i], kv.v[i], plan, i, order) for i in range(layers))
    return PackedChunk(plan, kv_heads, key_dim, kv.v.shape[3], order, kv.scores, packed)


def decode(chunk: PackedChunk) -> ChunkKV:
    """The chunk as float16 in text order: sinks bit for bit, the rest within half a cell of the original."""
    keys, values = zip(*(decode_layer(layer) for layer in chunk.layers), strict=True)
    return ChunkKV(np.stack(keys), np.stack(values), chunk.scores)


def decode_layer(layer: PackedLayer) -> tuple[Float16, Float16]:
    """One layer's keys before RoPE and values, [tokens, kv_heads, dim], in text order."""
    keys = np.concatenate([layer.k_sinks, _decode_tensor(layer.k)])
    values = np.concatenate([layer.v_sinks, _decode_tensor(layer.v)])
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
    if plan.k_widths:
        _check_widths(plan, layers, kv.k_pre.shape[2] * kv.k_pre.shape[3])
    if plan.v_by_channel != tuple(layer for layer in range(layers) if layer in plan.v_by_channel):
        raise ValueError(f"values by channel are some of layers 0 to {layers - 1}, in order: {plan.v_by_channel}")
    if plan.grid not in GRIDS or not 0 <= plan.sinks <= MAX_SINKS:
        raise ValueError(f"a plan has one of the grids {list(GRIDS)} and 0 to {MAX_SINKS} sinks: {plan}")
    sinks = min(plan.sinks, tokens)
    if not np.array_equal(np.sort(order), text_order(tokens)) or list(order[:sinks]) != list(range(sinks)):
        raise ValueError("the order must name every token once and begin with the sinks")
    if wrong := [n for n, score in kv.scores.items() if score.shape != (tokens,) or not np.isfinite(score).all()]:
        raise ValueError(f"scores {wrong} do not have one finite number for each of {tokens} tokens")


def _check_widths(plan: BitPlan, layers: int, channels: int) -> None:
    if plan.grid == "minmax" or len(plan.k_widths) != layers:
        raise ValueError("channels have widths of their own on the mid-rise grid only, and for every layer")
    if not any(plan.k_widths):
        raise ValueError("a plan in which no channel has a width of its own has no k_widths at all")
    for bits, widths in zip(plan.k_bits, plan.k_widths, strict=True):
        if widths and not (len(widths) == channels and max(widths) == bits <= 8):
            raise ValueError(f"each of {channels} key channels has 0 to {min(bits, 8)} bits, and one has {bits}")


def _encode_layer(k_pre: Float16, v: Float16, plan: BitPlan, layer: int, order: Order) -> PackedLayer:
    """k_pre, v: that layer's, [tokens, kv_heads, dim] in text order."""
    tokens, kv_heads, _ = k_pre.shape
    sinks, kind = min(plan.sinks, tokens), GRIDS[plan.grid]
    widths = plan.k_widths[layer] if plan.k_widths else b""
    k_rows, v_rows = k_pre.reshape(tokens, -1)[order], v.reshape(tokens, -1)[order]
    return PackedLayer(
        kv_heads,
        order,
        k_rows[:sinks],
        v_rows[:sinks],
        _encode_tensor(k_rows[sinks:], plan.k_bits[layer], kind, widths),
        _encode_tensor(v_rows[sinks:], plan.v_bits[layer], kind, by_channel=layer in plan.v_by_channel),
    )


def _encode_tensor(rows: Float16, bits: int, kind: type[Grid], widths: bytes = b"", by_channel: bool = True) -> Tensor:
    """widths: of every channel, or none where all have `bits`."""
    if bits == 16 or not len(rows):
        return rows
    of_channels = np.frombuffer(widths, np.uint8)
    if len(of_channels):
        codes, grid = quantize_keys(rows, of_channels.astype(np.int64), kind)
        planes = pack_by_width(codes, of_channels)
    else:
        codes, grid = (quantize_keys if by_channel else quantize_values)(rows, bits, kind)
        planes = tuple(pack(codes.ravel(), bits))
    return PackedTensor(planes, bits, len(rows), rows.shape[1], grid, by_channel, of_channels)


def _decode_tensor(tensor: Tensor) -> Float16:
    if not isinstance(tensor, PackedTensor):
        return tensor
    return np.clip(dequantize(tensor), -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def _place_rows(layer: PackedLayer, cos: Float32, sin: Float32, layout: Layout, out_k: Float16, out_v: Float16) -> None:
    """Write the rows as they are stored; cos and sin in the same order."""
    sinks = len(layer.k_sinks)
    place_keys(layer.k_sinks, cos[:sinks], sin[:sinks], layout, layer.kv_heads, out_k[:sinks])
    place_keys(layer.k, cos[sinks:], sin[sinks:], layout, layer.kv_heads, out_k[sinks:])
    place_values(layer.v_sinks, out_v[:sinks])
    place_values(layer.v, out_v[sinks:])
