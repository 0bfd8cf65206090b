"""`quire bench ratio` and `quire bench predict` as people use them, and what the engine makes of what was found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quire import cli, config
from quire.bench import predict as bench_predict
from quire.session import Session
from quire_engine import costs
from quire_engine.engine import Engine, EngineSettings, Request
from quire_engine.prompt import Wording
from quire_engine.runtimes import choose
from quire_engine.selection import quality
from quire_engine.selection.quality import Curve
from quire_engine.selection.ratio import Tuned
from quire_engine.types import Answered, Forecast

Tiny = Callable[[str], Path]
PASSAGES = tuple(
    f"{name} wrote down the weather every morning before breakfast. " * 4 for name in ("Ann", "Bob", "Cid")
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_THREADS", "1")


def json_of(*words: object) -> Any:
    result = CliRunner().invoke(cli.main, ["bench", *map(str, words), "--json"], prog_name="quire")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def engine(tiny: Tiny, tmp_path: Path) -> Engine:
    """One that was tried out, and holds the passages, with costs as of a machine that is slow at everything."""
    made = Engine(tiny("llama"), tmp_path / "cache", EngineSettings(Wording("Answer."), threads=1))
    made.cache(PASSAGES)
    assert made.costs is not None
    rate = costs.Rate(5.0, 0.5)
    known = replace(made.costs, prefill=rate, question=rate, spans=rate, load_ms={"memory": 0.1, "disk": 1.0})
    costs.save(known, made._costs_file)
    return made


def foreseen(engine: Engine, insist: bool = False) -> Forecast:
    return engine.forecast(Request("When was it?", PASSAGES, 0.2, insist=insist))


def test_the_ratio_that_was_found_is_taken_while_it_holds(engine: Engine) -> None:
    assert engine.costs is not None
    transfers = engine.costs.transfers()
    assert foreseen(engine).ratio == 0.2
    engine.ratios.keep("memory", Tuned(0.6, 0.6, transfers["memory"]))
    assert foreseen(engine).ratio == 0.2, "they lie on disk"
    engine.ratios.keep("disk", Tuned(0.45, 0.5, transfers["disk"]))
    assert foreseen(engine).ratio == 0.45
    assert foreseen(engine, insist=True).ratio == 0.2
    *_, told = engine.answer(Request("When was it?", PASSAGES, 0.2, max_tokens=1))
    assert isinstance(told, Answered)
    assert told.ratio == 0.45
    assert told.tokens.recomputed >= 0.4 * sum(map(engine.count_tokens, PASSAGES))
    costs.save(replace(engine.costs, slowness=1.0, corrections={"load/disk": 0.3}), engine._costs_file)
    assert foreseen(engine).ratio == 0.2, "it was found when the disk was slower"


def test_the_pool_is_where_passages_lie(engine: Engine) -> None:
    assert engine.costs is not None
    engine.ratios.keep("memory", Tuned(0.6, 0.6, engine.costs.transfers()["memory"]))
    on_disk = foreseen(engine, insist=True).first_token_ms
    engine.memory.limit_bytes = 100_000_000
    engine.prefetch(PASSAGES)
    keys = [engine.chunks.preamble.key, *map(engine.address, PASSAGES)]
    for key in keys:
        engine.chunks.store.open(key).close()
    assert {engine.chunks.store.where(key) for key in keys} == {"memory"}
    tokens = foreseen(engine).context_tokens
    assert on_disk - foreseen(engine, insist=True).first_token_ms == pytest.approx(0.9 * tokens, rel=0.02)
    assert foreseen(engine).ratio == 0.6


def test_the_dial_takes_what_the_models_curve_says(tiny: Tiny, tmp_path: Path) -> None:
    settings = EngineSettings(Wording("Answer."), threads=1, profiles=(tmp_path / "profiles",))
    model = Engine(tiny("llama"), tmp_path, settings)
    assert {dial: model.ratio(dial) for dial in quality.TARGETS} == quality.USUAL_RATIOS
    curve = Curve("first", ((0.1, 2 * quality.TARGETS["balanced"]), (0.3, 0.0)), questions=8)
    model.keep_curve(curve)
    model = Engine(tiny("llama"), tmp_path, settings)
    assert model.ratio("balanced", "first") == pytest.approx(0.2)
    assert model.ratio("balanced", "random") == quality.USUAL_RATIOS["balanced"]
    assert model.ratio("exact", "first") == 1.0


@pytest.mark.parametrize("runtime", [choose.LLAMA_CPP, choose.TORCH])
def test_the_model_that_comes_along_has_measured_curves(runtime: str) -> None:
    with Session(config.load({"runtime": runtime})) as session:
        ratios = [session.engine.ratio(dial) for dial in quality.TARGETS]
        assert ratios == sorted(ratios)
        assert ratios != list(quality.USUAL_RATIOS.values())


def test_ratio_shows_the_curve_of_every_pool_and_keeps_what_it_found(tiny: Tiny) -> None:
    model = tiny("llama")
    report = json_of("ratio", "--tokens", 300, "--disk-speed", "5", "--model", model)
    memory, disk, slowed = report["rows"]
    assert [(row["pool"], row["mb_per_s"]) for row in report["rows"]] == [("memory", 0), ("disk", 0), ("disk", 5)]
    assert slowed["transfer"] > disk["transfer"]
    for row in report["rows"]:
        shares = [share for share, _ in row["curve"]]
        assert shares == sorted(shares)
        assert {row["least"], row["searched"], row["taken"], row["best"], 1.0} <= set(shares)
        assert row["least"] <= row["searched"] < 1
        assert row["over_best"] == pytest.approx(row["taken_ms"] / row["best_ms"] - 1)
    with Session(config.load({"model": str(model)})) as session:
        for row in (memory, disk):
            transfer = json.loads(session.engine.ratios._path.read_text())
            assert [kept["ratio"] for name, kept in transfer.items() if name.endswith(row["pool"])] == [row["searched"]]


def test_predictions_stand_beside_what_happened(tiny: Tiny) -> None:
    report = json_of("predict", "--model", tiny("llama"))
    rows = report["rows"]
    assert len(rows) == len(bench_predict.ASKED) == 10
    assert {row["pool"] for row in rows} == {"memory", "disk"}
    assert all(row["predicted_ms"] > 0 and row["first_token_ms"] > 0 for row in rows)
    near = [row for row in rows if abs(row["predicted_ms"] / row["first_token_ms"] - 1) <= report["tolerated"]]
    assert report["good"] == len(near)


def test_the_dial_takes_what_a_fidelity_bench_kept(tiny: Tiny) -> None:
    model, little = tiny("llama"), ("--questions", 2, "--passages", 2, "--passage-tokens", 60, "--no-answers")
    words = ("fidelity", "--selector", "first", "--ratio", "0.1,0.5", "--baseline", "none", *little)
    rows = json_of(*words, "--keep", "--model", model)["rows"]
    with Session(config.load({"model": str(model)})) as session:
        (curve,) = session.engine._curves
    assert curve == Curve("first", tuple((row["ratio"], row["kl"]) for row in rows), questions=2)
    json_of(*words, "--ratio", "0.9", "--model", model)
    with Session(config.load({"model": str(model)})) as session:
        assert session.engine._curves == (curve,), "only when asked"
