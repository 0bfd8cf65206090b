"""Which passages are computed instead of read, and what is left of a prompt behind them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_engine import plan
from quire_engine.plan import Prompt, Segment

Times = st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.1, 1e4)), max_size=6)


@pytest.mark.parametrize(
    ("read_ms", "compute_ms", "expected"),
    [
        ([], [], 0),
        ([0, 0, 0, 0], [5, 5, 5, 5], 0),
        ([1, 1, 1, 1], [50, 50, 50, 50], 0),
        ([10, 10, 10, 10], [10, 10, 10, 10], 2),
        ([30, 30, 30, 30], [10, 10, 10, 10], 3),
        ([1e9, 1e9], [10, 10], 1),
        ([0, 0, 90, 90], [10, 10, 10, 10], 3),
    ],
)
def test_how_many_passages_are_computed(read_ms: list[float], compute_ms: list[float], expected: int) -> None:
    assert plan.leading(read_ms, compute_ms) == expected


@given(Times)
def test_no_other_number_is_sooner_and_never_all_of_them(times: list[tuple[float, float]]) -> None:
    read, compute = [r for r, _ in times], [c for _, c in times]

    def done(count: int) -> float:
        return max(sum(compute[:count]), sum(read[count:]))

    best = plan.leading(read, compute)
    assert 0 <= best < max(1, len(times))
    assert all(done(best) <= done(count) for count in range(len(times)))
    if sum(read) <= min(compute, default=0):
        assert best == 0, "a disk that keeps up is left alone"


def test_what_is_left_of_a_prompt() -> None:
    chunks = tuple(Segment((n,) * n, f"key {n}") for n in (3, 5, 7))
    whole = Prompt(Segment((1, 2), "opening"), chunks, Segment((9,)), position=10)
    for count in range(4):
        rest = plan.behind(whole, count)
        assert rest.position == 12 + sum(len(chunk) for chunk in chunks[:count])
        assert rest.context_tokens == whole.context_tokens
        assert rest.starts[1:] == whole.starts[1 + count :]
        assert rest.stored == chunks[count:]
        assert rest.stored_start == rest.position
        assert rest.tokens == whole.tokens[rest.position - whole.position :]
