"""Where questions are typed: the prompt, what it offers after an @, what the question would take, the status line.

Knows the keys and the texts; when a question may be asked, and what it would take, is for the screen and the engine
thread. Names of documents come through `printable` and are never read as Textual markup.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.timer import Timer
from textual.widgets import OptionList, Static, TextArea

from quire.mentions import Place, Places, Unfinished, unfinished
from quire.terminal import printable, typed
from quire.tui.messages import State
from quire.tui.words import activity, place

if TYPE_CHECKING:
    from quire.session import Estimate
    from quire.whole import Plan

ALL = "/all"  # before a question to all documents: whole.COMMAND
_MOST_OFFERS = 6
MOST_PAST = 500  # questions that Up walks through
_STILL_SECONDS = 0.4  # without a key, before it is worth asking what the question would take


class Offers(OptionList):
    """The documents and folders that fit what stands after an @. It never has the focus: the prompt moves it."""

    def __init__(self) -> None:
        super().__init__(compact=True)
        self.can_focus = False
        self.display = False
        self.places: list[Place] = []

    def show(self, places: list[Place], choose: bool) -> None:
        """choose: whether the first is chosen; else none is until somebody moves."""
        if places != self.places:
            self.places = places
            self.set_options([Content(place.name) for place in places])
        self.highlighted = (0 if choose else None) if self.highlighted is None or choose else self.highlighted
        self.display = bool(places)

    def close(self) -> None:
        self.show([], False)

    @property
    def chosen(self) -> Place | None:
        return self.places[self.highlighted] if self.display and self.highlighted is not None else None


class Prompt(TextArea):
    """Where questions are typed. Enter sends, Shift+Enter or Ctrl+J starts a new line, Up brings back earlier ones."""

    HELP = """\
## The prompt

Type a question about your documents and press Enter. `/add ~/notes` adds a folder or file, `/sample` some
texts to try it with.
**@** and some letters offer documents and folders: **Tab** or **Enter** takes one, **Esc** closes the list. A question
with `@notes/tea.md` or `@notes/` is answered from there alone.
**/all** before a question, or the words "in all files" in it, has every passage read for it, not only those that are
found: slow, but the answer says what became of every document.
**Shift+Enter** or **Ctrl+J** starts a new line. **Up** in the first line and **Down** in the last walk through earlier
questions; what was being typed comes last.
**Esc** stops an answer and keeps what there is. **Shift+Tab** goes up to its sources, **PageUp** scrolls.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send"),
        Binding("shift+enter,ctrl+j", "newline", "New line", show=False),
    ]

    class Sent(Message):
        """Somebody pressed Enter; the text has left the prompt. See give_back."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Recalling(Message):
        """Somebody walks back for the first time: recall() wants the questions of earlier conversations."""

    class Still(Message):
        """Nothing was typed for a moment."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, state: Callable[[], State] = State) -> None:
        """state: tells which documents there are."""
        super().__init__(placeholder="Ask your documents", highlight_cursor_line=False, compact=True)
        self.offers = Offers()
        self._state = state
        self._past: list[str] = []
        self._recalled = False
        self._back = 0  # how many questions ago what is shown was asked; 0: it is being typed
        self._drafts: dict[int, str] = {}  # what became of them, until one is sent
        self._refused: tuple[int, int] | None = None  # where the mention stands whose offers were closed
        self._known: tuple[list[Path], Sequence[Path], Places] = ([], (), Places((), ()))
        self._still: Timer | None = None

    # Texts

    def put(self, text: str) -> None:
        """Replaces what is there, with the cursor at its end."""
        self.text = typed(text)
        self.move_cursor(self.document.end)

    def give_back(self, text: str) -> None:
        """A text that could not be sent, before whatever was typed since."""
        self.put(f"{text}\n{self.text}" if self.text else text)

    def remember(self, question: str) -> None:
        """A question that was asked, for Up."""
        self._past = [*(past for past in self._past if past != question), question][-MOST_PAST:]
        self._back = 0
        self._drafts.clear()

    def recall(self, questions: Sequence[str]) -> None:
        """Questions of earlier conversations, the newest last."""
        waited = not self._past and not self.text
        self._past = [*(past for past in questions if past not in self._past), *self._past]
        if waited:
            self._walk(1)

    def _walk(self, step: int) -> None:
        """Shows an older question, or (-1) a newer one."""
        back = self._back + step
        if not self._recalled:
            self._recalled = True
            self.post_message(self.Recalling())
        if 0 <= back <= len(self._past):
            self._drafts[self._back] = self.text
            self._back = back
            self.put(self._drafts.get(back, self._past[-back] if back else ""))
            self._refused = self._mention_at()  # moving on is not typing

    # Keys

    async def _on_key(self, event: events.Key) -> None:  # runs before TextArea's own
        # Not bindings: these run in the application's task, perhaps before the keys ahead of them have come here.
        if action := self._action(event.key):
            event.stop()
            event.prevent_default()
            action()

    def _action(self, key: str) -> Callable[[], object] | None:
        if key in ("shift+enter", "ctrl+j"):
            return self.action_newline
        if key in ("enter", "tab", "escape", "up", "down"):
            self.offer()
            if self.offers.display and (action := self._offered_action(key)):
                return action
        return self.action_send if key == "enter" else None

    def _offered_action(self, key: str) -> Callable[[], object] | None:
        """What a key does while the list is open."""
        match key:
            case "up":
                return self.offers.action_cursor_up
            case "down":
                return self.offers.action_cursor_down
            case "escape":
                return self._close_offers
            case "tab":
                return lambda: self._take(self.offers.chosen or self.offers.places[0])
            case "enter" if chosen := self.offers.chosen:
                return lambda: self._take(chosen)
            case _:
                return None

    def action_send(self) -> None:
        if text := self.text.strip():
            self.put("")  # at once: what is typed from now on belongs to the next question
            self.post_message(self.Sent(text))

    def action_newline(self) -> None:
        self.insert("\n")

    def action_cursor_up(self, select: bool = False) -> None:
        if self.navigator.is_first_wrapped_line(self.cursor_location) and not select:
            self._walk(1)
        else:
            super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        if self.navigator.is_last_wrapped_line(self.cursor_location) and not select:
            self._walk(-1)
        else:
            super().action_cursor_down(select)

    async def _on_paste(self, event: events.Paste) -> None:  # runs before TextArea's own
        event.text = typed(event.text)

    # Mentions

    @on(TextArea.Changed)
    @on(TextArea.SelectionChanged)
    def _edited_or_moved(self, event: Message) -> None:
        self.offer()
        if isinstance(event, TextArea.Changed):
            self._restart_stillness()

    def offer(self) -> None:
        """Shows what fits the mention at the cursor."""
        mention = self._mention()
        if mention is None:
            self._refused = None
            self.offers.close()
        elif self._refused == self._mention_at() or self._places().named(mention.letters):
            self.offers.close()  # a name that is complete can be sent
        else:
            fitting = self._places().fitting(mention.letters, _MOST_OFFERS)
            news = fitting != self.offers.places
            if news or not self.offers.display:
                self.offers.show(fitting, choose=bool(mention.letters))

    def _mention(self) -> Unfinished | None:
        row, column = self.cursor_location
        if not self.selection.is_empty:
            return None
        return unfinished(self.document.get_line(row)[:column])

    def _mention_at(self) -> tuple[int, int] | None:
        mention = self._mention()
        return (self.cursor_location[0], mention.start) if mention else None

    def _take(self, place: Place) -> None:
        if (mention := self._mention()) is not None:
            row, _ = self.cursor_location
            done = self.replace(self._places().mention(place) + " ", (row, mention.start), self.cursor_location)
            self.move_cursor(done.end_location)
        self.offers.close()

    def _close_offers(self) -> None:
        self._refused = self._mention_at()
        self.offers.close()

    def _places(self) -> Places:
        """Made anew only when there are other documents."""
        state = self._state()
        documents = [row.path for row in state.rows if row.letter != "S"]
        if documents != self._known[0] or state.roots != self._known[1]:
            self._known = documents, state.roots, Places(documents, state.roots)
        return self._known[2]

    # Stillness

    def _restart_stillness(self) -> None:
        if self._still:
            self._still.stop()
        self._still = self.set_timer(_STILL_SECONDS, lambda: self.post_message(self.Still(self.text.strip())))


