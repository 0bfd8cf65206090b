"""What every screen looks like, against pictures that somebody has looked at.

Each screen stands in two sizes and two themes over one made-up world: no engine thread runs, what it would say is said
by the tests. A picture is the text of the screen and the style of every cell: it can be read in a diff, and is a tenth
of an SVG. A test that fails says where it drew them as SVG. After a change that is meant:
`QUIRE_UPDATE_PICTURES=1 pytest tests/functional/test_snapshots.py`, and look at what changed.
"""

import difflib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, tzinfo
from itertools import groupby
from pathlib import Path
from typing import Self

import pytest
from textual.pilot import Pilot
from textual.strip import Strip
from textual.widgets import Collapsible, DataTable, Input, Select, TextArea

from driving import on_a_screen, until
from quire import config, history, model_files, models
from quire.conversation import Kept, open_history
from quire.history import ROOT, Source
from quire.keeper import Edit
from quire.library import Hit
from quire.models import Model, Price
from quire.session import Estimate, Found, Session
from quire.transcript import Truth
from quire.tui import conversations
from quire.tui.app import QuireApp
from quire.tui.confirm import Confirm
from quire.tui.conversations import ConversationList
from quire.tui.library import LibraryScreen
from quire.tui.messages import Failed, Priced, Row, State, Told, Weighed
from quire.tui.models import ModelsScreen
from quire.tui.settings import SettingsScreen
from quire.tui.sources import Preview, Sources
from quire.tui.widgets import Answer, Question
from quire.tui.worker import Worker
from quire_engine.errors import QuireError
from quire_engine.types import Answered, Forecast, Timings, TokenCounts

Arrange = Callable[[QuireApp, Pilot[None]], Awaitable[None]]

SIZES = ((80, 24), (200, 60))
THEMES = ("textual-dark", config.HIGH_CONTRAST)
PICTURES = Path(__file__).parent / "pictures"
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
    screen.row("precision").edit()
    await pilot.pause()
    screen.row("precision").query_one(Select).value = "fp16"
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


def no_session() -> Session:
    raise AssertionError("no engine thread runs")


async def looks(app: QuireApp, pilot: Pilot[None]) -> AsyncIterator[str]:
    """Every size and theme in turn, with nothing that moves."""
    for field in app.screen.query("Input, TextArea"):
        assert isinstance(field, Input | TextArea)
        field.cursor_blink = False
    for size in SIZES:
        await pilot.resize_terminal(*size)
        for theme in THEMES:
            app.theme = theme
            await pilot.pause()
            await pilot.pause()
            yield f"{size[0]}x{size[1]} {theme}"


def fits(app: QuireApp) -> bool:
    """Whether the footer shows every key; help takes its room."""
    keys = app.screen.query("FooterKey")
    return bool(app.screen.query("HelpPanel")) or all(key.region.right <= app.size.width for key in keys)


def painted(app: QuireApp) -> list[Strip]:
    return app.screen._compositor.render_strips()


def text(strips: Sequence[Strip]) -> str:
    return "\n".join(strip.text.rstrip() for strip in strips)


def styles(strips: Sequence[Strip]) -> str:
    """A letter for every style, and for every line how many cells have which: 3-5: a2 b78."""
    letters: dict[str, str] = {}
    lines = []
    for strip in strips:
        cells = [(str(segment.style), segment.cell_length) for segment in strip]
        runs = [(style, sum(length for _, length in run)) for style, run in groupby(cells, key=lambda cell: cell[0])]
        lines.append(
            " ".join(f"{letters.setdefault(s, _letter(len(letters)))}{length}" for s, length in runs if length)
        )
    numbered = enumerate(lines, 1)
    same = [[number for number, _ in some] for _, some in groupby(numbered, key=lambda line: line[1])]
    named = [f"{_span(some)}: {lines[some[0] - 1]}" for some in same]
    return "\n".join([*(f"{letter} = {style}" for style, letter in letters.items()), *named])


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else chr(ord("A") + number - 26)


@pytest.mark.parametrize("arrange", SCREENS, ids=lambda arrange: arrange.__name__)
@on_a_screen
async def test_a_screen(arrange: Arrange, tmp_path: Path) -> None:
    config.save({"theme": THEMES[0], "animations": False})
    app = QuireApp(no_session)
    async with app.run_test(size=SIZES[0]) as pilot:
        await until(app, pilot, lambda: app.screen is app.chat and app.chat.prompt.has_focus)
        await arrange(app, pilot)
        app.theme_changed_signal.unsubscribe(app)  # a theme that is remembered refills the settings screen
        parts: list[str] = []
        async for look in looks(app, pilot):
            seen = text(painted(app))
            assert fits(app), f"The footer is cut off: {seen.splitlines()[-1]}"
            parts += [f"# {look}", *([] if seen in parts else [seen]), styles(painted(app))]
        changed = compare(PICTURES / f"{arrange.__name__}.txt", "\n\n".join(parts) + "\n")
        if changed:
            async for look in looks(app, pilot):
                app.save_screenshot(f"{look}.svg", str(tmp_path))
    assert not changed, f"It looks otherwise, as drawn in {tmp_path}:\n{changed}"


def compare(file: Path, picture: str) -> str:
    """What changed; nothing when the file is to be written."""
    if os.environ.get("QUIRE_UPDATE_PICTURES"):
        file.write_text(picture, encoding="utf-8")
    known = file.read_text(encoding="utf-8") if file.exists() else ""
    return "\n".join(difflib.unified_diff(known.splitlines(), picture.splitlines(), "known", "now", lineterm="", n=1))


def test_there_is_no_picture_of_a_screen_that_is_gone() -> None:
    assert {file.stem for file in PICTURES.iterdir()} == {arrange.__name__ for arrange in SCREENS}
