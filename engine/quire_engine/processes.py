"""Which process this is, and whether another one is still there. A number alone does not say: it is given out again.

Knows nothing of what processes do.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """started: when, in the system's own count since it was switched on; 0 where the system does not tell."""

    pid: int
    started: int


def this() -> Process:
    return Process(os.getpid(), _started(os.getpid()))


def is_alive(process: Process) -> bool:
    """Where the system does not tell when processes started, another one of that number is taken for it."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return _started(process.pid) == process.started


def _started(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(status.rpartition(b")")[2].split()[19])  # proc(5): field 22, and the name before it may hold anything


def cores() -> int:
    """Processor cores this process may run on: fewer than the machine has in a container, or where it was pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
