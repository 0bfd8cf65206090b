"""A model's precision profile, and the plans that follow from it: which tensor gets how many bits under a budget.

A profile says what rounding costs (`measured` and `gradient` find out); a plan spends bits where they are worth most.
Plain arithmetic: knows nothing of models, and loads nothing heavy.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quire_engine import records
from quire_engine.kv import format
from quire_engine.types import BitPlan, ChunkKV, Float32, ModelShape

K_BITS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # mean over channels
V_BITS = (1.0, 2.0, 3.0, 4.0)
_MORE_BITS = (5.0, 6.0, 8.0)  # not measured: noise falls to a quarter with every bit
_WIDEST = 8
_NOTHING = 1e-9  # KL below this is rounding of the measurement
_PASSAGE_TOKENS = 160  # short: what a budget has to cover besides codes weighs more in short passages
_VERSION = 1

Channels = npt.NDArray[np.intp]


def _none() -> Float32:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class Case:
    """One question over some passages, as the model reads it: tokens of the opening, of every passage, of the rest."""

    opening: tuple[int, ...]
    passages: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """What rounding costs one model.

    k_weights: [layers, RoPE pairs], see rope_pairs: how much noise a step of these channels makes; relative.
    k, v, v_by_channel: [layers, widths]: KL of answers when that tensor alone is rounded, at K_BITS and V_BITS.
    k_importance, v_importance: [layers] KVmix's gradient norms; empty where they were not measured.
    """

    k_weights: Float32
    k: Float32
    v: Float32
    v_by_channel: Float32
    k_importance: Float32 = field(default_factory=_none)
    v_importance: Float32 = field(default_factory=_none)

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.k_weights.size > 0


UNKNOWN = Profile(_none(), _none(), _none(), _none())
"""Of a model that was not measured yet."""


def save(profile: Profile, path: Path) -> None:
    """Weights to a tenth of a bit, everything else to three digits."""
    logs = np.log2(np.maximum(profile.k_weights, np.finfo(np.float32).tiny))
    numbers = {"k_weights_log2": np.round(logs.astype(np.float64), 1).tolist()}
    for name in ("k", "v", "v_by_channel", "k_importance", "v_importance"):
        numbers[name] = [_digits(row) for row in np.atleast_1d(getattr(profile, name)).tolist()]
    records.save(path, {"version": _VERSION, **numbers})


def load(path: Path) -> Profile:
    """UNKNOWN when there is none that this Quire can read; it can be measured again."""
    record = records.load(path)
    if record.get("version") != _VERSION:
        return UNKNOWN
    try:
        names = ("k", "v", "v_by_channel", "k_importance", "v_importance")
        numbers = [np.asarray(record[name], np.float32) for name in names]
        return Profile(np.exp2(np.asarray(record["k_weights_log2"], np.float32)), *numbers)
    except (KeyError, ValueError, TypeError):
        return UNKNOWN


def _digits(row: list[float] | float) -> list[float] | float:
    return [float(f"{x:.3g}") for x in row] if isinstance(row, list) else float(f"{row:.3g}")


# Within a layer


def rope_pairs(shape: ModelShape) -> tuple[Channels, Channels]:
    """First and second channel of every pair that RoPE rotates, over all KV heads; channels that it leaves alone are
    paired with their neighbours."""
    dims, rest = shape.rope.dims, np.arange(shape.rope.dims, shape.key_dim)
    first, second = np.arange(0, dims, 2), np.arange(1, dims, 2)
    if shape.rope.layout == "halves":
        first, second = np.arange(dims // 2), np.arange(dims // 2, dims)
    first, second = np.concatenate([first, rest[::2]]), np.concatenate([second, rest[1::2], rest[len(rest) // 2 * 2 :]])
    heads = np.arange(shape.kv_heads)[:, None] * shape.key_dim
    return (heads + first).ravel(), (heads + second).ravel()


def k_widths(weights: Float32, bits: float, shape: ModelShape) -> bytes:
    """Bits of every key channel of one layer, `bits` on average, such that the noise in the scores is least.

    weights: [pairs]. Every bit goes where noise is largest, and takes three quarters of it away.
    """
    noise, widths = weights.astype(np.float64), np.zeros(len(weights), np.uint8)
    for _ in range(round(bits * len(weights))):
        widest = int(np.where(widths < _WIDEST, noise, -1).argmax())
        widths[widest] += 1
        noise[widest] /= 4
    first, second = rope_pairs(shape)
    channels = np.zeros(shape.kv_heads * shape.key_dim, np.uint8)
    channels[first] = channels[second] = widths
    return channels.tobytes()


# Between layers


def measured_plan(profile: Profile, bits_per_value: float, shape: ModelShape) -> BitPlan:
    """The plan that costs answers least among those whose files take at most so many bits per value, all included.

    Files of passages shorter than _PASSAGE_TOKENS take more. A budget below the smallest plan's gives that one.
    """
    budget = bits_per_value
    while True:
        plan = _spend(profile, budget, shape)
        excess = file_bits_per_value(plan, shape) - bits_per_value
        if excess <= 0 or budget <= 1:
            return plan
        budget -= max(excess, 0.01)


def file_bits_per_value(plan: BitPlan, shape: ModelShape, tokens: int = _PASSAGE_TOKENS) -> float:
    """All bytes of a passage's file, in bits for each of its numbers."""
    k_pre = np.zeros((shape.layers, tokens, shape.kv_heads, shape.key_dim), np.float16)
    v = np.zeros((shape.layers, tokens, shape.kv_heads, shape.value_dim), np.float16)
    kv = ChunkKV(k_pre, v, {"spectral": np.zeros(tokens, np.float32)})
    return 8 * len(format.encoded(kv, plan, "00" * format.KEY_BYTES)) / (k_pre.size + v.size)


