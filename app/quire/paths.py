"""Where Quire keeps its things: index and history, cached KV, configuration, and the files it ships with.

Knows directories, not what is written in them. A directory is created, readable by its owner alone, when it
is first asked for; importing this module touches nothing.
"""

import os
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from platformdirs import PlatformDirs

from quire_engine.errors import QuireError

_DIRS = PlatformDirs("quire", appauthor=False)


def data_dir() -> Path:
    """Index and conversations; QUIRE_DATA_DIR overrides."""
    return _directory("QUIRE_DATA_DIR", _DIRS.user_data_dir)


def cache_dir() -> Path:
    """Cached KV, which can be made again; QUIRE_CACHE_DIR overrides."""
    return _directory("QUIRE_CACHE_DIR", _DIRS.user_cache_dir)


def config_dir() -> Path:
    """config.toml; QUIRE_CONFIG_DIR overrides."""
    return _directory("QUIRE_CONFIG_DIR", _DIRS.user_config_dir)


def log_dir() -> Path:
    """What a crash leaves behind; QUIRE_LOG_DIR overrides."""
    return _directory("QUIRE_LOG_DIR", _DIRS.user_log_dir)


def assets() -> Path | Traversable:
    """Files that ship with Quire: inside the installed package, or at the top of a checkout."""
    packaged = files("quire") / "assets"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "assets"


def _directory(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable) or default).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise QuireError(
            f"The directory {path} cannot be used: {reason}.",
            f"Make it writable, or name another one in {variable}.",
        ) from error
    return path
