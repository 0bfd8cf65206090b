"""The parts of the measurement in their order, each with its share of the time, and what none of them may break.

On a graphics device a part runs in a process of its own: a kernel that writes where it must not spoils a process's
device for good, and one that never ends can only be killed. Knows nothing of what parts measure.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quire_engine.bench_gpu import (
    caching,
    correctness,
    decoding,
    kernels,
    machine,
    parity,
    stitching,
    throughput,
)
from quire_engine.bench_gpu.clock import Bench, Rates

Result = dict[str, object]

GRACE = 20.0  # seconds that a process may take beyond its part's, for starting and for the last run
_RATES = "rates.json"


@dataclass(frozen=True)
class Part:
    """share: of the whole time."""

    name: str
    share: float
    measure: Callable[[Bench], Result]


PARTS = (
    Part("machine", 0.04, machine.measure),
    Part("correctness", 0.12, correctness.measure),
    Part("parity", 0.04, parity.measure),
    Part("kernels", 0.10, kernels.measure),
    Part("first token, 16-bit weights", 0.26, stitching.measure_16_bit),
    Part("decoding", 0.10, decoding.measure),
    Part("throughput", 0.12, throughput.measure),
    Part("caching", 0.06, caching.measure),
    Part("first token, Q4_K weights", 0.16, stitching.measure_q4_k),
)


@dataclass(frozen=True)
class Run:
    """until: when everything has to be done, by `time.monotonic`.  isolated: a process for each part."""

    device: str
    quick: bool
    folder: Path
    until: float
    isolated: bool


def measure(run: Run, names: list[str]) -> dict[str, Result]:
    """The parts of these names; one that fails says how in place of its result, and the others go on."""
    found, parts = dict[str, Result](), [part for part in PARTS if part.name in names]
    for number, part in enumerate(parts):
        left = run.until - time.monotonic()
        seconds = max(0.0, left) * part.share / sum(other.share for other in parts[number:])
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        began = time.monotonic()
        result = _in_process(run, part, seconds) if run.isolated else here(run, part, seconds)
        result["seconds"] = round(time.monotonic() - began, 1)
        found[part.name] = result
        if error := result.get("error"):
            print(f"  failed: {error}", flush=True)
    return found


def here(run: Run, part: Part, seconds: float) -> Result:
    """In this process. What the machine can do is left in the folder for the parts that follow."""
    until = time.monotonic() + seconds
    try:
        device = torch.device(run.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # which tensors there say they are on
        result = part.measure(Bench(device, run.quick, run.folder, until, _rates(run.folder)))
        if part.name == "machine":
            (run.folder / _RATES).write_text(json.dumps(result["rates"]), encoding="utf-8")
    except Exception as error:  # whatever it is, the other parts are wanted
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    return result


def _rates(folder: Path) -> Rates:
    file = folder / _RATES
    return Rates(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else Rates()


def _in_process(run: Run, part: Part, seconds: float) -> Result:
    answer = run.folder / "part.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "quire_engine.bench_gpu", "--device", run.device, "--folder", str(run.folder)]
    command += ["--child", part.name, "--minutes", str(seconds / 60), *(["--quick"] if run.quick else [])]
    try:
        code = subprocess.run(command, timeout=seconds + GRACE, check=False).returncode
    except subprocess.TimeoutExpired:
        return {"error": f"it was not done {GRACE:.0f} s after its {seconds:.0f} s and was ended"}
    if not answer.exists():
        return {"error": f"its process ended with {code} and without a result"}
    result: Result = json.loads(answer.read_text(encoding="utf-8"))
    return result


def child(run: Run, name: str, seconds: float) -> None:
    """What such a process does."""
    part = next(part for part in PARTS if part.name == name)
    (run.folder / "part.json").write_text(json.dumps(here(run, part, seconds)), encoding="utf-8")
