"""The prompt: mentions, earlier questions, pastes, what a question would take, and keys that come in a burst.

The session is real, the model a tiny generated one, whose answers mean nothing but come at once.
"""

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.pilot import Pilot
from textual.widgets import Collapsible

from driving import on_a_screen, press_at_once, running, shown, until
from quire import config
from quire.conversation import open_history
from quire.session import Estimate, Found, Session
from quire.tui.app import QuireApp
from quire.tui.prompt import Offers, weight
from quire.tui.widgets import Question, Trouble

Open = Callable[[], Session]
NAMES = ("hot/tea.md", "hot/coffee.md", "my trips/tea house.md", "teams.md", "plan.md")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with documents of which some names fit the same letters."""
    for name in NAMES:
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"What {name} says: water is poured at {len(name)} degrees.")
    return tmp_path / "notes"


@pytest.fixture
def opened(tiny: Callable[[str], Path]) -> Open:
    return lambda: Session(config.load({"model": str(tiny("llama")), "max_tokens": 4}))


@pytest.fixture
def filled(opened: Open, notes: Path) -> Open:
    """As opened; the folder is read already."""
    with opened() as session:
        session.index([session.library.add_root(notes)], lambda _: None)
    return opened


def offered(app: QuireApp) -> list[str]:
    offers = app.chat.query_one(Offers)
    return [place.name for place in offers.places] if offers.display else []


async def known(app: QuireApp, pilot: Pilot[None]) -> None:
    """Waits until the documents are known."""
    await until(app, pilot, lambda: len(app.chat.state.rows) == len(NAMES))


def asked(app: QuireApp) -> list[str]:
    return [question.said for question in app.chat.query(Question)]


async def answered(app: QuireApp, pilot: Pilot[None], count: int) -> None:
    await until(app, pilot, lambda: len(app.chat.query(Collapsible)) == count)


# Mentions


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
@on_a_screen
async def test_a_mention_is_offered_and_taken(filled: Open, size: tuple[int, int]) -> None:
    async with running(filled, size) as (app, pilot):
        await known(app, pilot)
        await pilot.press(*"In @te")
        assert offered(app)[:3] == ["notes/teams.md", "notes/hot/tea.md", "notes/my trips/tea house.md"]
        await until(app, pilot, lambda: "notes/my trips/tea house.md" in shown(app))
        assert "In @te" in shown(app)
        await pilot.press("down", "down", "down", "up", "tab")
        assert app.chat.prompt.text == 'In @"tea house.md" '
        assert offered(app) == []
        await pilot.press(*"and @pla", "enter", *"what?", "enter")
        await until(app, pilot, lambda: asked(app) == ['In @"tea house.md" and @plan.md what?'])
        assert app.focused is app.chat.prompt


@on_a_screen
async def test_offers_never_steal_what_was_meant_otherwise(filled: Open) -> None:
    async with running(filled) as (app, pilot):
        await known(app, pilot)
        await pilot.press(*"eva@te")
        assert offered(app) == [], "an address"
        app.chat.prompt.put("")
        await pilot.press(*"@te", "escape")
        assert offered(app) == []
        await pilot.press(*"am")
        assert offered(app) == [], "closed for this mention"
        app.chat.prompt.put("")
        for number, question in enumerate(("what says @", "@hot", "@nothing says water"), 1):
            await pilot.press(*question, "enter")
            await until(app, pilot, lambda: app.chat.prompt.text == "")
            assert asked(app)[-1] == question
            await answered(app, pilot, number)


@on_a_screen
async def test_keys_that_come_in_a_burst_meet_the_offers_in_their_order(filled: Open) -> None:
    async with running(filled) as (app, pilot):
        await known(app, pilot)
        press_at_once(app, *"@pl", "tab", *"says what", "enter", *"next")
        await until(app, pilot, lambda: asked(app) == ["@plan.md says what"])
        await until(app, pilot, lambda: app.chat.prompt.text == "next")


@on_a_screen
async def test_a_click_takes_an_offer(filled: Open) -> None:
    async with running(filled) as (app, pilot):
        await known(app, pilot)
        await pilot.press(*"@te")
        await until(app, pilot, lambda: "notes/hot/tea.md" in shown(app))
        await pilot.click(Offers, offset=(5, 2))
        await until(app, pilot, lambda: app.chat.prompt.text == "@tea.md ")
        assert app.focused is app.chat.prompt


def test_a_question_is_answered_from_what_it_names(filled: Open) -> None:
    with filled() as session:

        def names(question: str) -> list[str]:
            found = next(session.ask(question))
            assert isinstance(found, Found)
            return sorted(hit.path.name for hit in found.sources)

        assert names("what water") == sorted(Path(name).name for name in NAMES)
        assert names("what water in @plan.md?") == ["plan.md"]
        assert names('@hot/ water and @"tea house.md"') == ["coffee.md", "tea house.md", "tea.md"]
        assert len(names("what water, asks eva@plan.md")) == len(NAMES)
        assert session.read("what in @hot/tea.md?").question == "what in hot/tea.md?"


# Earlier questions


@on_a_screen
async def test_up_and_down_walk_through_earlier_questions(filled: Open) -> None:
    with open_history() as history:
        conversation = history.begin()
        for question in ("oldest", "twice", "twice", "long\nquestion"):
            history.add_turn(conversation, 0, question, "m")
    async with running(filled) as (app, pilot):
        prompt = app.chat.prompt
        await pilot.press("up")
        await until(app, pilot, lambda: prompt.text == "long\nquestion")
        await pilot.press("down")
        assert prompt.text == ""
        await known(app, pilot)
        await pilot.press(*"what water", "enter")
        await answered(app, pilot, 1)
        await pilot.press(*"draft", "up")
        assert prompt.text == "what water"
        await pilot.press("up")
        assert prompt.text == "long\nquestion"
        await pilot.press("up", "home", "x")
        assert prompt.text == "xlong\nquestion", "from its second line to its first"
        await pilot.press("up", "up")
        assert prompt.text == "oldest"
        await pilot.press("up")
        assert prompt.text == "oldest"
        await pilot.press("down", "down")
        assert prompt.text == "xlong\nquestion", "what became of it"
        await pilot.press("down", "down")
        assert prompt.text == "draft"
        await pilot.press("down")
        assert prompt.text == "draft"


# Bursts and pastes


@on_a_screen
async def test_a_burst_of_keys_is_sent_whole(filled: Open) -> None:
    text = "".join(random.Random(1).choices(string.ascii_letters, k=200))
    async with running(filled) as (app, pilot):
        await known(app, pilot)
        press_at_once(app, *text, "enter", *"next")
        await until(app, pilot, lambda: asked(app))
        assert asked(app) == [text]
        await until(app, pilot, lambda: app.chat.prompt.text.startswith("next"))


@on_a_screen
async def test_a_paste_of_many_lines_keeps_its_lines_and_nothing_else(filled: Open) -> None:
    async with running(filled, (80, 24)) as (app, pilot):
        await known(app, pilot)
        app.post_message(events.Paste("a\x1b[31mb\r\nc\x1b]52;c;x\x07\rd\ne\x9b2J"))
        await until(app, pilot, lambda: app.chat.prompt.text == "ab\nc\nd\ne")
        app.chat.prompt.put("")
        app.post_message(events.Paste("".join(f"line {i} of what was pasted @te\r" for i in range(5000))))
        press_at_once(app, *"still typing")
        await until(app, pilot, lambda: app.chat.prompt.document.line_count == 5001)
        await until(app, pilot, lambda: app.chat.prompt.text.endswith("\nstill typing"))
        await until(app, pilot, lambda: "Too long for this model" in shown(app))
        assert app.chat.query("#weight.warning")
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.prompt.text.endswith("still typing") and asked(app))


# Stopping


@on_a_screen
async def test_esc_breaks_off_the_self_check_of_a_new_model(notes: Path, smollm: Path) -> None:
    def opened() -> Session:
        return Session(config.load({"model": str(smollm)}))

    with opened() as session:
        session.index([session.library.add_root(notes)], lambda _: None)
    async with running(opened) as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.doing == "checking")
        app.chat.prompt.put("what water")
        await pilot.press("enter", "escape")
        await until(app, pilot, lambda: "Stopped while the model was tried out" in shown(app))
        assert app.chat.prompt.text == "what water", "it comes back"
        await until(app, pilot, lambda: app.chat.state.doing == "checking")  # caching goes on


# What a question would take


@on_a_screen
async def test_what_a_question_would_take_is_shown_before_it_is_sent(
    filled: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated: list[str] = []
    estimate = Session.estimate

    def count(session: Session, question: str, *rest: Any) -> Estimate:
        estimated.append(question)
        return estimate(session, question, *rest)

    monkeypatch.setattr(Session, "estimate", count)
    async with running(filled, (80, 24)) as (app, pilot):
        await until(app, pilot, lambda: "5/5 cached" in shown(app))
        await pilot.press(*"what water?")
        await until(app, pilot, lambda: "About" in shown(app))
        assert " tokens" in shown(app)
        assert estimated == ["what water?"], "only when nobody types"
        app.chat.prompt.put("")
        await until(app, pilot, lambda: "About" not in shown(app))
        await pilot.press(*"/add x")
        await pilot.pause(0.6)
        assert estimated == ["what water?"]


def test_an_estimate_never_tries_a_new_model_out(filled: Open) -> None:
    with filled() as session:
        new = session.estimate("what water?")
        assert new.first_token_ms == 0.0
        assert "runtime" not in vars(session.engine), "the weights were not loaded"
        assert new.prompt_tokens < new.room_tokens
        assert session.engine.reuse_off == ""
        assert session.estimate("what water?").first_token_ms > 0
        assert session.estimate("word " * 5000).too_long


def test_the_words_of_an_estimate() -> None:
    stitched = "About 900 ms · 1,269 tokens reused, 240 computed · 1,509 of 8,192 tokens"
    assert weight(Estimate(1509, 240, 8192, 900.0)) == stitched
    assert weight(Estimate(40, 40, 8192, 0.0)) == "40 of 8,192 tokens", "silent where nothing was measured"
    assert weight(Estimate(40, 40, 8192, 1500.0)) == "About 1.5 s · 40 of 8,192 tokens"
    too_long = "Too long for this model: 9,000 of 8,192 tokens. Shorten the question."
    assert weight(Estimate(9000, 9000, 8192, 0.0, too_long=True)) == too_long


# What to do when it cannot be answered


@on_a_screen
async def test_an_error_says_what_can_be_done_here(opened: Open, notes: Path) -> None:
    async with running(opened, (80, 24)) as (app, pilot):

        async def told(question: str, *words: str) -> None:
            app.chat.prompt.put(question)
            await pilot.press("enter")
            await until(app, pilot, lambda: app.chat.query(Trouble) and not app.chat._turn)
            said = " ".join(str(app.chat.query(Trouble).last().render()).split())
            for word in words:
                assert word in said
            assert "quire " not in said
            assert "--" not in said
            assert app.chat.prompt.text == question, "it comes back"
            await app.chat.query(Trouble).remove()

        await told("what water?", "No folder was added yet.", "/add ~/notes", "/sample")
        app.chat.worker.add(notes)
        await known(app, pilot)
        await told("zebra", "Nothing in your documents matches", "Ctrl+L")
        await told("water" + " water" * 5000, "holds", "context_tokens (F2)", "fewer @files", "shorter question")
