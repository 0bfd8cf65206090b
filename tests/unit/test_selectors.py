"""Selectors: expressions by name, their scores, and the budget they keep."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire_engine.errors import QuireError
from quire_engine.selection.selectors import DEFAULT, Evidence, Rule, choose, parse

lengths = st.lists(st.integers(1, 200), min_size=1, max_size=6)
ratios = st.floats(0, 1)


def evidence(tokens: int, seed: int = 0) -> Evidence:
    random = np.random.default_rng(seed)
    sensitivity, spectral, probe = random.random((3, tokens), dtype=np.float32)
    return Evidence(tokens, {"sensitivity": sensitivity, "spectral": spectral}, probe)


def chunks_of(tokens: list[int]) -> list[Evidence]:
    return [evidence(count, seed) for seed, count in enumerate(tokens)]


def test_default_and_names() -> None:
    assert parse("default") == parse(DEFAULT) == parse(" first + 3 * probe * early ")
    assert parse("default").name == "first+3*probe*early"
    assert parse("default").asks_question
    assert not parse("sensitivity*spectral").asks_question


@pytest.mark.parametrize(
    ("expression", "unknown"),
    [
        ("probes", "probes"),
        ("probe*sens", "sens"),
        ("", ""),
        ("probe*", ""),
        ("first+", ""),
        ("3", "3"),
        ("0*first", "0"),
        ("spectral:1.5", "spectral:1.5"),
        ("spectral:nan", "spectral:nan"),
        ("highpass:", "highpass:"),
        ("probe:0.3", "probe:0.3"),
    ],
)
def test_an_unknown_selector_is_refused_by_name(expression: str, unknown: str) -> None:
    with pytest.raises(QuireError) as refused:
        parse(expression)
    assert refused.value.message == f"There is no selector {unknown!r}."
    assert all(name in refused.value.hint for name in ("default", "probe", "sensitivity", "spectral", "first"))


def test_a_product_multiplies_its_factors() -> None:
    known = evidence(40)
    product = known.probe * known.stored["sensitivity"] * known.stored["spectral"]
    np.testing.assert_allclose(Rule(("probe", "sensitivity", "spectral")).scores(known), product, rtol=1e-6)
    np.testing.assert_array_equal(Rule(("sensitivity",)).scores(known), known.stored["sensitivity"])


def test_a_score_that_was_not_stored_is_never_made_up() -> None:
    with pytest.raises(KeyError):
        Rule(("probe", "sensitivity")).scores(Evidence(30, {}, evidence(30).probe))


def test_bands_of_frequencies_have_one_spelling() -> None:
    assert parse("spectral:.3").name == "spectral:0.3"
    assert parse("spectral:0.5 * highpass:.50").name == "spectral*highpass"
    assert parse("2*spectral:.3 + probe*highpass").stored_scores == {"spectral:0.3", "highpass"}
    assert parse("default").stored_scores == parse("first*random+value-deviation").stored_scores == frozenset()
    low, half = np.arange(32, 0, -1, dtype=np.float32), np.ones(32, dtype=np.float32)
    known = Evidence(32, {"spectral:0.3": low, "spectral": half}, np.zeros(0, np.float32))
    np.testing.assert_array_equal(parse("spectral:.3").rules[0].scores(known), low)


def test_deviating_values_are_sought_over_all_chunks() -> None:
    deviations = [np.full(64, 1e-6, np.float32), np.full(64, 1e-6, np.float32)]
    deviations[1][16:48] = 1.0
    nothing = np.zeros(0, np.float32)
    selector = parse("value-deviation")
    first, second = choose(selector, [Evidence(64, {}, nothing, moved) for moved in deviations], 32 / 128)
    assert selector.compares_values
    assert not selector.asks_question
    assert not first.any()
    assert np.flatnonzero(second).tolist() == list(range(16, 48))


def test_first_takes_the_beginning_of_every_chunk() -> None:
    for mask in choose(parse("first"), chunks_of([64, 128]), 0.5):
        assert mask[: len(mask) // 2].all()
        assert not mask[len(mask) // 2 :].any()


@pytest.mark.parametrize(("expression", "ratio", "beginning"), [("first+probe", 0.25, 16), ("3*first+probe", 0.5, 48)])
def test_rules_share_the_budget(expression: str, ratio: float, beginning: int) -> None:
    """A share goes to the beginnings of both chunks, the rest to where the question looks, nothing twice."""
    probes = [np.full(128, 1e-6, np.float32), np.full(128, 1e-6, np.float32)]
    probes[1][:16] = 2.0  # a beginning already
    probes[1][96:128] = 1.0
    first, second = choose(parse(expression), [Evidence(128, {}, probe) for probe in probes], ratio)
    assert np.flatnonzero(first).tolist() == list(range(beginning))
    assert np.flatnonzero(second).tolist() == [*range(beginning), *range(96, 128)]


def test_random_is_the_same_every_time() -> None:
    chunks = chunks_of([100, 90])
    for once, again in zip(choose(parse("random"), chunks, 0.3), choose(parse("random"), chunks, 0.3), strict=True):
        assert once.any()
        np.testing.assert_array_equal(once, again)


@given(lengths, ratios)
def test_a_question_spends_one_budget_over_all_chunks(tokens: list[int], ratio: float) -> None:
    masks = choose(parse("default"), chunks_of(tokens), ratio)
    assert [len(mask) for mask in masks] == tokens
    assert -1e-6 < sum(int(mask.sum()) for mask in masks) - ratio * sum(tokens) < 1


@given(lengths, st.floats(0.0, 0.99), st.sampled_from(["default", "first", "spectral"]))
def test_the_budget_is_whole_tiles_and_never_less_than_asked(tokens: list[int], ratio: float, name: str) -> None:
    chosen = sum(int(mask.sum()) for mask in choose(parse(name), chunks_of(tokens), ratio, tile=64))
    assert chosen % 64 == 0 or chosen == sum(tokens)
    assert -1e-6 < chosen - ratio * sum(tokens) < 64


@given(lengths, ratios, st.sampled_from(["sensitivity", "spectral", "first", "random", "sensitivity*spectral"]))
def test_without_a_question_the_budget_is_spread_evenly(tokens: list[int], ratio: float, name: str) -> None:
    for count, mask in zip(tokens, choose(parse(name), chunks_of(tokens), ratio), strict=True):
        assert abs(int(mask.sum()) - ratio * count) <= 2


@given(lengths, st.sampled_from(["default", "spectral"]))
def test_nothing_and_everything(tokens: list[int], name: str) -> None:
    chunks = chunks_of(tokens)
    assert not any(mask.any() for mask in choose(parse(name), chunks, 0.0))
    assert all(mask.all() for mask in choose(parse(name), chunks, 1.0))


def test_the_budget_goes_where_the_question_looks() -> None:
    """Half of the second chunk holds all of the attention."""
    probes = [np.full(64, 1e-6, np.float32), np.full(64, 1e-6, np.float32)]
    probes[1][16:48] = 1.0
    first, second = choose(parse("probe"), [Evidence(64, {}, probe) for probe in probes], 32 / 128)
    assert not first.any()
    assert np.flatnonzero(second).tolist() == list(range(16, 48))


def test_scores_of_zero_still_spend_the_budget() -> None:
    zero = np.zeros(64, np.float32)
    (mask,) = choose(parse("default"), [Evidence(64, {"sensitivity": zero}, zero)], 0.5)
    assert mask.sum() == 32


def test_a_selector_that_knows_the_prompt_spends_nothing_on_what_is_intact() -> None:
    chunks = [replace(evidence(100), intact=True), evidence(100, 1), evidence(100, 2)]
    for expression in ("default", "probe", "first+probe"):
        masks = choose(parse(expression), chunks, 0.3)
        assert not masks[0].any()
        assert sum(int(mask.sum()) for mask in masks) == 90
    assert all(mask.all() for mask in choose(parse("probe"), chunks, 1.0)), "full prefill is all of it"
    assert [int(mask.sum()) for mask in choose(parse("spectral"), chunks, 0.32)] == [32] * 3, "as published"
    assert sum(int(mask.sum()) for mask in choose(parse("probe"), chunks, 0.9)) == 200, "no more than there is"


def test_early_prefers_the_beginning_a_little() -> None:
    flat = replace(evidence(64), probe=np.ones(64, dtype=np.float32))
    assert list(Rule(("early",)).scores(flat)[[0, 15]]) == pytest.approx([1.0, 0.5])
    (mask,) = choose(parse("probe*early"), [flat], 0.25)
    assert mask[:16].all()
    assert mask.sum() == 16
