"""Finding passages by meaning: one vector for every passage, made by an embedding model and kept in the index.

    vectors = Vectors(library, embedder_of(file, threads))
    vectors.complete(on_progress, should_stop)         after passages came
    vectors.nearest("Who built it?", 10, EVERYWHERE)

Many models want other words before a question than before a passage, which assets/embedders.toml knows. All vectors are
compared with the question's; 100,000 of 384 numbers take 154 MB of memory. Knows neither SQL nor which library computes
vectors.
"""

import hashlib
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from quire import paths
from quire.library import Hit, Library, Within, batched
from quire.terminal import printable
from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.types import Float32

_AT_ONCE = 8  # passages between two chances to stop
_STORED = np.dtype("<f2")
_SHOWN_CHARACTERS = 30


class Model(Protocol):
    """What makes vectors. id: tells vectors of different models apart."""

    id: str

    def embed(self, texts: Sequence[str]) -> Float32:
        """Vectors of length 1.  # [texts, dimensions]"""


@dataclass(frozen=True)
class Wording:
    """What a model was trained to find before a question and before a passage; empty for texts as they are."""

    question: str = ""
    passage: str = ""

    def __str__(self) -> str:
        if not self.question:
            return "texts as they are"
        passages = f', passages with "{_shown(self.passage)}"' if self.passage else ""
        return f'questions begin with "{_shown(self.question)}"{passages}'


def wording_of(header: gguf.Gguf) -> Wording:
    """How the model of a GGUF file wants its texts, by its names."""
    names = (header.name, str(header.metadata.get("general.basename", "")), header.path.stem)
    plain = [re.sub(r"[^a-z0-9.]+", "-", name.lower()) for name in names]
    table = tomllib.loads((paths.assets() / "embedders.toml").read_text(encoding="utf-8"))
    for family in table["embedder"]:
        if any(re.search(family["name"], name) for name in plain):
            return Wording(family["question"], family.get("passage", ""))
    return Wording()


def pools(header: gguf.Gguf) -> bool:
    """Whether the model was made to give vectors of whole texts; a chat model was not."""
    return header.whole("pooling_type", 0) != 0


def described(file: Path) -> str:
    """The embedding model of a file in words, from its header alone."""
    try:
        header = gguf.read(file)
    except ModelError:
        return f"{printable(file.name)}, which cannot be opened"
    return f"{printable(header.name)}: {wording_of(header)}"


class Embedder:
    """A model and the words that it wants."""

    def __init__(self, model: Model, wording: Wording | None = None) -> None:
        self._model = model
        self._wording = wording or Wording()

    @property
    def id(self) -> str:
        """Tells vectors of passages apart that cannot be compared."""
        prefix = self._wording.passage
        return f"{self._model.id}-{hashlib.sha256(prefix.encode()).hexdigest()[:8]}" if prefix else self._model.id

    def question(self, text: str) -> Float32:
        """A vector of length 1.  # [dimensions]"""
        [vector] = self._model.embed([self._wording.question + text])
        return np.asarray(vector, np.float32)

    def passages(self, texts: Sequence[str]) -> Float32:
        """Vectors of length 1.  # [texts, dimensions]"""
        return self._model.embed([self._wording.passage + text for text in texts])


def embedder_of(file: Path, threads: int) -> Embedder:
    """The embedding model in a GGUF file. Raises ModelError."""
    from quire_engine.runtimes.llama_embed import LlamaEmbedder  # only now: without vectors nothing is loaded

    return Embedder(LlamaEmbedder(file, threads), wording_of(gguf.read(file)))


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
            vectors = self._embedder.passages(list(texts.values())).astype(_STORED)
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
        scores = self._matrix @ self._embedder.question(question)
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


def _shown(prefix: str) -> str:
    words = prefix.replace("\n", " ")
    return words if len(words) <= _SHOWN_CHARACTERS else f"{words[:_SHOWN_CHARACTERS].rstrip()} ..."
