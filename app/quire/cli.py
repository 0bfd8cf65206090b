"""The command line: parses words, calls the session, prints. Heavy modules are imported inside the commands.

quire [DIR]    quire add DIR...    quire ask "question"    quire status    quire cache    quire bench ttft
"""

import difflib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING, Any

import click
from click_default_group import DefaultGroup

from quire import __version__
from quire.terminal import printable
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Session

_INTERRUPTED = 130


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
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Quire, default="chat", default_if_no_args=True)
@click.version_option(__version__, prog_name="quire")
def main() -> None:
    """Chat with your own documents. Their KV is cached on disk, so the first word comes at once."""


_model_option = click.option("--model", metavar="PATH", help="GGUF file to use instead of the bundled model.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@main.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--plain", is_flag=True, help="Line by line, for screen readers and pipes: questions from stdin.")
@_model_option
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

        with _session(model=model) as session:
            sys.exit(lines.run(session, paths, _interruptible))
    from quire.tui.app import run

    run({"model": model} if model else {}, paths)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--no-cache", is_flag=True, help="Make the text searchable and leave caching for later.")
@_model_option
def add(paths: tuple[Path, ...], no_cache: bool, model: str | None) -> None:
    """Add folders or files: index their text (seconds), then cache their KV (minutes, can be stopped)."""
    from quire import render

    with _session(model=model) as session:
        roots = [session.library.add_root(path) for path in paths]
        with _progress("Reading") as bar:
            report = session.index(roots, lambda p: bar(p.done, p.total))
        for line in render.index_lines(report):
            click.echo(line)
        if not no_cache:
            _cache(session)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def remove(paths: tuple[Path, ...]) -> None:
    """Forget folders or files that were added. The files themselves stay untouched."""
    from quire import render

    with _session() as session:
        for path in paths:
            count = session.library.remove_root(path)
            documents = "1 document" if count == 1 else f"{count:,} documents"
            click.echo(f"Forgot {documents} of {render.path_from_here(path)}.")


@main.command()
@_model_option
def cache(model: str | None) -> None:
    """Cache the KV of everything that was added; goes on where it stopped."""
    with _session(model=model) as session:
        _cache(session)


@main.command()
@_model_option
@_json_option
def status(model: str | None, as_json: bool) -> None:
    """Show what was added, what is cached, and which files were skipped and why."""
    from quire import overview

    with _session(model=model) as session:
        state = overview.of(session)
        click.echo(json.dumps(state.as_json(), indent=2) if as_json else "\n".join(state.lines()))


@main.command()
@click.argument("question")
@click.option("--in", "within", type=click.Path(path_type=Path), help="Only documents in this folder or file.")
@click.option("--ratio", type=float, help="Share of the reused tokens to compute again, 0 to 1.")
@click.option("--dial", type=click.Choice(["fast", "balanced", "exact"]), help="Exact reads everything again.")
@click.option("--selector", help="Which tokens are computed again: default, probe, spectral, first, ...")
@click.option("--context-tokens", type=int, help="Tokens of documents that the question may use.")
@click.option("--max-tokens", type=int, help="Longest answer.")
@_model_option
@_json_option
def ask(question: str, within: Path | None, as_json: bool, **settings: Any) -> None:
    """Answer a question from the documents, with its sources and what it took."""
    from quire.library import EVERYWHERE
    from quire.render import path_from_here

    if settings["ratio"] is None and settings["dial"] is not None:
        settings["ratio"] = ""  # a dial on the command line outranks a ratio in the file
    with _session(**settings) as session, _interruptible() as stop:
        place = within.expanduser().resolve() if within else EVERYWHERE
        if within and not within.expanduser().exists():
            raise QuireError(f"There is no file or folder {path_from_here(within)}.", "Check the path after --in.")
        _Answering(session, as_json).show(session.ask(question, place, stop.is_set))
        if stop.is_set():
            sys.exit(_INTERRUPTED)


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
        from quire.config import FromDial
        from quire_engine.selection import selectors

        settings, engine = self._session.settings, self._session.engine
        return {
            "selector": selectors.parse(settings.selector).name,
            "dial": settings.dial if isinstance(settings.ratio, FromDial) else "custom",
            "model": engine.model_name,
            "runtime": engine.runtime.name,
        }

    def _say(self, text: str, end: str = "\n", err: bool = False, dim: bool = False) -> None:
        if not self._as_json:
            click.secho(text + end, nl=False, err=err, dim=dim or None)
            (sys.stderr if err else sys.stdout).flush()


