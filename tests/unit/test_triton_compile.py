"""Every kernel compiles to machine code for devices of three generations, none of which need be here.

In a process of its own: this one interprets kernels, which excludes compiling them. The devices that are named between
the oldest and the newest differ in how much memory a block may share; packaging/kernel_figures.py compiles for all.
"""

import json
import os
import subprocess
import sys

import pytest

SHARED_KIB = {"sm_80": 99, "sm_90": 227, "gfx1100": 64}  # what sm_86 and sm_89 have too, which sm_80's code runs on
CODE = f"""
import json
from quire_kernels import ahead
pairs = [(build, target) for build in ahead.builds() for target in {list(SHARED_KIB)}]
print(json.dumps([(build.name, target, ahead.compile_for(build, target).shared_bytes) for build, target in pairs]))
"""


def test_every_kernel_compiles_and_shares_no_more_memory_than_there_is(pytestconfig: pytest.Config) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    cache = pytestconfig.cache
    assert cache is not None
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache.mkdir("triton"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) > 90
    assert [(name, target) for name, target, shared in found if shared > SHARED_KIB[target] << 10] == []
