"""The library screen: folders, their documents with the state of their cache, and how far caching is.

C cached, Q queued, S skipped; the letter says it, the colour only repeats it. Shows what the engine thread last said.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.coordinate import Coordinate
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, ProgressBar, Static

from quire.tui.widgets import activity, place, plain
from quire.tui.worker import Letter, Row, State

Line = tuple[Path, tuple[Text, Text, Text]]  # a folder or document; letter, name, what there is to say

_COLOURS: dict[Letter, str] = {"C": "green", "Q": "yellow", "S": "red"}


class LibraryScreen(Screen[None]):
    """Folders and documents; opened over the chat."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Back"),
        Binding("p", "pause", "Pause/resume caching"),
        Binding("o", "open", "Open"),
    ]

    class PauseToggled(Message):
        """Caching is to be held, or to go on."""

    class Opened(Message):
        """Somebody wants to see a document."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

    def __init__(self, latest: Callable[[], State]) -> None:
        super().__init__()
        self._latest = latest
        self._lines: list[Line] = []

    def compose(self) -> ComposeResult:
        yield Static(id="caching")
        yield ProgressBar(show_percentage=False, show_eta=False)
        yield DataTable[Text](cursor_type="row", zebra_stripes=False, show_header=False)
        yield Static(_legend(), id="legend")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        table = self._table
        for width in (2, None, None):
            table.add_column("", width=width)
        table.focus()
        self.show(self._latest())

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one(DataTable)

    def show(self, state: State) -> None:
        if not self.children:
            return  # not composed yet, or already taken apart
        self.query_one("#caching", Static).update(Content(progress_line(state)))
        self.query_one(ProgressBar).update(total=max(1, state.total), progress=state.done)
        before, self._lines = self._lines, list(lines(state.roots, state.rows))
        if [path for path, _ in before] == [path for path, _ in self._lines]:
            for row, (old, new) in enumerate(zip(before, self._lines, strict=True)):
                for column, cell in enumerate(new[1]):
                    if cell != old[1][column]:
                        self._table.update_cell_at(Coordinate(row, column), cell, update_width=True)
        else:
            self._fill()

    def _fill(self) -> None:
        """Anew, with the cursor where it was."""
        row = self._table.cursor_row
        self._table.clear()
        for _, cells in self._lines:
            self._table.add_row(*cells)
        self._table.move_cursor(row=row)

    def action_pause(self) -> None:
        self.app.post_message(self.PauseToggled())

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        if self._lines:
            self.app.post_message(self.Opened(self._lines[self._table.cursor_row][0]))


def lines(roots: Sequence[Path], rows: Sequence[Row]) -> Iterator[Line]:
    """One line for every folder, each followed by those of its documents; nested folders do not repeat them."""
    shown: set[Path] = set()
    for root in sorted(roots, key=lambda path: len(path.parts), reverse=True):
        inside = [row for row in rows if row.path.is_relative_to(root) and row.path not in shown]
        shown |= {row.path for row in inside}
        yield root, (Text(""), Text(place(root), style="bold"), Text(f"{len(inside)} documents", style="dim"))
        for row in inside:
            name = row.path.name if row.path == root else plain(row.path.relative_to(root))
            yield (
                row.path,
                (Text(row.letter, style=f"bold {_COLOURS[row.letter]}"), Text(plain(Path(name))), _about(row)),
            )


def _about(row: Row) -> Text:
    if row.letter == "S":
        return Text(f"skipped: {plain(Path(row.reason))}")
    cached = row.passages - row.waiting
    return Text(
        f"{cached} of {row.passages} passages cached" if row.waiting else f"{row.passages} passages", style="dim"
    )


def _legend() -> Content:
    return Content.assemble(
        ("C", "bold $text-success"), " cached   ", ("Q", "bold $text-warning"), " queued   ",
        ("S", "bold $text-error"), " skipped, with the reason",
    )  # fmt: skip


def progress_line(state: State) -> str:
    """Caching 12 of 40 passages, 9100 tokens to go · about 2 min left"""
    if state.reuse_off:
        return f"Nothing is cached. {plain(Path(state.reuse_off))}"
    if not state.roots:
        return "No folder was added yet. Type /add PATH in the chat."
    doing = activity(state)
    if state.done >= state.total:
        return doing or f"All {state.total} passages are cached."
    counts = f"{state.done} of {state.total} passages cached, {state.tokens_left} tokens to go"
    return f"{counts} · {doing}" if doing else counts
