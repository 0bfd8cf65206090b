"""The messages of a conversation: questions, answers with what they took, notes and errors.

Text of documents, file names and models comes through `printable` and is never read as Textual markup. What needs
NumPy (`render`) is imported when the first answer comes, which the engine thread has loaded by then.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.markup import escape
from textual.message import Message
from textual.widgets import Collapsible, Static

from quire.terminal import printable
from quire.tui import sources
from quire.tui.messages import START
from quire.tui.sources import Sources
from quire.tui.streaming import AnswerText
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.session import Found
    from quire.transcript import Mention
    from quire.transcript import Turn as StoredTurn
    from quire.whole import Account, Part, Plan
    from quire_engine.types import Answered, Forecast

_MOST_PARTIALS = 3  # that are seen while all documents are read

_ENDINGS = {"end": "", "length": "Cut off: too long. ", "stopped": "Stopped. "}

# Keys that work here too, but leave the footer to those of a message.
_AT_THE_PROMPT = (("ctrl+n", "screen.new"), ("ctrl+o", "app.conversations"), ("ctrl+l", "app.library"))

Wish = Literal["edit", "again", "branch", "copy", "older", "newer", "up", "down"]


class TurnPart(Vertical, can_focus=True):
    """A question or an answer, within reach of the keyboard. said: its text, as it came.  question: of this turn.
    turn: its number in the history, START: none yet."""

    said: str
    question: "Question"
    HELP = """\
## A question and its answer

`e` edits the question, `r` asks it again, `b` goes on from here: each begins another branch, and what is there stays.
A question with branches shows **2/3**; **Left** and **Right** show the others. `y` copies.
**Up** and **Down** go to the next message, **Esc** back to the prompt.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "wish('edit')", "Edit"),
        Binding("r", "wish('again')", "Again"),
        Binding("b", "wish('branch')", "Branch"),
        Binding("y", "wish('copy')", "Copy"),
        *(Binding(key, action, show=False) for key, action in _AT_THE_PROMPT),
        Binding("left,left_square_bracket", "wish('older')", "Older branch", show=False),
        Binding("right,right_square_bracket", "wish('newer')", "Newer branch", show=False),
        Binding("up", "wish('up')", "Message above", show=False),
        Binding("down", "wish('down')", "Message below", show=False),
    ]

    class Wished(Message):
        """Somebody wants something of a turn."""

        def __init__(self, part: "TurnPart", wish: Wish) -> None:
            super().__init__()
            self.part = part
            self.wish = wish

    def __init__(self) -> None:
        super().__init__()
        self.turn = START

    def action_wish(self, wish: Wish) -> None:
        self.post_message(self.Wished(self, wish))


class Question(TurnPart):
    """What was asked. after: the turn before it."""

    def __init__(self, text: str, after: int = START) -> None:
        super().__init__()
        self.after = after
        self.branches: tuple[int, ...] = ()
        self.said = text
        self.question = self
        self._shown = Static(Content(printable(text)))

    def compose(self) -> ComposeResult:
        yield self._shown

    def keep(self, turn: int, branches: tuple[int, ...]) -> None:
        """Its place in the history, as one of these branches."""
        self.turn, self.branches = turn, branches
        which = f"  ({branches.index(turn) + 1}/{len(branches)})" if len(branches) > 1 else ""
        self._shown.update(Content.assemble(printable(self.said), (which, "not bold $text-muted")))


class Undrawn(Static, can_focus=True):
    """Stands for turns from `first` up to `end` that are not drawn; going or scrolling there draws the next of them."""

    class Reached(Message):
        """Somebody is there."""

        def __init__(self, undrawn: "Undrawn") -> None:
            super().__init__()
            self.undrawn = undrawn

    def __init__(self, first: int, end: int) -> None:
        count = end - first
        super().__init__(Content(f"{count} {'later' if first else 'earlier'} question{'s' if count > 1 else ''} ..."))
        self.first, self.end = first, end

    def on_focus(self) -> None:
        self.post_message(self.Reached(self))


