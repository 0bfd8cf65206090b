"""Whether this is a time for work that can wait: not on battery, and less of it while others need the machine.

The system is asked as far as it tells: its power supplies, its load, and whether another Quire is answering. Knows
nothing of what the work is.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

POWER = Path("/sys/class/power_supply")
_LOAD_SECONDS = 60.0  # over which the system's load is an average
_LOOK_SECONDS = 5.0  # between two looks at what changes slowly
_BUSY = 0.75  # of the processors, wanted by others
_ASKING = "asking.lock"


def on_battery(power: Path | None = None) -> bool:
    """Whether a battery is being used up; False where the system does not say."""
    try:
        supplies = list((power or POWER).iterdir())
    except OSError:
        return False
    kinds = [(_read(supply, "type"), supply) for supply in supplies]
    if any(kind in ("Mains", "USB") and _read(supply, "online") == "1" for kind, supply in kinds):
        return False
    return any(
        kind == "Battery" and _read(supply, "scope") != "Device" and _read(supply, "status") == "Discharging"
        for kind, supply in kinds
    )


def _read(supply: Path, name: str) -> str:
    with suppress(OSError):
        return (supply / name).read_text(errors="replace").strip()
    return ""


class OthersLoad:
    """How many processors other programs want: the system's load without this process's part in it.

    The load is an average in which what was counts less and less; this process's part is averaged in the same way.
    """

    def __init__(
        self,
        load: Callable[[], tuple[float, float, float]] | None = None,
        used: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """used: seconds of processor time that this process has had."""
        self._load = load or getattr(os, "getloadavg", None)
        self._used, self._clock = used, clock
        self._at, self._used_then, self._ours = clock(), used(), 0.0

    def now(self) -> float:
        """0 where the system does not say."""
        now, used = self._clock(), self._used()
        if (passed := now - self._at) > 0:
            kept = math.exp(-passed / _LOAD_SECONDS)
            self._ours = kept * self._ours + (1 - kept) * (used - self._used_then) / passed
            self._at, self._used_then = now, used
        try:
            return max(0.0, self._load()[0] - self._ours) if self._load else 0.0
        except OSError:
            return 0.0


class Idleness:
    """What speaks against working now. Asks the system only now and then, so it may be asked all the time."""

    def __init__(self, load: OthersLoad | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load or OthersLoad()
        self._clock = clock
        self._looked_at = -math.inf
        self._battery = self._busy = False

    @property
    def on_battery(self) -> bool:
        self._look()
        return self._battery

    @property
    def busy(self) -> bool:
        """Others keep the processors busy: half of the time is theirs."""
        self._look()
        return self._busy

    def _look(self) -> None:
        if self._clock() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = self._clock()
        self._battery = on_battery()
        self._busy = self._load.now() > _BUSY * (os.cpu_count() or 1)


@contextmanager
def asking(folder: Path) -> Iterator[None]:
    """Within the block, other processes that ask `somebody_asks` of the same folder are told so. A process that dies
    in it asks no longer."""
    lock = _locked(folder / _ASKING, wait=True)
    try:
        yield
    finally:
        if lock:
            lock.close()


def somebody_asks(folder: Path) -> bool:
    """Whether a question is being answered, in whatever process; False where the system cannot tell."""
    try:
        if lock := _locked(folder / _ASKING, wait=False):
            lock.close()
    except BlockingIOError:
        return True
    return False


def _locked(file: Path, wait: bool) -> IO[bytes] | None:
    """The file, shared with those who ask, or for this process alone; None where that is not possible. Raises
    BlockingIOError where it would have to wait."""
    try:
        import fcntl

        lock = open(file, "ab")  # noqa: SIM115  # it is the lock
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise
        return None
    return lock
