"""The graphics device measured in one command, `python -m quire_engine.bench_gpu`: needs the checkout and torch alone.

Weights and passages are random, in the shape of a model of 8 billion parameters; nothing is downloaded.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

if find_spec("gguf") is None:  # the runtime imports it for reading model files, and none is read here

    def _no_files(*_arguments: object) -> object:
        raise NotImplementedError("model files are read with the gguf package, which is not installed")

    for _name in ("gguf", "gguf.quants"):
        _empty = ModuleType(_name)
        vars(_empty).update(GGML_QUANT_SIZES={}, GGMLQuantizationType=_no_files, dequantize=_no_files)
        sys.modules[_name] = _empty
