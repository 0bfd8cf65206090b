"""Placing on a device: PyTorch's operations and Triton's kernel against the NumPy specification, over odd shapes."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from device import DEVICE
from quire_kernels import device_place, dispatch
from quire_kernels.device_place import Angles
from quire_kernels.grids import FLOAT16_MAX, GRIDS
from quire_kernels.place import PackedTensor, dequantize
from quire_kernels.planes import pack, pack_by_width
from quire_kernels.quantize import quantize_keys, quantize_values
from quire_kernels.rope import Layout, angles, rotate
from quire_kernels.stored import StoredRows, batches

FORMS: tuple[dispatch.Form, ...] = ("torch", "triton")


@dataclass(frozen=True)
class Case:
    """Rows of one chunk. turned: share of the channels that RoPE turns, 0 for values."""

    rows: int
    kv_heads: int
    dim: int
    bits: int
    planes: int = 8
    grid: str = "midrise"
    by_channel: bool = True
    widths: bool = False
    layout: Layout = "halves"
    turned: int = 0
    biased: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def channels(self) -> int:
        return self.kv_heads * self.dim


def stored(case: Case, seed: int, before: int) -> tuple[np.ndarray, bytes, StoredRows]:
    """A chunk's numbers as the specification reads them [rows, channels], its bytes, and where they lie."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(case.rows, case.channels)) * rng.uniform(0.1, 9, case.channels)).astype(np.float16)
    x[:, 0] = 3  # groups without a range
    part = StoredRows(
        before, case.rows, case.channels, case.bits, min(case.planes, case.bits), case.grid, case.by_channel
    )
    if part.exact:
        return x.astype(np.float32), x.tobytes(), part
    widths = np.zeros(0, np.uint8)
    if case.widths:
        widths = rng.integers(0, case.bits + 1, case.channels).astype(np.uint8)
        widths[rng.integers(case.channels)] = case.bits
        codes, grid = quantize_keys(x, widths.astype(np.int64))
        planes = pack_by_width(codes, widths)
    else:
        codes, grid = (quantize_keys if case.by_channel else quantize_values)(x, case.bits, GRIDS[case.grid])
        planes = tuple(pack(codes.ravel(), case.bits))
    kept = planes[: part.planes]
    tensor = PackedTensor(kept, case.bits, case.rows, case.channels, grid, case.by_channel, widths)
    fields = [np.asarray(field).tobytes() for field in vars(grid).values()]
    data = b"".join(fields + [plane.tobytes() for plane in kept])
    return dequantize(tensor), data, replace(part, widths=widths.tobytes())


def expected(x: np.ndarray, case: Case, cos: np.ndarray, sin: np.ndarray) -> torch.Tensor:
    by_head = x.reshape(-1, case.kv_heads, case.dim)
    placed = rotate(by_head, cos, sin, case.layout) if case.turned else by_head
    if case.dtype == torch.float16:
        placed = np.clip(placed, -FLOAT16_MAX, FLOAT16_MAX)
    return torch.from_numpy(placed).to(case.dtype)


