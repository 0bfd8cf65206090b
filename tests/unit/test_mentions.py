"""Names after an @: what they stand for, and what is left of the question."""

from pathlib import Path

import pytest

from quire.mentions import Places, Unfinished, unfinished

NOTES, WORK = Path("/home/eva/notes"), Path("/srv/office")
TEA, COFFEE, PLAN = NOTES / "hot/tea.md", NOTES / "hot/Coffee beans.md", WORK / "plan.md"
OTHER_TEA = WORK / "drinks/tea.md"
PLACES = Places([TEA, COFFEE, PLAN, OTHER_TEA], [NOTES, WORK])


@pytest.mark.parametrize(
    ("text", "question", "paths"),
    [
        ("@plan.md", "plan.md", (PLAN,)),
        ("What does @plan.md say?", "What does plan.md say?", (PLAN,)),
        ("Is it in @plan.md?", "Is it in plan.md?", (PLAN,)),
        ("(see @plan.md, @hot/)", "(see plan.md, hot/)", (PLAN, NOTES / "hot")),
        ("@hot how long?", "hot how long?", (NOTES / "hot",)),
        ("@HOT/TEA.MD", "HOT/TEA.MD", (TEA,)),
        ("@tea.md", "tea.md", (TEA, OTHER_TEA)),
        ("@notes/hot/tea.md", "notes/hot/tea.md", (TEA,)),
        ("@/srv/office/plan.md", "/srv/office/plan.md", (PLAN,)),
        ('ask @"coffee beans.md" and @"notes/"!', "ask coffee beans.md and notes/!", (COFFEE, NOTES)),
        ("@plan.md and @plan.md", "plan.md and plan.md", (PLAN,)),
        ("write to eva@plan.md", "write to eva@plan.md", ()),
        ("what is @dataclass?", "what is @dataclass?", ()),
        ("@ alone, @, and @/ and @~ and @..", "@ alone, @, and @/ and @~ and @..", ()),
        ('an open @"plan.md', 'an open @"plan.md', ()),
        ("ea.md is no name: @ea.md", "ea.md is no name: @ea.md", ()),
        ("no mention", "no mention", ()),
    ],
)
def test_what_a_question_names(text: str, question: str, paths: tuple[Path, ...]) -> None:
    mentions = PLACES.read(text)
    assert (mentions.question, mentions.paths) == (question, paths)


def test_what_is_offered_names_that_place_alone() -> None:
    for place in PLACES.fitting("", 100):
        assert PLACES.read(f"in {PLACES.mention(place)} only").paths == (place.path,)
    assert len(PLACES.fitting("", 100)) == 8  # four documents, four folders
    by_path = {place.path: PLACES.mention(place) for place in PLACES.fitting("", 100)}
    assert by_path[PLAN] == "@plan.md"
    assert by_path[TEA] == "@hot/tea.md"
    assert by_path[NOTES] == "@notes/"
    assert by_path[COFFEE] == '@"Coffee beans.md"'


def test_a_name_that_others_made_is_quoted_and_safe() -> None:
    hostile = NOTES / 'a "b\\c" \x1b]52;c;x\x07\nd.md'
    places = Places([hostile], [NOTES])
    [place] = places.fitting("b\\c", 1)
    assert "\x1b" not in place.name
    assert "\n" not in place.name
    assert places.read(places.mention(place)).paths == (hostile,)


def test_beginnings_come_before_middles() -> None:
    assert {place.path for place in PLACES.fitting("te", 2)} == {TEA, OTHER_TEA}
    assert [place.path for place in PLACES.fitting("be", 3)] == [COFFEE]
    assert PLACES.fitting("nothing like it", 3) == []
    assert PLACES.fitting("pl", 3)[0].path == PLAN


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("@", Unfinished(0, "")),
        ("in @te", Unfinished(3, "te")),
        ('in @"my no', Unfinished(3, "my no")),
        ('in @"a\\"b', Unfinished(3, 'a"b')),
        ("in (@te", Unfinished(4, "te")),
        ("@tea.md ", None),
        ('@"tea.md" ', None),
        ("eva@te", None),
        ("", None),
    ],
)
def test_what_is_being_typed(before: str, found: Unfinished | None) -> None:
    assert unfinished(before) == found


def test_a_long_line_of_signs_ends() -> None:
    assert PLACES.read("@" + "." * 100_000 + ' @"' * 20_000).paths == ()
    assert unfinished("@" * 50_000 + " ") is None
