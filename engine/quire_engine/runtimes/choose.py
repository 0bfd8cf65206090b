"""Which runtime executes plans on this machine, and why. Imports a runtime only when it is wanted."""

from pathlib import Path
from typing import Protocol

from quire_engine.runtimes.base import Runtime
from quire_engine.types import ModelShape


class Vocabulary(Protocol):
    """What can be done with a model's tokens without its weights."""

    @property
    def end_text(self) -> str: ...
    def tokenize(self, text: str, special: bool = False, start: bool = False) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


def vocabulary(model_file: Path) -> Vocabulary:
    """The tokenizer alone: loads in milliseconds."""
    from quire_engine.runtimes.llama_context import LlamaModel

    return LlamaModel(model_file, vocabulary_only=True)


def runtime(model_file: Path, shape: ModelShape, threads: int, stitching: bool) -> Runtime:
    """The runtime with the model's weights. stitching: whether stored KV will be used with it."""
    from quire_engine.runtimes.llama_context import LlamaModel
    from quire_engine.runtimes.llama_cpp import LlamaCppRuntime

    return LlamaCppRuntime(LlamaModel(model_file), shape, threads, stitching)
