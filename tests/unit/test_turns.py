"""The layout of a conversation: what stands in the context, in which turn, and what leaves when it is full."""

from hypothesis import given
from hypothesis import strategies as st

from quire_engine.turns import lay_out
from quire_engine.types import Exchange

PASSAGE, WORDS = 10, 3  # tokens of a passage, and of a question or an answer


def size(exchange: Exchange) -> int:
    return PASSAGE * len(exchange.passages) + WORDS * (1 + bool(exchange.answer))


def turn(*passages: str, answer: str = "so") -> Exchange:
    return Exchange(passages, f"about {passages}?", answer)


conversations = st.lists(
    st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=4).map(lambda passages: turn(*passages)),
    min_size=1,
    max_size=12,
)


def test_a_passage_stands_where_it_was_first_found() -> None:
    standing, dropped = lay_out([turn("a", "b"), turn("b", "c"), turn("a", answer="")], 1000, size)
    assert [exchange.passages for exchange in standing] == [("a", "b"), ("c",), ()]
    assert dropped == 0


def test_passages_that_were_not_found_for_long_leave_first() -> None:
    """75 tokens of 74: passages leave until no more than 37 are taken; `a` was found again, so it stays longer."""
    exchanges = [turn("a", "b", "c", "f"), turn("d", "a"), turn("e", answer="")]
    standing, dropped = lay_out(exchanges, 74, size)
    assert [exchange.passages for exchange in standing] == [(), ("d",), ("e",)]
    assert dropped == 4
    standing, dropped = lay_out([*exchanges[:2], turn("e", "a", answer="")], 74, size)
    assert [exchange.passages for exchange in standing] == [("a",), (), ("e",)], "the question's own never leave"
    assert dropped == 4


def test_whole_turns_leave_when_their_words_alone_are_too_many() -> None:
    standing, _ = lay_out([turn(), turn(), turn(answer="")], 10, size)
    assert len(standing) == 2


@given(conversations, st.integers(60, 200))
def test_it_fits_and_the_question_keeps_its_passages(conversation: list[Exchange], room: int) -> None:
    *earlier, last = conversation
    asked = Exchange(last.passages, last.question, "")
    standing, dropped = lay_out([*earlier, asked], room, size)
    assert sum(map(size, standing)) <= room
    assert set(asked.passages) <= {passage for exchange in standing for passage in exchange.passages}
    everywhere = [passage for exchange in standing for passage in exchange.passages]
    assert len(everywhere) == len(set(everywhere))
    assert dropped >= 0


@given(conversations, st.integers(60, 200))
def test_the_next_question_finds_the_same_layout(conversation: list[Exchange], room: int) -> None:
    """While nothing has to leave, what stood in the context when a question was asked still stands there."""
    *earlier, last = conversation
    before, _ = lay_out([*earlier, Exchange(last.passages, last.question, "")], room, size)
    after, dropped = lay_out([*earlier, last, turn(answer="")], room, size)
    if dropped == 0 and len(after) > len(before):
        said = [Exchange(e.passages, e.question, e.answer) for e in after[:-1]]
        assert said[:-1] == list(before[:-1])
        assert said[-1].passages == before[-1].passages
