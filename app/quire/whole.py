"""Whole-folder questions: every passage is read, and no document goes unmentioned.

    for event in WholeFolder(session).ask("Which bills are unpaid?"):         Plan, Part..., Text..., Account, Answered

The passages are read in parts that fit the context, each with the question (map); the partial answers are then put
together with it (reduce), in several rounds where they are too many for one prompt. A document contributed when it has
the words of a partial answer that the question has not: models that find nothing seldom say so plainly. Knows neither
screen nor command line, nor how passages are stitched.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from quire import elsewhere, paths
from quire.idle import asking
from quire.library import EVERYWHERE, Chunk, Everywhere, Hit, StoredDocument, Within, batched
from quire.session import Session
from quire.transcript import Mention, Share
from quire.word_search import content_words
from quire_engine.engine import Request, never
from quire_engine.errors import ContextOverflow, QuireError
from quire_engine.types import Answered, Text, Timings, TokenCounts

COMMAND = "/all"  # before a question
_PARTIAL_TOKENS = 96  # of the answer to one part; less where the context is short
_PARTIALS_AT_ONCE = 3  # fit one prompt at least, so that putting together ends
_COUNTED_AT_ONCE = 500  # passages whose texts are in memory
_NOTHING = "nothing"
_SAYS_NOTHING = re.compile(
    rf"\W*({_NOTHING}|none|no (information|mention|answer)|not (mentioned|stated|given)"
    r"|(the|these) (documents?|texts?|passages?) (do|does) not)\b",
    re.IGNORECASE,
)
_EVERYTHING = re.compile(
    r"\b(in|across|of|from|over) all (of )?(my |the |these |our )?(files|documents|notes)\b", re.IGNORECASE
)

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Plan:
    """What is about to be read. least_ms: what reading takes, as predicted for the first part, answers not
    counted; 0 when nothing was ever measured.  leaves: what leaves this computer; empty where no server answers."""

    parts: int
    passages: int
    documents: int
    tokens: int
    least_ms: float
    leaves: str = ""

    @property
    def warns(self) -> bool:
        """Whether a person should look before asking."""
        return bool(self.leaves)


@dataclass(frozen=True)
class Part:
    """One part was read. answer: what it gave, perhaps nothing.  left_ms: what the other parts take, by the speed so
    far."""

    done: int
    total: int
    answer: str
    left_ms: float


@dataclass(frozen=True)
class Account:
    """Every document once, ordered by path. sources: the passages that gave something.  passages: that were read.
    stopped: before all parts were."""

    documents: tuple[Mention, ...]
    sources: tuple[Hit, ...]
    parts: int
    passages: int
    took_ms: float
    stopped: bool

    def count(self, state: Share) -> int:
        return sum(document.state == state for document in self.documents)


Event = Plan | Part | Text | Account | Answered


@dataclass(frozen=True)
class _Asked:
    """A question as a model reads it, where it is put to, the documents there, and the passages of all."""

    question: str
    within: Within
    documents: Sequence[StoredDocument]
    contents: dict[Path, tuple[str, ...]]

    @property
    def passages(self) -> list[str]:
        """Each once, in the order of the documents."""
        return list(dict.fromkeys(chunk for d in self.documents for chunk in self.contents.get(d.path, ())))


@dataclass
class _SoFar:
    """Filled while reading: the ids of the passages that were read, and of those that gave something, in order; what
    they gave; what every answer cost."""

    reached: set[str] = field(default_factory=set)
    credited: dict[str, None] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    costs: list[Answered] = field(default_factory=list)
    ending: Literal["end", "length", "stopped"] = "end"  # of the answer that was given last
    broken: str = ""  # why the rest could not be read

    def cost(self, began: float, first_text: float, stopped: bool) -> Answered:
        """All that was computed. The first word is that of the answer put together, or else the end."""
        now = time.perf_counter()
        first_ms, took_ms = 1000 * ((first_text or now) - began), 1000 * (now - began)
        tokens = _sum(TokenCounts(0, 0, 0, 0, 0), [cost.tokens for cost in self.costs])
        steps = _sum(Timings(0, 0, 0, 0, 0, 0, 0), [cost.timings for cost in self.costs])
        timings = replace(steps, first_token_ms=first_ms, decode_ms=took_ms - first_ms)
        ratio = self.costs[0].ratio if self.costs else 1.0
        return Answered(tokens, timings, ratio, "stopped" if stopped else self.ending)


_Sums = TypeVar("_Sums", TokenCounts, Timings)


def _sum(zero: _Sums, parts: Sequence[_Sums]) -> _Sums:
    names = [each.name for each in fields(zero)]
    return replace(zero, **{name: sum(getattr(part, name) for part in (zero, *parts)) for name in names})


def asks_for_all(question: str) -> bool:
    """Whether it says so itself: "in all files", or /all before it."""
    return _commanded(question) or _EVERYTHING.search(question) is not None


def bare(question: str) -> str:
    """The question without the command before it, for a model."""
    return question.strip()[len(COMMAND) :].strip() if _commanded(question) else question


def _commanded(question: str) -> bool:
    return question.split(maxsplit=1)[:1] == [COMMAND]


class WholeFolder:
    """One whole-folder question after the other, with a session's engine and settings."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ask(
        self, question: str, within: Within = EVERYWHERE, should_stop: Callable[[], bool] = never
    ) -> Iterator[Event]:
        """Exhaust it. After should_stop() turns true, what was read so far is told and accounted for; so it is when an
        error comes after something was found.

        Raises QuireError when there is nothing to read, and for errors before that.
        """
        began, first_text = time.perf_counter(), 0.0
        asked, so_far = self._asked(question, within), _SoFar()

        def over() -> bool:
            return should_stop() or bool(so_far.broken)

        parts = self._parts(dict(self._counted(asked.passages)))
        yield self._plan(asked, parts)
        with asking(paths.data_dir()):
            yield from self._read_all(asked.question, parts, so_far, over)
            for text in self._together(asked.question, so_far, over):
                first_text = first_text or time.perf_counter()
                yield text
        self._session.engine.catalogue.flush()
        self._session.shelf.trim()
        mentions = tuple(_mention(d, asked.contents.get(d.path, ()), so_far) for d in asked.documents)
        sources = self._session.library.hits(dict.fromkeys(so_far.credited, 0.0), asked.within)
        cost = so_far.cost(began, first_text, over())
        took_ms = 1000 * (time.perf_counter() - began)
        yield Account(mentions, tuple(sources), len(parts), len(so_far.reached), took_ms, over())
        yield cost

    def weigh(self, question: str, within: Within = EVERYWHERE) -> Plan:
        """What ask() would read, by the lengths that the index knows. Raises QuireError when there is nothing."""
        asked, tokens = self._asked(question, within), self._session.library.tokens()
        return self._plan(asked, self._parts({c: tokens[c] for c in asked.passages if c in tokens}))

    # What there is to read

    def _asked(self, question: str, within: Within) -> "_Asked":
        read = self._session.read(bare(question))
        if not read.question.strip():
            raise QuireError("There is no question.", 'Type it in quotes: quire ask --all "What is ...?"')
        place = read.paths or within
        asked = _Asked(read.question, place, self._documents(place), self._session.library.contents())
        if not asked.passages:
            raise QuireError("There is nothing to read.", "Add a folder, or see why files were skipped: quire status")
        return asked

    def _documents(self, within: Within) -> list[StoredDocument]:
        everything = self._session.library.documents()
        if isinstance(within, Everywhere):
            return everything
        places = [within] if isinstance(within, Path) else within
        return [d for d in everything if any(d.path.is_relative_to(place) for place in places)]

    def _counted(self, passages: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Their lengths for the model that is used now, which may not be the one that they were cut for."""
        count = self._session.engine.count_tokens
        for some in batched(passages, _COUNTED_AT_ONCE):
            texts = self._session.library.texts(some)
            yield from ((chunk, count(texts[chunk])) for chunk in some if chunk in texts)

    def _parts(self, tokens: dict[str, int]) -> list[list[tuple[str, int]]]:
        """Passages with their lengths, in groups that fit the context, in the order of the documents."""
        return list(_grouped(list(tokens.items()), self._room))

    @property
    def _room(self) -> int:
        return min(self._session.settings.context_tokens, self._session.engine.limits.context_tokens)

    def _plan(self, asked: "_Asked", parts: Sequence[Sequence[tuple[str, int]]]) -> Plan:
        engine = self._session.engine
        passages = [length for part in parts for _, length in part]
        least_ms = 0.0
        if engine.known_costs is not None:
            first = self._session.library.texts([chunk for chunk, _ in parts[0]])
            request = self._request(asked.question, list(first.values()))
            least_ms = len(parts) * engine.forecast(request).first_token_ms
        leaves = elsewhere.leaves(self._session.settings, whole=True)
        return Plan(len(parts), len(passages), len(asked.documents), sum(passages), least_ms, leaves)

    # Map

    def _read_all(
        self,
        question: str,
        parts: Sequence[Sequence[tuple[str, int]]],
        so_far: _SoFar,
        over: Callable[[], bool],
    ) -> Iterator[Part]:
        began = time.perf_counter()
        for number, part in enumerate(parts, 1):
            if over():
                return
            try:
                answer = self._read(question, [chunk for chunk, _ in part], so_far, over)
            except QuireError as error:
                if not so_far.answers:
                    raise
                so_far.broken = f"{error.message} {error.hint}".strip()
                return
            left_ms = 1000 * (time.perf_counter() - began) / number * (len(parts) - number)
            yield Part(number, len(parts), answer, left_ms)

    @property
    def _partial_tokens(self) -> int:
        return max(1, min(_PARTIAL_TOKENS, self._session.settings.max_tokens, self._room // _PARTIALS_AT_ONCE - 8))

    def _request(self, question: str, passages: Sequence[str]) -> Request:
        from_part = f"{question}\nIf the documents do not say, answer: {_NOTHING}."
        request = replace(self._session.request(from_part, ()), passages=tuple(passages))
        return replace(request, max_tokens=self._partial_tokens)

    def _read(self, question: str, ids: Sequence[str], so_far: _SoFar, should_stop: Callable[[], bool]) -> str:
        """What these passages give, perhaps nothing, noted together with who gave it."""
        texts = self._session.library.texts(ids)
        part = [Chunk(chunk, texts[chunk], 0) for chunk in ids if chunk in texts]  # a file may have changed meanwhile
        if not part:
            return ""
        try:
            answer = self._answer(self._request(question, [chunk.text for chunk in part]), so_far, should_stop)
        except ContextOverflow:
            if self._session.engine.count_tokens(part[0].text) <= self._room:
                raise
            return ""  # cut for a model with a longer context: it stays unreached
        given = drawn_from(answer, question, part)
        if so_far.costs[-1].ending != "stopped":
            so_far.reached.update(chunk.id for chunk in part)
        if not given:
            return ""
        so_far.credited.update((chunk.id, None) for chunk in part if chunk.id in given)
        so_far.answers.append(answer)
        so_far.ending = so_far.costs[-1].ending
        return answer

    def _answer(self, request: Request, so_far: _SoFar, should_stop: Callable[[], bool]) -> str:
        return "".join(event.text for event in self._heard(request, so_far, should_stop)).strip()

    def _heard(self, request: Request, so_far: _SoFar, should_stop: Callable[[], bool]) -> Iterator[Text]:
        """The texts of an answer; what it cost is noted."""
        for event in self._session.engine.answer(request, should_stop):
            if isinstance(event, Text):
                yield event
            elif isinstance(event, Answered):
                so_far.costs.append(event)

    # Reduce

    def _together(self, question: str, so_far: _SoFar, should_stop: Callable[[], bool]) -> Iterator[Text]:
        """The answer from partial ones; a single one is the answer. When it is stopped before, they themselves."""
        partials = so_far.answers
        while len(partials) > 1 and not should_stop():
            groups = self._groups(partials)
            if len(groups) == 1:
                yield from self._heard(self._reducing(question, partials), so_far, should_stop)
                so_far.ending = so_far.costs[-1].ending
                return
            short = [replace(self._reducing(question, group), max_tokens=self._partial_tokens) for group in groups]
            answers = [self._answer(request, so_far, should_stop) for request in short]
            partials = [answer or group[0] for answer, group in zip(answers, groups, strict=True)]
        if should_stop():
            partials = so_far.answers
        if len(partials) > 1:
            yield Text("\n".join(f"- {' '.join(partial.split())}" for partial in partials))
        elif partials or not should_stop():
            yield Text(partials[0] if partials else "The documents say nothing about it.")

    def _groups(self, partials: Sequence[str]) -> list[list[str]]:
        """As many as fit together, and two at least, so that they become fewer."""
        count = self._session.engine.count_tokens
        groups = list(_grouped([(text, count(text)) for text in partials], self._room))
        if len(groups) == len(partials):
            return [list(partials[start : start + 2]) for start in range(0, len(partials), 2)]
        return [[text for text, _ in group] for group in groups]

    def _reducing(self, question: str, partials: Sequence[str]) -> Request:
        """Read in full: nothing of it will be asked for again, so it is not worth storing."""
        request = self._session.request(question, ())
        return replace(request, passages=tuple(partials), ratio=1.0)


def _grouped(items: Sequence[tuple[_Item, int]], room: int) -> Iterator[list[tuple[_Item, int]]]:
    """Consecutive ones, each with its length, that have room together; one that has none stands alone."""
    group, left = list[tuple[_Item, int]](), room
    for item, length in items:
        if group and length > left:
            yield group
            group, left = [], room
        group.append((item, length))
        left -= length
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
    if not so_far.credited.keys().isdisjoint(chunks):
        return Mention(document.path, "contributed")
    if so_far.reached.issuperset(chunks):
        return Mention(document.path, "nothing")
    return Mention(document.path, "not reached", so_far.broken)
