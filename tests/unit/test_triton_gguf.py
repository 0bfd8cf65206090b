"""Quantised weights on a device, in both forms, against the gguf package."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as by_gguf

from device import DEVICE
from quire_kernels import device_weights, dispatch
from quire_kernels.device_weights import FORMATS, Packed

FORMS: tuple[dispatch.Form, ...] = ("torch", "triton")
# Where float16 numbers lie in a block; any other byte may be anything.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def weight(name: str, rows: int, blocks: int) -> tuple[Packed, torch.Tensor]:
    """A matrix with every code and scale at random, and its numbers."""
    rng = np.random.default_rng(rows)
    data = rng.integers(0, 256, (rows, blocks, FORMATS[name].bytes), dtype=np.uint8)
    for at in HALVES[name]:
        data[:, :, at : at + 2] = rng.normal(size=(rows, blocks, 1)).astype(np.float16).view(np.uint8)
    data = data.reshape(rows, -1)
    numbers = torch.from_numpy(by_gguf(data, GGMLQuantizationType[name]))
    return Packed(torch.from_numpy(data).to(DEVICE), FORMATS[name]), numbers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 7])
def test_numbers_are_those_of_gguf_to_the_last_bit(name: str, form: dispatch.Form, rows: int) -> None:
    packed, numbers = weight(name, rows, blocks=5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.empty(rows, packed.columns, dtype=dtype, device=DEVICE)
        got = device_weights.dequantize(packed, out, form).cpu()
        # The interpreter cuts numbers off to make them bfloat16.
        cut = dtype == torch.bfloat16 and form == "triton" and dispatch.interpreted()
        torch.testing.assert_close(got, numbers.to(dtype), rtol=torch.finfo(dtype).eps if cut else 0.0, atol=0.0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_product_is_that_of_the_numbers(name: str, tokens: int) -> None:
    """More blocks than are in work at once, an odd number of rows, tokens that are rows of a wider tensor."""
    packed, numbers = weight(name, 9, blocks=9 if FORMATS[name].numbers == 256 else 35)
    x = torch.randn(tokens, packed.columns + 3, generator=torch.Generator().manual_seed(1))[:, : packed.columns]
    expected = x.double() @ numbers.double().T
    got = device_weights.linear(x.to(DEVICE), packed, form="triton").cpu()
    assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_few_tokens_and_many_give_half_precision_results(form: dispatch.Form, tokens: int) -> None:
    packed, numbers = weight("Q4_K", 5, blocks=2)
    x = torch.randn(tokens, packed.columns, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    scratch = torch.empty(5000, dtype=torch.bfloat16, device=DEVICE)
    got = device_weights.linear(x.to(DEVICE), packed, scratch, form)
    assert got.dtype == torch.bfloat16
    expected = x.double() @ numbers.double().T
    assert (got.cpu() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_what_the_scratch_has_no_room_for_has_its_turn_later(form: dispatch.Form) -> None:
    """Two rows at a time of five, by the vendor's product."""
    packed, numbers = weight("Q4_0", 5, blocks=3)
    x = torch.randn(9, packed.columns, generator=torch.Generator().manual_seed(3))
    scratch = torch.empty(2 * packed.columns + 1, device=DEVICE)
    got = device_weights.linear(x.to(DEVICE), packed, scratch, form).cpu()
    torch.testing.assert_close(got, x @ numbers.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_asked_for(name: str, form: dispatch.Form) -> None:
    packed, numbers = weight(name, 6, blocks=1)
    ids = torch.tensor([5, 0, 5])
    got = device_weights.rows(packed, ids.to(DEVICE), torch.float32, form).cpu()
    torch.testing.assert_close(got, numbers[ids], rtol=0.0, atol=0.0)


def test_arguments_that_do_not_fit_are_refused() -> None:
    packed, _ = weight("Q6_K", 4, blocks=1)
    x = torch.zeros(1, 256, device=DEVICE)
    wrong_weights = (packed.data[:, 1:], packed.data.to(torch.int8), packed.data[0], packed.data.T)
    for data in wrong_weights:
        with pytest.raises(ValueError, match="whole blocks"):
            replace(packed, data=data)
    with pytest.raises(ValueError, match="multiple of 2"):
        Packed(torch.zeros(211, dtype=torch.uint8, device=DEVICE)[1:].reshape(1, 210), FORMATS["Q6_K"])
    for wrong_x in (x[:, 1:], x[0], x.long(), x.to("meta")):
        with pytest.raises(ValueError, match=r"x is|one device"):
            device_weights.linear(wrong_x, packed)
    for scratch in (x[0, 1:], torch.zeros(1024, dtype=torch.float16, device=DEVICE)):
        with pytest.raises(ValueError, match="scratch"):
            device_weights.linear(x, packed, scratch, form="torch")
    with pytest.raises(ValueError, match="out is"):
        device_weights.dequantize(packed, torch.zeros(4, 255, device=DEVICE))
