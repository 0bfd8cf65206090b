"""A conversation outside the database: what it consists of, and how it is written as Markdown and as JSON.

Knows nothing of SQLite, of models or of screens, and interprets no text. Markdown is for reading and is never read
back. JSON holds everything; its format has a version, and what it was written from can be restored from it. The history
(history.py) keeps sources and costs in the same JSON.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

from quire_engine.errors import QuireError
from quire_engine.types import Forecast, Timings, TokenCounts

ROOT: Final = 0  # the parent of a first turn; no turn has this id
Ending = Literal["end", "length", "stopped", "lost"]  # lost: no end was recorded, by a crash or because it is not over
Share = Literal["contributed", "nothing", "unreadable", "not reached"]

_TITLE_CHARACTERS = 60
_FORMAT = "quire.conversation"
_FORMAT_VERSION = 1
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)  # by text of another kind


@dataclass(frozen=True)
class Source:
    """A passage that went into the prompt, as it was then; the file may have changed since. score: as searched."""

    path: Path
    start_line: int
    end_line: int
    heading: str
    text: str
    score: float
    place: str = ""


@dataclass(frozen=True)
class Mention:
    """A document and what became of it in a question to all of them. reason: why it was not read; else empty."""

    path: Path
    state: Share
    reason: str = ""


@dataclass(frozen=True)
class Truth:
    """What one answer cost: the engine's numbers, the search before it, and what had been predicted."""

    search_ms: float
    predicted: Forecast
    tokens: TokenCounts
    timings: Timings
    ratio: float


UNMEASURED: Final = Truth(
    search_ms=0.0,
    predicted=Forecast(0, 0, 0.0, "", 0.0, 0.0),
    tokens=TokenCounts(0, 0, 0, 0, 0),
    timings=Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    ratio=0.0,
)


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which may be partial or empty. parent: the turn before it, or ROOT.  documents: where
    all were asked, each of them."""

    id: int
    conversation: int
    parent: int
    question: str
    answer: str
    ending: Ending
    sources: tuple[Source, ...]
    truth: Truth
    model: str
    created_at: datetime
    documents: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A conversation without its texts. turns: how many, all branches.  leaf: where it was left; ROOT: at its start.

    title: one line, empty before the first question.  updated_at: of the last question or answer.
    """

    id: int
    title: str
    turns: int
    leaf: int
    created_at: datetime
    updated_at: datetime


def title(text: str) -> str:
    """The text in one line, shortened at a word."""
    line = " ".join(text.split())
    if len(line) <= _TITLE_CHARACTERS:
        return line
    word_end = line.rfind(" ", 0, _TITLE_CHARACTERS)
    keeps_most = word_end > _TITLE_CHARACTERS // 2
    return line[: word_end if keeps_most else _TITLE_CHARACTERS - 1] + "…"


# Markdown


def to_markdown(conversation: Conversation, line: Sequence[Turn]) -> str:
    """A line of turns with its sources, for reading.

    Quoted and fenced, so that no text of a document or a model passes for another part. Control characters are kept:
    this is for a file, not for a terminal.
    """
    parts = [f"# {_escaped(conversation.title)}"]
    for number, turn in enumerate(line, 1):
        parts += _turn_in_markdown(number, turn)
    return "\n\n".join(parts) + "\n"


def _turn_in_markdown(number: int, turn: Turn) -> list[str]:
    about = f"{turn.created_at:%Y-%m-%d %H:%M} UTC, {_code(turn.model or 'unknown model')}"
    if turn.ending != "end":
        about += f", ending: {turn.ending}"
    parts = [f"## Question {number}", _quoted(turn.question), about, "### Answer", _quoted(turn.answer)]
    if turn.sources:
        parts.append("### Sources")
    for source in turn.sources:
        lines = f"lines {source.start_line}-{source.end_line}"
        place = f"{_code(str(source.path))}, {_escaped(source.place) or lines}"
        heading = _escaped(source.heading)
        parts += [f"{place}: {heading}" if heading else place, _fenced(source.text)]
    if turn.documents:
        parts += ["### Documents", "\n".join(map(_mention_in_markdown, turn.documents))]
    return parts


def _mention_in_markdown(mention: Mention) -> str:
    reason = f" ({_escaped(mention.reason)})" if mention.reason else ""
    return f"- {_code(str(mention.path))}: {mention.state}{reason}"


def _quoted(text: str) -> str:
    """As a block quote: what is opened inside it, a fence or a heading, ends with it."""
    return "\n".join(f"> {line}" for line in re.split(r"\r\n|\r|\n", text))


def _fenced(text: str) -> str:
    """As a block of code."""
    fence = _ticks(text, at_least=3)
    return f"{fence}\n{text}\n{fence}"


def _code(text: str) -> str:
    """As code within a line."""
    line = " ".join(text.splitlines())
    fence = _ticks(line, at_least=1)
    return f"{fence} {line} {fence}"


def _ticks(text: str, at_least: int) -> str:
    """A fence of backticks, longer than any in the text."""
    runs = re.findall("`+", text)
    return "`" * max([at_least, *(len(run) + 1 for run in runs)])


