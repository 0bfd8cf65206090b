"""What several commands share: their options, a session, progress, Ctrl-C.

Knows nothing of any one command.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event as Flag
from typing import TYPE_CHECKING, Any

import click

from quire.terminal import printable
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Session

INTERRUPTED = 130

model_option = click.option("--model", metavar="PATH", help="GGUF file to use instead of the bundled model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@contextmanager
def session_by(**overrides: Any) -> "Iterator[Session]":
    """The session with flags over settings; flags that were not given are left out."""
    from quire import config
    from quire.session import Session

    given = {name: value for name, value in overrides.items() if value is not None}
    with Session(config.load(given)) as session:
        yield session
        warn(session.take_notice())


@contextmanager
def interruptible() -> Iterator[Flag]:
    """Within the block the first Ctrl-C asks the work to stop; a second one breaks it off."""
    flag = Flag()
    before = signal.getsignal(signal.SIGINT)

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        flag.set()

    signal.signal(signal.SIGINT, stop)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with an estimate; call it with (done, total). Silent where nobody watches."""
    with click.progressbar(length=1, label=label, file=sys.stderr, show_eta=True) as bar:
        started_at: list[int] = []

        def show(done: int, total: int) -> None:
            if not started_at:  # what was done before this run must not flatter the estimate
                started_at.append(done)
            bar.length = max(1, total - started_at[0])
            bar.update(done - started_at[0] - bar.pos)

        yield show


def to_stderr(line: str) -> None:
    click.echo(line, err=True)


def warn(sentence: str) -> None:
    """Says it on stderr, if there is something to say."""
    if sentence:
        click.secho(printable(sentence), fg="yellow", err=True)


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Comma-separated numbers of an option. Raises QuireError."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise QuireError(f"{text!r} is not a list of numbers.", "Write for example 1000,2000,4000.") from error


def warn_if_outranked(name: str) -> None:
    from quire import config

    if config.in_force()[1][name] == "environment":
        warn(f"{config.variable(name)} in the environment still outranks it.")
