"""`quire bench codec` and `quire bench bytes` as people use them, on tiny models, and what they are measured on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import LITTLE, TEXT, json_of, run
from quire import config
from quire.bench import cases as bench_cases
from quire.bench import codec as bench_codec
from quire.bench import plans as bench_plans
from quire.bench import timing
from quire.bench.codec import CodecReport
from quire.session import Session
from quire_engine.errors import QuireError
from quire_engine.types import BitPlan
from tiny_gguf import write_tiny_gguf

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads llama.cpp's own types can hold."""
    return write_tiny_gguf(tmp_path_factory.mktemp("wide") / "wide.gguf", head_dim=32)


# quire bench codec


def test_codec_prints_the_rows_that_were_promised(wide: Path, musique: Path) -> None:
    report = json_of("bench", "codec", "--data", musique, "--model", wide, *LITTLE)
    rows = {row["plan"]: row for row in report["rows"]}
    assert {"fp16", "kvmix", "safe", "default", "compact", "tiny"} < set(rows)
    assert set(rows) == set(bench_plans.ALL) - {"measured-4", "measured-6"}, "nobody measured this model"
    assert report["questions"] == 2
    assert report["passage_tokens"] <= 60
    assert all(row["bits_per_value"] > 0 and row["kl_in_place"] > -1e-9 for row in rows.values())
    for name, row in rows.items():
        assert (row["kl"] is None) == (row["top1"] is None) == (name in {"q8_0", "q4_0"})
    assert rows["fp16"]["added"] == 0
    assert rows["fp16"]["kl_in_place"] < 1e-3 > report["floor"]["kl"]
    assert rows["k8v8"]["kl_in_place"] < rows["k4v4"]["kl_in_place"] < rows["kivi"]["kl_in_place"]
    assert rows["q8_0"]["kl_in_place"] < rows["q4_0"]["kl_in_place"]


def test_codec_prints_a_table_and_says_what_it_asked(tiny: Tiny) -> None:
    """The heads of this model are too small for llama.cpp's own types."""
    result = run("bench", "codec", "--model", tiny("llama"), "--plans", "k4v4,q4_0", "--ratio", "0.5", *LITTLE)
    assert result.exit_code == 0, result.output
    assert "those of the sample documents" in result.stderr
    assert "q4_0 is left out" in result.stderr
    assert "2/2 questions" in result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["fp16", "k4v4"]
    assert "2 questions" in lines[0]
    assert "ratio 0.5" in lines[1]


def test_codec_reports_on_what_was_done_when_it_is_stopped(tiny: Tiny, musique: Path) -> None:
    said: list[str] = []

    def report(stop_after: int) -> CodecReport:
        with Session(config.load({"model": str(tiny("llama"))})) as session:
            return bench_codec.codec(
                session,
                lambda engine: bench_cases.from_file(musique, 3, 2, bench_cases.cut_to(engine, 40)),
                "k2v2",
                0.2,
                said.append,
                lambda: len(said) >= stop_after,
            )

    stopped = report(stop_after=1)
    assert (stopped.questions, [row.plan for row in stopped.rows]) == (1, ["fp16", "k2v2"])
    with pytest.raises(QuireError, match="before the first question"):
        report(stop_after=0)


# quire bench bytes


