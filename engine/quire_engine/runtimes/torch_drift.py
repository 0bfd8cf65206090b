"""Drift correction on a device, layer by layer: reused rows are shifted before the layer's tokens attend to them.

The rule is `quire_engine.kv.drift`'s. Knows nothing of how the recomputed tokens are computed.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quire_engine.kv import drift
from quire_engine.kv.drift import Neighbours
from quire_engine.plan import StitchPlan
from quire_engine.runtimes.torch_decoder import KV, Decoder, Fresh
from quire_engine.types import Float32


class DriftCorrection:
    """Of one plan; `correct` is called once a layer, with the rows as they were stored still in place.

    The middle layer's have to be there when it is made."""

    def __init__(self, decoder: Decoder, kv: KV, first: int, near: Neighbours) -> None:
        """first: the plan's first position."""
        self._decoder, self._kv = decoder, kv
        row = first - kv.packed_tokens
        self._isolated = slice(row + near.isolated.start, row + near.isolated.stop)
        self._reused, self._recomputed, self._fresh, self._blocks, self._candidates = (
            self._on_device(rows) for rows in (near.reused, near.recomputed, near.fresh, near.blocks, near.candidates)
        )
        self._cos, self._sin = decoder.angles(np.arange(first + near.isolated.start, first + near.isolated.stop))
        likely = kv.k[drift.middle(decoder.shape.layers)][self._isolated]
        self._weights = self._alike(decoder.unrotate(likely, self._cos, self._sin).flatten(1), near.bias)

    @classmethod
    def of(cls, plan: StitchPlan, decoder: Decoder, kv: KV) -> Self | None:
        """None where nothing can be corrected."""
        near = Neighbours.of(plan)
        return cls(decoder, kv, plan.spans[0].start, near) if near else None

    def correct(self, fresh: Fresh) -> None:
        """Takes the estimated drift back from the layer's reused keys and values."""
        decoder, cos, sin = self._decoder, self._cos, self._sin
        keys = self._kv.k[fresh.layer][self._isolated]
        values = self._kv.v[fresh.layer][self._isolated]
        turn = cos[self._recomputed], sin[self._recomputed]
        changed = fresh.k_pre[self._fresh].float() - decoder.unrotate(keys[self._recomputed], *turn)
        shift = self._drift(drift.KEYS * changed)
        shift = decoder.rotate(shift, cos[self._reused], sin[self._reused])
        keys.index_add_(0, self._reused, shift.to(keys.dtype))
        changed = fresh.v[self._fresh].float() - values[self._recomputed].float()
        shift = self._drift(drift.VALUES * changed)
        values.index_add_(0, self._reused, shift.to(values.dtype))

    def _alike(self, stored: Tensor, bias: Float32) -> Tensor:
        """`Neighbours.weights`, which is the specification."""
        alike = functional.normalize(stored - stored.mean(0), dim=1)
        theirs = alike[self._recomputed][self._candidates]
        weights = alike[self._reused][self._blocks] @ theirs.transpose(1, 2)
        weights = drift.LIKENESS * weights + torch.from_numpy(bias).to(weights.device)
        return weights.softmax(-1)

    def _drift(self, changed: Tensor) -> Tensor:
        """`Neighbours.drift` over [recomputed, kv_heads, dim]."""
        found = self._weights @ changed.flatten(1)[self._candidates]
        return found.flatten(0, 1)[: len(self._reused)].reshape(-1, *changed.shape[1:])

    def _on_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self._decoder.device)