# Models and settings


@main.group(name="models", invoke_without_command=True)
@_model_option
@_json_option
@click.pass_context
def models_(ctx: click.Context, model: str | None, as_json: bool) -> None:
    """List the models: the bundled one, those on this computer, and well-known ones to fetch."""
    if ctx.invoked_subcommand is None:
        from quire import config, models

        listed = models.listing(config.load({"model": model} if model else {}))
        click.echo(json.dumps(models.as_json(listed), indent=2) if as_json else "\n".join(models.lines(listed)))


@models_.command()
@click.argument("name")
def use(name: str) -> None:
    """Use a model from now on: its NAME or the path of a GGUF file. Says what switching costs."""
    from quire import config, model_files, models

    chosen = models.find(name, config.load())
    with _session() as session:
        price = models.price(session, replace(session.settings, model=chosen.choice))
    config.save({"model": chosen.choice})
    if not chosen.bundled:
        model_files.remember(chosen.path)
    click.echo(f"From now on: {printable(chosen.title)}. {'' if chosen.in_use else price.sentence()}".rstrip())
    _warn_if_outranked("model")


@models_.command()
@click.argument("source")
@click.option("--sha256", default="", help="What the file must be; Hugging Face says it by itself.")
def pull(source: str, sha256: str) -> None:
    """Fetch a model: a NAME of `quire models`, a web address, or organisation/repository/FILE.gguf.

    Ctrl-C is safe: the same command goes on from there.
    """
    from quire import models, render
    from quire_engine.errors import Aborted

    with _interruptible() as stop, _progress("Fetching") as bar:
        try:
            path = models.pull(
                source, lambda f: bar(f.done_bytes, f.total_bytes or f.done_bytes + 1), stop.is_set, sha256
            )
        except Aborted:
            raise KeyboardInterrupt from None
    click.echo(f"Fetched {render.size(path.stat().st_size)}: {printable(path.name)}")
    click.echo(f"Use it: quire models use {printable(path.stem)}")


@models_.command(name="remove")
@click.argument("name")
def remove_model(name: str) -> None:
    """Delete a model that was fetched. One that lies elsewhere is only forgotten."""
    from quire import config, models, render

    model = models.find(name, config.load())
    models.remove(model)
    if model.path.exists():
        click.echo(f"Forgot {printable(model.title)}. Its file stays: {printable(str(model.path))}")
    else:
        click.echo(f"Deleted {printable(model.title)}; {render.size(model.size_bytes)} are free again.")


@main.group(name="config", invoke_without_command=True)
@_json_option
@click.pass_context
def config_(ctx: click.Context, as_json: bool) -> None:
    """Show all settings, and for each where its value comes from."""
    if ctx.invoked_subcommand is None:
        from quire import config, render

        state = config.in_force()
        if as_json:
            click.echo(json.dumps(render.settings_json(*state), indent=2))
        else:
            click.echo("\n".join([f"# {printable(str(config.config_file()))}", *render.settings_lines(*state)]))


@config_.command(name="set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Write a setting into config.toml. Comments and order of the file stay."""
    from quire import config

    config.save({name: value})
    click.echo(f"{name} is {config.written(config.checked(name, value)) or 'not chosen'} from now on.")
    _warn_if_outranked(name)


@config_.command(name="unset")
@click.argument("name")
def unset(name: str) -> None:
    """Take a setting out of config.toml, so that its default holds."""
    from quire import config

    gone = config.unset(name)
    click.echo(f"{printable(name)} follows its default from now on." if gone else f"{name} was not set in the file.")


def _warn_if_outranked(name: str) -> None:
    from quire import config

    if config.in_force()[1][name] == "environment":
        click.secho(f"{config.variable(name)} in the environment still outranks it.", fg="yellow", err=True)


# Measurements


@main.group()
def bench() -> None:
    """Measure on this machine, with this model; every number comes with its baseline from the same run."""


_ratios_option = click.option("--ratio", "ratios", default="0.08,0.16", show_default=True, help="Ratios to compare.")


@bench.command()
@click.option("--tokens", default="1000,2000,4000", show_default=True, help="Lengths of the context.")
@_ratios_option
@click.option("--runs", default=3, show_default=True, help="How often every method runs.")
@_model_option
@_json_option
def ttft(tokens: str, ratios: str, runs: int, model: str | None, as_json: bool) -> None:
    """Time to the first token: full prefill, plain llama-cpp-python, prefix reuse, Quire from memory and disk."""
    from quire import bench as measure

    with _session(model=model) as session:
        rows = measure.ttft(session, _numbers(tokens, int), _numbers(ratios, float), runs, _to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.ttft_table(rows)))


