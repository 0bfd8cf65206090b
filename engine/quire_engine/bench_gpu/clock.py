"""What a part is given, how its runs are timed, and when it has to stop.

Knows nothing of what is measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

_MOST_RUNS = 7
_KERNEL_RUNS = 30
_FLUSH_BYTES = 256 << 20  # more than a second-level cache holds


@dataclass(frozen=True)
class Rates:
    """What this machine can do, measured: bytes and operations a second. 0: not measured.

    copy: of the device's memory, bytes read and written.  upload: from page-locked memory.  cold, warm: of files that
    the system does not hold in memory, or does.
    """

    copy: float = 0.0
    matmul: float = 0.0
    upload: float = 0.0
    cold: float = 0.0
    warm: float = 0.0


@dataclass(frozen=True)
class Bench:
    """quick: tiny shapes, to see that everything runs.  until: when to stop, by `time.monotonic`."""

    device: torch.device
    quick: bool
    folder: Path
    until: float
    rates: Rates = Rates()

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Times:
    """Of so many runs. The first of all, which compiles and allocates, is left out when there was time for another."""

    runs: int
    median_ms: float
    least_ms: float
    most_ms: float

    @classmethod
    def of(cls, all_ms: list[float]) -> "Times":
        kept = all_ms[1:] or all_ms
        return cls(len(kept), median(kept), min(kept), max(kept))

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms ({self.least_ms:.3f} to {self.most_ms:.3f}, {self.runs} runs)"


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    work: Callable[[], object],
    bench: Bench,
    seconds: float,
    prepare: Callable[[], object] | None = None,
    most_runs: int = _MOST_RUNS,
) -> Times:
    """A whole step as somebody who waits for it sees it, after one that warms up.

    seconds: no run begins after them but for the second.  prepare: done before each run, not counted.
    """
    began, found = time.monotonic(), list[float]()
    most = 1 + (1 if bench.quick else most_runs)
    while not found or (
        len(found) < most and bench.seconds_left and (len(found) < 2 or time.monotonic() - began < seconds)
    ):
        if prepare is not None:
            prepare()
        wait(bench.device)
        start = time.perf_counter()
        work()
        wait(bench.device)
        found.append(1000 * (time.perf_counter() - start))
    return Times.of(found)


def kernel_timed(work: Callable[[], object], bench: Bench) -> Times:
    """One launch, or a few, by the device's own clock, with nothing in its caches."""
    if bench.device.type != "cuda":
        return timed(work, bench, 0.05, most_runs=3)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=bench.device)
    for _ in range(3):
        work()
    found = []
    for _ in range(_KERNEL_RUNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        flush.zero_()  # which also hides what a launch takes
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return Times.of(found)
