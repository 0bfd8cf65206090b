"""`quire compare`: one question answered both ways, exactly and by the dial.

Knows how it is asked for and printed; the comparison is `quire_engine.fidelity`'s.
"""

import json
import sys
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.commands.common import INTERRUPTED, by_question, interruptible, place_of, question_options, to_stderr
from quire.terminal import printable
from quire_engine.errors import Aborted, QuireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.library import Everywhere
    from quire.session import Session
    from quire_engine.fidelity import Comparison, Reply


@click.command()
@click.argument("question")
@question_options(("fast", "balanced"), "What exact is compared with.")
def compare(question: str, within: Path | None, as_json: bool, **settings: Any) -> None:
    """Answer a question exactly and from stored KV: where the answers part, how far apart they are, and both times.

    Both take the likeliest token each time. Passages that are not cached yet are cached first.
    """
    place = place_of(within)
    with by_question(settings) as session, interruptible() as stop:
        try:
            shown = _compared(session, question, place, stop.is_set)
        except Aborted:
            to_stderr("Stopped.")
            sys.exit(INTERRUPTED)
        click.echo(json.dumps(shown, indent=2) if as_json else "\n".join(_lines(shown)))


def _compared(
    session: "Session", question: str, place: "Path | Everywhere", should_stop: "Callable[[], bool]"
) -> dict[str, Any]:
    """What `--json` prints."""
    from quire_engine import fidelity
    from quire_engine.selection import selectors

    engine, asked = session.engine, session.read(question)
    request = session.request(asked.question, session.find(asked.question, asked.paths or place))
    selector, prompt = selectors.parse(request.selector), engine.prompt(request)
    if request.ratio >= 1:
        raise QuireError("The dial says exact, so both ways are the same.", "Compare another: --dial balanced")
    if reason := engine.try_out(should_stop):
        raise QuireError(f"There is nothing to compare: {reason}")
    room = engine.shape.context_tokens - len(prompt.tokens)
    most = min(request.max_tokens, engine.limits.answer_tokens, room)
    vocabulary = engine.vocabulary
    with engine.runtime.abortable(should_stop):
        found = fidelity.both_ways(
            engine.runtime, engine.chunks, prompt, request.ratio, selector, vocabulary.is_end, most
        )
    engine.catalogue.flush()
    session.shelf.trim()
    return {
        "question": asked.question,
        "exact": _shown(found.exact, vocabulary.piece),
        "ours": _shown(found.ours, vocabulary.piece),
        "first_difference": _first_difference(found, vocabulary.piece),
        "kl": found.divergence.mean_kl,
        "kl_of_tokens": list(found.divergence.kl),
        "top1": sum(found.divergence.agrees) / len(found.divergence.agrees),
        "speedup": found.exact.first_token_ms / found.ours.first_token_ms,
        "ratio": request.ratio,
        "selector": selector.name,
        "context_tokens": prompt.context_tokens,
        "model": engine.model_name,
    }


def _shown(reply: "Reply", piece: "Callable[[int], bytes]") -> dict[str, Any]:
    return {
        "answer": _text(reply.tokens, piece),
        "tokens": len(reply.tokens),
        "first_token_ms": reply.first_token_ms,
        "total_ms": reply.total_ms,
    }


def _first_difference(found: "Comparison", piece: "Callable[[int], bytes]") -> dict[str, Any] | None:
    """How many tokens are the same, and both answers from the first character that differs; None when all are."""
    exact, ours = found.exact.tokens, found.ours.tokens
    if exact == ours:
        return None
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(exact, ours, strict=False)))
    texts = [_text(exact, piece), _text(ours, piece)]  # as wholes, since a character may be several tokens
    start = len(commonprefix(texts))
    return {"token": same, "exact": texts[0][start:], "ours": texts[1][start:]}


def _text(tokens: "Sequence[int]", piece: "Callable[[int], bytes]") -> str:
    return b"".join(map(piece, tokens)).decode("utf-8", "replace")


def _lines(shown: dict[str, Any]) -> list[str]:
    lines = []
    for name, title in (("exact", "Exact"), ("ours", f"Ratio {shown['ratio']:g}, {shown['selector']}")):
        way = shown[name]
        lines += [f"{title}: first word {_time(way['first_token_ms'])}, all {_time(way['total_ms'])}"]
        lines += [printable(way["answer"].strip()) or "(no answer)", ""]
    parting = shown["first_difference"]
    if parting:
        before = f"after {parting['token']} tokens" if parting["token"] else "from the first token on"
        where = f"They part {before}: {_short(parting['exact'])}, {_short(parting['ours'])}"
    else:
        where = f"The same {shown['exact']['tokens']} tokens."
    return [
        *lines,
        where,
        f"Along the exact answer: KL {shown['kl']:.4f}, the same likeliest token in {100 * shown['top1']:.0f} %",
        f"First word {shown['speedup']:.1f}x as fast, {shown['context_tokens']:,} tokens of context",
    ]


def _time(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def _short(text: str) -> str:
    words = " ".join(printable(text).split())
    return f'"{words[:29]}…"' if len(words) > 30 else f'"{words}"'
