"""One place where library and engine meet: find passages, ask the engine, hand on what happens.

Knows neither screen nor command line; both call it in the same way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quire import paths
from quire.config import Settings
from quire.config_values import FromDial, FromMachine, NoEmbedder
from quire.elsewhere import server_of
from quire.embedding import Vectors, described, embedder_of
from quire.idle import asking
from quire.indexer import IndexProgress, IndexReport, index_roots
from quire.library import EVERYWHERE, Everywhere, Hit, Library, Within
from quire.mentions import Mentions, Places
from quire.model_files import model_file
from quire.retrieval import Findings, Retriever
from quire.shelf import CacheProgress, Shelf
from quire_engine.engine import Engine, EngineSettings, Request, never
from quire_engine.errors import QuireError
from quire_engine.generate import Sampling
from quire_engine.kv import pools
from quire_engine.prompt import Wording
from quire_engine.types import Event, Exchange

_MOST_HITS = 40  # more passages than any context holds
_CALIBRATION_PASSAGES = 20
_CALIBRATION_WORDS = 130  # a passage of some 180 tokens


@dataclass(frozen=True)
class Found:
    """The passages that go into the prompt, best first, and how long finding them took.

    cached_first: passages that come before equally good ones because their KV is stored."""

    sources: tuple[Hit, ...]
    search_ms: float
    cached_first: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a question would take. prompt_tokens: of the room_tokens that the model holds; computed_tokens: of them, the
    rest is reused.  first_token_ms: 0 while nothing was ever measured.  too_long: the question alone is."""

    prompt_tokens: int
    computed_tokens: int
    room_tokens: int
    first_token_ms: float
    too_long: bool = False

    @property
    def warns(self) -> bool:
        """Whether a person should look before asking."""
        return self.too_long


class NothingFound(QuireError):
    """No passage fits the question's words."""


