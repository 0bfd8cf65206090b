"""The passages under an answer, and the preview of one. Knows nothing of how they were found."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.markup import escape
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static

from quire.terminal import printable
from quire.tui.words import plain

if TYPE_CHECKING:
    from quire.library import Hit
    from quire.transcript import Mention


def title(hits: "tuple[Hit, ...]") -> str:
    """2 sources: tea.md, coffee.md; as markup, which a Collapsible takes its title for."""
    names = ", ".join(dict.fromkeys(plain(Path(hit.path.name)) for hit in hits))
    return escape(f"{len(hits)} {'source' if len(hits) == 1 else 'sources'}: {names}")


class Sources(OptionList):
    """The passages an answer rests on, numbered; Enter shows one, o opens its file. Where all documents were asked, the
    others follow, each with what became of it."""

    HELP = "## Sources\n\nEnter shows the passage, `o` opens its file in your `$EDITOR`."
    BINDINGS: ClassVar[list[BindingType]] = [Binding("o", "open", "Open")]

    class Opened(Message):
        """Somebody wants to see the file of a source."""

        def __init__(self, hit: "Hit") -> None:
            super().__init__()
            self.hit = hit

    def __init__(self, hits: "tuple[Hit, ...]", documents: "tuple[Mention, ...]" = ()) -> None:
        from quire import render
        from quire.library import Hit

        shown = {hit.path for hit in hits}
        others = [document for document in documents if document.path not in shown]
        lines = [f"{number}. {render.source(hit)}" for number, hit in enumerate(hits, 1)]
        super().__init__(*map(Content, [*lines, *map(render.mention_line, others)]), compact=True)
        self._passages = len(hits)
        self._hits = (*hits, *(Hit("", "", 0, document.path, 1, 1, "", 0.0) for document in others))

    @on(OptionList.OptionSelected)
    def _preview(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option_index < self._passages:
            self.app.push_screen(Preview(self._hits[event.option_index], event.option_index + 1))
        else:
            self.action_open()

    def action_open(self) -> None:
        if self.highlighted is not None:
            self.post_message(self.Opened(self._hits[self.highlighted]))


class Preview(ModalScreen[None]):
    """The text of one passage, as the model got it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Close"),
        Binding("o", "open", "Open in editor"),
    ]

    def __init__(self, hit: "Hit", number: int) -> None:
        super().__init__()
        self._hit = hit
        self._number = number

    def compose(self) -> ComposeResult:
        from quire import render

        with VerticalScroll() as box:
            box.border_title = Content(f"{self._number}. {render.source(self._hit)}")
            box.border_subtitle = "o opens the file, Esc closes"
            yield Static(printable(self._hit.text), markup=False)

    def action_open(self) -> None:
        self.app.post_message(Sources.Opened(self._hit))
