"""Selectors whose evidence has to be measured, in the engine: stored scores on request, values compared online."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quire_engine.engine import Engine, EngineSettings, Request
from quire_engine.prompt import Wording
from quire_engine.types import Answered, Exchange, Text

Tiny = Callable[[str], Path]
PASSAGES = (
    "The tower at Grey Point is 34 metres high, and its lamp was lit with oil until the winter of 1911. " * 2,
    "Peas are sown in March. The barrel behind the shed holds two hundred litres when it has rained. " * 2,
    "The mirror was ground by hand for eleven months, and tested at night with a candle and a razor blade. " * 2,
)
REQUEST = Request("How high is the tower?", PASSAGES, 0.3, max_tokens=4, insist=True)


@pytest.fixture
def engine(tiny: Tiny, tmp_path: Path) -> Engine:
    return Engine(tiny("llama"), tmp_path / "cache", EngineSettings(Wording("Answer."), threads=1, precision="fp16"))


def ask(engine: Engine, selector: str, request: Request = REQUEST) -> Answered:
    *_, end = engine.answer(replace(request, selector=selector))
    assert isinstance(end, Answered)
    return end


def stored_scores(engine: Engine) -> set[str]:
    with engine.chunks.store.open(engine.prompt(REQUEST).chunks[1].key) as reader:
        return set(reader.scores)


def test_scores_are_measured_when_first_wanted_and_then_kept(engine: Engine) -> None:
    engine.cache(PASSAGES)
    assert stored_scores(engine) == {"spectral"}
    question = len(engine.prompt(REQUEST).question)
    for selector, expected in {
        "spectral": {"spectral"},
        "highpass": {"spectral", "highpass"},
        "probe*sensitivity": {"spectral", "highpass", "sensitivity"},
        "spectral:0.3+first": {"spectral", "highpass", "sensitivity", "spectral:0.3"},
    }.items():
        lacked = expected - stored_scores(engine)
        assert (ask(engine, selector).tokens.fresh > question) == bool(lacked)
        assert stored_scores(engine) == expected
        assert ask(engine, selector).tokens.fresh == question


def test_value_deviation_compares_with_the_whole_context(engine: Engine) -> None:
    prompt = engine.prompt(REQUEST)
    engine.cache(PASSAGES)
    ours = ask(engine, "value-deviation")
    assert ours.timings.probe_ms > 0
    assert ours.tokens.recomputed > 0
    _, alone = engine.runtime.encode(prompt.opening.tokens, prompt.chunks[0].tokens)
    np.testing.assert_allclose(engine.chunks.values(prompt.chunks[0], 2), alone[:2], atol=5e-3)


def test_value_deviation_in_a_later_turn(engine: Engine) -> None:
    first = replace(REQUEST, passages=PASSAGES[:1], keep=True)
    answer = "".join(event.text for event in engine.answer(first) if isinstance(event, Text))
    later = replace(REQUEST, passages=PASSAGES[1:], history=(Exchange(PASSAGES[:1], REQUEST.question, answer),))
    told = ask(engine, "value-deviation", later)
    assert told.ratio == REQUEST.ratio
    assert told.tokens.recomputed > 0


def test_damaged_values_cost_one_full_prefill(engine: Engine) -> None:
    engine.cache(PASSAGES)
    key = engine.prompt(REQUEST).chunks[1].key
    file = next(engine.chunks.store.root.rglob(f"{key}*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    assert ask(engine, "value-deviation").ratio == 1.0
    assert ask(engine, "value-deviation").ratio == REQUEST.ratio
