"""The command line of the measurement: says what is measured as it goes, and ends with everything as JSON."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from quire_engine.bench_gpu import machine, parts
from quire_engine.bench_gpu.parts import GRACE, PARTS, Run

_NAMES = [part.name for part in PARTS]


def main() -> int:
    """0 when every part ran and every check was right, else 1; the JSON says what was not."""
    asked = _arguments()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=asked.folder) as made:
        folder = asked.folder if asked.child else Path(made)
        isolated = asked.device != "cpu" and not asked.child
        until = began + 60 * asked.minutes - (GRACE if isolated else 0)
        run = Run(asked.device, asked.quick, folder, until, isolated)
        if asked.child:
            parts.child(run, asked.child, 60 * asked.minutes)
            return 0
        names = [name for name in _NAMES if name in (asked.only or _NAMES)]
        found = parts.measure(run, names)
    result = {
        "when": machine.today(),
        "device": asked.device,
        "quick": asked.quick,
        "seconds": round(time.monotonic() - began, 1),
        "kernels": os.environ.get("QUIRE_KERNELS", "auto"),
        "parts": found,
    }
    print(json.dumps(result), flush=True)
    return 1 if any("error" in part or part.get("right") != part.get("of") for part in found.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m quire_engine.bench_gpu", description=__doc__)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; what found no time left says so")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: everything runs, no number means anything")
    parser.add_argument("--device", default=usual, help="cuda (ROCm too) or cpu")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; up to 6 GB for a while; else the temporary folder"
    )
    parser.add_argument("--only", action="append", choices=_NAMES, help="this part; may be given again")
    parser.add_argument("--child", choices=_NAMES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cpu" and not asked.quick:
        parser.error("a model of 8 billion parameters on the processor takes hours: --quick, or --device cuda")
    return asked


if __name__ == "__main__":
    sys.exit(main())
