"""The parser process as seen from outside: started when first needed, used for many files, replaced when it dies.

Knows how long a file may take and how much memory, and what a death means; knows nothing of formats. Nothing of what
a file does to its parser reaches this process but text.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quire.formats.base import Mark, Parsed, Unreadable

_POLL_S = 0.03  # how long somebody with a question waits for a parser
_DYING_S = 2.0  # between the last output of a process and its end
_MOST_REPLY_BYTES = 200_000_000
_NO_LIBRARY = 3  # the child's NO_LIBRARY
_LEAST_COPIES = 2  # of a file's bytes in the process that parses it: as they came, and one at a library


@dataclass(frozen=True)
class Limits:
    """What one file may take. cpu_s: of processor time.  wall_s: in all, also while the computer is busy otherwise."""

    cpu_s: float = 60.0
    wall_s: float = 300.0
    memory_bytes: int = 2 << 30


class NotNow(Unreadable):
    """A file that could not be read for reasons that are not in it; it is worth another try."""


class _TooLong(Unreadable):
    def __init__(self) -> None:
        super().__init__("takes too long to read", "Split it, or save it as text.")


class _Died(Exception):
    """The process ended without a reply."""


class Parser:
    """Parses one file at a time in a process of its own. Not thread-safe; close it, or use it with `with`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Parser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it is doing. Parsing again starts another one."""
        if process := self._process:
            self._process = None
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with suppress(OSError):  # what was not sent yet is lost, as it should be
                    pipe.close()

    def parse(self, format: str, data: bytes, waiting: Callable[[], None] = lambda: None) -> Parsed:
        """What a file of this format says. Raises Unreadable.

        waiting: called again and again meanwhile; what it raises ends the parsing.
        """
        if _LEAST_COPIES * len(data) > self._limits.memory_bytes:
            raise Unreadable("needs too much memory", "Split it, or save it as text.")
        reply = self._ask(format, data, waiting)
        if "text" in reply:
            return Parsed(reply["text"], tuple(Mark(*mark) for mark in reply["marks"]))
        raise Unreadable(reply["reason"], reply["remedy"])

    def _ask(self, format: str, data: bytes, waiting: Callable[[], None]) -> dict[str, Any]:
        """The reply; where a process that had read other files before fails, that of a fresh one."""
        used = self._process is not None
        try:
            reply = self._exchange(format, data, waiting)
        except _Died:
            reason = self._cause()
            if not used or isinstance(reason, _TooLong):
                raise reason from None
            return self._ask(format, data, waiting)
        if reply.get("ends"):
            self.close()
            return self._ask(format, data, waiting) if used else reply
        return reply

    def _exchange(self, format: str, data: bytes, waiting: Callable[[], None]) -> dict[str, Any]:
        process = self._process = self._process or self._started()
        request = {"format": format, "size_bytes": len(data), "cpu_s": self._limits.cpu_s}
        deadline = time.monotonic() + self._limits.wall_s
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(_exchanged, process, json.dumps(request).encode() + b"\n", data)
            try:
                while True:
                    try:
                        return reply.result(timeout=_POLL_S)
                    except TimeoutError:
                        waiting()
                    if time.monotonic() > deadline and not reply.done():
                        raise _TooLong
            except _Died:
                raise
            except BaseException:
                self.close()  # before the pool waits for its thread
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        # -P: a file beside the documents must not pass for a module. A session of its own: Ctrl-C is for Quire.
        command = [sys.executable, "-P", "-m", "quire.formats.child", str(self._limits.memory_bytes)]
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True, env=_environment()
            )
        except OSError as error:
            raise NotNow(f"its reader does not start: {error.strerror}", "Close other programs, try again.") from error

    def _cause(self) -> Unreadable:
        """What the death of the process means for the file it was reading."""
        code = _ended(self._process) if self._process else 0
        self.close()
        if code == -signal.SIGKILL:
            return NotNow("its reader was stopped, perhaps for lack of memory", "Close other programs, try again.")
        if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
            return _TooLong()
        if code == _NO_LIBRARY:
            return NotNow("the library that reads it is missing", "Install Quire anew.")
        return Unreadable("damaged: its reader crashed", "Open it in its own program and save it anew.")


def _environment() -> dict[str, str]:
    # A library brings NumPy along, whose threads would take all the address space there is.
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _exchanged(process: subprocess.Popen[bytes], request: bytes, data: bytes) -> dict[str, Any]:
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(request)
        process.stdin.write(data)
        process.stdin.flush()
        line = process.stdout.readline(_MOST_REPLY_BYTES)
        reply = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        reply = None
    if not isinstance(reply, dict):
        raise _Died
    return reply


def _ended(process: subprocess.Popen[bytes]) -> int:
    """How a process ended that has closed its output; 0 for one that has not, although it went wrong."""
    try:
        return process.wait(timeout=_DYING_S)
    except subprocess.TimeoutExpired:
        return 0
