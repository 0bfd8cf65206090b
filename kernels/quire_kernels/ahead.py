"""Every Triton kernel compiled ahead of time, for devices that need not be here: what it takes of each.

Each triton_*.py lists in BUILDS the forms of its kernels that matter. They have to compile without TRITON_INTERPRET in
the environment when Triton is imported. Knows nothing of what the kernels compute.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = ("triton_place", "triton_pack", "triton_probe", "triton_attention", "triton_decode", "triton_gguf")
CUDA = ("sm_80", "sm_86", "sm_89", "sm_90")
HIP = ("gfx1100",)
TARGETS = CUDA + HIP


@dataclass(frozen=True)
class Build:
    """One form of a kernel.

    types: of its arguments that are no constants, in Triton's words ("*fp16", "i32", "fp32").  unaligned: those
    pointers and numbers that need not be multiples of 16; the others are, as mostly when PyTorch allocates.
    stages: of loops that load ahead; 0 is what Triton takes for the target, two on AMD's.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    unaligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 0


@dataclass(frozen=True)
class Figures:
    """What one thread takes: registers (AMD: vector registers) and bytes that did not fit into them; and a block's
    shared memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def builds(modules: Sequence[str] = MODULES) -> Iterator[Build]:
    """Of those modules that are there."""
    here = Path(__file__).parent
    for module in modules:
        if (here / f"{module}.py").exists():
            yield from importlib.import_module(f"quire_kernels.{module}").BUILDS


def compile_for(build: Build, target: str) -> Figures:
    """Compiles to machine code for one of TARGETS. Raises what Triton raises when it cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {name: build.types.get(name, "constexpr") for name in names}
    if set(names) != set(build.types) | set(build.constants):
        raise ValueError(f"{build.name}: types and constants do not name all of {names}")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in build.unaligned and build.types.get(name, "fp").startswith(("*", "i"))
    }
    gpu = GPUTarget("hip", target, 32) if target in HIP else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(
        ASTSource(build.kernel, signature, dict(build.constants), aligned),
        target=gpu,
        options={"num_warps": build.warps, **({"num_stages": build.stages} if build.stages else {})},
    )
    shared = int(compiled.metadata.shared)
    if target in HIP:
        return Figures(*_of_assembly(compiled.asm["amdgcn"]), shared)
    return Figures(*_of_cubin(compiled.asm["cubin"]), shared)


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of an NVIDIA binary, as the cuobjdump that comes with Triton tells them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"\bREG:(\d+)", usage), _number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage)


def _of_assembly(assembly: str) -> tuple[int, int]:
    """Registers and spilled bytes that AMD's assembly names."""
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern} in what the compiler says")
    return int(found[1])