@bench.command()
@click.option("--turns", default=5, show_default=True, help="Turns before the conversation is opened again.")
@click.option("--tokens", default=700, show_default=True, help="Tokens of passages that every turn brings.")
@click.option("--runs", default=3, show_default=True, help="How many conversations.")
@_model_option
@_json_option
def followup(turns: int, tokens: int, runs: int, model: str | None, as_json: bool) -> None:
    """Time to the first token of every turn of a conversation, and of one that is opened again."""
    from quire import bench as measure

    with _session(model=model) as session:
        rows = measure.followup(session, turns, tokens, runs, _to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.followup_table(rows)))


@bench.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Questions in SQuAD's JSON format.")
@click.option("--questions", default=30, show_default=True, help="How many are asked.")
@click.option("--passages", default=5, show_default=True, help="Passages of the question's article in the prompt.")
@_ratios_option
@click.option("--selector", help="Which tokens are computed again.")
@_model_option
@_json_option
def answers(
    data: Path, questions: int, passages: int, ratios: str, selector: str | None, model: str | None, as_json: bool
) -> None:
    """How many answers contain the gold answer, exactly and at each ratio."""
    from quire import bench as measure

    with _session(model=model, selector=selector) as session:
        rows = measure.answers(session, data, questions, passages, _numbers(ratios, float), _to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.answers_table(rows)))


# What several commands share


@contextmanager
def _session(**overrides: Any) -> "Iterator[Session]":
    """The session with flags over settings; flags that were not given are left out."""
    from quire import config
    from quire.session import Session

    given = {name: value for name, value in overrides.items() if value is not None}
    with Session(config.load(given)) as session:
        yield session


def _cache(session: "Session") -> None:
    from quire import render
    from quire_engine.errors import Aborted

    with _interruptible() as stop:
        try:
            reason = session.engine.try_out(stop.is_set)
        except Aborted:
            click.echo("Stopped. `quire cache` goes on from here.")
            sys.exit(_INTERRUPTED)
        if reason:
            click.echo(f"Nothing is cached: {printable(reason)} Questions are answered by full prefill.")
            return
        with _progress("Caching") as bar:
            done = session.cache(lambda p: bar(p.tokens_done, p.tokens_total), stop.is_set)
    stored = render.size(session.engine.chunks.store.size_bytes())
    click.echo(f"Cached {done.done} of {done.total} passages ({done.tokens_done} tokens); {stored} on disk.")
    if done.over_budget:
        limit = render.size(session.shelf.limit_bytes)
        click.echo(f"The disk budget of {limit} is used up. More: quire config set cache_gb 40")
    if stop.is_set():
        click.echo("Stopped. `quire cache` goes on from here.")
        sys.exit(_INTERRUPTED)


@contextmanager
def _interruptible() -> Iterator[Flag]:
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
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with an estimate; call it with (done, total). Silent where nobody watches."""
    with click.progressbar(length=1, label=label, file=sys.stderr, show_eta=True) as bar:
        started_at: list[int] = []

        def show(done: int, total: int) -> None:
            if not started_at:  # what was done before this run must not flatter the estimate
                started_at.append(done)
            bar.length = max(1, total - started_at[0])
            bar.update(done - started_at[0] - bar.pos)

        yield show


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Comma-separated numbers of an option. Raises QuireError."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise QuireError(f"{text!r} is not a list of numbers.", "Write for example 1000,2000,4000.") from error
