"""Drift: what reading a chunk alone did to its keys and values, told by recomputed tokens, taken back from reused ones.

The recomputed tokens show it for nothing: fresh minus stored, per layer, keys before RoPE. A reused token drifted most
like recomputed ones that stand near it, in its own chunk, and look like it, so it takes a weighted mean over those, the
weights a softmax as in attention (docs/decisions/selection.md has what each part is worth). A chunk that stands where
it was read has not drifted. Knows nothing of how rows were computed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from quire_engine import processes
from quire_engine.kv import transfer
from quire_engine.plan import StitchPlan
from quire_engine.types import Float16, Float32, ModelShape
from quire_kernels import rope

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Share:
    """How much of the estimated drift is taken back."""

    keys: float
    values: float


WITHIN = Share(0.8, 0.5)  # where a layer is corrected before the recomputed tokens attend in it
AFTER = Share(0.6, 0.3)  # where they have seen the uncorrected rows: what they show is less certain

EVIDENCE_TOKENS = 8  # fewer recomputed tokens than this say too little
LIKENESS = 6.0  # nats between a row that looks the same and one that has nothing in common
_OWN_CHUNK = 2.0  # nats
_NEAR_TOKENS = 30.0  # so much further away is one nat less
_REACH_TOKENS = 256  # beyond it a weight would be below e^-8
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
    def of(cls, plan: StitchPlan) -> Self | None:
        """None where too little is recomputed, or nothing could be corrected."""
        prompt, first = plan.prompt, plan.spans[0].start
        start, stop = prompt.starts[1 + prompt.intact], prompt.context_tokens
        again = np.concatenate([np.arange(0), *(np.arange(span.start, span.stop) for span in plan.recomputed)])
        fresh = np.flatnonzero(again >= start)
        recomputed = (again[fresh] - start).astype(np.intp)
        reused = np.setdiff1d(np.arange(stop - start), recomputed, assume_unique=True)
        if len(recomputed) < EVIDENCE_TOKENS or not len(reused):
            return None
        lengths = [len(chunk) for chunk in prompt.chunks[prompt.intact :]]
        of_chunk = np.repeat(np.arange(len(lengths)), lengths)
        count = -(-len(reused) // _BLOCK_ROWS)
        rows = min(_BLOCK_ROWS, len(reused))
        blocks = np.minimum(np.arange(count * rows), len(reused) - 1).reshape(count, rows)
        low = np.searchsorted(recomputed, reused[blocks[:, 0]] - _REACH_TOKENS)
        high = np.searchsorted(recomputed, reused[blocks[:, -1]] + _REACH_TOKENS, side="right")
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


def correct(
    plan: StitchPlan,
    shape: ModelShape,
    k_rot: Sequence[Float16],
    v: Sequence[Float16],
    fresh_k_rot: Sequence[Float16],
    fresh_v: Sequence[Float16],
    share: Share = AFTER,
) -> None:
    """Shifts the reused rows of a plan in all layers, in place.

    k_rot, v: per layer [rows, kv_heads * dim], as stored, keys rotated to their positions; row 0 is the plan's first.
    fresh_k_rot, fresh_v: per layer [recomputed, kv_heads * dim], in order of position.
    """
    near = Neighbours.of(plan)
    if near is None:
        return
    first, stop = plan.spans[0].start, plan.prompt.context_tokens
    cos, sin = (turn[near.isolated] for turn in transfer.angles(np.arange(first, stop), shape.rope))
    reused, recomputed = near.isolated.start + near.reused, near.isolated.start + near.recomputed

    def heads(k: Float16) -> Float32:
        return k.astype(np.float32).reshape(len(k), shape.kv_heads, shape.key_dim)

    def unrotated(k: Float32, rows: Rows | slice) -> Float32:
        return rope.unrotate(k, cos[rows], sin[rows], shape.rope.layout).reshape(len(k), -1)

    weights = near.weights(unrotated(heads(k_rot[middle(shape.layers)][near.isolated]), slice(None)))

    def correct_layer(layer: int) -> None:
        keys, values = k_rot[layer], v[layer]
        changed = unrotated(heads(fresh_k_rot[layer][near.fresh]) - heads(keys[recomputed]), near.recomputed)
        drift = near.drift(weights, np.float32(share.keys) * changed).reshape(-1, shape.kv_heads, shape.key_dim)
        shift = rope.rotate(drift, cos[near.reused], sin[near.reused], shape.rope.layout)
        keys[reused] = (heads(keys[reused]) + shift).reshape(len(reused), -1)
        changed = fresh_v[layer][near.fresh].astype(np.float32) - values[recomputed]
        values[reused] = values[reused] + near.drift(weights, np.float32(share.values) * changed)

    with ThreadPoolExecutor(max_workers=processes.cores()) as pool:
        list(pool.map(correct_layer, range(shape.layers)))


def middle(layers: int) -> int:
    """The layer whose keys tell which rows are alike: as good as each layer's own, and asked once."""
    return layers // 2