def test_bytes_says_where_every_bit_goes(tiny: Tiny, musique: Path) -> None:
    plans = "fp16,k8v8,k2v2,kivi"
    report = json_of("bench", "bytes", "--data", musique, "--model", tiny("llama"), "--plans", plans, "--runs", "2")
    rows = {(row["plan"], row["tokens"]): row for row in report["rows"]}
    assert set(rows) == {(plan, tokens) for plan in plans.split(",") for tokens in (64, 180, 402)}, "of 2,048 in all"
    for row in rows.values():
        parts = [row[name] for name in ("codes", "grids", "exact", "order", "rest")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(row["bits_per_value"])
    assert rows["k8v8", 402]["codes"] == pytest.approx(8 * 398 / 402)
    assert rows["fp16", 402]["grids"] == 0
    assert rows["kivi", 402]["exact"] == 0
    assert rows["k2v2", 64]["bits_per_value"] > rows["k2v2", 402]["bits_per_value"]
    losses = {(loss["bits"], loss["grid"]): loss for loss in report["losses"]}
    assert losses[3, "minmax"]["keys"] == pytest.approx(0.163, rel=0.05)
    assert losses[8, "midrise"]["values"] < losses[1, "midrise"]["values"] / 50
    assert len(losses) == 16
    speeds = {(speed["plan"], speed["source"]): speed for speed in report["speeds"]}
    assert set(speeds) == {(plan, source) for plan in plans.split(",") for source in ("memory", "disk")}
    assert all(0 < speed["lowest"] <= speed["median"] <= speed["highest"] for speed in speeds.values())


def test_bytes_prints_three_tables(tiny: Tiny) -> None:
    result = run("bench", "bytes", "--model", tiny("small"), "--plans", "k3v2", "--runs", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n\n") == 2
    assert "k3v2" in result.stdout


# Mistakes


@pytest.mark.parametrize("command", ["codec", "bytes"])
def test_mistakes_are_explained(tiny: Tiny, tmp_path: Path, command: str) -> None:
    (tmp_path / "prose.json").write_text("not JSON")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "other.json").write_text('[{"question": "Why?"}]')
    for name in ("nowhere.json", "prose.json", "empty.json", "other.json"):
        result = run("bench", command, "--model", tiny("llama"), "--data", tmp_path / name)
        assert result.exit_code == 1
        assert f"{name} is not a question file" in result.stderr
        assert "MuSiQue" in result.stderr
    result = run("bench", command, "--model", tiny("llama"), "--plans", "compakt")
    assert result.exit_code == 1
    assert "There is no plan 'compakt'" in result.stderr
    assert "Did you mean compact?" in result.stderr


def test_too_many_passages_for_the_model_are_explained(tiny: Tiny, musique: Path) -> None:
    result = run(
        "bench", "codec", "--model", tiny("small"), "--data", musique, "--passages", "9", "--passage-tokens", "500"
    )
    assert result.exit_code == 1
    assert "--passage-tokens" in result.stderr


def test_answers_are_looked_through_for_gold(tiny: Tiny, musique: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {1.0: ["Ann came.", "Nobody.", "Nobody."], 0.5: ["Ann came.", "It was Ann", "ANN!"]}
    asked = {ratio: iter(texts) for ratio, texts in said.items()}
    monkeypatch.setattr(timing, "_answer", lambda engine, case, ratio, selector: next(asked[ratio]))
    words = ("bench", "answers", "--model", tiny("llama"), "--data", musique, "--ratio", "0.5")
    exact, half = json_of(*words)["rows"]
    counted = ("contained", "lost", "gained", "low", "high", "same_as_exact")
    assert [exact[name] for name in counted] == [1, 0, 0, 0, 0, 3]
    assert [half[name] for name in ("questions", "contained", "lost", "gained", "same_as_exact")] == [3, 3, 0, 2, 1]
    assert (half["low"], half["high"]) == (0, 1)


# What is measured on


def test_a_file_of_squad_and_one_of_musique_give_the_same_questions(musique: Path, tmp_path: Path) -> None:
    items = json.loads(musique.read_text())
    qas = [{"question": item["question"], "answers": [{"text": "Ann"}]} for item in items]
    paragraphs = [{"context": c["text"], "qas": qas} for c in items[0]["ctxs"]]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    ours = bench_cases.from_file(musique, 5, 2)
    theirs = bench_cases.from_file(squad, 5, 2)
    assert (len(ours), len(theirs)) == (3, 5), "articles are asked again, with other questions"
    assert ours[0] == theirs[0]
    assert len(ours[0].passages) == 2


def test_pieces_come_from_as_many_texts_as_possible(musique: Path) -> None:
    halves = bench_cases.from_file(musique, 1, 5, lambda text: [text[:1], text[1:]])[0].passages
    texts = [context["text"] for context in json.loads(musique.read_text())[0]["ctxs"]]
    assert halves == ("A", "B", "C", texts[0][1:], texts[1][1:])


def test_headings_of_the_library_become_questions(tiny: Tiny, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "tea.md").write_text(f"# Tea\n\n## Green\n\n{TEXT * 8}\n\n## Black\n\n{TEXT * 8}\n")
    with Session(config.load({"model": str(tiny("llama"))})) as session:
        sample = bench_cases.from_headings(session, session.engine, 3, 2, 100)
        session.index([session.library.add_root(notes)], lambda _: None)
        cases = bench_cases.from_headings(session, session.engine, 9, 2, 100)
        assert all(session.engine.count_tokens(text) <= 102 for case in cases for text in case.passages)
    assert len(sample) == 3
    assert {case.question.rsplit(maxsplit=1)[-1] for case in cases} >= {"Green?", "Black?"}
    assert all(len(case.passages) == 2 for case in cases)


def test_plans_by_name(tiny: Tiny) -> None:
    with Session(config.load({"model": str(tiny("llama"))})) as session:
        assert bench_plans.plan_of("k4v3", session.engine) == BitPlan.uniform(2, 4, 3)
        kivi = bench_plans.plan_of("kivi", session.engine)
        assert (kivi.k_bits, kivi.v_bits, kivi.grid, kivi.sinks) == ((2, 2), (2, 2), "minmax", 0)
        for wrong in ("k9v3", "k4", "measured-", "fp61", ""):
            with pytest.raises(QuireError, match="no plan"):
                bench_plans.plan_of(wrong, session.engine)
        with pytest.raises(QuireError, match="not measured"):
            bench_plans.plan_of("measured-3.4", session.engine)


def test_plans_of_a_measured_model(smollm: Path) -> None:
    with Session(config.load({"model": str(smollm)})) as session:
        plans = {name: bench_plans.plan_of(name, session.engine) for name in bench_plans.PLANS}
        assert bench_plans.plan_of("measured-2.8", session.engine) == plans["compact"]
        assert bench_plans.chosen("", bench_plans.ALL, session.engine) == list(bench_plans.ALL)
    assert len(set(plans.values())) == len(plans)
    assert plans["kvmix"].grid == "minmax"
