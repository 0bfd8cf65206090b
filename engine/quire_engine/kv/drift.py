"""Drift: what reading a chunk alone did to its keys, told by its recomputed tokens and taken back from the reused ones.

A large part of the difference between a chunk's stored keys and those of full prefill is the same for all of its
tokens. The recomputed tokens show it for nothing: the mean of fresh minus stored, per layer, head and channel, before
RoPE (docs/decisions/selection.md has what it is worth). Knows nothing of how rows were computed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from quire_engine import processes
from quire_engine.kv import transfer
from quire_engine.plan import StitchPlan
from quire_engine.types import Float16, Float32, ModelShape
from quire_kernels import rope

SHARE = 0.35  # of the measured drift that is taken back; .65 and more does harm
EVIDENCE_TOKENS = 8  # fewer recomputed tokens than this say too little about their chunk

Rows = npt.NDArray[np.intp]


def correct(plan: StitchPlan, shape: ModelShape, k_rot: Sequence[Float16], fresh_k_rot: Sequence[Float16]) -> None:
    """Shifts the reused keys of every chunk that has enough recomputed ones, in all layers, in place.

    k_rot: per layer [rows, kv_heads * key_dim], as stored, rotated to their positions; row 0 is the plan's first.
    fresh_k_rot: per layer [recomputed, kv_heads * key_dim], in order of position.
    """
    first = plan.spans[0].start
    fresh_rows = np.concatenate([np.arange(span.start, span.stop) for span in plan.recomputed]) - first
    chunks = _chunks(plan, fresh_rows, first)
    cos, sin = transfer.angles(np.arange(first, plan.prompt.context_tokens), shape.rope)

    def heads(k: Float16) -> Float32:
        return k.astype(np.float32).reshape(len(k), shape.kv_heads, shape.key_dim)

    def correct_layer(layer: int) -> None:
        k, fresh = k_rot[layer], fresh_k_rot[layer]
        for recomputed, reused in chunks:
            found = slice(*np.searchsorted(fresh_rows, (recomputed[0], recomputed[-1] + 1)))
            changed = heads(fresh[found]) - heads(k[recomputed])
            drift = rope.unrotate(changed, cos[recomputed], sin[recomputed], shape.rope.layout).mean(axis=0)
            shift = np.broadcast_to(np.float32(SHARE) * drift, (len(reused), *drift.shape))
            shifted = heads(k[reused]) + rope.rotate(shift, cos[reused], sin[reused], shape.rope.layout)
            k[reused] = shifted.reshape(len(reused), -1)

    with ThreadPoolExecutor(max_workers=processes.cores()) as pool:
        list(pool.map(correct_layer, range(shape.layers)))


def _chunks(plan: StitchPlan, fresh_rows: Rows, first: int) -> list[tuple[Rows, Rows]]:
    """Recomputed and reused rows of every chunk that has enough of the first and any of the second."""
    found = []
    for chunk, start in zip(plan.prompt.chunks, plan.prompt.starts[1:], strict=False):
        rows = np.arange(start, start + len(chunk)) - first
        recomputed = rows[np.isin(rows, fresh_rows, assume_unique=True)]
        reused = np.setdiff1d(rows, recomputed, assume_unique=True)
        if len(recomputed) >= EVIDENCE_TOKENS and len(reused):
            found.append((recomputed, reused))
    return found
