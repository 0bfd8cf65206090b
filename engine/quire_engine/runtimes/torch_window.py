"""KV buffers of a live sequence whose older part is packed: `kv.window` in a device's memory.

First the plan's sinks, exact for ever; then groups of 64 tokens, each packed once when it has left the window; then the
rows that are exact still, which lie right behind the sinks' in the buffers. One token more is decoded over the packed
bytes as they are (`torch_graph`, `quire_kernels.device_decode`); reading several unpacks one layer at a time. Knows
nothing of plans of spans, or of when to pack.
"""

import numpy as np
import torch
from torch import Tensor

from quire_engine.kv.window import GROUP, Window
from quire_engine.runtimes.torch_decoder import KV, angles_of
from quire_engine.runtimes.transformer import turned
from quire_engine.types import BitPlan, ModelShape
from quire_kernels import device_decode
from quire_kernels.device_decode import LiveRows, PackedGroups
from quire_kernels.device_place import Angles

_AT_ONCE = 64  # groups whose numbers are unpacked to float32 while they are packed


class PackedKV(KV):
    """Row r is position r while nothing is packed; later the rows behind the sinks' are `packed_tokens` further on."""

    def __init__(
        self, shape: ModelShape, cells: int, device: torch.device, dtype: torch.dtype, plan: BitPlan, window: Window
    ) -> None:
        """plan: on the mid-rise grid, 1 to 8 bits, all channels alike. Raises ValueError for others."""
        if plan.grid != "midrise" or plan.k_widths or not all(1 <= bits <= 8 for bits in (*plan.k_bits, *plan.v_bits)):
            raise ValueError("a live window is packed on the mid-rise grid, with 1 to 8 bits, all channels alike")
        super().__init__(shape, cells, device, dtype)
        self.filled = torch.zeros(2, dtype=torch.int32, device=device)
        self._plan, self._window = plan, window
        self._reserved = 0
        self._groups = 0
        self._packed: list[PackedGroups] = []
        self._make_groups(cells)

    @property
    def packed_tokens(self) -> int:
        return GROUP * self._groups

    @property
    def room(self) -> int:
        return min(self.cells + self.packed_tokens, self._reserved)

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + self._bytes(self._capacity)

    @property
    def packed_bytes(self) -> int:
        """Of the groups that are packed: what decoding a token reads of them."""
        return self._bytes(self._groups)

    @property
    def row_angles(self) -> Angles:
        rows = slice(self.packed_tokens, self.packed_tokens + self.cells)
        return Angles(self.angles.cos[rows], self.angles.sin[rows], self.angles.layout)

    def lacking(self, tokens: int) -> int:
        exact = max(0, tokens - self.packed_tokens - self.cells)
        groups = max(0, self._due(tokens) - self._capacity)
        packed = sum(bits * self._shape.kv_heads * self._shape.key_dim for bits in self._plan.k_bits)
        packed += sum(bits * self._shape.kv_heads * self._shape.value_dim for bits in self._plan.v_bits)
        row_bits = 8 * self._shape.values_per_token * self.k[0].itemsize
        return exact + -(-groups * GROUP * packed // row_bits)

    def grow(self, tokens: int, used: int) -> None:
        if tokens - self.packed_tokens > self.cells:
            super().grow(tokens - self.packed_tokens, used - self.packed_tokens)
        self._make_groups(tokens)

    def rows(self, layer: int, stop: int) -> tuple[Tensor, Tensor]:
        if not self._groups:
            return super().rows(layer, stop)
        sinks = self._plan.sinks
        exact = slice(sinks, max(sinks, stop - self.packed_tokens))
        old = device_decode.unpacked(self.live(layer), self._groups)
        parts = zip((self.k[layer], self.v[layer]), old, strict=True)
        k, v = (torch.cat([rows[:sinks], packed.to(rows.dtype), rows[exact]])[:stop] for rows, packed in parts)
        return k, v

    def live(self, layer: int) -> LiveRows:
        """As decode attention takes them; `filled` says how many there are, and is kept by whoever decodes."""
        return LiveRows(self._packed[layer], self.k[layer], self.v[layer], self.filled, self.angles, self._plan.sinks)

    def pack(self, tokens: int) -> None:
        due = self._due(tokens) - self._groups
        if due <= 0:
            return
        for layer in range(len(self.k)):
            for start in range(0, due, _AT_ONCE):
                self._pack(layer, start, min(_AT_ONCE, due - start))
            gone, rest = self._plan.sinks + due * GROUP, tokens - self.packed_tokens
            for rows in (self.k[layer], self.v[layer]):
                rows[self._plan.sinks : rest - due * GROUP] = rows[gone:rest].clone()
        self._groups += due

    def rewind(self, tokens: int) -> None:
        sinks = self._plan.sinks
        if tokens >= sinks + self.packed_tokens:
            return
        groups, rest = divmod(max(0, tokens - sinks), GROUP)
        for layer in range(len(self.k)) if rest else ():
            for rows, of_all in zip((self.k[layer], self.v[layer]), self.rows(layer, tokens), strict=True):
                rows[sinks : sinks + rest] = of_all[tokens - rest :]
        self._groups = groups

    def _due(self, tokens: int) -> int:
        """Groups that are packed when there are so many tokens."""
        return self._window.groups(tokens - self._plan.sinks)

    @property
    def _capacity(self) -> int:
        return len(self._packed[0].k_step) if self._packed else 0

    def _bytes(self, groups: int) -> int:
        return sum(int(tensor[:groups].nbytes) for layer in self._packed for tensor in vars(layer).values())

    def _make_groups(self, tokens: int) -> None:
        """Room for the groups of so many tokens, those that are packed kept; and angles, whatever will be packed."""
        self._reserved = max(self._reserved, tokens)
        if len(self.angles.cos) < self._reserved + self.cells:
            self.angles = angles_of(np.arange(self._reserved + self.cells), self._shape.rope, self.filled.device)
        capacity = max(1, self._due(tokens))
        if capacity <= self._capacity:
            return
        of_k, of_v = self._shape.kv_heads * self._shape.key_dim, self._shape.kv_heads * self._shape.value_dim
        before, self._packed = self._packed, []
        for layer, bits in enumerate(zip(self._plan.k_bits, self._plan.v_bits, strict=True)):
            by_channel = layer in self._plan.v_by_channel
            groups = PackedGroups.empty(capacity, of_k, of_v, *bits, self.filled.device, by_channel)
            for new, old in zip(vars(groups).values(), vars(before[layer]).values() if before else (), strict=False):
                new[: self._groups] = old[: self._groups]
            self._packed.append(groups)

    def _pack(self, layer: int, start: int, count: int) -> None:
        """`count` groups of a layer, `start` groups behind those that are packed."""
        first = self._plan.sinks + start * GROUP
        rows = slice(first, first + count * GROUP)
        at = slice(rows.start + self.packed_tokens, rows.stop + self.packed_tokens)
        cos, sin = self.angles.cos[at][:, None], self.angles.sin[at][:, None]
        k_pre = turned(self.k[layer][rows].float(), cos, -sin, self._shape.rope)
        self._packed[layer].fill(self._groups + start, k_pre.flatten(1), self.v[layer][rows].float().flatten(1))
