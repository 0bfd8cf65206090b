"""A question that a server answers: the prompt as messages, and its answer as the engine's events.

Knows nothing of how a server is spoken to.
"""

import time
from collections.abc import Iterable, Iterator, Sequence

from quire_engine.prompt import Wording
from quire_engine.runtimes.openai import Ended, Message
from quire_engine.types import Answered, Event, Exchange, Forecast, Text, Timings, TokenCounts


def messages(wording: Wording, exchanges: Sequence[Exchange]) -> list[Message]:
    """A conversation whose last exchange is being asked, in the words that a local model reads."""
    found: list[Message] = [("system", wording.system)]
    for exchange in exchanges:
        documents = "".join(f"{passage.strip()}\n\n" for passage in exchange.passages)
        opening = wording.opening if documents else ""
        question = wording.question.format(question=exchange.question.strip())
        found += [("user", f"{opening}{documents}{question}"), ("assistant", exchange.answer)]
    return found[:-1]


def answer(told: Iterable[str | Ended], foreseen: Forecast, prompt_tokens: int) -> Iterator[Event]:
    """Texts as they come, then Answered. Counts are the server's where it counts, else this computer's model's."""
    began, first_ms, said = time.perf_counter(), 0.0, 0
    ended = Ended("stopped", 0, 0)
    for piece in told:
        if isinstance(piece, Ended):
            ended = piece
            continue
        first_ms = first_ms or 1000 * (time.perf_counter() - began)
        said += 1
        yield Text(piece)
    took_ms = 1000 * (time.perf_counter() - began)
    total = ended.prompt_tokens or prompt_tokens
    kept = min(ended.cached_tokens, total)
    counts = TokenCounts(min(foreseen.context_tokens, total), 0, 0, total - kept, said, kept)
    timings = Timings(0.0, 0.0, 0.0, 0.0, first_ms, first_ms, took_ms - first_ms if first_ms else 0.0)
    yield Answered(counts, timings, 1.0, ended.ending)
