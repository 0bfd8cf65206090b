"""`quire cache`: cache what was added; status, verify, clear, budget.

Knows how they are asked for and printed; what is cached, and when, is in `quire.shelf`, the rest in `quire.holdings`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from quire.commands.common import (
    INTERRUPTED,
    interruptible,
    json_option,
    model_option,
    progress_bar,
    session_by,
    warn,
    warn_if_outranked,
)
from quire.terminal import printable
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.holdings import Checked, Holdings
    from quire.session import Session
    from quire_engine.kv.catalogue import Catalogue, Entry

_OTHERS = "others"


@click.group(name="cache", invoke_without_command=True)
@model_option
@click.pass_context
def group(ctx: click.Context, model: str | None) -> None:
    """Cache the KV of everything that was added; goes on where it stopped."""
    if ctx.invoked_subcommand is None:
        with session_by(model=model) as session:
            cache_everything(session)


def cache_everything(session: "Session") -> None:
    from quire import render
    from quire_engine.errors import Aborted

    with interruptible() as stop:
        try:
            reason = session.engine.try_out(stop.is_set)
        except Aborted:
            click.echo("Stopped. `quire cache` goes on from here.")
            sys.exit(INTERRUPTED)
        if reason:
            click.echo(f"Nothing is cached: {printable(reason)} Questions are answered by full prefill.")
            return
        with progress_bar("Caching") as bar:
            done = session.cache(lambda p: bar(p.tokens_done, p.tokens_total), stop.is_set)
    stored = render.size(session.engine.chunks.store.size_bytes())
    click.echo(f"Cached {done.done} of {done.total} passages ({done.tokens_done} tokens); {stored} on disk.")
    if done.over_budget:
        limit = render.size(session.shelf.limit_bytes)
        click.echo(f"The disk budget of {limit} is used up. More: quire cache budget 40")
    if stop.is_set():
        click.echo("Stopped. `quire cache` goes on from here.")
        sys.exit(INTERRUPTED)


@group.command()
@json_option
def status(as_json: bool) -> None:
    """Show what is stored for each model, what it costs and what it is worth."""
    from quire import config, holdings

    with _catalogue() as catalogue:
        found = holdings.of(catalogue, int(config.load().cache_gb * 1e9))
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(_status_lines(found)))


def _status_lines(found: "Holdings") -> list[str]:
    from quire import render

    lines = []
    for h in found.each:
        turns = f", {_count(h.turns, 'turn')} of conversations among them" if h.turns else ""
        lines += [
            printable(h.model),
            f"  {_count(h.chunks, 'chunk')} with {h.tokens:,} tokens{turns}",
            f"  {render.size(h.size_bytes)}, {h.bits_per_value:.2f} bits per value",
            f"  {render.duration(1000 * h.seconds)} of computing that need not be done again",
        ]
    budget = f" of at most {render.size(found.limit_bytes)}" if found.limit_bytes else ", no limit"
    lines.append(f"On disk    {render.size(found.size_bytes)}{budget}")
    lines.append(f"Written    {render.size(found.written_bytes)} by this computer so far")
    return lines


@group.command()
@click.option("--keep", is_flag=True, help="Leave damaged files where they are.")
@json_option
def verify(keep: bool, as_json: bool) -> None:
    """Read every stored file, check every checksum, and remove what is damaged. Ends with 1 when anything was."""
    from quire import holdings

    with _catalogue() as catalogue, interruptible() as stop, progress_bar("Checking") as bar:
        checked = holdings.verify(catalogue, keep, bar, stop.is_set)
    click.echo(json.dumps(_checked_json(checked), indent=2) if as_json else "\n".join(_checked_lines(checked)))
    if checked.damaged or not checked.complete:
        sys.exit(1 if checked.damaged else INTERRUPTED)


def _checked_json(checked: "Checked") -> dict[str, object]:
    from dataclasses import asdict

    return asdict(checked)


def _checked_lines(checked: "Checked") -> list[str]:
    from quire import render

    lines = [f"{d.store}/{d.key}: {d.reason} {'Removed.' if d.removed else 'It stays.'}" for d in checked.damaged]
    all_of = "Checked" if checked.complete else "Stopped after"
    damaged = f"{len(checked.damaged)} damaged" if checked.damaged else "all sound"
    lines.append(f"{all_of} {_count(checked.chunks, 'file')}, {render.size(checked.size_bytes)}: {damaged}.")
    if any(d.removed for d in checked.damaged):
        lines.append("What was removed is computed again by `quire cache`, or when a question needs it.")
    return lines


@group.command()
@click.option("--model", metavar="NAME", help="Only what a model stored, as `quire cache status` calls it; or: others.")
@click.option("--unused-days", type=click.FloatRange(min=0), default=0.0, help="Only what was not used for so long.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def clear(model: str | None, unused_days: float, yes: bool, as_json: bool) -> None:
    """Delete cached KV: all of it, or some. Your documents and conversations stay; KV is computed again when needed."""
    with _catalogue() as catalogue:
        _clear(catalogue, _chosen(catalogue, model, unused_days), yes, as_json)


def _clear(catalogue: "Catalogue", entries: "list[Entry]", yes: bool, as_json: bool) -> None:
    from quire import holdings, render

    freed = sum(entry.size_bytes for entry in entries)
    what = f"{_count(len(entries), 'file')} of cached KV, {render.size(freed)}"
    if entries and not yes:
        if as_json or not sys.stdin.isatty():
            raise QuireError(f"This would delete {what}.", "Say --yes to do it.")
        again = render.duration(1000 * sum(entry.seconds for entry in entries))
        click.confirm(f"Delete {what}? Computing it again would take {again}.", abort=True)
    gone = holdings.remove(catalogue, entries)
    if as_json:
        click.echo(json.dumps({"chunks": gone, "freed_bytes": freed}, indent=2))
    elif gone < len(entries):
        raise QuireError(f"Only {gone} of {len(entries)} files could be deleted.", "Check who owns the directory.")
    else:
        click.echo(f"Deleted {what}." if entries else "There is nothing to delete.")


def _chosen(catalogue: "Catalogue", model: str | None, unused_days: float) -> "list[Entry]":
    from quire import holdings

    entries = holdings.unused(catalogue, unused_days)
    if model == _OTHERS:
        with session_by() as session:
            ours = {session.engine.chunks.store.root.name, session.engine.turns.store.root.name}
        return [entry for entry in entries if entry.store not in ours]
    if model is not None:
        stores = holdings.stores_of(catalogue, model)
        return [entry for entry in entries if entry.store in stores]
    return entries


@group.command()
@click.argument("gigabytes", required=False)
@json_option
def budget(gigabytes: str | None, as_json: bool) -> None:
    """Show how much disk space cached KV may take, or set it in GB; 0 is no limit."""
    from quire import config, holdings, render

    if gigabytes is not None:
        config.save({"cache_gb": gigabytes})
    limit_bytes = int(config.load().cache_gb * 1e9)
    with _catalogue() as catalogue:
        used = holdings.of(catalogue, limit_bytes).size_bytes
    if as_json:
        click.echo(json.dumps({"limit_bytes": limit_bytes, "used_bytes": used}, indent=2))
    else:
        at_most = f"at most {render.size(limit_bytes)}" if limit_bytes else "as much as there is"
        click.echo(f"Cached KV may take {at_most}; it takes {render.size(used)}.")
        if limit_bytes and used > limit_bytes:
            click.echo("What is worth least goes with `quire cache`, or when something new is stored.")
    if gigabytes is not None:
        warn_if_outranked("cache_gb")


@contextmanager
def _catalogue() -> "Iterator[Catalogue]":
    """Of everything that is cached on this computer."""
    from quire import paths
    from quire_engine.kv.catalogue import Catalogue

    catalogue = Catalogue.of(paths.cache_dir())
    try:
        yield catalogue
    finally:
        catalogue.close()
    warn(catalogue.take_notice())


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