def _escaped(text: str) -> str:
    """As plain words within a line."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_<>\[\]#&|~])", r"\\\1", line)


# JSON, whole conversations


def to_json(conversation: Conversation, turns: Sequence[Turn]) -> str:
    """The whole tree with everything that is known of it, for from_json. Turns are numbered from 1.

    turns: all of the conversation, every turn after its parent.
    """
    numbers = {ROOT: ROOT} | {turn.id: number for number, turn in enumerate(turns, 1)}
    tree = [replace(turn, id=numbers[turn.id], conversation=1, parent=numbers[turn.parent]) for turn in turns]
    exported = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "id": 1,
        "title": conversation.title,
        "turns": tree,
        "leaf": numbers[conversation.leaf],
        "created_at": conversation.created_at,
        "updated_at": conversation.updated_at,
    }
    return pack(exported, indent=2) + "\n"


def from_json(text: str) -> tuple[Conversation, list[Turn]]:
    """What to_json wrote, with its numbers for ids. QuireError when it is anything else, or not a tree."""
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise ValueError(data["format"])
        if data["version"] > _FORMAT_VERSION:
            raise QuireError("This conversation was exported by a newer Quire.", "Update Quire.")
        name = _checked(str, data["title"])
        created_at, updated_at = from_stamp(data["created_at"]), from_stamp(data["updated_at"])
        turns = [turn_from(turn) for turn in data["turns"]]
        _check_tree(turns, data["leaf"])
        return Conversation(1, name, len(turns), data["leaf"], created_at, updated_at), turns
    except _REFUSALS as error:
        message = "This is no conversation that Quire exported, or it is damaged; nothing was imported."
        raise QuireError(message, "Export it again as JSON.", repr(error)) from error


def _check_tree(turns: Sequence[Turn], leaf: Any) -> None:
    """Every number is used once and comes after its parent's, and the leaf is one of them. ValueError otherwise."""
    seen = {ROOT}
    for turn in turns:
        if turn.id in seen or turn.parent not in seen or turn.ending not in get_args(Ending):
            raise ValueError(turn)
        seen.add(turn.id)
    if leaf not in seen:
        raise ValueError(leaf)


# JSON, values. Whatever reads them raises ValueError, TypeError or KeyError when they are damaged.


def pack(value: object, indent: int | None = None) -> str:
    """As JSON. Dataclasses become objects; paths and moments become text."""

    def as_plain(value: Any) -> object:
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        return to_stamp(value) if isinstance(value, datetime) else str(value)

    return json.dumps(value, default=as_plain, ensure_ascii=False, indent=indent)


def to_stamp(moment: datetime) -> str:
    """In UTC and always as long, so that stamps sort as the moments do."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def from_stamp(stamp: Any) -> datetime:
    return datetime.fromisoformat(stamp).astimezone(UTC)


def turn_from(stored: Any) -> Turn:
    """A turn from its JSON object. That the ending is one of Ending is not checked."""
    return Turn(
        id=_checked(int, stored["id"]),
        conversation=_checked(int, stored["conversation"]),
        parent=_checked(int, stored["parent"]),
        question=_checked(str, stored["question"]),
        answer=_checked(str, stored["answer"]),
        ending=_checked(str, stored["ending"]),
        sources=tuple(_source_from(source) for source in stored["sources"]),
        truth=_measured(UNMEASURED, stored["truth"]),
        model=_checked(str, stored["model"]),
        created_at=from_stamp(stored["created_at"]),
        documents=tuple(_mention_from(mention) for mention in stored.get("documents", ())),
    )


def _mention_from(stored: Any) -> Mention:
    state = _checked(str, stored["state"])
    if state not in get_args(Share):
        raise ValueError(state)
    return Mention(Path(_checked(str, stored["path"])), state, _checked(str, stored["reason"]))


def _source_from(stored: Any) -> Source:
    return Source(
        path=Path(_checked(str, stored["path"])),
        start_line=_checked(int, stored["start_line"]),
        end_line=_checked(int, stored["end_line"]),
        heading=_checked(str, stored["heading"]),
        text=_checked(str, stored["text"]),
        score=_checked(float, stored["score"]),
        place=_checked(str, stored.get("place", "")),  # of old, every source had lines
    )


def _measured(unmeasured: Any, stored: Any) -> Any:
    """What the engine measured, a dataclass of the same kind as `unmeasured`, perhaps with others inside.

    The engine's numbers change from version to version: one that was not measured yet when this was stored is taken
    from `unmeasured`, and one that is not measured any more is left out.
    """
    values: dict[str, Any] = {}
    for name in [field.name for field in fields(unmeasured) if field.name in stored]:
        default = getattr(unmeasured, name)
        if is_dataclass(default):
            values[name] = _measured(default, stored[name])
        else:
            values[name] = _checked(type(default), stored[name])
    return replace(unmeasured, **values)


def _checked(kind: type, value: Any) -> Any:
    """The value, of exactly this kind: True is no number. Some programs write 1.0 as 1."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(value)
    return value
