"""A model's weights as its GGUF file holds them, kept quantised on the device: products with them, and their numbers.

Six block formats of ggml (ggml-common.h): a row is a run of blocks of 32 or 256 numbers, each with scales of its own.
Bytes are the file's. For a few tokens at once the product reads every weight's bits once and unpacks them in registers
(`triton_gguf`); for many, rows are unpacked to a scratch tensor, as many as it holds, and the vendor's matrix product
does the rest. Without Triton that is done for few tokens too. Nothing here waits for the device or copies to it, so
all of it may be recorded. Knows nothing of files or models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quire_kernels import dispatch

FEW = 8  # tokens up to which a product unpacks weights on the fly
NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class BlockFormat:
    """One of ggml's formats.

    name, number: ggml's.  numbers, bytes: of a block.  word_bytes: what a block's parts are surely aligned to.
    """

    name: str
    number: int
    numbers: int
    bytes: int
    word_bytes: int
    unpack: Callable[[Tensor], Tensor]  # uint8 [blocks, bytes] -> float32 [blocks, numbers]


@dataclass(frozen=True)
class Packed:
    """A weight matrix [rows, columns], each row a run of blocks: uint8 [rows, bytes of a row]."""

    data: Tensor
    format: BlockFormat

    def __post_init__(self) -> None:
        data, of = self.data, self.format
        if data.dtype != torch.uint8 or data.dim() != 2 or not data.is_contiguous() or data.shape[1] % of.bytes:
            raise ValueError(f"{of.name} has contiguous rows of whole blocks of {of.bytes} bytes: {tuple(data.shape)}")
        if data.data_ptr() % of.word_bytes:
            raise ValueError(f"{of.name} begins at a multiple of {of.word_bytes} bytes")

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        return self.data.shape[1] // self.format.bytes * self.format.numbers

    def part(self, start: int, stop: int) -> "Packed":
        """Some of its rows, where they lie."""
        return Packed(self.data[start:stop], self.format)


def dequantize(weight: Packed, out: Tensor, form: dispatch.Wish = "auto") -> Tensor:
    """Write a weight's numbers to out, [rows, columns] contiguous, and return it.

    Floor: the weight's bytes read and out's written. In float32 the numbers are gguf's to the last bit.
    """
    if out.shape != (weight.rows, weight.columns) or out.dtype not in NUMBER_TYPES or not out.is_contiguous():
        raise ValueError(
            f"out is a contiguous float {[weight.rows, weight.columns]}, not {out.dtype} {list(out.shape)}"
        )
    _check_device(weight, out)
    if dispatch.choose(out.device, form) == "triton":
        from quire_kernels import triton_gguf

        triton_gguf.launch_dequantize(weight, out)
        return out
    blocks = weight.data.reshape(-1, weight.format.bytes)
    return out.copy_(weight.format.unpack(blocks).reshape(out.shape))


def rows(weight: Packed, ids: Tensor, dtype: torch.dtype, form: dispatch.Wish = "auto") -> Tensor:
    """Those rows' numbers, [ids, columns], such as the embeddings of tokens. ids: integers [ids] on the device."""
    chosen = Packed(weight.data.index_select(0, ids), weight.format)
    return dequantize(chosen, torch.empty(chosen.rows, chosen.columns, dtype=dtype, device=ids.device), form)


