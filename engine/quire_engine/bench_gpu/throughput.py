"""Several questions at once over the same cached passages, each in an order of its own: questions a second.

Reuse is batched: a layer's bytes are sent to the device once for all questions and placed for each, the tokens that are
computed again go through the weights together, and each question attends to its own rows. Full prefill and prefix
reuse run one question after the other, since thousands of tokens fill a device by themselves. This is a measurement
only: the application answers one question at a time. Knows nothing of decoding.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from quire_engine import plan
from quire_engine.bench_gpu import library, model, stitching
from quire_engine.bench_gpu.clock import Bench, Times, timed
from quire_engine.bench_gpu.library import BenchRuntime, Library, ResidentPlacer
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt
from quire_engine.runtimes.torch_decoder import KV, Decoder, Fresh, Places, attend
from quire_engine.runtimes.torch_drift import DriftCorrection
from quire_engine.runtimes.torch_feed import Feed, Slots
from quire_engine.runtimes.transformer import Transformer
from quire_engine.selection import probe
from quire_engine.types import Float32
from quire_kernels import device_probe
from quire_kernels.device_place import Angles

RATIO = 0.16
_BATCHES = (4, 8, 16)
_ROOM = 64  # rows for a question


@dataclass(frozen=True)
class Served:
    """speedup: over full prefill of the same questions."""

    way: str
    questions: int
    times: Times
    questions_per_second: float
    speedup: float


OnLayer = Callable[[int, Fresh], None]


@torch.no_grad()
def measure(bench: Bench) -> dict[str, object]:
    tokens = bench.pick(4096, 256)
    passages = library.make(bench, "packed", tokens)
    weights = model.fitting(bench)
    transformer = model.make(bench, weights)
    found, failed = list[dict[str, object]](), dict[str, str]()
    batches = (2,) if bench.quick else _BATCHES
    for number, count in enumerate(batches):
        seconds = bench.seconds_left / (len(batches) - number) / 5
        prompts = [passages.prompt(bench, tokens, seed) for seed in range(count)]
        full_ms = 0.0
        for way, make in (
            ("full prefill", _full),
            ("prefix only", _prefix),
            ("reuse, one by one", _single),
            ("reuse, batched", _together),
        ):
            name = f"{way}, {count} questions"
            if not bench.seconds_left:
                failed[name] = "no time was left"
                continue
            try:
                with ExitStack() as held:
                    times = timed(make(bench, transformer, passages, prompts, held), bench, seconds, most_runs=5)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            full_ms = full_ms or (times.median_ms if way == "full prefill" else 0.0)
            row = Served(way, count, times, 1000 * count / times.median_ms, full_ms / times.median_ms)
            found.append(asdict(row))
            print(f"  {name}: {times}, {row.questions_per_second:.2f} a second, {row.speedup:.2f}x", flush=True)
    return {
        "context_tokens": tokens, "ratio": RATIO, "weights": weights, "stored": "packed", "where": "pinned",
        "served": found, "errors": failed,
    }  # fmt: skip


def _full(
    bench: Bench, transformer: Transformer, passages: Library, prompts: Sequence[Prompt], held: ExitStack
) -> Callable[[], object]:
    runtime = BenchRuntime(transformer)
    held.callback(runtime.close)

    def run() -> None:
        for prompt in prompts:
            stitching.full_prefill(runtime, prompt)

    return run


def _prefix(
    bench: Bench, transformer: Transformer, passages: Library, prompts: Sequence[Prompt], held: ExitStack
) -> Callable[[], object]:
    """The first passage's rows are live already, and only the others are computed: no cost for the prefix at all."""
    runtime = BenchRuntime(transformer)
    held.callback(runtime.close)
    runtime.extend(prompts[0].tokens[: prompts[0].starts[2]])

    def run() -> None:
        for prompt in prompts:
            runtime.rewind(prompt.starts[2])
            runtime.extend(prompt.tokens[prompt.starts[2] :])

    return run


def _single(
    bench: Bench, transformer: Transformer, passages: Library, prompts: Sequence[Prompt], held: ExitStack
) -> Callable[[], object]:
    runtime = BenchRuntime(transformer)
    held.callback(runtime.close)
    opened = [passages.placements(prompt, held) for prompt in prompts]
    # The bytes are the same in every order, since all passages hold the same numbers.
    runtime.resident = runtime.bytes_of(opened[0], on_device=False)

    def run() -> None:
        for prompt, placements in zip(prompts, opened, strict=True):
            stitching.reuse(runtime, lambda held, placements=placements: placements, prompt, RATIO)  # type: ignore[misc]

    return run


def _together(
    bench: Bench, transformer: Transformer, passages: Library, prompts: Sequence[Prompt], held: ExitStack
) -> Callable[[], object]:
    runtime = BenchRuntime(transformer)
    placements = passages.placements(prompts[0], held)
    layers = runtime.bytes_of(placements, on_device=False)
    runtime.close()
    return Batch(transformer, prompts, placements, layers).answer


