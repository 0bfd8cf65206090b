"""The conversations screen: find an earlier conversation, open it, rename, delete, export and import it.

Typing searches; the keys that change something work in the list. What is asked, a name or whether to delete, is asked
in place. Knows the history through the archive, and nothing of how a conversation looks in the chat.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Input, OptionList, Static

from quire.terminal import printable
from quire.tui.archive import Archive
from quire.tui.messages import START
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.history import Conversation, History, HistoryHit

_MOST_ROWS = 300  # a search finds the others


@dataclass(frozen=True)
class Entry:
    """A conversation, or one of its turns that was found. turn: START for all of it.  about: what stands below."""

    conversation: int
    turn: int
    title: str
    about: str


Step = Callable[[str], Awaitable[bool]]  # what an answer to a question in place does; False: it is asked again


class ConversationList(OptionList):
    """The conversations, the last one first. Deleting is asked for in the row."""

    HELP = """\
## Conversations

**Enter** opens, `r` renames, `d` deletes (asked once more), `x` writes Markdown to a file, `X` JSON with all branches,
`i` reads a conversation from such a file. **Up** above the first goes to the search, which looks into titles,
questions and answers.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Open"),
        Binding("r", "change('rename')", "Rename"),
        Binding("d", "change('delete')", "Delete"),
        Binding("x", "change('markdown')", "Export"),
        Binding("X", "change('json')", "Export as JSON", show=False),
        Binding("i", "change('import')", "Import", show=False),
    ]

    class Wished(Message):
        """Something is to be done with the highlighted entry."""

        def __init__(self, change: str, entry: Entry | None) -> None:
            super().__init__()
            self.change = change
            self.entry = entry

    def __init__(self) -> None:
        super().__init__()
        self.entries: Sequence[Entry] = ()
        self._doomed = False  # the highlighted one, if it is confirmed

    @property
    def entry(self) -> Entry | None:
        return self.entries[self.highlighted] if self.highlighted is not None else None

    def show(self, entries: Sequence[Entry]) -> None:
        """The highlight stays at its place, as far as there is one."""
        at, self._doomed = self.highlighted or 0, False
        self.entries = entries
        self.set_options(map(_row, entries))
        self.highlighted = min(at, len(entries) - 1) if entries else None

    def action_change(self, change: str) -> None:
        if change == "delete" and self.entry and not self._doomed:
            self._doom(self.entry)
        elif self.entry or change == "import":
            self.post_message(self.Wished(change, self.entry))

    def _doom(self, entry: Entry) -> None:
        assert self.highlighted is not None
        self._doomed = True
        question = ("Delete it with all its branches? d or y deletes, any other key keeps it.", "bold")
        title = printable(entry.title) or "(no question yet)"
        self.replace_option_prompt_at_index(self.highlighted, Content.assemble(title, "\n  ", question))

    def _spare(self) -> None:
        if self._doomed and self.highlighted is not None:
            self._doomed = False
            self.replace_option_prompt_at_index(self.highlighted, _row(self.entries[self.highlighted]))

    def on_key(self, event: events.Key) -> None:
        if self._doomed and event.key in ("y", "d"):
            event.prevent_default().stop()
            self._doomed = False
            self.post_message(self.Wished("delete", self.entry))
        elif self._doomed:
            event.prevent_default().stop()
            self._spare()

    def on_blur(self) -> None:
        self._spare()

    def action_cursor_up(self) -> None:
        if self.highlighted in (None, 0):
            self.screen.focus_previous()
        else:
            super().action_cursor_up()


