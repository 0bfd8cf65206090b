"""The weights of a GGUF file as PyTorch multiplies with them: as numbers of one type, or as the file's own blocks.

Blocks take less than a third of the memory of 16-bit numbers, and of the time for one token, which is reading them.
They are unpacked where they are used (`quire_kernels.device_weights`). Knows nothing of layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.gguf import Gguf
from quire_kernels import device_weights
from quire_kernels.device_weights import FORMATS, BlockFormat, Packed

_FORMATS = {of.number: of for of in FORMATS.values()}
_PART_OF_SHAPE = {"rope_freqs.weight"}  # which gguf.shape reads


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] that stays as it is in the file.

    scratch: in the numbers' type, for unpacked rows when many tokens are multiplied. One serves all matrices of a
    model, for their products come one after another on one stream, recorded ones too; the largest matrix of a layer
    fits into it. That of the vocabulary, often ten times as large, passes through in parts.
    """

    packed: Packed
    scratch: Tensor

    @property
    def device(self) -> torch.device:
        return self.packed.data.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.scratch.dtype

    @property
    def nbytes(self) -> int:
        """Without the scratch."""
        return self.packed.data.nbytes

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The rows' numbers, [*ids, columns]."""
        rows = device_weights.rows(self.packed, ids.flatten(), self.dtype)
        return rows.reshape(*ids.shape, self.packed.columns)

    def times(self, x: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]."""
        flat = device_weights.linear(x.reshape(-1, self.packed.columns), self.packed, self.scratch)
        return flat.reshape(*x.shape[:-1], self.packed.rows)


Matrix = Tensor | Blocks


def numbers(matrix: Matrix) -> Tensor:
    """Of a whole matrix: itself where it is kept as numbers, else unpacked to memory of their own."""
    if not isinstance(matrix, Blocks):
        return matrix
    size = (matrix.packed.rows, matrix.packed.columns)
    return device_weights.dequantize(matrix.packed, torch.empty(size, dtype=matrix.dtype, device=matrix.device))


def kept_bytes(header: Gguf, number_bytes: int, packed: bool) -> int:
    """What the weights of a file will take of a device's memory. number_bytes: of a number that is not in a block."""
    kept = number_bytes * _scratch_numbers(header, packed)
    for name, entry in header.tensors.items():
        of = _block_format(entry, packed)
        if of is not None:
            kept += prod(entry.shape) // of.numbers * of.bytes
        elif name not in _PART_OF_SHAPE:
            kept += prod(entry.shape) * number_bytes
    return kept


class Weights:
    """The tensors of a GGUF file, read one at a time; remembers which were asked for."""

    def __init__(self, header: Gguf, device: torch.device, dtype: torch.dtype, packed: bool) -> None:
        """packed: matrices stay as they are where the kernels know their format. Raises ModelError for an architecture
        that cannot be read."""
        if reason := gguf.why_not_stitchable(header):
            raise ModelError(reason, "The PyTorch decoder reads Llama, Qwen2 and Qwen3 models.")
        self._header = header
        self._device, self._dtype, self._packed = device, dtype, packed
        self._bytes = np.memmap(header.path, np.uint8, mode="r")
        self._unread = set(header.tensors) - _PART_OF_SHAPE
        self._scratch = torch.empty(_scratch_numbers(header, packed), device=device, dtype=dtype)

    def has(self, name: str) -> bool:
        return name in self._header.tensors

    def matrix(self, name: str) -> Matrix:
        """[rows, columns] in GGUF's own row order. Raises ModelError as `tensor` does."""
        with self._readable(name):
            entry = self._header.tensors[name]
            if (of := _block_format(entry, self._packed)) is None:
                return self.tensor(name)
            self._unread.discard(name)
            data = torch.from_numpy(np.array(self._raw(entry))).to(self._device)
            return Blocks(Packed(data, of), self._scratch)

    def tensor(self, name: str) -> Tensor:
        """Its numbers. Raises ModelError when it is missing, cut off, or of an unknown type."""
        with self._readable(name):
            entry = self._header.tensors[name]
            numbers = np.array(dequantize(self._raw(entry), GGMLQuantizationType(entry.ggml_type)), np.float32)
            self._unread.discard(name)
            return torch.from_numpy(numbers.reshape(entry.shape[::-1])).to(self._device, self._dtype)

    def refuse_unread(self) -> None:
        """Raises ModelError for weights that the decoder has no use for: experts, for instance."""
        if self._unread:
            some = ", ".join(sorted(self._unread)[:3])
            raise ModelError(
                f"{self._header.name} has parts that the PyTorch decoder does not know: {some}.",
                "Answers by llama.cpp are not affected; precision plans and the torch runtime need this decoder.",
            )

    def _raw(self, entry: gguf.Tensor) -> npt.NDArray[np.uint8]:
        """[rows, bytes of a row]."""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.ggml_type)]
        columns, rows = entry.shape[0], prod(entry.shape[1:])
        if columns % block:
            raise ValueError(f"rows of {columns} numbers are no whole blocks of {block}")
        row_bytes = columns // block * block_bytes
        return self._bytes[entry.offset : entry.offset + rows * row_bytes].reshape(rows, row_bytes)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, ValueError, NotImplementedError) as error:
            raise ModelError(
                f"The weights {name} of {self._header.path} cannot be read.",
                "The file may be damaged or incomplete; otherwise try another quantisation of the model.",
                repr(error),
            ) from error


def _block_format(entry: gguf.Tensor, packed: bool) -> BlockFormat | None:
    """What a tensor stays in; None for one that becomes numbers."""
    return _FORMATS.get(entry.ggml_type) if packed and len(entry.shape) == 2 else None


def _scratch_numbers(header: Gguf, packed: bool) -> int:
    """As many as the largest packed matrix of a layer has, and the longest row of any other."""
    return max(
        (
            prod(entry.shape) if name.startswith("blk.") else entry.shape[0]
            for name, entry in header.tensors.items()
            if _block_format(entry, packed) is not None
        ),
        default=0,
    )
