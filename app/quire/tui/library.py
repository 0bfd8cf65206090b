"""The library screen: folders, their documents with the state of their cache, the disk budget, and what edits cost.

C cached, Q queued, S skipped, P pinned; the letter says it, the colour only repeats it. Shows what the engine thread
last said, and says what somebody wants done. Knows nothing of how it is done.
"""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from rich.style import Style
from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.content import Content
from textual.coordinate import Coordinate
from textual.message import Message
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import DataTable, Footer, ProgressBar, Static

from quire.keeper import Edit, LibraryWish
from quire.terminal import printable
from quire.tui.confirm import Confirm
from quire.tui.messages import Letter, Row, State
from quire.tui.themes import readable
from quire.tui.words import activity, place, plain

_COLOURS = {"C": "text-success", "Q": "text-warning", "S": "text-error", "P": "text-accent"}
_ABOUT_WIDTH = 36
_TOKENS = re.compile(r", [\d,]+ tokens?$")
_MANY_ROWS = 200  # of so many documents the inner folders are closed at first
_MOST_EDITS = 3
_NOWHERE: Final = Path()


@dataclass(frozen=True)
class Line:
    """A folder or document. root: it is what was added.  cells: letter, pin, name, what there is to say."""

    path: Path
    is_folder: bool
    is_root: bool
    cells: tuple[Text, Text, Text, Text]


class LibraryScreen(Screen[None]):
    """Folders and documents; opened over the chat."""

    HELP = """\
# Library

**C** cached, **Q** queued, **S** skipped; **P** pinned: cached first, and given up last when the disk is to be freed.

**Enter** opens a document in your editor, or folds a folder. **k** or **Space** pins, **r** caches anew, **x** removes
a folder from the library (your files stay), **p** pauses caching.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Back"),
        Binding("ctrl+l", "dismiss", show=False),
        Binding("k,space", "pin", "Pin"),
        Binding("r,R", "recache", "Re-cache"),
        Binding("o", "open", "Open"),
        Binding("x", "remove", "Remove"),
        Binding("p", "pause", "Pause"),
    ]

    class PauseToggled(Message):
        """Caching is to be held, or to go on."""

    class Opened(Message):
        """Somebody wants to see a document."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

    class Wished(Message):
        """Somebody wants something done with a document or folder."""

        def __init__(self, wish: LibraryWish, path: Path) -> None:
            super().__init__()
            self.wish = wish
            self.path = path

    def __init__(self, latest: Callable[[], State]) -> None:
        super().__init__()
        self._latest = latest
        self._state = State()
        self._lines: list[Line] = []
        self._folded: frozenset[Path] | None = None  # nothing is folded before there is something
        self._asked = _NOWHERE  # whether to remove it

    def compose(self) -> ComposeResult:
        yield Static(id="caching")
        yield ProgressBar(show_percentage=False, show_eta=False)
        yield DataTable[Text](cursor_type="row", zebra_stripes=False, show_header=False)
        yield Static(id="edits")
        yield Static(id="say")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for width in (1, 1, None, None):
            self._table.add_column("", width=width)
        self._table.focus()
        self.show(self._latest())
        self._say()
        self.app.theme_changed_signal.subscribe(self, self._repaint)

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one(DataTable)

    @property
    def _line(self) -> Line | None:
        row = self._table.cursor_row
        return self._lines[row] if row < len(self._lines) else None

    # What is seen

    def show(self, state: State) -> None:
        if not self.children:
            return  # not composed yet, or already taken apart
        same_rows = (state.roots, state.rows, state.pins) == (self._state.roots, self._state.rows, self._state.pins)
        self._state = state
        self.query_one("#caching", Static).update(
            Content("\n".join(filter(None, (progress_line(state), disk_line(state)))))
        )
        self.query_one(ProgressBar).update(total=max(1, state.total), progress=state.done)
        edits = self.query_one("#edits", Static)
        edits.update(Content("\n".join(map(edit_line, state.edits[:_MOST_EDITS]))))
        edits.display = bool(state.edits)
        if not same_rows or not self._lines:
            self._show_lines()

    def on_resize(self, event: events.Resize) -> None:
        if self._lines:
            self._show_lines(event.size.width)

    def _show_lines(self, width: int = 0) -> None:
        state = self._state
        if self._folded is None and state.rows:
            self._folded = folded_at_first(state.roots, state.rows)
        name_width = max(16, (width or self.size.width) - _ABOUT_WIDTH - 14)
        before, self._lines = self._lines, list(lines(state.roots, state.rows, self._folded or frozenset(), name_width))
        about_width = (width or self.size.width) - 14 - max((line.cells[2].cell_len for line in self._lines), default=0)
        colours = self._colours()
        for line in self._lines:
            _fit(line.cells[3], about_width)
            for letter in line.cells[:2]:
                letter.stylize(Style(color=colours[letter.plain].rich_color, bold=True) if letter.plain else "")
        if [line.path for line in before] != [line.path for line in self._lines]:
            self._fill()
            return
        for row, (old, new) in enumerate(zip(before, self._lines, strict=True)):
            for column, cell in enumerate(new.cells):
                if cell != old.cells[column]:
                    self._table.update_cell_at(Coordinate(row, column), cell, update_width=True)

    def _fill(self) -> None:
        """Anew, with the cursor where it was."""
        row = self._table.cursor_row
        self._table.clear()
        for line in self._lines:
            self._table.add_row(*line.cells)
        self._table.move_cursor(row=row)

    def _say(self, text: str = "") -> None:
        """One line under the table: an answer to a key, else what there is to know of the row, else the letters."""
        line = self._line
        skipped = next((r for r in self._state.rows if line and r.path == line.path and r.letter == "S"), None)
        if not text and skipped:
            text = f"{place(skipped.path)}: {printable(skipped.reason)}".replace("\n", " ")
        self.query_one("#say", Static).update(Content(text) if text else _legend(self._colours()))

    def _colours(self) -> dict[str, Color]:
        """Of the letters, in the present theme."""
        return {letter: readable(name, self.app.theme_variables) for letter, name in _COLOURS.items()}

    def _repaint(self, _: Theme) -> None:
        self._lines = []
        self._show_lines()
        self._say()

    # What the keys do

    @on(DataTable.RowHighlighted)
    def _moved(self) -> None:
        self._say()

    def action_pause(self) -> None:
        self.app.post_message(self.PauseToggled())

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        if not (line := self._line):
            return
        if line.is_folder:
            self._folded = (self._folded or frozenset()) ^ {line.path}
            self._show_lines()
        else:
            self.app.post_message(self.Opened(line.path))

    def action_pin(self) -> None:
        if not (line := self._line):
            return
        around = [pin for pin in self._state.pins if line.path.is_relative_to(pin)]
        if line.path in around:
            self._wish("unpin", line.path, "No longer pinned.")
        elif around:
            self._say(f"It is pinned with {place(around[0])}, which can be unpinned.")
        else:
            self._wish("pin", line.path, "Pinned: cached first, given up last.")

    def action_recache(self) -> None:
        if line := self._line:
            self._wish("recache", line.path, "Its cached passages are dropped, and made anew.")

    def action_remove(self) -> None:
        """Asks first."""
        line = self._line
        if line and line.is_root:
            self._asked = line.path
            question = f"Remove {place(line.path)} from the library? Your files stay."
            self.mount(Confirm(question, self._table), before="#say")
        elif line:
            self._say("Only what was added can be removed: a folder in bold, with all that is in it.")

    @on(Confirm.Answered)
    def _confirmed(self, answered: Confirm.Answered) -> None:
        if answered.yes:
            self._wish("remove", self._asked, "Removed.")

    def _wish(self, wish: LibraryWish, path: Path, text: str) -> None:
        self.app.post_message(self.Wished(wish, path))
        self._say(text)


