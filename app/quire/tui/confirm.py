"""A question that is asked in place, under what it is about: Enter or y says yes, Escape or n says no.

Knows nothing of what is asked.
"""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static


class Confirm(Static, can_focus=True):
    """Takes the focus while it is asked, and gives it back; leaving it means no."""

    HELP = "## A question\n\n**Enter** or **y**: yes. **Esc** or **n**: no."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,y", "answer(True)", "Yes"),
        Binding("escape,n", "answer(False)", "No"),
    ]

    class Answered(Message):
        """Somebody decided."""

        def __init__(self, confirm: "Confirm", yes: bool) -> None:
            super().__init__()
            self.confirm = confirm
            self.yes = yes

    def __init__(self, question: str, back_to: Widget | None) -> None:
        super().__init__(Content.assemble(question, ("  Enter: yes · Esc: no", "bold")))
        self._back_to = back_to
        self._open = True

    def on_mount(self) -> None:
        self.focus()

    def action_answer(self, yes: bool) -> None:
        self._end(yes)
        if self._back_to and self._back_to.is_attached:
            self._back_to.focus()

    def on_blur(self) -> None:
        self._end(False)

    def _end(self, yes: bool) -> None:
        if self._open:
            self._open = False
            self.post_message(self.Answered(self, yes))
            self.remove()
