"""llama.cpp without its AMX kernels, which end the process where a virtual machine names AMX and does not allow it.

There the first batch of several tokens dies at `ldtilecfg` (llama.cpp's issue 20824), and nothing tells beforehand.
Server processors alone have AMX; with it go the weights that are laid out anew for other instructions. Knows nothing
of whether AMX would have worked.
"""

from functools import cache

import llama_cpp.llama_cpp as c

_NAMED = b"AMX_INT8 = 1"


def _as_in_the_file(usual: c.llama_model_params) -> c.llama_model_params:
    """Weights stay as they are there."""
    usual.use_extra_bufts = False
    return usual


@cache
def avoid_amx() -> None:
    """From now on every model is loaded so, also by llama-cpp-python itself, if llama.cpp means to use AMX here."""
    usual = c.llama_model_default_params
    if _NAMED in c.llama_print_system_info():
        c.llama_model_default_params = lambda: _as_in_the_file(usual())
