"""Weights that stay the file's blocks: the same scores as with numbers, in a third of the memory; what does not fit."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp.llama_cpp as c
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quire_engine import gguf, selfcheck
from quire_engine.engine import Engine, Request
from quire_engine.errors import ContextOverflow, ModelError
from quire_engine.runtimes import choose, torch_device, weights
from quire_engine.runtimes.torch_gpu import TorchRuntime
from quire_engine.runtimes.transformer import Layer, Linear, Norm, Transformer
from quire_engine.runtimes.weights import Blocks
from quire_kernels import dispatch, triton_gguf
from quire_kernels.device_weights import FORMATS, BlockFormat, Packed
from stitching import (
    PASSAGES,
    ROUNDING,
    SETTINGS,
    distance,
    everything,
    full,
    prompt_of,
    readers,
    some_tokens,
    stitched,
)
from tiny_gguf import write_tiny_gguf

QUANTISED = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models with biases, by llama.cpp's own quantiser."""
    folder = tmp_path_factory.mktemp("quantised")
    exact = write_tiny_gguf(folder / "exact.gguf", "qwen2", heads=16)

    def model(name: str) -> Path:
        path = folder / f"{name}.gguf"
        parameters = c.llama_model_quantize_default_params()
        parameters.ftype = QUANTISED[name]
        assert path.exists() or c.llama_model_quantize(bytes(exact), bytes(path), ctypes.byref(parameters)) == 0
        return path

    return model


@torch.no_grad()
def scores_of(model: Transformer, tokens: tuple[int, ...]) -> np.ndarray:
    return np.asarray(model.logits(model.read(tokens).hidden[0]).numpy())


def tensors(model: Transformer) -> Iterator[Tensor]:
    """All that a model keeps, each once."""
    kept: dict[int, Tensor] = {}

    def keep(part: object) -> None:
        match part:
            case Tensor():
                kept[id(part)] = part
            case Blocks():
                keep(part.packed.data)
                keep(part.scratch)
            case Linear() | Norm():
                keep(part.weight)
                keep(getattr(part, "bias", None))
            case Layer():
                for one in vars(part).values():
                    keep(one)

    for part in (model.embedding, *model.layers, model.output_norm, model.output):
        keep(part)
    yield from kept.values()


# The same model


@pytest.mark.parametrize("name", QUANTISED)
def test_blocks_give_the_scores_of_their_numbers(quantised: Callable[[str], Path], name: str) -> None:
    path, tokens = quantised(name), some_tokens(30, 3)
    packed, dense = Transformer.load(path, packed=True), Transformer.load(path)
    kept = {tensor.dtype for tensor in tensors(packed) if tensor.dim() == 2}
    assert kept == {torch.uint8}
    np.testing.assert_allclose(scores_of(packed, tokens), scores_of(dense, tokens), atol=1e-5)
    torch.testing.assert_close(packed.layers[1].ffn_down.numbers, dense.layers[1].ffn_down.numbers, rtol=0, atol=0)
    for model, blocks in ((packed, True), (dense, False)):
        assert weights.kept_bytes(gguf.read(path), 4, blocks) == sum(tensor.nbytes for tensor in tensors(model))


def test_a_real_model_with_blocks(smollm: Path) -> None:
    """Its vocabulary's matrix is both ends of it, kept once, and does not fit into the scratch."""
    packed, tokens = Transformer.load(smollm, packed=True), some_tokens(12, 5)
    np.testing.assert_allclose(scores_of(packed, tokens), scores_of(Transformer.load(smollm), tokens), atol=1e-4)
    assert packed.output.weight is packed.embedding
    assert isinstance(packed.embedding, Blocks)
    assert packed.embedding.scratch.numel() == 576 * 1536
    kept = weights.kept_bytes(gguf.read(smollm), 4, packed=True)
    assert kept == sum(tensor.nbytes for tensor in tensors(packed)) < 1.1 * smollm.stat().st_size
    low = replace(packed, layers=packed.layers[:8], shape=replace(packed.shape, layers=8))
    runtime, prompt = TorchRuntime(low), prompt_of(5, (12, 9), 4)
    again = stitched(runtime, prompt, readers(runtime, prompt), everything(prompt, recompute=True))
    assert distance(again, full(runtime, prompt)) < ROUNDING


