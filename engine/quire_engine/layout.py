"""A request as it stands in the context: turns, passages and question in tokens, and what of them is at hand.

Knows nothing of how any of it is computed, nor how long that takes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from quire_engine import turns
from quire_engine.chunks import ChunkCache
from quire_engine.forecast import Work
from quire_engine.plan import Prompt, Segment
from quire_engine.prompt import PromptWriter
from quire_engine.selection import deviation
from quire_engine.selection.selectors import Selector
from quire_engine.turns import Turn, Turns
from quire_engine.types import Exchange

_PROBED_DEPTH = 0.88  # docs/decisions/selection.md


@dataclass(frozen=True)
class Line:
    """The turns of a conversation as they stand in the context. asked: the one being asked.  dropped: passages that
    leave for it."""

    earlier: tuple[Turn, ...]
    asked: Exchange
    asked_tokens: int
    dropped: int

    @property
    def tokens(self) -> int:
        return sum(turn.tokens for turn in self.earlier) + self.asked_tokens


class Layout:
    """Lays out turns and prompts, of passages and turns that may be stored."""

    def __init__(self, writer: PromptWriter, chunks: ChunkCache, turns: Turns, layers: int) -> None:
        self._writer = writer
        self._chunks = chunks
        self._turns = turns
        self._layers = layers

    def segment(self, passage: str) -> Segment:
        """A passage as it stands in any prompt."""
        return self._chunks.segment(self._writer.chunk(passage))

    def prompt(self, exchange: Exchange, position: int) -> Prompt:
        """A turn's opening, passages and question, from this position on."""
        passages = tuple(map(self.segment, exchange.passages))
        question = Segment(self._writer.question(exchange.question))
        return Prompt(self._opening(exchange, position == 0), passages, question, position)

    def line(self, exchanges: Sequence[Exchange], room: int, exact: bool) -> Line:
        """All turns, the last of which is being asked, within so many tokens. exact: nothing in them is stitched."""
        size = cache(self._size)  # laying out asks for the same ones again and again, and each is tokenized
        standing, dropped = turns.lay_out(exchanges, room, lambda e: len(self._opening(e, first=False)) + size(e))
        keys = self._turns.keys(standing[:-1], exact)
        sizes = [len(self._opening(e, number == 0)) + size(e) for number, e in enumerate(standing)]
        return Line(tuple(map(Turn, standing[:-1], sizes, keys)), standing[-1], sizes[-1], dropped)

    def _size(self, exchange: Exchange) -> int:
        """Tokens of an exchange without what opens it."""
        passages = sum(len(self._writer.chunk(passage)) for passage in exchange.passages)
        return passages + len(self._writer.question(exchange.question)) + len(self._writer.answer(exchange.answer))

    def _opening(self, exchange: Exchange, first: bool) -> Segment:
        return self._chunks.preamble if first else Segment(self._writer.bridge(bool(exchange.passages)))

    def work(self, line: Line, prompt: Prompt, selector: Selector, lead: int, stores_turns: bool) -> Work:
        """What is to be done for a line, of which this is the prompt. lead: of the passages, how many are computed
        while the others are read.  stores_turns: whether earlier turns may come from disk."""
        store, preamble = self._chunks.store, self._chunks.preamble
        held = self._turns.shared(line.earlier)
        absent = line.earlier[held:]
        loaded = [turn.tokens for turn in absent if stores_turns and self._turns.stored(turn)]
        chunks, question = prompt.chunks, len(prompt.question)
        segments = {s.key: s for s in (preamble, *chunks) if s.tokens}
        pools = Counter[str]()
        for segment in chunks if line.earlier else (preamble, *chunks):
            pools[store.where(segment.key)] += len(segment)
        del pools[""]
        settled = selector.knows_prompt and prompt.intact == len(chunks)  # nothing would be computed again
        return Work(
            new=line.asked_tokens - question,
            passages=0 if settled else sum(map(len, chunks)),
            question=question,
            pools=pools,
            missing=tuple(len(segment) for segment in self._chunks.missing(segments.values())),
            guard=len(self._writer.preamble),
            held=sum(turn.tokens for turn in line.earlier[:held]),
            loaded=sum(loaded),
            read=sum(turn.tokens for turn in absent) - sum(loaded),
            dropped=line.dropped,
            stitches=bool(line.asked.passages),
            probes=selector.asks_question and not settled,
            compared=deviation.compared_layers(self._layers) / self._layers * selector.compares_values,
            depth=_depth(selector),
            led=sum(map(len, chunks[:lead])),
            reads_ms=sum(store.read_ms(chunk.key) for chunk in chunks[lead:]) if lead else 0.0,
        )


def _depth(selector: Selector) -> float:
    """Where chosen tokens stand on average, 0..1: what a question looks at is mostly near the end."""
    shares = sum(rule.shares for rule in selector.rules)
    return sum(rule.shares * (_PROBED_DEPTH if rule.asks_question else 0.5) for rule in selector.rules) / shares
