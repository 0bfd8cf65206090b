"""Conversations in the application, through Textual's pilot: kept, reopened, branched, searched, changed, exported.

The session is a double that says what it is told to; the history is the real one. One test uses the real small model.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Collapsible, Input

from driving import on_a_screen, shown
from functional.test_tui import (
    HOSTILE,
    FakeSession,
    answered,
    ask,
    running,
    until,
)
from quire.conversation import open_history
from quire.history import ROOT, Source, Turn
from quire.session import Estimate
from quire.tui.app import QuireApp
from quire.tui.conversations import ConversationsScreen, moment
from quire.tui.sources import Sources
from quire.tui.widgets import Answer, Question, Trouble, Undrawn
from quire_engine.errors import QuireError
from quire_engine.types import Exchange


def kept(conversation: int = 1) -> list[Turn]:
    with open_history() as history:
        return history.turns(conversation)


def stored(*questions: str, answer: str = "It is so.") -> int:
    """A conversation that was held before: one question after another."""
    with open_history() as history:
        conversation, parent = history.begin(), ROOT
        for question in questions:
            parent = history.add_turn(conversation, parent, question, "m")
            history.finish_turn(parent, answer, "end", [Source(Path("/d/tea.md"), 1, 2, "Tea", "Steep it.", 1.0)])
    return conversation


def questions(app: QuireApp) -> list[str]:
    return [question.said for question in app.chat.query(Question)]


async def replied(app: QuireApp, pilot: Pilot[None], question: str, session: FakeSession, reply: str) -> Answer:
    """One more question, answered in these words."""
    session.pieces = [reply]
    app.chat.prompt.focus()
    app.chat.prompt.put(question)
    await pilot.press("enter")
    await until(app, pilot, lambda: reply in shown(app) and not app.chat._turn)
    return app.chat.query(Answer).last()


async def listed(app: QuireApp, pilot: Pilot[None], words: str) -> None:
    """The conversations screen, with these words on it and the list in focus."""
    await pilot.press("ctrl+o")
    await until(app, pilot, lambda: isinstance(app.screen, ConversationsScreen) and words in shown(app))
    await pilot.press("down")


async def at(app: QuireApp, pilot: Pilot[None], kind: type[Any], number: int) -> Any:
    """A message of the chat, reached by the keyboard."""
    part = list(app.chat.query(kind))[number]
    app.chat.prompt.focus()
    for _ in range(30):
        await pilot.press("shift+tab")
        if app.focused is part:
            return part
    raise AssertionError(f"{part} cannot be reached")


# Kept


@on_a_screen
async def test_a_conversation_is_kept_and_goes_on_after_a_restart() -> None:
    session = FakeSession(pieces=["It was **Ida**", " Marlow."])
    async with running(session) as (app, pilot):
        await answered(app, pilot, "Who?")
        assert "tokens/s" in shown(app)
        await answered(app, pilot, "When?")
    first, second = kept()
    assert (first.question, first.answer, first.ending, first.model) == (
        "Who?",
        "It was **Ida** Marlow.",
        "end",
        "fake",
    )
    assert first.sources[0].text == session.hits[0].text
    assert (second.parent, second.truth.ratio) == (first.id, 0.16)
    past = Exchange((session.hits[0].text,), "Who?", "It was **Ida** Marlow.")
    assert session.histories == [(), (past,)]

    again = FakeSession()
    async with running(again) as (app, pilot):
        await until(app, pilot, lambda: "Quire answers" in shown(app))
        await listed(app, pilot, "2 questions")
        assert "Who?" in shown(app)
        await pilot.press("enter")
        await until(app, pilot, lambda: "When?" in shown(app))
        assert questions(app) == ["Who?", "When?"]
        for words in ("It was Ida Marlow.", "1 source: tower.md", "First word 200 ms (full prefill about 3.0 s)"):
            assert words in shown(app)
        assert app.focused is app.chat.prompt
        app.chat.query(Collapsible).last().collapsed = False
        app.chat.query(Sources).last().focus()
        await pilot.press("enter")
        await until(app, pilot, lambda: "The tower was built by Ida Marlow." in shown(app))
        await pilot.press("escape", "escape")
        await answered(app, pilot, "Where?")
        await until(app, pilot, lambda: len(kept()) == 3)
        assert again.histories == [(past, Exchange(past.passages, "When?", past.answer))]
    assert [turn.parent for turn in kept()] == [ROOT, first.id, second.id]


@on_a_screen
async def test_what_is_stopped_is_kept_and_what_fails_is_not() -> None:
    session = FakeSession(pieces=[f"word{i} " for i in range(2000)], pause_s=0.005)
    async with running(session) as (app, pilot):
        answer = await ask(app, pilot, "Tell me.")
        await until(app, pilot, lambda: "word3" in answer.said)
        assert [(turn.question, turn.ending) for turn in kept()] == [("Tell me.", "lost")], "before it is answered"
        await pilot.press("escape")
        await until(app, pilot, lambda: answer.query(Collapsible))
        assert [(turn.answer, turn.ending) for turn in kept()] == [(answer.said, "stopped")]
        session.fails = QuireError("Nothing matches.", "Use other words.")
        await ask(app, pilot, "zebra?")
        await until(app, pilot, lambda: app.chat.query(Trouble))
        assert len(kept()) == 1
        session.fails, session.pieces = None, ["Yes."]
        await pilot.press("enter")
        await until(app, pilot, lambda: "Yes." in shown(app))
        assert [exchange.answer for exchange in session.histories[-1]] == [answer.said]
        await pilot.press("ctrl+n")
        session.fails = QuireError("Nothing matches.", "Use other words.")
        await pilot.pause()
        await ask(app, pilot, "zebra?")
        await until(app, pilot, lambda: "Nothing matches." in shown(app))
    with open_history() as history:
        assert [conversation.turns for conversation in history.conversations(9)] == [2]


@on_a_screen
async def test_leaving_while_it_answers_keeps_both() -> None:
    session = FakeSession(pieces=["word "] * 5000, pause_s=0.005)
    async with running(session) as (app, pilot):
        answer = await ask(app, pilot, "Tell me.")
        await until(app, pilot, lambda: answer.said)
        await pilot.press("ctrl+n")
        await until(app, pilot, lambda: "Quire answers" in shown(app))
        session.pieces = ["Short."]
        await answered(app, pilot, "And now?")
    turn = kept()[0]
    assert (turn.question, turn.ending, turn.answer.split()[0]) == ("Tell me.", "stopped", "word")
    assert kept(2)[0].answer == "Short."


# Branches


@on_a_screen
async def test_a_question_is_edited_and_both_branches_stay(tmp_path: Path) -> None:
    session = FakeSession()
    async with running(session) as (app, pilot):
        await replied(app, pilot, "First?", session, "one")
        await replied(app, pilot, "Second?", session, "two")
        await pilot.press(*"draft")
        await at(app, pilot, Question, 0)
        await pilot.press("e")
        assert app.chat.prompt.text == "First?"
        assert app.focused is app.chat.prompt
        assert "another branch; Esc" in shown(app)
        await pilot.press("escape")
        assert (app.chat.prompt.text, questions(app)) == ("draft", ["First?", "Second?"])
        assert "another branch" not in shown(app)
        await at(app, pilot, Question, 1)
        await pilot.press("e")
        await replied(app, pilot, "Third?", session, "three")
        assert questions(app) == ["First?", "Third?"]
        assert "Third?  (2/2)" in shown(app)
        assert [exchange.question for exchange in session.histories[-1]] == ["First?"]
        await at(app, pilot, Question, 1)
        await pilot.press("left")
        await until(app, pilot, lambda: questions(app) == ["First?", "Second?"])
        await until(app, pilot, lambda: "Second?  (1/2)" in shown(app) and "two" in shown(app))
        assert isinstance(app.focused, Question)
        await pilot.press("left", "right")
        await until(app, pilot, lambda: questions(app) == ["First?", "Third?"])
        await pilot.press("left_square_bracket")
        await until(app, pilot, lambda: questions(app) == ["First?", "Second?"])
        await replied(app, pilot, "Fourth?", session, "four")
        assert [exchange.question for exchange in session.histories[-1]] == ["First?", "Second?"]
    assert [(turn.question, turn.parent) for turn in kept()] == [
        ("First?", 0), ("Second?", 1), ("Third?", 1), ("Fourth?", 2)
    ]  # fmt: skip


@on_a_screen
async def test_asking_again_and_going_on_from_an_earlier_answer() -> None:
    session = FakeSession()
    async with running(session, size=(80, 24)) as (app, pilot):
        await replied(app, pilot, "First?", session, "one")
        await replied(app, pilot, "Second?", session, "two")
        await pilot.press(*"half a")
        session.pieces = ["other"]
        await at(app, pilot, Answer, 1)
        await pilot.press("r")
        await until(app, pilot, lambda: "other" in shown(app) and not app.chat._turn)
        assert questions(app) == ["First?", "Second?"]
        assert "(2/2)" in shown(app)
        assert app.chat.prompt.text == "half a"
        await at(app, pilot, Answer, 0)
        await pilot.press("b")
        assert app.focused is app.chat.prompt
        assert "another branch; Esc" in shown(app)
        await replied(app, pilot, "From here?", session, "three")
        assert questions(app) == ["First?", "From here?"]
        assert "(3/3)" in shown(app)
        await at(app, pilot, Question, 0)
        await pilot.press("b", "b")
        assert "another branch; Esc" in shown(app)
        assert app.chat.prompt.text == "b", "the second one was typed"
    assert [(turn.question, turn.answer, turn.parent) for turn in kept()] == [
        ("First?", "one", 0), ("Second?", "two", 1), ("Second?", "other", 1), ("From here?", "three", 1)
    ]  # fmt: skip


@on_a_screen
async def test_a_text_is_weighed_where_it_would_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    behind: list[list[str]] = []

    def estimate(_: FakeSession, question: str, history: Sequence[Exchange]) -> Estimate:
        behind.append([exchange.question for exchange in history])
        return Estimate(1509, 240, 8192, 900.0)

    monkeypatch.setattr(FakeSession, "estimate", estimate)
    async with running(session) as (app, pilot):
        await replied(app, pilot, "First?", session, "one")
        await replied(app, pilot, "Second?", session, "two")
        await pilot.press(*"next")
        await until(app, pilot, lambda: behind[-1:] == [["First?", "Second?"]])
        await at(app, pilot, Answer, 0)
        await pilot.press("b")
        await until(app, pilot, lambda: behind[-1:] == [["First?"]])
        await pilot.press("escape")
        await until(app, pilot, lambda: behind[-1:] == [["First?", "Second?"]])
        await at(app, pilot, Question, 0)
        await pilot.press("e")
        await until(app, pilot, lambda: behind[-1:] == [[]])


@on_a_screen
async def test_what_is_asked_again_is_seen_to_its_end() -> None:
    session = FakeSession()
    async with running(session, size=(80, 24)) as (app, pilot):

        async def pressed(key: str, last_word: str) -> None:
            session.pieces = ["word\n\n" * 30, last_word]
            await pilot.press(key)
            await until(
                app, pilot, lambda: not app.chat._turn and app.chat.query(Answer).last().said.endswith(last_word)
            )
            await until(app, pilot, lambda: last_word in shown(app) and "1 source" in shown(app))

        for word in ("one", "two"):
            app.chat.prompt.put("What?")
            await pressed("enter", word)
        await at(app, pilot, Question, 1)
        await pressed("r", "three")
        await at(app, pilot, Question, 1)
        await pilot.press("left")
        await until(app, pilot, lambda: "(1/2)" in shown(app))
        await pressed("r", "four")


@on_a_screen
async def test_messages_are_copied_and_walked() -> None:
    session = FakeSession()
    async with running(session) as (app, pilot):
        await replied(app, pilot, "First?", session, "one")
        app.chat.query(Answer).last().said = "one\x1b]52;c;x\x07"
        await pilot.press("shift+tab", "shift+tab", "y")
        await until(app, pilot, lambda: app.clipboard == "one")
        await pilot.press("up", "y")
        await until(app, pilot, lambda: app.clipboard == "First?")
        await pilot.press("down", "down")
        assert app.focused is app.chat.prompt
        session.pieces = ["word "] * 5000
        await ask(app, pilot, "Second?")
        await at(app, pilot, Question, 0)
        for key in ("e", "r", "b", "left"):
            await pilot.press(key)
        await pilot.pause()
        assert questions(app) == ["First?", "Second?"], "while it answers nothing branches"
        assert app.chat.prompt.text == ""
        await pilot.press("f1")
        await until(app, pilot, lambda: "A question and its answer" in shown(app))


# The list


@on_a_screen
async def test_conversations_are_found_by_what_was_said() -> None:
    stored("Which tea?", "How long?", answer="Four minutes.")
    stored("Where is the lighthouse?", answer="At Grey Point.")
    async with running(FakeSession()) as (app, pilot):
        await pilot.press("ctrl+o")
        await until(app, pilot, lambda: "Which tea?" in shown(app) and "Where is the lighthouse?" in shown(app))
        await pilot.press(*"minutes")
        await until(app, pilot, lambda: "lighthouse" not in shown(app))
        assert "Four minutes." in shown(app)
        await pilot.press("enter")
        await until(app, pilot, lambda: app.screen is app.chat and questions(app) == ["Which tea?", "How long?"])
        await pilot.press("ctrl+o")
        await pilot.press(*"nowhere")
        await until(app, pilot, lambda: "Nothing holds 'nowhere'." in shown(app))
        await pilot.press("enter", "escape")
        await until(app, pilot, lambda: app.screen is app.chat)
        await pilot.press("ctrl+o", "ctrl+n")
        await until(app, pilot, lambda: app.screen is app.chat and "Quire answers" in shown(app))


@on_a_screen
async def test_a_long_conversation_opens_where_it_was_left_and_shows_the_rest() -> None:
    stored(*(f"Question {i}?" for i in range(70)))
    async with running(FakeSession()) as (app, pilot):
        await listed(app, pilot, "70 questions")
        await pilot.press("enter")
        await until(app, pilot, lambda: "Question 69?" in shown(app))
        assert questions(app)[0] == "Question 60?"
        app.chat.query_one(Undrawn).focus()
        await until(app, pilot, lambda: len(questions(app)) == 20)
        assert [int(q.split()[1][:-1]) for q in questions(app)] == list(range(50, 70))
        await pilot.press("ctrl+o")
        await pilot.press(*"Question 7")
        await until(app, pilot, lambda: "Question 7?" in shown(app))
        await pilot.press("enter")
        await until(app, pilot, lambda: app.screen is app.chat and questions(app)[0] == "Question 7?")
        await until(app, pilot, lambda: "Question 7?" in shown(app))
        assert len(questions(app)) < 30, "not all that follow"


@on_a_screen
async def test_what_is_not_drawn_is_drawn_when_somebody_scrolls_or_asks() -> None:
    stored(*(f"Question {i}?" for i in range(40)))

    def top() -> str:
        found = re.search(r"Question \d+\?", shown(app))
        return found[0] if found else ""

    session = FakeSession()
    async with running(session, size=(80, 24)) as (app, pilot):
        await app.chat.open(1, 11)
        await until(app, pilot, lambda: top() == "Question 10?")
        assert questions(app) == [f"Question {i}?" for i in range(10, 15)]
        assert "25 later questions" in str(app.chat.query(Undrawn).last().render())
        await pilot.press("pagedown", "pagedown")
        await until(app, pilot, lambda: len(questions(app)) == 15)
        app.chat._dialogue.scroll_home(animate=False)
        await until(app, pilot, lambda: len(questions(app)) == 25)
        await until(app, pilot, lambda: "Question 10?" in shown(app) and app.chat._dialogue.scroll_y > 0)  # it stays
        await replied(app, pilot, "And now?", session, "Yes.")
        assert questions(app) == [*(f"Question {i}?" for i in range(30, 40)), "And now?"]
        assert len(session.histories[-1]) == 40


@on_a_screen
async def test_rename_and_delete_are_asked_in_place() -> None:
    stored("Which tea?")
    stored("Where?")
    async with running(FakeSession(), size=(80, 24)) as (app, pilot):
        await listed(app, pilot, "Which tea?")
        await pilot.press("enter")
        await until(app, pilot, lambda: questions(app) == ["Where?"])
        await listed(app, pilot, "Which tea?")
        await pilot.press("r")
        await until(app, pilot, lambda: isinstance(app.focused, Input))
        await pilot.press(*([("backspace")] * 6), *"Tower", "enter")
        await until(app, pilot, lambda: "Tower" in shown(app))
        await pilot.press("d")
        await until(app, pilot, lambda: "d or y deletes" in shown(app))
        await pilot.press("n")
        await until(app, pilot, lambda: "d or y deletes" not in shown(app))
        await pilot.press("d", "down", "d", "escape")
        await pilot.pause()
        assert isinstance(app.screen, ConversationsScreen), "Esc said no"
        assert "d or y deletes" not in shown(app)
        await pilot.press("d", "d")
        await until(app, pilot, lambda: "Deleted: Tower" in shown(app))
        assert "Which tea?" in shown(app)
        await pilot.press("escape")
        await until(app, pilot, lambda: app.screen is app.chat and "Quire answers" in shown(app))
        assert questions(app) == [], "what was deleted is not on the screen any more"
        await listed(app, pilot, "Which tea?")
        await pilot.press("d", "y")
        await until(app, pilot, lambda: "Which tea?" not in shown(app).replace("Deleted: Which tea?", ""))


@on_a_screen
async def test_export_never_overwrites_silently_and_import_reads_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stored("Which tea?", "How long?", answer="Four minutes.")
    async with running(FakeSession()) as (app, pilot):
        await listed(app, pilot, "Which tea?")
        await pilot.press("x", "enter")
        await until(app, pilot, lambda: "Written:" in shown(app))
        file = tmp_path / "Which-tea.md"
        assert "> Four minutes." in file.read_text(encoding="utf-8")
        file.write_text("mine")
        await pilot.press("x", "enter")
        await until(app, pilot, lambda: "Enter once more replaces it" in shown(app))
        assert file.read_text() == "mine"
        await pilot.press("enter")
        await until(app, pilot, lambda: "Written:" in shown(app))
        assert "How long?" in file.read_text()
        await pilot.press("X")
        await pilot.press("ctrl+u", *"nowhere/x.json", "enter")
        await until(app, pilot, lambda: "No such file" in shown(app))
        await pilot.press("ctrl+u", *"tea.json", "enter")
        await until(app, pilot, lambda: "Written:" in shown(app))
        assert json.loads((tmp_path / "tea.json").read_text())["title"] == "Which tea?"
        await pilot.press("i", *"tea.json", "enter")
        await until(app, pilot, lambda: shown(app).count("Which tea?") == 2)
        await pilot.press("i", *"Which-tea.md", "enter")
        await until(app, pilot, lambda: "no conversation that Quire exported" in shown(app))
        await pilot.press("escape")
    assert [turn.question for turn in kept(2)] == ["Which tea?", "How long?"]


# Two windows, and hostile text


@on_a_screen
async def test_a_conversation_that_another_window_deleted() -> None:
    session = FakeSession()
    async with running(session) as (app, pilot):
        await answered(app, pilot, "First?")
        await listed(app, pilot, "First?")
        with open_history() as history:
            history.delete(1)
        await pilot.press("enter")
        await until(app, pilot, lambda: app.screen is app.chat and "There is no conversation 1." in shown(app))
        app.chat.prompt.put("Second?")
        await pilot.press("enter")
        await until(app, pilot, lambda: "This conversation was deleted in another window." in shown(app))
        assert app.chat.prompt.text == "Second?"
        await pilot.press("ctrl+n")
        await until(app, pilot, lambda: "Quire answers" in shown(app))
        await pilot.press("enter")
        await until(app, pilot, lambda: "Ida Marlow." in shown(app))
    with open_history() as history:
        (conversation,) = history.conversations(9)
    assert conversation.title == "Second?"


@on_a_screen
async def test_hostile_text_of_the_history_is_text() -> None:
    stored(f"Why {HOSTILE}?", f"Who {HOSTILE}?", answer=f"Because {HOSTILE}")
    async with running(FakeSession(), size=(150, 40)) as (app, pilot):
        await listed(app, pilot, "2 questions")
        seen = app.export_screenshot() + shown(app)
        assert "Why [red]not markup[/red]" in shown(app)
        await pilot.press("r")
        await pilot.pause()
        seen += shown(app)
        await pilot.press("escape", "d", "d")
        await until(app, pilot, lambda: "Deleted: Why" in shown(app))
        seen += shown(app)
        stored(f"Why {HOSTILE}?", answer=f"Because {HOSTILE}")
        await pilot.press("escape", "ctrl+o")
        await pilot.press(*"because")
        await until(app, pilot, lambda: "Because" in shown(app))
        seen += shown(app)
        await pilot.press("enter")
        await until(app, pilot, lambda: len(questions(app)) == 1)
        await until(app, pilot, lambda: "Because [red]not markup[/red]" in shown(app))
        seen += app.export_screenshot() + shown(app)
        assert app.is_running
    assert not any(sign in seen for sign in "\x1b\x07\x9b")


def test_moments_are_said_shortly() -> None:
    from datetime import UTC, datetime

    now = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
    assert moment(datetime(2026, 3, 2, 8, 5, tzinfo=UTC), now) == "today 08:05"
    assert moment(datetime(2026, 3, 1, 23, 5, tzinfo=UTC), now) == "yesterday 23:05"
    assert moment(datetime(2026, 2, 3, 8, 5, tzinfo=UTC), now) == "3 Feb 08:05"
    assert moment(datetime(2025, 2, 3, 8, 5, tzinfo=UTC), now) == "3 Feb 2025"
