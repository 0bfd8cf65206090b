"""The settings and models screens: real sessions on generated models, fetching from a web server on this machine."""

import functools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Select, Static

import driving
from driving import on_a_screen, shown
from file_server import FileServer, serving
from quire import config, model_files, models, paths
from quire.config import Settings
from quire.models import Price
from quire.session import Session
from quire.tui.app import QuireApp
from quire.tui.confirm import Confirm
from quire.tui.messages import Priced
from quire.tui.models import ModelsScreen
from quire.tui.settings import SettingRow, SettingsScreen
from quire_engine.engine import Engine
from tiny_gguf import write_tiny_gguf

PATIENCE_S = 60.0
until = functools.partial(driving.until, patience_s=PATIENCE_S)
NOTES = "".join(f"# Heading {i}\n\nThe barrel number {i} holds {i} litres of rain.\n\n" for i in range(20))


@pytest.fixture(autouse=True)
def _two_models() -> None:
    """The model in use, and another one that was fetched."""
    write_tiny_gguf(model_files.models_dir() / "first.gguf", metadata={"general.name": "First"})
    write_tiny_gguf(model_files.models_dir() / "second.gguf", "qwen2", metadata={"general.name": "Second"})
    config.save({"model": model_files.models_dir() / "first.gguf"})


@asynccontextmanager
async def running(
    size: tuple[int, int] = (80, 24), add: tuple[Path, ...] = (), **overrides: object
) -> AsyncIterator[tuple[QuireApp, Pilot[None]]]:
    app = QuireApp(lambda: Session(config.load(overrides)), add, overrides)
    async with app.run_test(size=size) as pilot:
        yield app, pilot
    assert not app.chat.worker.alive
    assert not app.puller.running


async def settings(app: QuireApp, pilot: Pilot[None]) -> SettingsScreen:
    await pilot.press("f2")
    await until(app, pilot, lambda: isinstance(app.screen, SettingsScreen) and app.focused)
    assert isinstance(app.screen, SettingsScreen)
    return app.screen


async def models_screen(app: QuireApp, pilot: Pilot[None]) -> ModelsScreen:
    await pilot.press("f3")
    await until(app, pilot, lambda: app.screen.query(DataTable) and app.screen.query_one(DataTable).row_count)
    assert isinstance(app.screen, ModelsScreen)
    return app.screen


async def type_into(app: QuireApp, pilot: Pilot[None], row: SettingRow, text: str) -> None:
    row.edit()
    await pilot.pause()
    row.query_one(Input).value = ""
    await pilot.press(*text, "enter")
    await pilot.pause()


def contains(text: Callable[[], str], words: str) -> bool:
    return words in text()


def holds(row: SettingRow, value: object) -> bool:
    """Whether the row shows the value and it is in force."""
    return row.query_one(Select).value == str(value) == str(getattr(row._preferences.settings, row.setting.name))


def said(row: SettingRow) -> str:
    return str(row.query_one(".said", Static).render())


def move_to(app: QuireApp, name: str) -> None:
    """Puts the cursor on a model."""
    table = app.screen.query_one(DataTable)
    names = [str(table.get_row_at(row)[1]) for row in range(table.row_count)]
    table.move_cursor(row=names.index(name))


def saved() -> str:
    return config.config_file().read_text(encoding="utf-8")


# Settings


@on_a_screen
async def test_every_setting_is_there_with_its_value_meaning_and_origin() -> None:
    async with running((200, 80), dial="fast") as (app, pilot):
        screen = await settings(app, pilot)
        text = shown(app)
        for setting in config.explained():
            assert setting.name in text
            assert setting.meaning[:40] in text
            assert screen.row(setting.name).query(".origin")
        assert "the command line decides" in text
        assert screen.row("dial").query_one(Select).disabled
        await pilot.press("escape")
        assert app.screen is app.chat
        assert app.focused is app.chat.prompt


@on_a_screen
async def test_the_environment_wins_and_says_so() -> None:
    os.environ["QUIRE_MAX_TOKENS"] = "99"
    try:
        async with running((100, 60)) as (app, pilot):
            row = (await settings(app, pilot)).row("max_tokens")
            assert row.query_one(Input).disabled
            assert row.query_one(Input).value == "99"
            assert "QUIRE_MAX_TOKENS in the environment decides" in shown(app)
    finally:
        del os.environ["QUIRE_MAX_TOKENS"]


