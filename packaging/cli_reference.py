"""Writes docs/cli.md from the commands and settings themselves, so that the page cannot say anything else.

    python packaging/cli_reference.py            writes the page
    python packaging/cli_reference.py --check    exits 1 when the page is not what it would write

Knows click's commands and quire.config.explained(); nothing on the page is written by hand.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from quire.cli import main as quire
from quire.config import explained

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, "quire bench ttft"; a group before its own commands."""
    yield name, command
    if isinstance(command, click.Group):
        for part in sorted(command.commands):
            yield from commands(command.commands[part], f"{name} {part}")


def page() -> str:
    """The whole page."""
    parts = [
        "# The command line",
        "Written by `python packaging/cli_reference.py` from the commands themselves; do not edit it by hand.",
        *(part for name, command in commands(quire, "quire") for part in _command(name, command)),
        *_settings(),
    ]
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"## {name}"
    yield inspect.cleandoc(command.help or "")
    yield f"```\n{name} {' '.join(command.collect_usage_pieces(context))}\n```"
    if isinstance(command, click.Group):
        yield _table(
            ("command", "what it does"),
            [(f"`{part}`", command.commands[part].get_short_help_str(200)) for part in sorted(command.commands)],
        )
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    yield _table(("option", "meaning"), [(f"`{names}`", meaning) for names, meaning in records])


def _settings() -> Iterator[str]:
    yield "## Settings"
    yield (
        "From `config.toml` in Quire's configuration directory, or from the environment, which outranks the file; an"
        " option on the command line outranks both. A name or value that does not exist is refused."
    )
    yield _table(
        ("setting", "environment", "default", "accepts", "meaning"),
        [(f"`{s.name}`", f"`QUIRE_{s.name.upper()}`", _default(s.default), s.allowed, s.meaning) for s in explained()],
    )


def _default(value: object) -> str:
    """As one would write it; what stands for "nothing was chosen" is written as nothing."""
    return f"`{value}`" if isinstance(value, str | int | float) else "empty"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/cli.md from the commands and settings.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{PAGE} is not current. Run: python packaging/cli_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
