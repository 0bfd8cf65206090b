"""Which runtime executes plans on this machine, and why. Imports a runtime only when it is wanted."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quire_engine.errors import ModelError
from quire_engine.runtimes.base import Runtime
from quire_engine.types import ModelShape

if TYPE_CHECKING:
    from quire_engine.runtimes.transformer import Transformer


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


def reference(model_file: Path) -> "Transformer":
    """The decoder that precision plans are measured with. Raises ModelError where PyTorch is not installed."""
    try:
        from quire_engine.runtimes.transformer import Transformer
    except ImportError as error:
        raise ModelError(
            "Precision plans need PyTorch, which is not installed here.",
            "Install it beside Quire (pip install torch); everything else works without.",
            repr(error),
        ) from error
    return Transformer.load(model_file)