@on_a_screen
async def test_a_value_is_changed_where_it_stands_and_counts_at_once() -> None:
    async with running() as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.model == "First")
        screen = await settings(app, pilot)
        await type_into(app, pilot, screen.row("max_tokens"), "33")
        screen.row("dial").query_one(Select).value = "exact"
        await until(app, pilot, lambda: "max_tokens = 33" in saved() and 'dial = "exact"' in saved())
        assert app.preferences.settings.max_tokens == 33
        assert app.preferences.origins["dial"] == "file"
        await type_into(app, pilot, screen.row("max_tokens"), "256")
        await until(app, pilot, lambda: "max_tokens" not in saved())
        assert app.preferences.origins["max_tokens"] == "default"


@on_a_screen
async def test_a_wrong_value_is_refused_in_place_with_what_would_be_right() -> None:
    async with running() as (app, pilot):
        screen = await settings(app, pilot)
        before, row = saved(), screen.row("temperature")
        await type_into(app, pilot, row, "hot")
        await until(app, pilot, lambda: "temperature is a number from 0 to 2" in said(row))
        assert row.query_one(Input).value == "hot"
        assert saved() == before
        await type_into(app, pilot, row, "0.5")
        await until(app, pilot, lambda: "temperature = 0.5" in saved())
        assert said(row) == ""


@on_a_screen
async def test_a_refusal_while_a_price_is_looked_up_takes_the_question_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.model == "First")
        asked: list[Settings] = []
        monkeypatch.setattr(app.chat.worker, "price", asked.append)  # as one that takes long
        screen = await settings(app, pilot)
        precision, chunk_tokens = screen.row("precision"), screen.row("chunk_tokens")
        precision.query_one(Select).value = "tiny"
        await until(app, pilot, lambda: "Looking what that costs" in said(precision))
        await type_into(app, pilot, chunk_tokens, "many")
        await until(app, pilot, lambda: "a whole number from 32 to 8,192" in said(chunk_tokens))
        assert holds(precision, "default")
        assert said(precision) == ""
        app.post_message(Priced(asked[0], Price(10**9, 1000, 60_000.0)))
        await pilot.pause()
        assert not screen.query(Confirm)
        precision.query_one(Select).value = "compact"
        precision.query_one(Select).value = "tiny"
        await until(app, pilot, lambda: len(asked) == 3)
        app.post_message(Priced(asked[1], Price(10**9, 1000, 60_000.0)))
        app.post_message(Priced(asked[2], Price(2 * 10**9, 1000, 60_000.0)))
        await until(app, pilot, lambda: screen.query(Confirm))
        assert len(screen.query(Confirm)) == 1
        assert "2.0 GB" in str(screen.query_one(Confirm).render()), "the last one counts"


@on_a_screen
async def test_what_makes_caches_useless_says_its_price_and_asks(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text(NOTES)
    async with running(add=(tmp_path / "notes.md",)) as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.total and app.chat.state.done == app.chat.state.total)
        app.chat.prompt.put("half a question")
        screen = await settings(app, pilot)
        row = screen.row("precision")
        for answer, precision in (("escape", "default"), ("enter", "fp16")):
            row.edit()
            row.query_one(Select).value = "fp16"
            await until(app, pilot, lambda: row.query(Confirm) and "Invalidates" in shown(app))
            assert "kept for the way back; caching again takes" in " ".join(shown(app).split())
            await pilot.press(answer)
            await until(app, pilot, lambda: not row.query(Confirm))
            await until(app, pilot, functools.partial(holds, row, precision))
        assert 'precision = "fp16"' in saved()
        await pilot.press("f2")
        assert app.chat.prompt.text == "half a question"
        await until(app, pilot, lambda: app.chat.state.total and app.chat.state.done == app.chat.state.total)


@on_a_screen
async def test_changes_that_overtake_each_other_are_all_kept() -> None:
    async with running() as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.model == "First")
        screen = await settings(app, pilot)
        screen.row("threads").query_one(Input).value = "1"
        screen.row("threads").edit()
        await pilot.press("enter")  # opens the model again
        screen.row("dial").query_one(Select).value = "fast"
        await until(app, pilot, lambda: "threads = 1" in saved() and 'dial = "fast"' in saved())
        settled = app.preferences.settings
        assert (settled.threads, settled.dial) == (1, "fast")
    assert config.load() == settled


