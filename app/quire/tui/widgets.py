"""What the screens are made of: an answer with its sources, the preview of a passage.

Text of documents, file names and models comes through `printable` and is never read as Textual markup; as Markdown
only the answer is, without HTML and with links that lead nowhere. What needs NumPy (`render`) is imported when the
first answer comes, which the engine thread has loaded by then.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from markdown_it import MarkdownIt
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.markup import escape
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Collapsible, Markdown, OptionList, Static

from quire.terminal import printable
from quire.tui.messages import START
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.library import Hit
    from quire.session import Found
    from quire.transcript import Turn as StoredTurn
    from quire.tui.worker import State
    from quire_engine.types import Answered, Forecast

_ENDINGS = {"end": "", "length": "Cut off: too long. ", "stopped": "Stopped. "}
_TAIL_LINES = 40  # of an open block; drawing all of a long one at every step is what costs


def plain(path: Path) -> str:
    """A path for one line of the screen."""
    return printable(str(path)).replace("\n", " ")


def place(path: Path) -> str:
    """A folder as short as it can be typed."""
    home = os.path.expanduser("~")
    return f"~/{plain(path.relative_to(home))}" if path.is_relative_to(home) and path != Path(home) else plain(path)


# Streaming Markdown

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CONTINUES = re.compile(r"\s|[-*+>](\s|$)|\d+[.)](\s|$)|$")  # may belong to a list or a quotation above
_LINE_ENDS = {0x2028: "\n", 0x2029: "\n"}  # Textual counts them as line ends, Markdown does not


def closed_length(text: str) -> int:
    """How much of the beginning of `text` no later text can change: whole Markdown blocks.

    A block is closed when a blank line outside of a fence is followed by a line that surely starts another one.
    """
    closed, position, fence, blank = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        if blank and not fence and not _CONTINUES.match(line):
            closed = position
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
            fence = ""
        blank = not line.strip()
        position += len(line)
    return closed


def _markdown_parser() -> MarkdownIt:
    """As Textual's, but a tag is text like any other, and nothing becomes a link by itself."""
    return MarkdownIt("gfm-like", {"html": False, "linkify": False})