class Batch:
    """Several prompts over the same passages, up to the scores of each one's first token."""

    def __init__(
        self,
        transformer: Transformer,
        prompts: Sequence[Prompt],
        placements: Sequence[Placement],
        layers: Sequence[Tensor],
    ) -> None:
        """placements, layers: the first prompt's passages, and their bytes."""
        self._decoder = Decoder(transformer, check=lambda: None)
        self._placements, self._prompts, self._bytes = placements, prompts, layers
        self._context = prompts[0].context_tokens
        cells = self._context + _ROOM
        self._kvs = [KV(transformer.shape, cells, self._decoder.device, self._decoder.dtype) for _ in prompts]
        cos, sin = self._decoder.angles(np.arange(cells))
        self._angles = Angles(cos[:, 0].contiguous(), sin[:, 0].contiguous(), transformer.shape.rope.layout)
        self._slots = Slots(self._decoder.device)

    @torch.no_grad()
    def answer(self) -> Tensor:
        """Scores of each question's first token, [questions, vocabulary]."""
        others, placements = self._others(), self._placements
        placer = ResidentPlacer(placements, self._angles, self._kvs[0], self._slots, self._bytes, others)
        feed = Feed(placements, placer, self._decoder.shape.layers)
        try:
            plans = [
                plan.stitch(prompt, library.chosen(scores, prompt, RATIO))
                for prompt, scores in zip(self._prompts, self._probed(feed), strict=True)
            ]
            self._recompute(plans, feed)
            scores = self._read_questions(feed.wait, hidden=True)
        finally:
            feed.stop()
        return scores.cpu()

    def _others(self) -> list[tuple[KV, Tensor]]:
        """Where the other prompts want the rows of the first one's passages."""
        others = []
        for kv, prompt in zip(self._kvs[1:], self._prompts[1:], strict=True):
            starts = {segment.key: start for segment, start in prompt.places}
            rows = [starts[chunk.key] + np.arange(len(chunk)) for chunk in self._prompts[0].chunks]
            others.append((kv, torch.from_numpy(np.concatenate(rows).astype(np.int32)).to(self._decoder.device)))
        return others

    def _probed(self, feed: Feed) -> list[Float32]:
        layers = probe.probed_layers(self._decoder.shape.layers)
        mass = [torch.zeros(self._context, device=self._decoder.device) for _ in self._prompts]

        def look(number: int, fresh: Fresh) -> None:
            if fresh.layer in layers:
                keys = self._kvs[number].k[fresh.layer][: self._context]
                mass[number] += device_probe.mass(fresh.q_rot, keys)

        self._read_questions(feed.wait, look, layers.stop)
        return [one.cpu().numpy() for one in mass]

    def _read_questions(
        self,
        ready: Callable[[int], None],
        on_layer: OnLayer | None = None,
        layers: int | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """With hidden, the scores behind each question's last token."""
        positions = [np.arange(p.context_tokens, p.context_tokens + len(p.question)) for p in self._prompts]
        tokens = [np.asarray(prompt.question.tokens) for prompt in self._prompts]
        x = self._read(tokens, positions, ready, on_layer, layers, hidden)
        last = np.cumsum([len(one) for one in tokens]) - 1
        return self._decoder.scores(x[torch.from_numpy(last).to(x.device)]) if hidden else x

    def _recompute(self, plans: Sequence[plan.StitchPlan], feed: Feed) -> None:
        positions = [np.concatenate([np.arange(s.start, s.stop) for s in one.recomputed]) for one in plans]
        tokens = [np.asarray(one.prompt.tokens)[at] for one, at in zip(plans, positions, strict=True)]
        feed.wait(self._decoder.shape.layers - 1)  # they came while the questions were read
        drifts = [DriftCorrection.of(one, self._decoder, kv) for one, kv in zip(plans, self._kvs, strict=True)]

        def correct(number: int, fresh: Fresh) -> None:
            drift = drifts[number]
            if drift is not None:
                drift.correct(fresh)

        self._read(tokens, positions, feed.wait, correct)

    def _read(
        self,
        tokens: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        ready: Callable[[int], None],
        on_layer: OnLayer | None = None,
        layers: int | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """`Decoder.read` for several sequences at once, one after another in all that they share."""
        decoder, transformer = self._decoder, self._decoder.model
        of_all = [decoder.places(at) for at in positions]
        lengths = [len(at) for at in positions]
        cos, sin = torch.cat([p.cos for p in of_all]), torch.cat([p.sin for p in of_all])
        x = transformer.embedding[torch.from_numpy(np.concatenate(tokens)).to(decoder.device)]
        last = (layers or decoder.shape.layers) - 1
        for index in range(last + 1):
            layer = transformer.layers[index]
            q, k_pre, v = layer.projections(x, decoder.shape)
            q_rot, k_rot = (decoder.rotate(heads, cos, sin) for heads in (q, k_pre))
            ready(index)
            parts = zip(*(torch.split(tensor, lengths) for tensor in (q_rot, k_pre, k_rot, v)), strict=True)
            attended = []
            for number, (part, places) in enumerate(zip(parts, of_all, strict=True)):
                fresh = Fresh(index, places, *part)
                if on_layer is not None:
                    on_layer(number, fresh)
                attended.append(self._attended(fresh, self._kvs[number], hidden or index < last))
            if hidden or index < last:
                x = x + layer.attn_output(torch.cat(attended).flatten(-2))
                x = x + layer.feed_forward(x)
        return x

    @staticmethod
    def _attended(fresh: Fresh, kv: KV, wanted: bool) -> Tensor:
        k, v, places = kv.k[fresh.layer], kv.v[fresh.layer], fresh.places
        _write(fresh.k_rot, k, places)
        _write(fresh.v, v, places)
        return attend(fresh.q_rot, k, v, places) if wanted else fresh.v


def _write(x: Tensor, out: Tensor, places: Places) -> None:
    if isinstance(places.rows, slice):
        out[places.rows] = x
    else:
        out.index_copy_(0, places.rows, x)
