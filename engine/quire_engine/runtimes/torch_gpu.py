"""The PyTorch runtime: stitches stored KV into a prompt on a graphics device, token by token; on the CPU too.

One KV buffer per layer, in which row p is position p: the live sequence, and behind it the placed rows. With a window
what is old in the live sequence is packed while it answers, and unpacked layer by layer for what reads several tokens.

Executing a plan runs the chosen tokens alone up the layers: each layer shifts the reused keys by the drift that shows,
writes the chosen tokens' keys and values over the stored ones, and lets every one of them see all rows up to its own
position. Their last layer ends with keys and values, since nothing else of them is wanted. An abort is noticed before
the next layer.

Nothing here has run on a graphics device yet: docs/decisions/torch_runtime.md lists what that leaves untested. Knows
nothing of files, of which tokens are worth recomputing, or of text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quire_engine import gguf
from quire_engine.errors import Aborted
from quire_engine.generate import Candidates
from quire_engine.kv.drift import middle
from quire_engine.kv.transfer import DamagedPlacements, Placement
from quire_engine.kv.window import Window, usual_plan
from quire_engine.plan import StitchPlan
from quire_engine.runtimes import torch_device, weights
from quire_engine.runtimes.torch_decoder import KV, Decoder, Fresh
from quire_engine.runtimes.torch_drift import DriftCorrection
from quire_engine.runtimes.torch_feed import DevicePlacer, Feed, HostPlacer, Placer, Slots
from quire_engine.runtimes.torch_graph import Step, decoding
from quire_engine.runtimes.torch_window import PackedKV
from quire_engine.runtimes.transformer import Transformer
from quire_engine.selection import probe as attention
from quire_engine.types import Float16, Float32
from quire_kernels import device_probe
from quire_kernels.device_place import Angles

_CELL_STEP = 1024
_GUARDS = 4  # texts behind which passages are read: the preamble, and a few for measuring
_BATCH = {"cpu": 512, "cuda": 4096}  # tokens that go up the layers together in a prefill

Guarded = tuple[list[Tensor], list[Tensor]]


class TorchRuntime:
    """Executes plans with PyTorch. One conversation at a time, not thread-safe."""

    name = "torch"
    tile_tokens = 1

    def __init__(
        self, model: Transformer, threads: int = 0, like_gpu: bool | None = None, window: Window | None = None
    ) -> None:
        """threads: of the processor, for the whole process; 0 leaves them as they are.  like_gpu: places from packed
        bytes while computing and decodes by recordings, which only pays on a graphics device, where it is the default.
        window: what leaves it is packed; without one nothing is.
        """
        if threads:
            torch.set_num_threads(threads)
        self.model = model
        self.shape = model.shape
        self._decoder = Decoder(model, self._check)
        self._like_gpu = self._decoder.device.type == "cuda" if like_gpu is None else like_gpu
        self._slots = Slots(self._decoder.device)
        self._feed: Feed | None = None
        self._decodings: dict[int, Step] = {}  # by the rows that they look at
        self._window = window
        self._kv = self._live_buffers(_CELL_STEP)
        self._alone = self._buffers(_CELL_STEP)  # passages that are read by themselves
        self._guards: dict[tuple[int, ...], Guarded] = {}
        self._live = 0
        self._placed_stop = 0  # 0: nothing is placed
        self._should_stop: Callable[[], bool] | None = None

    @classmethod
    def load(cls, path: Path, device: str = "cpu", threads: int = 0, live_window: int = 0) -> "TorchRuntime":
        """With a file's weights. live_window: so many of the latest tokens are never packed; 0 packs none.

        Raises ModelError for a file or an architecture that cannot be read, and for weights that the device has no
        memory for.
        """
        where = torch.device(device)
        kind = torch_device.number_type(where)
        packed = torch_device.keeps_blocks(where)
        needed = weights.kept_bytes(gguf.read(path), kind.itemsize, packed)
        torch_device.check_weights(needed, torch_device.free_bytes(where))
        window = Window(live_window) if live_window else None
        return cls(Transformer.load(path, where, kind, packed), threads, window=window)

    @property
    def live_tokens(self) -> int:
        return self._live

    def reserve(self, tokens: int) -> None:
        if tokens <= self._kv.room:
            return
        packed = self._kv.packed_tokens
        tokens = packed + _whole_steps(tokens - packed)
        row = self.shape.values_per_token * self._decoder.dtype.itemsize
        free = torch_device.free_bytes(self._decoder.device)
        torch_device.check_rows(row, tokens - self._kv.lacking(tokens), tokens, free, _CELL_STEP)
        if self._feed is not None:
            self._ready(self.shape.layers - 1)
        self._decodings = {}
        self._kv.grow(tokens, max(self._live, self._placed_stop))

    def rewind(self, tokens: int) -> int:
        self._forget_placed()
        self._live = min(tokens, self._live)
        self._kv.rewind(self._live)
        return self._live

    def close(self) -> None:
        """Gives the buffers back."""
        self.rewind(0)
        self._kv, self._alone, self._guards, self._decodings = self._live_buffers(0), self._buffers(0), {}, {}

    @contextmanager
    def abortable(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        self._should_stop = should_stop
        try:
            yield
        finally:
            self._should_stop = None

    # Encoding

    @torch.no_grad()
    def encode(self, guard: Sequence[int], tokens: Sequence[int], layers: int | None = None) -> tuple[Float16, Float16]:
        self._stand_behind(tuple(guard), len(tokens))
        seen: list[Fresh] = []
        places = self._decoder.places(np.arange(len(guard), len(guard) + len(tokens)))
        self._decoder.read(tokens, places, self._alone, seen.append, layers, hidden=False)
        return _stored([fresh.k_pre for fresh in seen]), _stored([fresh.v for fresh in seen])

    def _stand_behind(self, guard: tuple[int, ...], room: int) -> None:
        """Makes the buffers for passages begin with the guard's KV, which is computed once for many chunks."""
        if len(guard) + room > self._alone.cells:
            self._alone.grow(_whole_steps(len(guard) + room), 0)
        rows = slice(0, len(guard))
        if guard in self._guards:
            self._alone.put(rows, self._guards[guard])
        elif guard:
            self._decoder.read(guard, self._decoder.places(np.arange(len(guard))), self._alone, hidden=False)
            if len(self._guards) == _GUARDS:
                self._guards = {}
            self._guards[guard] = self._alone.copy(rows)

    # One question

    @torch.no_grad()
    def place(self, placements: Sequence[Placement]) -> None:
        stop = max(placement.stop for placement in placements)
        self._forget_placed()
        self.reserve(stop)
        placer: Placer
        if self._like_gpu:
            placer = DevicePlacer(placements, self._angles, self._kv, self._slots)
        else:
            placer = HostPlacer(placements, self.shape.rope, self._kv)
        self._placed_stop = stop
        self._feed = Feed(placements, placer, self.shape.layers)
        self._ready(0 if self._like_gpu else self.shape.layers - 1)

    def _ready(self, layer: int) -> None:
        """Returns when a layer's placed rows may be used."""
        if self._feed is not None:
            try:
                self._feed.wait(layer)
            except DamagedPlacements:
                self._forget_placed()
                raise

    def _forget_placed(self) -> None:
        if self._feed is not None:
            self._feed.stop()
        self._feed, self._placed_stop = None, 0

    @property
    def _angles(self) -> Angles:
        """Of every row of the buffers."""
        return self._kv.row_angles

    @torch.no_grad()
    def probe(self, question: Sequence[int], position: int) -> Float32:
        assert self._placed_stop, "place() comes before probe()"
        layers = attention.probed_layers(self.shape.layers)
        self.reserve(position + len(question))
        packed = self._kv.packed_tokens
        placed = slice(self._live - packed, position - packed)
        rows = slice(placed.stop, placed.stop + len(question))
        under = None
        if position < self._placed_stop:  # nobody asks for that but tests
            self._ready(self.shape.layers - 1)
            under = self._kv.copy(rows)
        mass = torch.zeros(position - self._live, device=self._decoder.device)

        def look(fresh: Fresh) -> None:
            if fresh.layer in layers:
                mass.add_(device_probe.mass(fresh.q_rot, self._kv.k[fresh.layer][placed]))

        try:
            places = self._decoder.places(np.arange(position, position + len(question)), packed)
            self._decoder.read(question, places, self._kv, look, layers.stop, hidden=False, ready=self._ready)
        finally:
            if under is not None:
                self._kv.put(rows, under)
        return _numpy(mass / len(layers))

    def adopt(self) -> None:
        assert self._placed_stop, "place() comes before adopt()"
        self._ready(self.shape.layers - 1)
        self._live = self._placed_stop
        self._forget_placed()

    @torch.no_grad()
    def execute(self, plan: StitchPlan) -> None:
        prompt = plan.prompt
        if not self._placed_stop:  # nothing stored was wanted: full prefill
            self._append(prompt.tokens[self._live - prompt.position : prompt.context_tokens - prompt.position])
            return
        if plan.recomputed:
            positions = np.concatenate([np.arange(span.start, span.stop) for span in plan.recomputed])
            tokens = np.asarray(prompt.tokens)[positions - prompt.position]
            self._ready(middle(self.shape.layers))
            drift = DriftCorrection.of(plan, self._decoder, self._kv)
            correct = drift.correct if drift else None
            places = self._decoder.places(positions, self._kv.packed_tokens)
            self._decoder.read(tokens, places, self._kv, correct, hidden=False, ready=self._ready)
        self.adopt()

    @torch.no_grad()
    def extend(self, tokens: Sequence[int]) -> Float32:
        return _numpy(self._extended(tokens))

    @torch.no_grad()
    def likeliest(self, tokens: Sequence[int], count: int) -> Candidates:
        """`Candidates.of` the scores that `extend` gives, picked on the device."""
        scores = self._extended(tokens)
        if count == 1:
            best = scores.argmax(keepdim=True)
            return Candidates(best.cpu().numpy(), _numpy(scores[best]))
        falling, order = scores.sort(descending=True, stable=True)
        return Candidates(order[:count].cpu().numpy(), _numpy(falling[:count]))

    def _extended(self, tokens: Sequence[int]) -> Tensor:
        if (self._like_gpu or self._window) and len(tokens) == 1:
            return self._decoded(tokens[0])
        return self._decoder.scores(self._append(tokens, hidden=True)[-1])

    @torch.no_grad()
    def scores(self, tokens: Sequence[int]) -> Float32:
        return _numpy(self._decoder.scores(self._append(tokens, hidden=True)))

    def _decoded(self, token: int) -> Tensor:
        """Appends one token by a recording, after packing what has left the window; scores of the next."""
        self._check()
        self.reserve(self._live + 1)
        self._kv.pack(self._live)
        scores = self._decoding().read(token, self._live)
        self._live += 1
        return scores

    def _decoding(self) -> Step:
        """Over exact rows there is one for every so many of them."""
        kv = self._kv
        stop = 0 if isinstance(kv, PackedKV) else min(_whole_steps(self._live + 1), kv.cells)
        if stop not in self._decodings:
            self._decodings[stop] = decoding(self.model, kv, stop)
        return self._decodings[stop]

    def _append(self, tokens: Sequence[int], hidden: bool = False) -> Tensor:
        """Appends tokens to the live sequence; the last ones' output of the top layer, if it is wanted."""
        self.reserve(self._live + len(tokens))
        size = _BATCH.get(self._decoder.device.type, _BATCH["cpu"])
        x = torch.empty(0)
        for start in range(0, len(tokens), size):
            some = tokens[start : start + size]
            places = self._decoder.places(np.arange(self._live, self._live + len(some)), self._kv.packed_tokens)
            x = self._decoder.read(some, places, self._kv, hidden=hidden)
            self._live += len(some)
        return x

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> tuple[Float16, Float16]:
        angles = self._decoder.angles(np.arange(start, stop))
        layers = [self._kv.rows(layer, stop) for layer in range(self.shape.layers)]
        k_pre = [self._decoder.unrotate(k[start:], *angles) for k, _ in layers]
        return _stored(k_pre), _stored([v[start:] for _, v in layers])

    def _buffers(self, cells: int) -> KV:
        return KV(self.shape, cells, self._decoder.device, self._decoder.dtype)

    def _live_buffers(self, cells: int) -> KV:
        if self._window is None:
            return self._buffers(cells)
        device, dtype = self._decoder.device, self._decoder.dtype
        return PackedKV(self.shape, cells, device, dtype, usual_plan(self.shape.layers), self._window)

    def _check(self) -> None:
        if self._should_stop is not None and self._should_stop():
            raise Aborted


def _stored(layers: Sequence[Tensor]) -> Float16:
    """As every runtime hands out KV: float16 [layers, tokens, kv_heads, dim] in main memory."""
    return np.stack([layer.half().cpu().numpy() for layer in layers])


def _numpy(numbers: Tensor) -> Float32:
    found: Float32 = numbers.float().cpu().numpy()
    return found


def _whole_steps(tokens: int) -> int:
    return -(-tokens // _CELL_STEP) * _CELL_STEP
