"""Precision plans by name: how many bits a model's stored keys and values get.

safe, default, compact and tiny are budgets for whole files, spent as the model's profile says; kvmix is the published
rule; fp16 stores everything as it is. Knows nothing of how a profile is measured.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quire_engine.precision import profile as profiles
from quire_engine.precision.profile import Profile
from quire_engine.types import BitPlan, Float32, ModelShape

BITS_PER_VALUE = {"safe": 4.5, "default": 3.4, "compact": 2.8, "tiny": 2.3}
NAMES = (*BITS_PER_VALUE, "kvmix", "fp16")
_UNMEASURED_BITS = 8  # costs no model anything that could be measured
LOW_BITS, HIGH_K_BITS, HIGH_V_BITS = 2, 3, 4  # KVmix's


def named(name: str, shape: ModelShape, profile: Profile) -> BitPlan:
    """The plan of that name. Without a profile all but fp16 fall back to 8 bits, which is safe for any model."""
    if name == "fp16":
        return BitPlan.exact(shape.layers)
    if name == "kvmix" and len(profile.k_importance):
        return kvmix(profile.k_importance, profile.v_importance)
    if name in BITS_PER_VALUE and profile.known:
        return profiles.measured_plan(profile, BITS_PER_VALUE[name], shape)
    return BitPlan.uniform(shape.layers, _UNMEASURED_BITS, _UNMEASURED_BITS)


def kvmix(k_importance: Float32, v_importance: Float32) -> BitPlan:
    """The published rule (arXiv 2506.08018) on the published grid: 3 bits for the most important fifth of keys, 4 bits
    for that of values, 2 bits for all others. A fifth is two rounded tenths, as published, but never nothing. No exact
    tokens."""
    k_bits, v_bits = _favour(k_importance, HIGH_K_BITS), _favour(v_importance, HIGH_V_BITS)
    return BitPlan(k_bits, v_bits, grid="minmax", sinks=0)


def _favour(norms: Float32, bits: int) -> tuple[int, ...]:
    """These bits for the layers with the largest norms, few bits for the others."""
    many = max(1, 2 * int(0.1 * len(norms)))
    favoured = np.argsort(-norms, kind="stable")[:many]
    return tuple(bits if layer in favoured else LOW_BITS for layer in range(len(norms)))


def find(fingerprint: bytes, folders: Iterable[Path]) -> Profile:
    """A model's profile from the first folder that has one; UNKNOWN where none has."""
    for folder in folders:
        profile = profiles.load(folder / file_name(fingerprint))
        if profile.known:
            return profile
    return profiles.UNKNOWN


def file_name(fingerprint: bytes) -> str:
    """Of a profile, in any folder of profiles."""
    return f"{fingerprint.hex()[:16]}.json"
