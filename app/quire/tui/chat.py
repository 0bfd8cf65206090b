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
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, Static

from quire import models, paths
from quire.terminal import printable
from quire.tui.archive import Archive
from quire.tui.messages import NO_TURN, START, Changed, Failed, Noted, State, Told, Turn, Weighed
from quire.tui.prompt import MOST_PAST, Prompt, PromptBox, StatusLine
from quire.tui.widgets import Answer, Earlier, Note, Question, Trouble, TurnPart, Wish, place
from quire.tui.worker import Worker
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.conversation import Line
    from quire.session import Session

_DRAIN_SECONDS = 0.1
_MOST_MESSAGES = 200  # older ones leave the screen
_FIRST_TURNS = 10  # of a conversation that is opened; drawing one takes up to 50 ms


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

    def __init__(self, open_session: "Callable[[], Session]") -> None:
        super().__init__()
        self.worker = Worker(open_session, self.post_message)
        self.state = State()
        self._turn: Turn | None = None
        self._answer: Answer | None = None
        self._saved_ms = 0.0
        self.archive = Archive()
        self.conversation_id = START
        self._leaf = START  # the turn that the next question follows
        self._detour: _Detour | None = None
        self._earlier: Line | None = None

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="conversation", can_focus=False):
            yield Welcome()
        yield Static(id="detour")
        yield StatusLine()
        yield PromptBox(lambda: self.state)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.prompt.focus()
        self._conversation.anchor()
        self._show_state()
        self._set_detour(None)
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

    @on(Prompt.Still)
    def _still(self, still: Prompt.Still) -> None:
        if not self._turn and still.text and not still.text.startswith("/"):
            self.worker.weigh(still.text, self._leaf)

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
        elif command.startswith("/") and command[1:].isalpha():
            self.prompt.give_back(sent.text)
            await self._show(Trouble(QuireError(f"There is no command {command}.", "/add PATH adds a folder or file.")))
        else:
            self.prompt.remember(sent.text)
            await self._ask(sent.text)

    async def _ask(self, question: str) -> None:
        after = self._detour.after if self._detour else self._leaf
        self.set_focus(self.prompt)  # a message that leaves would hand the focus on, and the screen would go there
        await self._conversation.query(".beyond").remove()
        self._set_detour(None)
        asked = Question(question, after)
        self._answer = Answer(asked)
        await self._show(asked, self._answer)
        self._conversation.anchor()
        self._turn = self.worker.ask(question, self.conversation_id, after)

    def action_stop(self) -> None:
        """Ends the answer and keeps what there is, or leaves an edit; the prompt gets the focus back."""
        if self._turn:
            self._turn.stop.set()
        elif self._detour and self.prompt.has_focus:
            self.prompt.put(self._detour.draft)
            self._set_detour(None)
        self.prompt.focus()

    def action_new(self) -> None:
        """Clears the screen; what is still being answered is stopped and never seen."""
        self.call_later(self._clear)  # keys come in between the steps of an answer, this does not

    def action_page(self, direction: int) -> None:
        scroll = self._conversation.scroll_page_up if direction < 0 else self._conversation.scroll_page_down
        scroll(animate=False)

    async def _clear(self) -> None:
        self._leave()
        with self.app.batch_update():
            await self._conversation.remove_children()
            await self._conversation.mount(Welcome())
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
            await self._show(Trouble(error))
            return
        self._leave()
        self.conversation_id = conversation
        self._leaf = line.turns[-1].id if line.turns else START
        with self.app.batch_update():
            await self._conversation.remove_children()
            await self._show_line(line, through)
        self.prompt.focus()

    async def deleted(self, conversation: int) -> None:
        """A conversation was deleted; the screen does not go on showing it."""
        if conversation == self.conversation_id != START:
            await self._clear()

    async def _show_line(self, line: "Line", through: int) -> None:
        """The end of a branch, from a turn that is looked for, or the last ones."""
        ids = [turn.id for turn in line.turns]
        first = max(0, len(ids) - _FIRST_TURNS)
        first = min(first, ids.index(through)) if through else first
        self._earlier = line
        await self._conversation.mount(*([Earlier(first)] if first else []))
        await self._mount_turns(line, first, len(ids))
        if through:
            self._conversation.release_anchor()
            found = next(q for q in self.query(Question) if q.turn == through)
            self.call_after_refresh(self._conversation.scroll_to_widget, found, animate=False, top=True)
        else:
            self._conversation.anchor()

    async def _mount_turns(self, line: "Line", first: int, end: int, before: Widget | None = None) -> None:
        for turn, siblings in zip(line.turns[first:end], line.siblings[first:end], strict=True):
            question = Question(turn.question, turn.parent)
            answer = Answer(question)
            await self._conversation.mount(question, answer, before=before)
            question.keep(turn.id, siblings)
            await answer.restore(turn)

    @on(Earlier.Wanted)
    async def _show_earlier(self, message: Earlier.Wanted) -> None:
        assert self._earlier
        shown, rest = next(iter(self.query(Question))), max(0, message.earlier.count - _FIRST_TURNS)
        with self.app.batch_update():
            self._conversation.release_anchor()
            await self._mount_turns(self._earlier, rest, message.earlier.count, before=shown)
            await message.earlier.remove()
            if rest:
                await self._conversation.mount(Earlier(rest), before=0)
        shown.focus()

    @on(TurnPart.Wished)
    async def _wish(self, message: TurnPart.Wished) -> None:
        part, wish = message.part, message.wish
        if wish == "copy":
            self.app.copy_to_clipboard(printable(part.said))
            self.notify("Copied.", timeout=2)
        elif wish in ("up", "down"):
            self._go(part, -1 if wish == "up" else 1)
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
                self._set_detour(_Detour(part.turn, self.prompt.text), beyond=self._below(part))
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
                for shown in self.query(Question):
                    if shown.turn == question.branches[to]:
                        shown.focus()

    def _go(self, part: TurnPart, step: int) -> None:
        parts = [*self.query(TurnPart)]
        to = parts.index(part) + step
        if to >= len(parts):
            self.prompt.focus()
        elif to >= 0:
            parts[to].focus()

    def _below(self, part: TurnPart) -> Widget | None:
        """The first message below the answer to which this part belongs."""
        messages = [*self._conversation.children]
        last = max(at for at, message in enumerate(messages) if getattr(message, "question", None) is part.question)
        return messages[last + 1] if last + 1 < len(messages) else None

    def _set_detour(self, detour: _Detour | None, beyond: Widget | None = None) -> None:
        """Where the next question goes. beyond: the first message that will not stand above it, and pales."""
        self._detour = detour
        paling = False
        for message in self._conversation.children:
            paling = paling or message is beyond
            message.set_class(paling, "beyond")
        line = self.query_one("#detour", Static)
        line.update("Enter asks this as another branch; Esc leaves everything as it is.")
        line.display = detour is not None

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
        from quire_engine.types import Forecast

        if not self._turn or not self._answer or self._turn.id != message.turn:
            return
        if isinstance(message.event, Kept):
            self.conversation_id, self._answer.turn = message.event.conversation, message.event.turn
            self._answer.question.keep(message.event.turn, message.event.siblings)
        elif isinstance(message.event, Unkept):
            await self._show(Trouble(message.event.error))
        elif isinstance(message.event, Found):
            self._answer.found(message.event)
        elif isinstance(message.event, Forecast):
            self._answer.forecast(message.event)
        else:
            await self._drain()
            answer, self._turn, self._answer = self._answer, None, None
            self._leaf = answer.turn or self._leaf
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
            if not answer.said:  # then it was taken back, perhaps with its conversation
                self.conversation_id, answer.turn = turn.conversation, START
                answer.question.keep(START, ())
            if not self.prompt.text:
                self.prompt.put(turn.question)
        await self._show(Trouble(message.error))

    @on(Weighed)
    def _weighed(self, message: Weighed) -> None:
        self.query_one(PromptBox).show(message.text, message.estimate)

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

    async def _show(self, *messages: Widget) -> None:
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
            parts += ["No folder was added yet. To read the one you are in, or any other, type\n\n"]
            parts += [(f"    /add {place(Path.cwd())}", "$text-accent"), "\n\n"]
            parts += [("/sample", "$text-accent"), " reads four short texts to try it with; "]
            parts += [("Ctrl+L", "$text-accent"), " shows folders and what is cached.\n"]
        if state.bundled:
            parts += [
                "\nThe model that came along is small: it finds plain facts in short passages and gets much else"
                " wrong. ",
                *_better_model(),
            ]
        parts += [("\nF1 help · Ctrl+P commands and themes · Ctrl+Q quit", "dim")]
        self.update(Content.assemble(*parts))


def _better_model() -> list[str | tuple[str, str]]:
    """Which one to take, and the key that fetches it."""
    best, keys = models.recommended(), ("F3", "$text-accent")
    if best is None:
        return [keys, " shows others.\n"]
    if best.path.exists():
        return [(best.title, "bold"), " is here: ", keys, " and Enter use it.\n"]
    about = f" fits this machine ({best.size_gb:g} GB): "
    return [(best.title, "bold"), about, ("F4", "$text-accent"), " fetches it, ", keys, " shows others.\n"]
