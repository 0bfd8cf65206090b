"""Draws docs/images/*.svg: the real application and the bundled model on the sample folder.

    python packaging/screenshots.py

Takes a minute or two and touches nothing of yours: index and cached KV live in a temporary directory.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Collapsible

from quire import config
from quire.tui.app import QuireApp
from quire.tui.library import LibraryScreen
from quire.tui.widgets import Sources

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
QUESTION = "Who was the engineer of the lighthouse at Grey Point?"
SIZE = (100, 28)
PATIENCE_S = 600


def main() -> None:
    os.chdir(ROOT / "assets")  # so that paths are short
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("DATA", "CACHE", "CONFIG"):
            os.environ[f"QUIRE_{kind}_DIR"] = str(Path(folder) / kind.lower())
        asyncio.run(draw())


async def draw() -> None:
    from quire.session import Session

    IMAGES.mkdir(parents=True, exist_ok=True)
    app = QuireApp(lambda: Session(config.load()))
    async with app.run_test(size=SIZE) as pilot:
        chat = app.chat
        await until(pilot, lambda: chat.state.doing == "idle")
        save(app, "welcome")
        chat.prompt.put("/add sample")
        await pilot.press("enter", "ctrl+l")
        await until(pilot, lambda: isinstance(app.screen, LibraryScreen))
        await until(pilot, lambda: chat.state.doing == "caching")
        await pilot.press("down")
        save(app, "library")
        await pilot.press("escape")
        await until(pilot, lambda: chat.state.doing == "idle")
        chat.prompt.put(QUESTION)
        await pilot.press("enter")
        await until(pilot, lambda: chat.query(Collapsible))
        chat.query_one(Collapsible).collapsed = False
        await pilot.pause(0.5)
        save(app, "chat")
        chat.query_one(Sources).focus()
        await pilot.press("enter")
        await pilot.pause(0.5)
        save(app, "source")


async def until(pilot: Pilot[None], true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise SystemExit("This takes too long.")
        await pilot.pause(0.05)


def save(app: QuireApp, name: str) -> None:
    (IMAGES / f"{name}.svg").write_text(app.export_screenshot(title="Quire"), encoding="utf-8")
    print(f"docs/images/{name}.svg")


if __name__ == "__main__":
    main()
