"""What Quire is measured against: the same prompt by full prefill, by prefix reuse, and by plain llama-cpp-python.

Used by benchmarks only. All take the same segmented token ids. Also llama.cpp's own answer to large KV: a cache of
another type.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quire_engine.chunks import ChunkCache
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt
from quire_engine.runtimes.base import Runtime
from quire_engine.types import Float32, ModelShape


def prefix_only_ms(runtime: Runtime, chunks: ChunkCache, prompt: Prompt) -> float:
    """What a prefix cache saves when the best passage stayed first: preamble and that passage reused, rest computed.
    Milliseconds to the first token's scores."""
    began = time.perf_counter()
    runtime.rewind(0)
    with chunks.store.open(prompt.opening.key) as first, chunks.store.open(prompt.chunks[0].key) as second:
        runtime.place(
            [
                Placement(prompt.opening.key, first, 0),
                Placement(prompt.chunks[0].key, second, prompt.starts[1]),
            ]
        )
    runtime.adopt()
    runtime.extend(prompt.tokens[prompt.starts[2] :])
    return 1000 * (time.perf_counter() - began)


class PlainLlama:
    """llama-cpp-python as its own README uses it: one Llama object, default settings but for context and threads."""

    def __init__(self, model_file: Path, context_tokens: int, threads: int) -> None:
        from llama_cpp import Llama

        from quire_engine.runtimes.llama_amx import avoid_amx

        avoid_amx()
        self._llama = Llama(
            str(model_file), n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill_ms(self, tokens: tuple[int, ...]) -> float:
        self._llama.reset()  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        self._llama.eval(list(tokens))
        self._llama.sample(temp=0.0)
        return 1000 * (time.perf_counter() - began)

    def close(self) -> None:
        self._llama.close()


@dataclass(frozen=True)
class KVType:
    """A type of llama.cpp's KV cache. number: ggml's.  block: channels of a head that share a scale."""

    number: int
    bits_per_value: float
    block: int = 32


KV_TYPES = {"q8_0": KVType(8, 8.5), "q4_0": KVType(2, 4.5)}


class QuantizedLlama:
    """llama.cpp with a KV cache of one of its own types, in Quire's batch shapes: full prefill only."""

    def __init__(self, model_file: Path, context_tokens: int, threads: int, kv_type: KVType) -> None:
        from quire_engine.runtimes.llama_context import LlamaContext, LlamaModel

        model = LlamaModel(model_file)
        self._context = LlamaContext(model, context_tokens, 1, threads, kv_type.number)
        self._tokens = 0

    @staticmethod
    def takes(shape: ModelShape, kv_type: KVType) -> bool:
        """Whether a model's heads can be cut into the type's blocks."""
        return shape.key_dim % kv_type.block == 0 and shape.value_dim % kv_type.block == 0

    def rewind(self, tokens: int) -> int:
        self._context.remove(0, tokens)
        self._tokens = tokens
        return tokens

    def extend(self, tokens: Sequence[int]) -> Float32:
        """Appends tokens; scores of the next one [vocabulary]."""
        return self._append(tokens, 1).ravel()

    def scores(self, tokens: Sequence[int]) -> Float32:
        """Appends tokens; scores after each of them [tokens, vocabulary]."""
        return self._append(tokens, len(tokens))

    def _append(self, tokens: Sequence[int], scored: int) -> Float32:
        self._context.decode(tokens, self._tokens + np.arange(len(tokens)), 0, scored)
        self._tokens += len(tokens)
        return self._context.scores(scored)

    def close(self) -> None:
        self._context.close()
