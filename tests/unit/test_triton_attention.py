"""Selective attention on a device, in both forms, against a loop over queries in double precision."""

import pytest
import torch

from device import DEVICE
from quire_kernels import device_attention, dispatch

FORMS: tuple[dispatch.Form, ...] = ("torch", "triton")
NAN = float("nan")


def one_by_one(q: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    rows = []
    for query, position in zip(q.double(), positions.tolist(), strict=True):
        logits = torch.einsum("hd,khd->hk", query, k[: position + 1]) * q.shape[2] ** -0.5
        rows.append(torch.einsum("hk,khd->hd", logits.softmax(-1), v[: position + 1]))
    return torch.stack(rows)


Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def example(queries: int, rows: int, heads: int, kv_heads: int, dim: int, v_dim: int) -> Example:
    """Queries at scattered rising positions, the last one at the last row."""
    random = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, heads, dim, generator=random)
    k, v = (torch.randn(rows, kv_heads, d, generator=random) for d in (dim, v_dim))
    positions = torch.randperm(rows, generator=random)[:queries].sort().values.to(torch.int32)
    positions[-1] = rows - 1
    return q, positions, k, v


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("queries", "rows", "heads", "kv_heads", "dim", "v_dim"),
    [
        (1, 1, 1, 1, 8, 8),
        (1, 65, 9, 3, 64, 64),
        (63, 129, 3, 1, 80, 80),
        (65, 200, 14, 2, 96, 96),
        (45, 64, 3, 3, 128, 64),
        (5, 63, 8, 8, 7, 33),
        (9, 70, 2, 1, 256, 256),
    ],
)
def test_every_query_sees_the_rows_up_to_its_own(
    queries: int, rows: int, heads: int, kv_heads: int, dim: int, v_dim: int, form: dispatch.Form
) -> None:
    q, positions, k, v = example(queries, rows, heads, kv_heads, dim, v_dim)
    got = device_attention.attend(q.to(DEVICE), positions.to(DEVICE), k.to(DEVICE), v.to(DEVICE), form).cpu()
    torch.testing.assert_close(got.double(), one_by_one(q, positions, k, v), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_positions_may_come_in_any_order_and_rows_behind_them_hold_anything(form: dispatch.Form) -> None:
    q, positions, k, v = example(40, 150, 6, 2, 64, 64)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    room = torch.full((2, 200, 2, 64), NAN)  # K and V of one buffer
    room[0, :150], room[1, :150] = k, v
    buffer = room.to(DEVICE)
    got = device_attention.attend(
        q[shuffled].to(DEVICE), positions[shuffled].to(DEVICE), buffer[0], buffer[1], form
    ).cpu()
    torch.testing.assert_close(got.double(), one_by_one(q, positions, k, v)[shuffled], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(dtype: torch.dtype, form: dispatch.Form) -> None:
    if form == "triton" and dtype == torch.bfloat16 and dispatch.interpreted():
        pytest.skip("the interpreter multiplies the bit patterns of bfloat16")
    q, positions, k, v = example(20, 100, 4, 2, 64, 64)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    got = device_attention.attend(q.to(DEVICE), positions.to(DEVICE), k.to(DEVICE), v.to(DEVICE), form).cpu()
    assert got.dtype == dtype
    expected = one_by_one(q, positions, k, v)
    assert (got.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


def test_no_queries_gather_nothing() -> None:
    q, positions, k, v = (x.to(DEVICE) for x in example(2, 5, 2, 1, 8, 16))
    assert device_attention.attend(q[:0], positions[:0], k, v).shape == (0, 2, 16)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, positions, k, v = (x.to(DEVICE) for x in example(2, 5, 4, 2, 8, 8))
    wide = torch.zeros(5, 2, 257, device=DEVICE)
    for wrong in (
        (q.half(), positions, k, v),
        (q, positions.long(), k, v),
        (q, positions[1:], k, v),
        (q[:, :3], positions, k, v),
        (q, positions, k[1:], v),
        (q, positions, k[..., :4], v),
        (q, positions, k.transpose(1, 2).contiguous().transpose(1, 2), v),
        (q, positions, k[:0], v[:0]),
        (q, positions, k, wide),
        (q.long(), positions, k.long(), v.long()),
        (q, positions, k, v.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"one device|one type|numbers are|do not fit|there are|positions are"):
            device_attention.attend(*wrong)
