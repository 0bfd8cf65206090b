"""Finding passages by meaning: one vector for every passage, made by an embedding model and kept in the index.

    vectors = Vectors(library, embedder_of(file, threads))
    vectors.complete(on_progress, should_stop)         after passages came
    vectors.nearest("Who built it?", 10, EVERYWHERE)

All vectors are compared with the question's; 100,000 of 384 numbers take 154 MB of memory. Knows neither SQL nor which
library computes vectors.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from quire.library import Hit, Library, Within, batched
from quire_engine.types import Float32

_AT_ONCE = 8  # passages between two chances to stop
_STORED = np.dtype("<f2")


class Embedder(Protocol):
    """id: tells vectors of different models apart."""

    id: str

    def embed(self, texts: Sequence[str]) -> Float32:
        """Vectors of length 1.  # [texts, dimensions]"""


def embedder_of(file: Path, threads: int) -> Embedder:
    """The embedding model in a GGUF file. Raises ModelError."""
    from quire_engine.runtimes.llama_embed import LlamaEmbedder  # only now: without vectors nothing is loaded

    return LlamaEmbedder(file, threads)


class Vectors:
    """The vectors that one embedder gave to a library's passages. As thread-safe as the library: not."""

    def __init__(self, library: Library, embedder: Embedder) -> None:
        self._library = library
        self._embedder = embedder
        self._chunks: list[str] = []
        self._vectors: list[Float32] = []
        self._matrix: Float32 = np.zeros((0, 0), np.float32)
        self._seen = 0  # rows of the index that were read

    def complete(self, on_progress: Callable[[int, int], None], should_stop: Callable[[], bool]) -> None:
        """Embeds the passages that have no vector yet. on_progress: passages done, and all of them."""
        lacking = self._library.without_vector(self._embedder.id)
        done = 0
        for some in batched(lacking, _AT_ONCE):
            if should_stop():
                return
            texts = self._library.texts(some)
            vectors = self._embedder.embed(list(texts.values())).astype(_STORED)
            told = zip(texts, vectors, strict=True)
            self._library.note_vectors(self._embedder.id, {chunk: vector.tobytes() for chunk, vector in told})
            done += len(some)
            on_progress(done, len(lacking))

    def nearest(self, question: str, limit: int, within: Within) -> list[Hit]:
        """The passages whose vectors point the same way as the question's, best first, each chunk once; those that have
        none yet are not found. Their score is the cosine."""
        self._read()
        if not self._chunks:
            return []
        [asked] = self._embedder.embed([question])
        scores = self._matrix @ asked
        found: list[Hit] = []
        order = np.argsort(-scores)
        for start in range(0, len(order), step := max(1, 4 * limit)):
            some = {self._chunks[at]: float(scores[at]) for at in order[start : start + step]}
            found += self._library.hits(some, within)
            if len(found) >= limit:
                break
        return found[:limit]

    def _read(self) -> None:
        """What came to the index since the last time; a vector whose passage is gone finds nothing."""
        for row, chunk, vector in self._library.vectors(self._embedder.id, self._seen):
            self._seen = row
            self._chunks.append(chunk)
            self._vectors.append(np.frombuffer(vector, _STORED).astype(np.float32))
        if len(self._vectors) > len(self._matrix):
            self._matrix = np.stack(self._vectors)
            self._vectors = list(self._matrix)  # views: nothing is held twice
