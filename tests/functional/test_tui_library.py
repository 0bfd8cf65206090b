"""Folders in the application: what changes in them while it is open, and the library screen.

With a real session, index, store and watcher; the model is a tiny one of random weights, whose KV is as real.
"""

import errno
import functools
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable
from watchdog.observers import Observer

from driving import on_a_screen
from quire import config, watcher
from quire.session import Session
from quire.tui.app import QuireApp
from quire.tui.library import LibraryScreen, folded_at_first, lines
from quire.tui.messages import Row
from quire.tui.widgets import Note

PATIENCE_S = 60.0  # a busy machine is ten times slower
SMALL = (80, 24)
LARGE = (200, 60)

Open = Callable[..., QuireApp]


class Running:
    """The application with a folder, and what can be seen of it."""

    def __init__(self, app: QuireApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def text(self) -> str:
        return "\n".join(strip.text.rstrip() for strip in self.app.screen._compositor.render_strips())

    @property
    def notes(self) -> list[str]:
        return [str(note.render()) for note in self.app.chat.query(Note)]

    def said(self, text: str) -> bool:
        return any(text in note for note in self.notes)

    async def until(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, (self.text, self.notes, self.app.chat.state)
            await self.pilot.pause(0.02)

    async def settled(self) -> None:
        def settled() -> bool:
            state = self.app.chat.state
            return state.total > 0 and state.doing == "idle" and state.done == state.total

        await self.until(settled)

    async def select(self, name: str) -> None:
        """The cursor on the line of this document or folder."""
        screen = self.app.screen
        assert isinstance(screen, LibraryScreen)
        row = next(i for i, line in enumerate(screen._lines) if line.path.name == name)
        screen.query_one(DataTable).move_cursor(row=row)
        await self.pilot.pause()

    def letters(self, name: str) -> list[str]:
        """What stands before a name: C, Q or S, and perhaps P."""
        line = next(line for line in self.text.splitlines() if f" {name}" in line)
        return line[: line.index(name)].replace("▾", "").replace("▸", "").split()


@asynccontextmanager
async def running(app: QuireApp, size: tuple[int, int] = SMALL) -> AsyncIterator[Running]:
    async with app.run_test(size=size) as pilot:
        yield Running(app, pilot)
    assert not app.chat.worker.alive


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "work").mkdir(parents=True)
    for name in ("report.md", "tea.md", "work/plan.md"):
        (folder / name).write_text(document(name))
    (folder / "scan.pdf").write_text("x")
    return folder


def document(name: str, sections: int = 6) -> str:
    return "\n\n".join(f"# {name} {i}\n\n" + f"What {name} says of {i}. " * 8 for i in range(sections))


@pytest.fixture
def open_app(tiny: Callable[[str], Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """The application over the folder."""
    monkeypatch.setattr(watcher, "Watcher", functools.partial(watcher.Watcher, pace=watcher.Pace(0.2, 0.5)))

    def open_it(**settings: object) -> QuireApp:
        given = {"model": str(tiny("llama")), "chunk_tokens": 64, "threads": 1, **settings}
        return QuireApp(lambda: Session(config.load(given)), (root,))

    return open_it


# Watching


@on_a_screen
async def test_an_edit_is_noticed_told_and_cached(open_app: Open, root: Path) -> None:
    async with running(open_app()) as here:
        await here.settled()
        before = here.app.chat.state
        text = (root / "report.md").read_text()
        (root / "report.md").write_text(text.replace("report.md says of 3", "the boiler says of 3"))
        await here.until(lambda: here.said("report.md changed: "))
        await here.settled()
        after = here.app.chat.state
        [edit] = after.edits
        assert 0 < edit.passages < edit.total
        assert edit.left == frozenset()
        assert edit.ms > 0
        note = f"report.md changed: {edit.passages} of {edit.total} passages, {edit.tokens:,} tokens read again"
        assert here.said(note), here.notes
        assert after.written_bytes > before.written_bytes
        await here.pilot.press("ctrl+l")
        await here.until(lambda: f"report.md: {edit.passages} of {edit.total} passages again" in here.text)


@on_a_screen
async def test_new_moved_and_deleted_files(open_app: Open, root: Path) -> None:
    async with running(open_app()) as here:
        await here.settled()
        (root / "work" / "new").mkdir()
        (root / "work" / "new" / "idea.md").write_text("A short idea.")
        await here.until(lambda: here.said("idea.md added: 1 passage, "))
        (root / "work").rename(root / "job")
        await here.until(lambda: here.said("plan.md moved: nothing is read again"))
        (root / "tea.md").unlink()
        await here.until(lambda: here.said("tea.md removed"))
        (root / "report.md").write_bytes(b"\0\0")
        await here.until(lambda: here.said("report.md cannot be read any more: a binary file."))
        await here.settled()
        read = {row.path.relative_to(root) for row in here.app.chat.state.rows if row.letter != "S"}
        assert read == {Path("job/plan.md"), Path("job/new/idea.md")}
        shutil.rmtree(root)
        await here.until(lambda: here.said("is gone; its documents are kept. Restore it, or remove it from Quire."))


@on_a_screen
async def test_a_folder_that_cannot_be_watched_is_looked_through(
    open_app: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(Observer, "schedule", full)
    async with running(open_app(), LARGE) as here:
        await here.until(lambda: here.said("cannot be watched: inotify watch limit reached. It is looked through"))
        await here.settled()
        (root / "tea.md").write_text("Green tea.")
        await here.until(lambda: here.said("tea.md changed: "))
        assert sum("cannot be watched" in note for note in here.notes) == 1


@on_a_screen
async def test_a_folder_that_goes_away_and_comes_back_keeps_its_documents(open_app: Open, root: Path) -> None:
    async with running(open_app()) as here:
        await here.settled()
        away = root.with_name("away")
        root.rename(away)
        await here.until(lambda: here.said(f"{root} is gone; its documents are kept."))
        (away / "tea.md").write_text("Nobody watches it here.")
        assert len(here.app.chat.state.rows) == 4
        away.rename(root)
        await here.until(lambda: here.said(f"{root} is there again."))
        assert sum("is gone" in note for note in here.notes) == 1
        (root / "tea.md").write_text("Green tea.")
        await here.until(lambda: here.said("tea.md changed: "))


# The screen


@pytest.mark.parametrize("size", [SMALL, LARGE])
@on_a_screen
async def test_the_screen_shows_the_state_of_every_file(open_app: Open, size: tuple[int, int]) -> None:
    async with running(open_app(), size) as here:
        await here.settled()
        await here.pilot.press("ctrl+l")
        await here.until(lambda: "plan.md" in here.text)
        assert here.letters("report.md") == ["C"]
        assert here.letters("scan.pdf") == ["S"]
        assert "skipped: damaged, or not a PDF" in here.text
        state = here.app.chat.state
        passages = sum(row.passages for row in state.rows)
        assert f"All {passages} passages are cached." in here.text
        tokens = next(row.tokens for row in state.rows if row.path.name == "report.md")
        assert f"passages, {tokens:,} tokens" in here.text
        assert "KV on disk: " in here.text
        assert " of 20.0 GB · written: " in here.text
        await here.select("scan.pdf")
        assert "Print it to a new PDF from a viewer." in here.text
        await here.select("work")
        await here.pilot.press("enter")
        await here.until(lambda: "▸ work/" in here.text)
        assert "plan.md" not in here.text
        await here.pilot.press("enter")
        await here.until(lambda: "plan.md" in here.text)


@on_a_screen
async def test_pinning_by_key(open_app: Open, root: Path) -> None:
    async with running(open_app()) as here:
        await here.settled()
        await here.pilot.press("ctrl+l")
        await here.until(lambda: "plan.md" in here.text)
        await here.select("work")
        await here.pilot.press("k")
        await here.until(lambda: here.letters("plan.md") == ["C", "P"])
        assert here.letters("work/") == ["C", "P"]
        assert here.letters("tea.md") == ["C"]
        await here.select("plan.md")
        await here.pilot.press("space")
        await here.until(lambda: "It is pinned with" in here.text)
        await here.select("work")
        await here.pilot.press("k")
        await here.until(lambda: here.letters("plan.md") == ["C"])


@on_a_screen
async def test_recaching_by_key(open_app: Open, root: Path) -> None:
    async with running(open_app()) as here:
        await here.settled()
        before = here.app.chat.state
        await here.pilot.press("ctrl+l")
        await here.until(lambda: "report.md" in here.text)
        await here.select("report.md")
        await here.pilot.press("r")
        await here.until(lambda: here.app.chat.state.written_bytes > before.written_bytes)
        await here.settled()
        after = here.app.chat.state
        assert after.disk_bytes == before.disk_bytes
        assert after.written_bytes < 2 * before.written_bytes, "not everything again"
        assert after.total_written_bytes == after.written_bytes


@on_a_screen
async def test_removing_a_folder_asks_in_place(open_app: Open, root: Path) -> None:
    async with running(open_app()) as here:
        await here.settled()
        await here.pilot.press("ctrl+l")
        await here.until(lambda: "report.md" in here.text)
        await here.select("report.md")
        await here.pilot.press("x")
        await here.until(lambda: "Only what was added can be removed" in here.text)
        await here.select("notes")
        await here.pilot.press("x")
        await here.until(lambda: "from the library? Your files stay." in here.text)
        await here.pilot.press("escape")
        await here.until(lambda: "Your files stay." not in here.text)
        assert isinstance(here.app.screen, LibraryScreen)
        assert here.app.chat.state.roots == (root,)
        await here.pilot.press("x")
        await here.until(lambda: "Your files stay." in here.text)
        await here.pilot.press("y")
        await here.until(lambda: "No folder was added yet." in here.text)
        assert (root / "report.md").exists()
        (root / "report.md").write_text("nobody looks any more")
        await here.pilot.pause(0.6)
        assert not here.said("report.md changed")


@on_a_screen
async def test_a_used_up_budget_is_said(open_app: Open) -> None:
    async with running(open_app(cache_gb=0.0001)) as here:
        await here.until(lambda: here.app.chat.state.over_budget)
        await here.pilot.press("ctrl+l")
        await here.until(lambda: "The disk budget is used up: " in here.text)
        state = here.app.chat.state
        assert 0 < state.done < state.total
        assert state.disk_bytes <= 100_000
        assert {row.letter for row in state.rows} >= {"Q", "S"}


def test_a_large_library_opens_folded() -> None:
    root = Path("/d")
    rows = [Row(root / f"f{i % 20}" / "sub" / f"{i}.md", "C", 1) for i in range(1000)]
    folded = folded_at_first([root], rows)
    shown = list(lines([root], rows, folded, 40))
    assert len(shown) == 21
    assert [line.cells[2].plain for line in shown[:2]] == ["▾ /d", "  ▸ f0/"]
    assert len(list(lines([root], rows, frozenset(), 40))) == 1000 + 40 + 1
    assert folded_at_first([root], rows[:100]) == frozenset()


def test_nested_and_single_roots_repeat_nothing() -> None:
    roots = [Path("/d"), Path("/d/.hidden"), Path("/e/one.md")]
    rows = [Row(Path(path), "C", 1) for path in ("/d/.hidden/h.md", "/d/a.md", "/e/one.md")]
    names = [line.cells[2].plain.strip() for line in lines(roots, rows, frozenset(), 40)]
    assert names == ["▾ /d", "a.md", "▾ /d/.hidden", "h.md", "/e/one.md"]
