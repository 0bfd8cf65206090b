"""A decoder over KV buffers in PyTorch, on any device: the chosen tokens' hidden states alone go up the layers.

Row p of a buffer is position p, unless older ones are packed (`torch_window`). Tokens at any positions are read
together: every layer writes their keys and values to their rows first, then each attends to the rows up to its own, so
that neighbours see one another as they are now.
Knows nothing of plans, chunks or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from quire_engine.kv import transfer
from quire_engine.runtimes.transformer import Transformer, turned
from quire_engine.types import ModelShape, Rope
from quire_kernels import device_attention, dispatch
from quire_kernels.device_place import Angles

_TILE = {"cpu": 128, "cuda": 1024}  # queries that attend together: they see the rows up to the last one's, no further

Ints = npt.NDArray[np.int64]


class KV:
    """Keys at their positions and values, per layer [cells, kv_heads, dim]."""

    def __init__(self, shape: ModelShape, cells: int, device: torch.device, dtype: torch.dtype) -> None:
        def empty(dim: int) -> list[Tensor]:
            size = (cells, shape.kv_heads, dim)
            return [torch.zeros(size, device=device, dtype=dtype) for _ in range(shape.layers)]

        self._shape = shape
        self.cells = cells
        self.k = empty(shape.key_dim)
        self.v = empty(shape.value_dim)
        self.angles = angles_of(np.arange(cells), shape.rope, device)  # of all positions

    @property
    def room(self) -> int:
        """Tokens that it holds at most."""
        return self.cells

    @property
    def packed_tokens(self) -> int:
        """So many positions before the latest ones have no row; the latest are so much further on than their rows."""
        return 0

    @property
    def row_angles(self) -> Angles:
        """Of the position that every row has when it is among the latest."""
        return self.angles

    @property
    def memory_bytes(self) -> int:
        return sum(rows.nbytes for rows in (*self.k, *self.v))

    def lacking(self, tokens: int) -> int:
        """What room for so many tokens takes beyond what there is, in rows."""
        return max(0, tokens - self.cells)

    def grow(self, tokens: int, used: int) -> None:
        """Makes room for so many tokens, layer by layer; the first `used` stay."""
        for layers in (self.k, self.v):
            for index, old in enumerate(layers):
                layers[index] = torch.zeros((tokens, *old.shape[1:]), device=old.device, dtype=old.dtype)
                layers[index][:used] = old[:used]
        self.cells = tokens
        if len(self.angles.cos) < tokens:
            self.angles = angles_of(np.arange(tokens), self._shape.rope, self.k[0].device)

    def rows(self, layer: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of positions 0..stop."""
        return self.k[layer][:stop], self.v[layer][:stop]

    def pack(self, tokens: int) -> None:
        """Packs what is old, when there are so many tokens and nothing behind them."""

    def rewind(self, tokens: int) -> None:
        """Forgets the tokens behind the first so many."""

    def copy(self, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Of these rows in all layers."""
        return [k[rows].clone() for k in self.k], [v[rows].clone() for v in self.v]

    def put(self, rows: slice, copied: tuple[list[Tensor], list[Tensor]]) -> None:
        for mine, theirs in zip((self.k, self.v), copied, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                one[rows] = other


@dataclass(frozen=True)
class Tile:
    """Queries that attend together. stop: the rows before it are looked at.  visible: [queries, stop], of which rows;
    all where it is None."""

    queries: slice
    stop: int
    visible: Tensor | None


@dataclass(frozen=True)
class Places:
    """Ascending positions read together, with what every layer needs of them. cos, sin: [tokens, 1, dims/2].

    rows: of the buffers.  stop: the position behind the last one.  positions: int32 [tokens], for the kernel that
    attends from scattered ones; where it runs there are no tiles.
    """

    rows: Tensor | slice
    cos: Tensor
    sin: Tensor
    tiles: tuple[Tile, ...]
    stop: int
    positions: Tensor | None = None


@dataclass(frozen=True)
class Fresh:
    """What one layer made of the tokens, [tokens, heads, dim] each, before it is written and attended to."""

    layer: int
    places: Places
    q_rot: Tensor
    k_pre: Tensor
    k_rot: Tensor
    v: Tensor


OnLayer = Callable[[Fresh], None]
Gather = Callable[[Fresh], Tensor]


class Decoder:
    """A model's layers over buffers. check: called before every layer; what it raises ends the work."""

    def __init__(self, model: Transformer, check: Callable[[], None]) -> None:
        self.model = model
        self.shape = model.shape
        self.device, self.dtype = model.embedding.device, model.embedding.dtype
        self._check = check

    def places(self, positions: Ints, packed: int = 0) -> Places:
        """positions: ascending, each once.  packed: of the buffers that they are read into, `KV.packed_tokens`."""
        cos, sin = self.angles(positions)
        first, last = int(positions[0]), int(positions[-1])
        contiguous = last - first + 1 == len(positions)
        on_device = torch.from_numpy(positions).to(self.device)
        if contiguous:
            rows = slice(first - packed, last + 1 - packed)
            return Places(rows, cos, sin, self._contiguous(positions, on_device), last + 1)
        if self._has_kernel:
            return Places(on_device - packed, cos, sin, (), last + 1, on_device.to(torch.int32))
        return Places(on_device - packed, cos, sin, self._tiles(positions, on_device), last + 1)

    @cached_property
    def _has_kernel(self) -> bool:
        return dispatch.choose(self.device) == "triton"

    def _contiguous(self, positions: Ints, on_device: Tensor) -> tuple[Tile, ...]:
        """A graphics device's own attention knows triangles that end at the lower right, and needs no mask for them."""
        count, stop = len(positions), int(positions[-1]) + 1
        if self.device.type == "cpu" or count == 1:
            return self._tiles(positions, on_device)
        return (Tile(slice(0, count), stop, causal_lower_right(count, stop)),)

    def _tiles(self, positions: Ints, on_device: Tensor) -> tuple[Tile, ...]:
        size = _TILE.get(self.device.type, _TILE["cpu"])
        return tuple(self._tile(positions, on_device, start, size) for start in range(0, len(positions), size))

    def _tile(self, positions: Ints, on_device: Tensor, start: int, size: int) -> Tile:
        queries = slice(start, min(start + size, len(positions)))
        stop = int(positions[queries.stop - 1]) + 1
        if queries.stop - start == 1:
            return Tile(queries, stop, None)
        return Tile(queries, stop, torch.arange(stop, device=self.device) <= on_device[queries, None])

    def angles(self, positions: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, 1, dims/2], for all heads, in float32."""
        found = angles_of(positions, self.shape.rope, self.device)
        return found.cos[:, None], found.sin[:, None]

    def rotate(self, k_pre: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(k_pre, cos, sin, self.shape.rope).to(k_pre.dtype)

    def unrotate(self, k_rot: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """In float32, for measuring and storing."""
        return turned(k_rot.float(), cos, -sin, self.shape.rope)

    def read(
        self,
        tokens: Sequence[int] | Tensor,
        places: Places,
        kv: KV,
        on_layer: OnLayer | None = None,
        layers: int | None = None,
        hidden: bool = True,
        ready: Callable[[int], None] | None = None,
        gather: Gather | None = None,
    ) -> Tensor:
        """The tokens' rows into the first so many layers of the buffers; the last of these layers' output.

        hidden: without it the last layer only makes keys and values, and its input comes back.  ready: returns when
        the rows of a layer that are there already may be used.  gather: attends in place of `attend`.
        """
        ids = torch.as_tensor(tokens, device=self.device)
        x = self.model.embedding[ids]
        last = (layers or self.shape.layers) - 1
        for index in range(last + 1):
            self._check()
            fresh = self._projected(index, x, places)
            if ready is not None:
                ready(index)
            if on_layer is not None:
                on_layer(fresh)
            _write(fresh.k_rot, kv.k[index], places.rows)
            _write(fresh.v, kv.v[index], places.rows)
            if hidden or index < last:
                layer = self.model.layers[index]
                seen = gather(fresh) if gather else attend(fresh.q_rot, *kv.rows(index, places.stop), places)
                x = x + layer.attn_output(seen.flatten(-2))
                x = x + layer.feed_forward(x)
        return x

    def scores(self, hidden: Tensor) -> Tensor:
        """Of the next token, [..., vocabulary] in float32."""
        return self.model.logits(hidden).float()

    def _projected(self, index: int, x: Tensor, places: Places) -> Fresh:
        q, k_pre, v = self.model.layers[index].projections(x, self.shape)
        q_rot, k_rot = (self.rotate(heads, places.cos, places.sin) for heads in (q, k_pre))
        return Fresh(index, places, q_rot, k_pre, k_rot, v)


def angles_of(positions: npt.ArrayLike, rope: Rope, device: torch.device) -> Angles:
    """Cosines and sines [positions, dims/2] on a device."""
    cos, sin = transfer.angles(positions, rope)
    return Angles(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device), rope.layout)


def attend(q_rot: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
    """[tokens, heads, value_dim]: each query over the rows up to its own position."""
    if places.positions is not None:
        return device_attention.attend(q_rot, places.positions, k[: places.stop], v[: places.stop])
    found = [
        functional.scaled_dot_product_attention(
            _by_head(q_rot[tile.queries]),
            _by_head(k[: tile.stop]),
            _by_head(v[: tile.stop]),
            attn_mask=tile.visible,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for tile in places.tiles
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _write(x: Tensor, out: Tensor, rows: Tensor | slice) -> None:
    if isinstance(rows, slice):
        out[rows] = x
    else:
        out.index_copy_(0, rows, x)


def _by_head(x: Tensor) -> Tensor:
    """[rows, heads, dim] -> [1, heads, rows, dim]."""
    return x.transpose(0, 1)[None]
