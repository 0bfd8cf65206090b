"""Text that grows: closed Markdown blocks are drawn once, the open one is plain text until it closes.

Without HTML, and with links that lead nowhere. Knows nothing of where the text comes from.
"""

import re

from markdown_it import MarkdownIt
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown, Static

from quire.terminal import printable

_TAIL_LINES = 40  # of an open block; drawing all of a long one at every step is what costs
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
    """Closed blocks as Markdown, the open one as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self._tail = Static(markup=False, classes="tail")
        self._rest = ""

    def compose(self) -> ComposeResult:
        yield self._tail

    async def write(self, text: str) -> None:
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
        if block.strip() and self.is_attached:  # else the application is closing
            # A widget each: Markdown.append parses the last block again and may show it twice (Textual 8.2.8, a table).
            text = printable(block).translate(_LINE_ENDS)
            await self.mount(Markdown(text, parser_factory=_markdown_parser, open_links=False), before=self._tail)
