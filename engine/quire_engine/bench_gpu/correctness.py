"""Is every kernel right on this device? Each against a reference on the processor, before anything is timed.

The references: NumPy's specifications where there are any, else plain sums in double precision. The packages' tests
try far more shapes (`make test-kernels`); these are a model's own. Knows nothing of time.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from quire_engine.bench_gpu.clock import Bench
from quire_engine.kv import codec
from quire_engine.kv.parts import to_parts
from quire_engine.types import BitPlan, ChunkKV
from quire_kernels import (
    attention,
    device_attention,
    device_decode,
    device_pack,
    device_place,
    device_probe,
    device_weights,
    dispatch,
    rope,
)
from quire_kernels.device_pack import Packing
from quire_kernels.device_place import Angles
from quire_kernels.place import PackedTensor, dequantize
from quire_kernels.stored import StoredRows, batches

_TOKENS = 133  # no multiple of anything
_DIM, _KV_HEADS, _HEADS = 128, 2, 8
_CHANNELS = _DIM * _KV_HEADS
_EXACT, _HALF, _WEIGHTS = 2e-5, 0.02, 1e-5  # the largest difference, relative to the largest number


@dataclass(frozen=True)
class Check:
    """One kernel against its reference. error: the largest difference, relative to the largest number."""

    kernel: str
    form: dispatch.Form
    error: float
    allowed: float
    right: bool


def measure(bench: Bench) -> dict[str, object]:
    """One entry per kernel; what fails is an entry too."""
    form = dispatch.choose(bench.device)
    found, failed = list[dict[str, object]](), dict[str, str]()
    for name, allowed, check in _checks():
        try:
            error = check(bench.device)
            right = error <= allowed  # not where it is no number
            found.append(asdict(Check(name, form, error, allowed, right)))
        except Exception as error:  # the next kernel may be right
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    right_ones = sum(bool(check["right"]) for check in found)
    print(f"  {right_ones} of {len(found) + len(failed)} right", flush=True)
    return {"right": right_ones, "of": len(found) + len(failed), "checks": found, "errors": failed}


def _checks() -> list[tuple[str, float, Callable[[torch.device], float]]]:
    checks: list[tuple[str, float, Callable[[torch.device], float]]] = [
        ("place, keys of 4 bits", 1e-3, lambda device: _place(device, 4, keys=True)),
        ("place, keys of 16 bits", 1e-3, lambda device: _place(device, 16, keys=True)),
        ("place, values of 3 bits", 1e-3, lambda device: _place(device, 3, keys=False)),
        ("pack, keys of 4 bits", 0.0, lambda device: _pack(device, keys=True)),
        ("pack, values of 3 bits", 0.0, lambda device: _pack(device, keys=False)),
        ("probe", _EXACT, _probe),
    ]
    kinds = (("float32", torch.float32, _EXACT), ("bfloat16", torch.bfloat16, _HALF), ("float16", torch.float16, _HALF))
    for name, kind, allowed in kinds:
        checks.append((f"selective attention, {name}", allowed, lambda device, kind=kind: _attention(device, kind)))  # type: ignore[misc]
        checks.append((f"decode attention, {name}", allowed, lambda device, kind=kind: _decode(device, kind)))  # type: ignore[misc]
    for name in device_weights.FORMATS:
        checks.append((f"numbers of {name}", _WEIGHTS, lambda device, name=name: _numbers(device, name)))  # type: ignore[misc]
        checks.append((f"product with {name}", _WEIGHTS, lambda device, name=name: _product(device, name)))  # type: ignore[misc]
    return checks


def _error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.cpu().double() - wanted).abs().max() / wanted.abs().max())


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _chunk(bits: int) -> tuple[codec.PackedLayer, np.ndarray]:
    """A layer, and the numbers that it was packed from."""
    numbers = _random(1, _TOKENS, _KV_HEADS, _DIM).half().numpy()
    packed = codec.encode(ChunkKV(numbers, numbers, {}), BitPlan((bits,), (bits,), sinks=0), codec.text_order(_TOKENS))
    return packed.layers[0], numbers.reshape(1, _TOKENS, _CHANNELS)


def _place(device: torch.device, bits: int, keys: bool) -> float:
    layer, numbers = _chunk(bits)
    tensor = layer.k if keys else layer.v
    part = StoredRows(0, _TOKENS, _CHANNELS, bits, 0 if bits == 16 else bits, by_channel=keys)
    data = torch.frombuffer(bytearray(b"".join(to_parts(tensor))), dtype=torch.uint8).to(device)
    to = torch.randperm(2 * _TOKENS, generator=torch.Generator().manual_seed(1))[:_TOKENS]
    cos, sin = rope.angles(np.arange(2 * _TOKENS), _DIM, 10_000.0)
    out = torch.zeros(2 * _TOKENS, _KV_HEADS, _DIM, dtype=torch.float16, device=device)
    turn = Angles(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device), "adjacent") if keys else None
    (batch,) = batches([part], device)
    device_place.place(data, batch, to.to(device, torch.int32), out, turn)
    left = dequantize(tensor) if isinstance(tensor, PackedTensor) else numbers[0].astype(np.float32)
    wanted = left.reshape(_TOKENS, _KV_HEADS, _DIM)
    if keys:
        wanted = rope.rotate(wanted, cos[to.numpy()], sin[to.numpy()], "adjacent")
    return _error(out[to.to(device)], torch.from_numpy(wanted))


def _pack(device: torch.device, keys: bool) -> float:
    """Share of bytes that differ: none may."""
    bits = 4 if keys else 3
    layer, numbers = _chunk(bits)
    x = torch.from_numpy(numbers).to(device)
    order = torch.arange(_TOKENS, dtype=torch.int32, device=device)
    packed = device_pack.pack(x, order, [Packing(bits, by_channel=keys)])
    wanted = np.frombuffer(b"".join(to_parts(layer.k if keys else layer.v)), np.uint8)
    return float((packed.data.cpu().numpy() != wanted).mean())


def _probe(device: torch.device) -> float:
    q, k = 3 * _random(33, _HEADS, _DIM), _random(1100, _KV_HEADS, _DIM, seed=1)
    wanted = attention.mass(q.numpy(), k.numpy()).max(0)
    return _error(device_probe.mass(q.to(device), k.to(device)), torch.from_numpy(wanted))


def _seen(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In double precision: each query over the rows up to its position."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->qhk", q.double(), k) * q.shape[2] ** -0.5
    hidden = torch.arange(len(k)) > positions[:, None]
    return torch.einsum("qhk,khd->qhd", logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1), v)


def _attention(device: torch.device, kind: torch.dtype) -> float:
    q, k, v = _random(65, _HEADS, _DIM), _random(300, _KV_HEADS, _DIM, seed=1), _random(300, _KV_HEADS, _DIM, seed=2)
    q, k, v = (x.to(kind) for x in (q, k, v))
    positions = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:65].sort().values
    found = device_attention.attend(q.to(device), positions.to(device, torch.int32), k.to(device), v.to(device))
    return _error(found, _seen(q, positions, k, v))


def _decode(device: torch.device, kind: torch.dtype) -> float:
    """Two packed groups, whose numbers the specification tells by packing them, and some exact rows."""
    group, sinks, recent = device_decode.GROUP, 4, 37
    packed = device_decode.PackedGroups.empty(2, _CHANNELS, _CHANNELS, 4, 3, "cpu", numbers=torch.float32)
    old_k, old_v = list[np.ndarray](), list[np.ndarray]()
    for number in range(2):
        rows = _random(1, group, _KV_HEADS, _DIM, seed=number).half().numpy()
        plan = BitPlan((4,), (3,), sinks=0)
        layer = codec.encode(ChunkKV(rows, rows, {}), plan, codec.text_order(group)).layers[0]
        assert isinstance(layer.k, PackedTensor)
        assert isinstance(layer.v, PackedTensor)
        packed.put(number, layer.k, layer.v)
        old_k.append(dequantize(layer.k))
        old_v.append(dequantize(layer.v))
    tokens = sinks + 2 * group + recent
    cos, sin = rope.angles(np.arange(tokens), _DIM, 10_000.0)
    at = slice(sinks, sinks + 2 * group)
    by_head = (2 * group, _KV_HEADS, _DIM)
    turned = rope.rotate(np.concatenate(old_k).reshape(by_head), cos[at], sin[at], "adjacent")
    k, v = _random(sinks + recent, _KV_HEADS, _DIM, seed=8).to(kind), _random(sinks + recent, _KV_HEADS, _DIM).to(kind)
    all_k = torch.cat([k[:sinks].double(), torch.from_numpy(turned).double(), k[sinks:].double()])
    all_v = torch.cat(
        [v[:sinks].double(), torch.from_numpy(np.concatenate(old_v)).reshape(by_head), v[sinks:].double()]
    )
    filled = torch.tensor([2, sinks + recent], dtype=torch.int32, device=device)
    angles = Angles(torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device), "adjacent")
    groups = device_decode.PackedGroups(**{name: value.to(device) for name, value in vars(packed).items()})
    live = device_decode.LiveRows(groups, k.to(device), v.to(device), filled, angles, sinks)
    q = _random(1, _HEADS, _DIM, seed=9).to(kind)
    return _error(device_decode.attend(q.to(device), live), _seen(q, torch.tensor([tokens - 1]), all_k, all_v))


def _weight(device: torch.device, name: str) -> tuple[device_weights.Packed, Tensor]:
    """A matrix of random codes, and its numbers by plain operations on the processor."""
    of = device_weights.FORMATS[name]
    blocks = torch.randint(0, 256, (48, 1024 // of.numbers, of.bytes), dtype=torch.uint8)
    halves = [208] if name == "Q6_K" else [0, 2] if name in ("Q4_1", "Q4_K", "Q5_K") else [0]
    for at in halves:
        blocks[:, :, at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    numbers = of.unpack(blocks.reshape(-1, of.bytes)).reshape(48, 1024)
    return device_weights.Packed(blocks.reshape(48, -1).to(device), of), numbers


def _numbers(device: torch.device, name: str) -> float:
    packed, numbers = _weight(device, name)
    return _error(device_weights.dequantize(packed, torch.empty(48, 1024, device=device)), numbers)


def _product(device: torch.device, name: str) -> float:
    packed, numbers = _weight(device, name)
    x = _random(3, 1024)
    return _error(device_weights.linear(x.to(device), packed), x.double() @ numbers.double().T)
