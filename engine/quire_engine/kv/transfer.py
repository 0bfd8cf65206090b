"""Stored chunks into the rows of a prompt: read, check, unpack, rotate to final positions, write, on several threads.

Knows nothing of what the rows belong to afterwards. Each thread takes a chunk, so that one waits for the disk while
another computes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire_engine import processes
from quire_engine.errors import DamagedChunk
from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader
from quire_engine.types import Float16, Float32, Rope
from quire_kernels import rope as rotary


@dataclass(frozen=True)
class Placement:
    """A stored chunk and the prompt position of its first token."""

    key: str
    chunk: ChunkReader
    position: int

    @property
    def stop(self) -> int:
        return self.position + self.chunk.tokens


class DamagedPlacements(DamagedChunk):
    """Chunks whose bytes did not check out; the rows of the others are in place."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(f"{len(keys)} stored chunks are damaged and are computed again.")
        self.keys = keys


def angles(positions: npt.ArrayLike, rope: Rope) -> tuple[Float32, Float32]:
    """Cosines and sines of a model's RoPE at the given positions, [tokens, dims/2] each."""
    return rotary.angles(positions, rope.dims, rope.base, rope.scale, rope.factors)


def place(
    placements: Sequence[Placement], rope: Rope, k_rot: Sequence[Float16], v: Sequence[Float16], first: int = 0
) -> None:
    """Fills the rows of every placement, in all layers.

    k_rot, v: per layer [rows, kv_heads * dim], of which row 0 is position `first`.
    Raises DamagedPlacements after placing what it could.
    """
    with ThreadPoolExecutor(max_workers=min(len(placements), processes.cores())) as pool:
        sound = list(pool.map(lambda placement: _place(placement, rope, k_rot, v, first), placements))
    damaged = tuple(placement.key for placement, ok in zip(placements, sound, strict=True) if not ok)
    if damaged:
        raise DamagedPlacements(damaged)


def _place(placement: Placement, rope: Rope, k_rot: Sequence[Float16], v: Sequence[Float16], first: int) -> bool:
    """Whether the chunk's bytes were sound."""
    rows = slice(placement.position - first, placement.stop - first)
    cos, sin = angles(np.arange(placement.position, placement.stop), rope)
    try:
        for layer, (layer_k, layer_v) in enumerate(zip(k_rot, v, strict=True)):
            packed = placement.chunk.layer(layer)
            codec.place_layer(packed, cos, sin, rope.layout, layer_k[rows], layer_v[rows])
    except DamagedChunk:
        return False
    return True
