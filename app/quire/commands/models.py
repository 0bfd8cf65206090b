"""`quire models`: list, recommend, use, pull, profile, remove.

Knows how they are asked for and printed; what they do is in `quire.models` and `quire.advice`.
"""

import json
from dataclasses import replace

import click

from quire.commands.common import interruptible, json_option, model_option, progress_bar, session_by, warn_if_outranked
from quire.terminal import printable


@click.group(name="models", invoke_without_command=True)
@model_option
@json_option
@click.pass_context
def group(ctx: click.Context, model: str | None, as_json: bool) -> None:
    """List the models: the bundled one, those on this computer, and well-known ones to fetch."""
    if ctx.invoked_subcommand is None:
        _list(model, as_json)


@group.command(name="list")
@model_option
@json_option
def list_models(model: str | None, as_json: bool) -> None:
    """The same as plain `quire models`."""
    _list(model, as_json)


def _list(model: str | None, as_json: bool) -> None:
    from quire import config, models

    listed = models.listing(config.load({"model": model} if model else {}))
    click.echo(json.dumps(models.as_json(listed), indent=2) if as_json else "\n".join(models.lines(listed)))


@group.command()
@json_option
def recommend(as_json: bool) -> None:
    """Say which of the well-known models suits this machine's memory and graphics device, and what each one needs."""
    from quire import advice

    given = advice.on(advice.this_machine())
    click.echo(json.dumps(given.as_json(), indent=2) if as_json else "\n".join(given.lines()))


@group.command()
@click.argument("name")
def use(name: str) -> None:
    """Use a model from now on: its NAME or the path of a GGUF file. Says what switching costs."""
    from quire import config, model_files, models

    chosen = models.find(name, config.load())
    with session_by() as session:
        price = models.price(session, replace(session.settings, model=chosen.choice))
    config.save({"model": chosen.choice})
    if not chosen.bundled:
        model_files.remember(chosen.path)
    click.echo(f"From now on: {printable(chosen.title)}. {'' if chosen.in_use else price.sentence()}".rstrip())
    warn_if_outranked("model")


@group.command()
@click.argument("source")
@click.option("--sha256", default="", help="What the file must be; Hugging Face says it by itself.")
def pull(source: str, sha256: str) -> None:
    """Fetch a model: a NAME of `quire models`, a web address, or organisation/repository/FILE.gguf.

    Ctrl-C is safe: the same command goes on from there.
    """
    from quire import models, render
    from quire_engine.errors import Aborted

    with interruptible() as stop, progress_bar("Fetching") as bar:
        try:
            path = models.pull(
                source, lambda f: bar(f.done_bytes, f.total_bytes or f.done_bytes + 1), stop.is_set, sha256
            )
        except Aborted:
            raise KeyboardInterrupt from None
    click.echo(f"Fetched {render.size(path.stat().st_size)}: {printable(path.name)}")
    click.echo(f"Use it: quire models use {printable(path.stem)}")


@group.command()
@model_option
def profile(model: str | None) -> None:
    """Measure what fewer bits cost a model's answers, on your own documents: its precision plans follow from that.

    Takes minutes, and memory for the whole model in float32. Ctrl-C is safe and leaves everything as it was.
    """
    from quire_engine.errors import Aborted

    with session_by(model=model) as session, interruptible() as stop, progress_bar("Measuring") as bar:
        passages, own = session.calibration_passages()
        engine = session.engine
        try:
            engine.measure_precision(passages, bar, stop.is_set)
        except Aborted:
            raise KeyboardInterrupt from None
    read = "your documents" if own else "a text that comes with Quire, since there are few documents"
    click.echo(f"Measured {printable(engine.model_name)} on {len(passages)} passages of {read}.")
    for name, bits in engine.plan_sizes().items():
        click.echo(f"  {name:<8} {bits:.2f} bits per value, {16 / bits:.1f}x smaller than fp16")
    click.echo("Cached KV is made anew by the new plan: quire cache")


@group.command(name="remove")
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
