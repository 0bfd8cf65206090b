"""The theme that Quire adds to Textual's own, and colours that can be read in every one. Knows nothing of widgets."""

from collections.abc import Mapping
from typing import Final

from textual.color import Color
from textual.theme import Theme

from quire.config import HIGH_CONTRAST

# Black, white and colours that keep a contrast of at least 7 to 1 against black (WCAG's level AAA).
HIGH_CONTRAST_THEME: Final = Theme(
    name=HIGH_CONTRAST,
    primary="#66d9ff",
    secondary="#66d9ff",
    accent="#ffff00",
    warning="#ffd700",
    error="#ff9a9a",
    success="#7dff7d",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#1a1a1a",
    boost="#1a1a1a",
    text_alpha=1.0,
    variables={
        "text-muted": "#e0e0e0",
        "text-disabled": "#c0c0c0",
        "border": "#ffff00",
        "border-blurred": "#ffffff",
        "block-cursor-background": "#ffff00",
        "block-cursor-foreground": "#000000",
        "input-selection-background": "#ffff00",
        "input-selection-foreground": "#000000",
        "block-cursor-blurred-background": "#222222",
        "block-cursor-blurred-foreground": "#ffffff",
        "footer-key-foreground": "#ffff00",
    },
)

_READABLE = 4.5  # contrast to the background (WCAG's level AA)
_STEPS = 10


def readable(name: str, variables: Mapping[str, str]) -> Color:
    """The colour of this name in a theme, moved away from the background as far as it takes to be read."""
    colour, background = Color.parse(variables[name]), Color.parse(variables["background"])
    if colour.ansi is not None or background.ansi is not None:  # the terminal's own: nobody knows them
        return colour
    away = background.get_contrast_text(1.0)
    mixed = (colour.blend(away, step / _STEPS) for step in range(_STEPS + 1))
    return next((c for c in mixed if contrast(c, background) >= _READABLE), away)


def contrast(one: Color, other: Color) -> float:
    """From 1 to 21, as WCAG 2 defines it."""
    darker, lighter = sorted(map(_luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Color) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour.normalized)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
