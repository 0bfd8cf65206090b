"""From a chat template and texts to prompt segments: preamble, chunks, question.

Documents stand inside the user's turn, before the question. Each segment is tokenized by itself, and text that is not
ours (documents, questions) never becomes a control token. Knows nothing of KV.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jinja2 import TemplateError
from jinja2.exceptions import TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire_engine.errors import ModelError

_DOCUMENTS, _QUESTION = "\x1adocuments\x1a", "\x1aquestion\x1a"  # stand-ins that no template or text contains


class Tokenizer(Protocol):
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
        self._wording = wording
        head, between, tail = _frame(template, wording)
        self.preamble = tuple(tokenizer.tokenize(head, special=True, start=True))
        self._between = tokenizer.tokenize(between, special=True) if between else []
        self._tail = tokenizer.tokenize(tail, special=True)

    def chunk(self, text: str) -> tuple[int, ...]:
        """A passage as it stands in every prompt: the blank line after it belongs to it."""
        return tuple(self._tokenizer.tokenize(text.strip() + "\n\n"))

    def question(self, text: str) -> tuple[int, ...]:
        words = self._wording.question.format(question=text.strip())
        return (*self._between, *self._tokenizer.tokenize(words), *self._tail)


def _frame(template: str, wording: Wording) -> tuple[str, str, str]:
    """Text before the documents, between documents and question, and after the question."""
    if not template:  # a base model: nothing but the shape of a question and its answer
        return "", "", "\nAnswer:"
    body = wording.opening + _DOCUMENTS + _QUESTION
    try:
        try:
            text = _render(template, [("system", wording.system), ("user", body)])
        except TemplateRuntimeError:  # several templates refuse a system turn
            text = _render(template, [("user", f"{wording.system}\n\n{body}")])
    except TemplateError as error:
        raise ModelError(
            f"The model's chat template cannot be used: {error}.", "Try another model.", template
        ) from error
    head, documents, rest = text.partition(_DOCUMENTS)
    between, question, tail = rest.partition(_QUESTION)
    if not documents or not question:
        raise ModelError("The model's chat template drops the user's text.", "Try another model.", template)
    return head, between, tail


def _render(template: str, turns: Sequence[tuple[str, str]]) -> str:
    # No clock is offered: a date in the system prompt would make every day's preamble, and so all stored KV, new.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    messages = [{"role": role, "content": content} for role, content in turns]
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
    )


def _refuse(message: str) -> None:
    raise TemplateRuntimeError(message)
