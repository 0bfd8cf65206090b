"""What can be read on the screens: contrast in light, dark and high-contrast themes, measured on what is painted.

The row under the cursor has the theme's own colours, which only the high-contrast theme answers for.
"""

from collections.abc import Iterator

import pytest
from rich.segment import Segment
from textual.color import Color
from textual.widgets import DataTable

from driving import on_a_screen, shown, until
from functional import test_snapshots as pictures
from functional.test_snapshots import Arrange
from quire import config
from quire.tui.app import QuireApp
from quire.tui.themes import contrast

LEGEND = "C cached   Q queued   S skipped   P pinned"
_world = pictures._world  # used by every test here: nothing of this machine is seen


def painted(app: QuireApp) -> Iterator[tuple[str, Segment]]:
    """Every piece of text on the screen with its line."""
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            yield strip.text, segment


def legible(segment: Segment) -> float:
    """The contrast of a text to what is behind it."""
    style = segment.style
    assert style
    assert style.color
    assert style.bgcolor
    ink, paper = (Color.from_rich_color(colour) for colour in (style.color, style.bgcolor))
    return contrast(ink, paper)


@pytest.mark.parametrize(
    ("theme", "least"), [("textual-dark", 4.5), ("textual-light", 4.5), ("atom-one-light", 4.5), ("high-contrast", 7.0)]
)
@on_a_screen
async def test_the_letters_of_the_library_can_be_told_apart_from_the_background(theme: str, least: float) -> None:
    app = QuireApp(pictures.no_session)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(app, pilot, lambda: app.chat.prompt.has_focus)
        await pictures.library(app, pilot)
        app.theme = theme
        table = app.screen.query_one(DataTable)
        table.move_cursor(row=4)
        table.show_cursor = theme == config.HIGH_CONTRAST
        await until(app, pilot, lambda: LEGEND in shown(app))
        await pilot.pause()
        letters = [(line, s) for line, s in painted(app) if s.text.strip() in ("C", "Q", "S", "P")]
        assert {segment.text.strip() for _, segment in letters} == {"C", "Q", "S", "P"}
        assert len(letters) > 4 + 4, "in the table and below it"
        for line, segment in letters:
            assert legible(segment) >= least, (line, str(segment.style))


@pytest.mark.parametrize(
    "arrange",
    [pictures.welcome_back, pictures.answer, pictures.error, pictures.offers, pictures.confirm, pictures.listed,
     pictures.settings, pictures.model_list],
    ids=lambda arrange: arrange.__name__,
)  # fmt: skip
@on_a_screen
async def test_in_high_contrast_every_word_has_it(arrange: Arrange) -> None:
    config.save({"theme": config.HIGH_CONTRAST, "animations": False})
    app = QuireApp(pictures.no_session)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(app, pilot, lambda: app.chat.prompt.has_focus)
        await arrange(app, pilot)
        await pilot.pause()
        words = [(line, segment) for line, segment in painted(app) if any(c.isalnum() for c in segment.text)]
        assert len(words) > 10
        for line, segment in words:
            assert legible(segment) >= 7.0, (segment.text, str(segment.style), line)
