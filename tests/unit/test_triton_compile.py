"""Every kernel compiles to machine code for every device that we name, none of which need be here.

In a process of its own, one for each module: this one interprets kernels, which excludes compiling them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire_kernels import ahead

FIGURES = Path(__file__).resolve().parents[2] / "packaging" / "kernel_figures.py"
THERE = [module for module in ahead.MODULES if (Path(ahead.__file__).parent / f"{module}.py").exists()]


@pytest.mark.parametrize("module", THERE)
def test_compiles_for_every_target(module: str, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    cache = pytestconfig.cache
    assert cache is not None
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache.mkdir("triton"))}
    done = subprocess.run(
        [sys.executable, FIGURES, "--json", module], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found
    for name, targets in found.items():
        assert set(targets) == set(ahead.TARGETS), name
        assert all(1 <= figures["registers"] <= 256 for figures in targets.values()), name