class PromptBox(Vertical):
    """The prompt with what belongs to it: offers above, and one line about what the question would take."""

    def __init__(self, state: Callable[[], State]) -> None:
        super().__init__()
        self.prompt = Prompt(state)
        self._weight = Static(id="weight", markup=False)
        self._weight.display = False

    def compose(self) -> ComposeResult:
        yield self.prompt.offers
        yield self._weight
        yield self.prompt

    def show(self, text: str, estimate: "Estimate | Plan") -> None:
        """What the text would take, unless it is not the text any more."""
        if text == self.prompt.text.strip():
            self._weight.update(weight(estimate))
            self._weight.set_class(estimate.warns, "warning")
            self._weight.display = True

    @on(TextArea.Changed)
    def _hide(self) -> None:
        self._weight.display &= bool(self.prompt.text.strip())

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.prompt._take(self.prompt.offers.places[event.option_index])


def weight(estimate: "Estimate | Plan") -> str:
    """About 0.9 s · 1,269 tokens reused, 240 computed · 1,509 of 8,192 tokens. Of all documents: All files: ..."""
    from quire.render import duration
    from quire.whole import Plan

    if isinstance(estimate, Plan):
        return weight_of_all(estimate)
    room = f"{estimate.prompt_tokens:,} of {estimate.room_tokens:,} tokens"
    if estimate.too_long:
        return f"Too long for this model: {room}. Shorten the question."
    time = f"About {duration(estimate.first_token_ms)}" if estimate.first_token_ms else ""
    reused = estimate.prompt_tokens - estimate.computed_tokens
    made_of = f"{reused:,} tokens reused, {estimate.computed_tokens:,} computed" if time and reused else ""
    return " · ".join(filter(None, (time, made_of, room)))


def weight_of_all(plan: "Plan") -> str:
    """All files · at least 12.0 s · 34 passages of 12 documents in 5 parts"""
    from quire.render import duration, plan_counts

    least = f"at least {duration(plan.least_ms)}" if plan.least_ms else ""
    return " · ".join(filter(None, (printable(plan.leaves), "All files", least, plan_counts(plan))))


class StatusLine(Static):
    """Folders, what is cached, the model, and how much sooner first words came than after full prefill. Where a server
    answers, that."""

    def show(self, state: State, saved_ms: float, served: bool = False) -> None:
        self.update(Content(" · ".join(filter(None, status_parts(state, saved_ms, served)))))


def status_parts(state: State, saved_ms: float, served: bool = False) -> tuple[str, ...]:
    """The most useful first: what does not fit is cut off."""
    folders = place(state.roots[0]) if len(state.roots) == 1 else f"{len(state.roots)} folders"
    cached = f"{state.done}/{state.total} cached" if state.total else ""
    model = printable(state.model) or "loading the model"
    return (
        f"a server answers: {model}" if served else "not cached with this model" if state.reuse_off else cached,
        activity(state),
        f"saved {saved_ms / 1000:.1f} s of full prefill" if saved_ms else "",
        "" if served else model,
        folders if state.roots else "no folder yet",
    )
