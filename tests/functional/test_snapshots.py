"""What every screen looks like, against pictures that somebody has looked at.

Each screen stands in two sizes, each with a theme of its own, over one made-up world: no engine thread runs, what it
would say is said by the tests. After a change that is meant: `pytest tests/functional/test_snapshots.py
--snapshot-update`, and look at the new pictures.
"""

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest
from textual.pilot import Pilot
from textual.widgets import Collapsible, DataTable, Input, Select, TextArea

from driving import until
from quire import config, history, model_files, models
from quire.conversation import Kept, open_history
from quire.history import ROOT, Source
from quire.library import Hit
from quire.models import Model, Price
from quire.session import Estimate, Found, Session
from quire.transcript import Truth
from quire.tui import conversations
from quire.tui.app import QuireApp
from quire.tui.confirm import Confirm
from quire.tui.conversations import ConversationList
from quire.tui.library import LibraryScreen
from quire.tui.messages import Edit, Failed, Priced, Row, State, Told, Weighed
from quire.tui.models import ModelsScreen
from quire.tui.settings import SettingsScreen
from quire.tui.widgets import Answer, Preview, Question, Sources
from quire.tui.worker import Worker
from quire_engine.errors import QuireError
from quire_engine.types import Answered, Forecast, Timings, TokenCounts

Compare = Callable[..., bool]
Arrange = Callable[[QuireApp, Pilot[None]], Awaitable[None]]

LOOKS = [
    pytest.param((80, 24), "textual-dark", id="80x24-dark"),
    pytest.param((200, 60), "high-contrast", id="200x60-high-contrast"),
]
GB, MB = 10**9, 10**6
QUESTION = "How long does green tea steep, and when does the boiler need service?"
ANSWER = """\
Green tea steeps for **two to three minutes** at 75 °C; longer makes it bitter.

| tea | minutes | °C |
|---|---|---|
| green | 2-3 | 75 |
| black | 3-5 | 95 |

The boiler:

1. needs service every *March*,
2. and `0.8 bar` in the system before that.
"""
PASSAGES = (
    ("tea.md", "Tea > Brewing", "Green tea: 75 °C, two to three minutes.\nBlack tea: 95 °C, three to five minutes."),
    ("house/boiler.md", "Boiler > Service", "The boiler is serviced in March. Fill it to 0.8 bar before."),
    ("house/日本の家.md", "お茶", "緑茶は七十五度で二分。"),
)
FORECAST = Forecast(1269, 0, 0.16, "", 900.0, 14_200.0)
ANSWERED = Answered(TokenCounts(1269, 1061, 208, 32, 71), Timings(0, 41, 118, 604, 96, 872, 3340), 0.16, "end")


class Clock(datetime):
    """Stands still where it was put."""

    at = datetime(2026, 11, 20, 14, 2, tzinfo=UTC)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        at = cls.at if tz else cls.at.replace(tzinfo=None)
        return cls(at.year, at.month, at.day, at.hour, at.minute, tzinfo=at.tzinfo)


