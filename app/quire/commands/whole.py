"""`quire ask --all`: one question to every passage, with progress and an account of every document.

Knows how it is printed; how it is answered is `quire.whole`'s.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from quire.commands.common import to_stderr, watched
from quire.terminal import printable

if TYPE_CHECKING:
    from quire.library import Within
    from quire.session import Session
    from quire.whole import Account, Plan
    from quire_engine.types import Answered


def ask_all(
    session: "Session", question: str, within: "Within", should_stop: Callable[[], bool], as_json: bool
) -> None:
    """Prints the answer as it comes, and then what became of every document."""
    from quire import render
    from quire.whole import Account, Part, Plan, WholeFolder
    from quire_engine.types import Answered, Text

    text = ""
    with watched("Reading all") as (say, progress):
        for event in WholeFolder(session).ask(question, within, should_stop):
            match event:
                case Plan():
                    plan = event
                    say(render.plan_line(event))
                case Part():
                    progress(event.done, event.total)
                    if event.answer:
                        say(render.part_line(event))
                case Text():
                    if not as_json:
                        click.echo(printable(event.text) if text else "\n" + printable(event.text), nl=False)
                        sys.stdout.flush()
                    text += event.text
                case Account():
                    account = event
                case Answered():
                    answered = event
    if as_json:
        click.echo(json.dumps(_as_json(text, plan, account, answered, session), indent=2))
        return
    click.echo("\n")
    for line in _lines(account):
        click.echo(line)
    to_stderr("")


def _lines(account: "Account") -> list[str]:
    from quire import render

    count = "1 passage" if account.passages == 1 else f"{account.passages:,} passages"
    read = f"{count} read in {render.duration(account.took_ms)}."
    return [
        f"Stopped: {read}" if account.stopped else read,
        *render.account_lines(account.documents, "--json lists all"),
    ]


def _as_json(
    text: str, plan: "Plan", account: "Account", answered: "Answered", session: "Session"
) -> dict[str, object]:
    from quire import render

    tokens = answered.tokens
    return {
        "answer": text,
        "sources": render.sources_json(account.sources),
        "parts": account.parts,
        "passages": plan.passages,
        "passages_read": account.passages,
        "took_ms": round(account.took_ms, 3),
        "stopped": account.stopped,
        "documents": [{"path": str(d.path), "state": d.state, "reason": d.reason} for d in account.documents],
        "tokens": {
            "context": tokens.context,
            "reused": tokens.reused,
            "recomputed": tokens.recomputed,
            "fresh": tokens.fresh,
            "generated": tokens.generated,
        },
        "predicted": {"reading_ms": round(plan.least_ms, 3)},
        "leaves": plan.leaves,
        "model": session.engine.model_name,
        "runtime": session.engine.runtime_name,
    }
