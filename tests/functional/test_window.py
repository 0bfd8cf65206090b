"""A conversation whose older tokens are packed gives the answer that it gives without."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quire_engine.kv.window import LiveKV, Window
from quire_engine.runtimes.llama_context import LlamaModel
from quire_engine.runtimes.transformer import Transformer
from quire_engine.types import BitPlan
from tiny_gguf import write_tiny_gguf

CALIBRATION = Path(__file__).parents[2] / "assets" / "calibration.txt"
FLOOR = 0.004  # what another batch shape alone does to llama.cpp's scores
ANSWER_TOKENS = 8


def test_the_answer_is_unharmed(smollm: Path) -> None:
    """6 bits for keys and 4 for values behind the latest 128 tokens, over a context of some 400."""
    vocabulary, model = LlamaModel(smollm, vocabulary_only=True), Transformer.load(smollm)
    text = CALIBRATION.read_text()[:1500]
    question = f"<|im_start|>user\n{text}\n\nWho leans on the gate?<|im_end|>\n<|im_start|>assistant\n"
    prompt = vocabulary.tokenize(question, special=True)

    def answered(plan: BitPlan, window: Window, forced: list[int] | None = None) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens and log probabilities; forced: go on from these tokens instead."""
        live = LiveKV(model.shape, plan, window)
        for start in range(0, len(prompt), 100):  # turn by turn
            scores = model.extend(prompt[start : start + 100], live)
        tokens, found = [], []
        for step in range(ANSWER_TOKENS):
            tokens.append(int(np.argmax(scores)))
            found.append(torch.log_softmax(torch.from_numpy(scores).double(), dim=-1))
            scores = model.extend([forced[step] if forced else tokens[-1]], live)
        packed = live.packed_tokens
        assert (packed > len(prompt) / 2) == (window.recent < len(prompt)), "much of the text is packed, or nothing"
        return tokens, torch.stack(found)

    layers = model.shape.layers
    reference, exact = answered(BitPlan.exact(layers), Window(1000))
    tokens, scores = answered(BitPlan.uniform(layers, 6, 4), Window(128), reference)
    assert tokens == reference
    assert float((exact.exp() * (exact - scores)).sum(-1).mean()) < FLOOR
    _, crude = answered(BitPlan.uniform(layers, 2, 2), Window(128), reference)
    assert float((exact.exp() * (exact - crude)).sum(-1).mean()) > 2 * FLOOR, "two bits show, so this says something"


def test_live_kv_is_a_past_like_any_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Unpacked, decoding through it gives what reading at once gives."""
    model = Transformer.load(write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", "qwen2"))
    tokens = np.random.default_rng(5).integers(5, 300, 150).tolist()
    live = LiveKV(model.shape, BitPlan.exact(2), Window(16))
    scores = [model.extend([token], live) for token in tokens]
    with torch.no_grad():
        expected = model.logits(model.read(tokens).hidden[0]).numpy()
    np.testing.assert_allclose(np.stack(scores), expected, atol=0.03)