KEYS = (
    Case(65, 3, 64, 4, turned=64),
    Case(1, 1, 8, 3, turned=8, layout="adjacent"),
    Case(63, 1, 80, 4, turned=80, layout="adjacent", biased=True),
    Case(64, 3, 80, 5, planes=3, turned=80),
    Case(130, 1, 128, 2, turned=64, dtype=torch.bfloat16),
    Case(65, 3, 7, 4, turned=4, biased=True),
    Case(33, 3, 10, 3, turned=6, layout="adjacent"),
    Case(65, 1, 16, 1, grid="minmax", turned=16),
    Case(64, 8, 8, 8, planes=5, grid="minmax", turned=8, layout="adjacent"),
    Case(70, 2, 24, 4, widths=True, turned=24),
    Case(65, 1, 64, 6, planes=3, widths=True, turned=32, layout="adjacent", dtype=torch.float32),
    Case(5, 3, 64, 16, turned=64),
    Case(9, 1, 5, 16, turned=4, layout="adjacent", biased=True),
)
VALUES = (
    Case(65, 3, 64, 3, by_channel=False),
    Case(1, 1, 8, 4, by_channel=False, biased=True),
    Case(63, 3, 80, 4, planes=2, by_channel=False, dtype=torch.float32),
    Case(33, 1, 128, 2, by_channel=False),
    Case(40, 3, 5, 3, by_channel=False),
    Case(64, 8, 8, 4, grid="minmax", by_channel=False, dtype=torch.bfloat16),
    Case(65, 3, 80, 3, planes=2, grid="minmax", by_channel=False),
    Case(65, 3, 64, 3),  # values by channel
    Case(4, 3, 8, 16, biased=True),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", KEYS + VALUES, ids=str)
def test_places_what_the_specification_says(case: Case, form: dispatch.Form) -> None:
    """Two chunks of unlike lengths in one batch, bytes at an odd address, rows permuted, some of them left out."""
    rng = np.random.default_rng(1)
    short = replace(case, rows=max(1, case.rows - 7))
    x1, data1, part1 = stored(case, 2, before=3)
    x2, data2, part2 = stored(short, 3, before=3 + len(data1))
    if case.widths:  # of one model
        part2 = replace(part1, rows=0)
        x2, data2 = x2[:0], b""
    part2 = replace(part2, first=case.rows, chunk=1)
    data = torch.tensor(list(b"\xff" * 3 + data1 + data2), dtype=torch.uint8, device=DEVICE)
    total = len(x1) + len(x2)
    out = torch.full((total + 5, case.kv_heads, case.dim), 7.0, dtype=case.dtype, device=DEVICE)
    to = rng.permutation(total).astype(np.int32)
    to[rng.integers(total)] = -1
    to[to == total - 1] = total + 5
    bias = rng.normal(size=(2, case.channels)).astype(np.float32) if case.biased else np.zeros((2, 1), np.float32)
    cos, sin = angles(np.arange(total + 5) + 1000, case.turned, 10_000.0)
    turn = Angles(torch.from_numpy(cos).to(DEVICE), torch.from_numpy(sin).to(DEVICE), case.layout)
    (batch,) = batches([part1, part2], DEVICE)

    device_place.place(
        data,
        batch,
        torch.from_numpy(to).to(DEVICE),
        out,
        turn if case.turned else None,
        torch.from_numpy(bias).to(DEVICE) if case.biased else None,
        form=form,
    )

    x = np.concatenate([x1 + bias[0], x2 + bias[1]])
    placed = (to >= 0) & (to < total + 5)
    wanted = torch.full(out.shape, 7.0, dtype=case.dtype)
    wanted[torch.from_numpy(to[placed]).long()] = expected(x[placed], case, cos[to[placed]], sin[to[placed]])
    # NumPy turns neighbours as complex numbers, whose product rounds otherwise; the interpreter cuts off bfloat16.
    loose = (case.turned and case.layout == "adjacent") or (case.dtype == torch.bfloat16 and dispatch.interpreted())
    rtol, atol = (torch.finfo(case.dtype).eps, 1e-5) if loose else (0, 0)
    torch.testing.assert_close(out.cpu(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", FORMS)
def test_float16_is_clipped_to_its_range_and_strides_are_kept(form: dispatch.Form) -> None:
    x = np.full((2, 8), 60_000, np.float16)
    x[1] = -60_000
    data = torch.from_numpy(x.view(np.uint8).ravel().copy()).to(DEVICE)
    (batch,) = batches([StoredRows(0, 2, 8, 16, 0)], DEVICE)
    both = torch.zeros((2, 4, 2, 4), dtype=torch.float16, device=DEVICE)  # K and V of one buffer
    bias = torch.full((1, 8), 10_000.0, device=DEVICE)
    turns = Angles(torch.ones(4, 2, device=DEVICE), torch.ones(4, 2, device=DEVICE), "halves")
    device_place.place(data, batch, torch.tensor([3, 1], dtype=torch.int32, device=DEVICE), both[1], turns, bias, form)
    assert both[1, 3].tolist() == [[0, 0, 65504, 65504]] * 2
    assert both[1, 1].tolist() == [[0, 0, -65504, -65504]] * 2
    assert not both[0].any()
    assert not both[1, ::2].any()


def test_arguments_that_do_not_fit_are_refused() -> None:
    (batch,) = batches([StoredRows(0, 4, 16, 4, 4)], "cpu")
    data, rows = torch.zeros(batch.stop, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)
    out, bias = torch.zeros(9, 2, 8, dtype=torch.float16), torch.zeros(1, 16)
    turns = Angles(torch.ones(9, 4), torch.ones(9, 4), "halves")
    device_place.place(data, batch, rows, out, turns, bias)
    for wrong in (
        (data[1:], batch, rows, out),
        (data.to(torch.int8), batch, rows, out),
        (data, batch, rows[1:], out),
        (data, batch, rows.long(), out),
        (data, batch, rows, out.long()),
        (data, batch, rows, out[:, :1]),
        (data, batch, rows, out.transpose(1, 2)),
        (data, batch, rows, out, Angles(turns.cos[1:], turns.sin[1:], "halves")),
        (data, batch, rows, out, Angles(torch.ones(9, 5), torch.ones(9, 5), "halves")),
        (data, batch, rows, out, Angles(turns.cos.half(), turns.sin.half(), "halves")),
        (data, batch, rows, out, turns, bias[:, 1:]),
        (data, batch, rows, out.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"one device|contiguous|or more|fit"):
            device_place.place(*wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": -1},
        {"bits": 9, "planes": 9},
        {"planes": 0},
        {"planes": 5},
        {"grid": "golden"},
        {"widths": bytes(7) + b"\4"},
        {"widths": bytes(15) + b"\3"},
        {"widths": bytes(15) + b"\4", "by_channel": False},
    ],
    ids=str,
)
def test_rows_that_the_format_does_not_know_are_refused(wrong: dict[str, object]) -> None:
    good = StoredRows(0, 4, 16, 4, 4)
    with pytest.raises(ValueError, match=r"bits|grid|negative|widths"):
        replace(good, **wrong)  # type: ignore[arg-type]