def linear(x: Tensor, weight: Packed, scratch: Tensor | None = None, form: dispatch.Wish = "auto") -> Tensor:
    """x [tokens, columns] times the weight's transpose: [tokens, rows] in x's type.

    scratch: room in x's type for one row or more, overwritten; rows that it has no room for have their turn later.
    Without it, room for all is allocated where it is needed.
    Floor in bytes: the weight's, once; with more than `FEW` tokens also twice its numbers in x's type, and
    2 * tokens * rows * columns operations.  Raises ValueError when the arguments do not fit together.
    """
    if x.dim() != 2 or x.shape[1] != weight.columns or x.dtype not in NUMBER_TYPES or x.stride(1) != 1:
        raise ValueError(f"x is a float tensor [tokens, {weight.columns}], not {x.dtype} {list(x.shape)}")
    _check_device(weight, x)
    if 1 <= len(x) <= FEW and dispatch.choose(x.device, form) == "triton":
        from quire_kernels import triton_gguf

        return triton_gguf.launch_product(x, weight)
    if scratch is None:
        scratch = torch.empty(weight.rows * weight.columns, dtype=x.dtype, device=x.device)
    elif scratch.dtype != x.dtype or scratch.device != x.device or scratch.numel() < weight.columns:
        raise ValueError(f"scratch is room for a row of x's type, not {scratch.dtype} {list(scratch.shape)}")
    together = scratch.numel() // weight.columns
    if together >= weight.rows:
        return _unpacked_product(x, weight, scratch, form)
    out = torch.empty(len(x), weight.rows, dtype=x.dtype, device=x.device)
    for start in range(0, weight.rows, together):
        stop = min(start + together, weight.rows)
        out[:, start:stop] = _unpacked_product(x, weight.part(start, stop), scratch, form)
    return out


def _unpacked_product(x: Tensor, weight: Packed, scratch: Tensor, form: dispatch.Wish) -> Tensor:
    room = scratch.reshape(-1)[: weight.rows * weight.columns].reshape(weight.rows, weight.columns)
    return functional.linear(x, dequantize(weight, room, form))


def _check_device(weight: Packed, other: Tensor) -> None:
    if weight.data.device != other.device:
        raise ValueError(f"everything must be on one device: {weight.data.device}, {other.device}")


def _halves(data: Tensor) -> Tensor:
    """Bytes [blocks, 2n] as float16, in float32 [blocks, n]."""
    return data.contiguous().view(torch.float16).to(torch.float32)


def _fields(data: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Bytes [blocks, runs, n] -> [blocks, runs, shifts, n]: the bits behind each shift, in float32."""
    # One by one: a tensor of shifts would be a copy to the device, which waits for it and cannot be recorded.
    return torch.stack([(data >> shift) & mask for shift in shifts], dim=2).to(torch.float32)


def _q4_0(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, None, 2:], (0, 4), 15).flatten(1)
    return _halves(blocks[:, :2]) * (codes - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, None, 4:], (0, 4), 15).flatten(1)
    return _halves(blocks[:, :2]) * codes + _halves(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * blocks[:, 2:].contiguous().view(torch.int8).to(torch.float32)


def _scales_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(step, low) of the eight runs of 32 numbers in blocks of Q4_K and Q5_K, each [blocks, 8, 1].

    Six bits for each of eight steps and minima: those of the first four lie in the low bits of bytes 0..3 and 4..7, the
    others' low four bits in bytes 8..11 and their top two above the first four.
    """
    d, d_min = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    steps = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], dim=1)
    minima = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], dim=1)
    return (d * steps)[:, :, None], -(d_min * minima)[:, :, None]


def _q4_k(blocks: Tensor) -> Tensor:
    step, low = _scales_k(blocks)
    codes = _fields(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    return (step * codes + low).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    step, low = _scales_k(blocks)
    codes = _fields(blocks[:, 48:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    top = _fields(blocks[:, None, 16:48], tuple(range(8)), 1).reshape(-1, 8, 32)
    return (step * (codes + 16 * top) + low).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 16, 16)
    top = _fields(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    step = _halves(blocks[:, 208:]) * blocks[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    return (step[:, :, None] * (codes + 16 * top - 32)).flatten(1)


FORMATS: dict[str, BlockFormat] = {
    of.name: of
    for of in (
        BlockFormat("Q4_0", 2, 32, 18, 2, _q4_0),
        BlockFormat("Q4_1", 3, 32, 20, 4, _q4_1),
        BlockFormat("Q8_0", 8, 32, 34, 2, _q8_0),
        BlockFormat("Q4_K", 12, 256, 144, 4, _q4_k),
        BlockFormat("Q5_K", 13, 256, 176, 4, _q5_k),
        BlockFormat("Q6_K", 14, 256, 210, 2, _q6_k),
    )
}
"""By the names of `gguf.GGMLQuantizationType`."""
