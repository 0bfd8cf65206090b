"""`quire bench fidelity`, `quire bench matched` and `quire compare` as people use them, on tiny models."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import LITTLE, TEXT, json_of, run
from quire import config, paths
from quire.bench import cases as bench_cases
from quire.bench import fidelity as bench_fidelity
from quire.bench import matched as bench_matched
from quire.bench.fidelity import FidelityReport, Wanted, Way
from quire.session import Session
from quire.terminal import printable
from quire_engine.errors import QuireError
from quire_engine.selection.quality import Curve

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("one_thread")


# quire bench fidelity


def test_rows_are_those_that_were_promised(tiny: Tiny, musique: Path) -> None:
    selectors = "default,spectral:.3,highpass,value-deviation,sensitivity"
    words = ("bench", "fidelity", "--data", musique, "--model", tiny("llama"), *LITTLE, "--ratio", ".2,.6")
    report = json_of(*words, "--selector", selectors, "--plan", "fp16,k2v2", "--baseline", "spectral:.3")
    rows = {(row["selector"], row["ratio"], row["plan"]): row for row in report["rows"]}
    assert set(rows) == {(s, r, p) for s in selectors.split(",") for r in (0.2, 0.6) for p in ("fp16", "k2v2")}
    assert report["rules"]["default"] == "first+3*probe*early"
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
    partly = [row["kl"] for (_, ratio, _), row in rows.items() if ratio == 0.2]  # .6 is whole tiles: nearly everything
    assert min(partly) > report["floor"]["kl"]
    assert rows["default", 0.6, "fp16"]["kl"] < rows["default", 0.2, "k2v2"]["kl"]
    for (selector, ratio, plan), row in rows.items():
        assert row["vs_baseline"] == pytest.approx(row["kl"] / rows["spectral:.3", ratio, plan]["kl"])
        assert row["vs_baseline_interval"][0] <= row["vs_baseline"] <= row["vs_baseline_interval"][1]
        if selector == "spectral:.3":
            assert row["vs_baseline_interval"] == pytest.approx([1, 1])
    assert report["exact"]["vs_baseline"] is report["floor"]["vs_baseline"] is None
    assert report["exact"]["contains_vs_exact"] in {1, None}, "of nothing there is no share"


def test_a_table_and_a_picture(tiny: Tiny, tmp_path: Path) -> None:
    picture = tmp_path / "quality.png"
    words = ("--model", tiny("llama"), *LITTLE, "--selector", "first,random", "--ratio", "0.1,0.5")
    result = run("bench", "fidelity", *words, "--baseline", "random", "--picture", picture)
    assert result.exit_code == 0, result.output
    assert "those of the sample documents" in result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[-6:]] == [
        ["exact", "1"],
        ["floor", "1"],
        *([name, ratio] for name in ("first", "random") for ratio in ("0.1", "0.5")),
    ]
    assert "of random's" in lines[-7]
    assert max(map(len, lines)) < 160
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_kept_pair_by_pair(tiny: Tiny, musique: Path) -> None:
    """Of three questions by three ways or more: full prefill, its floor, and the selectors."""
    said: list[str] = []

    def report(selectors: str, stop_after: int = 999, answers: bool = True, model: str = "llama") -> FidelityReport:
        counted: list[int] = []
        ways = tuple(Way(selector, 0.3, "fp16") for selector in selectors.split(","))
        said.clear()
        with Session(config.load({"model": str(tiny(model))})) as session:
            return bench_fidelity.measure(
                session,
                lambda engine: bench_cases.from_file(musique, 3, 2, bench_cases.cut_to(engine, 40)),
                Wanted(ways, answers=answers),
                said.append,
                lambda done, of_all: counted.append(done),
                lambda: len(counted) >= stop_after,
            )

    def records() -> int:
        return sum(kept.read_text().count('"way"') for kept in (paths.cache_dir() / "bench").iterdir())

    with pytest.raises(QuireError, match="before the first question"):
        report("first", stop_after=2)
    assert records() == 1
    assert report("first", stop_after=5).questions == 1
    assert records() == 4
    (kept,) = (paths.cache_dir() / "bench").iterdir()
    kept.write_text(kept.read_text() + '\n{"question": "cut sho')
    whole = report("first")
    assert (whole.questions, records()) == (3, 9)
    assert "4 of 9" in said[0]
    assert report("first") == whole
    more = report("first,random")
    assert (more.rows[0], records()) == (whole.rows[0], 12), "only the new selector is measured"
    assert report("first", answers=False).rows[0].kl == whole.rows[0].kl
    assert records() == 12, "answers that are there are not needed, but do"
    assert report("3*first+probe", answers=False).rows[0].contains is None
    assert report("default", answers=True).rows[0].contains is not None
    assert records() == 12 + 3 + 3, "under another name the same; answers are another measurement"
    assert report("first", model="head8").questions == 3
    assert records() == 18 + 9


def test_measuring_anew_forgets(tiny: Tiny, musique: Path) -> None:
    asked = ("--data", musique, "--model", tiny("llama"), *LITTLE, "--selector", "first", "--ratio", "0.3")
    words = ("bench", "fidelity", *asked, "--baseline", "none", "--no-answers")
    first = json_of(*words)
    assert json_of(*words) == first
    again = json_of(*words, "--anew")
    assert again["rows"][0]["kl"] == first["rows"][0]["kl"]
    assert again["rows"][0]["first_token_ms"] != first["rows"][0]["first_token_ms"]
    assert again["answer_tokens"] == 0
    assert again["rows"][0]["contains"] is again["rows"][0]["like_exact"] is again["rows"][0]["vs_baseline"] is None


def test_a_folder_of_documents_is_asked_about_its_headings(tiny: Tiny, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "tea.md").write_text(f"# Tea\n\n## Green\n\n{TEXT * 4}\n\n## Black\n\n{TEXT * 4}\n")
    words = ("bench", "fidelity", "--model", tiny("llama"), *LITTLE, "--selector", "first", "--ratio", "0.3")
    report = json_of(*words, "--data", notes)
    assert report["questions"] == 2
    assert report["rows"][0]["contains"] is None, "nobody knows the answers"
    assert json_of("status", "--model", tiny("llama"))["documents"] == 0, "the library is left alone"
    (tmp_path / "empty").mkdir()
    nothing = run(*words, "--data", tmp_path / "empty")
    assert nothing.exit_code == 1
    assert "can be read" in nothing.stderr


# quire bench matched


def test_every_selector_is_timed_at_the_ratio_that_it_needs(tiny: Tiny, musique: Path) -> None:
    asked = ("--data", musique, "--model", tiny("llama"), *LITTLE, "--selectors", "first,spectral", "--runs", "2")
    words = ("bench", "matched", *asked, "--ratio", ".1,.5")
    report = json_of(*words, "--kl", "99", "--tokens", "20,120")
    assert [(row["selector"], row["ratio"]) for row in report["rows"]] == 2 * [
        ("full prefill", 1.0),
        ("first", 0.1),
        ("spectral", 0.1),
    ]
    short, long = report["rows"][0], report["rows"][3]
    assert short["context_tokens"] < long["context_tokens"]
    for row in report["rows"]:
        assert 0 < row["lowest_ms"] <= row["median_ms"] <= row["highest_ms"]
        assert row["runs"] == 2
    assert {name: [ratio for ratio, _ in curve] for name, curve in report["curves"].items()} == {
        "first": [0.1, 0.5],
        "spectral": [0.1, 0.5],
    }
    never = run(*words, "--kl", "1e-9", "--tokens", "60")
    assert never.exit_code == 0, never.output
    assert never.stdout.count("does not reach it: full prefill") == 2


@pytest.mark.parametrize(
    ("kl", "ratio"),
    [(0.3, 0.1), (0.2, 0.1), (0.15, 0.3), (0.1, 0.5), (0.05, 1.0)],
)
def test_the_least_ratio_is_read_off_the_curve(kl: float, ratio: float) -> None:
    assert bench_matched.least(Curve("first", ((0.5, 0.1), (0.1, 0.2)), 1), kl) == pytest.approx(ratio)


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
