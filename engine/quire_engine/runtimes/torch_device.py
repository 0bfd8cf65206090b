"""The graphics device that PyTorch computes on: is there one, and does a model with its context fit into its memory?

Knows nothing of models' layers or of plans.
"""

from dataclasses import dataclass

import torch

from quire_engine.errors import ContextOverflow, ModelError
from quire_kernels import dispatch

# Beside weights and KV: a layer's results for 4,096 tokens, .6 GB with 8 billion parameters, and what libraries take.
WORK_BYTES = 1 << 30
_LEAST_KV_BYTES = 1 << 29  # for a few passages


@dataclass(frozen=True)
class Device:
    """title: as its maker calls it.  free_bytes: of its memory.  keeps_blocks: see below."""

    title: str
    free_bytes: int
    keeps_blocks: bool = False


def find() -> Device | None:
    """The CUDA or ROCm device; None where there is none that PyTorch can use."""
    if not torch.cuda.is_available():  # ROCm calls itself cuda too
        return None
    return Device(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0], keeps_blocks(torch.device("cuda")))


def number_type(device: torch.device) -> torch.dtype:
    """What weights and KV are kept in."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def keeps_blocks(device: torch.device) -> bool:
    """Whether weights stay quantised there: without a kernel that unpacks them while it multiplies, every token would
    write all of them to memory, and wait for that far longer than for 16-bit numbers."""
    return device.type == "cuda" and dispatch.choose(device) == "triton"


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken; None where nobody counts it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_weights(weight_bytes: int, free: int | None) -> None:
    """Raises ModelError when weights do not fit with a little room for KV."""
    if free is not None and weight_bytes + WORK_BYTES + _LEAST_KV_BYTES > free:
        raise ModelError(
            f"The model takes {_gigabytes(weight_bytes)} of the graphics device's memory, of which "
            f"{_gigabytes(free)} are free.",
            "Close what else uses it, choose a smaller model, or set runtime to llama.cpp.",
        )


def check_rows(row_bytes: int, there: int, wanted: int, free: int | None, step: int = 1) -> None:
    """Raises ContextOverflow when KV buffers cannot grow from so many rows to so many, in steps of so many."""
    more = row_bytes * (wanted - there)
    if free is None or more + WORK_BYTES <= free:
        return
    most = there + max(0, free - WORK_BYTES) // row_bytes // step * step
    raise ContextOverflow(
        f"Conversation, passages and answer need room for {wanted:,} tokens: {_gigabytes(more)} more of the "
        f"graphics device's memory, of which {_gigabytes(free)} are free.",
        f"Ask with fewer passages (--context-tokens) or in a new conversation: {most:,} tokens fit. Or set runtime to "
        "llama.cpp.",
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
