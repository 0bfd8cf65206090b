"""What the screens are told about folders: the keeper's host in the engine thread.

Knows nothing of widgets, nor of how folders are kept.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textual.message import Message

from quire.keeper import Edit
from quire.tui.messages import Noted, Row

if TYPE_CHECKING:
    from quire.session import Session
    from quire.shelf import Item


@dataclass(frozen=True)
class OnScreen:
    """A `quire.keeper.Host`. tell: a new state.  post: a message for the screens."""

    tell: Callable[..., None]
    post: Callable[[Message], None]
    failed: Callable[[Exception], None]
    between: "Callable[[Session], None]"
    yields: Callable[[], bool]
    wake: Callable[[], None]
    reuse_off: "Callable[[Session], str]"

    def say(self, lines: Sequence[str], more: int = 0) -> None:
        rest = [f"... and {more} more: Ctrl+L"] if more else []
        self.post(Noted((*lines, *rest)))

    def reading(self, roots: Sequence[Path], done: int, total: int) -> None:
        self.tell(doing="reading", read_done=done, read_total=total, roots=tuple(roots))

    def has_roots(self, roots: Sequence[Path]) -> None:
        self.tell(roots=tuple(roots))

    def caching(self) -> None:
        self.tell(doing="caching")

    def off(self, reason: str) -> None:
        self.tell(reuse_off=reason)

    def estimate(self, left_ms: float) -> None:
        self.tell(left_ms=left_ms)

    def budget(self, used_up: bool) -> None:
        self.tell(over_budget=used_up)

    def show(self, session: "Session", edits: tuple[Edit, ...]) -> None:
        shelf = session.shelf
        progress, usage = shelf.progress(), shelf.usage()
        self.tell(
            rows=tuple(_row(item, shelf.tokens, shelf.waiting) for item in shelf.items),
            done=progress.done,
            total=progress.total,
            tokens_left=progress.tokens_total - progress.tokens_done,
            disk_bytes=usage.disk_bytes,
            limit_bytes=usage.limit_bytes,
            written_bytes=usage.written_bytes,
            total_written_bytes=usage.total_written_bytes,
            edits=edits,
            pins=tuple(shelf.pins),
        )


def _row(item: "Item", tokens: Mapping[str, int], waiting: Collection[str]) -> Row:
    document = item.document
    if document.state == "skipped":
        return Row(document.path, "S", reason=f"{document.reason}. {document.remedy}".strip(), pinned=item.pinned)
    left = sum(passage in waiting for passage in item.passages)
    length = sum(tokens.get(passage, 0) for passage in item.passages)
    return Row(document.path, "Q" if left else "C", len(item.passages), left, "", length, item.pinned)
