"""From a chat template and texts to prompt segments: preamble or bridge, chunks, question, answer.

Documents stand inside the user's turn, before the question. Each segment is tokenized by itself, and text that is not
ours (documents, questions, answers) never becomes a control token. Knows nothing of KV.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Protocol

from jinja2 import TemplateError
from jinja2.exceptions import TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire_engine.errors import ModelError
from quire_engine.words import Words

# Stand-ins that no template or text contains.
_DOCUMENTS, _QUESTION, _ANSWER = "\x1adocuments\x1a", "\x1aquestion\x1a", "\x1aanswer\x1a"
_REMEMBERED = 1024  # passages, some 10 MB: each is counted, addressed and laid out one after the other


class Tokenizer(Protocol):
    @property
    def end_text(self) -> str:
        """How the token that ends a text is written; templates put it behind an answer."""

    def tokenize(self, text: str, special: bool = False, start: bool = False) -> list[int]:
        """Token ids; special: control tokens are read; start: BOS in front where the model wants one."""


@dataclass(frozen=True)
class Wording:
    """The words around documents and question. `question` holds the placeholder {question}."""

    system: str
    opening: str = "Documents:\n\n"
    question: str = "Question: {question}"


class PromptWriter:
    """Writes the segments of every prompt for one model and one wording."""

    def __init__(self, tokenizer: Tokenizer, template: str, wording: Wording) -> None:
        self._tokenizer = tokenizer
        self._tokens = lru_cache(_REMEMBERED)(Words(tokenizer).tokenize)
        self._wording = wording
        head, between, tail = _frame(template, wording)
        self.preamble = tuple(tokenizer.tokenize(head, special=True, start=True))
        self._between = tokenizer.tokenize(between, special=True) if between else []
        self._tail = tokenizer.tokenize(tail, special=True)
        self._bridges = {
            documents: tuple(
                tokenizer.tokenize(_bridge(template, wording, documents, tokenizer.end_text), special=True)
            )
            for documents in (True, False)
        }

    def chunk(self, text: str) -> tuple[int, ...]:
        """A passage as it stands in every prompt: the blank line after it belongs to it."""
        return self._tokens(text.strip() + "\n\n")

    def bridge(self, documents: bool) -> tuple[int, ...]:
        """From an answer to the next turn's passages, or to its question when it brings none."""
        return self._bridges[documents]

    def answer(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.tokenize(text))

    def question(self, text: str) -> tuple[int, ...]:
        words = self._wording.question.format(question=text.strip())
        return (*self._between, *self._tokenizer.tokenize(words), *self._tail)


def _frame(template: str, wording: Wording) -> tuple[str, str, str]:
    """Text before the documents, between documents and question, and after the question."""
    if not template:  # a base model: nothing but the shape of a question and its answer
        return "", "", "\nAnswer:"
    text = _conversation(template, wording, [wording.opening + _DOCUMENTS + _QUESTION])
    head, documents, rest = text.partition(_DOCUMENTS)
    between, question, tail = rest.partition(_QUESTION)
    if not documents or not question:
        raise ModelError("The model's chat template drops the user's text.", "Try another model.", template)
    return head, between, tail


def _bridge(template: str, wording: Wording, documents: bool, end: str) -> str:
    """Text between an answer and what follows it in the next user turn; a blank line where a template knows none."""
    opening = wording.opening if documents else ""
    text = _conversation(template, wording, [_QUESTION, _ANSWER, opening + _DOCUMENTS], end) if template else ""
    bridge, found, _ = text.partition(_ANSWER)[2].partition(_DOCUMENTS)
    return bridge if found else f"\n\n{opening}"


def _conversation(template: str, wording: Wording, turns: Sequence[str], end: str = "") -> str:
    """The template's text of turns that alternate between user and assistant."""
    spoken = list(zip(cycle(("user", "assistant")), turns, strict=False))
    try:
        try:
            return _render(template, [("system", wording.system), *spoken], end)
        except TemplateRuntimeError:  # several templates refuse a system turn
            return _render(template, [("user", f"{wording.system}\n\n{turns[0]}"), *spoken[1:]], end)
    except TemplateError as error:
        raise ModelError(
            f"The model's chat template cannot be used: {error}.", "Try another model.", template
        ) from error


def _render(template: str, turns: Sequence[tuple[str, str]], end: str) -> str:
    # No clock is offered: a date in the system prompt would make every day's preamble, and so all stored KV, new.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    messages = [{"role": role, "content": content} for role, content in turns]
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token="", eos_token=end
    )


def _refuse(message: str) -> None:
    raise TemplateRuntimeError(message)
