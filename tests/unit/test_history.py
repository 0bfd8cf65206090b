"""The conversations on a real SQLite file: trees of turns, search, export, two processes, kill -9, damage."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlite_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.history import ROOT, UNMEASURED, Conversation, History, Source, Truth, Turn
from quire_engine.errors import QuireError
from quire_engine.types import Forecast, Timings, TokenCounts

TRUTH = Truth(
    12.5,
    Forecast(1000, 10, 0.15, "", 900.0, 5000.5),
    TokenCounts(1000, 850, 150, 20, 64),
    Timings(1.0, 2.0, 3.0, 4.0, 5.0, 15.0, 2000.25),
    0.15,
)
SOURCE = Source(Path("/d/tea.md"), 3, 9, "Tea > Brewing", "Steep it.\nFour minutes.", 4.25)
examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path / "history.sqlite") as history:
        yield history


def asked(history: History, conversation: int, parent: int, question: str, answer: str = "An answer.") -> int:
    turn = history.add_turn(conversation, parent, question, "m")
    history.finish_turn(turn, answer, "end", [SOURCE], TRUTH)
    return turn


def found(history: History, words: str) -> set[int]:
    return {hit.turn for hit in history.search(words, 100)}


def sound(path: Path) -> bool:
    """Whether SQLite, the foreign keys and the full-text index find nothing wrong."""
    db = sqlite_utils.Database(path)
    db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")  # 1: against the texts as well
    checks = db.execute("PRAGMA integrity_check").fetchall() + db.execute("PRAGMA foreign_key_check").fetchall()
    db.close()
    return bool(checks == [("ok",)])


# Turns and trees


def test_a_turn_comes_back_as_it_was(tmp_path: Path) -> None:
    with History(tmp_path / "h.sqlite") as history:
        conversation = history.begin()
        turn = history.add_turn(conversation, ROOT, "Why\ttea?\r\n\0 café 茶", "small.gguf")
        history.finish_turn(turn, "Becau", "stopped", [SOURCE, SOURCE], TRUTH)
    with History(tmp_path / "h.sqlite") as history:
        kept = history.turn(turn)
        assert (kept.id, kept.conversation, kept.parent, kept.model) == (turn, conversation, ROOT, "small.gguf")
        assert (kept.question, kept.answer, kept.ending) == ("Why\ttea?\r\n\0 café 茶", "Becau", "stopped")
        assert (kept.sources, kept.truth) == ((SOURCE, SOURCE), TRUTH)
        about = history.conversation(conversation)
        assert about.created_at <= kept.created_at <= about.updated_at
        assert (about.turns, about.leaf, about.title) == (1, turn, "Why tea? \0 café 茶")


def test_an_unfinished_turn_is_lost_but_its_question_is_not(history: History) -> None:
    conversation = history.begin()
    turn = history.add_turn(conversation, ROOT, "Anyone there?", "m")
    kept = history.turn(turn)
    assert (kept.question, kept.answer, kept.ending, kept.truth) == ("Anyone there?", "", "lost", UNMEASURED)
    assert found(history, "anyone") == {ROOT, turn}


@examples
@given(st.lists(st.integers(0, 10**6), max_size=12))
def test_the_tree_is_what_was_asked_from_where(history: History, choices: list[int]) -> None:
    conversation, other = history.begin(), history.begin("other")
    asked(history, other, ROOT, "not mine")
    parents: dict[int, int] = {}
    for number, choice in enumerate(choices):
        parent = [ROOT, *parents][choice % (len(parents) + 1)]
        parents[asked(history, conversation, parent, f"question {number}")] = parent
        assert history.conversation(conversation).leaf == max(parents)
    assert {turn.id: turn.parent for turn in history.turns(conversation)} == parents
    assert history.conversation(conversation).turns == len(parents)
    for turn in [ROOT, *parents]:
        assert [c.id for c in history.children(conversation, turn)] == [c for c in parents if parents[c] == turn]
        line = [turn] if turn else []
        while line and parents[line[0]]:
            line.insert(0, parents[line[0]])
        assert [step.id for step in history.path_to(turn)] == line


def test_the_leaf_can_be_set_within_its_conversation_alone(history: History) -> None:
    mine, other = history.begin(), history.begin()
    first, stranger = asked(history, mine, ROOT, "one"), asked(history, other, ROOT, "two")
    asked(history, mine, first, "three")
    history.set_leaf(mine, first)
    assert history.conversation(mine).leaf == first
    with pytest.raises(QuireError, match="no such turn"):
        history.set_leaf(mine, stranger)
    assert history.conversation(mine).leaf == first
    history.set_leaf(mine, ROOT)
    assert history.conversation(mine).leaf == ROOT


@pytest.mark.parametrize("parent", [999, "stranger"])
def test_a_parent_must_be_of_the_same_conversation(history: History, parent: int | str) -> None:
    mine, other = history.begin(), history.begin()
    stranger = asked(history, other, ROOT, "one")
    before = history.conversation(mine)
    with pytest.raises(QuireError, match="no such turn"):
        history.add_turn(mine, stranger if isinstance(parent, str) else parent, "lost?", "m")
    assert history.conversation(mine) == before
    assert history.turns(mine) == []


def test_what_is_not_there_is_said(history: History) -> None:
    for use in (
        lambda: history.conversation(7),
        lambda: history.turn(7),
        lambda: history.path_to(7),
        lambda: history.add_turn(7, ROOT, "q", "m"),
        lambda: history.finish_turn(7, "a", "end"),
        lambda: history.set_leaf(7, ROOT),
        lambda: history.rename(7, "x"),
        lambda: history.delete(7),
        lambda: history.export_json(7),
        lambda: history.export_markdown(7),
    ):
        with pytest.raises(QuireError, match="There is no"):
            use()
    assert history.conversations(10) == []


def test_a_failed_question_changes_nothing(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = history.begin()
    before = history.conversation(conversation)
    monkeypatch.setattr(history, "_place", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        history.add_turn(conversation, ROOT, "q", "m")
    assert history.conversation(conversation) == before
    assert history.turns(conversation) == []
    assert history.search("q", 1) == []


# Lists, titles, deletion


def test_conversations_are_listed_by_their_last_word(history: History) -> None:
    a, b, c = history.begin("a"), history.begin("b"), history.begin("c")
    turn = history.add_turn(b, ROOT, "q", "m")
    asked(history, a, ROOT, "q")
    history.finish_turn(turn, "late", "length")
    stamps = {b: "2030-01-03", a: "2030-01-02", c: "2030-01-01"}  # within a millisecond they could be in any order
    for conversation in stamps:
        about = history.conversation(conversation)
        assert about.updated_at >= about.created_at
    db = sqlite_utils.Database(history.path)
    for conversation, stamp in stamps.items():
        db.execute(
            "UPDATE conversations SET updated_at = ? WHERE id = ?", [f"{stamp}T00:00:00.000+00:00", conversation]
        )
    db.close()
    assert [about.title for about in history.conversations(10)] == ["b", "a", "c"]
    assert [about.title for about in history.conversations(1, 1)] == ["a"]
    assert history.conversations(0) == history.conversations(-1) == history.conversations(5, 3) == []
    asked(history, c, ROOT, "again")
    assert history.conversation(c).updated_at.year != 2030  # asking touched it


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("Why?", "Why?"),
        ("  one\n\ttwo  ", "one two"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("word " * 40, "word " * 11 + "word…"),
        ("a " + "x" * 100, "a " + "x" * 57 + "…"),
    ],
)
def test_the_first_question_names_a_conversation(history: History, question: str, title: str) -> None:
    conversation = history.begin()
    assert history.conversation(conversation).title == ""
    asked(history, conversation, ROOT, question)
    asked(history, conversation, ROOT, "Another?")
    assert history.conversation(conversation).title == title
    history.rename(conversation, "Mine\nalone")
    assert history.conversation(conversation).title == "Mine alone"
    history.rename(conversation, "  ")
    assert history.conversation(conversation).title == title


def test_a_given_title_stays(history: History) -> None:
    conversation = history.begin("Given")
    asked(history, conversation, ROOT, "Why?")
    assert history.conversation(conversation).title == "Given"


def test_deleting_takes_the_whole_tree_and_nothing_else(history: History) -> None:
    mine, other = history.begin("mine"), history.begin("other")
    first = asked(history, mine, ROOT, "apple")
    for _ in range(2):
        asked(history, mine, first, "pear")
    kept = asked(history, other, ROOT, "apple")
    history.delete(mine)
    assert [about.id for about in history.conversations(10)] == [other]
    assert found(history, "apple") == {kept}
    assert found(history, "pear mine") == set()
    assert history.begin() > other  # ids are not used again: an old window cannot take one for another
    assert sound(history.path)


def test_a_very_long_conversation_is_walked_and_deleted(history: History) -> None:
    small = history.begin()
    asked(history, small, ROOT, "q")
    exported = json.loads(history.export_json(small))
    turn = exported["turns"][0]
    exported["turns"] = [{**turn, "id": i, "parent": i - 1} for i in range(1, 1501)]
    exported["leaf"] = 1500
    long = history.import_json(json.dumps(exported))
    assert len(history.path_to(history.conversation(long).leaf)) == 1500
    history.delete(long)  # deeper than SQLite lets triggers recurse
    assert len(history.conversations(10)) == 1


# Search


def test_questions_answers_and_titles_are_found(history: History) -> None:
    conversation = history.begin("Household")
    turn = asked(history, conversation, ROOT, "How long does tea steep?", "Four minutes; Über-Café says five.")
    assert found(history, "tea") == found(history, "MINUTES") == found(history, "uber cafe") == {turn}
    assert found(history, "tea minutes") == {turn}
    assert found(history, "minu") == {turn}  # while it is being typed
    assert found(history, "tea coffee") == set()
    [hit] = history.search("househ", 5)
    assert (hit.conversation, hit.title, hit.turn, hit.snippet) == (conversation, "Household", ROOT, "Household")
    [hit] = history.search("five", 5)
    assert (hit.title, hit.snippet) == ("Household", "Four minutes; Über-Café says five.")
    assert len(history.search("t", 1)) == 1
    assert history.search("tea", 0) == []


def test_the_index_follows_every_change(history: History) -> None:
    conversation = history.begin("alpha")
    turn = history.add_turn(conversation, ROOT, "beta", "m")
    history.finish_turn(turn, "gamma", "stopped")
    history.finish_turn(turn, "delta", "end")
    history.rename(conversation, "epsilon")
    assert [len(found(history, word)) for word in ("alpha", "beta", "gamma", "delta", "epsilon")] == [0, 1, 0, 1, 1]
    assert sound(history.path)
    assert not found(history, "steep")  # the words of sources are the library's


@pytest.mark.parametrize(
    "words",
    ['"', '""', "'", "NEAR(cat b)", "cat AND", "NOT", "OR OR", "title:cat", "cat*", "^cat", "(", "-cat", "{a b}:c",
     "\0", "\ud800", "?!", "", " ", "漢字", "e\u0301", "a" * 100_000, "w " * 20_000, '"cat"" OR'],
)  # fmt: skip
def test_no_search_is_a_syntax_error(history: History, words: str) -> None:
    asked(history, history.begin(), ROOT, "the cat")
    history.search(words, 5)


def test_punctuation_separates_words_or_joins_them_in_order(history: History) -> None:
    turn = asked(history, history.begin("t"), ROOT, "C++/cat-like, is it? 漢字仮名", "e\u0301te\u0301")
    assert found(history, "cat-like ?!") == found(history, "it? \0 (cat") == found(history, "漢字") == {turn}
    assert found(history, "été") == {turn}
    assert found(history, "like-cat") == set()
    assert found(history, "?!") == set()
    assert found(history, "NOT dog") == set()  # a word, not an operator


@examples
@given(st.text(min_size=1, max_size=40))
def test_any_text_can_be_asked_and_searched(history: History, text: str) -> None:
    turn = asked(history, history.begin(), ROOT, text)
    assert history.turn(turn).question == text
    history.search(text, 5)


def test_very_long_texts(history: History) -> None:
    turn = asked(history, history.begin("t"), ROOT, "needle " + "long " * 200_000, "x" * 1_000_000 + " thread")
    [hit] = history.search("needle thread", 5)
    assert hit.turn == turn
    assert len(hit.snippet) <= 300
    assert len(history.turn(turn).answer) == 1_000_007


def test_half_a_character_is_replaced(history: History) -> None:
    turn = history.add_turn(history.begin("\udc80"), ROOT, "caf\udce9", "m")
    history.finish_turn(turn, "\ud800", "end", [replace(SOURCE, path=Path("/caf\udce9"))])
    kept = history.turn(turn)
    assert (kept.question, kept.answer, kept.sources[0].path) == ("caf\ufffd", "\ufffd", Path("/caf\ufffd"))


# Export and import

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_counts = st.integers(0, 10**9)
_sources = st.lists(st.builds(Source, st.builds(Path, _texts), _counts, _counts, _texts, _texts, _numbers), max_size=2)
_truths = st.builds(
    Truth,
    _numbers,
    st.builds(Forecast, _counts, _counts, _numbers, _texts, _numbers, _numbers),
    st.builds(TokenCounts, *[_counts] * 5),
    st.builds(Timings, *[_numbers] * 7),
    _numbers,
)
_turns = st.tuples(
    _counts, _texts, _texts, st.sampled_from(["end", "length", "stopped", "lost"]), _sources, _truths, _texts
)


def same(history: History, conversation: int) -> tuple[Conversation, list[Turn]]:
    """A conversation with its ids counted from 1, to be compared with another."""
    turns = history.turns(conversation)
    ids = {ROOT: ROOT} | {turn.id: i for i, turn in enumerate(turns, 1)}
    about = history.conversation(conversation)
    return replace(about, id=0, leaf=ids[about.leaf]), [
        replace(turn, id=ids[turn.id], parent=ids[turn.parent], conversation=0) for turn in turns
    ]


@examples
@given(_texts, st.lists(_turns, max_size=4), _counts)
def test_what_is_exported_can_be_imported(history: History, title: str, tree: list[tuple], leaf: int) -> None:  # type: ignore[type-arg]
    conversation, ids = history.begin(title), [ROOT]
    for parent, question, answer, ending, sources, truth, model in tree:
        ids.append(history.add_turn(conversation, ids[parent % len(ids)], question, model))
        history.finish_turn(ids[-1], answer, ending, sources, truth)
        kept = history.turn(ids[-1])
        assert (kept.sources, kept.truth, kept.question, kept.answer) == (tuple(sources), truth, question, answer)
    history.set_leaf(conversation, ids[leaf % len(ids)])
    exported = history.export_json(conversation)
    imported = history.import_json(exported)
    assert imported != conversation
    assert same(history, imported) == same(history, conversation)
    assert history.export_json(imported) == exported


def test_what_cannot_be_imported_is_refused_as_a_whole(history: History) -> None:
    conversation = history.begin()
    asked(history, conversation, asked(history, conversation, ROOT, "one"), "two")
    good = history.export_json(conversation)
    turn = json.loads(good)["turns"][1]
    broken: list[object] = [[], None, 3, {}, {"format": "other"}]
    changes: list[dict[str, object]] = [
        {"format": "x"}, {"version": "1"}, {"title": 1}, {"leaf": 3}, {"leaf": []}, {"turns": {}}, {"turns": [1]},
        {"created_at": "yesterday"}, {"updated_at": "0001-01-01T00:00:00+14:00"},
    ]  # fmt: skip
    changes += [
        {"turns": [turn | change]}
        for change in (
            {"parent": 2}, {"parent": 7}, {"id": ROOT, "parent": ROOT}, {"ending": "x", "parent": ROOT},
            {"question": None, "parent": ROOT}, {"sources": [{}], "parent": ROOT}, {"sources": 1, "parent": ROOT},
            {"truth": {"ratio": "x"}, "parent": ROOT}, {"truth": None, "parent": ROOT},
        )
    ]  # fmt: skip
    changes.append({"turns": [turn | {"parent": ROOT}, turn | {"parent": ROOT}]})
    for case in [
        *map(json.dumps, broken),
        *(json.dumps(json.loads(good) | c) for c in changes),
        "{",
        "[" * 100_000,
        "",
    ]:
        with pytest.raises(QuireError, match="nothing was imported"):
            history.import_json(case)
    with pytest.raises(QuireError, match="newer"):
        history.import_json(json.dumps(json.loads(good) | {"version": 2}))
    assert len(history.conversations(10)) == 1
    history.import_json(good)  # so that the cases above fail for their own reason
    history.import_json(json.dumps(json.loads(good) | {"turns": [turn | {"parent": ROOT}], "leaf": 2}))


def test_a_number_that_was_not_measured_then_is_zero(history: History) -> None:
    conversation = history.begin()
    asked(history, conversation, ROOT, "q")
    exported = json.loads(history.export_json(conversation))
    del exported["turns"][0]["truth"]["timings"]["load_ms"]
    exported["turns"][0]["truth"]["timings"]["from_tomorrow_ms"] = 1
    [turn] = history.turns(history.import_json(json.dumps(exported)))
    assert turn.truth == replace(TRUTH, timings=replace(TRUTH.timings, load_ms=0.0))


EXPORTED = """{
  "format": "quire.conversation",
  "version": 1,
  "id": 1,
  "title": "Tea ☕",
  "turns": [
    {
      "id": 1,
      "conversation": 1,
      "parent": 0,
      "question": "How long?",
      "answer": "Four minutes.",
      "ending": "end",
      "sources": [
        {
          "path": "/d/tea.md",
          "start_line": 3,
          "end_line": 9,
          "heading": "Brewing",
          "text": "Steep it.",
          "score": 4.25
        }
      ],
      "truth": {
        "search_ms": 12.5,
        "predicted": {
          "context_tokens": 1000,
          "missing_tokens": 10,
          "ratio": 0.15,
          "reason": "",
          "first_token_ms": 900.0,
          "full_prefill_ms": 5000.5
        },
        "tokens": {},
        "timings": {},
        "ratio": 0.15
      },
      "model": "m",
      "created_at": "2026-11-23T17:00:00.000+00:00"
    }
  ],
  "leaf": 1,
  "created_at": "2026-11-23T16:59:59.999+00:00",
  "updated_at": "2026-11-23T17:00:01.000+00:00"
}
"""


def test_the_format_of_version_1_stays_what_it_is(history: History) -> None:
    exported = history.export_json(history.import_json(EXPORTED))
    # What the engine measures and predicts may grow; the rest is as it was, in this order.
    exported = re.sub(r'"(tokens|timings)": \{[^}]*\}', r'"\1": {}', exported)
    assert re.sub(r',\s+"(kept_tokens|dropped|place|documents)": (0|""|\[\])', "", exported) == EXPORTED


def outline(markdown: str) -> tuple[list[str], list[str]]:
    """The headings and the code blocks of Markdown, read by its rules for fences, quotes and headings."""
    headings: list[str] = []
    blocks: list[str] = []
    fence = ""
    for line in re.split(r"\r\n|\r|\n", markdown):
        marks = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            if marks and marks[1].startswith(fence) and not marks[2].strip(" \t"):
                fence = ""
            else:
                blocks[-1] += line + "\n"
        elif marks and not (marks[1][0] == "`" and "`" in marks[2]):
            fence = marks[1]
            blocks.append("")
        elif re.match(r" {0,3}#{1,6}([ \t]|$)", line):
            headings.append(line)
        else:
            assert line == "" or re.match(r"> |\d\d\d\d-|`", line), line
    assert not fence
    return headings, blocks


@examples
@given(st.lists(st.text("`~#>-= \n\ra1<", max_size=25), min_size=4, max_size=4))
def test_no_text_breaks_the_structure_of_the_markdown(history: History, texts: list[str]) -> None:
    question, answer, heading, text = texts
    conversation = history.begin("Title")
    turn = history.add_turn(conversation, ROOT, question, heading)
    source = Source(Path(f"/d/{heading}"), 1, 2, heading, text, 1.0)
    history.finish_turn(turn, answer, "end", [source, source])
    headings, blocks = outline(history.export_markdown(conversation))
    assert headings == ["# Title", "## Question 1", "### Answer", "### Sources"]
    assert blocks == [re.sub(r"\r\n|\r", "\n", text + "\n")] * 2


def test_markdown_is_one_line_of_the_tree(history: History) -> None:
    conversation = history.begin("A *title* #1")
    first = asked(history, conversation, ROOT, "First?", "Yes.\n```\ncode")
    asked(history, conversation, first, "Other branch")
    last = history.add_turn(conversation, first, "Last?", "")
    exported = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", history.export_markdown(conversation))
    assert exported == (
        "# A \\*title\\* \\#1\n\n## Question 1\n\n> First?\n\nDATE UTC, ` m `\n\n"
        "### Answer\n\n> Yes.\n> ```\n> code\n\n"
        "### Sources\n\n` /d/tea.md `, lines 3-9: Tea \\> Brewing\n\n```\nSteep it.\nFour minutes.\n```\n\n"
        "## Question 2\n\n> Last?\n\nDATE UTC, ` unknown model `, ending: lost\n\n### Answer\n\n> \n"
    )
    assert "Other branch" in history.export_markdown(conversation, last - 1)
    empty = history.begin("Empty")
    assert history.export_markdown(empty) == "# Empty\n"
    with pytest.raises(QuireError, match=f"no turn in this conversation {last}"):
        history.export_markdown(empty, last)


# Several processes, crashes, damage


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    header = "import os, sys; from pathlib import Path; from quire.history import *; h = History(Path(sys.argv[1]))\n"
    command = [sys.executable, "-c", header + program, *map(str, arguments)]
    return subprocess.Popen(command, env={"PYTHONPATH": ":".join(sys.path)}, stdout=subprocess.PIPE, text=True)


def test_processes_start_and_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    program = """
own, leaf = h.begin(sys.argv[2]), ROOT
for i in range(25):
    for c, parent in ((1, ROOT), (own, leaf)):
        leaf = h.add_turn(c, parent, f"q {i}", "m")
        h.finish_turn(leaf, sys.argv[2], "end")
