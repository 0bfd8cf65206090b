"""The kernels of `device_probe`, in two passes over the keys.

The first finds, for every query and head, the largest logit and the sum of weights within a stretch of keys; joining
the stretches gives the logarithm of the softmax's denominator. The second goes through the keys again, in blocks, and
adds up the weights of all queries. Nothing of size queries x keys is ever written.
Knows nothing of checks (`device_probe`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.ahead import Build
from quire_kernels.device_probe import Over

QUERY_BLOCK, KEY_BLOCK = 32, 64
STRETCH = 1024  # keys of one program of the first pass; a multiple of KEY_BLOCK


@triton.jit
def _tile(numbers, first, count, row_stride, rows: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr):
    """Rows first .. first + rows of one head [rows, padded]; zeros behind row `count` and channel `dim`."""
    row, channel = first + tl.arange(0, rows), tl.arange(0, padded)
    at = row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    return tl.load(numbers + at, mask=(row < count)[:, None] & (channel < dim)[None, :], other=0.0)


@triton.jit
def _logits(q, k, scale):
    """[queries, keys], in units of log 2."""
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale


@triton.jit
def _denominators(
    q_rot, k_rot, partial, queries, keys, scale, q_row, q_head, k_row, k_head,
    of_one: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr, query_block: tl.constexpr,
    key_block: tl.constexpr, stretch: tl.constexpr,
):  # fmt: skip
    """partial: float32 [stretches, heads, queries], the log2 of the sum of weights of each stretch of keys."""
    head = tl.program_id(1)
    first_key, first_query = tl.program_id(2) * stretch, tl.program_id(0) * query_block
    q = _tile(q_rot + head.to(tl.int64) * q_head, first_query, queries, q_row, query_block, dim, padded)
    k_rot += (head // of_one).to(tl.int64) * k_head
    largest = tl.full([query_block], float("-inf"), tl.float32)
    total = tl.zeros([query_block], tl.float32)
    for first in range(first_key, tl.minimum(first_key + stretch, keys), key_block):
        logits = _logits(q, _tile(k_rot, first, keys, k_row, key_block, dim, padded), scale)
        there = first + tl.arange(0, key_block) < keys
        logits = tl.where(there[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        largest = larger
    query = first_query + tl.arange(0, query_block)
    at = (tl.program_id(2) * tl.num_programs(1) + head) * queries + query
    tl.store(partial + at, largest + tl.log2(total), mask=query < queries)


@triton.jit
def _sums(
    q_rot, k_rot, denominators, out, queries, keys, scale, q_row, q_head, k_row, k_head,
    of_one: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr, query_block: tl.constexpr,
    key_block: tl.constexpr, largest: tl.constexpr,
):  # fmt: skip
    """denominators: float32 [heads, queries].  out: float32 [kv_heads, keys], the largest or the sum of a KV head's
    query heads."""
    kv_head, first_key = tl.program_id(1), tl.program_id(0) * key_block
    k = _tile(k_rot + kv_head.to(tl.int64) * k_head, first_key, keys, k_row, key_block, dim, padded)
    found = tl.zeros([key_block], tl.float32)
    for head in range(kv_head * of_one, (kv_head + 1) * of_one):
        mass = tl.zeros([key_block], tl.float32)
        for first in range(0, queries, query_block):
            q = _tile(q_rot + tl.cast(head, tl.int64) * q_head, first, queries, q_row, query_block, dim, padded)
            query = first + tl.arange(0, query_block)
            of_query = tl.load(denominators + head * queries + query, mask=query < queries, other=float("inf"))
            mass += tl.sum(tl.exp2(_logits(q, k, scale) - of_query[:, None]), 0)
        found = tl.maximum(found, mass) if largest else found + mass
    key = first_key + tl.arange(0, key_block)
    tl.store(out + kv_head * keys + key, found, mask=key < keys)


def launch(q_rot: Tensor, k_rot: Tensor, over: Over) -> Tensor:
    """`device_probe.mass` with arguments that fit together."""
    (queries, heads, dim), (keys, kv_heads, _) = q_rot.shape, k_rot.shape
    shape = {"of_one": heads // kv_heads, "dim": dim, **_blocks(dim)}
    scale = dim**-0.5 * 1.4426950408889634  # of log 2
    sizes = (queries, keys, scale, q_rot.stride(0), q_rot.stride(1), k_rot.stride(0), k_rot.stride(1))
    stretches = triton.cdiv(keys, STRETCH)
    partial = torch.empty(stretches, heads, queries, dtype=torch.float32, device=q_rot.device)
    _denominators[(triton.cdiv(queries, QUERY_BLOCK), heads, stretches)](
        q_rot, k_rot, partial, *sizes, **shape, stretch=STRETCH, num_warps=_warps(dim)
    )
    denominators = torch.logsumexp(partial * 0.6931471805599453, dim=0) * 1.4426950408889634
    out = torch.empty(kv_heads, keys, dtype=torch.float32, device=q_rot.device)
    grid = (triton.cdiv(keys, KEY_BLOCK), kv_heads)
    _sums[grid](q_rot, k_rot, denominators, out, *sizes, **shape, largest=over == "max", num_warps=_warps(dim))
    return out.amax(0) if over == "max" else out.sum(0) / heads


def _blocks(dim: int) -> dict[str, int]:
    return {"padded": max(16, triton.next_power_of_2(dim)), "query_block": QUERY_BLOCK, "key_block": KEY_BLOCK}


def _warps(dim: int) -> int:
    """Wide tiles spill on AMD's devices with fewer."""
    return 8 if dim > 64 else 4


def _builds(dim: int, of_one: int, numbers: str) -> tuple[Build, Build]:
    both = {"q_rot": f"*{numbers}", "k_rot": f"*{numbers}", "scale": "fp32"}
    both |= dict.fromkeys(("queries", "keys", "q_row", "q_head", "k_row", "k_head"), "i32")
    shape = {"of_one": of_one, "dim": dim, **_blocks(dim)}
    any_count = ("queries", "keys")
    first, second = {"partial": "*fp32"}, {"denominators": "*fp32", "out": "*fp32"}
    name = f"{dim} channels, {numbers}"
    return (
        Build(
            f"probe, denominators, {name}",
            _denominators,
            both | first,
            {**shape, "stretch": STRETCH},
            any_count,
            _warps(dim),
        ),
        Build(f"probe, sums, {name}", _sums, both | second, {**shape, "largest": True}, any_count, _warps(dim)),
    )


BUILDS = (*_builds(128, 4, "fp16"), *_builds(64, 3, "bf16"))
