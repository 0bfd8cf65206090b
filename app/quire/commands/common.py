"""What several commands share: their options, a session, progress, Ctrl-C.

Knows nothing of any one command.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quire.terminal import printable
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.library import Everywhere
    from quire.session import Session

INTERRUPTED = 130

model_option = click.option("--model", metavar="PATH", help="GGUF file to use instead of the bundled model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

_Command = TypeVar("_Command", bound=Callable[..., Any])


def question_options(dials: Sequence[str], dial_help: str) -> Callable[[_Command], _Command]:
    """What a question can be asked with; `place_of` and `by_question` read it."""
    options = (
        click.option("--in", "within", type=click.Path(path_type=Path), help="Only documents in this folder or file."),
        click.option("--ratio", type=float, help="Share of the reused tokens to compute again, 0 to 1."),
        click.option("--dial", type=click.Choice(list(dials)), help=dial_help),
        click.option("--selector", help="Which tokens are computed again: default, probe, spectral, first, ..."),
        click.option("--context-tokens", type=int, help="Tokens of documents that the question may use."),
        click.option("--max-tokens", type=int, help="Longest answer."),
        model_option,
        json_option,
    )

    def add(command: _Command) -> _Command:
        return reduce(lambda so_far, option: option(so_far), reversed(options), command)

    return add


def place_of(within: Path | None) -> "Path | Everywhere":
    """Where a question looks, from --in. Raises QuireError where nothing is there."""
    from quire.library import EVERYWHERE
    from quire.render import path_from_here

    if within is None:
        return EVERYWHERE
    place = within.expanduser()
    if not place.exists():
        raise QuireError(f"There is no file or folder {path_from_here(within)}.", "Check the path after --in.")
    return place.resolve()


def by_question(settings: dict[str, Any]) -> "AbstractContextManager[Session]":
    """The session with the settings of a question."""
    follows_dial = settings["ratio"] is None and settings["dial"] is not None
    # A dial on the command line outranks a ratio in the file.
    return session_by(**{**settings, **({"ratio": ""} if follows_dial else {})})


def of_all_commands() -> dict[str, Any]:
    """The settings among the flags that stand before the command."""
    return {"runtime": click.get_current_context().find_root().params.get("runtime")}


@contextmanager
def session_by(**overrides: Any) -> "Iterator[Session]":
    """The session with flags over settings; flags that were not given are left out."""
    from quire import config
    from quire.session import Session

    given = {name: value for name, value in (*of_all_commands().items(), *overrides.items()) if value is not None}
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


@contextmanager
def watched(label: str) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """A progress bar and a way to say lines beside it, both on stderr: (say, progress)."""
    with progress_bar(label) as progress:

        def say(line: str) -> None:
            to_stderr(f"\r\033[K{line}" if sys.stderr.isatty() else line)

        yield say, progress


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
