"""A model's precision, measured: on tiny generated models, and by the command that a person uses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from quire import paths
from quire.cli import main
from quire_engine.engine import Engine, EngineSettings
from quire_engine.errors import Aborted, ModelError
from quire_engine.precision import calibrate, measured
from quire_engine.precision import profile as profiles
from quire_engine.precision.profile import UNKNOWN, Case, Profile
from quire_engine.prompt import Wording
from quire_engine.runtimes.transformer import Transformer

from .conftest import Tiny

SHIPPED = Path(__file__).parents[2] / "assets" / "profiles"
SETTINGS = EngineSettings(Wording("Answer from the documents."))
PASSAGES = [f"Passage {number}: the keeper wrote {'rain and wind ' * number}in the book." for number in range(6)]


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(5, 260, count).tolist())


CASES = [
    Case(tokens(8, 1), (tokens(70, 2), tokens(90, 3)), tokens(12, 4)),
    Case(tokens(8, 1), (tokens(5, 5),), tokens(9, 6)),
]


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> Transformer:
    return Transformer.load(tiny("llama"))


@pytest.fixture(scope="module")
def found(llama: Transformer) -> Profile:
    return measured.measure(llama, CASES)


def scaled(model: Transformer, channels: slice, keys: float, queries: float) -> Transformer:
    """The model with these channels of layer 0's key heads and query heads multiplied."""

    def times(weight: torch.Tensor, factor: float) -> torch.Tensor:
        by_head = weight.clone().view(-1, model.shape.key_dim, weight.shape[1])
        by_head[:, channels] *= factor
        return by_head.view(weight.shape)

    layer = model.layers[0]
    k, q = layer.attn_k, layer.attn_q
    layer = replace(
        layer, attn_k=replace(k, weight=times(k.numbers, keys)), attn_q=replace(q, weight=times(q.numbers, queries))
    )
    return replace(model, layers=(layer, *model.layers[1:]))


def test_rounding_costs_less_the_more_bits_there_are(found: Profile) -> None:
    for kl in (found.k, found.v, found.v_by_channel):
        assert (kl[:, 0] > 0).all(), "one bit changes the answer"
        assert (kl[:, -1] < kl[:, 0] / 4).all(), "four bits change it much less"


def test_a_rescaling_that_changes_no_answer_changes_no_plan(llama: Transformer, found: Profile) -> None:
    """Larger keys under smaller queries are the same model; norms of weight gradients would tell them apart."""
    same = measured.measure(scaled(llama, slice(2, 4), 8, 1 / 8), CASES)
    np.testing.assert_allclose(same.k_weights, found.k_weights, rtol=1e-2)
    before, after = (profiles.measured_plan(one, 3.4, llama.shape) for one in (found, same))
    assert before.k_widths == after.k_widths


def test_channels_that_queries_ask_for_get_more_bits(llama: Transformer, found: Profile) -> None:
    loud = measured.measure(scaled(llama, slice(2, 4), 1, 8), CASES[:1])
    widths = (profiles.k_widths(one.k_weights[0], 3, llama.shape) for one in (found, loud))
    quiet_pair, loud_pair = (of_layer[2] for of_layer in widths)
    assert loud_pair > quiet_pair


def test_progress_and_stopping(llama: Transformer) -> None:
    seen: list[tuple[int, int]] = []
    measured.measure(llama, CASES[1:], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Aborted):
        measured.measure(llama, CASES[1:], should_stop=lambda: True)
    with pytest.raises(ValueError, match="at least one question"):
        measured.measure(llama, [])


def test_an_engine_measures_its_model_and_the_next_one_uses_it(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SETTINGS, profiles=(tmp_path / "profiles",))
    before = Engine(tiny("llama"), tmp_path / "cache", settings)
    assert before.profile is UNKNOWN
    with pytest.raises(Aborted):
        before.measure_precision(PASSAGES, lambda done, total: None, lambda: True)
    assert not (tmp_path / "profiles").exists()
    seen: list[tuple[int, int]] = []
    before.measure_precision(PASSAGES, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert len({total for _, total in seen}) == 1
    after = Engine(tiny("llama"), tmp_path / "cache", settings)
    assert after.profile.known
    assert after.chunks.store.root != before.chunks.store.root, "another plan is another cache"
    sizes = after.plan_sizes()
    assert sizes["tiny"] < sizes["default"] < sizes["fp16"]
    after.cache(PASSAGES[:1])
    with after.chunks.store.open(after.address(PASSAGES[0])) as reader:
        assert reader.header.plan.k_widths


def test_a_model_larger_than_the_memory_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(ModelError, match="of memory"):
        calibrate.run(tiny("llama"), CASES, lambda done, total: None, lambda: False)


def test_the_bundled_model_comes_with_its_profile(smollm: Path, tmp_path: Path) -> None:
    engine = Engine(smollm, tmp_path, replace(SETTINGS, profiles=(tmp_path / "own", SHIPPED)))
    assert engine.profile.known
    sizes = engine.plan_sizes()
    assert sizes["tiny"] < sizes["compact"] < sizes["default"] <= 3.4
    assert 3.3 < sizes["kvmix"] < 3.6


def test_the_command_measures_on_the_text_that_comes_with_quire(tiny: Tiny) -> None:
    ran = CliRunner().invoke(main, ["models", "profile", "--model", str(tiny("qwen2"))])
    assert ran.exit_code == 0, ran.output
    assert "a text that comes with Quire" in ran.stdout
    assert "default" in ran.stdout
    assert len(list((paths.data_dir() / "profiles").iterdir())) == 1
