"""Packing on a device: every byte as the NumPy codec writes it, from PyTorch's operations and from Triton's kernels."""

import numpy as np
import pytest
import torch

from device import DEVICE
from quire_engine.kv.codec import encode, text_order
from quire_engine.kv.parts import to_parts
from quire_engine.selection import spectral
from quire_engine.types import BitPlan, ChunkKV
from quire_kernels import device_pack, dispatch
from quire_kernels.device_pack import Packing

FORMS: tuple[dispatch.Form, ...] = ("torch", "triton")
LAYERS, SINKS = 3, 4


def some(tokens: int, kv_heads: int, dim: int) -> np.ndarray:
    """[layers, tokens, kv_heads, dim] float16 with outliers, tiny and huge numbers, and channels without a range."""
    rng = np.random.default_rng(tokens + dim)
    x = rng.normal(size=(LAYERS, tokens, kv_heads, dim)) * rng.choice([1e-6, 0.01, 1, 30], (LAYERS, 1, kv_heads, dim))
    x[:, :, 0, 0] = 3
    x[1, tokens // 2, -1] = 60_000
    x[2, :, :, dim // 2 :] = 0
    rounded: np.ndarray = x.astype(np.float16)
    return rounded


def widths(channels: int, bits: int, seed: int) -> bytes:
    chosen = np.random.default_rng(seed).integers(0, bits + 1, channels).astype(np.uint8)
    chosen[seed % channels] = bits
    return chosen.tobytes()


SHAPES = [(5, 1, 8), (67, 1, 64), (37, 1, 80), (69, 3, 8), (133, 3, 5)]
PLANS = {
    "mixed": BitPlan((4, 3, 16), (3, 1, 8), "midrise", SINKS),
    "minmax": BitPlan((2, 3, 4), (2, 8, 3), "minmax", SINKS),
    "values by channel": BitPlan((8, 1, 2), (4, 5, 6), "midrise", SINKS, v_by_channel=(1,)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", [*PLANS, "widths"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_is_the_codecs(shape: tuple[int, int, int], plan: str, form: dispatch.Form) -> None:
    tokens, kv_heads, dim = shape
    channels = kv_heads * dim
    bits = PLANS.get(plan) or BitPlan(
        (4, 2, 8), (3, 3, 3), "midrise", SINKS, (widths(channels, 4, 1), b"", widths(channels, 8, 2))
    )
    k, v = some(tokens, kv_heads, dim), some(tokens, kv_heads, dim)[:, ::-1].copy()
    order = np.concatenate([text_order(SINKS), SINKS + np.random.default_rng(1).permutation(tokens - SINKS)])
    chunk = encode(ChunkKV(k, v, {}), bits, order.astype(np.uint16))
    rows = torch.from_numpy(order[SINKS:].astype(np.int32)).to(DEVICE)
    of_channels = bits.k_widths or (b"",) * LAYERS
    keys = [Packing(b, bits.grid, True, w) for b, w in zip(bits.k_bits, of_channels, strict=True)]
    values = [Packing(b, bits.grid, layer in bits.v_by_channel) for layer, b in enumerate(bits.v_bits)]
    for x, packings, tensors in (
        (k, keys, [layer.k for layer in chunk.layers]),
        (v, values, [layer.v for layer in chunk.layers]),
    ):
        flat = torch.from_numpy(x.reshape(LAYERS, tokens, channels)).to(DEVICE)
        packed = device_pack.pack(flat, rows, packings, form)
        assert [part.offset for part in packed.layers] == [0] + [part.stop for part in packed.layers[:-1]]
        assert packed.data.cpu().numpy().tobytes() == b"".join(b"".join(to_parts(tensor)) for tensor in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_strides_and_float32(form: dispatch.Form) -> None:
    """Both of K and V in one tensor, as a projection may give them."""
    both = torch.randn(2, 70, 2, 24, generator=torch.Generator().manual_seed(0))
    order = torch.arange(70, dtype=torch.int32)
    packings = [Packing(4), Packing(3)]
    wanted = device_pack.pack(both[:, :, 1].contiguous(), order, packings, "torch")
    found = device_pack.pack(both.to(DEVICE)[:, :, 1], order.to(DEVICE), packings, form)
    assert torch.equal(found.data.cpu(), wanted.data)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64])
def test_scores_are_those_of_the_specification(tokens: int, high: bool) -> None:
    rng = np.random.default_rng(tokens)
    k, v = (rng.normal(size=(2, tokens, 3, 8)).astype(np.float16) for _ in range(2))
    flat = [torch.from_numpy(x.reshape(2, tokens, 24)).to(DEVICE) for x in (k, v)]
    found = device_pack.spectral(flat[0], flat[1], 0.3, high)
    np.testing.assert_allclose(found.cpu().numpy(), spectral.score(k, v, 0.3, high), rtol=1e-4, atol=1e-7)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, order, packings = torch.zeros(2, 4, 8), torch.arange(4, dtype=torch.int32), [Packing(4), Packing(4)]
    for wrong in (
        (x[0], order, packings),
        (x.long(), order, packings),
        (x.transpose(1, 2), order, packings),
        (x, order.long(), packings),
        (x, torch.zeros(5, dtype=torch.int32), packings),
        (x, order, packings[1:]),
        (x.to("meta"), order, packings),
        (x, order, [Packing(4), Packing(9)]),
    ):
        with pytest.raises(ValueError, match=r"contiguous|int32|fit|one device|bits"):
            device_pack.pack(*wrong)