"""
    with History(path) as history:
        history.begin("shared")
    path.with_name("new").mkdir()
    processes = [start(program, path, name) for name in "ab"]
    # And a file that none of them has made yet.
    processes += [start("h.begin()", path.with_name("new") / "history.sqlite") for _ in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    with History(path) as history:
        abouts = {about.title: about for about in history.conversations(10)}
        assert {title: about.turns for title, about in abouts.items()} == {"shared": 50, "a": 25, "b": 25}
        assert len(history.path_to(abouts["a"].leaf)) == 25
    with History(path.with_name("new") / "history.sqlite") as history:
        assert len(history.conversations(10)) == 2
    assert sound(path)


def test_killed_while_writing_only_the_unfinished_answer_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    program = """
c, turn = h.begin("t"), ROOT
while True:
    turn = h.add_turn(c, turn, f"question {turn}", "m")
    print("asked", turn, flush=True)
    h.finish_turn(turn, f"answer {turn} " * 500, "end")
    print("done", turn, flush=True)
"""
    for lines in (1, 60, 61):
        process = start(program, path)
        assert process.stdout
        said = [process.stdout.readline().split() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        said += [line.split() for line in process.stdout if line.endswith("\n")]
        process.wait(timeout=60)
        with History(path) as history:
            conversation = history.conversations(1)[0].id
            turns = history.turns(conversation)
            assert {int(turn) for _, turn in said} <= {turn.id for turn in turns}
            done = {int(turn) for what, turn in said if what == "done"}
            assert [turn.id for turn in turns if turn.ending == "lost"] in ([], [turns[-1].id])
            for turn in turns:
                assert turn.question == f"question {turn.parent}"
                assert turn.answer == ("" if turn.ending == "lost" else f"answer {turn.id} " * 500)
                assert turn.ending == "end" or turn.id not in done
            assert len(history.path_to(turns[-1].id)) == len(turns)
        assert sound(path)


def test_killed_within_a_write_nothing_of_it_is_left(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    program = """
c = h.begin("t")
h.add_turn(c, ROOT, "kept", "m")
h._place = lambda *_: os.kill(os.getpid(), 9)
h.add_turn(c, ROOT, "half", "m")
"""
    assert start(program, path).wait(timeout=60) == -signal.SIGKILL
    with History(path) as history:
        assert [turn.question for turn in history.turns(1)] == ["kept"]
        assert found(history, "half") == set()
    assert sound(path)


@pytest.mark.parametrize("damage", ["garbage", "middle", "truncated"])
def test_damage_is_explained_and_the_file_is_kept(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "history.sqlite"
    with History(path) as history:
        conversation = history.begin()
        for i in range(20):
            asked(history, conversation, ROOT, f"word {i} " * 300)
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data = bytearray(b"this is no database" * 500)
    elif damage == "middle":
        data[4096:] = b"\xff" * (len(data) - 4096)
    else:
        del data[5000:]
    path.write_bytes(data)

    def use() -> None:
        with History(path) as history:
            history.turns(conversation)
            history.begin("x")

    with pytest.raises(QuireError, match=r"damaged.*kept") as caught:
        use()
    assert caught.value.message == f"The history is damaged. It is kept, nothing was deleted: {path}"
    assert caught.value.hint == "Put a backup in its place, or move it elsewhere: Quire then begins a new one."
    assert path.read_bytes() == data


@pytest.mark.parametrize("stored", ["{", "[]x", '{"ratio": "x"}', "null"])
def test_damage_within_a_value_is_explained(history: History, stored: str) -> None:
    turn = asked(history, history.begin(), ROOT, "q")
    db = sqlite_utils.Database(history.path)
    db.execute("UPDATE turns SET truth = ?", [stored])
    db.execute("UPDATE conversations SET updated_at = ?", [stored])
    db.close()
    with pytest.raises(QuireError, match="damaged"):
        history.turn(turn)
    with pytest.raises(QuireError, match="damaged"):
        history.conversations(10)


def test_text_that_is_not_utf8_any_more_is_damage(history: History) -> None:
    turn = asked(history, history.begin(), ROOT, "q")
    db = sqlite_utils.Database(history.path)
    db.execute("UPDATE turns SET model = CAST(x'ff' AS TEXT)")
    db.close()
    with pytest.raises(QuireError, match="damaged"):
        history.turn(turn)


def test_a_history_of_a_newer_version_is_refused_by_name_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    with History(path) as history:
        history.begin("kept")
    db = sqlite_utils.Database(path)
    row = {"migration_set": "quire.history", "name": "from_tomorrow", "applied_at": ""}
    db.table("_sqlite_migrations").insert(row)
    db.close()
    with pytest.raises(QuireError, match=r"newer Quire \(from_tomorrow\)") as caught:
        History(path)
    assert caught.value.message.startswith(f"The history {path} ")
    db = sqlite_utils.Database(path)
    assert db.execute("SELECT title FROM conversations").fetchall() == [("kept",)]
    db.close()


def test_a_path_that_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "history.sqlite"):
        with pytest.raises(QuireError, match=f"The history {path} cannot be used") as caught:
            History(path)
        assert "Nothing was deleted" in caught.value.hint
    assert os.listdir(tmp_path) == [".home"]
