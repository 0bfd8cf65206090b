"""The kernels of `device_weights`: a product with quantised weights for a few tokens, and their numbers.

A block's codes are read as words of 16 or 32 bits, whatever its format is surely aligned to. A word holds codes of one
or two runs of neighbouring numbers (its low and its high nibbles), so that every word has at most two scales. A code of
b bits becomes a float by laying it behind the binary point of 1: f = 1 + code / 2^b, one shift and one logic operation
where a conversion takes four times as long. With step s and first point c of its run, a weight is

    c + s * code  =  (s * 2^b) * f + (c - s * 2^b)

and a product sums f * x and x of a word, then applies the two numbers in brackets: a shift, an `and`-`or` and a
multiply-add for each weight. Accumulated in float32. Knows nothing of checks (`device_weights`).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.ahead import Build
from quire_kernels.device_weights import FORMATS, Packed

ROWS = 4  # of a program
WORDS = 256  # that it unpacks at once: eight for each lane of one warp; with twice as many, registers spilled


@dataclass(frozen=True)
class _Words:
    """How a format's words lie.

    bits: of a code.  chunks: of a block; the runs of a chunk's words are neighbours.  words: of a chunk.
    """

    bits: int
    chunks: int
    words: int


_WORDS = {
    "Q4_0": _Words(4, 1, 8),
    "Q4_1": _Words(4, 1, 4),
    "Q8_0": _Words(8, 1, 16),
    "Q4_K": _Words(4, 4, 8),
    "Q5_K": _Words(5, 4, 8),
    "Q6_K": _Words(6, 8, 8),
}


@triton.jit
def _half(word):
    """The float16 in a word's low 16 bits, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _moved(word, start: tl.constexpr, to: tl.constexpr):
    """The bit at `start` at `to`, with its neighbours; others are for the caller to mask."""
    return word << (to - start) if to >= start else word >> (start - to)