def documents() -> Path:
    """The folder in which the application was opened."""
    return Path.home() / "documents"


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of this machine: not its clock, its memory, its models or its terminal, and no engine thread."""
    for name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setenv("QUIRE_CONFIG_DIR", str(Path.home() / ".config" / "quire"))
    documents().mkdir()
    monkeypatch.chdir(documents())
    monkeypatch.setattr(models, "memory_bytes", lambda: 16 * GB)
    monkeypatch.setattr(models, "listing", lambda _: listed_models())
    monkeypatch.setattr(history, "datetime", Clock)
    monkeypatch.setattr(conversations, "datetime", Clock)
    monkeypatch.setattr(Clock, "at", Clock.at)
    monkeypatch.setattr(Worker, "start", lambda _: None)
    yield
    monkeypatch.undo()
    time.tzset()


def listed_models() -> list[Model]:
    folder, fetched = Path("/models"), model_files.models_dir()
    return [
        Model("bundled", "SmolLM2 135M Instruct", folder / "small.gguf", 98 * MB, True, in_use=True, bundled=True),
        Model("llama-3.2-1b", "Llama 3.2 1B Instruct", fetched / "llama.gguf", 808 * MB, True, licence="Llama 3.2"),
        Model("old", "Old", folder / "old.gguf", 61 * MB, True, problem="The file is damaged.", readable=False),
        Model("gemma", "Gemma", folder / "gemma.gguf", 2 * GB, True, problem="Gemma models are not stitched."),
        *(
            Model(m.name, m.title, m.path, m.size_bytes, False, licence=m.licence, fits=m.size_gb < 9,
                  recommended=m == models.recommended())
            for m in models.known()[1:]
        ),
    ]  # fmt: skip


def state() -> State:
    """A library that is being cached."""
    notes, papers = documents() / "notes", documents() / "papers"
    rows = (
        Row(notes / "house" / "boiler.md", "C", 4, tokens=1510),
        Row(notes / "house" / "日本の家.md", "C", 2, tokens=640, pinned=True),
        Row(
            notes / "house" / "a very long name of a file that tells what is in it, as people do.md", "C", 1, 0, "", 90
        ),
        Row(notes / "scan.pdf", "S", reason="no text in it: 12 scanned pages. Run an OCR program over it"),
        Row(notes / "tea.md", "Q", 12, 5, tokens=4031),
        Row(papers / "kv.pdf", "Q", 41, 41, tokens=19_204),
    )
    edits = (
        Edit(Clock.at.timestamp(), notes / "tea.md", 3, 12, 1214, 4100.0, frozenset("ab")),
        Edit(Clock.at.timestamp() - 7500, notes / "house" / "boiler.md", 0, 4, 0, 0.0, frozenset()),
    )
    return State(
        doing="caching", model="SmolLM2 135M Instruct", bundled=True, roots=(notes, papers), rows=rows, done=14,
        total=60, tokens_left=21_300, left_ms=131_000.0, disk_bytes=int(1.2 * GB), limit_bytes=20 * GB,
        written_bytes=34_100_000, total_written_bytes=int(5.1 * GB), edits=edits, pins=(rows[1].path,),
    )  # fmt: skip


def found() -> Found:
    hits = (Hit("", text, 0, documents() / "notes" / name, 12, 30, top, 1.0) for name, top, text in PASSAGES)
    return Found(tuple(hits), 13.0)


def hold_conversations() -> int:
    """Three conversations of three days; the last one, which is returned, has branches."""
    sources = [Source(h.path, h.start_line, h.end_line, h.heading, h.text, 1.0) for h in found().sources]
    truth = Truth(found().search_ms, FORECAST, ANSWERED.tokens, ANSWERED.timings, ANSWERED.ratio)
    with open_history() as past:

        def held(at: datetime, *turns: tuple[int, str, str]) -> int:
            """turns: which of them each follows, 0 for none."""
            Clock.at = at
            conversation, ids = past.begin(), [ROOT]
            for after, question, answer in turns:
                ids.append(past.add_turn(conversation, ids[after], question, "m"))
                past.finish_turn(ids[-1], answer, "end", sources, truth)
            return conversation

        held(datetime(2025, 3, 2, 9, 0, tzinfo=UTC), (0, "Wer hat den Leuchtturm gebaut?", "Ida Marlow."))
        held(datetime(2026, 11, 19, 22, 40, tzinfo=UTC), (0, QUESTION, ANSWER), (1, "And black tea?", "Longer."))
        return held(
            datetime(2026, 11, 20, 14, 2, tzinfo=UTC),
            (0, "お茶は何分ですか。", "二分。"),
            (1, "How hot?", "95 °C."),
            (1, "How hot for green tea?", "**75 °C**, no more."),
            (1, "How hot for white tea?", "The documents say nothing of white tea."),
            (3, "And how long?", "Two to three minutes."),
        )


# The screens


async def say(app: QuireApp, pilot: Pilot[None], news: State) -> None:
    """As the engine thread says it."""
    app.chat.worker._tell(**vars(news))
    await until(app, pilot, lambda: app.chat.state == news)


async def welcome(app: QuireApp, pilot: Pilot[None]) -> None:
    await say(app, pilot, State("idle", "SmolLM2 135M Instruct", bundled=True))


async def welcome_back(app: QuireApp, pilot: Pilot[None]) -> None:
    await say(app, pilot, state())


async def send(app: QuireApp, pilot: Pilot[None]) -> int:
    """Asks the question; returns its number."""
    await say(app, pilot, state())
    app.chat.prompt.put(QUESTION)
    await pilot.press("enter")
    await until(app, pilot, lambda: app.chat._turn)
    turn = app.chat._turn
    assert turn
    for event in (Kept(1, 1, (1,)), found(), FORECAST):
        app.chat.post_message(Told(turn.id, event))
    return turn.id


async def streaming(app: QuireApp, pilot: Pilot[None]) -> None:
    await send(app, pilot)
    turn = app.chat._turn
    assert turn
    turn.pieces.put(ANSWER[: ANSWER.index("needs service")])
    await until(app, pilot, lambda: app.chat.query(Answer).last().said)


async def answer(app: QuireApp, pilot: Pilot[None]) -> None:
    await streaming(app, pilot)
    turn = app.chat._turn
    assert turn
    turn.pieces.put(ANSWER[ANSWER.index("needs service") :])
    app.chat.post_message(Told(turn.id, ANSWERED))
    await until(app, pilot, lambda: app.chat.query(Sources) and not app.chat._turn)


async def sources(app: QuireApp, pilot: Pilot[None]) -> None:
    await answer(app, pilot)
    app.chat.query_one(Collapsible).collapsed = False
    app.chat.query_one(Sources).focus()
    await pilot.pause()


async def preview(app: QuireApp, pilot: Pilot[None]) -> None:
    await sources(app, pilot)
    await pilot.press("enter")
    await until(app, pilot, lambda: isinstance(app.screen, Preview))


async def error(app: QuireApp, pilot: Pilot[None]) -> None:
    number = await send(app, pilot)
    trouble = QuireError(
        "The model could not go on: llama.cpp ran out of memory.",
        "Close other programs, or choose a smaller context_tokens in the settings (F2). Enter asks again.",
        "llama_decode returned 1 at token 1269",
    )
    app.chat.post_message(Failed(number, trouble))
    await until(app, pilot, lambda: app.chat.prompt.text == QUESTION)


async def offers(app: QuireApp, pilot: Pilot[None]) -> None:
    await say(app, pilot, state())
    await pilot.press(*"When does @o")
    text = app.chat.prompt.text
    app.chat.post_message(Weighed(text, Estimate(1509, 240, 8192, 900.0)))
    await until(app, pilot, lambda: app.chat.prompt.offers.display and app.chat.query_one("#weight").display)


async def branches(app: QuireApp, pilot: Pilot[None]) -> None:
    conversation = hold_conversations()
    await say(app, pilot, state())
    await app.chat.open(conversation)
    asked = app.chat.query(Question)
    asked[1].focus()
    await until(app, pilot, lambda: asked[1].has_focus)


async def other_branch(app: QuireApp, pilot: Pilot[None]) -> None:
    """A question of before is being edited."""
    await branches(app, pilot)
    await pilot.press("e")
    await until(app, pilot, lambda: app.chat.prompt.text == "How hot for green tea?")


async def library(app: QuireApp, pilot: Pilot[None]) -> None:
    await say(app, pilot, state())
    await pilot.press("ctrl+l")
    await until(app, pilot, lambda: isinstance(app.screen, LibraryScreen) and app.screen._lines)
    table = app.screen.query_one(DataTable)
    table.move_cursor(row=5)  # the one that was skipped
    await pilot.pause()


async def confirm(app: QuireApp, pilot: Pilot[None]) -> None:
    await library(app, pilot)
    app.screen.query_one(DataTable).move_cursor(row=0)
    await pilot.press("x")
    await until(app, pilot, lambda: isinstance(app.focused, Confirm))


async def listed(app: QuireApp, pilot: Pilot[None]) -> None:
    hold_conversations()
    await say(app, pilot, state())
    await pilot.press("ctrl+o")
    await until(
        app, pilot, lambda: app.screen.query(ConversationList) and app.screen.query_one(ConversationList).entries
    )
    await pilot.press("down", "down", "d")


async def settings(app: QuireApp, pilot: Pilot[None]) -> None:
    """One wrong value, and one with a price."""
    await say(app, pilot, state())
    await pilot.press("f2")
    await until(app, pilot, lambda: isinstance(app.screen, SettingsScreen) and app.focused)
    screen = app.screen
    assert isinstance(screen, SettingsScreen)
    screen.row("chunk_tokens").edit()
    screen.row("chunk_tokens").query_one(Input).value = "many"
    await pilot.press("enter")
    screen.row("k_bits").edit()
    await pilot.pause()
    screen.row("k_bits").query_one(Select).value = "4"
    await until(app, pilot, lambda: screen._asked)
    assert screen._asked
    app.post_message(Priced(screen._asked[0], Price(int(1.2 * GB), 23_000, 720_000.0)))
    await until(app, pilot, lambda: isinstance(app.focused, Confirm))


async def model_list(app: QuireApp, pilot: Pilot[None]) -> None:
    await say(app, pilot, state())
    await pilot.press("f3")
    await until(app, pilot, lambda: isinstance(app.screen, ModelsScreen) and app.screen._models)


async def help_panel(app: QuireApp, pilot: Pilot[None]) -> None:
    await answer(app, pilot)
    await pilot.press("f1")
    await until(app, pilot, lambda: app.screen.query("HelpPanel Markdown"))


SCREENS: Sequence[Arrange] = (
    welcome, welcome_back, streaming, answer, sources, preview, error, offers, branches, other_branch, library, confirm,
    listed, settings, model_list, help_panel,
)  # fmt: skip


def arranged(arrange: Arrange) -> Callable[[Pilot[None]], Awaitable[None]]:
    """The screen, with nothing that moves."""

    async def run(pilot: Pilot[None]) -> None:
        app = pilot.app
        assert isinstance(app, QuireApp)
        await until(app, pilot, lambda: app.screen is app.chat and app.chat.prompt.has_focus)
        await arrange(app, pilot)
        for field in app.screen.query("Input, TextArea"):
            assert isinstance(field, Input | TextArea)
            field.cursor_blink = False

    return run


def no_session() -> Session:
    raise AssertionError("no engine thread runs")


@pytest.mark.parametrize(("size", "theme"), LOOKS)
@pytest.mark.parametrize("arrange", SCREENS, ids=lambda arrange: arrange.__name__)
def test_a_screen(arrange: Arrange, size: tuple[int, int], theme: str, snap_compare: Compare) -> None:
    config.save({"theme": theme, "animations": False})
    assert snap_compare(QuireApp(no_session), terminal_size=size, run_before=arranged(arrange))
