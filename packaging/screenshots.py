"""Draws the README's pictures, docs/images/*.svg: the real application and the bundled model on the sample folder.

    python packaging/screenshots.py

Takes a minute or two and touches nothing of yours: home, index, history and cached KV lie in a temporary directory.
"""

import asyncio
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Collapsible

from quire import config
from quire.tui.app import QuireApp

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
QUESTIONS = (
    "In which year was the lighthouse at Grey Point built?",
    "Who was its engineer?",
)
SIZE = (100, 30)
PATIENCE_S = 600


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ["HOME"] = home
        for kind in ("DATA", "CACHE", "CONFIG", "LOG"):
            os.environ[f"QUIRE_{kind}_DIR"] = str(Path(home) / kind.lower())
        notes = shutil.copytree(ROOT / "assets" / "sample", Path(home) / "notes")
        (notes / "scan.pdf").write_bytes(b"%PDF-1.7 nothing but pictures")
        os.chdir(home)
        asyncio.run(draw(notes))


async def draw(notes: Path) -> None:
    from quire.session import Session

    IMAGES.mkdir(parents=True, exist_ok=True)
    app = QuireApp(lambda: Session(config.load()), (notes,))
    async with app.run_test(size=SIZE) as pilot:
        chat = app.chat
        await until(pilot, lambda: chat.state.doing == "idle" and chat.state.total > 0)
        for number, question in enumerate(QUESTIONS, 1):
            chat.prompt.put(question)
            await pilot.press("enter")
            await until(pilot, lambda number=number: len(chat.query(Collapsible)) == number)
        chat.query(Collapsible).last().collapsed = False
        await pilot.pause(1.0)
        save(app, "chat")
        for key, name in (("ctrl+l", "library"), ("ctrl+o", "conversations"), ("f2", "settings"), ("f3", "models")):
            await pilot.press(key)
            await pilot.pause(1.5)
            save(app, name)
            await pilot.press("escape")
            await pilot.pause(0.5)


async def until(pilot: Pilot[None], true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise SystemExit("This takes too long.")
        await pilot.pause(0.05)


def save(app: QuireApp, name: str) -> None:
    picture = app.export_screenshot(title="Quire")
    if leaked := re.search(re.escape(str(ROOT)), picture):
        raise SystemExit(f"{name} shows a path of this machine: {leaked[0]}")
    (IMAGES / f"{name}.svg").write_text(picture, encoding="utf-8")
    print(f"docs/images/{name}.svg")


if __name__ == "__main__":
    main()