@on_a_screen
async def test_a_theme_that_cannot_be_remembered_is_not_kept() -> None:
    async with running() as (app, pilot):
        file = paths.config_dir() / "config.toml"
        file.unlink()
        file.mkdir()  # so that root cannot write it either
        app.theme = "nord"
        await until(app, pilot, lambda: any("cannot be" in said.message for said in app._notifications))
        assert app.theme == "textual-dark"


@on_a_screen
async def test_a_theme_is_remembered_wherever_it_was_chosen() -> None:
    async with running() as (app, pilot):
        assert app.theme == "textual-dark"
        app.theme = "nord"  # as the palette does
        await until(app, pilot, lambda: 'theme = "nord"' in saved())
        screen = await settings(app, pilot)
        assert screen.row("theme").query_one(Select).value == "nord"
        for theme in ("ansi-light", "high-contrast"):
            screen.row("theme").query_one(Select).value = theme
            await until(app, pilot, functools.partial(contains, saved, f'theme = "{theme}"'))
            assert app.theme == theme
        screen.row("animations").query_one(Select).value = "off"
        await until(app, pilot, lambda: "animations = false" in saved())
        assert app.animation_level == "none"
    async with running() as (app, _):
        assert (app.theme, app.animation_level) == ("high-contrast", "none")


# Models


@on_a_screen
async def test_the_welcome_names_the_recommended_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "memory_bytes", lambda: 8_000_000_000)
    config.unset("model")
    async with running((80, 30)) as (app, pilot):
        await until(app, pilot, lambda: "model that came along is small" in shown(app))
        text = " ".join(shown(app).split())
        assert "Qwen3 4B Instruct 2507 fits this machine (2.5 GB): F4 fetches it, F3 shows others." in text


@on_a_screen
async def test_the_models_are_listed_and_the_recommended_one_is_named() -> None:
    async with running() as (app, pilot):
        await models_screen(app, pilot)
        await until(
            app, pilot, lambda: "came with Quire; small" in shown(app)
        )  # columns widen a moment after the rows come
        text = shown(app)
        for words in ("bundled", "first", "second", "qwen3-4b", "* in use"):
            assert words in text
        if best := models.recommended():
            assert "recommended for this machine" in text
            assert best.title in text, "the cursor stands on it"
        await pilot.press("f3")
        assert app.screen is app.chat


@on_a_screen
async def test_switching_says_its_price_and_keeps_what_was_typed(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text(NOTES)
    async with running((100, 30), (tmp_path / "notes.md",)) as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.total and app.chat.state.done == app.chat.state.total)
        app.chat.prompt.put("half a question")
        await models_screen(app, pilot)
        move_to(app, "second")
        await pilot.press("enter")
        await until(app, pilot, lambda: app.screen.query(Confirm))
        assert "Invalidates" in shown(app)
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.state.model == "Second")
        await until(app, pilot, lambda: "second.gguf" in saved())
        await pilot.press("escape")
        await until(app, pilot, lambda: "Second" in shown(app))
        assert app.chat.prompt.text == "half a question"
        await until(app, pilot, lambda: app.chat.state.total and app.chat.state.done == app.chat.state.total)
    assert config.load().model == model_files.models_dir() / "second.gguf"


@on_a_screen
async def test_a_switch_that_fails_keeps_the_model_and_says_why() -> None:
    (model_files.models_dir() / "broken.gguf").write_bytes(b"GGUF, but no more")
    async with running() as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.model == "First")
        before = saved()
        await models_screen(app, pilot)
        move_to(app, "broken")
        await pilot.press("enter")
        await until(app, pilot, lambda: "damaged" in shown(app) or "GGUF version" in shown(app))
        assert app.chat.state.model == "First"
        assert saved() == before


@on_a_screen
async def test_a_model_that_vanished_does_not_lock_anybody_out() -> None:
    (model_files.models_dir() / "first.gguf").unlink()
    async with running() as (app, pilot):
        await until(app, pilot, lambda: "There is no model file" in shown(app))
        await models_screen(app, pilot)
        move_to(app, "second")
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.state.model == "Second")
        await until(app, pilot, lambda: "second.gguf" in saved())


