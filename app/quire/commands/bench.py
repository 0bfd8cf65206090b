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
    watched,
)
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

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


@group.command()
@click.option("--tokens", type=click.IntRange(64), default=1000, show_default=True, help="Length of the context.")
@click.option("--disk-speed", "speeds", default="", help="Disks slowed down to so many MB/s as well, such as 0.5,2,10.")
@click.option("--usual/--slow-only", default=True, help="Memory and this disk too, or only slowed ones.")
@model_option
@json_option
def ratio(tokens: int, speeds: str, usual: bool, model: str | None, as_json: bool) -> None:
    """Time to the first token by share recomputed, from memory and disks, and what the search for the fastest finds.

    What is found for memory and this disk is kept: questions recompute more than the dial asks where that is faster.
    Ctrl-C ends it with the pools that were done.
    """
    from quire.bench import ratio as measure

    with session_by(model=model) as session, interruptible() as stopping:
        slowed = numbers(speeds, float) if speeds else []
        rows = measure.ratio(session, tokens, slowed, usual, to_stderr, stopping.is_set)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.table(rows)))
        if stopping.is_set():
            sys.exit(INTERRUPTED)


@group.command()
@model_option
@json_option
def predict(model: str | None, as_json: bool) -> None:
    """Is the time to the first token what was predicted? Ten questions over 400 to 4,000 tokens, to a new engine."""
    from quire.bench import predict as measure

    with session_by(model=model) as session:
        rows = measure.predict(session, to_stderr)
        click.echo(measure.as_json(rows) if as_json else "\n".join(measure.table(rows)))


_count, _share = click.IntRange(min=1), click.FloatRange(0, 1)
_data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Questions in SQuAD's or MuSiQue's JSON format, or a folder of documents, whose headings are asked about.",
)
_passage_tokens_option = click.option(
    "--passage-tokens",
    type=_count,
    default=180,
    show_default=True,
    help="Texts are cut into passages of at most so many tokens.",
)


_runtime_option = click.option("--runtime", help="What computes: auto, llama.cpp or torch.")


def _selectors_option(default: str) -> "Callable[[Callable[..., Any]], Callable[..., Any]]":
    return click.option(
        "--selector",
        "--selectors",
        "selectors",
        default=default,
        show_default=True,
        help="Which selectors, such as default,spectral:0.3,probe*highpass.",
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
@_selectors_option("default,spectral,first,random")
@click.option(
    "--plan", "plans", default="", help="Precision plans, such as fp16,safe; that of the settings unless given."
)
@click.option(
    "--baseline",
    default="spectral",
    show_default=True,
    help="The selector that the others' KL is compared with; measured too, unless it is none.",
)
@click.option("--no-answers", is_flag=True, help="Only along full prefill's answer: no gold, less time.")
@click.option("--anew", is_flag=True, help="Forget what was measured before.")
@click.option("--keep", is_flag=True, help="From now on the dial takes for this model what was found.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw quality against speed into this PNG or SVG file."
)
@_runtime_option
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
    baseline: str,
    no_answers: bool,
    anew: bool,
    keep: bool,
    picture: Path | None,
    runtime: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """How near answers over stored KV are to full prefill's, and how fast, by selector, ratio and precision plan.

    Ctrl-C ends it with what was found so far. Whatever was measured is kept: the same command goes on from there, and
    with another selector, ratio or plan measures only that. Without --data questions are made from the headings of the
    library, or of the sample documents.
    """
    from quire.bench import fidelity as measure
    from quire.bench import picture as bench_picture

    if picture:
        bench_picture.check()
    compared = dict.fromkeys([*(_listed(selectors) or ["default"]), *([] if baseline == "none" else [baseline])])
    with session_by(model=model, runtime=runtime) as session, interruptible() as stopping:
        ways = tuple(
            measure.Way(selector, ratio, plan)
            for plan in _listed(plans) or [session.settings.precision]
            for selector in compared
            for ratio in _shares(ratios)
        )
        cases = _cases(session, data, questions, passages, passage_tokens)
        wanted = measure.Wanted(ways, baseline, not no_answers, anew)
        with watched("Measuring") as (say, progress):
            report = measure.measure(session, cases, wanted, say, progress, stopping.is_set)
        if picture:
            bench_picture.draw(report, picture)
        for curve in measure.curves(report, session.settings.precision) if keep else ():
            session.engine.keep_curve(curve)
        click.echo(measure.as_json(report) if as_json else "\n".join(measure.table(report)))
        if stopping.is_set():
            sys.exit(INTERRUPTED)


@group.command()
@_data_option
@click.option(
    "--kl", type=click.FloatRange(min=0, min_open=True), default=0.05, show_default=True, help="Quality to reach."
)
@click.option("--tokens", default="2000,4000", show_default=True, help="Lengths of the context that are timed.")
@_selectors_option("default,spectral,first")
@click.option(
    "--ratio", "ratios", default="0.08,0.16,0.32,0.64", show_default=True, help="Ratios at which KL is measured."
)
@click.option("--questions", type=_count, default=16, show_default=True, help="How many are asked for it.")
@click.option("--passages", type=_count, default=6, show_default=True, help="Passages in their prompts.")
@_passage_tokens_option
@click.option("--runs", type=_count, default=3, show_default=True, help="How often every way is timed.")
@_runtime_option
@model_option
@json_option
def matched(
    data: Path | None,
    kl: float,
    tokens: str,
    selectors: str,
    ratios: str,
    questions: int,
    passages: int,
    passage_tokens: int,
    runs: int,
    runtime: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Time to the first token at the same quality: full prefill against selectors, each at the ratio that it needs.

    KL by ratio is measured as by `quire bench fidelity --no-answers`, which shares what was measured.
    """
    from quire.bench import matched as measure

    chosen, shares, lengths = _listed(selectors) or ["default"], _shares(ratios), numbers(tokens, int)
    with session_by(model=model, runtime=runtime) as session, interruptible() as stopping:
        cases = _cases(session, data, questions, passages, passage_tokens)
        with watched("Measuring KL") as (say, progress):
            quality = measure.curves(session, cases, chosen, shares, say, progress, stopping.is_set)
        report = measure.measure(session, cases, quality, kl, lengths, runs, to_stderr, stopping.is_set)
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


@group.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Questions in SQuAD's format, like XQuAD.")
@click.option("--embedder", metavar="PATH", help="GGUF file of an embedding model, to compare words with meaning.")
@model_option
@json_option
def retrieval(data: Path, embedder: str | None, model: str | None, as_json: bool) -> None:
    """How often search finds the paragraph that a question was written for, among all paragraphs as files."""
    from quire.bench import retrieval as measure

    with session_by(model=model, embedder=embedder) as session:
        with watched("Searching") as (_, progress):
            report = measure.measure(session, data, progress)
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
        if data and data.is_dir():
            return bench_cases.from_folder(data, session, engine, questions, passages, tokens)
        if data:
            return bench_cases.from_file(data, questions, passages, bench_cases.cut_to(engine, tokens))
        whose = "your library" if session.library.contents() else "the sample documents"
        to_stderr(f"No --data: texts and headings are those of {whose}.")
        return bench_cases.from_headings(session, engine, questions, passages, tokens)

    return make
