"""The probe on a device: PyTorch's operations and Triton's kernels against the NumPy specification, over odd shapes."""

import numpy as np
import pytest
import torch

from device import DEVICE
from quire_kernels import attention, device_probe, dispatch

SHAPES = [  # queries, keys, kv_heads, query heads of each, dim
    (1, 1, 1, 1, 8),
    (5, 63, 3, 3, 64),
    (33, 64, 1, 4, 80),
    (7, 1100, 2, 1, 16),
    (40, 65, 8, 1, 128),
    (3, 130, 1, 3, 5),
]


def some(queries: int, keys: int, kv_heads: int, of_one: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits far apart, so that the largest of a row matters."""
    generator = torch.Generator().manual_seed(keys)
    q = 6 * torch.randn(queries, kv_heads * of_one, dim, generator=generator)
    k = torch.randn(keys, kv_heads, dim, generator=generator)
    return q, k


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_specification(shape: tuple[int, int, int, int, int], form: dispatch.Form) -> None:
    q, k = some(*shape)
    per_head = attention.mass(q.numpy(), k.numpy())
    largest = device_probe.mass(q.to(DEVICE), k.to(DEVICE), "max", form)
    mean = device_probe.mass(q.to(DEVICE), k.to(DEVICE), "mean", form)
    assert largest.dtype == torch.float32
    np.testing.assert_allclose(largest.cpu().numpy(), per_head.max(0), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(mean.cpu().numpy(), per_head.mean(0), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_reads_half_floats_wherever_they_lie(form: dispatch.Form) -> None:
    q, k = some(9, 70, 2, 2, 64)
    buffer = torch.full((2, 80, 2, 96), 100.0, dtype=torch.float16, device=DEVICE)
    buffer[1, :70, :, :64] = k.half()
    found = device_probe.mass(q.half().to(DEVICE), buffer[1, :70, :, :64], "max", form)
    wanted = attention.mass(q.half().float().numpy(), k.half().float().numpy()).max(0)
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_huge_logits_do_not_overflow(form: dispatch.Form) -> None:
    q, k = torch.full((1, 1, 16), 20.0, device=DEVICE), torch.zeros(1025, 1, 16, device=DEVICE)
    k[7], k[1024] = 20.0, 20.0  # e to the power of 1,600
    found = device_probe.mass(q, k, form=form)
    assert found[[7, 1024]].tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
    assert found.sum().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("q", "k", "over"),
    [
        ((2, 3, 8), (5, 2, 8), "max"),
        ((2, 2, 8), (5, 2, 16), "max"),
        ((0, 2, 8), (5, 2, 8), "max"),
        ((2, 2, 8), (0, 2, 8), "max"),
        ((2, 8), (5, 2, 8), "max"),
        ((2, 2, 8), (5, 2, 8), "least"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(q: tuple[int, ...], k: tuple[int, ...], over: device_probe.Over) -> None:
    with pytest.raises(ValueError, match=r"queries|max or mean"):
        device_probe.mass(torch.zeros(q), torch.zeros(k), over)


def test_types_devices_and_strides_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 2, 8), torch.zeros(5, 2, 8)
    for wrong in ((q.half(), k), (q.long(), k.long()), (q.to("meta"), k), (q, torch.zeros(5, 8, 2).transpose(1, 2))):
        with pytest.raises(ValueError, match=r"one device|contiguous"):
            device_probe.mass(*wrong)
