"""How the command line says things: durations, sizes, sources, the line of truth, and the JSON of an answer.

Pure functions from values to text or to what json.dumps takes. All text that came from documents or the model has
passed `printable`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from quire.config import Origin, Settings, explained, written
from quire.indexer import Change, ChangeKind, IndexReport
from quire.library import Hit
from quire.session import Found
from quire.terminal import printable
from quire.transcript import Mention, Share
from quire_engine.types import Answered, Forecast

if TYPE_CHECKING:
    from quire.whole import Part, Plan

_SHARES: Mapping[Share, str] = {
    "contributed": "contributed",
    "nothing": "had nothing",
    "unreadable": "could not be read",
    "not reached": "not reached",
}
_MOST_LISTED = 20  # documents of one kind
_PARTIAL_CHARACTERS = 90  # of the answer to a part

Json = dict[str, object]


def duration(ms: float) -> str:
    """42 ms, 1.3 s, 2 min 5 s."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 60_000:
        return f"{ms / 1000:.1f} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"


def size(count: float) -> str:
    """512 bytes, 3.1 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def path_from_here(path: Path) -> str:
    """A path as short as it can be said from the current folder, safe for a terminal."""
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return printable(str(shown)).replace("\n", " ")


def source(hit: Hit) -> str:
    """notes/tea.md:12-30  Tea > Brewing; or tea.pdf, page 3  Brewing"""
    heading = printable(hit.heading).replace("\n", " ")
    place = f", {printable(hit.place)}" if hit.place else f":{hit.start_line}-{hit.end_line}"
    return f"{path_from_here(hit.path)}{place}" + (f"  {heading}" if heading else "")


def index_lines(report: IndexReport) -> list[str]:
    """What one pass over the folders changed, and every file that was skipped with its reason."""
    counts = [f"{report.count(kind)} {kind}" for kind in get_args(ChangeKind) if report.count(kind)]
    counts += [f"{report.unchanged} unchanged"] if report.unchanged else []
    passages = "1 new passage" if report.chunks_new == 1 else f"{report.chunks_new:,} new passages"
    lines = [f"Indexed: {', '.join(counts) or 'no readable file'}; {passages}."]
    lines += [
        f"  {path_from_here(change.path)} changed: {change.chunks_new} of {change.chunks_total} passages"
        for change in report.changes
        if change.kind == "changed"
    ]
    lines += [f"  skipped {path_from_here(s.path)}: {s.reason}. {s.remedy}" for s in report.skipped]
    return lines


def change_line(change: Change) -> str:
    """report.md changed: 3 of 41 passages, 1,214 tokens read again"""
    name = printable(change.path.name).replace("\n", " ")
    match change.kind:
        case "changed" if not change.chunks_new:
            return f"{name} changed: nothing is read again"
        case "changed":
            return f"{name} changed: {change.chunks_new} of {_read(change)} again"
        case "cut anew":
            return f"{name} cut anew: {_read(change)} again"
        case "added" if change.chunks_new:
            return f"{name} added: {_read(change)}"
        case "added" | "moved":
            return f"{name} {change.kind}: nothing is read again"
        case "removed":
            return f"{name} removed"


def _read(change: Change) -> str:
    passages = "1 passage" if change.chunks_total == 1 else f"{change.chunks_total} passages"
    return f"{passages}, {change.tokens_new:,} tokens read"


def forecast_line(forecast: Forecast) -> str:
    """What is about to happen."""
    tokens, kept = f"{forecast.context_tokens:,} tokens of context", forecast.kept_tokens
    tokens += f", {kept:,} of them kept" if kept else ""
    if forecast.missing_tokens and forecast.ratio < 1:
        tokens += f", {forecast.missing_tokens:,} {'' if kept else 'of them '}not cached yet"
    expected = f"first word in about {duration(forecast.first_token_ms)}" if forecast.first_token_ms else ""
    if forecast.ratio >= 1:
        in_full = f"{tokens}, {'the rest ' if kept else ''}read in full"
        return "; ".join(filter(None, (in_full, expected, forecast.reason)))
    return f"{tokens}; {expected}, full prefill about {duration(forecast.full_prefill_ms)}"


def truth_line(found: Found, forecast: Forecast, answered: Answered) -> str:
    """What happened: where the tokens came from, what each step took, and what full prefill would have taken."""
    tokens, t = answered.tokens, answered.timings
    parts = [f"{tokens.kept:,} tokens kept", f"{tokens.reused:,} reused"]
    parts = parts if tokens.kept else [f"{tokens.reused:,} tokens reused"]
    parts += [f"{tokens.recomputed:,} recomputed", f"{tokens.fresh:,} fresh"]
    steps = {
        "search": found.search_ms,
        "resume": t.resume_ms,
        "encode": t.encode_ms,
        "load": t.load_ms,
        "probe": t.probe_ms,
        "recompute" if answered.ratio < 1 else "prefill": t.recompute_ms,
        "question": t.question_ms,
    }
    took = ", ".join(f"{name} {duration(ms)}" for name, ms in steps.items() if ms >= 1)
    line = f"{', '.join(parts)} (ratio {answered.ratio:.2f}) | {took}"
    if t.first_token_ms:
        line += f" | first word {duration(found.search_ms + t.first_token_ms)}"
        if spared(answered):
            line += f", full prefill about {duration(forecast.full_prefill_ms)}"
    against = f" | {saved}" if tokens.kept and (saved := saved_line(forecast, answered)) else ""
    return line + against + cached_first_part(found) + (f" | {speed(answered):.0f} tokens/s" if speed(answered) else "")


def cached_first_part(found: Found) -> str:
    """Whether what is stored decided between equally good passages; empty when it did not."""
    passages = "1 passage" if found.cached_first == 1 else f"{found.cached_first} passages"
    return f" | {passages} before equally good ones, being cached" if found.cached_first else ""


def spared(answered: Answered) -> bool:
    """Whether full prefill would have computed more."""
    return answered.tokens.kept + answered.tokens.reused > 0


def saved_ms(forecast: Forecast, answered: Answered) -> float:
    """By how much the first word came sooner than after full prefill of everything, earlier turns included."""
    first_ms = answered.timings.first_token_ms
    return max(0.0, forecast.full_prefill_ms - first_ms) if first_ms and spared(answered) else 0.0


def saved_line(forecast: Forecast, answered: Answered) -> str:
    """How much of that comes from earlier turns, which others keep too, and how much from stored passages."""
    if not (saved := saved_ms(forecast, answered)):
        return ""
    tokens = answered.tokens
    prompt = tokens.kept + tokens.reused + tokens.recomputed + tokens.fresh
    turns = min(saved, forecast.full_prefill_ms * tokens.kept / max(1, prompt))
    split = f"{duration(turns)} by kept turns, {duration(saved - turns)} by stored passages"
    return f"saved about {duration(saved)}: {split}"


def dropped_line(forecast: Forecast) -> str:
    """What had to leave the context; empty when nothing had to."""
    if not forecast.dropped:
        return ""
    passages = "1 passage" if forecast.dropped == 1 else f"{forecast.dropped} passages"
    return f"The context was full: {passages} of earlier questions made room."


def speed(answered: Answered) -> float:
    """Generated tokens per second; 0 when nothing was generated."""
    decode_ms = answered.timings.decode_ms
    return 1000 * answered.tokens.generated / decode_ms if decode_ms else 0.0


# Questions to all documents


def plan_line(plan: "Plan") -> str:
    """34 passages of 12 documents in 5 parts; reading takes about 40 s, answers not counted. And what leaves."""
    least = f"; reading takes about {duration(plan.least_ms)}, answers not counted" if plan.least_ms else ""
    return f"{plan_counts(plan)}{least}" + (f". {printable(plan.leaves)}" if plan.leaves else "")


def plan_counts(plan: "Plan") -> str:
    """34 passages of 12 documents in 5 parts"""
    passages = "1 passage" if plan.passages == 1 else f"{plan.passages:,} passages"
    documents = "1 document" if plan.documents == 1 else f"{plan.documents:,} documents"
    return f"{passages} of {documents} in {'1 part' if plan.parts == 1 else f'{plan.parts:,} parts'}"


def part_line(part: "Part") -> str:
    """part 3 of 7; about 12.0 s left: Ann keeps the keys."""
    left = f"; about {duration(part.left_ms)} left" if part.left_ms else ""
    return f"part {part.done} of {part.total}{left}: {partial(part.answer) or 'nothing'}"


def partial(answer: str) -> str:
    """The beginning of a partial answer, in one line."""
    line = " ".join(printable(answer).split())
    return f"{line[:_PARTIAL_CHARACTERS]}{'…' if len(line) > _PARTIAL_CHARACTERS else ''}"


def read_line(answered: Answered) -> str:
    """4,300 tokens of documents read in 12.3 s: 3,400 reused, 900 computed"""
    tokens, t = answered.tokens, answered.timings
    took = f" in {duration(t.first_token_ms + t.decode_ms)}" if t.first_token_ms else ""
    computed = tokens.recomputed + tokens.fresh
    from_where = f": {tokens.reused:,} reused, {computed:,} computed" if tokens.reused else ""
    return f"{tokens.context:,} tokens read{took}{from_where}"


def documents_title(documents: Sequence[Mention]) -> str:
    """12 documents: 5 contributed, 6 had nothing, 1 could not be read"""
    counts = [(sum(d.state == state for d in documents), words) for state, words in _SHARES.items()]
    total = "1 document" if len(documents) == 1 else f"{len(documents):,} documents"
    return f"{total}: {', '.join(f'{count:,} {words}' for count, words in counts if count)}"


def mention_line(document: Mention) -> str:
    """notes/scan.pdf  could not be read: it has no text"""
    reason = f": {printable(document.reason)}" if document.reason else ""
    return f"{path_from_here(document.path)}  {_SHARES[document.state]}{reason}"


def account_lines(documents: Sequence[Mention], rest: str) -> list[str]:
    """What became of every document, by what it was. rest: where those are told that are too many; empty lists all."""
    lines: list[str] = []
    for state, words in _SHARES.items():
        those = [document for document in documents if document.state == state]
        listed = those[:_MOST_LISTED] if rest else those
        lines += [f"{words.capitalize()} ({len(those):,}):"] if those else []
        for document in listed:
            reason = f": {printable(document.reason)}" if document.reason else ""
            lines.append(f"  {path_from_here(document.path)}{reason}")
        if len(those) > len(listed):
            lines.append(f"  and {len(those) - len(listed):,} more: {rest}")
    return lines


def answer_json(text: str, found: Found, forecast: Forecast, answered: Answered, about: Json) -> Json:
    """One answer for scripts; `about` adds selector, dial, model and runtime."""
    tokens, t = answered.tokens, answered.timings
    return {
        "answer": text,
        "sources": sources_json(found.sources),
        "tokens": {
            "context": tokens.context,
            "kept": tokens.kept,
            "reused": tokens.reused,
            "recomputed": tokens.recomputed,
            "fresh": tokens.fresh,
            "generated": tokens.generated,
        },
        "timings": {
            "search_ms": round(found.search_ms, 3),
            "resume_ms": round(t.resume_ms, 3),
            "encode_ms": round(t.encode_ms, 3),
            "load_ms": round(t.load_ms, 3),
            "probe_ms": round(t.probe_ms, 3),
            "recompute_ms": round(t.recompute_ms, 3),
            "question_ms": round(t.question_ms, 3),
            "first_token_ms": round(found.search_ms + t.first_token_ms, 3) if t.first_token_ms else 0.0,
            "decode_ms": round(t.decode_ms, 3),
        },
        "predicted": {
            "first_token_ms": round(forecast.first_token_ms, 3),
            "full_prefill_ms": round(forecast.full_prefill_ms, 3),
        },
        "ratio": answered.ratio,
        "cached_first": found.cached_first,
        "reason": forecast.reason,
        "ending": answered.ending,
        **about,
    }


def settings_lines(settings: Settings, origins: Mapping[str, Origin]) -> list[str]:
    """threads          2            file         processor threads to compute with; 0: all cores"""
    values = {s.name: printable(written(getattr(settings, s.name))) or "-" for s in explained()}
    width = max(map(len, values.values()))
    return [f"{s.name:<14}  {values[s.name]:<{width}}  {origins[s.name]:<11}  {s.meaning}" for s in explained()]


def settings_json(settings: Settings, origins: Mapping[str, Origin]) -> Json:
    values = {s.name: getattr(settings, s.name) for s in explained()}
    return {
        name: {
            "value": value if isinstance(value, str | int | float) else written(value) or None,
            "from": origins[name],
        }
        for name, value in values.items()
    }


def sources_json(hits: Sequence[Hit]) -> list[Json]:
    return [
        {
            "path": str(h.path),
            "start_line": h.start_line,
            "end_line": h.end_line,
            "place": h.place,
            "score": round(h.score, 4),
        }
        for h in hits
    ]
