"""Prompts of made-up tokens, their passages as stored KV, and engines without a self-check, for tests of stitching."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from quire_engine import gguf, plan, selfcheck
from quire_engine.costs import Costs, Rate
from quire_engine.engine import Engine, EngineSettings
from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.kv.memory import MemorySource
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Mask, Prompt, Segment
from quire_engine.prompt import Wording
from quire_engine.runtimes.base import Runtime
from quire_engine.runtimes.llama_context import LlamaModel
from quire_engine.runtimes.llama_cpp import LlamaCppRuntime
from quire_engine.selfcheck import Verdict
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32

KINDS = ["llama", "qwen2", "qwen3", "factors", "head8", "half", "linear"]  # of tiny models that are stitched
# Keys are rounded to float16 once more when they are stored before RoPE, and llama.cpp's attention on a CPU adds up
# in float16, in the order of its cells: the same tokens in other cells differ by .01. Scores spread by about 3.
ROUNDING = 0.03

SETTINGS = EngineSettings(Wording("Answer."), threads=1)
PASSAGES = (
    "The lighthouse at Cape Gull was built in 1871 by two brothers who had never seen the sea before.",
    "Every autumn the cranes fly over the valley; the farmers count them and write the number on a door.",
    "The old press stands in the cellar. It printed the first newspaper of the island, once a week.",
)

_COSTS = Costs(Rate(6.0, 0.5), Rate(7.0, 2.0), Rate(7.0, 2.0), 0.4, 0.02, {"memory": 0.05, "disk": 0.1}, 64)
_PASSED = Verdict("", noise_kl=0.004, exact_rows_kl=0.004, recomputed_kl=0.004, rope_error=0.001, costs=_COSTS)

LoadLlama = Callable[[str], LlamaCppRuntime]


def llama_of(path: Path) -> LlamaCppRuntime:
    """Close it."""
    return LlamaCppRuntime(LlamaModel(path), gguf.shape(gguf.read(path)), threads=1)


def tried_out(engine: Engine) -> Engine:
    """As if its model had passed the self-check before, which takes a real one a quarter of a minute, on a machine that
    reads a token in 6 ms. Also every engine that is opened later with the same cache."""
    selfcheck.save(_PASSED, engine._verdict_file)
    return engine


class Reader(Protocol):
    """Reads tokens into KV: a runtime, or the reference decoder."""

    def encode(self, guard: Sequence[int], tokens: Sequence[int]) -> tuple[Float16, Float16]: ...


def some_tokens(count: int, seed: int) -> tuple[int, ...]:
    """Ordinary tokens of the tiny vocabulary."""
    return tuple(np.random.default_rng(seed).integers(5, 300, count).tolist())


def prompt_of(preamble: int = 11, chunks: Sequence[int] = (60, 45), question: int = 9) -> Prompt:
    """By the lengths of its parts."""
    return Prompt(
        Segment(some_tokens(preamble, 1), "preamble"),
        tuple(Segment(some_tokens(length, 2 + i), f"chunk{i}") for i, length in enumerate(chunks)),
        Segment(some_tokens(question, 99)),
    )


def written(k_pre: Float16, v: Float16) -> ChunkReader:
    """Rows stored without loss."""
    packed = codec.encode(ChunkKV(k_pre, v, {}), BitPlan.exact(len(k_pre)), codec.text_order(k_pre.shape[1]))
    return ChunkReader(MemorySource(to_bytes(packed, bytes(32))))


def stored(reader: Reader, guard: Sequence[int], tokens: Sequence[int]) -> ChunkReader:
    """A chunk's KV behind a guard, stored without loss."""
    return written(*reader.encode(guard, tokens))


def readers(reader: Reader, prompt: Prompt) -> list[ChunkReader]:
    """Preamble and chunks, each chunk encoded behind the preamble alone, as Quire does."""
    preamble = prompt.opening.tokens
    first = [stored(reader, (), preamble)] if preamble else []
    return first + [stored(reader, preamble, chunk.tokens) for chunk in prompt.chunks]


def everything(prompt: Prompt, recompute: bool) -> list[Mask]:
    """All tokens of every chunk computed again, or none."""
    return [np.full(len(chunk), recompute) for chunk in prompt.chunks]


def full(runtime: Runtime, prompt: Prompt) -> Float32:
    """The question's scores by full prefill."""
    runtime.rewind(0)
    runtime.execute(plan.compute_all(prompt))
    return runtime.extend(prompt.question.tokens)


def place(runtime: Runtime, prompt: Prompt, chunks: Sequence[ChunkReader]) -> None:
    """The chunks behind what stands before this prompt."""
    places = [(segment, start) for segment, start in prompt.places if segment.tokens]
    runtime.rewind(prompt.position)
    runtime.place([Placement(s.key, c, start) for (s, start), c in zip(places, chunks, strict=True)])


def stitched(runtime: Runtime, prompt: Prompt, chunks: Sequence[ChunkReader], recompute: Sequence[Mask]) -> Float32:
    """The question's scores over stored chunks, of which some tokens are computed again."""
    place(runtime, prompt, chunks)
    runtime.execute(plan.stitch(prompt, recompute))
    return runtime.extend(prompt.question.tokens)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max())