class Search(Input):
    """What is looked for. Down goes to the list."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("down", "app.focus_next", "To the list")]

    def __init__(self) -> None:
        super().__init__(placeholder="Search titles, questions and answers", compact=True, select_on_focus=False)


class ConversationsScreen(Screen[None]):
    """Earlier conversations; opened over the chat."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back"),
        Binding("ctrl+o", "dismiss", show=False),
        Binding("ctrl+n", "new", "New"),
    ]

    class Chosen(Message):
        """A conversation is to be opened, at a turn or (START) where it was left."""

        def __init__(self, conversation: int, turn: int) -> None:
            super().__init__()
            self.conversation = conversation
            self.turn = turn

    class Begun(Message):
        """A new conversation is wanted."""

    class Deleted(Message):
        """A conversation is gone."""

        def __init__(self, conversation: int) -> None:
            super().__init__()
            self.conversation = conversation

    def __init__(self, archive: Archive) -> None:
        super().__init__()
        self._archive = archive
        self._step: Step | None = None

    def compose(self) -> ComposeResult:
        yield Search()
        yield ConversationList()
        yield Static(id="said", markup=False)
        yield Input(id="asked", compact=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._asked.display = False
        self.query_one(Search).focus()
        self._look()

    @property
    def _list(self) -> ConversationList:
        return self.query_one(ConversationList)

    @property
    def _asked(self) -> Input:
        return self.query_one("#asked", Input)

    def _say(self, text: str) -> None:
        self.query_one("#said", Static).update(printable(text))

    # Looking

    @on(Input.Changed, "Search")
    def _look(self) -> None:
        self.run_worker(self._fill(), group="look", exclusive=True)

    async def _fill(self) -> None:
        words = self.query_one(Search).value.strip()
        try:
            entries = await self._archive.do(lambda history: found(history, words) if words else latest(history))
        except QuireError as error:
            self._say(f"{error.message} {error.hint}")
            return
        self._list.show(entries)
        nothing = f"Nothing holds {words!r}." if words else "No conversation yet: ask something, and it is kept here."
        self._say("" if entries else nothing)

    @on(Input.Submitted, "Search")
    def _submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self._open()

    @on(OptionList.OptionSelected)
    def _open(self) -> None:
        if entry := self._list.entry:
            self.app.post_message(self.Chosen(entry.conversation, entry.turn))
            self.dismiss()

    def action_new(self) -> None:
        self.app.post_message(self.Begun())
        self.dismiss()

    def action_leave(self) -> None:
        """Back to the list from a question in place, else to the chat."""
        if self._step:
            self._end_asking()
        else:
            self.dismiss()

    # Changing

    @on(ConversationList.Wished)
    async def _change(self, message: ConversationList.Wished) -> None:
        entry = message.entry
        if message.change == "import":
            self._ask("Read the conversation in this JSON file:", "", self._import)
        elif not entry:
            return
        elif message.change == "delete":
            await self._delete(entry)
        elif message.change == "rename":
            self._ask("The new title (none: its first question):", entry.title, lambda name: self._rename(entry, name))
        else:
            suffix = ".md" if message.change == "markdown" else ".json"
            name = re.sub(r"[^\w.-]+", "-", printable(entry.title)).strip("-.")[:40] or "conversation"
            writer = _Writer(entry, suffix, name + suffix)
            about = "the branch where it was left" if suffix == ".md" else "all branches"
            self._ask(f"Write {about} to:", writer.name, lambda path: self._export(writer, path))

    async def _delete(self, entry: Entry) -> None:
        from quire.history import Gone

        try:
            await self._archive.do(lambda history: history.delete(entry.conversation))
        except Gone:
            pass  # another window was faster
        except QuireError as error:
            self._say(f"{error.message} {error.hint}")
            return
        self.app.post_message(self.Deleted(entry.conversation))
        await self._fill()
        self._say(f"Deleted: {entry.title}")

    async def _rename(self, entry: Entry, name: str) -> bool:
        await self._archive.do(lambda history: history.rename(entry.conversation, name))
        await self._fill()
        return True

    async def _import(self, name: str) -> bool:
        text = _path(name).read_text(encoding="utf-8")
        await self._archive.do(lambda history: history.import_json(text))
        await self._fill()
        self._list.highlighted = 0
        return True

    async def _export(self, writer: "_Writer", name: str) -> bool:
        path = _path(name)
        path = path / writer.name if path.is_dir() else path
        text = await self._archive.do(writer.text)
        try:
            with path.open("w" if path == writer.confirmed else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            writer.confirmed = path
            self._say(f"{path} exists. Enter once more replaces it; or give another name.")
            return False
        self._say(f"Written: {path}")
        return True

    # Asking in place

    def _ask(self, what: str, value: str, step: Step) -> None:
        self._step = step
        self._say(what)
        self._asked.value = printable(value)
        self._asked.display = True
        self._asked.focus()

    @on(Input.Submitted, "#asked")
    async def _answered(self, message: Input.Submitted) -> None:
        self._say("")
        try:
            done = await self._step(message.value.strip()) if self._step else True
        except QuireError as error:
            done = False
            self._say(f"{error.message} {error.hint}")
        except (OSError, UnicodeError) as error:
            done = False
            self._say(f"{error}. Name another file, or Esc.")
        if done:
            self._end_asking(quietly=True)

    def _end_asking(self, quietly: bool = False) -> None:
        self._step = None
        self._asked.display = False
        self._list.focus()
        if not quietly:
            self._say("")


@dataclass
class _Writer:
    """Writes a conversation. name: of the file, unless another is given.  confirmed: a file that may be replaced."""

    entry: Entry
    suffix: str
    name: str
    confirmed: Path | None = None

    def text(self, history: "History") -> str:
        write = history.export_markdown if self.suffix == ".md" else history.export_json
        return write(self.entry.conversation)


def _path(name: str) -> Path:
    """As somebody types it, from the current directory."""
    return Path(name).expanduser().absolute()


# What is listed


def latest(history: "History") -> list[Entry]:
    now = datetime.now().astimezone()
    return [_entry(conversation, now) for conversation in history.conversations(_MOST_ROWS)]


def found(history: "History", words: str) -> list[Entry]:
    return [_entry_of(hit) for hit in history.search(words, _MOST_ROWS)]


def _entry(conversation: "Conversation", now: datetime) -> Entry:
    turns = f"{conversation.turns} {'question' if conversation.turns == 1 else 'questions'}"
    return Entry(conversation.id, START, conversation.title, f"{moment(conversation.updated_at, now)} · {turns}")


def _entry_of(hit: "HistoryHit") -> Entry:
    return Entry(hit.conversation, hit.turn, hit.title, hit.snippet if hit.turn else "")


def moment(then: datetime, now: datetime) -> str:
    """today 14:02, yesterday 14:02, 3 Nov 14:02, 3 Nov 2025; in the time zone of `now`."""
    then = then.astimezone(now.tzinfo)
    if now.date() - then.date() <= timedelta(days=1):
        return f"{'today' if then.date() == now.date() else 'yesterday'} {then:%H:%M}"
    day = f"{then.day} {then:%b}"
    return f"{day} {then:%H:%M}" if then.year == now.year else f"{day} {then.year}"


def _row(entry: Entry) -> Content:
    title = printable(entry.title) or "(no question yet)"
    about = " ".join(printable(entry.about).split())
    return Content.assemble((title, "bold"), "\n  ", (about or "the title", "dim"))