# Lines


def lines(roots: Sequence[Path], rows: Sequence[Row], folded: Collection[Path], name_width: int) -> Iterator[Line]:
    """A line for every folder, followed by those of what is in it unless it is folded; nested roots repeat nothing."""
    for root, inside in _by_root(roots, rows):
        if [row.path for row in inside] == [root]:
            yield Line(root, False, True, _cells(inside[0], Text(_cut(place(root), name_width), style="bold")))
            continue
        yield _folder(root, 0, inside, root in folded, place(root), name_width)
        if root not in folded:
            yield from _below(root, 1, inside, folded, name_width)


def folded_at_first(roots: Sequence[Path], rows: Sequence[Row]) -> frozenset[Path]:
    """The folders that are closed when the screen opens, so that a large library can be looked over."""
    if len(rows) <= _MANY_ROWS:
        return frozenset()
    inside = {parent for root, some in _by_root(roots, rows) for row in some for parent in _between(root, row.path)}
    return frozenset(inside)


def _by_root(roots: Sequence[Path], rows: Sequence[Row]) -> Iterable[tuple[Path, list[Row]]]:
    """Every row with the innermost folder that was added around it."""
    found: dict[Path, list[Row]] = {root: [] for root in sorted(roots)}
    innermost_first = sorted(roots, key=lambda path: len(path.parts), reverse=True)
    for row in sorted(rows, key=lambda row: row.path.parts):
        if root := next((root for root in innermost_first if row.path.is_relative_to(root)), None):
            found[root].append(row)
    return found.items()


def _between(root: Path, path: Path) -> Iterator[Path]:
    return (parent for parent in path.parents if parent != root and parent.is_relative_to(root))


