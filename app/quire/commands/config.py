"""`quire config`: show, set, unset.

Knows how they are asked for and printed; what the settings are is in `quire.config`.
"""

import json

import click

from quire.commands.common import json_option, warn_if_outranked
from quire.terminal import printable


@click.group(name="config", invoke_without_command=True)
@json_option
@click.pass_context
def group(ctx: click.Context, as_json: bool) -> None:
    """Show all settings, and for each where its value comes from."""
    if ctx.invoked_subcommand is None:
        from quire import config, render

        state = config.in_force()
        if as_json:
            click.echo(json.dumps(render.settings_json(*state), indent=2))
        else:
            click.echo("\n".join([f"# {printable(str(config.config_file()))}", *render.settings_lines(*state)]))


@group.command(name="set")
@click.argument("name")
@click.argument("value")
def set_(name: str, value: str) -> None:
    """Write a setting into config.toml. Comments and order of the file stay."""
    from quire import config

    config.save({name: value})
    click.echo(f"{name} is {config.written(config.checked(name, value)) or 'not chosen'} from now on.")
    warn_if_outranked(name)


@group.command(name="unset")
@click.argument("name")
def unset(name: str) -> None:
    """Take a setting out of config.toml, so that its default holds."""
    from quire import config

    gone = config.unset(name)
    click.echo(f"{printable(name)} follows its default from now on." if gone else f"{name} was not set in the file.")
