"""What an empty conversation says about itself. Knows the state of the library and which model is recommended."""

from pathlib import Path

from textual.content import Content
from textual.widgets import Static

from quire import models
from quire.terminal import printable
from quire.tui.messages import State
from quire.tui.words import place

_LOCAL = (
    "Nothing leaves this computer. What a model computes while it reads a passage is kept on disk, so that"
    " the first word of an answer comes sooner than if everything were read again."
)


class Welcome(Static):
    """The first thing that is seen."""

    def show(self, state: State, leaves: str) -> None:
        """leaves: what leaves this computer; empty where nothing does."""
        parts: list[str | tuple[str, str]] = [("Quire answers from your own documents.\n", "bold")]
        parts += [(printable(leaves), "$text-warning"), "\n\n"] if leaves else [_LOCAL, "\n\n"]
        if state.roots:
            parts += ["Your folders: ", (", ".join(map(place, state.roots)), "bold"), ". Ask them something.\n"]
            parts += [
                "More: ",
                ("/add ~/notes", "$text-accent"),
                "   What is cached: ",
                ("Ctrl+L", "$text-accent"),
                "   Ask every file: ",
                ("/all", "$text-accent"),
                "\n",
            ]
        elif state.model:
            parts += ["No folder was added yet. To read the one you are in, or any other, type\n\n"]
            parts += [(f"    /add {place(Path.cwd())}", "$text-accent"), "\n\n"]
            parts += [("/sample", "$text-accent"), " reads four short texts to try it with; "]
            parts += [("Ctrl+L", "$text-accent"), " shows folders and what is cached.\n"]
        if state.bundled and not leaves:
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