class Note(Static):
    """Something Quire says by itself."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__(Content(printable("\n".join(lines))))


class Trouble(Static):
    """An error: what happened, what to do, details."""

    def __init__(self, error: QuireError) -> None:
        parts = [(printable(error.message), "bold $text-error")]
        parts += [("\n" + printable(error.hint), "")] if error.hint else []
        parts += [("\n" + printable(error.details), "dim")] if error.details else []
        super().__init__(Content.assemble(*parts))


class Answer(TurnPart):
    """One answer: what is expected, the text, and when it is complete its sources and what it took."""

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.said = ""
        self.question = question
        self._expected = Static("Searching ...", markup=False, classes="quiet")
        self.body = AnswerText()
        self._found: Found | None = None
        self._forecast: Forecast | None = None
        self._documents: tuple[Mention, ...] = ()  # all of them, where all were asked
        self._partials: list[str] = []

    def compose(self) -> ComposeResult:
        yield self._expected
        yield self.body

    def found(self, found: "Found") -> None:
        self._found = found

    def forecast(self, forecast: "Forecast") -> None:
        from quire import render

        self._forecast = forecast
        self._expected.update(f"Reading {printable(render.forecast_line(forecast))}")

    def plan(self, plan: "Plan") -> None:
        """All documents will be read."""
        from quire import render

        self._expected.update(f"Reading all: {render.plan_line(plan)}\nEsc stops, and tells what was found.")

    def progress(self, part: "Part") -> None:
        """How far reading all documents came, and what was found last."""
        from quire import render
        from quire.tui.words import left

        self._partials += [render.partial(part.answer)] if part.answer else []
        what = f"{left(part.left_ms)}; Esc stops" if part.left_ms else "putting the answer together"
        lines = [f"Read {part.done} of {part.total} parts, {what}", *self._partials[-_MOST_PARTIALS:]]
        self._expected.update("\n".join(lines))

    def account(self, account: "Account") -> None:
        """What became of every document."""
        from quire.session import Found

        self._found, self._documents = Found(account.sources, 0.0), account.documents

    async def write(self, text: str) -> None:
        self.said += text
        self._expected.display = False
        await self.body.write(text)

    async def break_off(self) -> None:
        """An error ended it, and is shown below."""
        await self.body.finish()
        self._expected.display = False

    async def finish(self, answered: "Answered") -> float:
        """Adds what is known at the end; returns the milliseconds saved against full prefill."""
        from quire import render

        await self.body.finish()
        assert self._found
        if self._documents:
            await self._finish_all(self._found, answered)
            return 0.0
        assert self._forecast
        self._expected.update(_ENDINGS[answered.ending] + short_truth(self._forecast, answered))
        self._expected.display = True
        self.move_child(self._expected, after=self.body)
        full = printable(render.truth_line(self._found, self._forecast, answered))
        reason = printable(self._forecast.reason)
        details = Static(f"{full}\n{reason}".strip().replace(" | ", "\n"), markup=False, classes="quiet")
        await self.mount(Collapsible(Sources(self._found.sources), details, title=sources.title(self._found.sources)))
        return render.saved_ms(self._forecast, answered)

    async def _finish_all(self, found: "Found", answered: "Answered") -> None:
        from quire import render

        self._expected.update(_ENDINGS[answered.ending] + render.read_line(answered))
        self._expected.display = True
        self.move_child(self._expected, after=self.body)
        listed = Sources(found.sources, self._documents)
        await self.mount(Collapsible(listed, title=escape(render.documents_title(self._documents))))

    async def restore(self, turn: "StoredTurn") -> None:
        """Shows an answer as it was. Sources show the text that the model read, whatever their files say now."""
        from quire.library import Hit
        from quire.session import Found
        from quire_engine.types import Answered

        self.turn = turn.id
        await self.write(turn.answer)
        truth = turn.truth
        hits = (Hit("", s.text, 0, s.path, s.start_line, s.end_line, s.heading, s.score, s.place) for s in turn.sources)
        self.found(Found(tuple(hits), truth.search_ms))
        self.forecast(truth.predicted)
        self._documents = turn.documents
        if turn.ending != "lost":
            await self.finish(Answered(truth.tokens, truth.timings, truth.ratio, turn.ending))
            return
        await self.break_off()
        self._expected.update("Quire ended before this was answered." if not turn.answer else "The end is missing.")
        self._expected.display = True
        self.move_child(self._expected, after=self.body)


def short_truth(forecast: "Forecast", answered: "Answered") -> str:
    """The time of the first word, against full prefill, and where the tokens came from; what left the context."""
    from quire import render

    tokens, first_ms = answered.tokens, answered.timings.first_token_ms
    parts = []
    if first_ms:
        full = f" (full prefill about {render.duration(forecast.full_prefill_ms)})" if render.spared(answered) else ""
        parts.append(f"First word {render.duration(first_ms)}{full}")
    if reused := tokens.kept + tokens.reused:
        parts.append(f"{reused:,} tokens reused, {tokens.recomputed + tokens.fresh:,} computed")
    elif tokens.fresh:
        parts.append(f"{tokens.fresh:,} tokens read in full")
    if speed := render.speed(answered):
        parts.append(f"{speed:.0f} tokens/s")
    return "\n".join(filter(None, (" · ".join(parts), render.dropped_line(forecast))))
