"""Fidelity measured on real runtimes: floors where nothing is lost, order where more is, and true sizes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from quire_engine import divergence, fidelity
from quire_engine.chunks import ChunkCache
from quire_engine.divergence import Divergence
from quire_engine.engine import Engine, EngineSettings, Request
from quire_engine.errors import DamagedChunk, QuireError
from quire_engine.fidelity import InPlace, Prefilled, Reused, Trial, Variant, compare
from quire_engine.kv.store import KVStore
from quire_engine.plan import Prompt
from quire_engine.prompt import Wording
from quire_engine.types import BitPlan
from tiny_gguf import write_tiny_gguf

PASSAGES = (
    "The tower at Grey Point is 34 metres high, and its lamp was lit with oil until the winter of 1911.",
    "Peas are sown in March. The barrel behind the shed holds two hundred litres when it has rained.",
    "The mirror was ground by hand for eleven months, and tested at night with a candle and a razor blade.",
)
QUESTION = "How high is the tower?"
Tiny = Callable[[str], Path]


def opened(model: Path, folder: Path) -> Engine:
    return Engine(model, folder / "cache", EngineSettings(Wording("Answer from the documents."), threads=1))


def uniform(engine: Engine, bits: int) -> BitPlan:
    return BitPlan.uniform(engine.shape.layers, bits, bits)


@pytest.fixture
def engine(tiny: Tiny, tmp_path: Path) -> Engine:
    return opened(tiny("llama"), tmp_path)


@pytest.fixture
def prompt(engine: Engine) -> Prompt:
    return engine.prompt(Request(QUESTION, PASSAGES))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "head8", "base"])
def test_exact_numbers_and_other_batches_stay_at_the_floor(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    base = write_tiny_gguf(tmp_path / "base.gguf", chat_template="", bos=False)  # nothing stands before its passages
    engine = opened(base if kind == "base" else tiny(kind), tmp_path)
    prompt = engine.prompt(Request(QUESTION, PASSAGES))
    with Trial(engine.runtime, prompt, tmp_path) as trial:
        floor = trial.measure(Prefilled(engine.runtime, by_passage=True))
        exact = trial.measure(InPlace(uniform(engine, 16)))
        again = trial.measure(Reused(uniform(engine, 16), 1.0))
    for found in (floor, exact, again):
        assert len(found.kl) == fidelity.ANSWER_TOKENS
        assert max(found.kl) < 1e-3
        assert min(found.kl) > -1e-9


def test_scores_in_one_batch_are_those_of_single_tokens(engine: Engine, prompt: Prompt) -> None:
    runtime, tokens = engine.runtime, prompt.tokens[40:50]
    runtime.extend(prompt.tokens[:40])
    together = runtime.scores(tokens)
    assert runtime.live_tokens == 50
    runtime.rewind(40)
    for token, scores in zip(tokens, together, strict=True):
        assert runtime.extend((token,)) == pytest.approx(scores, abs=1e-3)


def test_an_answer_that_is_forced_is_timed_and_full_prefills_own_is_there(
    engine: Engine, prompt: Prompt, tmp_path: Path
) -> None:
    with Trial(engine.runtime, prompt, tmp_path, free_tokens=24) as trial:
        own = trial.spoken(engine.vocabulary.is_end, 24)
        forced, ms = trial.timed(Reused(uniform(engine, 8), 0.3))
        again, reply = trial.examine(Reused(uniform(engine, 8), 0.3), engine.vocabulary.is_end, 24)
        _, exact = trial.examine(Prefilled(engine.runtime), engine.vocabulary.is_end, 24)
    assert ms > 0
    assert trial.full_prefill_ms > 0
    assert again.kl == pytest.approx(forced.kl, abs=1e-3)
    assert exact.tokens == own
    assert list(own[: fidelity.ANSWER_TOKENS]) == list(trial.answer[: len(own)])
    assert len(reply.tokens) <= 24
    assert set(trial.exact.kl) == {0}


def test_fewer_bits_lose_more(engine: Engine, prompt: Prompt, tmp_path: Path) -> None:
    with Trial(engine.runtime, prompt, tmp_path) as trial:
        in_place = [trial.measure(InPlace(uniform(engine, bits))).mean_kl for bits in (16, 6, 4, 2, 1)]
        reused = [trial.measure(Reused(uniform(engine, bits), 0.0)).mean_kl for bits in (16, 2)]
    assert in_place == sorted(in_place)
    assert in_place[0] < in_place[1] / 10
    assert in_place[-1] > 0.1, "this model does look at its context"
    assert reused[0] > 10 * in_place[0], "reading passages alone costs more than float16 does"


def test_sizes_are_those_of_the_files_that_the_product_writes(engine: Engine, prompt: Prompt, tmp_path: Path) -> None:
    plan = replace(uniform(engine, 3), v_bits=(2,) * engine.shape.layers)
    store = KVStore(tmp_path / "product")
    cache = ChunkCache(store, bytes(32), plan, prompt.opening.tokens, ())
    for chunk in prompt.chunks:
        cache.encode(engine.runtime, cache.segment(chunk.tokens))
    twice = Prompt(prompt.opening, (*prompt.chunks, prompt.chunks[0]), prompt.question)
    with Trial(engine.runtime, twice, tmp_path) as trial:
        stored = trial.stored(plan)
        measured = {file.name: file.read_bytes() for file in stored.cache.store.root.rglob("*.kv")}
    written = {file.name: file.read_bytes() for file in store.root.rglob("*.kv")}
    assert measured.pop(f"{trial.prompt.opening.key}.kv")
    assert measured == written
    assert stored.size_bytes == store.size_bytes()
    values = sum(map(len, prompt.chunks)) * engine.shape.values_per_token
    assert stored.bits_per_value == 8 * store.size_bytes() / values


def test_selectors_get_the_scores_that_they_want(engine: Engine, prompt: Prompt, tmp_path: Path) -> None:
    with Trial(engine.runtime, prompt, tmp_path, unrelated=tuple(range(20, 60))) as trial:
        found = trial.measure(Reused(uniform(engine, 8), 0.5, "sensitivity"))
        cache = trial.stored(uniform(engine, 8)).cache
        with cache.store.open(trial.prompt.chunks[0].key) as reader:
            assert set(reader.scores) == {"spectral", "sensitivity"}
    assert found.mean_kl > 0


def test_full_prefill_is_never_taken_for_reuse(
    engine: Engine, prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise DamagedChunk("gone")

    with Trial(engine.runtime, prompt, tmp_path) as trial:
        monkeypatch.setattr(ChunkCache, "place", unreadable)
        with pytest.raises(QuireError, match="nothing to measure"):
            trial.measure(Reused(uniform(engine, 8), 0.5))


@pytest.mark.parametrize("checks", [1, 200])
def test_it_stops_between_questions_and_within(engine: Engine, prompt: Prompt, tmp_path: Path, checks: int) -> None:
    """checks: how often it may ask after the first question."""
    finished: list[Mapping[str, Divergence]] = []
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += bool(finished)
        return asked >= checks

    variants: dict[str, Variant] = {"exact": InPlace(uniform(engine, 16)), "few": Reused(uniform(engine, 2), 0.2)}
    compare(engine.runtime, [prompt] * 3, variants, tmp_path, lambda _, found: finished.append(found), should_stop)
    assert [set(found) for found in finished] == [{"exact", "few"}]
    assert not list(tmp_path.glob("trial-*")), "files are gone"


def test_a_real_model_loses_nothing_to_float16_and_more_to_fewer_bits(smollm: Path, tmp_path: Path) -> None:
    engine = opened(smollm, tmp_path)
    prompts = [engine.prompt(Request(question, PASSAGES)) for question in (QUESTION, "What does the barrel hold?")]
    found: list[Mapping[str, Divergence]] = []
    variants = {str(bits): InPlace(uniform(engine, bits)) for bits in (16, 4, 2)}
    compare(engine.runtime, prompts, variants, tmp_path, lambda _, kl: found.append(kl), lambda: False)
    exact, four, two = (divergence.fidelity([kl[name] for kl in found]).kl for name in variants)
    assert exact <= four <= two
    assert exact < 0.01, "llama.cpp's own noise"
    assert two > 0.01