@torch.no_grad()
def test_the_kernels_in_their_place(quantised: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: a token's row, and a product. All matrices are asked for these in the same way."""
    model = Transformer.load(quantised("Q4_K_M"), packed=True)
    key, token = model.layers[0].attn_k, torch.tensor([7])
    row = model.embedding[token]
    expected = key(row)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr("quire_kernels.device_weights.functional.linear", None)
    torch.testing.assert_close(model.embedding[token], row)
    torch.testing.assert_close(key(row), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("like_gpu", [False, True])
def test_the_runtime_with_blocks(quantised: Callable[[str], Path], like_gpu: bool) -> None:
    path, prompt = quantised("Q4_K_M"), prompt_of()
    packed, dense = (TorchRuntime(Transformer.load(path, packed=blocks), like_gpu=like_gpu) for blocks in (True, False))
    chunks, nothing = readers(packed, prompt), everything(prompt, recompute=False)
    expected = full(packed, prompt)
    assert distance(stitched(packed, prompt, chunks, everything(prompt, recompute=True)), expected) < ROUNDING
    reused = stitched(packed, prompt, chunks, nothing)
    assert distance(reused, stitched(dense, prompt, chunks, nothing)) < 1e-3
    assert distance(reused, expected) > 0.1
    assert distance(packed.extend([7]), dense.extend([7])) < 1e-3


def test_a_file_that_ends_early_or_has_rows_of_half_blocks_is_refused(
    quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(quantised("Q8_0").read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        Transformer.load(path, packed=True)
    data = bytearray(quantised("Q8_0").read_bytes())
    at = data.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4
    assert int.from_bytes(data[at : at + 8], "little") == 512
    data[at : at + 8] = (496).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"ffn_down\.weight"):
        Transformer.load(path, packed=True)


# On a device


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds operations between devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        places = {leaf.device for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)}
        if len(places) > 1:
            self.found.append(str(function))
        return made


class Constants(TorchFunctionMode):
    """Finds tensors that are made of Python's numbers, which are copied to where they are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (torch.tensor, torch.as_tensor):
            self.found.append(args)
        return function(*args, **(kwargs or {}))


class Launches:
    """In place of a kernel: notes what it is launched with."""

    def __init__(self, found: list[object]) -> None:
        self._found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self._found.extend(args)


@torch.no_grad()
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_a_step_with_blocks_could_be_recorded(monkeypatch: pytest.MonkeyPatch, form: dispatch.Form) -> None:
    """A device without numbers stands for the one that is not here: asking it for one fails, and what is copied to it
    is seen. All memory comes from PyTorch, whose recordings keep it."""
    launched: list[object] = []
    monkeypatch.setattr(dispatch, "choose", lambda device, wish="auto": form)
    monkeypatch.setattr(triton_gguf, "_product", Launches(launched))
    monkeypatch.setattr(triton_gguf, "_dequantize", Launches(launched))
    scratch = torch.empty(1000, device="meta", dtype=torch.bfloat16)

    def linear(of: BlockFormat) -> Linear:
        data = torch.empty(9, 256 // of.numbers * of.bytes, dtype=torch.uint8, device="meta")
        return Linear(Blocks(Packed(data, of), scratch), torch.empty(9, device="meta", dtype=torch.bfloat16))

    token = torch.zeros(1, dtype=torch.int64, device="meta")
    with Copies() as copies, Constants() as constants:
        for of in FORMATS.values():
            matrix = linear(of)
            assert matrix(matrix.weight[token]).shape == (1, 9)
    assert copies.found == constants.found == []
    assert bool(launched) == (form == "triton")
    assert all(isinstance(one, int) or (isinstance(one, Tensor) and one.is_meta) for one in launched)


# Memory


def test_a_device_that_holds_the_blocks_is_taken(smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what 16-bit numbers would need."""
    model = gguf.read(smollm)
    dense = weights.kept_bytes(model, 2, packed=False)
    free = dense // 2 + (3 << 29)
    monkeypatch.setattr(choose, "device", lambda: torch_device.Device("Titan", free))
    assert "0.3 GB for weights alone" in choose.choose("auto", model).reason
    monkeypatch.setattr(choose, "device", lambda: torch_device.Device("Titan", free, keeps_blocks=True))
    assert choose.choose("auto", model) == choose.Choice("torch", "cuda", "Runtime: PyTorch on Titan.")
    for gigabytes in (2, 4, 8, 24):
        torch_device.check_weights(int(choose.room_for_weights(gigabytes * 10**9)), gigabytes * 10**9)
    assert not torch_device.keeps_blocks(torch.device("cuda")), "nothing compiles kernels for it here"
    monkeypatch.setattr(dispatch, "choose", lambda device, wish="auto": "triton")
    assert torch_device.keeps_blocks(torch.device("cuda"))
    assert not torch_device.keeps_blocks(torch.device("cpu")), "the processor multiplies numbers"


def test_a_question_that_the_device_has_no_room_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before anything is computed, with what would fit; and that does fit."""
    monkeypatch.setattr(selfcheck, "_LONG_TOKENS", 128)
    monkeypatch.setattr(choose, "choose", lambda wish, model: choose.Choice("torch", "cpu", ""))
    engine = Engine(tiny("llama"), tmp_path, SETTINGS)
    assert isinstance(engine.runtime, TorchRuntime)
    assert engine.reuse_off == ""
    row_bytes = 4 * engine.shape.values_per_token
    monkeypatch.setattr(torch_device, "free_bytes", lambda device: torch_device.WORK_BYTES + 100 * row_bytes)

    def ask(passages: tuple[str, ...]) -> Request:
        return Request("When was it built?", passages, ratio=1.0, max_tokens=4)

    with pytest.raises(ContextOverflow) as refused:
        list(engine.answer(ask(PASSAGES * 5)))
    assert "graphics device" in refused.value.message
    assert "--context-tokens" in refused.value.hint
    assert "1,024 tokens fit" in refused.value.hint
    assert engine.runtime.live_tokens == 0
    assert len(list(engine.answer(ask(PASSAGES)))) > 2
