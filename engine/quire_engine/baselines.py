"""What Quire is measured against: the same prompt by full prefill, by prefix reuse, and by plain llama-cpp-python.

Used by benchmarks only. All take the same segmented token ids and return milliseconds to the first token's scores.
"""

import time
from pathlib import Path

from quire_engine.chunks import ChunkCache
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt
from quire_engine.runtimes.base import Runtime


def prefix_only_ms(runtime: Runtime, chunks: ChunkCache, prompt: Prompt) -> float:
    """What a prefix cache saves when the best passage stayed first: preamble and that passage reused, rest computed."""
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
