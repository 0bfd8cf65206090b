"""What the screens are made of: an answer with its sources, the prompt, the status line, the preview of a passage.

Text of documents, file names and models comes through `printable` and is never read as Textual markup; as Markdown
only the answer is, without HTML and with links that lead nowhere. What needs NumPy (`render`) is imported when the
first answer comes, which the engine thread has loaded by then.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from markdown_it import MarkdownIt
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.markup import escape
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Collapsible, Markdown, OptionList, Static, TextArea

from quire.terminal import printable
from quire_engine.errors import QuireError

if TYPE_CHECKING:
    from quire.library import Hit
    from quire.session import Found
    from quire.tui.worker import State
    from quire_engine.types import Answered, Forecast

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


class Question(Static):
    """What was asked."""

    def __init__(self, text: str) -> None:
        super().__init__(Content(printable(text)))


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


class Answer(Vertical):
    """One answer: what is expected, the text, and when it is complete its sources and what it took."""

    def __init__(self) -> None:
        super().__init__()
        self._expected = Static("Searching ...", markup=False, classes="quiet")
        self.body = AnswerText()
        self._found: Found | None = None
        self._forecast: Forecast | None = None

    def compose(self) -> ComposeResult:
        yield self._expected
        yield self.body

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
        short = short_truth(self._forecast, answered)
        self._expected.update(f"Stopped. {short}" if answered.ending == "stopped" else short)
        self._expected.display = True
        self.move_child(self._expected, after=self.body)
        full = printable(render.truth_line(self._found, self._forecast, answered))
        reason = printable(self._forecast.reason)
        details = Static(f"{full}\n{reason}".strip().replace(" | ", "\n"), markup=False, classes="quiet")
        await self.mount(Collapsible(Sources(self._found.sources), details, title=_title(self._found.sources)))
        first_ms = answered.timings.first_token_ms
        return max(0.0, self._forecast.full_prefill_ms - first_ms) if first_ms and answered.ratio < 1 else 0.0


def short_truth(forecast: "Forecast", answered: "Answered") -> str:
    """What fits one line: the time of the first word, against full prefill, and where the tokens came from."""
    from quire import render

    tokens, first_ms = answered.tokens, answered.timings.first_token_ms
    parts = []
    if first_ms:
        full = f" (full prefill about {render.duration(forecast.full_prefill_ms)})" if answered.ratio < 1 else ""
        parts.append(f"First word {render.duration(first_ms)}{full}")
    if answered.ratio < 1:
        parts.append(f"{tokens.reused} tokens reused, {tokens.recomputed + tokens.fresh} computed")
    else:
        parts.append(f"{tokens.fresh} tokens read in full")
    return " · ".join(parts)


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


# The prompt and the line above it


class Prompt(TextArea):
    """Where questions are typed. Enter sends, Shift+Enter or Ctrl+J starts a new line, Up brings back the last one."""

    HELP = """\
## The prompt

Type a question about your documents and press Enter. `/add ~/notes` adds a folder or file.
**Shift+Enter** or **Ctrl+J** starts a new line; **Up** in an empty prompt brings back the last question.
**Esc** stops an answer and keeps what there is. **Shift+Tab** goes up to its sources, **PageUp** scrolls.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", priority=True),
        Binding("shift+enter,ctrl+j", "newline", "New line", show=False, priority=True),
    ]

    class Sent(Message):
        """Somebody pressed Enter."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__(placeholder="Ask your documents", highlight_cursor_line=False, compact=True)
        self.last = ""

    def action_send(self) -> None:
        if text := self.text.strip():
            self.post_message(self.Sent(text))

    def action_newline(self) -> None:
        self.insert("\n")

    def action_cursor_up(self, select: bool = False) -> None:
        if not self.text and not select:
            self.put(self.last)
        else:
            super().action_cursor_up(select)

    def put(self, text: str) -> None:
        """Replaces what is there, with the cursor at its end."""
        self.text = text
        self.move_cursor(self.document.end)

    async def _on_paste(self, event: events.Paste) -> None:  # runs before TextArea's own
        event.text = printable(event.text)


class StatusLine(Static):
    """Folders, what is cached, the model, and the seconds saved so far."""

    def show(self, state: "State", saved_ms: float) -> None:
        self.update(Content(" · ".join(filter(None, status_parts(state, saved_ms)))))


def status_parts(state: "State", saved_ms: float) -> tuple[str, ...]:
    """The most useful first: what does not fit is cut off."""
    folders = place(state.roots[0]) if len(state.roots) == 1 else f"{len(state.roots)} folders"
    cached = f"{state.done}/{state.total} cached" if state.total else ""
    return (
        cached if not state.reuse_off else "not cached with this model",
        activity(state),
        f"{saved_ms / 1000:.1f} s saved" if saved_ms else "",
        printable(state.model) or "loading the model",
        folders if state.roots else "no folder yet",
    )


def activity(state: "State") -> str:
    """What the engine thread does, in a few words; nothing when it is idle."""
    match state.doing:
        case "reading":
            return f"reading {state.read_done}/{state.read_total} files" if state.read_total else "reading"
        case "caching":
            return f"caching{', ' + left(state.left_ms) if state.left_ms else ''}"
        case "waiting":
            return "caching waits while you type"
        case "paused":
            return "caching paused"
        case _:
            return ""


def left(ms: float) -> str:
    """about 3 min left"""
    return f"about {ms / 60_000:.0f} min left" if ms >= 90_000 else f"about {max(1, ms / 1000):.0f} s left"
