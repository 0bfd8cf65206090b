"""`quire bench predict`: is the time to the first token that is said before a question what it then takes?

Knows which questions differ enough to tell; predictions are the engine's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from quire.bench.cases import pieces_of, scratch_engine, try_out, within
from quire.bench.pools import DISK, MEMORY, lay
from quire.session import Session
from quire_engine.engine import Request, never
from quire_engine.types import Answered, Forecast

TOLERATED = 0.25
"""How far off a prediction may be, as a share of what happened."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """A question over about so many tokens of passages, which lie in a pool."""

    tokens: int
    ratio: float
    selector: str
    pool: str
    words: int = 12


ASKED = (
    Asked(400, 0.16, "default", DISK),
    Asked(1000, 0.08, "default", MEMORY),
    Asked(2000, 0.32, "first", DISK),
    Asked(700, 0.16, "probe", MEMORY, words=40),
    Asked(1000, 0.16, "spectral", DISK),
    Asked(4000, 0.08, "default", DISK),
    Asked(500, 0.5, "default", MEMORY, words=80),
    Asked(1500, 0.16, "value-deviation", DISK),
    Asked(1000, 1.0, "default", DISK),
    Asked(2500, 0.16, "default", MEMORY),
)


@dataclass(frozen=True)
class PredictionRow:
    """error: of the prediction, as a share of what happened."""

    context_tokens: int
    ratio: float
    selector: str
    pool: str
    predicted_ms: float
    first_token_ms: float
    error: float


def predict(session: Session, say: Say, asked: Sequence[Asked] = ASKED) -> list[PredictionRow]:
    """Asks an engine that was just tried out, as if it were new here. It learns from one question to the next."""
    rows = []
    with scratch_engine(session) as engine:
        try_out(engine, never)
        most = min(max(one.tokens for one in asked), engine.limits.context_tokens * 7 // 8)
        passages = pieces_of(session, engine, most)
        say(f"caching {len(passages)} passages")
        engine.cache(passages)
        for one in asked:
            taken = within(engine, passages, one.tokens)
            lay(engine, taken, one.pool)
            question = f"What do the documents say about {' and '.join(['the weather'] * (one.words // 3))}?"
            request = Request(question, taken, one.ratio, one.selector, max_tokens=1, insist=True)
            foreseen, *_, answered = engine.answer(request)
            assert isinstance(foreseen, Forecast)
            assert isinstance(answered, Answered)
            expected, took = foreseen.first_token_ms, answered.timings.first_token_ms
            error = expected / took - 1
            rows.append(
                PredictionRow(foreseen.context_tokens, one.ratio, one.selector, one.pool, expected, took, error)
            )
            say(f"  {len(rows)}/{len(asked)}  {expected:.0f} ms predicted, {took:.0f} ms taken  {answered.timings}")
    return rows


def good(rows: Sequence[PredictionRow]) -> int:
    """How many predictions were near enough."""
    return sum(abs(row.error) <= TOLERATED for row in rows)


def as_json(rows: Sequence[PredictionRow]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows], "tolerated": TOLERATED, "good": good(rows)})


def table(rows: Sequence[PredictionRow]) -> list[str]:
    lines = [f"{'context':>8}{'ratio':>7}  {'selector':<20}{'from':<8}{'predicted':>12}{'first token':>14}{'error':>8}"]
    for r in rows:
        lines.append(
            f"{r.context_tokens:>8}{r.ratio:>7.2f}  {r.selector:<20}{r.pool:<8}"
            f"{r.predicted_ms:>9.0f} ms{r.first_token_ms:>11.0f} ms{r.error:>8.0%}"
        )
    return [*lines, f"Within {TOLERATED:.0%}: {good(rows)} of {len(rows)}"]
