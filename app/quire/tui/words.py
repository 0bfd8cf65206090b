"""How the screens say things in one line: paths, and what the engine thread does. Knows no widgets."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from quire.terminal import printable

if TYPE_CHECKING:
    from quire.tui.messages import State


def plain(path: Path) -> str:
    """A path for one line of the screen."""
    return printable(str(path)).replace("\n", " ")


def place(path: Path) -> str:
    """A folder as short as it can be typed."""
    home = os.path.expanduser("~")
    return f"~/{plain(path.relative_to(home))}" if path.is_relative_to(home) and path != Path(home) else plain(path)


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
            return f"caching waits: {state.held}" if state.held else "caching waits while you type"
        case "paused":
            return "caching paused"
        case _:
            return ""


def left(ms: float) -> str:
    """about 3 min left"""
    return f"about {ms / 60_000:.0f} min left" if ms >= 90_000 else f"about {max(1, ms / 1000):.0f} s left"
