"""How long a key takes to show in the real application: idle, while it caches, and while an answer streams.

    python packaging/key_latency.py [--keys 30] [--json]

Runs `quire` in a pseudo-terminal on the sample documents (many copies, so that caching goes on) with settings and data
of its own, presses keys that occur nowhere else, and waits for each to come back in what the application writes. The
goal is 50 ms. Prints medians, the 95th percentile and the slowest; the machine's noise is part of them.
"""

import argparse
import fcntl
import json
import os
import pty
import select
import shutil
import statistics
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEYS = [chr(code) for code in range(0x0430, 0x0450)]  # Cyrillic, of which the sample has none
SIZE = (40, 120)
COPIES = 40
GAPS = {"idle": 0.15, "caching": 2.6, "streaming": 0.05}  # caching waits two seconds after a key
PATIENCE = 60.0


class Terminal:
    """The application behind a pseudo-terminal."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], command, environment)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self.written = ""

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def read(self, seconds: float) -> None:
        """Takes what is written within the time, or until something came."""
        if select.select([self._fd], [], [], seconds)[0]:
            self.written += os.read(self._fd, 1 << 16).decode("utf-8", errors="replace")

    def wait_for(self, text: str, seconds: float = PATIENCE) -> float:
        """Milliseconds until the text was written, from now on."""
        began, self.written = time.perf_counter(), ""
        while text not in self.written:
            self.read(0.01)
            if time.perf_counter() - began > seconds:
                raise SystemExit(
                    f"{text!r} did not show within {seconds:.0f} s; the screen said:\n{self.written[-500:]}"
                )
        return 1000 * (time.perf_counter() - began)

    def rest(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self.read(left)

    def close(self) -> None:
        self.press("\x11")  # Ctrl+Q
        until = time.perf_counter() + 10
        while time.perf_counter() < until and os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            try:
                self.read(0.1)
            except OSError:  # the terminal is gone
                break


def press_all(terminal: Terminal, count: int, gap: float) -> list[float]:
    """Milliseconds from each key to its showing."""
    took = []
    for number in range(count):
        terminal.rest(gap)
        key = KEYS[number % len(KEYS)]
        terminal.press(key)
        took.append(terminal.wait_for(key))
    return took


def measure(keys: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="quire-keys-") as folder:
        home = Path(folder)
        for copy in range(COPIES):
            for file in sorted((ROOT / "assets" / "sample").iterdir()):
                target = home / "notes" / f"{copy}-{file.name}"
                target.parent.mkdir(exist_ok=True)
                target.write_text(f"Copy {copy}.\n\n{file.read_text()}")
        environment = dict(os.environ, TERM="xterm-256color", COLORTERM="truecolor", TEXTUAL_ANIMATIONS="none")
        environment |= {f"QUIRE_{name}_DIR": str(home / name.lower()) for name in ("DATA", "CACHE", "CONFIG")}
        command = shutil.which("quire", path=str(Path(sys.executable).parent)) or "quire"
        terminal = Terminal([command, str(home / "notes")], environment)
        try:
            return _situations(terminal, keys)
        finally:
            terminal.close()


def _situations(terminal: Terminal, keys: int) -> dict[str, list[float]]:
    terminal.wait_for("cached")
    terminal.wait_for("caching")
    caching = press_all(terminal, max(5, keys // 3), GAPS["caching"])
    terminal.press("\x7f" * len(caching))
    terminal.rest(1.0)
    terminal.press("Tell me everything about the lighthouse, at length.")
    terminal.rest(1.0)
    terminal.press("\r")
    terminal.wait_for("Reading")
    terminal.rest(6.0)
    streaming = press_all(terminal, keys, GAPS["streaming"])
    terminal.press("\x1b")
    terminal.press("\x0c")  # the library
    terminal.rest(1.0)
    terminal.press("p")  # pauses caching
    terminal.rest(1.0)
    terminal.press("\x1b")
    terminal.rest(2.0)
    return {"idle": press_all(terminal, keys, GAPS["idle"]), "caching": caching, "streaming": streaming}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=30, help="keys in each situation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = {
        situation: {
            "keys": len(took),
            "median_ms": round(statistics.median(took), 1),
            "p95_ms": round(sorted(took)[int(0.95 * (len(took) - 1))], 1),
            "slowest_ms": round(max(took), 1),
        }
        for situation, took in measure(options.keys).items()
    }
    if options.json:
        print(json.dumps(rows))
        return
    for situation, row in rows.items():
        print(
            f"{situation:<10} {row['keys']:>3} keys   median {row['median_ms']:>6.1f} ms"
            f"   95 % {row['p95_ms']:>6.1f} ms   slowest {row['slowest_ms']:>6.1f} ms"
        )


if __name__ == "__main__":
    main()