def _below(folder: Path, depth: int, rows: Sequence[Row], folded: Collection[Path], width: int) -> Iterator[Line]:
    """What is in a folder. rows: of all documents below it, in order."""
    position = 0
    while position < len(rows):
        row = rows[position]
        name = row.path.relative_to(folder).parts[0]
        if row.path.parent == folder:
            text = Text(_cut("  " * depth + plain(Path(name)), width))
            yield Line(row.path, False, False, _cells(row, text))
            position += 1
            continue
        inner = folder / name
        end = position
        while end < len(rows) and rows[end].path.is_relative_to(inner):
            end += 1
        yield _folder(inner, depth, rows[position:end], inner in folded, f"{plain(Path(name))}/", width)
        if inner not in folded:
            yield from _below(inner, depth + 1, rows[position:end], folded, width)
        position = end


def _folder(path: Path, depth: int, rows: Sequence[Row], folded: bool, name: str, width: int) -> Line:
    waiting, read = sum(row.waiting for row in rows), [row for row in rows if row.letter != "S"]
    letter: Letter | None = "Q" if waiting else "C" if read else "S" if rows else None
    total = Row(path, letter or "C", sum(r.passages for r in rows), waiting, "", sum(r.tokens for r in rows))
    documents = _number(len(rows), "document")
    about = f"{documents}, {_counts(total)}" if letter != "S" else f"{documents}, none readable"
    text = Text(_cut(f"{'  ' * depth}{'▸' if folded else '▾'} {name}", width), style="" if depth else "bold")
    pinned = bool(rows) and all(row.pinned for row in rows)
    cells = _letter(letter), _pin(pinned), text, Text(about if rows else documents, style="dim")
    return Line(path, True, not depth, cells)


def _cells(row: Row, name: Text) -> tuple[Text, Text, Text, Text]:
    about = Text(f"skipped: {plain(Path(row.reason))}") if row.letter == "S" else Text(_counts(row), style="dim")
    return _letter(row.letter), _pin(row.pinned), name, about


def _letter(letter: Letter | None) -> Text:
    return Text(letter or "")


def _pin(pinned: bool) -> Text:
    return Text("P" if pinned else "")


def _counts(row: Row) -> str:
    """3 of 12 passages, 4,031 tokens"""
    cached = f"{row.passages - row.waiting} of " if row.waiting else ""
    return f"{cached}{_number(row.passages, 'passage')}, {_number(row.tokens, 'token')}"


def _fit(about: Text, width: int) -> None:
    """Leaves out the tokens where they do not fit: half a number would be another one."""
    if about.cell_len > width and (tokens := _TOKENS.search(about.plain)):
        about.right_crop(len(tokens[0]))
    about.truncate(width, overflow="ellipsis")


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _cut(text: str, width: int) -> str:
    """The end of a long name tells more than its middle."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - width // 2 - 1) :]}"


# Sentences


def _legend(colours: Mapping[str, Color]) -> Content:
    words = {"C": " cached   ", "Q": " queued   ", "S": " skipped   ", "P": " pinned"}
    return Content("").join(
        Content.assemble((letter, f"bold {colours[letter].css}"), word) for letter, word in words.items()
    )


def progress_line(state: State) -> str:
    """12 of 40 passages cached, 9,100 tokens to go · caching, about 2 min left"""
    if state.reuse_off:
        return f"Nothing is cached. {plain(Path(state.reuse_off))}"
    if not state.roots:
        return "No folder was added yet. Type /add PATH in the chat."
    doing = activity(state)
    if state.done >= state.total:
        every = "Everything is cached." if state.total == 1 else f"All {state.total} passages are cached."
        return doing or (every if state.total else "There is nothing to cache.")
    if state.over_budget and not doing:
        left = state.total - state.done
        return (
            f"The disk budget is used up: {left} of {state.total} passages are not cached. Raise cache_gb, or pin less."
        )
    counts = f"{state.done} of {state.total} passages cached, {state.tokens_left:,} tokens to go"
    return f"{counts} · {doing}" if doing else counts


def disk_line(state: State) -> str:
    """KV on disk: 1.2 GB of 20.0 GB · written: 34.1 MB now, 5.1 GB ever"""
    if not state.model:
        return ""
    from quire.render import size

    budget = f" of {size(state.limit_bytes)}" if state.limit_bytes else ""
    written = f"written: {size(state.written_bytes)} now, {size(state.total_written_bytes)} ever"
    return f"KV on disk: {size(state.disk_bytes)}{budget} · {written}"


def edit_line(edit: Edit) -> str:
    """12:04 report.md: 3 of 41 passages again, 4.1 s"""
    from quire.render import duration

    at = time.strftime("%H:%M", time.localtime(edit.at))
    again = (
        f"{edit.passages} of {edit.total} passages again, {edit.tokens:,} tokens" if edit.passages else "nothing again"
    )
    took = [duration(edit.ms)] if edit.ms else []
    left = [f"{len(edit.left)} still wait"] if edit.left else []
    return f"{at} {plain(Path(edit.path.name))}: {', '.join([again, *took, *left])}"
