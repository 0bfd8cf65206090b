"""A source in a file that has no lines: how the application names it, and what opens it.

With a real session and a PDF; the model is a tiny one of random weights.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from textual.widgets import Collapsible

import file_makers as make
from driving import on_a_screen, running, shown, until
from quire import config
from quire.session import Session
from quire.tui.app import QuireApp
from quire.tui.sources import Preview, Sources

Open = Callable[[], Session]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    page = [(700.0, 18.0, "The tower"), (670.0, 11.0, "Ida Marlow built it in 1911.")]
    path = tmp_path / "notes" / "report.pdf"
    path.parent.mkdir()
    path.write_bytes(make.pdf([[(700.0, 11.0, "Nothing on this one.")], page]))
    (path.parent / "scan.pdf").write_bytes(make.pdf([[]]))
    return path


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system's viewer notes what it was asked to show."""
    note, viewer = tmp_path / "opened", tmp_path / "bin" / "xdg-open"
    viewer.parent.mkdir()
    viewer.write_text(f'#!/bin/sh\necho "$1" > {note}.new && mv {note}.new {note}\n')
    viewer.chmod(0o700)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", f"{viewer.parent}{os.pathsep}{os.environ['PATH']}")
    return note


@pytest.fixture
def session(tiny: Callable[[str], Path]) -> Open:
    return lambda: Session(config.load({"model": str(tiny("llama")), "threads": 1, "max_tokens": 4}))


@on_a_screen
async def test_a_page_is_named_and_its_file_shown_by_the_systems_viewer(
    session: Open, report: Path, opened: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(report.parent)
    async with running(session, (100, 30), (report.parent,)) as (app, pilot):
        await until(app, pilot, lambda: "scan.pdf: no text; it looks scanned" in shown(app))
        app.chat.prompt.put("Who built the tower in 1911?")
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.query(Sources))
        app.chat.query(Collapsible).last().collapsed = False
        app.chat.query(Sources).last().focus()
        await until(app, pilot, lambda: "1. report.pdf, pages 1-2" in shown(app))
        if folder := os.environ.get("QUIRE_PICTURES"):
            app.save_screenshot("formats.svg", folder)
        await pilot.press("enter")
        await until(app, pilot, lambda: isinstance(app.screen, Preview))
        assert "Ida Marlow built it in 1911." in shown(app)
        await pilot.press("o")
        await until(app, pilot, opened.exists)
        assert opened.read_text() == f"{report}\n"


def test_a_missing_viewer_is_told(session: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    warned: list[str] = []
    app = QuireApp(session)
    monkeypatch.setattr(app, "_warn", warned.append)
    app._edit(Path("/d/report.pdf"), 1)
    assert warned == ["/d/report.pdf is no text, and there is no xdg-open here to show it."]
