"""Drift: what reading a chunk alone did to its keys and values, told by recomputed tokens, taken back from reused ones.

The recomputed tokens show it for nothing: fresh minus stored, per layer, keys before RoPE. A reused token drifted most
like recomputed ones that stand near it, in its own chunk, and look like it, so it takes a weighted mean over those, the
weights a softmax as in attention (docs/decisions/selection.md has what each part is worth). A chunk that stands where
it was read has not drifted. Knows nothing of how rows were computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from quire_engine.kv import transfer
from quire_engine.plan import StitchPlan
from quire_engine.types import Float16, Float32, ModelShape
from quire_kernels import rope

Rows = npt.NDArray[np.intp]


KEYS, VALUES = 0.8, 0.5  # how much of the estimated drift is taken back

EVIDENCE_TOKENS = 8  # fewer recomputed tokens than this say too little
LIKENESS = 6.0  # nats between a row that looks the same and one that has nothing in common
_OWN_CHUNK = 2.0  # nats
_NEAR_TOKENS = 30.0  # so much further away is one nat less
REACH_TOKENS = 256  # beyond it a weight would be below e^-8
_BLOCK_ROWS = 128  # reused rows that share their candidates


@dataclass(frozen=True)
class Neighbours:
    """The recomputed rows of a plan that each reused one may learn from.

    isolated: rows of the plan whose chunks do not stand where they were read.  reused [u], recomputed [m]: among these.
    fresh: [m] of all that the plan recomputes.  blocks: [blocks, rows] of the reused, the last one filled up.
    candidates: [blocks, width] of the recomputed.  bias: [blocks, rows, width] nats for distance and chunk; -inf where
    there is no such candidate.
    """

    isolated: slice
    reused: Rows
    recomputed: Rows
    fresh: Rows
    blocks: Rows
    candidates: Rows
    bias: Float32

    @classmethod
    def of(cls, plan: StitchPlan, since: int = 0, until: int | None = None) -> Self | None:
        """None where too little is recomputed, or nothing could be corrected. since, until: the positions of the reused
        rows that are asked about, all unless given."""
        prompt, first = plan.prompt, plan.spans[0].start
        start, stop = prompt.starts[1 + prompt.intact], prompt.context_tokens
        again = np.concatenate([np.arange(0), *(np.arange(span.start, span.stop) for span in plan.recomputed)])
        fresh = np.flatnonzero(again >= start)
        recomputed = (again[fresh] - start).astype(np.intp)
        asked = np.arange(max(since - start, 0), (stop if until is None else until) - start)
        reused = np.setdiff1d(asked, recomputed, assume_unique=True)
        if len(recomputed) < EVIDENCE_TOKENS or not len(reused):
            return None
        lengths = [len(chunk) for chunk in prompt.chunks[prompt.intact :]]
        of_chunk = np.repeat(np.arange(len(lengths)), lengths)
        count = -(-len(reused) // _BLOCK_ROWS)
        rows = min(_BLOCK_ROWS, len(reused))
        blocks = np.minimum(np.arange(count * rows), len(reused) - 1).reshape(count, rows)
        low = np.searchsorted(recomputed, reused[blocks[:, 0]] - REACH_TOKENS)
        high = np.searchsorted(recomputed, reused[blocks[:, -1]] + REACH_TOKENS, side="right")
        low = np.clip(low, 0, len(recomputed) - EVIDENCE_TOKENS)
        high = np.maximum(high, low + EVIDENCE_TOKENS)
        candidates = low[:, None] + np.arange((high - low).max())
        there = candidates < high[:, None]
        candidates = np.minimum(candidates, len(recomputed) - 1)
        mine, theirs = reused[blocks][:, :, None], recomputed[candidates][:, None, :]
        bias = _OWN_CHUNK * (of_chunk[mine] == of_chunk[theirs]) - np.abs(mine - theirs) / _NEAR_TOKENS
        bias = np.where(there[:, None, :], bias, -np.inf).astype(np.float32)
        return cls(slice(start - first, stop - first), reused, recomputed, fresh, blocks, candidates, bias)

    def weights(self, stored: Float32) -> Float32:
        """Of candidates [blocks, rows, width], from one layer's keys before RoPE [isolated rows, channels]."""
        centred = stored - stored.mean(axis=0)
        alike = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.float32(1e-12))
        theirs = alike[self.recomputed][self.candidates]
        weights: Float32 = alike[self.reused][self.blocks] @ theirs.transpose(0, 2, 1)
        weights *= np.float32(LIKENESS)
        weights += self.bias
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights

    def drift(self, weights: Float32, changed: Float32) -> Float32:
        """Of the reused rows [u, channels], from what the recomputed ones changed by [m, channels]."""
        found: Float32 = weights @ changed[self.candidates]
        return found.reshape(-1, changed.shape[1])[: len(self.reused)]


class Correction:
    """Of a plan's rows in main memory, layer by layer. None of its arrays is changed; rows are float16
    [rows, kv_heads * dim], keys rotated to their positions, row 0 the plan's first."""

    def __init__(self, plan: StitchPlan, shape: ModelShape, near: Neighbours, likely: Float16) -> None:
        """likely: the middle layer's stored keys."""
        first, stop = plan.spans[0].start, plan.prompt.context_tokens
        self._shape, self._near = shape, near
        self._angles = transfer.angles(np.arange(first, stop), shape.rope)
        self._reused, self._recomputed = near.isolated.start + near.reused, near.isolated.start + near.recomputed
        rows = np.arange(near.isolated.start, near.isolated.stop)
        self._weights = near.weights(self._turned(rope.unrotate, likely[near.isolated].astype(np.float32), rows))

    @classmethod
    def of(
        cls, plan: StitchPlan, shape: ModelShape, likely: Float16, since: int = 0, until: int | None = None
    ) -> Self | None:
        """None where nothing can be corrected. since, until: as Neighbours.of has them."""
        near = Neighbours.of(plan, since, until)
        return cls(plan, shape, near, likely) if near else None

    def settled(self, kind: str, stored: Float16, fresh: Float16) -> Float16:
        """A layer's keys ("k") or values ("v") as stored, the reused ones shifted. fresh: of all that the plan
        recomputes, in order of position."""
        changed = fresh[self._near.fresh].astype(np.float32) - stored[self._recomputed]
        if kind == "k":
            changed = np.float32(KEYS) * self._turned(rope.unrotate, changed, self._recomputed)
            shift = self._turned(rope.rotate, self._near.drift(self._weights, changed), self._reused)
        else:
            shift = self._near.drift(self._weights, np.float32(VALUES) * changed)
        rows = stored.copy()
        rows[self._reused] = stored[self._reused] + shift
        return rows

    def _turned(self, turn: Callable[..., Float32], keys: Float32, rows: Rows) -> Float32:
        cos, sin = (numbers[rows] for numbers in self._angles)
        heads = keys.reshape(len(keys), self._shape.kv_heads, self._shape.key_dim)
        return turn(heads, cos, sin, self._shape.rope.layout).reshape(keys.shape)


def middle(layers: int) -> int:
    """The layer whose keys tell which rows are alike: as good as each layer's own, and asked once."""
    return layers // 2
