"""The graphics device that PyTorch computes on: is there one, and does a model with its context fit into its memory?

Knows nothing of models' layers or of plans.
"""

from dataclasses import dataclass

import torch

from quire_engine.errors import ContextOverflow, ModelError

SPARE_BYTES = 1 << 30  # what a driver, its kernels and their scratch take beside weights and KV


@dataclass(frozen=True)
class Device:
    """title: as its maker calls it.  free_bytes: of its memory."""

    title: str
    free_bytes: int


def find() -> Device | None:
    """The CUDA or ROCm device; None where there is none that PyTorch can use."""
    if not torch.cuda.is_available():  # ROCm calls itself cuda too
        return None
    return Device(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0])


def number_type(device: torch.device) -> torch.dtype:
    """What weights and KV are kept in."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken; None where nobody counts it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_weights(weight_bytes: int, free: int | None) -> None:
    """Raises ModelError when weights do not fit with a little room for KV."""
    if free is not None and weight_bytes + SPARE_BYTES > free:
        raise ModelError(
            f"The model takes {_gigabytes(weight_bytes)} of the graphics device's memory, of which "
            f"{_gigabytes(free)} are free.",
            "Close what else uses it, choose a smaller model, or set runtime to llama.cpp.",
        )


def check_rows(row_bytes: int, rows: int, free: int | None) -> None:
    """Raises ContextOverflow when so many more rows of KV do not fit."""
    if free is not None and row_bytes * rows + SPARE_BYTES // 2 > free:
        most = max(0, free - SPARE_BYTES // 2) // row_bytes
        raise ContextOverflow(
            f"The question and its passages need {_gigabytes(row_bytes * rows)} of the graphics device's memory for "
            f"their KV; {_gigabytes(free)} are free.",
            f"Ask with fewer passages (--context-tokens): some {most:,} tokens fit. Or set runtime to llama.cpp.",
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
