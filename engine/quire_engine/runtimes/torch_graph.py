"""Decoding one token at a time without launching its kernels one by one: recorded once, replayed for every token.

Token and position lie in tensors that a recording reads anew; how many rows are looked at is fixed, those behind the
position are masked. On devices without graphs the same steps run as they are. Knows nothing of plans or of sampling.
"""

import torch
from torch import Tensor

from quire_engine.runtimes.torch_decoder import KV, Decoder, Places, Tile
from quire_engine.runtimes.transformer import Transformer
from quire_kernels.device_place import Angles

_WARM_UPS = 2  # before a recording, so that libraries have allocated what they keep


class Decoding:
    """Of tokens that see at most `stop` rows of these buffers, as long as the buffers stay where they are."""

    def __init__(self, model: Transformer, kv: KV, angles: Angles, stop: int) -> None:
        self._decoder = Decoder(model, check=lambda: None)  # a recording cannot be left half way
        self._kv, self._angles, self._stop = kv, angles, stop
        device = self._decoder.device
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(stop, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scores = torch.empty(0)

    def read(self, token: int, position: int) -> Tensor:
        """The token's rows into the buffers; scores of the next one [vocabulary], good until the next call."""
        self._token.fill_(token)
        self._row.fill_(position)
        if self._decoder.device.type != "cuda":
            return self._step()
        if self._graph is None:
            self._record()
        assert self._graph is not None
        self._graph.replay()
        return self._scores

    def _record(self) -> None:
        """Runs the step some times first, which writes the same rows again and again."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scores = self._step()

    def _step(self) -> Tensor:
        cos, sin = self._angles.cos[self._row][:, None], self._angles.sin[self._row][:, None]
        visible = self._rows <= self._row[:, None]
        places = Places(self._row, cos, sin, (Tile(slice(0, 1), self._stop, visible),))
        return self._decoder.scores(self._decoder.read(self._token, places, self._kv)[-1])
