"""Texts into vectors, with a GGUF embedding model in llama.cpp.

Any GGUF will do: one that names no way of pooling, as chat models do, gets the mean over its tokens. Knows nothing of
passages, search or where vectors are kept.
"""

from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from quire_engine import gguf, processes
from quire_engine.errors import ModelError
from quire_engine.runtimes.llama_amx import avoid_amx
from quire_engine.types import Float32

_MOST_TOKENS = 512  # of a text; what follows does not count
_UNPOOLED = 0  # no vector for the whole text


class LlamaEmbedder:
    """One embedding model, loaded. Not thread-safe. `id` tells vectors of different models apart.

    Raises ModelError for a file that llama.cpp cannot embed with.
    """

    def __init__(self, model_file: Path, threads: int = 0) -> None:
        """threads: 0 takes all cores."""
        model = gguf.read(model_file)
        mean, own = llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED
        pools = model.metadata.get(f"{model.architecture}.pooling_type", _UNPOOLED) != _UNPOOLED
        self.name = model.name
        self.id = gguf.fingerprint(model).hex()[:16]
        cores = threads or processes.cores()
        avoid_amx()
        try:
            self._model = llama_cpp.Llama(
                str(model_file),
                embedding=True,
                pooling_type=own if pools else mean,
                n_ctx=_MOST_TOKENS,
                n_batch=_MOST_TOKENS,
                n_ubatch=_MOST_TOKENS,  # a text at once: in most of these models every token sees all
                n_threads=cores,
                n_threads_batch=cores,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            hint = "Choose another embedding model: quire config embedder FILE"
            raise ModelError(f"{model_file} cannot be used to embed texts.", hint, repr(error)) from error

    def embed(self, texts: Sequence[str]) -> Float32:
        """Vectors of length 1.  # [texts, dimensions]"""
        vectors = np.array([self._model.embed(text or " ") for text in texts], dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: Float32 = vectors / np.maximum(lengths, 1e-12)
        return unit
