"""What the machine itself can do: the rates that everything else is held against. Knows nothing of models."""

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quire_engine.bench_gpu.clock import Bench, Rates, Times, kernel_timed, timed
from quire_kernels import dispatch

_READERS = 8
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Machine:
    """Names and versions, and the rates with what they come from."""

    title: str
    memory_bytes: int
    torch: str
    triton: str
    cuda: str
    kernels: str
    processor: str
    cores: int
    file_system: str
    rates: Rates
    times: dict[str, Times]


def measure(bench: Bench) -> dict[str, object]:
    size = bench.pick(1 << 30, 1 << 20)
    copied, uploaded, multiplied = _copy(bench, size), _upload(bench, size // 4), _matmul(bench)
    cold, warm = _files(bench, size)
    side = _side(bench)
    rates = Rates(
        copy=2 * size / _seconds(copied),
        matmul=2 * side**3 / _seconds(multiplied),
        upload=size // 4 / _seconds(uploaded),
        cold=size / _seconds(cold),
        warm=size / _seconds(warm),
    )
    times = {"copy": copied, "matmul": multiplied, "upload": uploaded, "cold file": cold, "warm file": warm}
    on_gpu = bench.device.type == "cuda"
    found = Machine(
        torch.cuda.get_device_name(bench.device) if on_gpu else "processor",
        torch.cuda.get_device_properties(bench.device).total_memory if on_gpu else 0,
        str(torch.__version__),
        _triton(),
        str(torch.version.cuda or torch.version.hip or ""),
        dispatch.why(),
        platform.processor() or platform.machine(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        _file_system(bench.folder),
        rates,
        times,
    )
    return asdict(found)


def _seconds(times: Times) -> float:
    return times.median_ms / 1000


def _copy(bench: Bench, size: int) -> Times:
    a = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    b = torch.empty_like(a)
    return kernel_timed(lambda: b.copy_(a), bench)


def _upload(bench: Bench, size: int) -> Times:
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    return kernel_timed(lambda: there.copy_(host, non_blocking=True), bench)


def _side(bench: Bench) -> int:
    return bench.pick(8192, 128)


def _matmul(bench: Bench) -> Times:
    side = _side(bench)
    a, b = (torch.randn(side, side, device=bench.device).to(torch.bfloat16) for _ in range(2))
    return kernel_timed(lambda: a @ b, bench)


def _files(bench: Bench, size: int) -> tuple[Times, Times]:
    """Of one large file, by as many threads as the runtime reads with."""
    path = bench.folder / "rate.bin"
    path.write_bytes(os.urandom(1 << 20) * (size >> 20))
    read, seconds = _reader(path, size), bench.pick(4, 0) + 0.05
    cold = timed(read, bench, seconds, prepare=lambda: forget(path), most_runs=3)
    warm = timed(read, bench, seconds, most_runs=3)
    path.unlink()
    return cold, warm


def _reader(path: Path, size: int) -> Callable[[], None]:
    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                pieces = pool.map(lambda at: len(os.pread(descriptor, _PIECE_BYTES, at)), range(0, size, _PIECE_BYTES))
                assert sum(pieces) == size
        finally:
            os.close(descriptor)

    return read


def forget(path: Path) -> None:
    """Asks the system to hold nothing of a file in memory, so that it is read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _file_system(folder: Path) -> str:
    """Its kind; on some, tmpfs and overlay among them, no file is ever cold."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for _device, mount, found, *_ in (line.split() for line in lines):
        if len(mount) > len(best) and folder.resolve().is_relative_to(mount):
            best, kind = mount, found
    return kind


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def today() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
