"""A live conversation's KV in memory: the latest tokens exactly, older ones packed. KVmix's dynamic window.

Keys are packed before RoPE, like a stored chunk's, in whole groups of tokens and once: what is packed is never unpacked
and rounded again. Knows nothing of models or of what the tokens say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from quire_engine.kv import codec, transfer
from quire_engine.kv.codec import PackedChunk, PackedLayer
from quire_engine.types import BitPlan, ChunkKV, Float16, ModelShape
from quire_kernels.place import PackedTensor, Tensor, place_keys

GROUP = 64  # tokens packed together: a whole number of any grid's groups
_BITS = (6, 4)  # of keys and values: docs/decisions/live_window.md


def usual_plan(layers: int) -> BitPlan:
    """How precisely what leaves a window is packed, unless something else is asked for."""
    return BitPlan.uniform(layers, *_BITS)


@dataclass(frozen=True)
class Window:
    """Which tokens are packed. recent: so many of the latest never are."""

    recent: int = 128

    def groups(self, tokens: int) -> int:
        """Groups, from the oldest token on, that are packed when there are so many tokens. Never falls as they grow."""
        return max(0, tokens - self.recent) // GROUP


class LiveKV:
    """All layers' KV of tokens 0, 1, 2... The plan's sinks stay exact for ever, before the first group."""

    def __init__(self, shape: ModelShape, plan: BitPlan, window: Window) -> None:
        self._shape = shape
        self._plan = plan
        self._window = window
        self._packed: list[PackedChunk] = []
        self._k_pre = np.empty((shape.layers, 0, shape.kv_heads, shape.key_dim), np.float16)
        self._v = np.empty((shape.layers, 0, shape.kv_heads, shape.value_dim), np.float16)

    @property
    def packed_tokens(self) -> int:
        """Tokens that are packed, with the sinks before them."""
        return sum(len(group.order) for group in self._packed)

    @property
    def positions(self) -> range:
        return range(self.packed_tokens + self._k_pre.shape[1])

    @property
    def memory_bytes(self) -> int:
        """Of all arrays."""
        layers = [layer for group in self._packed for layer in group.layers]
        return self._k_pre.nbytes + self._v.nbytes + sum(a.nbytes for layer in layers for a in _arrays(layer))

    def append(self, k_pre: Float16, v: Float16) -> None:
        """The next tokens' rows, [layers, tokens, kv_heads, dim]; what leaves the window is packed."""
        self._k_pre = np.concatenate([self._k_pre, k_pre], axis=1)
        self._v = np.concatenate([self._v, v], axis=1)
        due = self._window.groups(len(self.positions) - self._plan.sinks)
        while len(self._packed) < due:
            self._pack_oldest()

    def rows(self, layer: int) -> tuple[Float16, Float16]:
        """Rotated keys and values of one layer, [tokens, kv_heads, dim]."""
        rope, tokens, heads = self._shape.rope, len(self.positions), self._shape.kv_heads
        cos, sin = transfer.angles(self.positions, rope)
        k_rot = np.empty((tokens, heads * self._shape.key_dim), np.float16)
        v = np.empty((tokens, heads * self._shape.value_dim), np.float16)
        start = 0
        for group in self._packed:
            at = slice(start, start + len(group.order))
            codec.place_layer(group.layers[layer], cos[at], sin[at], rope.layout, k_rot[at], v[at])
            start = at.stop
        place_keys(
            self._k_pre[layer].reshape(k_rot[start:].shape), cos[start:], sin[start:], rope.layout, heads, k_rot[start:]
        )
        v[start:] = self._v[layer].reshape(v[start:].shape)
        return k_rot.reshape(tokens, heads, self._shape.key_dim), v.reshape(tokens, heads, self._shape.value_dim)

    def _pack_oldest(self) -> None:
        plan = replace(self._plan, sinks=0) if self._packed else self._plan
        count = plan.sinks + GROUP
        oldest = ChunkKV(self._k_pre[:, :count], self._v[:, :count], scores={})
        group = codec.encode(oldest, plan, codec.text_order(count))
        # Copies, because a view would keep the exact rows in memory.
        self._packed.append(replace(group, layers=tuple(_without_views(layer) for layer in group.layers)))
        self._k_pre, self._v = self._k_pre[:, count:].copy(), self._v[:, count:].copy()


def _without_views(layer: PackedLayer) -> PackedLayer:
    return replace(layer, k_sinks=layer.k_sinks.copy(), v_sinks=layer.v_sinks.copy())


def _arrays(layer: PackedLayer) -> Iterator[np.ndarray | np.generic]:
    yield from (layer.k_sinks, layer.v_sinks)
    for tensor in (layer.k, layer.v):
        yield from _parts(tensor)


def _parts(tensor: Tensor) -> Iterator[np.ndarray | np.generic]:
    if not isinstance(tensor, PackedTensor):
        yield tensor
        return
    yield from tensor.planes
    yield tensor.widths
    yield from vars(tensor.grid).values()
