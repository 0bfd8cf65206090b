"""Cutting texts: limits, coverage, meaning, and the survival of chunks when a text is edited."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import chunking
from quire.chunking import split
from quire.outline import Markup

WAR_AND_PEACE = Path(__file__).parents[3] / "shared" / "data" / "text" / "war-and-peace.txt"


def quarter(text: str) -> int:
    return len(text) // 4


def words(text: str) -> int:
    return len(text.split())


def texts(text: str, max_tokens: int, markup: Markup = "markdown") -> list[str]:
    return [passage.text for passage in split(text, words, max_tokens, markup=markup)]


LINES = st.sampled_from(
    ["", "", "  ", "# One", "## Two", "Title\n=====", "```python", "```", "~~~", "    indented", "- item",
     "word " * 30, "A sentence. Another one! A third? " * 4, "x" * 90, "漢字かな交じり文。" * 9, "\t", "---",
     "🙂" * 40]
)  # fmt: skip
TEXTS = st.lists(LINES | st.text(max_size=60), max_size=40).map("\n".join)
MARKUPS = st.sampled_from(["markdown", "rst", "plain"])
TABLES = st.lists(
    st.sampled_from(
        ["| a | b |", "| --- | --- |", "x | " + "word " * 30, "|", "1,2", '"a', 'b"', "# One", "", "z" * 90]
    ),
    max_size=40,
).map("\n".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(1, 80), MARKUPS, st.sampled_from([len, quarter, words]))
def test_limits_coverage_and_line_numbers(text: str, max_tokens: int, markup: Markup, count: object) -> None:
    assert callable(count)
    passages = split(text, count, max_tokens, markup=markup)
    assert all(count(passage.text) <= max_tokens for passage in passages)
    assert all(passage.tokens == count(passage.text) for passage in passages)
    assert "".join("".join(p.text for p in passages).split()) == "".join(text.split())
    lines = text.split("\n")
    position = 1
    for passage in passages:
        assert position <= passage.start_line <= passage.end_line <= len(lines)
        position = passage.end_line
        assert passage.text in "\n".join(lines[passage.start_line - 1 : passage.end_line])
        assert lines[passage.start_line - 1].strip()
        assert lines[passage.end_line - 1].strip()
        assert not passage.text.startswith("\n")
        assert passage.text == passage.text.rstrip()


@settings(max_examples=150, deadline=None)
@given(TABLES, st.integers(1, 80), st.sampled_from(["markdown", "csv"]), st.sampled_from([len, quarter, words]))
def test_limits_and_lines_hold_in_tables(text: str, max_tokens: int, markup: Markup, count: object) -> None:
    assert callable(count)
    passages = split(text, count, max_tokens, markup=markup)
    assert all(passage.tokens == count(passage.text) <= max_tokens for passage in passages)
    lines = text.split("\n")
    found = 0
    for passage in passages:
        own = "\n".join(lines[passage.start_line - 1 : passage.end_line])
        body = passage.text if passage.text in own else passage.text[passage.text.index("\n") + 1 :]
        body = body if body in own else body[body.index("\n") + 1 :]
        assert body in own
        found += len("".join(body.split()))
    assert found == len("".join(text.split()))


@given(TEXTS, MARKUPS)
def test_the_same_text_is_cut_the_same(text: str, markup: Markup) -> None:
    assert split(text, quarter, 20, markup=markup) == split(text, quarter, 20, markup=markup)


def test_what_fits_is_one_chunk_with_its_lines() -> None:
    [passage] = split("\n\n# A\n\nb c\n\n\n", words, 10)
    assert (passage.text, passage.start_line, passage.end_line, passage.heading) == ("# A\n\nb c", 3, 5, "A")
    assert split(" \n\n\t", words, 10) == []


def test_sections_are_kept_apart_before_paragraphs_are() -> None:
    section = "one two three four five\n\nsix seven eight nine ten\n"
    text = f"# Guide\n\n{section}\n## Widgets\n\n{section}\n# Other\n\n{section}"
    passages = split(text, words, 15)
    assert [(p.heading, p.text.split("\n")[0]) for p in passages] == [
        ("Guide", "# Guide"),
        ("Guide > Widgets", "## Widgets"),
        ("Other", "# Other"),
    ]


def test_small_sections_share_a_chunk_and_large_ones_do_not() -> None:
    small = "".join(f"# H{i}\n\na b c\n\n" for i in range(4))
    assert len(texts(small, 30)) == 1
    assert len(split(small, words, 30, min_tokens=5)) == 4


def test_a_heading_stays_with_what_follows_it() -> None:
    text = "".join(f"# H{i}\n\n" + "\n\n".join("w " * 9 for _ in range(5)) + "\n\n" for i in range(20))
    for passage in texts(text, 20):
        assert not passage.split("\n")[-1].startswith("#")


def test_code_blocks_stay_whole_where_they_fit() -> None:
    block = "```\n" + "\n\n".join(f"code line {i}" for i in range(5)) + "\n# no heading\n```"
    text = "\n\n".join(f"{'word ' * 12}\n\n{block}" for _ in range(10))
    passages = split(text, words, 32)
    assert sum(block in passage.text for passage in passages) == 10
    assert {passage.heading for passage in passages} == {""}


def test_an_unclosed_fence_does_not_turn_the_rest_into_code() -> None:
    text = "```\nstray\n\n# Real\n\n" + "word " * 30
    assert split(text, words, 25)[-1].heading == "Real"


def test_a_chunk_of_several_sections_names_what_they_share() -> None:
    assert split("# Guide\n\n## A\n\na\n\n## B\n\nb", words, 99)[0].heading == "Guide"
    assert split("# A\n\na\n\n# B\n\nb", words, 99)[0].heading == "A"


def test_front_matter_holds_no_heading() -> None:
    [passage] = split("---\ntitle: x\n---\n\nbody", words, 99)
    assert passage.heading == ""


def test_rst_headings_rank_by_first_appearance() -> None:
    fill = "\n" + "word " * 9 + "\n\n"
    text = f"=====\nTitle\n=====\n{fill}Part\n----\n{fill}Deep\n~~~~\n{fill}Next\n----\n{fill}"
    assert [p.heading for p in split(text, words, 18, markup="rst")] == [
        "Title",
        "Title > Part",
        "Title > Part > Deep",
        "Title > Next",
    ]


def test_comments_in_source_code_are_no_headings() -> None:
    [passage] = split("# comment\nx = 1\n", words, 99, markup="plain")
    assert passage.heading == ""


def _table(rows: int, first: int = 0) -> str:
    body = "\n".join(f"| kind {i} | {i} minutes |" for i in range(first, first + rows))
    return f"| tea | time |\n| --- | --- |\n{body}"


def test_a_chunk_inside_a_table_repeats_its_header() -> None:
    passages = split(f"# Teas\n\n{_table(60)}\n\nAfter it.", quarter, 64)
    assert len(passages) > 5
    for passage in passages[:-1]:
        assert "| tea | time |\n| --- | --- |\n| kind" in passage.text
        assert passage.tokens == quarter(passage.text) <= 64
    shown = [line for passage in passages for line in passage.text.split("\n") if line.startswith("| kind")]
    assert shown == _table(60).split("\n")[2:], "every row once, in order"
    assert [p.start_line for p in passages[1:]] == [p.end_line + 1 for p in passages[:-1]][: len(passages) - 1]


def test_a_new_row_in_a_table_leaves_the_other_chunks_alone() -> None:
    before = texts(_table(400), 60)
    after = _table(400).replace("| kind 200 |", "| new | 1 |\n| kind 200 |")
    assert len(set(before) - set(texts(after, 60))) <= 2


def test_a_header_that_would_fill_the_chunk_is_not_repeated() -> None:
    header = "| " + " | ".join(f"a long name of column {i}" for i in range(20)) + " |"
    table = "\n".join([header, "|" + " --- |" * 20, *(f"| {i} |" + " x |" * 19 for i in range(50))])
    assert sum(header in text for text in texts(table, 200)) == 1


def test_a_line_under_a_pipe_is_no_table_and_neither_is_code() -> None:
    code = "```\na | b\n--- | ---\n" + "1 | 2\n" * 60 + "```"
    assert sum("a | b" in text for text in texts(code, 40)) == 1
    heading = "a | b\n-----\n" + "word | word\n" * 60
    assert sum("a | b" in text for text in texts(heading, 40)) == 1


def test_rows_of_csv_repeat_the_first_line() -> None:
    data = "tea,time\n" + "\n".join(f"kind {i},{i} minutes" for i in range(100))
    passages = split(data, words, 20, markup="csv")
    assert len(passages) > 10
    assert all(passage.text.startswith("tea,time\nkind") for passage in passages)
    assert all(passage.tokens <= 20 for passage in passages)
    lines = data.split("\n")
    assert passages[3].text.split("\n")[1] == lines[passages[3].start_line - 1]


def test_a_record_of_csv_over_several_lines_stays_whole() -> None:
    records = [f'tea {i},"first line of {i}\nsecond line\nthird line of {i}"' for i in range(40)]
    for text in texts("name,note\n" + "\n".join(records), 40, "csv"):
        assert text.count('"') % 2 == 0
    stray = 'a,b\n1,"never closed\n' + "\n".join(f"{i},x" for i in range(60))
    assert all(text.startswith("a,b\n") for text in texts(stray, 12, "csv"))


LICENCE = """# Copyright 2026 the authors
# Licensed under the terms that follow, which say in many words that you may use, copy, change and pass on all of
# this, as long as these words stay with it, and that nobody answers for anything that comes of it in any way.
"""


@pytest.mark.parametrize("style", ["#", "//", "/*"])
def test_the_licence_of_a_source_file_is_one_chunk_everywhere(style: str) -> None:
    licence = LICENCE.replace("#", "//") if style == "//" else LICENCE
    if style == "/*":
        licence = "/*\n" + LICENCE.replace("# ", "").replace("follow, ", "follow,\n\n") + "*/\n"
    first = split(licence + "\nimport a\n\na.run()\n", words, 200, markup="plain")
    second = split(licence + "\nimport b\n\nb.walk()\n", words, 200, markup="plain")
    assert [len(first), len(second)] == [2, 2]
    assert first[0].chunk_id == second[0].chunk_id
    assert first[1].chunk_id != second[1].chunk_id


def test_a_short_licence_and_other_comments_stay_with_the_code() -> None:
    assert len(texts("# SPDX-License-Identifier: MIT\n\nimport a\n", 200, "plain")) == 1
    assert len(texts("# " + "words of an author " * 20 + "\n\nimport a\n", 200, "plain")) == 1


def test_a_long_line_is_cut_at_sentence_ends() -> None:
    parts = texts(" ".join(f"This is sentence number {i}." for i in range(40)), 12)
    assert all(part.endswith(".") and part.startswith("This") for part in parts)


def test_equal_text_is_one_identity() -> None:
    first, second = split("a b\n\n# H\n\nc d", words, 2)[:1], split("x\n\na b", words, 2)[-1:]
    assert first[0].chunk_id == second[0].chunk_id


def test_a_limit_below_one_is_our_bug() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        split("a", words, 0)


def _document(seed: int, paragraphs: int = 600) -> list[str]:
    """A long text as a list of paragraphs and headings."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 10))) for _ in range(500)]
    parts = []
    for i in range(paragraphs):
        if rng.random() < 0.08:
            parts.append(f"{'#' * rng.randrange(1, 4)} Heading {i} {rng.choice(vocabulary)}")
        parts.append("\n".join(" ".join(rng.choices(vocabulary, k=12)) for _ in range(rng.randrange(1, 7))))
    return parts


