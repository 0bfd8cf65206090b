"""`quire doctor`: is everything that Quire stands on in order?

Knows how that is asked for and printed; what is looked at is in `quire.doctor`.
"""

import json
import sys
from typing import TYPE_CHECKING

import click

from quire.commands.common import json_option, model_option, of_all_commands

if TYPE_CHECKING:
    from quire.doctor import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@model_option
@json_option
def doctor(model: str | None, as_json: bool) -> None:
    """Check settings, index, watches, model, runtime, kernels, disk and cache, with a remedy for what is wrong.

    Repairs nothing by itself. Takes seconds. Ends with 1 when something failed.

    With --json: state (the worst one) and checks, each with check, state (ok, warn or fail), found, remedy and numbers.
    """
    from quire import doctor as checks

    flags = {name: value for name, value in {"model": model, **of_all_commands()}.items() if value is not None}
    findings = []
    for finding in checks.look(flags):
        findings.append(finding)
        if not as_json:
            _print(finding)
    state = checks.worst(findings)
    if as_json:
        click.echo(json.dumps({"state": state, "checks": [finding.as_json() for finding in findings]}, indent=2))
    if state == "fail":
        sys.exit(1)


def _print(finding: "Finding") -> None:
    state = click.style(f"{finding.state:<4}", fg=_COLOURS[finding.state])
    click.echo(f"{state}  {finding.check:<13}  {finding.found}")
    if finding.remedy:
        click.echo(f"{'':<21}-> {finding.remedy}")
    sys.stdout.flush()
