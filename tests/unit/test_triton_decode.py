"""Decode attention over a live window on a device, in both forms, against the codec's numbers in double precision."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from device import DEVICE
from quire_kernels import device_decode, dispatch
from quire_kernels.device_decode import GROUP, LiveRows, PackedGroups
from quire_kernels.device_place import Angles
from quire_kernels.place import PackedTensor, dequantize
from quire_kernels.planes import pack
from quire_kernels.quantize import quantize_keys, quantize_values
from quire_kernels.rope import Layout, angles, rotate

FORMS: tuple[dispatch.Form, ...] = ("torch", "triton")


@dataclass(frozen=True)
class Case:
    groups: int
    recent: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    layout: Layout = "halves"
    k_bits: int = 6
    v_bits: int = 4
    v_by_channel: bool = False
    sinks: int = 4
    queries: int = 1
    splits: int = 3


def packed(x: np.ndarray, bits: int, by_channel: bool) -> PackedTensor:
    codes, grid = (quantize_keys if by_channel else quantize_values)(x, bits)
    return PackedTensor(tuple(pack(codes.ravel(), bits)), bits, x.shape[0], x.shape[1], grid, by_channel)


def window(case: Case) -> tuple[torch.Tensor, LiveRows, torch.Tensor, torch.Tensor]:
    """Queries, the rows on the device, and their rotated keys and values in text order, in double precision."""
    rng = np.random.default_rng(case.groups)
    exact = case.sinks + case.recent
    tokens, of_k, of_v = exact + case.groups * GROUP, case.kv_heads * case.dim, case.kv_heads * case.v_dim
    k_pre = (rng.normal(size=(tokens, of_k)) * rng.uniform(0.1, 3, of_k)).astype(np.float32)
    v_rows = rng.normal(size=(tokens, of_v)).astype(np.float32)
    bits, kind = (case.k_bits, case.v_bits), torch.float32
    groups = PackedGroups.empty(case.groups + 1, of_k, of_v, *bits, DEVICE, case.v_by_channel, kind)
    for group in range(case.groups):
        at = slice(case.sinks + group * GROUP, case.sinks + (group + 1) * GROUP)
        k_group, v_group = packed(k_pre[at], case.k_bits, True), packed(v_rows[at], case.v_bits, case.v_by_channel)
        groups.put(group, k_group, v_group)
        k_pre[at], v_rows[at] = dequantize(k_group), dequantize(v_group)
    cos, sin = angles(np.arange(tokens + 50), case.dim, 10_000.0)
    k_rot = rotate(k_pre.reshape(tokens, case.kv_heads, case.dim), cos[:tokens], sin[:tokens], case.layout)
    k, v = torch.from_numpy(k_rot), torch.from_numpy(v_rows).reshape(tokens, case.kv_heads, case.v_dim)
    is_exact = np.r_[: case.sinks, tokens - case.recent : tokens]
    room = [torch.full((exact + 9, *x.shape[1:]), float("nan")) for x in (k, v)]
    room[0][:exact], room[1][:exact] = k[is_exact], v[is_exact]
    filled = torch.tensor([case.groups, exact], dtype=torch.int32, device=DEVICE)
    turns = Angles(torch.from_numpy(cos).to(DEVICE), torch.from_numpy(sin).to(DEVICE), case.layout)
    rows = LiveRows(groups, room[0].to(DEVICE), room[1].to(DEVICE), filled, turns, case.sinks)
    q = torch.from_numpy(rng.normal(size=(case.queries, case.heads, case.dim)).astype(np.float32))
    return q, rows, k.double(), v.double()


def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = [len(k) - len(q) + i + 1 for i in range(len(q))]
    logits = [torch.einsum("hd,khd->hk", q[i].double(), k[:n]) * q.shape[2] ** -0.5 for i, n in enumerate(seen)]
    weights = [x.softmax(-1) for x in logits]
    return torch.stack([torch.einsum("hk,khd->hd", w, v[:n]) for w, n in zip(weights, seen, strict=True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 65, 9, 3, 64, 64),
        Case(3, 128, 4, 1, 64, 64, "adjacent", splits=1),
        Case(1, 1, 8, 8, 16, 8, "adjacent", k_bits=8, v_bits=1, sinks=0, splits=7),
        Case(2, 33, 3, 3, 80, 80, k_bits=3, v_bits=8),
        Case(1, 70, 6, 2, 96, 96, "adjacent", v_by_channel=True),
        Case(1, 64, 7, 1, 128, 128, v_by_channel=True, queries=5),
        Case(0, 1, 2, 1, 64, 64),
        Case(0, 40, 3, 1, 128, 64, sinks=0, queries=3, splits=8),
        Case(1, 9, 2, 1, 8, 8),  # heads that are no whole bytes: PyTorch's form in any case
    ],
    ids=str,
)
def test_the_latest_tokens_see_packed_and_exact_rows(case: Case, form: dispatch.Form) -> None:
    q, rows, k, v = window(case)
    got = device_decode.attend(q.to(DEVICE), rows, form, case.splits).cpu()
    torch.testing.assert_close(got.double(), gathered(q, k, v), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_near(form: dispatch.Form) -> None:
    q, rows, k, v = window(Case(2, 65, 6, 2, 64, 64))
    q, half = q.half(), replace(rows, k=rows.k.half(), v=rows.v.half())
    got = device_decode.attend(q.to(DEVICE), half, form).cpu()
    assert got.dtype == torch.float16
    expected = gathered(q, k, v)
    assert (got.double() - expected).norm() < 0.003 * expected.norm()


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, rows, _, _ = window(Case(1, 3, 4, 2, 16, 16))
    q = q.to(DEVICE)
    for wrong_q in (q[:0], q[:, :3], q[..., :8], q.half(), q[0], q.to("meta")):
        with pytest.raises(ValueError, match=r"one device|one type|there are|do not fit"):
            device_decode.attend(wrong_q, rows)
    groups, turns = rows.packed, rows.angles
    for wrong in (
        replace(rows, filled=rows.filled.long()),
        replace(rows, v=rows.v[1:]),
        replace(rows, angles=replace(turns, cos=turns.cos.half())),
        replace(rows, packed=replace(groups, k_planes=groups.k_planes[..., 1:].contiguous())),
        replace(rows, packed=replace(groups, k_step=groups.k_step[:, 1:].contiguous())),
        replace(rows, packed=replace(groups, v_first=groups.v_first.half())),
    ):
        with pytest.raises(ValueError, match=r"filled is|do not fit|angles are|planes are|steps and"):
            device_decode.attend(q, wrong)


@pytest.mark.parametrize("v_by_channel", [False, True])
@pytest.mark.parametrize("bits", [(6, 4), (1, 8)])
def test_groups_are_packed_on_the_device_as_by_the_codec(bits: tuple[int, int], v_by_channel: bool) -> None:
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(3 * GROUP, n)).astype(np.float32) * rng.uniform(0.1, 9, n) for n in (24, 80))
    k[70, 3], k[:, 5] = 90.0, 2.5  # an outlier, and a channel that says nothing
    k, v = k.astype(np.float32), v.astype(np.float32)
    ours, theirs = (PackedGroups.empty(4, 24, 80, *bits, DEVICE, v_by_channel) for _ in range(2))
    for group in range(3):
        at = slice(group * GROUP, (group + 1) * GROUP)
        theirs.put(group + 1, packed(k[at], bits[0], True), packed(v[at], bits[1], v_by_channel))
    ours.fill(1, torch.from_numpy(k).to(DEVICE), torch.from_numpy(v).to(DEVICE))
    for name, tensor in vars(ours).items():
        assert torch.equal(tensor, getattr(theirs, name)), name


def test_only_groups_as_wide_as_the_room_are_put() -> None:
    groups = PackedGroups.empty(1, 16, 16, 6, 4, "cpu")
    x = np.random.default_rng(0).normal(size=(GROUP, 16)).astype(np.float32)
    of_k, of_v = packed(x, 6, True), packed(x, 4, False)
    groups.put(0, of_k, of_v)
    for k, v in ((packed(x[1:], 6, True), of_v), (of_v, of_v), (of_k, packed(x, 4, True))):
        with pytest.raises(ValueError, match=r"a group is|other axis"):
            groups.put(0, k, v)
