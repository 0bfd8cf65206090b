"""The chat screen: the conversation, the prompt, and one line about what goes on.

Knows when which message is shown; what they look like is in widgets and style.tcss, where answers come from is in
worker. Messages of a turn that is over are dropped.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Footer, Static

from quire.tui.widgets import Answer, Note, Prompt, Question, StatusLine, Trouble, place
from quire.tui.worker import NO_TURN, Changed, Failed, Noted, State, Told, Turn, Worker
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Session

_DRAIN_SECONDS = 0.1
_MOST_MESSAGES = 200  # older ones leave the screen


class ChatScreen(Screen[None]):
    """One conversation at a time. Everything that changes it runs as this screen's own messages, one by one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+n", "new", "New chat"),
        Binding("pageup", "page(-1)", "Scroll up", show=False, priority=True),
        Binding("pagedown", "page(1)", "Scroll down", show=False, priority=True),
    ]

    def __init__(self, open_session: "Callable[[], Session]") -> None:
        super().__init__()
        self.worker = Worker(open_session, self.post_message)
        self.state = State()
        self._turn: Turn | None = None
        self._answer: Answer | None = None
        self._saved_ms = 0.0

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="conversation", can_focus=False):
            yield Welcome()
        yield StatusLine()
        yield Prompt()
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.prompt.focus()
        self._conversation.anchor()
        self._show_state()
        self.set_interval(_DRAIN_SECONDS, self._drain)
        self.call_after_refresh(self.worker.start)  # what it imports takes longer than painting

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def _conversation(self) -> VerticalScroll:
        return self.query_one("#conversation", VerticalScroll)

    # What the keys do

    @on(Prompt.Changed)
    def _typing(self) -> None:
        self.worker.typed()

    @on(Prompt.Sent)
    async def _send(self, sent: Prompt.Sent) -> None:
        command, _, rest = sent.text.partition(" ")
        if self._turn:
            self.notify("Esc stops the answer; then Enter sends.", timeout=4)
        elif command == "/add":
            self.prompt.put("")
            self.worker.add(Path(os.path.expanduser(rest.strip().strip("\"'") or ".")))
        elif command.startswith("/") and command[1:].isalpha():
            await self._show(Trouble(QuireError(f"There is no command {command}.", "/add PATH adds a folder or file.")))
        else:
            await self._ask(sent.text)

    async def _ask(self, question: str) -> None:
        self.prompt.last = question
        self.prompt.put("")
        self._answer = Answer()
        await self._show(Question(question), self._answer)
        self._conversation.anchor()
        self._turn = self.worker.ask(question)

    def action_stop(self) -> None:
        """Ends the answer and keeps what there is; without one, the prompt gets the focus back."""
        if self._turn:
            self._turn.stop.set()
        self.prompt.focus()

    def action_new(self) -> None:
        """Clears the screen; what is still being answered is stopped and never seen."""
        self.call_later(self._clear)  # keys come in between the steps of an answer, this does not

    def action_page(self, direction: int) -> None:
        scroll = self._conversation.scroll_page_up if direction < 0 else self._conversation.scroll_page_down
        scroll(animate=False)

    async def _clear(self) -> None:
        if self._turn:
            self._turn.stop.set()
        self._turn = self._answer = None
        with self.app.batch_update():
            await self._conversation.remove_children()
            await self._conversation.mount(Welcome())
        self._show_state()
        self.prompt.focus()

    # What the worker says

    @on(Changed)
    def _changed(self, message: Changed) -> None:
        self.state = message.state
        self._show_state()

    @on(Told)
    async def _told(self, message: Told) -> None:
        from quire.session import Found
        from quire_engine.types import Forecast

        if not self._turn or not self._answer or self._turn.id != message.turn:
            return
        if isinstance(message.event, Found):
            self._answer.found(message.event)
        elif isinstance(message.event, Forecast):
            self._answer.forecast(message.event)
        else:
            await self._drain()
            answer, self._turn, self._answer = self._answer, None, None
            self._saved_ms += await answer.finish(message.event)
            self._show_state()

    @on(Failed)
    async def _failed(self, message: Failed) -> None:
        """An error ends the answer and gives the question back, unless something new was typed."""
        if message.turn != NO_TURN:
            if not self._turn or not self._answer or self._turn.id != message.turn:
                return
            await self._drain()
            answer, turn, self._turn, self._answer = self._answer, self._turn, None, None
            await answer.break_off()
            if not self.prompt.text:
                self.prompt.put(turn.question)
        await self._show(Trouble(message.error))

    @on(Noted)
    async def _noted(self, message: Noted) -> None:
        await self._show(Note(message.lines))

    async def _drain(self) -> None:
        """Shows the text that came since the last time."""
        if not self._turn or not self._answer:
            return
        pieces = []
        while not self._turn.pieces.empty():
            pieces.append(self._turn.pieces.get())
        if pieces:
            await self._answer.write("".join(pieces))

    # What is seen

    def _show_state(self) -> None:
        self.query_one(StatusLine).show(self.state, self._saved_ms)
        for welcome in self.query(Welcome):
            welcome.show(self.state)

    async def _show(self, *messages: Question | Answer | Note | Trouble) -> None:
        await self._conversation.mount(*messages)
        for old in list(self._conversation.children)[:-_MOST_MESSAGES]:
            await old.remove()


class Welcome(Static):
    """What an empty conversation says about itself."""

    def show(self, state: State) -> None:
        parts: list[str | tuple[str, str]] = [
            ("Quire answers from your own documents.\n", "bold"),
            "Nothing leaves this computer. What a model computes while it reads a passage is kept on disk, so that"
            " the first word of an answer comes sooner than if everything were read again.\n\n",
        ]
        if state.roots:
            parts += ["Your folders: ", (", ".join(map(place, state.roots)), "bold"), ". Ask them something.\n"]
            parts += [
                "More: ",
                ("/add ~/notes", "$text-accent"),
                "   What is cached: ",
                ("Ctrl+L", "$text-accent"),
                "\n",
            ]
        elif state.model:
            parts += ["No folder was added yet. To read the one you are in, type\n\n"]
            parts += [(f"    /add {place(Path.cwd())}", "$text-accent"), "\n\n"]
            parts += ["or any other path. ", ("Ctrl+L", "$text-accent"), " shows folders and what is cached.\n"]
        if state.bundled:
            parts += [
                "\nThe model that came along is small: it finds plain facts in short passages and gets much else"
                " wrong. A better one: quire --model FILE.gguf, or model in config.toml.\n"
            ]
        parts += [("\nF1 help · Ctrl+P commands and themes · Ctrl+Q quit", "dim")]
        self.update(Content.assemble(*parts))
