"""No test reaches the real home: every directory that Quire would use lies in the test's own."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("quire", deadline=None)  # a busy machine is no failure
settings.load_profile("quire")

# A worker of several has its own share of the cores: two models that take all of them wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    worker, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[worker % len(cores) :: workers])

# Before anything imports Triton: its kernels run on the CPU then, interpreted, where a test forces them.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_xdist_auto_num_workers() -> int | None:
    """A few more than there are cores, since many tests wait: for a screen, a disk, another process."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2 * cores, cores + 2)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ".home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    # Caching would wait where this machine runs on battery, and rest while it is busy.
    monkeypatch.setattr("quire.idle.POWER", home / "power")
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    for name in ("DATA", "CACHE", "CONFIG", "LOG"):
        monkeypatch.setenv(f"QUIRE_{name}_DIR", str(home / name.lower()))
