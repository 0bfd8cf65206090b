"""Which form of a kernel runs: Triton's where a graphics device and a compiler work, else PyTorch's operations.

A kernel's caller may force one with `form`, a person with QUIRE_KERNELS=triton or torch; the caller outranks the
person. Triton's interpreter (TRITON_INTERPRET=1), which is for tests, is only ever used when forced.
Knows nothing of what the kernels compute.
"""

import functools
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Form = Literal["triton", "torch"]
Wish = Literal["auto", "triton", "torch"]

VARIABLE = "QUIRE_KERNELS"


def choose(device: "torch.device", wish: Wish = "auto") -> Form:
    """The form for tensors on this device.

    Raises ValueError when Triton is forced and cannot run there, or when QUIRE_KERNELS is misspelt.
    """
    wish = _asked() if wish == "auto" else wish
    if wish == "torch":
        return "torch"
    if wish == "triton" and interpreted():
        return "triton"
    reason = _why_not(device.type)
    if wish == "triton" and reason:
        raise ValueError(f"Triton's kernels were asked for on {device}, but {reason}")
    return "torch" if reason else "triton"


def why() -> str:
    """A sentence for `quire doctor`: which form runs on this machine's graphics device, and why. Never raises."""
    try:
        asked = _asked()
    except ValueError as error:
        return f"Kernels: {error}."
    reason = f"{VARIABLE}=torch asks for them" if asked == "torch" else _why_not("cuda")
    if reason:
        return f"Kernels: PyTorch's operations, because {reason}."
    import torch
    import triton

    return f"Kernels: Triton {triton.__version__} on {torch.cuda.get_device_name()}."


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted, on any device and slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _asked() -> Wish:
    asked = os.environ.get(VARIABLE, "") or "auto"
    if asked not in ("auto", "triton", "torch"):
        raise ValueError(f"{VARIABLE} is triton, torch or auto, not {asked!r}")
    return asked  # type: ignore[return-value]


@functools.cache
def _why_not(device_type: str) -> str:
    """Why Triton's kernels do not run on such a device, as the end of a sentence; empty when they do."""
    if find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    if device_type != "cuda" or not torch.cuda.is_available():  # ROCm calls itself cuda too
        return "there is no CUDA or ROCm device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return "TRITON_INTERPRET is set"
    return _trial()


def _trial() -> str:
    """What goes wrong when a kernel is compiled and run, shortly: a missing C compiler, an old device or driver."""
    try:
        from quire_kernels import triton_trial

        triton_trial.run()
    except Exception as error:  # whatever it is, PyTorch's operations still work
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"a first kernel failed ({lines[0][:200]})"
    return ""
