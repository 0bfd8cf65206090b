"""Whole-folder questions: every passage is read, and no document goes unmentioned.

    for event in WholeFolder(session).ask("Which bills are unpaid?"): ...     Plan, Part..., Text..., Account

The passages are read in parts that fit the context, each with the question (map); the partial answers are then put
together with it (reduce), in several rounds where they are too many for one prompt. A document contributed when it has
the words of a partial answer that the question has not: models that find nothing seldom say so plainly. Knows neither
screen nor command line, nor how passages are stitched.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from quire import paths
from quire.idle import asking
from quire.library import EVERYWHERE, Chunk, Everywhere, StoredDocument, Within
from quire.session import Session
from quire.word_search import content_words
from quire_engine.engine import Request, never
from quire_engine.errors import ContextOverflow, QuireError
from quire_engine.types import Answered, Text

_PARTIAL_TOKENS = 96  # of the answer to one part; less where the context is short
_PARTIALS_AT_ONCE = 3  # fit one prompt at least, so that putting together ends
_NOTHING = "nothing"
_SAYS_NOTHING = re.compile(
    rf"\W*({_NOTHING}|none|no (information|mention|answer)|not (mentioned|stated|given)"
    r"|(the|these) (documents?|texts?|passages?) (do|does) not)\b",
    re.IGNORECASE,
)
_EVERYTHING = re.compile(
    r"\b(in|across|of|from|over) all (of )?(my |the |these |our )?(files|documents|notes)\b", re.IGNORECASE
)

State = Literal["contributed", "nothing", "unreadable", "not reached"]


@dataclass(frozen=True)
class Plan:
    """What is about to be read. least_ms: what reading takes, as predicted for the first part, answers not
    counted; 0 when nothing was ever measured."""

    parts: int
    passages: int
    documents: int
    tokens: int
    least_ms: float


@dataclass(frozen=True)
class Part:
    """One part was read. answer: what it gave, perhaps nothing.  left_ms: what the other parts take, by the speed so
    far."""

    done: int
    total: int
    answer: str
    left_ms: float


@dataclass(frozen=True)
class Mention:
    """A document and what became of it. reason: why it could not be read; else empty."""

    path: Path
    state: State
    reason: str = ""


@dataclass(frozen=True)
class Account:
    """Every document once, ordered by path. stopped: before all parts were read."""

    documents: tuple[Mention, ...]
    parts: int
    passages: int
    took_ms: float
    stopped: bool

    def count(self, state: State) -> int:
        return sum(document.state == state for document in self.documents)


Event = Plan | Part | Text | Account


@dataclass(frozen=True)
class _SoFar:
    """Filled while reading: the ids of the passages that were read, and of those that gave something; and what."""

    reached: set[str] = field(default_factory=set)
    credited: set[str] = field(default_factory=set)
    answers: list[str] = field(default_factory=list)


def asks_for_all(question: str) -> bool:
    """Whether it says so itself: "in all files"."""
    return _EVERYTHING.search(question) is not None


class WholeFolder:
    """One whole-folder question after the other, with a session's engine and settings."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ask(
        self, question: str, within: Within = EVERYWHERE, should_stop: Callable[[], bool] = never
    ) -> Iterator[Event]:
        """Exhaust it. After should_stop() turns true, what was read so far is accounted for.

        Raises QuireError when there is nothing to read.
        """
        began = time.perf_counter()
        asked = self._session.read(question)
        if not asked.question.strip():
            raise QuireError("There is no question.", 'Type it in quotes: quire ask --all "What is ...?"')
        documents, contents = self._documents(asked.paths or within), self._session.library.contents()
        chunks = self._chunks([d.path for d in documents], contents)
        if not chunks:
            raise QuireError("There is nothing to read.", "Add a folder, or see why files were skipped: quire status")
        parts = list(_grouped(chunks, self._room))
        yield self._plan(asked.question, parts, len(documents))
        so_far = _SoFar()
        with asking(paths.data_dir()):
            for number, part in enumerate(parts, 1):
                if should_stop():
                    break
                answer = self._read(asked.question, part, so_far, should_stop)
                left_ms = 1000 * (time.perf_counter() - began) / number * (len(parts) - number)
                yield Part(number, len(parts), answer, left_ms)
            yield from self._together(asked.question, so_far.answers, should_stop)
        self._session.engine.catalogue.flush()
        self._session.shelf.trim()
        mentions = tuple(_mention(d, contents.get(d.path, ()), so_far) for d in documents)
        took_ms = 1000 * (time.perf_counter() - began)
        yield Account(mentions, len(parts), len(so_far.reached), took_ms, should_stop())

    # What there is to read

    def _documents(self, within: Within) -> list[StoredDocument]:
        everything = self._session.library.documents()
        if isinstance(within, Everywhere):
            return everything
        places = [within] if isinstance(within, Path) else within
        return [d for d in everything if any(d.path.is_relative_to(place) for place in places)]

    def _chunks(self, files: Sequence[Path], contents: dict[Path, tuple[str, ...]]) -> list[Chunk]:
        """Every passage once, in the order of the documents, with its length for the model that is used now."""
        ids = dict.fromkeys(chunk for file in files for chunk in contents.get(file, ()))
        texts, count = self._session.library.texts(list(ids)), self._session.engine.count_tokens
        return [Chunk(chunk, texts[chunk], count(texts[chunk])) for chunk in ids if chunk in texts]

    @property
    def _room(self) -> int:
        return min(self._session.settings.context_tokens, self._session.engine.limits.context_tokens)

    def _plan(self, question: str, parts: Sequence[Sequence[Chunk]], documents: int) -> Plan:
        engine = self._session.engine
        known = engine.known_costs is not None
        request = self._request(question, [chunk.text for chunk in parts[0]])
        least_ms = len(parts) * engine.forecast(request).first_token_ms if known else 0.0
        passages = [chunk for part in parts for chunk in part]
        return Plan(len(parts), len(passages), documents, sum(chunk.tokens for chunk in passages), least_ms)

    # Map

    @property
    def _partial_tokens(self) -> int:
        return max(1, min(_PARTIAL_TOKENS, self._session.settings.max_tokens, self._room // _PARTIALS_AT_ONCE - 8))

    def _request(self, question: str, passages: Sequence[str]) -> Request:
        from_part = f"{question}\nIf the documents do not say, answer: {_NOTHING}."
        request = replace(self._session.request(from_part, ()), passages=tuple(passages))
        return replace(request, max_tokens=self._partial_tokens)

    def _read(self, question: str, part: Sequence[Chunk], so_far: _SoFar, should_stop: Callable[[], bool]) -> str:
        """What these passages give, perhaps nothing, noted together with who gave it."""
        try:
            answer, ending = self._answer(self._request(question, [chunk.text for chunk in part]), should_stop)
        except ContextOverflow:
            if part[0].tokens <= self._room:
                raise
            return ""  # cut for a model with a longer context: it stays unreached
        given = drawn_from(answer, question, part)
        if ending != "stopped":
            so_far.reached.update(chunk.id for chunk in part)
        if not given:
            return ""
        so_far.credited.update(given)
        so_far.answers.append(answer)
        return answer

    def _answer(self, request: Request, should_stop: Callable[[], bool]) -> tuple[str, str]:
        """The text, and how it ended."""
        text, ending = "", "stopped"
        for event in self._session.engine.answer(request, should_stop):
            if isinstance(event, Text):
                text += event.text
            elif isinstance(event, Answered):
                ending = event.ending
        return text.strip(), ending

    # Reduce

    def _together(self, question: str, partials: list[str], should_stop: Callable[[], bool]) -> Iterator[Text]:
        """The answer from partial ones; a single one is the answer."""
        while len(partials) > 1 and not should_stop():
            groups = self._groups(partials)
            if len(groups) == 1:
                events = self._session.engine.answer(self._reducing(question, partials), should_stop)
                yield from (event for event in events if isinstance(event, Text))
                return
            short = [replace(self._reducing(question, group), max_tokens=self._partial_tokens) for group in groups]
            answers = [self._answer(request, should_stop)[0] for request in short]
            partials = [answer or group[0] for answer, group in zip(answers, groups, strict=True)]
        if partials or not should_stop():
            yield Text(partials[0] if partials else "The documents say nothing about it.")

    def _groups(self, partials: Sequence[str]) -> list[list[str]]:
        """As many as fit together, and two at least, so that they become fewer."""
        count = self._session.engine.count_tokens
        groups = list(_grouped([Chunk(text, text, count(text)) for text in partials], self._room))
        if len(groups) == len(partials):
            return [list(partials[start : start + 2]) for start in range(0, len(partials), 2)]
        return [[chunk.text for chunk in group] for group in groups]

    def _reducing(self, question: str, partials: Sequence[str]) -> Request:
        """Read in full: nothing of it will be asked for again, so it is not worth storing."""
        request = self._session.request(question, ())
        return replace(request, passages=tuple(partials), ratio=1.0)


def _grouped(chunks: Sequence[Chunk], room: int) -> Iterator[list[Chunk]]:
    """Consecutive ones that have room together; one that has none stands alone."""
    group, left = list[Chunk](), room
    for chunk in chunks:
        if group and chunk.tokens > left:
            yield group
            group, left = [], room
        group.append(chunk)
        left -= chunk.tokens
    yield group


def drawn_from(answer: str, question: str, part: Sequence[Chunk]) -> set[str]:
    """The ids of the passages that an answer comes from: those with words of it that the question has not, at least
    half as many as the one that has most. None for an answer that says there is nothing."""
    if _SAYS_NOTHING.match(answer):
        return set()
    said = set(content_words(answer)) - set(content_words(question))
    shared = {chunk.id: len(said.intersection(content_words(chunk.text))) for chunk in part}
    most = max(shared.values())
    return {chunk for chunk, count in shared.items() if most and 2 * count >= most}


def _mention(document: StoredDocument, chunks: Sequence[str], so_far: _SoFar) -> Mention:
    if document.state == "skipped":
        return Mention(document.path, "unreadable", f"{document.reason}. {document.remedy}".strip())
    if not so_far.credited.isdisjoint(chunks):
        return Mention(document.path, "contributed")
    return Mention(document.path, "nothing" if so_far.reached.issuperset(chunks) else "not reached")
