"""The messages of one branch, drawn one below the other; of a long one only what is near to where somebody looks.

Knows what is drawn and where; what a message does is for the chat screen.
"""

from typing import TYPE_CHECKING

from textual.containers import VerticalScroll
from textual.widget import Widget

from quire.tui.welcome import Welcome
from quire.tui.widgets import Answer, Question, TurnPart, Undrawn

if TYPE_CHECKING:
    from quire.conversation import Line

_MOST_MESSAGES = 200  # older ones leave the screen
_AT_ONCE = 10  # turns; drawing one takes up to 80 ms
_BELOW = 5  # of them, from one that is looked for


class Dialogue(VerticalScroll, can_focus=False):
    """Its methods are called one at a time."""

    def __init__(self) -> None:
        super().__init__(id="conversation")
        self._line: Line | None = None
        self._moving = False  # to where somebody wants to look; what passes by is not reached

    def compose(self) -> "list[Widget]":
        return [Welcome()]

    def on_mount(self) -> None:
        self.anchor()

    async def clear(self) -> None:
        with self.app.batch_update():
            await self.remove_children()
            await self.mount(Welcome())

    async def show(self, *messages: Widget) -> None:
        """Adds messages at the end."""
        await self.mount(*messages)
        for old in list(self.children)[:-_MOST_MESSAGES]:
            await old.remove()

    async def show_line(self, line: "Line", through: int) -> None:
        """A branch in place of what was shown: its end, or what begins with the turn that is looked for."""
        ids = [turn.id for turn in line.turns]
        first, end = max(0, len(ids) - _AT_ONCE), len(ids)
        if through and (sought := ids.index(through)) < first:
            first, end = sought, sought + _BELOW
        self._line, self._moving = line, True
        with self.app.batch_update():
            await self.remove_children()
            await self.mount(*([Undrawn(0, first)] if first else []))
            await self._draw(first, end)
            await self.mount(*([Undrawn(end, len(ids))] if end < len(ids) else []))
        if through:
            self.release_anchor()
        else:
            self.anchor()
        self.call_after_refresh(self._arrive, self._at(ids.index(through)) if through else None)

    @property
    def ends(self) -> bool:
        """Whether the end of the branch is drawn."""
        return not any(undrawn.first for undrawn in self.query(Undrawn))

    async def draw(self, undrawn: Undrawn) -> None:
        """Draws the nearest of the turns that it stands for; what is looked at stays where it is."""
        if undrawn.parent is not self:
            return
        above = undrawn.first == 0
        first = max(0, undrawn.end - _AT_ONCE) if above else undrawn.first
        end = undrawn.end if above else min(undrawn.end, undrawn.first + _AT_ONCE)
        near = next(iter(self.query(Question)))  # the first that was drawn
        before = near.virtual_region.y - self.scroll_y
        self._moving = True
        self.release_anchor()
        with self.app.batch_update():
            await self._draw(first, end, near if above else undrawn)
            if undrawn.has_focus:
                (near if above else self._at(first)).focus(scroll_visible=not above)
            rest = Undrawn(0, first) if above else Undrawn(end, undrawn.end)
            if rest.first < rest.end:
                await self.mount(rest, before=undrawn)
            await undrawn.remove()
        self.call_after_refresh(self._arrive, near, before)

    def _arrive(self, question: Question | None, row: float = 0.0) -> None:
        """Puts a question, if there is one, at a row of what is seen."""
        if question:
            self.scroll_to(y=question.virtual_region.y - row, animate=False)
        self._moving = False

    async def _draw(self, first: int, end: int, before: Widget | None = None) -> None:
        assert self._line
        turns, siblings = self._line.turns[first:end], self._line.siblings[first:end]
        for turn, branches in zip(turns, siblings, strict=True):
            if not self.is_attached:
                return  # the application is closing
            question = Question(turn.question, turn.parent)
            answer = Answer(question)
            await self.mount(question, answer, before=before)
            question.keep(turn.id, branches)
            await answer.restore(turn)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        for undrawn in () if self._moving else self.query(Undrawn):
            if undrawn.virtual_region.overlaps(self.window_region):
                self.post_message(Undrawn.Reached(undrawn))

    def next_to(self, part: TurnPart, step: int) -> Widget | None:
        """The message above (-1) or below that can be reached; itself at the top, None below the last."""
        reachable = [message for message in self.children if isinstance(message, TurnPart | Undrawn)]
        to = max(0, reachable.index(part) + step)
        return reachable[to] if to < len(reachable) else None

    def after(self, part: TurnPart) -> Widget | None:
        """The first message below the turn to which this part belongs."""
        messages = [*self.children]
        last = max(at for at, message in enumerate(messages) if getattr(message, "question", None) is part.question)
        return messages[last + 1] if last + 1 < len(messages) else None

    def pale(self, beyond: Widget | None) -> None:
        """Shows that a message, and all below it, will not stand above the next question; None: that all will."""
        paling = False
        for message in self.children:
            paling = paling or message is beyond
            message.set_class(paling, "beyond")

    async def drop_pale(self) -> None:
        await self.query(".beyond").remove()

    def question(self, turn: int) -> Question:
        """The question of a turn that is drawn."""
        return next(question for question in self.query(Question) if question.turn == turn)

    def _at(self, position: int) -> Question:
        assert self._line
        return self.question(self._line.turns[position].id)