@on_a_screen
async def test_one_key_fetches_the_recommended_model_which_can_be_stopped_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "memory_bytes", lambda: 8_000_000_000)
    best = models.recommended()
    assert best
    data = write_tiny_gguf(tmp_path / "x.gguf", "qwen3").read_bytes()
    with serving(FileServer({best.path.name: data})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        async with running() as (app, pilot):
            await until(app, pilot, lambda: app.chat.state.model == "First")
            server.gate.clear()
            for key in ("escape", "enter"):
                await pilot.press("f4")
                await until(app, pilot, lambda: app.screen.query(Confirm))
                text = " ".join(shown(app).split())
                assert f"Fetch {best.title}? It takes {best.size_gb} GB; " in text
                assert " free." in text
                assert not app.puller.running
                await pilot.press(key)
                await until(app, pilot, lambda: not app.screen.query(Confirm))
            await until(app, pilot, lambda: f"Fetching {best.name}" in shown(app))
            await pilot.press("c")
            server.gate.set()
            await until(app, pilot, lambda: "which is kept" in shown(app))
            await until(app, pilot, lambda: not app.puller.running)
            await pilot.press("f")
            await until(app, pilot, lambda: app.screen.query(Confirm))
            await pilot.press("y")
            await until(app, pilot, lambda: f"{best.name} is here" in shown(app))
            assert best.path.read_bytes() == data
            await until(app, pilot, lambda: any(m.name == best.name and m.here for m in app.screen._models))  # type: ignore[attr-defined]
            move_to(app, best.name)
            await pilot.press("enter")
            await until(app, pilot, lambda: app.screen.query(Confirm))
            await pilot.press("y")
            await until(app, pilot, lambda: best.path.name in saved())


@on_a_screen
async def test_a_model_from_an_address_and_what_goes_wrong_with_it(tmp_path: Path) -> None:
    data = write_tiny_gguf(tmp_path / "x.gguf").read_bytes()
    with serving(FileServer({"third.gguf": data})) as server:
        async with running((100, 30)) as (app, pilot):
            await models_screen(app, pilot)
            for source, words in (
                (f"{server.address}/fourth.gguf", "There is no file at"),
                ("nonsense", "There is no model nonsense"),
                (f"{server.address}/third.gguf", "third.gguf is here"),
            ):
                await pilot.press("a")
                await until(app, pilot, lambda: isinstance(app.focused, Input))
                app.screen.query_one("#other", Input).value = source
                await pilot.press("enter")
                await until(app, pilot, functools.partial(contains, functools.partial(shown, app), words))
                await until(app, pilot, lambda: not app.puller.running)


@on_a_screen
async def test_deleting_asks_first() -> None:
    file = model_files.models_dir() / "second.gguf"
    async with running() as (app, pilot):
        await models_screen(app, pilot)
        for answer in ("n", "y"):
            assert file.exists()
            move_to(app, "second")
            await pilot.press("d")
            await until(app, pilot, lambda: "Delete Second?" in shown(app))
            await pilot.press(answer)
            await until(app, pilot, lambda: not app.screen.query(Confirm))
        await until(app, pilot, lambda: not file.exists())
        await until(app, pilot, lambda: "Second is gone" in shown(app))
        move_to(app, "first")
        await pilot.press("d")
        await until(app, pilot, lambda: app.screen.query(Confirm))
        await pilot.press("y")
        await until(app, pilot, lambda: "is in use" in shown(app))


# What switching costs


def read_and_cached(**given: object) -> Session:
    """The notes as these settings want them."""
    session = Session(config.load(given))
    session.index(session.library.roots(), lambda _: None)
    session.cache(lambda _: None, lambda: False)
    return session


@pytest.mark.parametrize("there", [{"chunk_tokens": 32}, {"model": "second", "chunk_tokens": 32}, {"model": "second"}])
def test_the_way_back_to_what_is_still_cached_is_cheap(
    tmp_path: Path, there: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.md").write_text(NOTES)
    first = {"model": str(model_files.models_dir() / "first.gguf"), "chunk_tokens": 64}
    second = first | there
    if "model" in there:
        second["model"] = str(model_files.models_dir() / "second.gguf")
    with Session(config.load(first)) as session:
        session.library.add_root(tmp_path / "notes.md")
    with read_and_cached(**first) as session:
        total = sum(session.library.tokens().values())
        away = models.price(session, config.load(second))
        assert away.tokens == pytest.approx(total, rel=0.05)
        assert models.price(session, config.load(first)).tokens == 0
    with read_and_cached(**second) as session:
        back = models.price(session, config.load(first))
        assert back.tokens < 0.1 * total
        tokenized: list[str] = []
        monkeypatch.setattr(Engine, "address", lambda _, text: tokenized.append(text))
        assert models.price(session, config.load(first)).tokens == back.tokens
        assert tokenized == [], "their addresses are known"