@triton.jit
def _words(base, chunk, word, there, kind: tl.constexpr):
    """Words of a chunk: with the codes' low bits, and with their high bits where those lie elsewhere.

    base: of the block [rows, chunks, 1].  chunk: in the block [1, chunks, 1].  word: [1, 1, words].
    """
    if kind == "Q4_0" or kind == "Q4_1":
        low = tl.load(base + (1 + word), mask=there, other=0).to(tl.int32)
        high = low
    elif kind == "Q8_0":
        low = tl.load(base + (1 + word), mask=there, other=0).to(tl.int32) ^ 0x8080  # codes from 0 on
        high = low
    elif kind == "Q4_K":
        low = tl.load(base + (4 + chunk * 8 + word), mask=there, other=0)
        high = low
    elif kind == "Q5_K":
        low = tl.load(base + (12 + chunk * 8 + word), mask=there, other=0)
        high = tl.load(base + (4 + word), mask=there, other=0) >> (2 * chunk)
    else:
        low = tl.load(base + (chunk * 8 + word), mask=there, other=0).to(tl.int32)
        at = 64 + chunk // 4 * 16 + chunk % 2 * 8
        high = tl.load(base + (at + word), mask=there, other=0).to(tl.int32) >> (2 * (chunk // 2 % 2))
    return low, high


@triton.jit
def _fractions(low, high, part: tl.constexpr, byte: tl.constexpr, kind: tl.constexpr):
    """1 + code / 2^bits of one code in every word: that of a byte, in its low (part 0) or its high nibble (part 1)."""
    if kind == "Q8_0":
        code = _moved(low, 8 * byte, 15) & 0x007F8000
    elif kind == "Q5_K":
        code = (_moved(low, 8 * byte + 4 * part, 18) & 0x003C0000) | (_moved(high, 8 * byte + part, 22) & 0x00400000)
    elif kind == "Q6_K":
        code = (_moved(low, 8 * byte + 4 * part, 17) & 0x001E0000) | (
            _moved(high, 8 * byte + 4 * part, 21) & 0x00600000
        )
    else:
        code = _moved(low, 8 * byte + 4 * part, 19) & 0x00780000
    return (code | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _affine(base, chunk, there, kind: tl.constexpr):
    """(step, first) of a chunk's low nibbles, and of its high ones; where words have one run, twice the same."""
    if kind == "Q4_0":
        step0 = _half(tl.load(base, mask=there, other=0))
        first0 = -8.0 * step0
        step1, first1 = step0, first0
    elif kind == "Q4_1":
        word = tl.load(base, mask=there, other=0)
        step0, first0 = _half(word), _half(word >> 16)
        step1, first1 = step0, first0
    elif kind == "Q8_0":
        step0 = _half(tl.load(base, mask=there, other=0))
        first0 = -128.0 * step0
        step1, first1 = step0, first0
    elif kind == "Q6_K":
        at = chunk // 4 * 8 + chunk % 4
        d = _half(tl.load(base + 104, mask=there, other=0))
        shift = 8 * (at % 2)
        step0 = d * (tl.load(base + (96 + at // 2), mask=there, other=0) >> shift).to(tl.int8).to(tl.float32)
        step1 = d * (tl.load(base + (98 + at // 2), mask=there, other=0) >> shift).to(tl.int8).to(tl.float32)
        first0, first1 = -32.0 * step0, -32.0 * step1
    else:  # see device_weights._scales_k
        word = tl.load(base, mask=there, other=0)
        d, d_min = _half(word), _half(word >> 16)
        a = tl.load(base + 1, mask=there, other=0)
        b = tl.load(base + 2, mask=there, other=0)
        c = tl.load(base + 3, mask=there, other=0)
        early, shift = chunk < 2, 16 * (chunk % 2)
        a, b, c = a >> shift, b >> shift, c >> shift
        step0 = d * tl.where(early, a & 63, (c & 15) | (a >> 2 & 48)).to(tl.float32)
        first0 = -d_min * tl.where(early, b & 63, (c >> 4 & 15) | (b >> 2 & 48)).to(tl.float32)
        step1 = d * tl.where(early, a >> 8 & 63, (c >> 8 & 15) | (a >> 10 & 48)).to(tl.float32)
        first1 = -d_min * tl.where(early, b >> 8 & 63, (c >> 12 & 15) | (b >> 10 & 48)).to(tl.float32)
    return step0, first0, step1, first1


@triton.jit
def _column(chunk, part: tl.constexpr, kind: tl.constexpr):
    """Where in its block a run of a chunk begins."""
    if kind == "Q6_K":
        return chunk // 4 * 128 + chunk % 4 * 16 + 64 * part
    elif kind == "Q4_K" or kind == "Q5_K":
        return chunk * 64 + 32 * part
    else:
        return chunk * 32 + 16 * part


@triton.jit
def _product(
    x, weight, out, tokens, rows, columns, x_stride, row_words,
    kind: tl.constexpr, numbers: tl.constexpr, block_words: tl.constexpr, bits: tl.constexpr, chunks: tl.constexpr,
    words: tl.constexpr, parts: tl.constexpr, per_part: tl.constexpr,
    token_block: tl.constexpr, row_block: tl.constexpr, chunk_block: tl.constexpr,
):  # fmt: skip
    """Some rows of the result for all tokens."""
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    in_rows = row < rows
    token = tl.arange(0, token_block)
    word = tl.arange(0, words)[None, None, :]
    begin = weight + row.to(tl.int64)[:, None, None] * row_words
    x_begin = x + (token * x_stride)[:, None, None, None]
    in_tokens = (token < tokens)[:, None, None, None]
    count = columns // numbers * chunks
    size: tl.constexpr = 1 << bits
    total = tl.zeros([token_block, row_block, chunk_block, words], tl.float32)
    for start in range(0, count, chunk_block):
        at = start + tl.arange(0, chunk_block)
        there = in_rows[:, None, None] & (at < count)[None, :, None]
        x_there = in_tokens & (at < count)[None, None, :, None]
        block, chunk = (at // chunks)[None, :, None], (at % chunks)[None, :, None]
        base = begin + block * block_words
        low, high = _words(base, chunk, word, there, kind)
        step0, first0, step1, first1 = _affine(base, chunk, there, kind)
        for part in tl.static_range(parts):
            scale = (step0 if part == 0 else step1) * size
            offset = (first0 if part == 0 else first1) - scale
            begins = x_begin + (block * numbers + _column(chunk, part, kind) + word * per_part)[None]
            for byte in tl.static_range(per_part):
                number = tl.load(begins + byte, mask=x_there, other=0.0).to(tl.float32)
                term = _fractions(low, high, part, byte, kind)[None] * number
                if byte == 0:
                    dot, plain = term, number
                else:
                    dot, plain = dot + term, plain + number
            total += scale[None] * dot + offset[None] * plain
    result = tl.sum(tl.sum(total, axis=3), axis=2)
    at = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & in_rows[None, :])


@triton.jit
def _dequantize(
    weight, out, rows, columns, row_words,
    kind: tl.constexpr, numbers: tl.constexpr, block_words: tl.constexpr, bits: tl.constexpr, chunks: tl.constexpr,
    words: tl.constexpr, parts: tl.constexpr, per_part: tl.constexpr,
    row_block: tl.constexpr, chunk_block: tl.constexpr,
):  # fmt: skip
    """Some chunks of some rows."""
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    at = tl.program_id(1) * chunk_block + tl.arange(0, chunk_block)
    there = (row < rows)[:, None, None] & (at < columns // numbers * chunks)[None, :, None]
    block, chunk = (at // chunks)[None, :, None], (at % chunks)[None, :, None]
    base = weight + row.to(tl.int64)[:, None, None] * row_words + block * block_words
    low, high = _words(base, chunk, tl.arange(0, words)[None, None, :], there, kind)
    step0, first0, step1, first1 = _affine(base, chunk, there, kind)
    size: tl.constexpr = 1 << bits
    run: tl.constexpr = words * per_part
    for part in tl.static_range(parts):
        step, first = (step0, first0) if part == 0 else (step1, first1)
        # In register order a word's codes become neighbours: one wide store.
        if per_part == 2:
            fraction = tl.join(_fractions(low, high, part, 0, kind), _fractions(low, high, part, 1, kind))
        else:
            even = tl.join(_fractions(low, high, part, 0, kind), _fractions(low, high, part, 2, kind))
            odd = tl.join(_fractions(low, high, part, 1, kind), _fractions(low, high, part, 3, kind))
            fraction = tl.join(even, odd)
        code = (tl.reshape(fraction, [row_block, chunk_block, run]) - 1.0) * size
        column = block * numbers + _column(chunk, part, kind) + tl.arange(0, run)[None, None, :]
        to = out + row.to(tl.int64)[:, None, None] * columns + column
        tl.store(to, (step * code + first).to(out.dtype.element_ty), mask=there)


def launch_product(x: Tensor, weight: Packed) -> Tensor:
    """`device_weights.linear` for at most FEW tokens."""
    out = torch.empty(len(x), weight.rows, dtype=x.dtype, device=x.device)
    words, name = _as_words(weight), weight.format.name
    constants = product_constants(name, len(x))
    _product[(triton.cdiv(weight.rows, ROWS),)](
        x, words, out, len(x), weight.rows, weight.columns, x.stride(0), words.shape[1],
        **constants, num_warps=product_warps(len(x)),
    )  # fmt: skip
    return out


def launch_dequantize(weight: Packed, out: Tensor) -> None:
    """`device_weights.dequantize`."""
    words, name = _as_words(weight), weight.format.name
    chunks = weight.columns // weight.format.numbers * _WORDS[name].chunks
    grid = (triton.cdiv(weight.rows, ROWS), triton.cdiv(chunks, _chunk_block(name)))
    _dequantize[grid](words, out, weight.rows, weight.columns, words.shape[1], **constants_of(name))


def product_constants(name: str, tokens: int) -> dict[str, object]:
    """What the product is compiled for."""
    return {**constants_of(name), "token_block": triton.next_power_of_2(tokens)}


def product_warps(tokens: int) -> int:
    """One warp waits for no other when x passes through shared memory; many tokens need more registers than it has."""
    return 1 if tokens <= 2 else 2


def constants_of(name: str) -> dict[str, object]:
    """What both kernels are compiled for."""
    of, words = FORMATS[name], _WORDS[name]
    return {
        "kind": name,
        "numbers": of.numbers,
        "block_words": of.bytes // of.word_bytes,
        "bits": words.bits,
        "chunks": words.chunks,
        "words": words.words,
        "parts": 1 if words.bits == 8 else 2,
        "per_part": of.word_bytes,
        "row_block": ROWS,
        "chunk_block": _chunk_block(name),
    }


def _chunk_block(name: str) -> int:
    return WORDS // ROWS // _WORDS[name].words


def _as_words(weight: Packed) -> Tensor:
    return weight.data.view({2: torch.int16, 4: torch.int32}[weight.format.word_bytes])


def _word_type(name: str) -> str:
    return f"*i{8 * FORMATS[name].word_bytes}"


def _product_build(name: str, tokens: int) -> Build:
    types = {"x": "*fp16", "weight": _word_type(name), "out": "*fp16"}
    types |= dict.fromkeys(("tokens", "rows", "columns", "x_stride", "row_words"), "i32")
    constants = product_constants(name, tokens)
    return Build(f"product {name}, {tokens} tokens", _product, types, constants, ("tokens",), product_warps(tokens))


def _dequantize_build(name: str) -> Build:
    types = {"weight": _word_type(name), "out": "*fp16"} | dict.fromkeys(("rows", "columns", "row_words"), "i32")
    return Build(f"dequantise {name}", _dequantize, types, constants_of(name))


BUILDS = (
    *(_product_build(name, 1) for name in FORMATS),
    _product_build("Q4_K", 8),
    *(_dequantize_build(name) for name in FORMATS),
)
