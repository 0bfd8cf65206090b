"""The command line: parses words, calls the session, prints. The groups of commands are in `commands`. Heavy modules
are imported inside the commands.

quire [DIR]    quire add DIR...    quire ask "question"    quire status    quire cache    quire bench ttft
"""

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click_default_group import DefaultGroup

from quire import __version__
from quire.commands import bench, cache, compare, config, doctor, models, search, watch
from quire.commands.common import (
    INTERRUPTED,
    by_question,
    interruptible,
    json_option,
    model_option,
    of_all_commands,
    place_of,
    progress_bar,
    question_options,
    session_by,
)
from quire.commands.whole import ask_all
from quire.terminal import printable
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Session


class _Quire(DefaultGroup, click.Group):  # type: ignore[misc]  # the second base only tells types
    """The one place where the command line shows an error. A path in place of a command opens the application."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = cmd_name.startswith("-") or "/" in cmd_name or Path(cmd_name).exists()
        if cmd_name not in self.commands and not place:
            close = difflib.get_close_matches(cmd_name, self.commands, n=1)
            meant = f"Did you mean {close[0]}?" if close else "A folder is written with a slash: quire notes/"
            ctx.fail(f"There is no command {printable(cmd_name)!r} and no such file or folder. {meant}")
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QuireError as error:
            click.secho(f"quire: {printable(error.message)}", fg="red", err=True)
            if error.hint:
                click.echo(f"       {printable(error.hint)}", err=True)
            if error.details:
                click.echo(f"       ({printable(error.details)})", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nStopped. The same command goes on from here.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Quire, default="chat", default_if_no_args=True)
@click.version_option(__version__, prog_name="quire")
@click.option("--runtime", help="What computes: auto, llama.cpp, torch or openai.")
def main(runtime: str | None) -> None:
    """Chat with your own documents. Their KV is cached on disk, so the first word comes at once."""


for _group in (
    cache.group,
    models.group,
    config.group,
    bench.group,
    compare.compare,
    watch.watch,
    search.search,
    doctor.doctor,
):
    main.add_command(_group)


@main.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--plain", is_flag=True, help="Line by line, for screen readers and pipes: questions from stdin.")
@model_option
def chat(paths: tuple[Path, ...], plain: bool, model: str | None) -> None:
    """Open the application, after adding PATHS. Plain `quire` and `quire PATH` do the same."""
    if not plain and not (sys.stdin.isatty() and sys.stdout.isatty()):
        hint = 'Line by line: quire chat --plain. In scripts: quire ask "question", quire status --json.'
        raise QuireError("The application needs a terminal.", hint)
    for path in paths:
        if not path.expanduser().exists():
            raise QuireError(f"There is no file or folder {path}.", "Check the spelling.")
    if plain:
        from quire import plain as lines

        with session_by(model=model) as session:
            sys.exit(lines.run(session, paths, interruptible))
    from quire.tui.app import run

    flags = {"model": model, **of_all_commands()}
    run({name: value for name, value in flags.items() if value}, paths)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--no-cache", is_flag=True, help="Make the text searchable and leave caching for later.")
@model_option
def add(paths: tuple[Path, ...], no_cache: bool, model: str | None) -> None:
    """Add folders or files: index their text (seconds), then cache their KV (minutes, can be stopped)."""
    from quire import render

    with session_by(model=model) as session:
        roots = [session.library.add_root(path) for path in paths]
        with progress_bar("Reading") as bar:
            report = session.index(roots, lambda p: bar(p.done, p.total))
        for line in render.index_lines(report):
            click.echo(line)
        if not no_cache:
            cache.cache_everything(session)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def remove(paths: tuple[Path, ...]) -> None:
    """Forget folders or files that were added. The files themselves stay untouched."""
    from quire import render

    with session_by() as session:
        for path in paths:
            count = session.library.remove_root(path)
            documents = "1 document" if count == 1 else f"{count:,} documents"
            click.echo(f"Forgot {documents} of {render.path_from_here(path)}.")


@main.command()
@model_option
@json_option
def status(model: str | None, as_json: bool) -> None:
    """Show what was added, what is cached, and which files were skipped and why.

    With --json: folders, documents (how many were read), skipped (path, reason, remedy); passages, tokens, cached (how
    many passages are); disk_bytes, limit_bytes (the budget; 0: none), written_bytes (ever); model, runtime, leaves
    (what leaves this computer, where a server answers), reuse_off (why nothing is cached with this model), finding.
    """
    from quire import overview

    with session_by(model=model) as session:
        state = overview.of(session)
        click.echo(json.dumps(state.as_json(), indent=2) if as_json else "\n".join(state.lines()))


@main.command()
@click.argument("question")
@question_options(
    ("fast", "balanced", "exact"), "How near to full prefill: fast aims at KL 0.05, balanced at 0.009, exact is it."
)
@click.option("--all", "whole", is_flag=True, help="Read every passage, not only what is found: slow, but complete.")
def ask(question: str, within: Path | None, as_json: bool, whole: bool, **settings: Any) -> None:
    """Answer a question from the documents, with its sources and what it took.

    With --all, or the words "in all files" in it, or /all before it, every passage is read, and every document
    accounted for: with --json in documents (path, state: contributed, nothing, unreadable or not reached; reason).
    """
    from quire.whole import asks_for_all

    place = place_of(within)
    with by_question(settings) as session, interruptible() as stop:
        if whole or asks_for_all(question):
            ask_all(session, question, place, stop.is_set, as_json)
        else:
            _Answering(session, as_json).show(session.ask(question, place, stop.is_set))
        if stop.is_set():
            sys.exit(INTERRUPTED)


class _Answering:
    """Prints one answer as it comes."""

    def __init__(self, session: "Session", as_json: bool) -> None:
        self._session = session
        self._as_json = as_json

    def show(self, events: Iterator[Any]) -> None:
        from quire import render
        from quire.session import Found
        from quire_engine.types import Answered, Forecast, Text

        text: list[str] = []
        for event in events:
            match event:
                case Found():
                    found = event
                case Forecast():
                    forecast = event
                    self._say(render.forecast_line(forecast), err=True, dim=True)
                case Text():
                    text.append(printable(event.text))
                    self._say(text[-1], end="")
                case Answered():
                    self._finish("".join(text), found, forecast, event)

    def _finish(self, text: str, found: Any, forecast: Any, answered: Any) -> None:
        from quire import render

        if self._as_json:
            click.echo(json.dumps(render.answer_json(text, found, forecast, answered, self._about()), indent=2))
            return
        self._say("\n\nSources" if answered.ending != "stopped" else "\n\nStopped. Sources")
        for number, hit in enumerate(found.sources, 1):
            self._say(f"  {number}. {render.source(hit)}")
        self._say(render.truth_line(found, forecast, answered), dim=True)

    def _about(self) -> dict[str, object]:
        from quire.config_values import FromDial
        from quire_engine.selection import selectors

        settings, engine = self._session.settings, self._session.engine
        return {
            "selector": selectors.parse(settings.selector).name,
            "dial": settings.dial if isinstance(settings.ratio, FromDial) else "custom",
            "model": engine.model_name,
            "runtime": engine.runtime_name,
        }

    def _say(self, text: str, end: str = "\n", err: bool = False, dim: bool = False) -> None:
        if not self._as_json:
            click.secho(text + end, nl=False, err=err, dim=dim or None)
            (sys.stderr if err else sys.stdout).flush()
