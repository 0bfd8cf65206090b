"""The settings screen: every setting with its value, meaning and origin, changed where it stands.

A wrong value is refused under its field; one that makes stored KV useless says its price there and asks. Knows the
settings by their declaration alone; what a change does is the business of preferences.
"""

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, Input, Label, Select, Static

from quire import config
from quire.config import Explained, Settings
from quire.models import Price
from quire.terminal import printable
from quire.tui.confirm import Confirm
from quire.tui.preferences import Preferences, Wanted
from quire.tui.words import place
from quire_engine.errors import QuireError


class SettingsScreen(Screen[None]):
    """All settings; opened over the chat."""

    HELP = """\
## Settings

**Tab** and **Shift+Tab** go through the settings. **Enter** takes a typed value, or opens the list of choices.
What costs something says so first. Everything is kept in `config.toml`, with your comments in it.
"""
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Back")]

    def __init__(self, preferences: Preferences) -> None:
        super().__init__()
        self._preferences = preferences
        self._asked: tuple[Settings, SettingRow] | None = None  # what it would cost
        self._going: tuple[Settings, SettingRow] | None = None  # it is being made

    def compose(self) -> ComposeResult:
        with VerticalScroll(can_focus=False):
            yield Static(Content(f"Kept in {place(config.config_file())}"), classes="quiet")
            for setting in config.explained():
                yield SettingRow(setting, self._preferences)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query(SettingRow).first().edit()

    def row(self, name: str) -> "SettingRow":
        return next(row for row in self.query(SettingRow) if row.setting.name == name)

    @on(Select.Changed)
    def _chosen(self, event: Select.Changed) -> None:
        if isinstance(event.value, str):
            self._change(event.select, event.value)

    @on(Input.Submitted)
    def _typed(self, event: Input.Submitted) -> None:
        self._change(event.input, event.value)

    @on(Input.Blurred)
    def _left(self, event: Input.Blurred) -> None:
        self._change(event.input, event.value)

    def _change(self, field: Widget, value: str) -> None:
        row = next(ancestor for ancestor in field.ancestors if isinstance(ancestor, SettingRow))
        if value == config.written(getattr(self._preferences.settings, row.setting.name)):
            row.say("")
            return
        try:
            wanted = self._preferences.with_value(row.setting.name, value)
            if any(wanted == known[0] for known in (self._asked, self._going) if known):
                return
            self._withdraw(row)
            if wanted == self._preferences.settings:
                row.show(wanted)  # the same, written otherwise
            elif self._preferences.ask_price(wanted):
                row.say("Looking what that costs ...")
                self._asked = (wanted, row)
            else:
                self._go_over(wanted, row)
        except QuireError as error:
            self._withdraw(row)
            row.refuse(error)

    def _withdraw(self, other: "SettingRow") -> None:
        """Something else is wanted than what was being asked about."""
        if self._asked and self._asked[1] is not other:
            self._asked[1].show(self._preferences.settings)
        self._asked = None

    # What comes back

    def priced(self, wanted: Settings, price: Price | QuireError) -> None:
        """What the change that was asked for costs, or why it is not possible."""
        if not self._asked or self._asked[0] != wanted:
            return
        row = self._asked[1]
        if isinstance(price, QuireError):
            self._asked = None
            row.refuse(price)
        else:
            row.say("")
            row.mount(Confirm(price.sentence(), self.focused))
            row.call_after_refresh(row.scroll_visible)

    @on(Confirm.Answered)
    def _answered(self, event: Confirm.Answered) -> None:
        if self._asked:
            wanted, row = self._asked
            if event.yes:
                self._go_over(wanted, row)
            else:
                self._asked = None
                row.show(self._preferences.settings)

    def _go_over(self, wanted: Settings, row: "SettingRow") -> None:
        name = row.setting.name
        self._asked, self._going = None, (wanted, row)
        if name not in config.COUNTS_AT_ONCE:
            row.say("Opening the model ...")
        self.app.post_message(Wanted(name, getattr(wanted, name)))

    def refused(self, error: QuireError) -> None:
        """The change could not be made; everything is as before."""
        if self._going:
            self._going[1].refuse(error)
            self._going = None

    def changed(self, settings: Settings) -> None:
        """There are new settings."""
        self._asked = self._going = None
        for row in self.query(SettingRow):
            row.show(settings)


class SettingRow(Vertical):
    """One setting: its name, field and origin, and below what it means or what is wrong."""

    def __init__(self, setting: Explained, preferences: Preferences) -> None:
        super().__init__()
        self.setting = setting
        self._preferences = preferences

    def compose(self) -> ComposeResult:
        setting, value = self.setting, self._value(self._preferences.settings)
        fixed = bool(self._preferences.outranked(setting.name))
        with Horizontal():
            yield Label(Content(setting.name), classes="name")
            if setting.choices:
                choices = [(choice, choice) for choice in setting.choices]
                yield Select[str](choices, value=value, allow_blank=False, compact=True, disabled=fixed)
            else:
                yield Input(value, compact=True, disabled=fixed, select_on_focus=False)
            yield Label(Content(self._origin()), classes="origin quiet")
        default = config.written(setting.default) or "empty"
        accepts = "" if setting.choices else f" Accepts {setting.allowed}."
        yield Static(Content(f"{setting.meaning}.{accepts} Default: {default}."), classes="meaning quiet")
        yield Static("", classes="said")

    def edit(self) -> None:
        """Puts the focus into its field."""
        self._field.focus()

    def show(self, settings: Settings) -> None:
        value = self._value(settings)
        with self.prevent(Select.Changed, Input.Changed):
            self._field.value = value
        self.query_one(".origin", Label).update(Content(self._origin()))
        self.say("")

    def say(self, text: str) -> None:
        said = self.query_one(".said", Static)
        said.update(Content(printable(text)))
        said.display = bool(text)
        said.remove_class("wrong")
        if text:
            self.call_after_refresh(self.scroll_visible)

    def refuse(self, error: QuireError) -> None:
        """Says what is wrong; what was typed stays, a choice goes back to what holds."""
        if isinstance(self._field, Select):
            self.show(self._preferences.settings)
        self.say(f"{error.message} {error.hint}".strip())
        self.query_one(".said", Static).add_class("wrong")

    @property
    def _field(self) -> "Input | Select[str]":
        return self.query_one(Select) if self.setting.choices else self.query_one(Input)

    def _value(self, settings: Settings) -> str:
        return printable(config.written(getattr(settings, self.setting.name)))

    def _origin(self) -> str:
        return self._preferences.outranked(self.setting.name) or self._preferences.origins[self.setting.name]
