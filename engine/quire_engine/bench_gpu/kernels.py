"""Every kernel's time against its floor: the bytes it must move, or the operations it must do, at this device's rates.

Shapes are one layer of a model of 8 billion parameters over a prompt of 8,192 tokens. Knows nothing of whole answers.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from quire_engine.bench_gpu import library, model
from quire_engine.bench_gpu.clock import Bench, Times, kernel_timed
from quire_engine.runtimes import torch_device
from quire_kernels import (
    device_attention,
    device_decode,
    device_pack,
    device_place,
    device_probe,
    device_weights,
    dispatch,
    rope,
)
from quire_kernels.device_decode import GROUP, LiveRows, PackedGroups
from quire_kernels.device_pack import Packing
from quire_kernels.device_place import Angles
from quire_kernels.stored import Batch, StoredRows, batches

_QUESTION = 60
_SHARE = 0.16  # of tokens that are computed again


@dataclass(frozen=True)
class Work:
    """What is timed, with the bytes and operations that it cannot do without."""

    name: str
    run: Callable[[], object]
    bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Found:
    """of_floor: the floor's share of the time; 1 is as fast as the machine can be."""

    kernel: str
    form: dispatch.Form
    times: Times
    bytes: int
    operations: int
    floor_ms: float
    of_floor: float


@torch.no_grad()
def measure(bench: Bench) -> dict[str, object]:
    form = dispatch.choose(bench.device)
    found, failed = list[dict[str, object]](), dict[str, str]()
    for make in (_place, _pack, _attention, _probe, _decode, _weights):
        try:
            for work in make(bench):
                if not bench.seconds_left:
                    failed[work.name] = "no time was left"
                    continue
                try:
                    found.append(asdict(_timed(work, form, bench)))
                except Exception as error:  # its neighbour may work
                    failed[work.name] = f"{type(error).__name__}: {error}"[:500]
        except Exception as error:  # what it takes could not be made
            failed[make.__name__.strip("_")] = f"{type(error).__name__}: {error}"[:500]
    return {"kernels": found, "errors": failed}


def _timed(work: Work, form: dispatch.Form, bench: Bench) -> Found:
    times, floor = kernel_timed(work.run, bench), _floor_ms(work, bench)
    found = Found(work.name, form, times, work.bytes, work.operations, floor, floor / times.median_ms)
    print(f"  {work.name}: {times}, floor {floor:.3f} ms, {found.of_floor:.0%} of it reached", flush=True)
    return found


def _floor_ms(work: Work, bench: Bench) -> float:
    """0 where the machine's rates are not known."""
    if not bench.rates.copy or not bench.rates.matmul:
        return 0.0
    return 1000 * max(work.bytes / bench.rates.copy, work.operations / bench.rates.matmul)


def _tokens(bench: Bench) -> int:
    return bench.pick(8192, 256)


def _angles(tokens: int, dim: int, device: torch.device) -> Angles:
    cos, sin = rope.angles(np.arange(tokens), dim, 500_000.0)
    return Angles(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device), "adjacent")


def _rows(bench: Bench, tokens: int, heads: int) -> Tensor:
    kind = torch_device.number_type(bench.device)
    return torch.randn(tokens, heads, model.sizes(bench).dim, dtype=kind, device=bench.device)


def _place(bench: Bench) -> Iterator[Work]:
    of, tokens, device = model.sizes(bench), _tokens(bench), bench.device
    each, channels = library.chunk_tokens(bench), of.kv_heads * of.dim
    out, angles = _rows(bench, tokens, of.kv_heads), _angles(tokens, of.dim, device)
    to = torch.arange(tokens, dtype=torch.int32, device=device)
    for what, bits, by_channel, turn in (
        ("keys", 4, True, angles),
        ("values", 3, False, None),
        ("keys", 16, True, angles),
    ):
        parts, offset = list[StoredRows](), 0
        for first in range(0, tokens, each):
            planes = 0 if bits == 16 else bits
            parts.append(StoredRows(offset, each, channels, bits, planes, by_channel=by_channel, first=first))
            offset = parts[-1].stop
        # Random bytes, but with numbers for the grids: NaN costs the same, and yet looks like a mistake.
        data = torch.randint(0, 64, (offset,), dtype=torch.uint8, device=device)
        (batch,) = batches(parts, device)
        turned = 0 if turn is None else turn.cos.nbytes + turn.sin.nbytes

        def run(data: Tensor = data, batch: Batch = batch, turn: Angles | None = turn) -> None:
            device_place.place(data, batch, to, out, turn)

        yield Work(f"place, {what} of {bits} bits, {tokens} tokens", run, offset + out.nbytes + turned)


