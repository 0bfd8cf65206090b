"""The application driven by tests: on a screen without a terminal, or as a process on a terminal of its own."""

import asyncio
import fcntl
import functools
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from textual import events
from textual.keys import _character_to_key
from textual.pilot import Pilot

from quire.session import Session
from quire.tui.app import QuireApp

PATIENCE_S = 30.0


def on_a_screen(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test with an event loop of its own."""

    @functools.wraps(test)
    def run(*fixtures: Any, **named: Any) -> None:
        asyncio.run(test(*fixtures, **named))

    return run


@asynccontextmanager
async def running(
    open_session: Callable[[], Session], size: tuple[int, int] = (100, 30), add: tuple[Path, ...] = ()
) -> AsyncIterator[tuple[QuireApp, Pilot[None]]]:
    """The application on a screen of this size; afterwards the engine thread has ended."""
    app = QuireApp(open_session, add)
    async with app.run_test(size=size) as pilot:
        yield app, pilot
    assert not app.chat.worker.alive


def shown(app: QuireApp) -> str:
    """What stands on the screen, as text."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


async def until(app: QuireApp, pilot: Pilot[None], true: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    """Waits until something is true, and what the screen has been told by then is drawn."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, shown(app)
        await asyncio.sleep(0.02)  # pilot.pause waits half a minute for a widget that leaves meanwhile
    drawn = asyncio.Event()
    if app.is_running and app.screen.call_after_refresh(drawn.set):
        with suppress(TimeoutError):  # a screen that leaves draws nothing
            await asyncio.wait_for(drawn.wait(), 0.5)


def press_at_once(app: QuireApp, *keys: str) -> None:
    """As a terminal hands on a burst: nobody waits for what a key does."""
    for key in keys:
        special = len(key) > 1
        app.post_message(events.Key(key if special else _character_to_key(key), None if special else key))


class Terminal:
    """A command on a terminal of its own, as somebody at the keyboard sees it. Close it."""

    def __init__(self, command: Sequence[str], size: tuple[int, int] = (80, 24)) -> None:
        self._main, self._worker = pty.openpty()
        fcntl.ioctl(self._worker, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.modes = termios.tcgetattr(self._worker)
        self.process = subprocess.Popen(
            command,
            stdin=self._worker,
            stdout=self._worker,
            stderr=self._worker,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is for it
        )
        self.seen = ""

    def until(self, true: Callable[[], object]) -> None:
        """Reads what it writes until something is true or it has ended."""
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, self.seen[-5000:]
            if select.select([self._main], [], [], 0.05)[0]:
                self.seen += os.read(self._main, 65536).decode(errors="surrogateescape")
            elif self.process.poll() is not None:
                return

    def settle(self) -> None:
        """Reads until nothing comes for a moment, which also tells an Esc from the beginning of a sequence."""
        while select.select([self._main], [], [], 0.25)[0]:
            self.seen += os.read(self._main, 65536).decode(errors="surrogateescape")

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def ends(self) -> int:
        """Its exit code, once it has ended and all was read."""
        self.until(lambda: False)
        return self.process.wait(PATIENCE_S)

    @property
    def sane(self) -> bool:
        """Whether the terminal is as it was before."""
        return termios.tcgetattr(self._worker) == self.modes

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)
        os.close(self._worker)
