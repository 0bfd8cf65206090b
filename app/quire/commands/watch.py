"""`quire watch`: the folders kept without a screen, until it is stopped; and as a service.

Knows how that is asked for and said; what is kept, and how, is in `quire.keeper`.
"""

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING

import click

from quire.commands.common import json_option, model_option, session_by
from quire.keeper import Edit, Keeper
from quire.terminal import printable
from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from quire.service import Service
    from quire.session import Session

_REPORT_SECONDS = 10.0  # between two lines about how far caching came

_ROOTS_SECONDS = 20.0  # between two looks whether another Quire added or removed folders


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--install", is_flag=True, help="Write a service for it (systemd or launchd), and say how to start it.")
@click.option("--uninstall", is_flag=True, help="Delete that service again.")
@model_option
@json_option
def watch(paths: tuple[Path, ...], install: bool, uninstall: bool, model: str | None, as_json: bool) -> None:
    """Keep what was added in step with the disk, and cached, until stopped. PATHS are added first.

    It yields to questions of other Quires, waits on battery and makes room where the machine is busy.
    """
    if install or uninstall:
        from quire import service

        if install == uninstall or paths:
            raise QuireError("That does not go together.", "Use --install or --uninstall alone.")
        (_install if install else _uninstall)(service.of_this_system())
        return
    with session_by(model=model) as session:
        if not paths and not session.library.roots():
            raise QuireError("No folder was added yet.", "Add one: quire watch ~/notes")
        _Watch(session, as_json).run(paths)


def _install(service: "Service") -> None:
    service.install()
    click.echo(f"Wrote {printable(str(service.file))}. Start it now and at every login:\n  {service.start}")


def _uninstall(service: "Service") -> None:
    if service.uninstall():
        click.echo(f"Deleted {printable(str(service.file))}. If it still runs, stop it:\n  {service.stop}")
    else:
        click.echo(f"There is no {printable(str(service.file))}.")


@dataclass
class _Watch:
    """A `quire.keeper.Host` that prints."""

    session: "Session"
    as_json: bool
    _stop: Flag = field(default_factory=Flag)
    _woken: Flag = field(default_factory=Flag)
    _left_ms: float = 0.0
    _reported_at: float = 0.0
    _held: str = ""
    _caching: bool = False
    _complete: bool = False

    def run(self, paths: Sequence[Path]) -> None:
        """Until SIGINT or SIGTERM; what was read and cached by then is kept."""
        self._keeper = Keeper(self)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)
        for path in paths:
            self._keeper.add(path)
        self._keeper.opened(self.session)
        try:
            while not self._stop.is_set():
                self._woken.clear()  # before looking: what comes meanwhile wakes the next round
                self._step()
        finally:
            self._keeper.close()

    def _end(self, _number: int, _frame: object) -> None:
        self._stop.set()
        self._woken.set()

    def _step(self) -> None:
        """The one most urgent thing, or a rest."""
        keeper, hold = self._keeper, self._keeper.hold
        try:
            if keeper.urgent:
                keeper.work(self.session)
            elif not keeper.wanted:
                self._woken.wait(_ROOTS_SECONDS)
                keeper.look_for_roots(self.session)
            elif hold:
                self._hold(hold.reason)
                self._woken.wait(hold.seconds)
            else:
                keeper.cache(self.session)
        except Aborted:
            pass  # the reason to stop is the next thing to do
        except Exception as error:
            self.failed(error)

    # What the keeper asks and tells

    def wake(self) -> None:
        self._woken.set()

    def yields(self) -> bool:
        return self._stop.is_set() or self._keeper.urgent

    def between(self, session: "Session") -> None:
        if self._stop.is_set():
            raise Aborted

    def reuse_off(self, session: "Session") -> str:
        return session.engine.try_out(self._stop.is_set)

    def say(self, lines: Sequence[str], more: int = 0) -> None:
        rest = [f"... and {more} more: quire status"] if more else []
        self._print("told", [printable(line) for line in (*lines, *rest)])

    def failed(self, error: Exception) -> None:
        from quire import crash

        told = error if isinstance(error, QuireError) else crash.explained(error)
        self._print("failed", [printable(f"{told.message} {told.hint}".strip())])

    def reading(self, roots: Sequence[Path], done: int, total: int) -> None:
        self._complete = self._caching = False

    def has_roots(self, roots: Sequence[Path]) -> None: ...

    def caching(self) -> None:
        self._caching = True

    def off(self, reason: str) -> None:
        self._print("off", [printable(f"Nothing is cached: {reason} Questions are answered by full prefill.")])

    def estimate(self, left_ms: float) -> None:
        self._left_ms = left_ms
        self._held = ""

    def budget(self, used_up: bool) -> None:
        if used_up:
            self._print("budget", ["The disk budget is used up; the rest is not cached. More: quire cache budget 40"])

    def show(self, session: "Session", edits: tuple[Edit, ...]) -> None:
        from quire import render

        state = session.shelf.progress()
        if self._keeper.urgent:
            return  # it is not the end of it
        if state.done == state.total and not self._complete:
            self._complete = True
            self._print("complete", [f"All {state.total} passages are cached."])
        elif self._caching and state.done < state.total and time.monotonic() > self._reported_at + _REPORT_SECONDS:
            self._reported_at = time.monotonic()
            left = f", about {render.duration(self._left_ms)} left" if self._left_ms else ""
            self._print("cached", [f"Cached {state.done} of {state.total} passages{left}."])

    def _hold(self, reason: str) -> None:
        if reason and reason != self._held:
            self._held = reason
            self._print("waits", [f"Caching waits: {reason}."])

    def _print(self, what: str, lines: Sequence[str]) -> None:
        if self.as_json:
            click.echo(json.dumps({"event": what, "at": round(time.time(), 3), "lines": list(lines)}))
        else:
            click.echo("\n".join(lines))
        sys.stdout.flush()
