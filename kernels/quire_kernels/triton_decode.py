"""The kernels of `device_decode`: attention over packed and exact rows in parts, and putting the parts together.

A part of the rows belongs to one program, for all queries of one KV head; a second kernel weighs the parts by their
maxima (flash-decoding). Packed keys are before RoPE. Turning both sides of a product by the same angle changes nothing,
so a query is turned back by the position at which a tile of keys begins, and the keys by 0, 1, 2... alone: those angles
stay in the first-level cache, where a table of all positions would cost more to read than the packed keys.

A byte of a plane holds one bit of eight channels. A multiplication spreads four of them to the bytes of a word.
Knows nothing of checks (`device_decode`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.ahead import Build
from quire_kernels.device_decode import GROUP, LiveRows

TILE = 32  # tokens in work at once; divides GROUP
_LOG2_E = 1.4426950408889634


@triton.jit
def _words(planes, at, there, plane_bytes, bits: tl.constexpr):
    """Codes of eight channels for every byte of a plane: four in each of two words, one a byte."""
    low = tl.zeros(there.shape, tl.int32)
    high = tl.zeros(there.shape, tl.int32)
    for plane in tl.static_range(bits):
        byte = tl.load(planes + plane * plane_bytes + at, mask=there, other=0).to(tl.int32)
        low = (low << 1) | (((byte & 15) * 0x204081) & 0x01010101)
        high = (high << 1) | (((byte >> 4) * 0x204081) & 0x01010101)
    return low, high


@triton.jit
def _code(word, byte: tl.constexpr):
    """A byte of every word as float32, by way of 2^23 + code: no conversion."""
    return (((word >> (8 * byte)) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _interleaved(low, high, step, first, byte: tl.constexpr, tile: tl.constexpr, block: tl.constexpr):
    """Every second channel from `byte` on, [tile, block / 2]."""
    near = tl.join(_code(low, byte) * step + first, _code(high, byte) * step + first)
    far = tl.join(_code(low, byte + 2) * step + first, _code(high, byte + 2) * step + first)
    return tl.reshape(tl.join(near, far), [tile, block // 2])


@triton.jit
def _neighbours(low, high, step, first, tile: tl.constexpr, block: tl.constexpr):
    """All channels, [tile, block]."""
    even = _interleaved(low, high, step, first, 0, tile, block)
    odd = _interleaved(low, high, step, first, 1, tile, block)
    return tl.reshape(tl.join(even, odd), [tile, block])


@triton.jit
def _key_halves(
    planes, steps, firsts, group, token, start, channels,
    dim: tl.constexpr, half_block: tl.constexpr, bits: tl.constexpr, adjacent: tl.constexpr, tile: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    """First and second channels of RoPE's pairs, [tile, half_block] each, before RoPE.

    token: in the group [tile].  start: the head's first channel.
    """
    half: tl.constexpr = dim // 2
    plane_bytes = span * channels // 8
    of_group = planes + group * bits * plane_bytes
    begins = (token * channels + start) // 8
    pair = tl.arange(0, half_block)
    grid = group * channels + start
    if adjacent:
        byte = tl.arange(0, half_block // 4)
        there = (token >= 0)[:, None] & (byte < dim // 8)[None, :]
        low, high = _words(of_group, begins[:, None] + byte[None, :], there, plane_bytes, bits)
        a = _interleaved(low, high, 1.0, 0.0, 0, tile, 2 * half_block)
        b = _interleaved(low, high, 1.0, 0.0, 1, tile, 2 * half_block)
        a_at, b_at = grid + 2 * pair, grid + 2 * pair + 1
    else:
        byte = tl.arange(0, half_block // 8)
        there = (token >= 0)[:, None] & (byte < half // 8)[None, :]
        at = begins[:, None] + byte[None, :]
        low, high = _words(of_group, at, there, plane_bytes, bits)
        a = _neighbours(low, high, 1.0, 0.0, tile, half_block)
        low, high = _words(of_group, at + half // 8, there, plane_bytes, bits)
        b = _neighbours(low, high, 1.0, 0.0, tile, half_block)
        a_at, b_at = grid + pair, grid + half + pair
    real = pair < half
    a_step = tl.load(steps + a_at, mask=real, other=0.0).to(tl.float32)[None, :]
    b_step = tl.load(steps + b_at, mask=real, other=0.0).to(tl.float32)[None, :]
    a_first = tl.load(firsts + a_at, mask=real, other=0.0).to(tl.float32)[None, :]
    b_first = tl.load(firsts + b_at, mask=real, other=0.0).to(tl.float32)[None, :]
    return a * a_step + a_first, b * b_step + b_first


@triton.jit
def _values(
    planes, steps, firsts, group, token, start, channels,
    v_dim: tl.constexpr, v_block: tl.constexpr, bits: tl.constexpr, by_channel: tl.constexpr, tile: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    """[tile, v_block]."""
    plane_bytes = span * channels // 8
    byte = tl.arange(0, v_block // 8)
    there = (token >= 0)[:, None] & (byte < v_dim // 8)[None, :]
    at = ((token * channels + start) // 8)[:, None] + byte[None, :]
    low, high = _words(planes + group * bits * plane_bytes, at, there, plane_bytes, bits)
    if by_channel:
        channel = tl.arange(0, v_block)
        grid = group * channels + start + channel
        step = tl.load(steps + grid, mask=channel < v_dim, other=0.0).to(tl.float32)[None, :]
        first = tl.load(firsts + grid, mask=channel < v_dim, other=0.0).to(tl.float32)[None, :]
        values = _neighbours(low, high, 1.0, 0.0, tile, v_block) * step + first
    else:
        per_token = (channels + span - 1) // span
        grid = ((group * span + token) * per_token)[:, None] + ((start + 8 * byte) // span)[None, :]
        step = tl.load(steps + grid, mask=there, other=0.0).to(tl.float32)
        first = tl.load(firsts + grid, mask=there, other=0.0).to(tl.float32)
        values = _neighbours(low, high, step, first, tile, v_block)
    return values


@triton.jit
def _taken(logits, values, highest, weight, total):
    """A tile's logits and values taken into the running maximum, weight and total (online softmax)."""
    new = tl.maximum(highest, tl.max(logits, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a query may see nothing of a part
    powers = tl.exp2(logits - base[:, None])
    kept = tl.exp2(highest - base)
    total = tl.dot(powers.to(values.dtype), values, total * kept[:, None], input_precision="ieee")
    return new, weight * kept + tl.sum(powers, axis=1), total


@triton.jit
def _parts(
    q, k, v, k_planes, k_step, k_first, v_planes, v_step, v_first, filled, cos, sin, totals, maxima, weights,
    queries, sinks, scale, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    kv_heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr,
    k_bits: tl.constexpr, v_bits: tl.constexpr, v_by_channel: tl.constexpr, adjacent: tl.constexpr,
    row_block: tl.constexpr, half_block: tl.constexpr, v_block: tl.constexpr, tile: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    part, kv_head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = dim // 2
    groups, exact = tl.load(filled), tl.load(filled + 1)
    packed_tiles = groups * (span // tile)
    tiles = packed_tiles + tl.cdiv(exact, tile)
    share = tl.cdiv(tiles, tl.num_programs(0))
    begin = part * share
    end = tl.minimum(begin + share, tiles)

    row = tl.arange(0, row_block)
    query = tl.minimum(row // group, queries - 1)
    head = kv_head * group + row % group
    pair = tl.arange(0, half_block)
    in_half = (pair < half)[None, :]
    mine = q + (query * q_stride + head * q_head_stride)[:, None]
    if adjacent:
        a_at, b_at = 2 * pair, 2 * pair + 1
    else:
        a_at, b_at = pair, half + pair
    q_a = tl.load(mine + a_at[None, :], mask=in_half, other=0.0)
    q_b = tl.load(mine + b_at[None, :], mask=in_half, other=0.0)
    q_low = tl.load(mine + pair[None, :], mask=in_half, other=0.0)
    q_high = tl.load(mine + (half + pair)[None, :], mask=in_half, other=0.0)
    highest = tl.full([row_block], float("-inf"), tl.float32)
    weight = tl.zeros([row_block], tl.float32)
    total = tl.zeros([row_block, v_block], tl.float32)

    of_tile = tl.arange(0, tile)
    for index in range(begin, tl.minimum(end, packed_tiles)):
        of_group, token = index * tile // span, (index * tile + of_tile) % span
        at = (sinks + index * tile).to(tl.int64) * half + pair
        c, s = tl.load(cos + at, mask=pair < half, other=0.0), tl.load(sin + at, mask=pair < half, other=0.0)
        back_a = (q_a.to(tl.float32) * c[None, :] + q_b.to(tl.float32) * s[None, :]).to(q.dtype.element_ty)
        back_b = (q_b.to(tl.float32) * c[None, :] - q_a.to(tl.float32) * s[None, :]).to(q.dtype.element_ty)
        a, b = _key_halves(
            k_planes, k_step, k_first, of_group, token, kv_head * dim, kv_heads * dim,
            dim, half_block, k_bits, adjacent, tile, span,
        )  # fmt: skip
        turn = of_tile[:, None] * half + pair[None, :]
        c, s = tl.load(cos + turn, mask=in_half, other=0.0), tl.load(sin + turn, mask=in_half, other=0.0)
        k_a, k_b = (a * c - b * s).to(q.dtype.element_ty), (b * c + a * s).to(q.dtype.element_ty)
        logits = tl.dot(back_a, tl.trans(k_a), input_precision="ieee")
        logits = tl.dot(back_b, tl.trans(k_b), logits, input_precision="ieee") * scale
        values = _values(
            v_planes, v_step, v_first, of_group, token, kv_head * v_dim, kv_heads * v_dim,
            v_dim, v_block, v_bits, v_by_channel, tile, span,
        ).to(q.dtype.element_ty)  # fmt: skip
        highest, weight, total = _taken(logits, values, highest, weight, total)

    channel = tl.arange(0, v_block)
    for index in range(tl.maximum(begin, packed_tiles), end):
        key = (index - packed_tiles) * tile + of_tile
        there = key < exact
        keys = k + key.to(tl.int64)[None, :] * k_stride + kv_head * k_head_stride
        in_keys = there[None, :] & (pair < half)[:, None]
        k_low = tl.load(keys + pair[:, None], mask=in_keys, other=0.0)
        k_high = tl.load(keys + (half + pair)[:, None], mask=in_keys, other=0.0)
        logits = tl.dot(q_low, k_low, input_precision="ieee")
        logits = tl.dot(q_high, k_high, logits, input_precision="ieee") * scale
        logits = tl.where(key[None, :] <= (exact - queries + query)[:, None], logits, float("-inf"))
        at = key.to(tl.int64)[:, None] * v_stride + kv_head * v_head_stride + channel[None, :]
        values = tl.load(v + at, mask=there[:, None] & (channel < v_dim)[None, :], other=0.0)
        highest, weight, total = _taken(logits, values, highest, weight, total)

    to = (part * kv_heads + kv_head) * row_block + row
    tl.store(maxima + to, highest)
    tl.store(weights + to, weight)
    tl.store(totals + to[:, None] * v_block + channel[None, :], total)


@triton.jit
def _together(
    totals, maxima, weights, out, parts,
    kv_heads: tl.constexpr, group: tl.constexpr, v_dim: tl.constexpr, row_block: tl.constexpr, v_block: tl.constexpr,
    part_block: tl.constexpr,
):  # fmt: skip
    """One query and head: the parts' totals, each by its share of the weight."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    part, channel = tl.arange(0, part_block), tl.arange(0, v_block)
    at = (part * kv_heads + kv_head) * row_block + row
    highest = tl.load(maxima + at, mask=part < parts, other=float("-inf"))
    share = tl.exp2(highest - tl.max(highest, axis=0))
    weight = tl.sum(share * tl.load(weights + at, mask=part < parts, other=0.0), axis=0)
    total = tl.load(totals + at[:, None] * v_block + channel[None, :], mask=(part < parts)[:, None], other=0.0)
    result = tl.sum(share[:, None] * total, axis=0) / weight
    head = kv_head * group + row % group
    to = out + ((row // group) * kv_heads * group + head) * v_dim + channel
    tl.store(to, result.to(out.dtype.element_ty), mask=channel < v_dim)


def launch(q: Tensor, rows: LiveRows, splits: int | None) -> Tensor:
    """`device_decode.attend` with arguments that fit together."""
    (queries, heads, dim), (_, kv_heads, v_dim), packed = q.shape, rows.v.shape, rows.packed
    bits = packed.k_planes.shape[1], packed.v_planes.shape[1]
    constants = constants_of(
        queries, heads, kv_heads, dim, v_dim, *bits, packed.v_by_channel, rows.angles.layout == "adjacent"
    )
    row_block, v_block, parts = constants["row_block"], constants["v_block"], splits or _splits(q.device, kv_heads)
    stats = torch.empty(2, parts, kv_heads, row_block, dtype=torch.float32, device=q.device)
    totals = torch.empty(parts, kv_heads, row_block, v_block, dtype=torch.float32, device=q.device)
    out = torch.empty(queries, heads, v_dim, dtype=q.dtype, device=q.device)
    _parts[(parts, kv_heads)](
        q, rows.k, rows.v, *vars(packed).values(), rows.filled, rows.angles.cos, rows.angles.sin, totals, *stats,
        queries, rows.sinks, dim**-0.5 * _LOG2_E,
        q.stride(0), q.stride(1), rows.k.stride(0), rows.k.stride(1), rows.v.stride(0), rows.v.stride(1), **constants,
    )  # fmt: skip
    group = heads // kv_heads
    _together[(queries * group, kv_heads)](
        totals, *stats, out, parts, kv_heads, group, v_dim, row_block, v_block, triton.next_power_of_2(parts)
    )
    return out


def constants_of(
    queries: int, heads: int, kv_heads: int, dim: int, v_dim: int, k_bits: int, v_bits: int, v_by_channel: bool,
    adjacent: bool,
) -> dict[str, int]:  # fmt: skip
    """What the first kernel is compiled for."""
    group = heads // kv_heads
    return {
        "kv_heads": kv_heads,
        "group": group,
        "dim": dim,
        "v_dim": v_dim,
        "k_bits": k_bits,
        "v_bits": v_bits,
        "v_by_channel": v_by_channel,
        "adjacent": adjacent,
        "row_block": max(16, triton.next_power_of_2(queries * group)),
        "half_block": max(16, triton.next_power_of_2(dim // 2)),
        "v_block": max(16, triton.next_power_of_2(v_dim)),
        "tile": TILE,
        "span": GROUP,
    }


def _splits(device: torch.device, kv_heads: int) -> int:
    """Four programs for every multiprocessor: what fits at once, and hides the memory's latency."""
    if device.type != "cuda":
        return 4
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(128, 4 * processors // kv_heads))


def _build(name: str, heads: int, kv_heads: int, dim: int, adjacent: bool, v_by_channel: bool = False) -> Build:
    half = ("q", "k", "v", "k_step", "k_first", "v_step", "v_first")
    types = dict.fromkeys(half, "*fp16") | dict.fromkeys(("k_planes", "v_planes"), "*u8") | {"filled": "*i32"}
    types |= dict.fromkeys(("cos", "sin", "totals", "maxima", "weights"), "*fp32")
    strides = ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride")
    types |= {"queries": "i32", "sinks": "i32", "scale": "fp32"} | dict.fromkeys(strides, "i32")
    constants = constants_of(1, heads, kv_heads, dim, dim, 6, 4, v_by_channel, adjacent)
    return Build(f"decode {name}", _parts, types, constants, ("queries", "sinks"))


_TOGETHER = Build(
    "decode, parts together",
    _together,
    {"totals": "*fp32", "maxima": "*fp32", "weights": "*fp32", "out": "*fp16", "parts": "i32"},
    {"kv_heads": 8, "group": 4, "v_dim": 128, "row_block": 16, "v_block": 128, "part_block": 64},
    ("parts",),
)
BUILDS = (
    _build("128 channels, 32/8 heads, K6/V4, adjacent", 32, 8, 128, adjacent=True),
    _build("64 channels, 14/2 heads, K6/V4, halves, values by channel", 14, 2, 64, adjacent=False, v_by_channel=True),
    _TOGETHER,
)
