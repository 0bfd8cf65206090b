"""Time to the first token: full prefill, a cached prefix, and reuse with some tokens computed again.

Reuse comes from the device, page-locked memory, warm and cold files, in 16 bits (as CacheTune keeps KV) and packed;
beside each stands the published bound, T_full / max(compute(r), transfer(r)). The steps are the runtime's own:
placing, probing, choosing, computing, reading the question. Knows nothing of how they work.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from quire_engine import plan
from quire_engine.bench_gpu import library, model
from quire_engine.bench_gpu.clock import Bench, Times, timed
from quire_engine.bench_gpu.library import KINDS, PLACES, BenchRuntime, Library, Stored, Where
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt

Opened = Callable[[ExitStack], list[Placement]]
"""The passages of a prompt, opened until the stack is left."""

RATIOS = (0.16, 0.05, 0.3)
_SIZES = (8192, 4096, 16384, 32768)  # the goals are for the first
_QUICK_SIZES = (256,)


@dataclass(frozen=True)
class Reuse:
    """transfer_ms: what the bytes of the reused share take at the measured rate.  bound: the published one."""

    stored: Stored
    where: Where
    ratio: float
    times: Times
    speedup: float
    bytes: int
    transfer_ms: float
    bound: float


@dataclass
class Row:
    """What was measured at one length. errors: by what failed."""

    tokens: int
    full: Times | None = None
    prefix: Times | None = None
    reuse: list[Reuse] = field(default_factory=list)
    vram_peak_bytes: int = 0
    errors: dict[str, str] = field(default_factory=dict)


def measure_16_bit(bench: Bench) -> dict[str, object]:
    return _measure(bench, "bf16")


def measure_q4_k(bench: Bench) -> dict[str, object]:
    return _measure(bench, "q4_k")


def _measure(bench: Bench, weights: model.Weights) -> dict[str, object]:
    runtime = BenchRuntime(model.make(bench, weights))
    lengths = _QUICK_SIZES if bench.quick else _SIZES
    rows = []
    try:
        for number, tokens in enumerate(lengths):
            row = Row(tokens)
            rows.append(asdict(_Length(bench, runtime, row, bench.seconds_left / (len(lengths) - number)).run()))
    finally:
        runtime.close()
    return {"weights": weights, "question_tokens": 32, "lengths": sorted(rows, key=lambda row: int(row["tokens"]))}


class _Length:
    """All measurements at one length, in as many seconds."""

    def __init__(self, bench: Bench, runtime: BenchRuntime, row: Row, seconds: float) -> None:
        self._bench, self._runtime, self._row = bench, runtime, row
        self._ratios = RATIOS[:1] if bench.quick else RATIOS
        self._each = seconds / (2 + len(KINDS) * len(PLACES) * len(self._ratios)) / 2  # the other half is for files

    def run(self) -> Row:
        """Errors are written down, and the rest goes on."""
        if self._bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._guarded("full prefill", self._full)
        self._guarded("prefix only", self._prefix)
        for stored in KINDS:
            for where in PLACES:
                self._guarded(f"{stored}, {where}", lambda stored=stored, where=where: self._reuse(stored, where))  # type: ignore[misc]
        if self._bench.device.type == "cuda":
            self._row.vram_peak_bytes = torch.cuda.max_memory_allocated()
        return self._row

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        if not self._bench.seconds_left:
            self._row.errors[name] = "no time was left"
            return
        try:
            work()
        except Exception as error:
            self._row.errors[name] = f"{type(error).__name__}: {error}"[:500]
            self._runtime.rewind(0)
        finally:
            self._runtime.resident = ()
            if self._bench.device.type == "cuda":
                torch.cuda.empty_cache()

    def _library(self, stored: Stored) -> Library:
        return library.make(self._bench, stored, self._row.tokens)

    def _timed(self, work: Callable[[], object], prepare: Callable[[], object] | None = None) -> Times:
        return timed(work, self._bench, self._each, prepare)

    def _full(self) -> None:
        prompt = self._library("packed").prompt(self._bench, self._row.tokens)
        self._row.full = self._timed(lambda: full_prefill(self._runtime, prompt))
        print(f"  {self._row.tokens} tokens, full prefill: {self._row.full}", flush=True)

    def _prefix(self) -> None:
        """The first passage is reused, from page-locked memory."""
        first = self._library("packed")
        prompt = first.prompt(self._bench, self._row.tokens)
        with ExitStack() as held:
            placements = first.placements(prompt, held)[:1]
            self._runtime.resident = self._runtime.bytes_of(placements, on_device=False)
            self._row.prefix = self._timed(lambda: self._prefix_only(prompt, placements))
        print(f"  {self._row.tokens} tokens, prefix only: {self._row.prefix}", flush=True)

    def _prefix_only(self, prompt: Prompt, placements: list[Placement]) -> None:
        self._runtime.rewind(0)
        self._runtime.place(placements)
        self._runtime.adopt()
        self._runtime.extend(prompt.tokens[prompt.starts[2] :])

    def _reuse(self, stored: Stored, where: Where) -> None:
        passages = self._library(stored)
        prompt = passages.prompt(self._bench, self._row.tokens)
        prepare = (lambda: passages.store.drop_from_memory(passages.keys)) if where == "cold file" else None
        size = len(prompt.chunks) * passages.chunk_bytes
        opened: Opened = partial(passages.placements, prompt)
        with ExitStack() as kept:
            if where in ("device", "pinned"):
                placements = opened(kept)
                opened = partial(_as_they_are, placements)
                self._runtime.resident = self._runtime.bytes_of(placements, on_device=where == "device")
            for ratio in self._ratios:
                times = self._timed(lambda ratio=ratio: reuse(self._runtime, opened, prompt, ratio), prepare)  # type: ignore[misc]
                self._row.reuse.append(self._found(stored, where, ratio, times, size))

    def _found(self, stored: Stored, where: Where, ratio: float, times: Times, size: int) -> Reuse:
        full_ms = self._row.full.median_ms if self._row.full else 0.0
        rates = self._bench.rates
        rate = {"device": rates.copy, "pinned": rates.upload, "warm file": rates.warm, "cold file": rates.cold}[where]
        transfer = 1000 * (1 - ratio) * size / rate if rate else 0.0
        bound = full_ms / max(ratio * full_ms, transfer) if full_ms else 0.0
        found = Reuse(stored, where, ratio, times, full_ms / times.median_ms, size, transfer, bound)
        print(
            f"  {self._row.tokens} tokens, {stored}, {where}, r {ratio}: {times}, "
            f"{found.speedup:.2f}x of full prefill, published bound {bound:.2f}x",
            flush=True,
        )
        return found


def _as_they_are(placements: list[Placement], held: ExitStack) -> list[Placement]:
    """Opened before: nothing is read from files."""
    return placements


def full_prefill(runtime: BenchRuntime, prompt: Prompt) -> None:
    runtime.rewind(0)
    runtime.execute(plan.compute_all(prompt))
    runtime.extend(prompt.question.tokens)


def reuse(runtime: BenchRuntime, opened: Opened, prompt: Prompt, ratio: float) -> None:
    """From opening the passages to the first token's scores."""
    runtime.rewind(0)
    with ExitStack() as held:
        runtime.place(opened(held))
    scores = runtime.probe(prompt.question.tokens, prompt.context_tokens)
    runtime.execute(plan.stitch(prompt, library.chosen(scores, prompt, ratio)))
    runtime.extend(prompt.question.tokens)