def _spend(profile: Profile, code_bits: float, shape: ModelShape) -> BitPlan:
    """Greedy: always the step to wider codes that takes away most KL per bit."""
    layers, by_channel = shape.layers, _better_by_channel(profile)
    values = np.where(by_channel[:, None], profile.v_by_channel, profile.v)
    curves = [_curve(row, K_BITS) for row in profile.k] + [_curve(row, V_BITS) for row in values]
    dims = [shape.key_dim] * layers + [shape.value_dim] * layers
    chosen = [0] * len(curves)
    left = code_bits * sum(dims) - sum(dims)  # every curve begins at one bit
    while True:
        best_worth, best = 0.0, (0, 0, 0.0)
        for tensor, (curve, dim) in enumerate(zip(curves, dims, strict=True)):
            bits, kl = curve[chosen[tensor]]
            for step in range(chosen[tensor] + 1, len(curve)):
                cost = dim * (curve[step][0] - bits)
                worth = (kl - curve[step][1]) / cost
                if cost <= left and worth > best_worth:
                    best_worth, best = worth, (tensor, step, cost)
        if not best_worth:
            break
        chosen[best[0]], left = best[1], left - best[2]
    spent = [curve[step][0] for curve, step in zip(curves, chosen, strict=True)]
    widths = tuple(k_widths(profile.k_weights[layer], spent[layer], shape) for layer in range(layers))
    return BitPlan(
        tuple(max(of_layer) for of_layer in widths),
        tuple(map(int, spent[layers:])),
        sinks=0,
        k_widths=widths,
        v_by_channel=tuple(np.flatnonzero(by_channel).tolist()),
    )


def _better_by_channel(profile: Profile) -> npt.NDArray[np.bool_]:
    """Layers whose values lose less when groups run along tokens, judged over all widths."""
    by_token, by_channel = (np.log(np.maximum(kl, _NOTHING)).sum(axis=1) for kl in (profile.v, profile.v_by_channel))
    better: npt.NDArray[np.bool_] = by_channel < by_token
    return better


def _curve(kl: Float32, bits: tuple[float, ...]) -> list[tuple[float, float]]:
    """(bits, KL) of one tensor, never rising, continued beyond what was measured."""
    falling = np.minimum.accumulate(kl).tolist()
    more = [(b, falling[-1] / 4 ** (b - bits[-1])) for b in _MORE_BITS]
    return [*zip(bits, falling, strict=True), *more]
