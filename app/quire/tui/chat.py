"""The chat screen: the conversation, the prompt, and one line about what goes on.

Knows when which message is shown; what they look like is in widgets and style.tcss, where answers come from is in
worker. Messages of a turn that is over are dropped.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, Static

from quire import paths
from quire.terminal import printable
from quire.tui.archive import Archive
from quire.tui.dialogue import Dialogue
from quire.tui.messages import NO_TURN, START, Changed, Failed, Noted, State, Told, Turn, Weighed
from quire.tui.prompt import ALL, MOST_PAST, Prompt, PromptBox, StatusLine
from quire.tui.welcome import Welcome
from quire.tui.widgets import Answer, Note, Question, Trouble, TurnPart, Undrawn, Wish
from quire.tui.worker import Worker
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Session

_DRAIN_SECONDS = 0.1


@dataclass(frozen=True)
class _Detour:
    """The next question goes after another turn than the last one. draft: what stood in the prompt before."""

    after: int
    draft: str


class ChatScreen(Screen[None]):
    """One conversation at a time. Everything that changes it runs as this screen's own messages, one by one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+n", "new", "New"),
        Binding("pageup", "page(-1)", "Scroll up", show=False, priority=True),
        Binding("pagedown", "page(1)", "Scroll down", show=False, priority=True),
    ]

    def __init__(self, open_session: "Callable[[], Session]", leaves: Callable[[], str] = str) -> None:
        """leaves: says what leaves this computer with a question, by the settings in force; nothing by itself."""
        super().__init__()
        self._leaves = leaves
        self._leaves_said = ""  # since the last change
        self.worker = Worker(open_session, self.post_message)
        self.state = State()
        self._turn: Turn | None = None
        self._answer: Answer | None = None
        self._saved_ms = 0.0
        self.archive = Archive()
        self.conversation_id = START
        self._leaf = START  # the turn that the next question follows
        self._detour: _Detour | None = None

    def compose(self) -> ComposeResult:
        yield Dialogue()
        yield Static(id="detour")
        yield StatusLine()
        yield PromptBox(lambda: self.state)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.prompt.focus()
        self._leaves_said = self._leaves()
        self._show_state()
        self._set_detour(None)
        self.set_interval(_DRAIN_SECONDS, self._drain)

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def _dialogue(self) -> Dialogue:
        return self.query_one(Dialogue)

    @property
    def _after(self) -> int:
        """The turn that the next question follows."""
        return self._detour.after if self._detour else self._leaf

    # What the keys do

    @on(Prompt.Changed)
    def _typing(self) -> None:
        self.worker.typed()

    @on(Prompt.Still)
    def _weigh(self) -> None:
        """Finds out what the text in the prompt would take where it would be asked."""
        text = self.prompt.text.strip()
        if text and not self._turn and (not text.startswith("/") or text.startswith(f"{ALL} ")):
            self.worker.weigh(text, self._after)

    @on(Prompt.Recalling)
    async def _recall(self) -> None:
        with suppress(QuireError):  # a history that cannot be read is told of where it is asked for
            self.prompt.recall(await self.archive.do(lambda history: history.questions(MOST_PAST)))

    @on(Prompt.Sent)
    async def _send(self, sent: Prompt.Sent) -> None:
        command, _, rest = sent.text.partition(" ")
        if self._turn:
            self.prompt.give_back(sent.text)
            self.notify("Esc stops the answer; then Enter sends.", timeout=4)
        elif command == "/add":
            self.worker.add(Path(os.path.expanduser(rest.strip().strip("\"'") or ".")))
        elif command == "/sample":
            self.worker.add(Path(str(paths.assets() / "sample")))
        elif sent.text == ALL:
            self.prompt.put(f"{ALL} ")
            self.notify("Type the question behind it.", timeout=4)
        elif command.startswith("/") and command[1:].isalpha() and command != ALL:
            self.prompt.give_back(sent.text)
            hint = f"/add PATH adds a folder or file, {ALL} and a question asks all of them."
            await self._dialogue.show(Trouble(QuireError(f"There is no command {command}.", hint)))
        else:
            self.prompt.remember(sent.text)
            await self._ask(sent.text)

    async def _ask(self, question: str) -> None:
        if not self._detour and not self._dialogue.ends:
            await self.open(self.conversation_id)
        after = self._after
        self.set_focus(self.prompt)  # a message that leaves would hand the focus on, and the screen would go there
        await self._dialogue.drop_pale()
        self._set_detour(None)
        asked = Question(question, after)
        self._answer = Answer(asked)
        await self._dialogue.show(asked, self._answer)
        self._dialogue.anchor()
        self._turn = self.worker.ask(question, self.conversation_id, after)

    def action_stop(self) -> None:
        """Ends the answer and keeps what there is, or leaves an edit; the prompt gets the focus back."""
        if self._turn:
            self._turn.stop.set()
        elif self._detour and self.prompt.has_focus:
            self.prompt.put(self._detour.draft)
            self._set_detour(None)
        self.prompt.focus()

    def action_ask_all(self) -> None:
        """Makes what stands in the prompt, perhaps nothing yet, a question to all documents."""
        if not self.prompt.text.startswith(ALL):
            self.prompt.put(f"{ALL} {self.prompt.text}")
        self.prompt.focus()

    def action_new(self) -> None:
        """Clears the screen; what is still being answered is stopped and never seen."""
        self.call_later(self._clear)  # keys come in between the steps of an answer, this does not

    def action_page(self, direction: int) -> None:
        scroll = self._dialogue.scroll_page_up if direction < 0 else self._dialogue.scroll_page_down
        scroll(animate=False)

    async def _clear(self) -> None:
        self._leave()
        await self._dialogue.clear()
        self._show_state()
        self.prompt.focus()

    def _leave(self) -> None:
        """Forgets the conversation. What is still being answered is stopped, kept, and not seen here."""
        if self._turn:
            self._turn.stop.set()
        self._turn = self._answer = None
        self.conversation_id = self._leaf = START
        self._set_detour(None)

    # Conversations and their branches

    async def open(self, conversation: int, through: int = START) -> None:
        """Shows a conversation: the newest branch through a turn, or the one that was left."""
        from quire.conversation import open_line

        try:
            line = await self.archive.do(lambda history: open_line(history, conversation, through))
        except QuireError as error:
            await self._dialogue.show(Trouble(error))
            return
        self._leave()
        self.conversation_id = conversation
        self._leaf = line.turns[-1].id if line.turns else START
        await self._dialogue.show_line(line, through)
        self.prompt.focus()

    async def deleted(self, conversation: int) -> None:
        """A conversation was deleted; the screen does not go on showing it."""
        if conversation == self.conversation_id != START:
            await self._clear()

    @on(Undrawn.Reached)
    async def _draw(self, message: Undrawn.Reached) -> None:
        await self._dialogue.draw(message.undrawn)

    @on(TurnPart.Wished)
    async def _wish(self, message: TurnPart.Wished) -> None:
        part, wish = message.part, message.wish
        if wish == "copy":
            self.app.copy_to_clipboard(printable(part.said))
            self.notify("Copied.", timeout=2)
        elif wish in ("up", "down"):
            (self._dialogue.next_to(part, -1 if wish == "up" else 1) or self.prompt).focus()
        elif self._turn:
            self.notify("Esc stops the answer first.", timeout=4)
        else:
            await self._branch(part, wish)

    async def _branch(self, part: TurnPart, wish: Wish) -> None:
        """What makes or shows another branch at a turn."""
        question = part.question
        if wish in ("older", "newer"):
            await self._switch(question, -1 if wish == "older" else 1)
        elif wish == "branch":
            if part.turn and part.turn != self._leaf:
                self._set_detour(_Detour(part.turn, self.prompt.text), beyond=self._dialogue.after(part))
            self.prompt.focus()
        else:
            self._set_detour(_Detour(question.after, self.prompt.text), beyond=question)
            if wish == "again":
                await self._ask(question.said)
            else:
                self.prompt.put(question.said)
            self.prompt.focus()

    async def _switch(self, question: Question, step: int) -> None:
        if question.turn in question.branches:
            to = question.branches.index(question.turn) + step
            if 0 <= to < len(question.branches):
                await self.open(self.conversation_id, question.branches[to])
                self._dialogue.question(question.branches[to]).focus()

    def _set_detour(self, detour: _Detour | None, beyond: Widget | None = None) -> None:
        """Where the next question goes. beyond: the first message that will not stand above it, and pales."""
        self._detour = detour
        self._dialogue.pale(beyond)
        line = self.query_one("#detour", Static)
        line.update("Enter asks this as another branch; Esc leaves everything as it is.")
        line.display = detour is not None
        self._weigh()

    # What the worker says

    @on(Changed)
    def _changed(self, message: Changed) -> None:
        self.state = message.state
        self._show_state()
        self.prompt.offer()  # there may be other documents

    @on(Told)
    async def _told(self, message: Told) -> None:
        from quire.conversation import Kept, Unkept
        from quire.session import Found
        from quire.whole import Account, Part, Plan
        from quire_engine.types import Forecast

        if not self._turn or not self._answer or self._turn.id != message.turn:
            return
        if isinstance(message.event, Kept):
            self.conversation_id, self._answer.turn = message.event.conversation, message.event.turn
            self._answer.question.keep(message.event.turn, message.event.siblings)
        elif isinstance(message.event, Unkept):
            await self._dialogue.show(Trouble(message.event.error))
        elif isinstance(message.event, Found):
            self._answer.found(message.event)
        elif isinstance(message.event, Forecast):
            self._answer.forecast(message.event)
        elif isinstance(message.event, Plan):
            self._answer.plan(message.event)
        elif isinstance(message.event, Part):
            self._answer.progress(message.event)
        elif isinstance(message.event, Account):
            self._answer.account(message.event)
        else:
            await self._drain()
            answer, self._turn, self._answer = self._answer, None, None
            self._leaf = answer.turn or self._leaf
            self._saved_ms += await answer.finish(message.event)
            self._show_state()
            self._weigh()

    @on(Failed)
    async def _failed(self, message: Failed) -> None:
        """An error ends the answer and gives the question back, unless something new was typed."""
        if message.turn != NO_TURN:
            if not self._turn or not self._answer or self._turn.id != message.turn:
                return
            await self._drain()
            answer, turn, self._turn, self._answer = self._answer, self._turn, None, None
            await answer.break_off()
            if not answer.said:  # then it was taken back, perhaps with its conversation
                self.conversation_id, answer.turn = turn.conversation, START
                answer.question.keep(START, ())
            if not self.prompt.text:
                self.prompt.put(turn.question)
        await self._dialogue.show(Trouble(message.error))

    @on(Weighed)
    def _weighed(self, message: Weighed) -> None:
        self.query_one(PromptBox).show(message.text, message.estimate)

    @on(Noted)
    async def _noted(self, message: Noted) -> None:
        await self._dialogue.show(Note(message.lines))

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
        leaves = self._leaves()
        self.query_one(StatusLine).show(self.state, self._saved_ms, bool(leaves))
        for welcome in self.query(Welcome):
            welcome.show(self.state, leaves)

    async def settings_changed(self) -> None:
        """Says what leaves this computer, when other settings have changed it."""
        before, self._leaves_said = self._leaves_said, self._leaves()
        self._show_state()
        if self._leaves_said != before and self._leaves_said and not self.query(Welcome):
            await self._dialogue.show(Note((self._leaves_said,)))
