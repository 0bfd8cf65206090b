"""`quire bench fidelity` and `quire compare` as people use them, on tiny models."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quire import cli, config, paths
from quire.bench import cases as bench_cases
from quire.bench import fidelity as bench_fidelity
from quire.bench.fidelity import FidelityReport, Way
from quire.session import Session
from quire.terminal import printable
from quire_engine.errors import QuireError

Tiny = Callable[[str], Path]
TEXT = "The keeper wrote down the weather every morning. In winter the page filled with wind and broken glass. "
LITTLE = ("--questions", "2", "--passages", "2", "--passage-tokens", "60")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_THREADS", "1")


@pytest.fixture
def musique(tmp_path: Path) -> Path:
    texts = [{"text": f"{name} came first. {TEXT * 2}"} for name in ("Ann", "Bob", "Cid")]
    items = [{"question": f"Who came {n}?", "answers": ["Ann"], "ctxs": texts} for n in ("first", "last", "late")]
    path = tmp_path / "musique.json"
    path.write_text(json.dumps(items))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.main, [*map(str, words)], prog_name="quire")


def json_of(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# quire bench fidelity


def test_rows_are_those_that_were_promised(tiny: Tiny, musique: Path) -> None:
    selectors = "default,spectral:.3,highpass,value-deviation,sensitivity"
    words = ("bench", "fidelity", "--data", musique, "--model", tiny("llama"), *LITTLE, "--ratio", ".2,.6")
    report = json_of(*words, "--selector", selectors, "--plan", "fp16,k2v2")
    rows = {(row["selector"], row["ratio"], row["plan"]): row for row in report["rows"]}
    assert set(rows) == {(s, r, p) for s in selectors.split(",") for r in (0.2, 0.6) for p in ("fp16", "k2v2")}
    assert report["rules"]["default"] == "3*first+probe"
    assert report["rules"]["spectral:.3"] == "spectral:0.3"
    for row in (report["exact"], report["floor"], *rows.values()):
        assert row["questions"] == report["questions"] == 2
        assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
        assert row["contains_interval"][0] <= row["contains"] <= row["contains_interval"][1]
        assert row["first_token_ms"] > 0
        assert 0 <= row["f1"] <= 1
    assert report["exact"]["like_exact"] == report["exact"]["speedup"] == 1
    assert max(report["exact"]["kl"], report["floor"]["kl"]) < 1e-3
    assert min(row["kl"] for row in rows.values()) > report["floor"]["kl"]
    assert rows["default", 0.6, "fp16"]["kl"] < rows["default", 0.2, "k2v2"]["kl"]
    assert not list((paths.cache_dir() / "bench").iterdir()), "a finished run leaves nothing"


def test_a_table_and_a_picture(tiny: Tiny, tmp_path: Path) -> None:
    picture = tmp_path / "quality.png"
    words = ("--model", tiny("llama"), *LITTLE, "--selector", "first,random", "--ratio", "0.1,0.5")
    result = run("bench", "fidelity", *words, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert "those of the sample documents" in result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[-6:]] == [
        ["exact", "1"],
        ["floor", "1"],
        *([name, ratio] for name in ("first", "random") for ratio in ("0.1", "0.5")),
    ]
    assert max(map(len, lines)) < 160
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_reports_what_was_done_and_goes_on(tiny: Tiny, musique: Path) -> None:
    said: list[str] = []

    def report(model: str, stop_after: int) -> FidelityReport:
        with Session(config.load({"model": str(tiny(model))})) as session:
            return bench_fidelity.measure(
                session,
                lambda engine: bench_cases.from_file(musique, 3, 2, bench_cases.cut_to(engine, 40)),
                [Way("first", 0.3, "fp16")],
                said.append,
                lambda: len(said) >= stop_after,
            )

    with pytest.raises(QuireError, match="before the first question"):
        report("llama", stop_after=1)
    said.clear()
    stopped = report("llama", stop_after=3)
    assert (stopped.questions, len(said)) == (1, 3)
    (kept,) = (paths.cache_dir() / "bench").iterdir()
    kept.write_text(kept.read_text() + '{"question": "cut sho')
    said.clear()
    whole = report("llama", stop_after=99)
    assert str(kept) in said[0]
    assert len(said) == 1 + 2 * 3, "two questions, three ways each"
    assert whole.questions == 3
    assert not kept.exists()
    said.clear()
    assert report("head8", stop_after=99).questions == 3
    assert len(said) == 3 * 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ratio", "1"), "not a list of ratios"),
        (("--ratio", "some"), "not a list of numbers"),
        (("--selector", "spectral:7"), "no selector 'spectral:7'"),
        (("--plan", "fp61"), "no plan 'fp61'"),
    ],
)
def test_mistakes_are_explained(tiny: Tiny, words: tuple[str, ...], says: str) -> None:
    result = run("bench", "fidelity", "--model", tiny("llama"), *words)
    assert result.exit_code == 1
    assert says in result.stderr


def test_a_picture_that_cannot_be_drawn_is_refused_first(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("bench", "fidelity", "--model", tiny("llama"), "--picture", "x.png")
    assert result.exit_code == 1
    assert "quire[plots]" in result.stderr


def test_gold_answers_by_words() -> None:
    assert bench_cases.contains("It was the Grey-Point tower.", ["grey point"])
    assert not bench_cases.contains("Grey", ["grey point"])
    assert bench_cases.f1("the grey tower", ["grey", "a grey tower here"]) == pytest.approx(2 * 2 / 7)
    assert bench_cases.f1("grey", ["Grey!"]) == 1
    assert bench_cases.f1("", ["grey"]) == bench_cases.f1("grey", []) == 0


# quire compare


@pytest.fixture
def notes(tiny: Tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("tea", "peas", "tower"):
        (folder / f"{name}.md").write_text(f"# {name}\n\nAll about the {name}. {TEXT * 3}\n")
    added = run("add", folder, "--no-cache", "--model", tiny("llama"))
    assert added.exit_code == 0, added.output
    return folder


def compare(tiny: Tiny, *words: object) -> tuple[object, ...]:
    return ("compare", "Which weather did the keeper see?", "--model", tiny("llama"), "--max-tokens", 8, *words)


@pytest.mark.usefixtures("notes")
def test_both_answers_side_by_side(tiny: Tiny) -> None:
    found = json_of(*compare(tiny, "--ratio", "0.1"))
    for way in ("exact", "ours"):
        assert 0 < found[way]["first_token_ms"] <= found[way]["total_ms"]
        assert found[way]["tokens"] <= 8
    assert len(found["kl_of_tokens"]) == min(found["exact"]["tokens"] + 1, 8)
    assert found["kl"] == pytest.approx(sum(found["kl_of_tokens"]) / len(found["kl_of_tokens"]))
    assert found["kl"] > 0
    assert 0 <= found["top1"] <= 1
    parting = found["first_difference"]
    assert (parting is None) == (found["exact"]["answer"] == found["ours"]["answer"])
    if parting:
        assert found["exact"]["answer"].endswith(parting["exact"])
        assert found["ours"]["answer"].endswith(parting["ours"])
    asked = json_of("ask", found["question"], "--model", tiny("llama"), "--max-tokens", 8, "--dial", "exact")
    assert printable(found["exact"]["answer"]).strip().startswith(asked["answer"].strip())


@pytest.mark.usefixtures("notes")
def test_nearly_everything_computed_again_is_nearly_exact(tiny: Tiny) -> None:
    far, near = (json_of(*compare(tiny, "--ratio", ratio))["kl"] for ratio in (0, 0.99))
    assert near < far / 2


@pytest.mark.usefixtures("notes")
def test_people_read_both_answers_and_both_times(tiny: Tiny) -> None:
    result = run(*compare(tiny, "--dial", "fast", "--selector", "first"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Exact: first word ")
    assert any(line.startswith("Ratio 0.08, first: first word ") for line in lines)
    assert "KL" in lines[-2]
    assert "x as fast" in lines[-1]


def test_exact_is_not_compared_with_itself(tiny: Tiny, notes: Path) -> None:
    result = run(*compare(tiny, "--ratio", "1", "--in", notes))
    assert result.exit_code == 1
    assert "both ways are the same" in result.stderr
    assert run(*compare(tiny, "--in", notes / "nothing")).exit_code == 1
