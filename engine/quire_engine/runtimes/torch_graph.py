"""Decoding one token at a time without launching its kernels one by one: recorded once, replayed for every token.

Token and position lie in tensors that a recording reads anew. Over exact rows it is fixed how many are looked at, and
those behind the position are masked; over a packed window how many there are lies on the device too. On devices without
graphs the same steps run as they are. Knows nothing of plans or of sampling.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quire_engine.runtimes.torch_decoder import KV, Decoder, Fresh, Places, Tile
from quire_engine.runtimes.torch_window import PackedKV
from quire_engine.runtimes.transformer import Transformer
from quire_kernels import device_decode, dispatch
from quire_kernels.device_place import Angles

_WARM_UPS = 2  # before a recording, so that libraries have allocated what they keep


class Step(Protocol):
    def read(self, token: int, position: int) -> Tensor:
        """The token's rows into the buffers; scores of the next one [vocabulary], good until the next call."""


def decoding(model: Transformer, kv: KV, stop: int) -> Step:
    """stop: how many rows are looked at, where none are packed."""
    return WindowDecoding(model, kv) if isinstance(kv, PackedKV) else Decoding(model, kv, kv.angles, stop)


class Recorded:
    """A step that is recorded as a CUDA graph when it is first called; every call replays it."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scores = torch.empty(0)

    def __call__(self) -> Tensor:
        if self._graph is None:
            self._graph = self._recorded()
        self._graph.replay()
        return self._scores

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """Runs the step some times first, which writes the same rows again and again."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._scores = self._step()
        return graph


class Decoding:
    """Of tokens that see at most `stop` rows of these buffers, as long as the buffers stay where they are."""

    def __init__(self, model: Transformer, kv: KV, angles: Angles, stop: int) -> None:
        self._decoder = Decoder(model, check=lambda: None)  # a recording cannot be left half way
        self._kv, self._angles, self._stop = kv, angles, stop
        device = self._decoder.device
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(stop, device=device)
        self._run = Recorded(self._step) if device.type == "cuda" else self._step

    def read(self, token: int, position: int) -> Tensor:
        self._token.fill_(token)
        self._row.fill_(position)
        return self._run()

    def _step(self) -> Tensor:
        cos, sin = self._angles.cos[self._row][:, None], self._angles.sin[self._row][:, None]
        visible = self._rows <= self._row[:, None]
        places = Places(self._row, cos, sin, (Tile(slice(0, 1), self._stop, visible),), self._stop)
        return self._decoder.scores(self._decoder.read(self._token, places, self._kv)[-1])


class WindowDecoding:
    """Of tokens behind a window whose older rows are packed, as long as buffers and groups stay where they are."""

    def __init__(self, model: Transformer, kv: PackedKV) -> None:
        self._decoder = Decoder(model, check=lambda: None)
        self._kv, self._angles = kv, kv.angles
        self._live = [kv.live(layer) for layer in range(model.shape.layers)]
        device = self._decoder.device
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._run = Recorded(self._step) if self._has_kernel else self._step

    @property
    def _has_kernel(self) -> bool:
        """PyTorch's form of the attention asks the device how much is packed, which cannot be recorded."""
        shape, device = self._decoder.shape, self._decoder.device
        q = torch.empty(1, shape.heads, shape.key_dim, device=device)
        of_graphics = device.type == "cuda" and dispatch.choose(device) == "triton"
        return of_graphics and device_decode.fits_kernel(q, self._live[0])

    def read(self, token: int, position: int) -> Tensor:
        row = position - self._kv.packed_tokens
        self._token.fill_(token)
        self._position.fill_(position)
        self._row.fill_(row)
        self._kv.filled[0] = self._kv.packed_tokens // device_decode.GROUP
        self._kv.filled[1] = row + 1
        return self._run()

    def _step(self) -> Tensor:
        cos, sin = self._angles.cos[self._position][:, None], self._angles.sin[self._position][:, None]
        places = Places(self._row, cos, sin, (), stop=0)
        return self._decoder.scores(self._decoder.read(self._token, places, self._kv, gather=self._gather)[-1])

    def _gather(self, fresh: Fresh) -> Tensor:
        return device_decode.attend(fresh.q_rot, self._live[fresh.layer])
