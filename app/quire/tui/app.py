"""The terminal application: which screen is shown, the keys that work everywhere, and leaving for an editor.

Knows the screens; what they show and what the engine thread does is theirs.
"""

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import App, SuspendNotSupported, SystemCommand
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import HelpPanel

from quire import config, crash, elsewhere, paths
from quire.config import Settings
from quire.terminal import printable
from quire.tui.chat import ChatScreen
from quire.tui.conversations import ConversationsScreen
from quire.tui.library import LibraryScreen
from quire.tui.messages import NO_TURN, Failed, Priced, Switched
from quire.tui.models import ModelsScreen
from quire.tui.preferences import Preferences, Wanted
from quire.tui.pulls import Pulled, Puller, sentence
from quire.tui.settings import SettingsScreen
from quire.tui.sources import Sources
from quire.tui.themes import HIGH_CONTRAST_THEME
from quire.tui.worker import Changed
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Session

_WITH_COLON = {"code", "codium", "cursor", "helix", "hx", "subl", "zed"}  # editors that take file:line


def run(overrides: Mapping[str, object], add: tuple[Path, ...] = ()) -> None:
    """Opens the application; `add`: folders to add first. Raises QuireError when the settings are wrong."""
    settings = config.load(overrides)

    def open_session() -> "Session":
        from quire.session import Session

        return Session(settings)

    app = QuireApp(open_session, add, overrides)
    crash.watch_threads(lambda error: app.chat.post_message(Failed(NO_TURN, error)))
    try:
        app.run()
    except Exception as error:
        raise crash.explained(error) from error
    if app.chat.worker.alive:
        # It is inside llama.cpp, which must not be taken down under it. What was finished is on disk, whole.
        sys.stdout.flush()
        if app.crash:
            sys.stderr.write(f"quire: {printable(app.crash.message)} {printable(app.crash.hint)}\n")
        os._exit(app.return_code or 0)
    if app.crash:
        raise app.crash


