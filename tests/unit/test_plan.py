"""Prompts as spans: they partition the context, and masks come back out of them."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire_engine.plan import Mask, Prompt, Segment, Span, StitchPlan, compute_all, spans_of, stitch

masks = st.lists(st.booleans(), max_size=60).map(lambda bits: np.array(bits, dtype=bool))


def mask_of(plan: StitchPlan) -> Mask:
    """Which positions are computed: the inverse of spans_of."""
    mask = np.zeros(plan.prompt.context_tokens, dtype=bool)
    for span in plan.recomputed:
        mask[span.start : span.stop] = True
    return mask


def prompt_of(preamble: int, chunks: list[int], question: int = 3) -> Prompt:
    """Segments of such lengths; every token is its own position."""
    ids = iter(range(10_000))

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(ids) for _ in range(count))

    return Prompt(
        Segment(take(preamble), "preamble"),
        tuple(Segment(take(length), f"chunk{i}") for i, length in enumerate(chunks)),
        Segment(take(question)),
    )


def test_positions_of_a_prompt() -> None:
    prompt = prompt_of(4, [5, 1], question=2)
    assert prompt.starts == (0, 4, 9, 10)
    assert prompt.context_tokens == 10
    assert prompt.tokens == tuple(range(12))
    assert [segment.key for segment in prompt.stored] == ["preamble", "chunk0", "chunk1"]


@given(masks)
def test_spans_partition_and_round_trip(mask: Mask) -> None:
    spans = spans_of(mask)
    assert [p for span in spans for p in range(span.start, span.stop)] == list(range(len(mask)))
    assert all(len(span) > 0 for span in spans)
    assert all(a.reuse != b.reuse for a, b in pairwise(spans)), "neighbours of one kind are one span"
    plan = StitchPlan(prompt_of(0, [len(mask)]), spans)
    assert mask_of(plan).tolist() == mask.tolist()


@given(st.integers(0, 9), st.lists(masks, max_size=5))
def test_stitch_reuses_the_preamble_and_what_is_not_masked(preamble: int, recompute: list[Mask]) -> None:
    prompt = prompt_of(preamble, [len(mask) for mask in recompute])
    plan = stitch(prompt, recompute)
    assert mask_of(plan).tolist() == [False] * preamble + [bool(bit) for mask in recompute for bit in mask]
    assert plan.recomputed_tokens == sum(int(mask.sum()) for mask in recompute)
    assert plan.reused_tokens + plan.recomputed_tokens == prompt.context_tokens


@given(masks, st.integers(0, 60), st.integers(0, 60))
def test_reused_within(mask: Mask, start: int, stop: int) -> None:
    plan = StitchPlan(prompt_of(0, [len(mask)]), spans_of(mask))
    assert plan.reused_within(start, stop) == np.count_nonzero(~mask[start:stop])


@given(st.integers(0, 9), st.lists(masks, max_size=5))
def test_reused_within_segments_adds_up(preamble: int, recompute: list[Mask]) -> None:
    plan = stitch(prompt_of(preamble, [len(mask) for mask in recompute]), recompute)
    assert sum(plan.reused_within(a, b) for a, b in pairwise(plan.prompt.starts)) == plan.reused_tokens


def test_compute_all_reuses_nothing() -> None:
    plan = compute_all(prompt_of(4, [5, 6]))
    assert plan.spans == (Span(0, 15, reuse=False),)
    assert (plan.reused_tokens, plan.recomputed_tokens) == (0, 15)


@given(masks, st.integers(0, 60))
def test_until_recomputes_what_stands_before(mask: Mask, stop: int) -> None:
    prompt = prompt_of(2, [len(mask)])
    until = stitch(prompt, [mask]).until(min(stop, prompt.context_tokens))
    before = np.arange(prompt.context_tokens) < stop
    assert mask_of(until).tolist() == (before & np.concatenate([[False] * 2, mask])).tolist()
    assert until.reused_tokens + until.recomputed_tokens == prompt.context_tokens
    assert until.spans[0].start == 0
