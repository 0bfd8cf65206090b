"""Questions to all documents, in the application and line by line. The session is real, the model a tiny one."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Collapsible

from command_line import TEXT
from driving import PATIENCE_S, on_a_screen, running, shown, until
from quire import config
from quire.conversation import open_history
from quire.session import Session
from quire.tui.prompt import ALL, weight
from quire.tui.sources import Preview, Sources
from quire.tui.widgets import Answer
from quire.whole import COMMAND, Plan, WholeFolder

QUESTION = "Who kept the light?"
NAMES = ("ann", "bob", "cid")
Open = Callable[[], Session]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    place = tmp_path / "notes"
    place.mkdir()
    for name in NAMES:
        (place / f"{name}.md").write_text(f"{name} kept it. {TEXT}")
    (place / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    return place


@pytest.fixture
def filled(notes: Path, tiny: Callable[[str], Path], one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Open:
    """The folder is read already."""
    monkeypatch.chdir(notes)
    # A tiny model says nothing that stands in a document.
    monkeypatch.setattr(
        "quire.whole.drawn_from", lambda _answer, _question, part: {c.id for c in part if "ann" in c.text}
    )

    def opened() -> Session:
        return Session(config.load({"model": str(tiny("llama")), "context_tokens": "150", "max_tokens": "6"}))

    with opened() as session:
        session.index([session.library.add_root(notes)], lambda _: None)
    return opened


@on_a_screen
async def test_it_is_weighed_answered_accounted_for_and_kept(filled: Open) -> None:
    async with running(filled, (80, 24)) as (app, pilot):
        await until(app, pilot, lambda: "3/3 cached" in shown(app))
        await pilot.press(*"/all ")
        await pilot.press(*QUESTION)
        await until(app, pilot, lambda: "All files · " in shown(app))
        assert "3 passages of 4 documents in 3 parts" in shown(app)
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.query(Collapsible))
        await until(app, pilot, lambda: "4 documents: 1 contributed, 2 had nothing, 1 could not be read" in shown(app))
        assert "tokens read in" in shown(app)
        app.chat.query_one(Collapsible).collapsed = False
        await until(app, pilot, lambda: "bad.pdf  could not be read: damaged" in shown(app))
        assert "1. ann.md:1-1" in shown(app)
        assert "bob.md  had nothing" in shown(app)
        app.chat.query_one(Sources).focus()
        await pilot.press("home", "enter")
        await until(app, pilot, lambda: isinstance(app.screen, Preview))
        assert "ann kept it." in shown(app)
        await pilot.press("escape")
        said = app.chat.query_one(Answer).said
        conversation = app.chat.conversation_id
    async with running(filled, (80, 24)) as (app, pilot):
        await app.chat.open(conversation)
        await until(app, pilot, lambda: "4 documents: 1 contributed, 2 had nothing, 1 could not be read" in shown(app))
        assert app.chat.query_one(Answer).said == said
        assert f"/all {QUESTION}" in shown(app), "asking again asks for all"


@on_a_screen
async def test_esc_ends_it_with_what_was_found(filled: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    read = WholeFolder._read

    def wait_after_the_first(whole: WholeFolder, question: str, ids: Any, so_far: Any, should_stop: Any) -> str:
        while so_far.reached and not should_stop():
            time.sleep(0.01)
        return read(whole, question, ids, so_far, should_stop)

    monkeypatch.setattr(WholeFolder, "_read", wait_after_the_first)
    async with running(filled, (120, 40)) as (app, pilot):
        await until(app, pilot, lambda: "3/3 cached" in shown(app))
        app.chat.prompt.put("Who is named in all files?")
        await pilot.press("enter")
        await until(app, pilot, lambda: "Read 1 of 3 parts" in shown(app))
        await pilot.press("escape")
        await until(app, pilot, lambda: "Stopped. " in shown(app))
        await until(app, pilot, lambda: "1 contributed, 1 could not be read, 2 not reached" in shown(app))
        assert app.focused is app.chat.prompt
    with open_history() as history:
        [turn] = history.turns(1)
        assert turn.ending == "stopped"
        assert [source.path.name for source in turn.sources] == ["ann.md"]


@on_a_screen
async def test_the_command_alone_waits_for_its_question(filled: Open) -> None:
    async with running(filled) as (app, pilot):
        app.chat.prompt.put("/all")
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.prompt.text == "/all ")
        app.chat.prompt.put("Who?")
        app.chat.action_ask_all()
        assert app.chat.prompt.text == "/all Who?"
        assert not app.chat.query(Answer)


def test_both_know_one_command() -> None:
    """The screen that is painted first does not load what answers, so each has the word."""
    assert ALL == COMMAND


def test_the_words_of_the_weight() -> None:
    plan = Plan(2, 34, 12, 5000, 12_000.0)
    assert weight(plan) == "All files · at least 12.0 s · 34 passages of 12 documents in 2 parts"
    assert (
        weight(Plan(1, 1, 1, 50, 0.0, "They leave.")) == "They leave. · All files · 1 passage of 1 document in 1 part"
    )


def test_line_by_line(notes: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": tiny("llama"), "CONTEXT_TOKENS": 150, "MAX_TOKENS": 6, "THREADS": 1}.items():
        monkeypatch.setenv(f"QUIRE_{name}", str(value))
    monkeypatch.chdir(notes)
    words = [sys.executable, "-m", "quire", "chat", "--plain", "."]
    typed = f"/all\n/all {QUESTION}\n/sources\n"
    done = subprocess.run(words, input=typed, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1, "a command without a question is an error"
    assert "There is no question." in done.stderr
    assert "Reading 3 passages of 4 documents in 3 parts" in done.stderr
    assert "part 3 of 3" in done.stderr
    assert "Could not be read (1):\n  bad.pdf: damaged" in done.stdout
    assert done.stdout.count("bad.pdf") == 2, "/sources tells it again"
    with open_history() as history:
        [turn] = history.turns(history.conversations(1)[0].id)
        assert (turn.question, len(turn.documents)) == (f"/all {QUESTION}", 4)
