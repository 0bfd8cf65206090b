"""How long the application takes from the command to its first picture, in a real pseudo-terminal.

    python packaging/first_paint.py [--starts 10] [--json]

Starts `quire` on the sample folder with settings and data of its own and waits until the prompt stands on the screen.
The goal is one second. The first start, which compiles Python files, is not counted. Prints the median, the fastest
and the slowest; the machine's noise is part of them.
"""

import argparse
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZE = (24, 80)
PAINTED = "sk your documents"  # the cursor stands on the first letter
PATIENCE_S = 60.0


def first_paint(home: Path) -> float:
    """Milliseconds from the start of the process until the prompt was written."""
    environment = dict(os.environ, TERM="xterm-256color", COLORTERM="truecolor")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has its files compiled
    environment |= {f"QUIRE_{name}_DIR": str(home / name.lower()) for name in ("DATA", "CACHE", "CONFIG", "LOG")}
    command = shutil.which("quire", path=str(Path(sys.executable).parent)) or "quire"
    began = time.perf_counter()
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(command, [command, str(ROOT / "assets" / "sample")], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    written = ""
    while PAINTED not in written:
        if select.select([terminal], [], [], 0.01)[0]:
            written += os.read(terminal, 1 << 16).decode("utf-8", errors="replace")
        if time.perf_counter() - began > PATIENCE_S:
            raise SystemExit(f"Nothing was painted within {PATIENCE_S:.0f} s; the screen said:\n{written[-500:]}")
    took = 1000 * (time.perf_counter() - began)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(terminal)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    took = []
    for _ in range(options.starts + 1):
        with tempfile.TemporaryDirectory(prefix="quire-paint-") as home:
            took.append(first_paint(Path(home)))
    row = {
        "starts": options.starts,
        "median_ms": round(statistics.median(took[1:])),
        "fastest_ms": round(min(took[1:])),
        "slowest_ms": round(max(took[1:])),
    }
    if options.json:
        print(json.dumps(row))
        return
    print(
        f"{row['starts']} starts   median {row['median_ms']} ms   fastest {row['fastest_ms']} ms"
        f"   slowest {row['slowest_ms']} ms"
    )


if __name__ == "__main__":
    main()