class AnswerText(Vertical):
    """Text that grows: closed blocks as Markdown, the open one as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self._tail = Static(markup=False, classes="tail")
        self._rest = ""
        self.text = ""  # all of it, as it came

    def compose(self) -> ComposeResult:
        yield self._tail

    async def write(self, text: str) -> None:
        self.text += text
        self._rest += text
        if closed := closed_length(self._rest):
            await self._settle(closed)
        self._tail.update("\n".join(printable(self._rest).splitlines()[-_TAIL_LINES:]))
        self._tail.display = bool(self._rest.strip())

    async def finish(self) -> None:
        """What is still open becomes Markdown too."""
        await self._settle(len(self._rest))
        self._tail.display = False

    async def _settle(self, length: int) -> None:
        block, self._rest = self._rest[:length], self._rest[length:]
        if block.strip():
            # A widget each: Markdown.append parses the last block again and may show it twice (Textual 8.2.8, a table).
            text = printable(block).translate(_LINE_ENDS)
            await self.mount(Markdown(text, parser_factory=_markdown_parser, open_links=False), before=self._tail)


# Messages of the conversation


Wish = Literal["edit", "again", "branch", "copy", "older", "newer", "up", "down"]


class TurnPart(Vertical, can_focus=True):
    """A question or an answer, within reach of the keyboard. turn: its number in the history, START: none yet."""

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

    @property
    def said(self) -> str:
        """The text, as it came."""
        raise NotImplementedError

    @property
    def question(self) -> "Question":
        """The question of this turn."""
        raise NotImplementedError

    def action_wish(self, wish: Wish) -> None:
        self.post_message(self.Wished(self, wish))


class Question(TurnPart):
    """What was asked. after: the turn before it."""

    def __init__(self, text: str, after: int = START) -> None:
        super().__init__()
        self.after = after
        self.branches: tuple[int, ...] = ()
        self._text = text
        self._shown = Static(Content(printable(text)))

    def compose(self) -> ComposeResult:
        yield self._shown

    @property
    def said(self) -> str:
        return self._text

    @property
    def question(self) -> "Question":
        return self

    def keep(self, turn: int, branches: tuple[int, ...]) -> None:
        """Its place in the history, as one of these branches."""
        self.turn, self.branches = turn, branches
        which = f"  ({branches.index(turn) + 1}/{len(branches)})" if len(branches) > 1 else ""
        self._shown.update(Content.assemble(printable(self._text), (which, "not bold $text-muted")))


class Earlier(Static, can_focus=True):
    """Stands for turns that were not drawn; Enter draws some of them."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "show", "Show earlier")]

    class Wanted(Message):
        """Somebody wants to see them."""

        def __init__(self, earlier: "Earlier") -> None:
            super().__init__()
            self.earlier = earlier

    def __init__(self, count: int) -> None:
        super().__init__(Content(f"{count} earlier {'question' if count == 1 else 'questions'}: Enter shows them"))
        self.count = count

    def action_show(self) -> None:
        self.post_message(self.Wanted(self))

    def on_click(self) -> None:
        self.action_show()


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
        self._question = question
        self._expected = Static("Searching ...", markup=False, classes="quiet")
        self.body = AnswerText()
        self._found: Found | None = None
        self._forecast: Forecast | None = None

    def compose(self) -> ComposeResult:
        yield self._expected
        yield self.body

    @property
    def said(self) -> str:
        return self.body.text

    @property
    def question(self) -> Question:
        return self._question

    def found(self, found: "Found") -> None:
        self._found = found

    def forecast(self, forecast: "Forecast") -> None:
        from quire import render

        self._forecast = forecast
        self._expected.update(f"Reading {printable(render.forecast_line(forecast))}")

    async def write(self, text: str) -> None:
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
        assert self._forecast
        self._expected.update(_ENDINGS[answered.ending] + short_truth(self._forecast, answered))
        self._expected.display = True
        self.move_child(self._expected, after=self.body)
        full = printable(render.truth_line(self._found, self._forecast, answered))
        reason = printable(self._forecast.reason)
        details = Static(f"{full}\n{reason}".strip().replace(" | ", "\n"), markup=False, classes="quiet")
        await self.mount(Collapsible(Sources(self._found.sources), details, title=_title(self._found.sources)))
        return render.saved_ms(self._forecast, answered)

    async def restore(self, turn: "StoredTurn") -> None:
        """Shows an answer as it was. Sources show the text that the model read, whatever their files say now."""
        from quire.library import Hit
        from quire.session import Found
        from quire_engine.types import Answered

        self.turn = turn.id
        await self.write(turn.answer)
        truth = turn.truth
        hits = (Hit("", s.text, 0, s.path, s.start_line, s.end_line, s.heading, s.score) for s in turn.sources)
        self.found(Found(tuple(hits), truth.search_ms))
        self.forecast(truth.predicted)
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


def _title(hits: "tuple[Hit, ...]") -> str:
    """2 sources: tea.md, coffee.md; as markup, which a Collapsible takes its title for."""
    names = ", ".join(dict.fromkeys(plain(Path(hit.path.name)) for hit in hits))
    return escape(f"{len(hits)} {'source' if len(hits) == 1 else 'sources'}: {names}")


class Sources(OptionList):
    """The passages an answer rests on, numbered; Enter shows one, o opens its file."""

    HELP = "## Sources\n\nEnter shows the passage, `o` opens its file in your `$EDITOR`."
    BINDINGS: ClassVar[list[BindingType]] = [Binding("o", "open", "Open in editor")]

    class Opened(Message):
        """Somebody wants to see the file of a source."""

        def __init__(self, hit: "Hit") -> None:
            super().__init__()
            self.hit = hit

    def __init__(self, hits: "tuple[Hit, ...]") -> None:
        from quire import render

        lines = (f"{number}. {render.source(hit)}" for number, hit in enumerate(hits, 1))
        super().__init__(*map(Content, lines), compact=True)
        self._hits = hits

    @on(OptionList.OptionSelected)
    def _preview(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.app.push_screen(Preview(self._hits[event.option_index], event.option_index + 1))

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


# What goes on, in words


def activity(state: "State") -> str:
    """What the engine thread does, in a few words; nothing when it is idle."""
    match state.doing:
        case "reading":
            return f"reading {state.read_done}/{state.read_total} files" if state.read_total else "reading"
        case "caching":
            return f"caching{', ' + left(state.left_ms) if state.left_ms else ''}"
        case "checking":
            return "trying the model out, once"
        case "waiting":
            return "caching waits while you type"
        case "paused":
            return "caching paused"
        case _:
            return ""


def left(ms: float) -> str:
    """about 3 min left"""
    return f"about {ms / 60_000:.0f} min left" if ms >= 90_000 else f"about {max(1, ms / 1000):.0f} s left"