class QuireApp(App[None], inherit_bindings=False):
    """Colours and motion follow the settings; TEXTUAL_THEME, TEXTUAL_ANIMATIONS and NO_COLOR outrank them."""

    TITLE = "Quire"
    CSS = (paths.assets() / "style.tcss").read_text(encoding="utf-8")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help"),  # first: a narrow footer cuts off the last ones
        Binding("ctrl+o", "conversations", "Conversations"),
        Binding("ctrl+l", "library", "Library"),
        Binding("f2", "settings", "Settings", show=False),
        Binding("f3", "models", "Models", show=False),
        Binding("f4", "fetch_recommended", "Fetch the recommended model", show=False),
        Binding("ctrl+q", "quit", "Quit", priority=True),
        Binding("ctrl+c", "help_quit", show=False, system=True),
    ]

    def __init__(
        self,
        open_session: "Callable[[], Session]",
        add: tuple[Path, ...] = (),
        overrides: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.chat = ChatScreen(open_session, lambda: elsewhere.leaves(self.preferences.settings))
        self.preferences = Preferences(overrides or {}, self.chat.worker, self._new_settings)
        self.puller = Puller(self.post_message)
        self.crash: QuireError | None = None
        for path in add:
            self.chat.worker.add(path)
        self.register_theme(HIGH_CONTRAST_THEME)
        self._look()  # before anything is painted

    def get_default_screen(self) -> Screen[None]:
        return self.chat

    def on_mount(self) -> None:
        self.theme_changed_signal.subscribe(self, self._theme_chosen)

    def on_ready(self) -> None:
        """The first picture is on the screen: what the engine thread imports would have held it up."""
        self.chat.worker.start()

    async def on_unmount(self) -> None:
        self.puller.stop()
        await asyncio.to_thread(self.chat.worker.close)
        await asyncio.to_thread(self.puller.close)
        await self.chat.archive.close()

    def _fatal_error(self) -> None:
        """Keeps the traceback in the log. Textual would show it with the values of variables: text of documents."""
        self.crash = crash.explained(self._exception or RuntimeError("unknown"))
        self._close_messages_no_wait()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Keys that lead somewhere from the chat are not offered elsewhere."""
        return action not in ("conversations", "library") or self.screen is self.chat

    def action_library(self) -> None:
        self.push_screen(LibraryScreen(lambda: self.chat.state))

    def action_conversations(self) -> None:
        self.push_screen(ConversationsScreen(self.chat.archive))

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        yield SystemCommand("Conversations", "Search, open, rename, delete, export", self.action_conversations)
        yield SystemCommand("New conversation", "Begin anew; the present one is kept", self.chat.action_new)
        yield SystemCommand("Ask all files", "Read every passage for one question: /all", self.chat.action_ask_all)
        yield SystemCommand("Settings", "Everything that can be set (F2)", self.action_settings)
        yield SystemCommand("Models", "Use, fetch or delete a model (F3)", self.action_models)
        yield SystemCommand(
            "Fetch the recommended model", "The best one for this machine (F4)", self.action_fetch_recommended
        )
        yield from super().get_system_commands(screen)

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

    @on(LibraryScreen.Wished)
    def _wished(self, message: LibraryScreen.Wished) -> None:
        self.chat.worker.wish(message.wish, message.path)

    @on(LibraryScreen.PauseToggled)
    def _pause(self) -> None:
        self.chat.worker.toggle_pause()

    # Conversations

    @on(ConversationsScreen.Chosen)
    def _open_conversation(self, message: ConversationsScreen.Chosen) -> None:
        self.chat.call_later(self.chat.open, message.conversation, message.turn)

    @on(ConversationsScreen.Begun)
    def _begin_conversation(self) -> None:
        self.chat.action_new()

    @on(ConversationsScreen.Deleted)
    def _forget_conversation(self, message: ConversationsScreen.Deleted) -> None:
        self.chat.call_later(self.chat.deleted, message.conversation)

    # Settings and models

    def action_settings(self) -> None:
        if isinstance(self.screen, SettingsScreen):
            self.pop_screen()
        elif self.screen is self.chat:
            self.push_screen(SettingsScreen(self.preferences))

    def action_models(self) -> None:
        if isinstance(self.screen, ModelsScreen):
            self.pop_screen()
        elif self.screen is self.chat:
            self.push_screen(ModelsScreen(self.preferences, self.puller))

    async def action_fetch_recommended(self) -> None:
        if self.screen is self.chat:
            await self.push_screen(ModelsScreen(self.preferences, self.puller))
        if isinstance(self.screen, ModelsScreen):
            self.screen.fetch_recommended()

    @property
    def _choosing(self) -> list[SettingsScreen | ModelsScreen]:
        """The screens on which settings are changed."""
        return [screen for screen in self.screen_stack if isinstance(screen, SettingsScreen | ModelsScreen)]

    @on(Priced)
    def _priced(self, message: Priced) -> None:
        for screen in self._choosing:
            screen.priced(message.settings, message.price)

    @on(Wanted)
    def _use(self, message: Wanted) -> None:
        self._try(lambda: self.preferences.use(message.name, message.value))

    @on(Switched)
    def _switched(self, message: Switched) -> None:
        self._try(lambda: self.preferences.switched(message))
        if message.error:
            self._refuse(message.error)

    def _try(self, change: Callable[[], None]) -> None:
        try:
            change()
        except QuireError as error:
            self._refuse(error)

    def _refuse(self, error: QuireError) -> None:
        for screen in self._choosing:
            screen.refused(error)
        if not self._choosing:
            self._warn(f"{error.message} {error.hint}")

    def _new_settings(self, settings: Settings) -> None:
        self._look()
        self.chat.call_later(self.chat.settings_changed)
        for screen in self._choosing:
            screen.changed(settings)

    def _look(self) -> None:
        settings = self.preferences.settings
        if "TEXTUAL_THEME" not in os.environ:
            self.theme = settings.theme
        if "TEXTUAL_ANIMATIONS" not in os.environ:
            self.animation_level = "full" if settings.animations else "none"

    def _theme_chosen(self, theme: Theme) -> None:
        """A theme was chosen, perhaps in the palette: it is remembered."""
        preferences = self.preferences
        if theme.name in config.THEMES and theme.name != preferences.settings.theme:
            self._try(lambda: preferences.use("theme", theme.name))
            self._look()  # a theme that cannot be remembered is not kept either

    @on(Pulled)
    def _pulled(self, message: Pulled) -> None:
        shown = [screen for screen in self._choosing if isinstance(screen, ModelsScreen)]
        for screen in shown:
            screen.pulled(message.pull)
        if not shown and message.pull.state in ("done", "failed"):
            self.notify(printable(sentence(message.pull)), timeout=8, markup=False)

    # The editor

    @on(Sources.Opened)
    def _open_source(self, message: Sources.Opened) -> None:
        self._edit(message.hit.path, message.hit.start_line)

    @on(LibraryScreen.Opened)
    def _open_document(self, message: LibraryScreen.Opened) -> None:
        self._edit(message.path, 1)

    def _edit(self, path: Path, line: int) -> None:
        """Opens a file at the line; what no editor shows, in the program that the system has for it."""
        from quire.documents import has_lines

        if not has_lines(path):
            self._view(path)
            return
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        try:
            with self.suspend():
                subprocess.run(editor_command(editor, path, line), check=False)
        except SuspendNotSupported:
            self._warn("This terminal cannot be left for an editor.")
        except (OSError, ValueError) as error:
            self._warn(f"{editor} cannot be started: {error}. Set EDITOR to the one you use.")
        self.refresh()

    def _view(self, path: Path) -> None:
        viewer = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        nowhere = subprocess.DEVNULL
        try:
            subprocess.Popen([viewer, path], stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
        except OSError:
            self._warn(f"{path} is no text, and there is no {viewer} here to show it.")

    def _warn(self, text: str) -> None:
        self.notify(printable(text), severity="warning", markup=False)


def editor_command(editor: str, path: Path, line: int) -> list[str]:
    """What opens the file at the line. editor: a command, perhaps with options, as in EDITOR."""
    words = shlex.split(editor)
    if Path(words[0]).name in _WITH_COLON:
        goto = ["--goto"] if Path(words[0]).name in ("code", "codium", "cursor") else []
        return [*words, *goto, f"{path}:{line}"]
    return [*words, f"+{line}", str(path)]
