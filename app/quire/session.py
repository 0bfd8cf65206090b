"""One place where library and engine meet: find passages, ask the engine, hand on what happens.

Knows neither screen nor command line; both call it in the same way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quire import paths
from quire.config import FromDial, Settings
from quire.indexer import CacheProgress, IndexProgress, IndexReport, cache_pending, index_roots
from quire.library import EVERYWHERE, Everywhere, Hit, Library
from quire.model_files import model_file
from quire_engine.engine import DIALS, Engine, EngineSettings, Request, never
from quire_engine.errors import QuireError
from quire_engine.generate import Sampling
from quire_engine.prompt import Wording
from quire_engine.types import Event

_MOST_HITS = 40  # more passages than any context holds


@dataclass(frozen=True)
class Found:
    """The passages that go into the prompt, best first, and how long finding them took."""

    sources: tuple[Hit, ...]
    search_ms: float


class Session:
    """The library and one model, opened when first needed. Not thread-safe; close it, or use it with `with`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.library = Library(paths.data_dir() / "index.sqlite")
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self.make_engine(paths.cache_dir())
        return self._engine

    def make_engine(self, cache_dir: Path) -> Engine:
        """An engine by the settings that keeps its KV there."""
        s = self.settings
        wording = Wording((paths.assets() / "system_prompt.txt").read_text().strip())
        engine_settings = EngineSettings(wording, s.threads, s.k_bits, s.v_bits, s.chunk_tokens)
        return Engine(model_file(s.model), cache_dir, engine_settings)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.library.close()

    # Folders

    def index(self, roots: Sequence[Path], progress: Callable[[IndexProgress], None]) -> IndexReport:
        """Makes the text of folders and files searchable."""
        engine = self.engine
        settings = replace(self.settings, chunk_tokens=engine.limits.chunk_tokens)
        return index_roots(self.library, roots, engine.count_tokens, engine.tokenizer_id, settings, progress)

    def cache(self, progress: Callable[[CacheProgress], None], should_stop: Callable[[], bool]) -> CacheProgress:
        """Stores the KV of every chunk in the library that is not stored yet."""
        return cache_pending(self.library.all_chunks(), self.engine, progress, should_stop)

    # Questions

    def ask(
        self, question: str, within: Path | Everywhere = EVERYWHERE, should_stop: Callable[[], bool] = never
    ) -> Iterator[Found | Event]:
        """Yields Found, then the engine's Forecast, Texts and Answered.

        Raises QuireError when nothing was added yet or nothing fits the question's words.
        """
        _ = self.engine  # opening a model is not searching
        began = time.perf_counter()
        sources = self.find(question, within)
        yield Found(tuple(sources), 1000 * (time.perf_counter() - began))
        yield from self.engine.answer(self.request(question, sources), should_stop)

    def find(self, question: str, within: Path | Everywhere = EVERYWHERE) -> list[Hit]:
        """The passages that fit the context, best first."""
        if not question.strip():
            raise QuireError("There is no question.", 'Type it in quotes: quire ask "What is ...?"')
        if not self.library.roots():
            raise QuireError("No folder was added yet.", "Add one: quire add ~/notes")
        sources = self._fitting(self.library.search(question, _MOST_HITS, within))
        if not sources:
            where = "your documents" if isinstance(within, Everywhere) else str(within)
            raise QuireError(
                f"Nothing in {where} matches the words of the question.",
                "Use words that stand in the documents, or see what was read: quire status",
            )
        return sources

    def _fitting(self, hits: Sequence[Hit]) -> list[Hit]:
        room = min(self.settings.context_tokens, self.engine.limits.context_tokens)
        fitting: list[Hit] = []
        for hit in hits:
            tokens = self.engine.count_tokens(hit.text)  # counted anew: the model may have changed since indexing
            if tokens <= room:
                fitting.append(hit)
                room -= tokens
        return fitting

    def request(self, question: str, sources: Sequence[Hit]) -> Request:
        """The engine's request for a question over these passages, by the settings."""
        s = self.settings
        return Request(
            question=question,
            passages=tuple(hit.text for hit in sources),
            ratio=DIALS[s.dial] if isinstance(s.ratio, FromDial) else s.ratio,
            selector=s.selector,
            max_tokens=s.max_tokens,
            sampling=Sampling(s.temperature),
        )
