"""`quire bench`: its measurements by name.

Knows how they are asked for and printed; what is measured is in `quire.bench`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quire.commands.common import (
    INTERRUPTED,
    interruptible,
    json_option,
    model_option,
    numbers,
    session_by,
    to_stderr,
)
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.bench.cases import Case
    from quire.session import Session
    from quire_engine.engine import Engine


@click.group(name="bench")
def group() -> None:
    """Measure on this machine, with this model; every number comes with its baseline from the same run."""


_ratios_option = click.option("--ratio", "ratios", default="0.08,0.16", show_default=True, help="Ratios to compare.")


@group.command()
@click.option("--tokens", default="1000,2000,4000", show_default=True, help="Lengths of the context.")
@_ratios_option
@click.option("--runs", default=3, show_default=True, help="How often every method runs.")
@model_option
@json_option
def ttft(tokens: str, ratios: str, runs: int, model: str | None, as_json: bool) -> None:
    """Time to the first token: full prefill, plain llama-cpp-python, prefix reuse, Quire from memory and disk."""
    from quire.bench import timing as measure

    with session_by(model=model) as session:
        rows = measure.ttft(session, numbers(tokens, int), numbers(ratios, float), runs, to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.ttft_table(rows)))


@group.command()
@click.option("--turns", default=5, show_default=True, help="Turns before the conversation is opened again.")
@click.option("--tokens", default=700, show_default=True, help="Tokens of passages that every turn brings.")
@click.option("--runs", default=3, show_default=True, help="How many conversations.")
@model_option
@json_option
def followup(turns: int, tokens: int, runs: int, model: str | None, as_json: bool) -> None:
    """Time to the first token of every turn of a conversation, and of one that is opened again."""
    from quire.bench import timing as measure

    with session_by(model=model) as session:
        rows = measure.followup(session, turns, tokens, runs, to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.followup_table(rows)))


@group.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Questions in SQuAD's JSON format.")
@click.option("--questions", default=30, show_default=True, help="How many are asked.")
@click.option("--passages", default=5, show_default=True, help="Passages of the question's article in the prompt.")
@_ratios_option
@click.option("--selector", help="Which tokens are computed again.")
@model_option
@json_option
def answers(
    data: Path, questions: int, passages: int, ratios: str, selector: str | None, model: str | None, as_json: bool
) -> None:
    """How many answers contain the gold answer, exactly and at each ratio."""
    from quire.bench import timing as measure

    with session_by(model=model, selector=selector) as session:
        rows = measure.answers(session, data, questions, passages, numbers(ratios, float), to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.answers_table(rows)))


_count, _share = click.IntRange(min=1), click.FloatRange(0, 1)
_data_option = click.option(
    "--data", type=click.Path(path_type=Path), help="Questions in SQuAD's or MuSiQue's JSON format."
)
_passage_tokens_option = click.option(
    "--passage-tokens",
    type=_count,
    default=180,
    show_default=True,
    help="Texts are cut into passages of at most so many tokens.",
)


@group.command()
@_data_option
@click.option("--questions", type=_count, default=16, show_default=True, help="How many are asked.")
@click.option("--passages", type=_count, default=6, show_default=True, help="Passages in the prompt.")
@_passage_tokens_option
@click.option("--ratio", type=_share, default=0.16, show_default=True, help="Share of passage tokens computed again.")
@click.option("--selector", help="Which tokens are computed again.")
@click.option("--plans", default="", help="Which plans, such as safe,k4v3,measured-3.4,q8_0; all unless given.")
@model_option
@json_option
def codec(
    data: Path | None,
    questions: int,
    passages: int,
    passage_tokens: int,
    ratio: float,
    selector: str | None,
    plans: str,
    model: str | None,
    as_json: bool,
) -> None:
    """What fewer bits per value cost answers: KL and top-1 of every precision plan, against full prefill.

    Ctrl-C ends it with what was found so far. Without --data questions are made from the headings of the library, or of
    the sample documents.
    """
    from quire.bench import codec as measure

    with session_by(model=model, selector=selector) as session, interruptible() as stopping:
        cases = _cases(session, data, questions, passages, passage_tokens)
        report = measure.codec(session, cases, plans, ratio, to_stderr, stopping.is_set)
        click.echo(measure.as_json(report) if as_json else "\n".join(measure.table(report)))
        if stopping.is_set():
            sys.exit(INTERRUPTED)


@group.command()
@_data_option
@click.option("--questions", type=_count, default=16, show_default=True, help="How many are asked.")
@click.option("--passages", type=_count, default=6, show_default=True, help="Passages in the prompt.")
@_passage_tokens_option
@click.option("--ratio", "ratios", default="0.08,0.16,0.32", show_default=True, help="Ratios to compare.")
@click.option(
    "--selector",
    "selectors",
    default="default,spectral,first,random",
    show_default=True,
    help="Which selectors, such as default,spectral:0.3,probe*highpass.",
)
@click.option(
    "--plan", "plans", default="", help="Precision plans, such as fp16,safe; that of the settings unless given."
)
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw quality against speed into this PNG or SVG file."
)
@model_option
@json_option
def fidelity(
    data: Path | None,
    questions: int,
    passages: int,
    passage_tokens: int,
    ratios: str,
    selectors: str,
    plans: str,
    picture: Path | None,
    model: str | None,
    as_json: bool,
) -> None:
    """How near answers over stored KV are to full prefill's, and how fast, by selector, ratio and precision plan.

    Ctrl-C ends it with what was found so far; the same command goes on from there. Without --data questions are made
    from the headings of the library, or of the sample documents.
    """
    from quire.bench import fidelity as measure
    from quire.bench import picture as bench_picture

    if picture:
        bench_picture.check()
    with session_by(model=model) as session, interruptible() as stopping:
        ways = [
            measure.Way(selector, ratio, plan)
            for plan in _listed(plans) or [session.settings.precision]
            for selector in _listed(selectors) or ["default"]
            for ratio in _shares(ratios)
        ]
        cases = _cases(session, data, questions, passages, passage_tokens)
        report = measure.measure(session, cases, ways, to_stderr, stopping.is_set)
        if picture:
            bench_picture.draw(report, picture)
        click.echo(measure.as_json(report) if as_json else "\n".join(measure.table(report)))
        if stopping.is_set():
            sys.exit(INTERRUPTED)


@group.command(name="bytes")
@_data_option
@click.option("--plans", default="", help="Which plans, such as safe,k4v3,measured-3.4; all unless given.")
@click.option("--runs", type=_count, default=5, show_default=True, help="How often files are read.")
@model_option
@json_option
def bytes_(data: Path | None, plans: str, runs: int, model: str | None, as_json: bool) -> None:
    """Bits per value of stored files by precision plan, where they go, what codes lose, and how fast files are read.

    Without --data the text is that of the library, or of the sample documents.
    """
    from quire.bench import sizes as measure

    with session_by(model=model) as session:
        cases = _cases(session, data, questions=1, passages=8, tokens=180)
        report = measure.measure(session, cases, plans, runs, to_stderr)
        click.echo(measure.as_json(report) if as_json else "\n".join(measure.table(report)))


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _shares(text: str) -> list[float]:
    """Ratios that reuse something. Raises QuireError."""
    shares = list(dict.fromkeys(numbers(text, float)))
    if not shares or not all(0 <= share < 1 for share in shares):
        raise QuireError(f"{text!r} is not a list of ratios.", "Write for example 0.08,0.16; 1 is full prefill itself.")
    return shares


def _cases(
    session: "Session", data: Path | None, questions: int, passages: int, tokens: int
) -> "Callable[[Engine], Sequence[Case]]":
    """Makes the questions once there is an engine to count tokens."""
    from quire.bench import cases as bench_cases

    def make(engine: "Engine") -> "Sequence[Case]":
        if data:
            return bench_cases.from_file(data, questions, passages, bench_cases.cut_to(engine, tokens))
        whose = "your library" if session.library.contents() else "the sample documents"
        to_stderr(f"No --data: texts and headings are those of {whose}.")
        return bench_cases.from_headings(session, engine, questions, passages, tokens)

    return make
