"""The precision plans that measurements compare, by name.

Knows names; what follows from them is in `quire_engine.precision`.
"""

import difflib
import re
from collections.abc import Sequence

from quire_engine.baselines import KV_TYPES
from quire_engine.engine import Engine
from quire_engine.errors import QuireError
from quire_engine.precision import plans
from quire_engine.precision.profile import measured_plan
from quire_engine.types import BitPlan

PLANS = ("fp16", "k8v8", "measured-6", "safe", "measured-4", "default", "compact", "tiny", "kvmix", "kivi", "k4v4")
ALL = (*PLANS, *KV_TYPES)
"""What is compared unless somebody chooses; llama.cpp's own types only where nothing is stored."""

KIVI_BITS = 2
_UNIFORM = re.compile(r"k([1-8])v([1-8])")
_MEASURED = re.compile(r"measured-(\d+(?:\.\d+)?)")


def chosen(text: str, otherwise: Sequence[str], engine: Engine) -> list[str]:
    """The names in a comma-separated list, or those otherwise compared, as far as this model allows them."""
    if names := [name.strip() for name in text.split(",") if name.strip()]:
        return names
    return [name for name in otherwise if engine.profile.known or not _MEASURED.fullmatch(name)]


def plan_of(name: str, engine: Engine) -> BitPlan:
    """One of `plans.NAMES`, kivi, k4v3 (bits of all keys and values), or measured-3.4 (at most so many bits per value
    of whole files, spent as the model's profile says).

    Raises QuireError for another name, and for a measured one where nothing was measured.
    """
    layers = engine.shape.layers
    if name in plans.NAMES:
        return plans.named(name, engine.shape, engine.profile)
    if name == "kivi":  # arXiv 2402.02750, without its window of recent tokens: a stored passage has none
        return BitPlan((KIVI_BITS,) * layers, (KIVI_BITS,) * layers, grid="minmax", sinks=0)
    if uniform := _UNIFORM.fullmatch(name):
        return BitPlan.uniform(layers, int(uniform[1]), int(uniform[2]))
    if measured := _MEASURED.fullmatch(name):
        if not engine.profile.known:
            raise QuireError(f"{engine.model_name} was not measured yet.", "Measure it: quire models profile")
        return measured_plan(engine.profile, float(measured[1]), engine.shape)
    close = difflib.get_close_matches(name, ALL, n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    raise QuireError(
        f"There is no plan {name!r}.", f"{meant}There are {', '.join(ALL)}, k4v3 and its like, and measured-3.4."
    )
