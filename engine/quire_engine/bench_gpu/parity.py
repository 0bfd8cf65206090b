"""Is the whole of it right on this device? A tiny model's scores against the same model's on the processor.

Both execute the same plans over the same files; on the device with streams, page-locked memory, its own kernels and
recorded graphs. Knows nothing of time.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from quire_engine import plan
from quire_engine.bench_gpu import library, model
from quire_engine.bench_gpu.clock import Bench
from quire_engine.bench_gpu.library import BenchRuntime, Library
from quire_engine.plan import Mask, Prompt
from quire_engine.runtimes.torch_decoder import KV, Decoder
from quire_engine.runtimes.torch_gpu import TorchRuntime
from quire_engine.runtimes.torch_graph import Decoding
from quire_engine.runtimes.transformer import Transformer
from quire_engine.types import Float32
from quire_kernels.device_place import Angles

_TOKENS = 256
_ALLOWED = 0.06  # bfloat16 takes .025; a quarter of one layer's values missing makes .08
_SHARE = 0.16
_SHARPER, _LOUDER = 4, 3


@dataclass(frozen=True)
class Parity:
    """error: the largest difference of two scores, relative to the largest score."""

    what: str
    error: float
    allowed: float
    right: bool


@dataclass(frozen=True)
class _Pair:
    ours: BenchRuntime
    theirs: TorchRuntime
    passages: Library
    prompt: Prompt

    def full(self) -> float:
        scores = []
        for runtime in (self.ours, self.theirs):
            runtime.rewind(0)
            runtime.execute(plan.compute_all(self.prompt))
            scores.append(runtime.extend(self.prompt.question.tokens))
        return _error(*scores)

    def stitched(self, masks: list[Mask], resident: bool = False) -> float:
        if resident:
            with ExitStack() as held:
                placements = self.passages.placements(self.prompt, held)
                self.ours.resident = self.ours.bytes_of(placements, on_device=False)
        ours = self._scores(self.ours, masks)
        self.ours.resident = ()
        return _error(ours, self._scores(self.theirs, masks))

    def everything_again(self) -> float:
        """Stored passages with every token computed again are full prefill."""
        again = self._scores(self.ours, [np.ones(len(chunk), dtype=bool) for chunk in self.prompt.chunks])
        self.ours.rewind(0)
        self.ours.execute(plan.compute_all(self.prompt))
        return _error(again, self.ours.extend(self.prompt.question.tokens))

    def probed(self) -> float:
        found = []
        for runtime in (self.ours, self.theirs):
            self._place(runtime)
            found.append(runtime.probe(self.prompt.question.tokens, self.prompt.context_tokens))
        return _error(*found)

    @torch.no_grad()
    def recorded(self) -> float:
        """One token by a recorded graph, against the same runtime's ordinary step."""
        transformer, device = self.ours.model, self.ours.model.embedding.device
        kv = KV(transformer.shape, 64, device, transformer.embedding.dtype)
        cos, sin = (x[:, 0].contiguous() for x in _angles(self.ours, 64))
        decoding = Decoding(transformer, kv, Angles(cos, sin, transformer.shape.rope.layout), 64)
        self.ours.rewind(0)
        for position, token in enumerate(self.prompt.tokens[:9]):
            ours, plain = decoding.read(token, position), self.ours.scores([token])[-1]
        return _error(ours.float().cpu().numpy(), plain)

    def _scores(self, runtime: TorchRuntime, masks: list[Mask]) -> Float32:
        self._place(runtime)
        runtime.execute(plan.stitch(self.prompt, masks))
        return runtime.extend(self.prompt.question.tokens)

    def _place(self, runtime: TorchRuntime) -> None:
        runtime.rewind(0)
        with ExitStack() as held:
            runtime.place(self.passages.placements(self.prompt, held))


def measure(bench: Bench) -> dict[str, object]:
    tiny = replace(bench, quick=True, folder=bench.folder / "tiny")
    transformer = attentive(model.make(tiny, "bf16"))
    processor = TorchRuntime(model.copied(transformer, torch.device("cpu"), torch.float32))
    found, failed = list[dict[str, object]](), dict[str, str]()
    with closing(BenchRuntime(transformer)) as device, closing(processor):
        for name, check in _checks(tiny, device, processor):
            try:
                error = check()
                found.append(asdict(Parity(name, error, _ALLOWED, error <= _ALLOWED)))
            except Exception as error:  # the next one may be right
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                device.resident = ()
    right = sum(bool(row["right"]) for row in found)
    print(f"  {right} of {len(found) + len(failed)} right", flush=True)
    return {"right": right, "of": len(found) + len(failed), "checks": found, "errors": failed}


@torch.no_grad()
def attentive(transformer: Transformer) -> Transformer:
    """The same, changed so that a score depends on what single rows hold: random weights look at all rows alike."""
    for layer in transformer.layers:
        layer.attn_q.numbers.mul_(_SHARPER)
        layer.attn_output.numbers.mul_(_LOUDER)
    return transformer


def _blocks(bench: Bench) -> float:
    """A model whose weights stay Q4_K blocks, many tokens and then one, against their numbers on the processor."""
    transformer = model.make(bench, "q4_k")
    tokens = np.random.default_rng(2).integers(0, model.sizes(bench).vocabulary, _TOKENS).tolist()
    with closing(BenchRuntime(transformer)) as ours:
        theirs = TorchRuntime(model.copied(transformer, torch.device("cpu"), torch.float32))
        return max(_error(ours.extend(some), theirs.extend(some)) for some in (tokens, [5], [6]))


def _checks(bench: Bench, ours: BenchRuntime, theirs: TorchRuntime) -> list[tuple[str, Callable[[], float]]]:
    checks = list[tuple[str, Callable[[], float]]]()
    for kind in library.KINDS:
        passages = library.make(bench, kind, _TOKENS)
        pair = _Pair(ours, theirs, passages, passages.prompt(bench, _TOKENS))
        scattered = [np.random.default_rng(1).random(len(chunk)) < _SHARE for chunk in pair.prompt.chunks]
        checks += [
            (f"reuse, {kind}, from files", lambda pair=pair, masks=scattered: pair.stitched(masks)),  # type: ignore[misc]
            (f"reuse, {kind}, pinned", lambda pair=pair, masks=scattered: pair.stitched(masks, resident=True)),  # type: ignore[misc]
            (f"everything computed again, {kind}", pair.everything_again),
            (f"probe, {kind}", pair.probed),
        ]
    recorded = ("a recorded step", pair.recorded)
    return [("full prefill", pair.full), *checks, recorded, ("weights in blocks", lambda: _blocks(bench))]


def _angles(runtime: TorchRuntime, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return Decoder(runtime.model, check=lambda: None).angles(np.arange(tokens))


def _error(ours: Float32, theirs: Float32) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