def _pack(bench: Bench) -> Iterator[Work]:
    of, each = model.sizes(bench), library.chunk_tokens(bench)
    x = torch.randn(of.layers, each, of.kv_heads * of.dim, dtype=torch.float16, device=bench.device)
    order = torch.arange(each, dtype=torch.int32, device=bench.device)
    for what, bits, by_channel in (("keys", 4, True), ("values", 3, False)):
        packings = [Packing(bits, by_channel=by_channel)] * of.layers
        size = device_pack.pack(x, order, packings).data.nbytes

        def run(packings: list[Packing] = packings) -> None:
            device_pack.pack(x, order, packings)

        yield Work(f"pack, {what} of {bits} bits, {each} tokens, all layers", run, 2 * x.nbytes + size)


def _attention(bench: Bench) -> Iterator[Work]:
    of, tokens = model.sizes(bench), _tokens(bench)
    k, v = (_rows(bench, tokens, of.kv_heads) for _ in range(2))
    chosen = torch.randperm(tokens, device=bench.device)[: int(_SHARE * tokens)].sort().values
    q, positions = _rows(bench, len(chosen), of.heads), chosen.to(torch.int32)
    seen = int((chosen + 1).sum())
    yield Work(
        f"selective attention, {len(chosen)} of {tokens} tokens",
        lambda: device_attention.attend(q, positions, k, v),
        k.nbytes + v.nbytes + 2 * q.nbytes,
        4 * of.heads * of.dim * seen,
    )


def _probe(bench: Bench) -> Iterator[Work]:
    of, tokens = model.sizes(bench), _tokens(bench)
    q, k = _rows(bench, _QUESTION, of.heads), _rows(bench, tokens, of.kv_heads)
    operations = 2 * 2 * _QUESTION * of.heads * tokens * of.dim
    name = f"probe, {_QUESTION} queries, {tokens} keys"
    yield Work(name, lambda: device_probe.mass(q, k), 2 * k.nbytes + q.nbytes, operations)


def _decode(bench: Bench) -> Iterator[Work]:
    of, tokens = model.sizes(bench), _tokens(bench)
    q = _rows(bench, 1, of.heads)
    for packed in (False, True):
        rows = live_rows(bench, tokens, packed)
        size = live_bytes(rows)
        name = f"decode attention, {tokens} {'packed' if packed else 'exact'} rows"
        yield Work(name, lambda rows=rows: device_decode.attend(q, rows), size, 4 * of.heads * of.dim * tokens)  # type: ignore[misc]


def live_rows(bench: Bench, tokens: int, packed: bool, angles: Angles | None = None) -> LiveRows:
    """A conversation's KV at random, with keys of 6 and values of 4 bits as the live window has them."""
    of, device = model.sizes(bench), bench.device
    channels = of.kv_heads * of.dim
    groups = tokens // GROUP - 1 if packed else 0
    window = PackedGroups.empty(max(1, groups), channels, channels, 6, 4, device)
    for planes in (window.k_planes, window.v_planes):
        planes.copy_(torch.randint(0, 256, planes.shape, dtype=torch.uint8, device=device))
    for step, first, bits in ((window.k_step, window.k_first, 6), (window.v_step, window.v_first, 4)):
        step.fill_(4 / (1 << bits))
        first.fill_(-2)
    exact = tokens - groups * GROUP
    k, v = (_rows(bench, exact, of.kv_heads) for _ in range(2))
    filled = torch.tensor([groups, exact], dtype=torch.int32, device=device)
    return LiveRows(window, k, v, filled, angles or _angles(tokens, of.dim, device))


def live_bytes(rows: LiveRows) -> int:
    groups = int(rows.filled[0])
    packed = sum(int(tensor[:groups].nbytes) for tensor in vars(rows.packed).values())
    return packed + rows.k.nbytes + rows.v.nbytes


def _weights(bench: Bench) -> Iterator[Work]:
    of, device = model.sizes(bench), bench.device
    kind = torch_device.number_type(device)
    x = torch.randn(1, of.width, dtype=kind, device=device)
    exact = torch.randn(of.hidden, of.width, dtype=kind, device=device)
    yield Work("16-bit product, one token", lambda: torch.nn.functional.linear(x, exact), exact.nbytes)
    out = torch.empty_like(exact)
    for name, form in device_weights.FORMATS.items():
        size = (of.hidden, of.width // form.numbers * form.bytes)
        packed = device_weights.Packed(torch.randint(0, 32, size, dtype=torch.uint8, device=device), form)
        product, unpack = _both(x, packed, out)
        yield Work(f"{name} product, one token", product, packed.data.nbytes)
        yield Work(f"{name} numbers to scratch", unpack, packed.data.nbytes + out.nbytes)


def _both(x: Tensor, packed: device_weights.Packed, out: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: device_weights.linear(x, packed), lambda: device_weights.dequantize(packed, out)