class Session:
    """The library and one model, opened when first needed. Not thread-safe; close it, or use it with `with`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.library = Library(paths.data_dir() / "index.sqlite")
        self._engine: Engine | None = None
        self._shelf: Shelf | None = None
        self._vectors: tuple[Vectors, ...] = ()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self.make_engine(paths.cache_dir())
        return self._engine

    def make_engine(self, cache_dir: Path) -> Engine:
        """An engine by the settings that keeps its KV there."""
        s = self.settings
        wording = Wording((paths.assets() / "system_prompt.txt").read_text().strip())
        folders = (paths.data_dir() / "profiles", Path(str(paths.assets() / "profiles")))
        server = server_of(s)
        engine_settings = EngineSettings(
            wording, s.threads, s.precision, s.chunk_tokens, folders, s.runtime, server, s.live_window
        )
        return Engine(model_file(s.model), cache_dir, engine_settings)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.library.close()
        if self._engine:
            self._engine.catalogue.close()

    def take_notice(self) -> str:
        """What a person should know about the cache, said once; empty most of the time."""
        return self._engine.catalogue.take_notice() if self._engine else ""

    # Folders

    def index(self, roots: Sequence[Path], progress: Callable[[IndexProgress], None]) -> IndexReport:
        """Makes the text of folders and files searchable, and notes the addresses of passages while their tokens are at
        hand."""
        engine, note = self.engine, self.shelf.note
        settings = replace(self.settings, chunk_tokens=engine.limits.chunk_tokens)
        return index_roots(self.library, roots, engine.count_tokens, engine.tokenizer_id, settings, progress, note)

    def cache(self, progress: Callable[[CacheProgress], None], should_stop: Callable[[], bool]) -> CacheProgress:
        """Stores the KV of every chunk in the library that is not stored yet, as far as the disk budget goes; before
        that the vectors, where there is an embedding model, because finding comes first."""
        self.embed(should_stop)
        self.shelf.refresh()
        return self.shelf.cache(progress, should_stop)

    def embed(self, should_stop: Callable[[], bool]) -> None:
        """Makes the vectors that are missing, where there is an embedding model."""
        for vectors in self.vectors:
            vectors.complete(lambda _done, _total: None, should_stop)

    @property
    def vectors(self) -> tuple[Vectors, ...]:
        """What finds by meaning: one where an embedding model was chosen, opened when first needed; else none."""
        file = self.settings.embedder
        if not self._vectors and not isinstance(file, NoEmbedder):
            self._vectors = (Vectors(self.library, embedder_of(file, self.settings.threads)),)
        return self._vectors

    @property
    def shelf(self) -> Shelf:
        """What of the library is cached, and the disk budget."""
        if self._shelf is None:
            chunks = self.engine.chunks
            turns, catalogue = self.engine.turns.store, self.engine.catalogue
            self._shelf = Shelf(self.library, self.engine, catalogue, chunks.store, turns, chunks.preamble.key)
        self._shelf.limit_bytes = int(self.settings.cache_gb * 1e9)  # settings may change while a session is open
        return self._shelf

    def calibration_passages(self) -> tuple[list[str], bool]:
        """What a model's precision is measured on, and whether it is the person's own: passages from all over the
        library, or the text that comes with Quire where that has too few."""
        known = list(self.library.tokens())
        if len(known) >= _CALIBRATION_PASSAGES:
            spread = known[:: len(known) // _CALIBRATION_PASSAGES][:_CALIBRATION_PASSAGES]
            return list(self.library.texts(spread).values()), True
        words = (paths.assets() / "calibration.txt").read_text().split(" ")
        return [
            " ".join(words[start : start + _CALIBRATION_WORDS]) for start in range(0, len(words), _CALIBRATION_WORDS)
        ], False

    # Questions

    def ask(
        self,
        question: str,
        within: Path | Everywhere = EVERYWHERE,
        should_stop: Callable[[], bool] = never,
        history: Sequence[Exchange] | None = None,
    ) -> Iterator[Found | Event]:
        """Yields Found, then the engine's Forecast, Texts and Answered. Exhaust it.

        history: the conversation before it, perhaps empty; None where no other question follows.
        The places that the question names (`@notes/tea.md`) outrank `within`; the model reads it without the markup.
        Raises QuireError when nothing was added yet or nothing fits the question's words.
        """
        _ = self.engine  # opening a model is not searching
        began = time.perf_counter()
        asked = self.read(question)
        sources, cached_first = self._passages(asked, within, history)
        yield Found(tuple(sources), 1000 * (time.perf_counter() - began), cached_first)
        written_before = self.engine.written_bytes
        with asking(paths.data_dir()):
            yield from self.engine.answer(self.request(asked.question, sources, self._spoken(history)), should_stop)
        self.engine.catalogue.flush()
        if self.engine.written_bytes > written_before:
            self.shelf.trim()

    def estimate(self, question: str, history: Sequence[Exchange] | None = None) -> Estimate:
        """What ask() would take, computing nothing. Of a model that was never used only the tokens are known."""
        asked = self.read(question)
        alone = self.engine.count_tokens(asked.question)
        room = self.engine.shape.context_tokens
        if alone >= room:
            return Estimate(alone, alone, room, 0.0, too_long=True)
        try:
            sources, _ = self._passages(asked, EVERYWHERE, history)
        except QuireError:
            return Estimate(alone, alone, room, 0.0)
        request = self.request(asked.question, sources, self._spoken(history))
        if self.engine.known_costs is None:
            total = len(self.engine.prompt(request).tokens)
            return Estimate(total, total, room, 0.0)
        forecast = self.engine.forecast(request)
        total, new = forecast.context_tokens + alone, forecast.context_tokens - forecast.kept_tokens
        reused = forecast.kept_tokens + int((new - forecast.missing_tokens) * (1 - forecast.ratio))
        return Estimate(total, total - reused, room, forecast.first_token_ms)

    def _passages(
        self, asked: Mentions, within: Path | Everywhere, history: Sequence[Exchange] | None
    ) -> tuple[list[Hit], int]:
        """What is found, on its way into memory; in a conversation that may be nothing. And `Found.cached_first`."""
        try:
            found, cached_first = self._find(asked.question, asked.paths or within)
        except NothingFound:
            if history:
                return [], 0
            raise
        self._prefetch([hit.text for hit in found], history or ())
        return found, cached_first

    def _prefetch(self, passages: Sequence[str], history: Sequence[Exchange]) -> None:
        """Begins to read what does not stand in the context yet, while a question is typed or prepared."""
        share, standing = self.settings.memory_gb, {passage for exchange in history for passage in exchange.passages}
        # Settings may change while a session is open.
        self.engine.memory.limit_bytes = pools.usual_bytes() if isinstance(share, FromMachine) else int(share * 1e9)
        if self.ratio < 1:
            self.engine.prefetch([passage for passage in passages if passage not in standing])

    @property
    def ratio(self) -> float:
        """The share of a question's passages that the settings ask to compute again."""
        s = self.settings
        return self.engine.ratio(s.dial, s.selector) if isinstance(s.ratio, FromDial) else s.ratio

    def _spoken(self, history: Sequence[Exchange] | None) -> tuple[Exchange, ...] | None:
        """The conversation as the model read it."""
        if history is None:
            return None
        return tuple(replace(e, question=self.read(e.question).question) for e in history)

    def find(self, question: str, within: Within = EVERYWHERE) -> list[Hit]:
        """The passages that fit the context, best first."""
        return self._find(question, within)[0]

    def _find(self, question: str, within: Within) -> tuple[list[Hit], int]:
        findings = self.look(question, within, _MOST_HITS)
        sources = self._fitting(findings.in_order)
        if not sources:
            where = "your documents" if isinstance(within, Everywhere) else _listed(within)
            raise NothingFound(
                f"Nothing in {where} matches the words of the question.",
                "Use words that stand in the documents, or see what was read: quire status",
            )
        return sources, findings.cached_first

    def look(self, question: str, within: Within, limit: int) -> Findings:
        """What the library says about it, without regard to what fits the context."""
        if not question.strip():
            raise QuireError("There is no question.", 'Type it in quotes: quire ask "What is ...?"')
        if not self.library.roots():
            raise QuireError("No folder was added yet.", "Add one: quire add ~/notes")
        retriever = Retriever(self.library, self.vectors, self._is_cached)
        return retriever.search(question, limit, within)

    @property
    def finds_by(self) -> str:
        """How passages are found, in words."""
        file = self.settings.embedder
        return "by words alone" if isinstance(file, NoEmbedder) else f"by words and meaning ({described(file)})"

    def _is_cached(self, passage: str) -> bool:
        """Whether its stored KV would spare something; False while no model is open, so that searching needs none."""
        if self._engine is None or self._engine.known_reuse_off:
            return False
        return self.ratio < 1 and self._engine.is_cached(passage)

    def read(self, question: str) -> Mentions:
        """The question as the model gets it, and the places that it names."""
        if "@" not in question:
            return Mentions(question, ())
        documents = [document.path for document in self.library.documents() if document.state == "indexed"]
        return Places(documents, self.library.roots()).read(question)

    def _fitting(self, hits: Sequence[Hit]) -> list[Hit]:
        room = min(self.settings.context_tokens, self.engine.limits.context_tokens)
        fitting: list[Hit] = []
        for hit in hits:
            tokens = self.engine.count_tokens(hit.text)  # counted anew: the model may have changed since indexing
            if tokens <= room:
                fitting.append(hit)
                room -= tokens
        return fitting

    def request(self, question: str, sources: Sequence[Hit], history: tuple[Exchange, ...] | None = None) -> Request:
        """The engine's request for a question over these passages, by the settings."""
        s = self.settings
        return Request(
            question=question,
            passages=tuple(hit.text for hit in sources),
            ratio=self.ratio,
            selector=s.selector,
            max_tokens=s.max_tokens,
            sampling=Sampling(s.temperature),
            history=history or (),
            keep=history is not None,
        )


def _listed(within: Path | Sequence[Path]) -> str:
    return str(within) if isinstance(within, Path) else ", ".join(map(str, within))
