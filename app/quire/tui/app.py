"""The terminal application: which screen is shown, the keys that work everywhere, and leaving for an editor.

Knows the screens; what they show and what the engine thread does is theirs.
"""

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import App, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.widgets import HelpPanel

from quire import config, paths
from quire.terminal import printable
from quire.tui.chat import ChatScreen
from quire.tui.library import LibraryScreen
from quire.tui.widgets import Sources
from quire.tui.worker import Changed

if TYPE_CHECKING:
    from quire.session import Session

_WITH_COLON = {"code", "codium", "cursor", "helix", "hx", "subl", "zed"}  # editors that take file:line


def run(overrides: Mapping[str, object], add: tuple[Path, ...] = ()) -> None:
    """Opens the application; `add`: folders to add first. Raises QuireError when the settings are wrong."""
    settings = config.load(overrides)

    def open_session() -> "Session":
        from quire.session import Session

        return Session(settings)

    app = QuireApp(open_session, add)
    app.run()
    if app.chat.worker.alive:
        # It is inside llama.cpp, which must not be taken down under it. What was finished is on disk, whole.
        sys.stdout.flush()
        os._exit(app.return_code or 0)


class QuireApp(App[None]):
    """Themes, the palette and motion (TEXTUAL_THEME, TEXTUAL_ANIMATIONS, NO_COLOR) are Textual's own."""

    TITLE = "Quire"
    CSS = (paths.assets() / "style.tcss").read_text(encoding="utf-8")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+l", "library", "Library"),
        Binding("f1", "help", "Help"),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(self, open_session: "Callable[[], Session]", add: tuple[Path, ...] = ()) -> None:
        super().__init__()
        self.chat = ChatScreen(open_session)
        for path in add:
            self.chat.worker.add(path)

    def on_mount(self) -> None:
        self.push_screen(self.chat)

    async def on_unmount(self) -> None:
        await asyncio.to_thread(self.chat.worker.close)

    def action_library(self) -> None:
        if isinstance(self.screen, LibraryScreen):
            self.pop_screen()
        elif self.screen is self.chat:
            self.push_screen(LibraryScreen(lambda: self.chat.state))

    def action_help(self) -> None:
        try:
            self.screen.query_one(HelpPanel).remove()
        except NoMatches:
            self.screen.mount(HelpPanel())

    @on(Changed)
    def _changed(self, message: Changed) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, LibraryScreen):
                screen.show(message.state)

    @on(LibraryScreen.PauseToggled)
    def _pause(self) -> None:
        self.chat.worker.toggle_pause()

    # The editor

    @on(Sources.Opened)
    def _open_source(self, message: Sources.Opened) -> None:
        self._edit(message.hit.path, message.hit.start_line)

    @on(LibraryScreen.Opened)
    def _open_document(self, message: LibraryScreen.Opened) -> None:
        self._edit(message.path, 1)

    def _edit(self, path: Path, line: int) -> None:
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        try:
            with self.suspend():
                subprocess.run(editor_command(editor, path, line), check=False)
        except SuspendNotSupported:
            self._warn("This terminal cannot be left for an editor.")
        except (OSError, ValueError) as error:
            self._warn(f"{editor} cannot be started: {error}. Set EDITOR to the one you use.")
        self.refresh()

    def _warn(self, text: str) -> None:
        self.notify(printable(text), severity="warning", markup=False)


def editor_command(editor: str, path: Path, line: int) -> list[str]:
    """What opens the file at the line. editor: a command, perhaps with options, as in EDITOR."""
    words = shlex.split(editor)
    if Path(words[0]).name in _WITH_COLON:
        goto = ["--goto"] if Path(words[0]).name in ("code", "codium", "cursor") else []
        return [*words, *goto, f"{path}:{line}"]
    return [*words, f"+{line}", str(path)]
