"""Drift correction on a device, layer by layer: reused rows are shifted before the layer's tokens attend to them.

The rule is `quire_engine.kv.drift`'s. Knows nothing of how the recomputed tokens are computed.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quire_engine.kv import drift
from quire_engine.kv.drift import WITHIN, Neighbours
from quire_engine.plan import StitchPlan
from quire_engine.runtimes.torch_decoder import KV, Decoder, Fresh


class DriftCorrection:
    """Of one plan; `correct` is called once a layer, with the rows as they were stored still in place."""

    def __init__(self, decoder: Decoder, kv: KV, first: int, near: Neighbours) -> None:
        """first: the buffers' row that is the plan's first."""
        self._decoder, self._kv = decoder, kv
        self._isolated = slice(first + near.isolated.start, first + near.isolated.stop)
        self._reused, self._recomputed, self._fresh, self._blocks, self._candidates = (
            self._on_device(rows) for rows in (near.reused, near.recomputed, near.fresh, near.blocks, near.candidates)
        )
        self._bias = torch.from_numpy(near.bias).to(decoder.device)
        self._cos, self._sin = decoder.angles(np.arange(self._isolated.start, self._isolated.stop))

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
        k_pre = decoder.unrotate(keys.float(), cos, sin)
        shift = WITHIN.keys * self._drift(k_pre, fresh.k_pre)
        shift = decoder.rotate(shift, cos[self._reused], sin[self._reused])
        keys.index_add_(0, self._reused, shift.to(keys.dtype))
        shift = WITHIN.values * self._drift(values.float(), fresh.v)
        values.index_add_(0, self._reused, shift.to(values.dtype))

    def _drift(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """`Neighbours.drift`, which is the specification; both tensors are [rows, kv_heads, dim]."""
        heads, stored, fresh = stored.shape[1:], stored.flatten(1), fresh.flatten(1)[self._fresh].float()
        alike = functional.normalize(stored - stored.mean(0), dim=1)
        theirs = alike[self._recomputed][self._candidates]
        weights = alike[self._reused][self._blocks] @ theirs.transpose(1, 2)
        weights = (drift.LIKENESS * weights + self._bias).softmax(-1)
        found = weights @ (fresh - stored[self._recomputed])[self._candidates]
        return found.flatten(0, 1)[: len(self._reused)].reshape(-1, *heads)

    def _on_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self._decoder.device)
