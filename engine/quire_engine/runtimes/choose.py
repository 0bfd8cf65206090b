"""Which runtime executes plans on this machine, and why. Imports a runtime only when it is wanted."""

import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.gguf import Gguf
from quire_engine.runtimes.base import Runtime
from quire_engine.types import ModelShape

if TYPE_CHECKING:
    from quire_engine.runtimes.torch_device import Device
    from quire_engine.runtimes.transformer import Transformer

AUTO, LLAMA_CPP, TORCH, OPENAI = NAMES = ("auto", "llama.cpp", "torch", "openai")
_DEVICE_FILES = (
    "/dev/nvidiactl",
    "/dev/kfd",
    "/dev/dxg",
)  # of NVIDIA's and AMD's drivers, and Windows' for Linux in it
BYTES_PER_WEIGHT = 2
_SHARE_FOR_WEIGHTS = 0.8  # of a device's free memory; the rest is for KV
_LEAST_REST_BYTES = 3 << 29  # without which torch_device refuses weights


class Vocabulary(Protocol):
    """What can be done with a model's tokens without its weights."""

    @property
    def end_text(self) -> str: ...
    def tokenize(self, text: str, special: bool = False, start: bool = False) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


@dataclass(frozen=True)
class Choice:
    """runtime: one of NAMES but AUTO.  device: what it computes on, "cpu", "cuda" or "server"; for llama.cpp empty.
    reason: a sentence for a person."""

    runtime: str
    device: str
    reason: str

    @property
    def record(self) -> str:
        """What tells names of records of measurements with it from others'; empty for llama.cpp."""
        return f".{self.runtime}-{self.device}" if self.device else ""


BY_LLAMA_CPP = Choice(LLAMA_CPP, "", "Runtime: llama.cpp, as the setting says.")
BY_SERVER = Choice(OPENAI, "server", "Runtime: a server that speaks OpenAI's protocol, as the setting says.")


def choose(wish: str, model: Gguf) -> Choice:
    """The runtime for a model on this machine. wish: one of NAMES. Imports PyTorch only where it may be of use."""
    if wish == LLAMA_CPP:
        return BY_LLAMA_CPP
    if wish == OPENAI:
        return BY_SERVER
    if reason := gguf.why_not_stitchable(model) or _why_not_read(model):
        return Choice(LLAMA_CPP, "", f"Runtime: llama.cpp. {reason}")
    found = device()
    needed = _weight_bytes(model, found.keeps_blocks) if found else 0
    fits = found is not None and needed <= room_for_weights(found.free_bytes)
    if found and (fits or wish == TORCH):
        return Choice(TORCH, "cuda", f"Runtime: PyTorch on {found.title}.")
    if wish == TORCH:
        return Choice(TORCH, "cpu", "Runtime: PyTorch on the processor, as the setting says; there is no other device.")
    if found:
        sizes = f"{needed / 1e9:.1f} GB for weights alone; {found.free_bytes / 1e9:.1f} GB are free"
        return Choice(LLAMA_CPP, "", f"Runtime: llama.cpp, since {found.title} has too little memory ({sizes}).")
    return Choice(LLAMA_CPP, "", "Runtime: llama.cpp, since PyTorch finds no CUDA or ROCm device.")


def device() -> "Device | None":
    """The graphics device that PyTorch finds; it is asked only where there is a driver, for importing takes seconds."""
    windows = sys.platform == "win32" and shutil.which("nvidia-smi")
    if find_spec("torch") is None or not (windows or any(Path(file).exists() for file in _DEVICE_FILES)):
        return None
    from quire_engine.runtimes import torch_device

    return torch_device.find()


def room_for_weights(free_bytes: int) -> float:
    """How many bytes weights may take of a device's free memory."""
    return min(_SHARE_FOR_WEIGHTS * free_bytes, free_bytes - _LEAST_REST_BYTES)


def _weight_bytes(model: Gguf, blocks: bool) -> int:
    from quire_engine.runtimes import weights

    return weights.kept_bytes(model, BYTES_PER_WEIGHT, blocks)


def _why_not_read(model: Gguf) -> str:
    if any("_exps." in name for name in model.tensors):
        return "The PyTorch runtime does not read mixtures of experts."
    return ""


def vocabulary(model_file: Path) -> Vocabulary:
    """The tokenizer alone: loads in milliseconds."""
    from quire_engine.runtimes.llama_context import LlamaModel

    return LlamaModel(model_file, vocabulary_only=True)


def runtime(
    model_file: Path,
    shape: ModelShape,
    threads: int,
    stitching: bool,
    choice: Choice = BY_LLAMA_CPP,
    live_window: int = 0,
) -> Runtime:
    """The runtime with the model's weights. stitching: whether stored KV will be used with it.  live_window: see
    `TorchRuntime.load`; llama.cpp has none."""
    if choice.runtime == OPENAI:
        raise ModelError("This needs a model that computes on this computer.", "Say: quire --runtime llama.cpp ...")
    if choice.runtime == TORCH:
        try:
            from quire_engine.runtimes.torch_gpu import TorchRuntime
        except ImportError as error:
            raise _without_torch("The torch runtime needs", error) from error
        return TorchRuntime.load(model_file, choice.device, threads, live_window)
    from quire_engine.runtimes.llama_context import LlamaModel
    from quire_engine.runtimes.llama_cpp import LlamaCppRuntime

    return LlamaCppRuntime(LlamaModel(model_file), shape, threads, stitching)


def reference(model_file: Path) -> "Transformer":
    """The decoder that precision plans are measured with. Raises ModelError where PyTorch is not installed."""
    try:
        from quire_engine.runtimes.transformer import Transformer
    except ImportError as error:
        raise _without_torch("Precision plans need", error) from error
    return Transformer.load(model_file)


def _without_torch(needs: str, error: ImportError) -> ModelError:
    return ModelError(
        f"{needs} PyTorch, which is not installed here.",
        "Install it beside Quire (pip install torch); everything else works without.",
        repr(error),
    )