def _survival(before: list[str], after: list[str]) -> float:
    kept = set(texts("\n\n".join(after), 256))
    chunks = texts("\n\n".join(before), 256)
    assert len(chunks) > 50
    return sum(chunk in kept for chunk in chunks) / len(chunks)


@pytest.mark.parametrize("edit", ["insert at the top", "insert", "delete", "change a word"])
def test_an_edit_leaves_the_other_chunks_alone(edit: str) -> None:
    survivals = []
    for seed in range(12):
        before, rng = _document(seed), random.Random(seed)
        after = list(before)
        place = 0 if edit == "insert at the top" else rng.randrange(1, len(after))
        if edit.startswith("insert"):
            after.insert(place, "An entirely new paragraph was put in here. " * rng.randrange(1, 6))
        elif edit == "delete":
            del after[place]
        else:
            after[place] += " changed"
        survivals.append(_survival(before, after))
    assert sum(survivals) / len(survivals) >= 0.95
    assert min(survivals) >= 0.85


def test_chunks_are_well_filled() -> None:
    passages = split("\n\n".join(_document(0)), words, 256)
    assert sum(passage.tokens for passage in passages) / len(passages) / 256 >= 0.55


@pytest.mark.parametrize(
    "text",
    [
        "".join(random.Random(0).choices("abcdefgh", k=3_000_000)),
        "a" * 1_000_000,
        "\n" * 3_000_000,
        "`" * 1_000_000,
        " " * 1_000_000 + "x",
        "ab " * 200_000,
        "```python\nx\n" * 60_000,
        "\n".join("`" * length for length in range(2400, 2, -1)),
    ],
    ids=[
        "no spaces",
        "one character",
        "blank lines",
        "one fence",
        "spaces",
        "words",
        "open fences",
        "fences",
    ],
)
def test_hostile_texts_are_cut(text: str) -> None:
    passages = split(text, quarter, 512)
    assert all(passage.tokens <= 512 for passage in passages)


@pytest.mark.skipif(not WAR_AND_PEACE.exists(), reason="the shared data is not here")
def test_a_long_book_is_cut_well() -> None:
    text = WAR_AND_PEACE.read_text(encoding="utf-8")
    passages = split(text, quarter, 512, markup="plain")
    assert sum(passage.tokens for passage in passages) / len(passages) / 512 > 0.45


def test_the_version_is_part_of_what_callers_sign() -> None:
    assert chunking.VERSION >= 1
