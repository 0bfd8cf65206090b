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
    from quire.whole import Account, Mention, Part, Plan

_MOST_LISTED = 20  # documents of one kind; --json lists all


def ask_all(
    session: "Session", question: str, within: "Within", should_stop: Callable[[], bool], as_json: bool
) -> None:
    """Prints the answer as it comes, and then what became of every document."""
    from quire.whole import Account, Part, Plan, WholeFolder
    from quire_engine.types import Text

    text = ""
    with watched("Reading all") as (say, progress):
        for event in WholeFolder(session).ask(question, within, should_stop):
            match event:
                case Plan():
                    plan = event
                    say(_plan_line(event))
                case Part():
                    progress(event.done, event.total)
                    if event.answer:
                        say(_part_line(event))
                case Text():
                    if not as_json:
                        click.echo(printable(event.text) if text else "\n" + printable(event.text), nl=False)
                        sys.stdout.flush()
                    text += event.text
                case Account():
                    account = event
    if as_json:
        click.echo(json.dumps(_as_json(text, plan, account), indent=2))
        return
    click.echo("\n")
    for line in account_lines(account):
        click.echo(line)
    to_stderr("")


def _plan_line(plan: "Plan") -> str:
    from quire import render

    parts = "1 part" if plan.parts == 1 else f"{plan.parts:,} parts"
    least = f"; reading takes about {render.duration(plan.least_ms)}, answers not counted" if plan.least_ms else ""
    return f"{plan.passages:,} passages of {plan.documents:,} documents in {parts}{least}"


def _part_line(part: "Part") -> str:
    from quire import render

    answer = " ".join(printable(part.answer).split())
    left = f"; about {render.duration(part.left_ms)} left" if part.left_ms else ""
    return f"part {part.done} of {part.total}{left}: {answer[:90]}{'…' if len(answer) > 90 else ''}"


def account_lines(account: "Account") -> list[str]:
    """What became of every document, in words."""
    from quire import render

    passages = f"{account.passages:,} passages read in {render.duration(account.took_ms)}"
    lines = [f"Stopped: {passages}." if account.stopped else f"{passages[0].upper()}{passages[1:]}."]
    kinds = {
        "contributed": "Contributed",
        "nothing": "Had nothing",
        "unreadable": "Could not be read",
        "not reached": "Not reached",
    }
    for state, words in kinds.items():
        those = [document for document in account.documents if document.state == state]
        if those:
            lines.append(f"{words} ({len(those):,}):")
            lines += [f"  {_told(document)}" for document in those[:_MOST_LISTED]]
            lines += (
                [f"  and {len(those) - _MOST_LISTED:,} more: --json lists all"] if len(those) > _MOST_LISTED else []
            )
    return lines


def _told(document: "Mention") -> str:
    from quire import render

    reason = f": {printable(document.reason)}" if document.reason else ""
    return render.path_from_here(document.path) + reason


def _as_json(text: str, plan: "Plan", account: "Account") -> dict[str, object]:
    return {
        "answer": text,
        "parts": account.parts,
        "passages": plan.passages,
        "passages_read": account.passages,
        "took_ms": round(account.took_ms, 3),
        "stopped": account.stopped,
        "documents": [{"path": str(d.path), "state": d.state, "reason": d.reason} for d in account.documents],
    }
