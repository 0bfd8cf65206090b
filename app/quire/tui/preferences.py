"""The settings in force, and going over to others: what that costs is found out first, what has worked is saved.

Knows the engine thread and config.toml; nothing of the screens that ask.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.message import Message

from quire import config
from quire.config import Settings
from quire.tui.messages import Switched

if TYPE_CHECKING:
    from quire.tui.worker import Worker


class Wanted(Message):
    """Somebody wants this setting to be so, knowing its price."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        self.name = name
        self.value = value


class Preferences:
    """One for the application. changed: called with the settings whenever they are new. Raises QuireError as load."""

    def __init__(self, overrides: Mapping[str, object], worker: "Worker", changed: Callable[[Settings], None]) -> None:
        self._worker = worker
        self._changed = changed
        self.settings, self.origins = config.in_force(overrides)
        self._latest = self.settings  # what was asked for, also what the engine thread has not got to yet

    def outranked(self, name: str) -> str:
        """Why saving this setting would change nothing; empty when it would."""
        match self.origins[name]:
            case "environment":
                return f"{config.variable(name)} in the environment decides"
            case "flag":
                return "the command line decides"
            case _:
                return ""

    def with_value(self, name: str, value: object) -> Settings:
        """The settings with one changed. Raises QuireError, with what would be right, when it is not allowed."""
        changed: dict[str, Any] = {name: config.checked(name, value)}
        return replace(self._latest, **changed)

    def ask_price(self, wanted: Settings) -> bool:
        """Whether going over to these settings has a price; Priced says it soon. Without an open model it has none."""
        dear = self._worker.open and bool(config.differences(self.settings, wanted).keys() & config.CACHE_DEPENDS_ON)
        if dear:
            self._worker.price(wanted)
        return dear

    def use(self, name: str, value: object) -> None:
        """Changes a setting; one that needs the model opened again is saved when that has worked (Switched).

        Raises QuireError when the file cannot be written.
        """
        wanted = self.with_value(name, value)
        if name in config.COUNTS_AT_ONCE:
            self._save({name: getattr(wanted, name)})
        self._latest = wanted
        self._worker.use(wanted)

    def switched(self, message: Switched) -> None:
        """The engine thread has gone over, or could not. Raises QuireError when the file cannot be written."""
        if message.error:
            self._latest = self.settings
            return
        news = config.differences(self.settings, message.settings)
        self._save({name: value for name, value in news.items() if name not in config.COUNTS_AT_ONCE})

    def _save(self, news: dict[str, Any]) -> None:
        """Writes what is new; what is back at its default is taken out of the file."""
        if not news:
            return
        wanted = replace(self.settings, **news)
        chosen = {name: news[name] for name in news.keys() & config.differences(Settings(), wanted).keys()}
        if chosen:
            config.save(chosen)
        for name in news.keys() - chosen.keys():
            config.unset(name)
        self.settings = wanted
        self.origins |= {name: "file" if name in chosen else "default" for name in news}
        self._changed(wanted)
