"""The models screen: which models there are, what they need, and using, fetching or removing one.

Switching says its price in place and asks. Shows what quire.models lists; fetching runs elsewhere and goes on when the
screen is left.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, ProgressBar, Static

from quire import models
from quire.config import Settings
from quire.models import Known, Model, Price
from quire.terminal import printable
from quire.tui import pulls
from quire.tui.confirm import Confirm
from quire.tui.preferences import Preferences, Wanted
from quire.tui.pulls import Pull, Puller
from quire.tui.words import place
from quire_engine.errors import QuireError


class ModelsScreen(Screen[None]):
    """Models; opened over the chat."""

    HELP = """\
## Models

**Enter** uses a model of this computer, or fetches one that is not here yet; its size is said first, and asked.
**f** fetches; **c** stops fetching, and what came is kept. **a** fetches from a web address or
`organisation/repository/FILE.gguf`, or uses a file of this computer. **d** deletes a fetched model; one that lies
elsewhere is only forgotten.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("f", "fetch", "Fetch"),
        Binding("c", "stop", "Stop"),
        Binding("a", "add", "Other ..."),
        Binding("d", "remove", "Delete"),
    ]

    def __init__(self, preferences: Preferences, puller: Puller) -> None:
        super().__init__()
        self._preferences = preferences
        self._puller = puller
        self._models: list[Model] = []
        self._wanted: Settings | None = None
        self._asked: tuple[Confirm, Callable[[], None]] | None = None  # and what is done after a yes

    def compose(self) -> ComposeResult:
        yield Static("", id="heading")
        yield DataTable[Text](cursor_type="row", show_header=False)
        yield Static("", id="about", classes="quiet")
        with Vertical(id="asking"):
            yield Static("", id="said")
            yield ProgressBar(show_eta=False)
            yield Input(placeholder="https://..., organisation/repository/FILE.gguf, or the path of a file", id="other")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for width in (2, 18, 8, None):
            self._table.add_column("", width=width)
        self.query_one(ProgressBar).display = self.query_one("#other").display = False
        self._table.focus()
        self.refresh_list()

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one(DataTable)

    @property
    def _here(self) -> Model | None:
        """The model under the cursor."""
        return self._models[self._table.cursor_row] if self._models else None

    # The list

    @work(thread=True, exclusive=True)
    def refresh_list(self) -> None:
        """Reads it anew: headers of files, on a thread."""
        listed = models.listing(self._preferences.settings)
        self.app.call_from_thread(self._show_list, listed)

    def _show_list(self, listed: list[Model]) -> None:
        from quire import render

        if not self.is_attached:
            return
        under = self._here
        self._models = listed
        self._table.clear()
        for model in listed:
            mark = "*" if model.in_use else ("" if model.here else "+")
            state = _state(model)
            style = "bold" if model.in_use else ("" if model.here else "dim")
            cells = (mark, printable(model.name), render.size(model.size_bytes), state)
            self._table.add_row(*(Text(cell, style=style) for cell in cells))
        names = [model.name for model in listed]
        start = under.name if under else next((m.name for m in listed if m.recommended and not m.here), "")
        self._table.move_cursor(row=names.index(start) if start in names else 0)
        disk = render.size(sum(model.size_bytes for model in listed if model.fetched))
        heading = f"Models: * in use, + can be fetched · fetched ones take {disk}"
        self.query_one("#heading", Static).update(Content(heading))
        self._about()

    @on(DataTable.RowHighlighted)
    def _about(self) -> None:
        if model := self._here:
            where = place(model.path) if model.here else f"Fetch it: f, or quire models pull {model.name}"
            notes = "; ".join(model.notes())
            self.query_one("#about", Static).update(Content(f"{printable(model.title)}: {notes}\n{where}"))

    def say(self, text: str, wrong: bool = False) -> None:
        said = self.query_one("#said", Static)
        said.update(Content(printable(text)))
        said.set_class(wrong, "wrong")

    # Using

    @on(DataTable.RowSelected)
    def _use(self) -> None:
        if not (model := self._here):
            return
        if not model.here:
            self.action_fetch()
        elif model.in_use:
            self.say(f"{model.title} is in use.")
        else:
            self._ask_price(model.choice)

    def _ask_price(self, choice: object) -> None:
        if outranked := self._preferences.outranked("model"):
            self.say(f"The model cannot be changed here: {outranked}.", wrong=True)
            return
        try:
            self._wanted = self._preferences.with_value("model", choice)
            if self._wanted == self._preferences.settings:
                self.say("That one is in use.")
            elif self._preferences.ask_price(self._wanted):
                self.say("Looking what switching costs ...")
            else:
                self._go_over(self._wanted)
        except QuireError as error:
            self.refused(error)

    def priced(self, wanted: Settings, price: Price | QuireError) -> None:
        """What the switch that was asked for costs, or why it is not possible."""
        if wanted != self._wanted:
            return
        if isinstance(price, QuireError):
            self.refused(price)
        else:
            self.say("")
            self._ask(price.sentence(), lambda: self._go_over(wanted))
        self._wanted = None

    def _ask(self, question: str, yes: Callable[[], None]) -> None:
        confirm = Confirm(question, self._table)
        self._asked = confirm, yes
        self.query_one("#asking").mount(confirm)

    @on(Confirm.Answered)
    def _answered(self, event: Confirm.Answered) -> None:
        if self._asked and self._asked[0] is event.confirm:
            yes, self._asked = self._asked[1], None
            if event.yes:
                yes()

    def _go_over(self, wanted: Settings) -> None:
        self.say("Opening the model ...")
        self.app.post_message(Wanted("model", wanted.model))

    def refused(self, error: QuireError) -> None:
        """It could not be done; everything is as before."""
        self._wanted = None
        self.say(f"{error.message} {error.hint}".strip(), wrong=True)

    def changed(self, settings: Settings) -> None:
        """There are new settings."""
        self.say("")
        self.refresh_list()

    # Fetching

    def action_fetch(self) -> None:
        if (model := self._here) and not model.here:
            self._offer(model)

    def fetch_recommended(self) -> None:
        """Offers the model that fits this machine best."""
        if (best := models.recommended()) is None:
            self.say("This machine has too little memory for a larger model.")
        elif best.path.exists():
            self.say(f"{best.title} is here already. Enter uses it.")
        else:
            self._offer(best)

    def _offer(self, model: Model | Known) -> None:
        if self._puller.running:
            self._fetch(model.name)  # which says why not
        else:
            self._ask(models.offer(model), lambda: self._fetch(model.name))

    def _fetch(self, source: str) -> None:
        if not self._puller.start(source):
            self.say("One at a time: c stops the one that runs.", wrong=True)

    def action_stop(self) -> None:
        self._puller.stop()

    def pulled(self, pull: Pull) -> None:
        """How far fetching is."""
        bar = self.query_one(ProgressBar)
        bar.display = pull.state == "running"
        bar.update(total=pull.total_bytes or None, progress=pull.done_bytes)
        if pull.error:
            self.say(f"{pull.error.message} {pull.error.hint}", wrong=True)
        else:
            self.say(pulls.sentence(pull))
        if pull.state == "done":
            self.refresh_list()

    def action_add(self) -> None:
        other = self.query_one("#other", Input)
        other.display = True
        other.focus()

    @on(Input.Submitted)
    def _other(self, event: Input.Submitted) -> None:
        source = event.value.strip().strip("\"'")
        self._leave_input()
        if Path(source).expanduser().is_file():
            self._ask_price(str(Path(source).expanduser().absolute()))
        elif source:
            self._fetch(source)

    def _leave_input(self) -> None:
        other = self.query_one("#other", Input)
        other.value = ""
        other.display = False
        self._table.focus()

    def action_back(self) -> None:
        if self.query_one("#other").display:
            self._leave_input()
        else:
            self.dismiss()

    # Removing

    def action_remove(self) -> None:
        model = self._here
        if not model or not model.here:
            return
        question = f"Delete {printable(model.title)}?" if model.fetched else f"Forget {printable(model.title)}?"
        self._ask(question, lambda: self._remove(model))

    def _remove(self, model: Model) -> None:
        try:
            models.remove(model)
        except QuireError as error:
            self.refused(error)
        else:
            self.say(f"{model.title} is gone." if model.fetched else f"{model.title} is no longer listed.")
            self.refresh_list()


def _state(model: Model) -> str:
    """The most important thing about a model, for its line."""
    if model.problem:
        return "answers by full prefill, see below" if model.readable else "cannot be opened, see below"
    return "; ".join(note for note in model.notes() if not note.startswith("licence"))
