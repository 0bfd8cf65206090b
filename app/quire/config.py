"""The settings: each declared once with its meaning, default and limits; from config.toml or environment.

Precedence: explicit override (a command line flag), then environment QUIRE_<NAME>, then file, then default. A
name that does not exist and a value out of range are refused, with what would be right. Knows nothing of what
the values do.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol, cast, get_args

from quire import paths
from quire_engine.errors import QuireError

Dial = Literal["fast", "balanced", "exact"]

_NOT_SETTINGS = ("QUIRE_DATA_DIR", "QUIRE_CACHE_DIR", "QUIRE_CONFIG_DIR")


@dataclass(frozen=True)
class BundledModel:
    """No model was chosen: the small one that the installation brought."""


@dataclass(frozen=True)
class FromDial:
    """No ratio was chosen: the dial decides."""


BUNDLED: Final = BundledModel()
FROM_DIAL: Final = FromDial()


class _Rule(Protocol):
    """What a setting accepts: read() raises ValueError for anything else, allowed() says it in words."""

    def read(self, value: object) -> object: ...
    def allowed(self) -> str: ...


@dataclass(frozen=True)
class _Whole:
    low: int
    high: int

    def read(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        number = int(value)
        if not self.low <= number <= self.high:
            raise ValueError
        return number

    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class _Real:
    low: float
    high: float

    def read(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not self.low <= number <= self.high:  # not a number fails here too
            raise ValueError
        return number

    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class _Choice:
    values: tuple[str | int, ...]

    def read(self, value: object) -> str | int:
        for choice in self.values:
            if not isinstance(value, bool | float) and str(value) == str(choice):
                return choice
        raise ValueError

    def allowed(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class _Name:
    def read(self, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError
        return value.strip()

    def allowed(self) -> str:
        return "a name"


@dataclass(frozen=True)
class _Model:
    def read(self, value: object) -> Path | BundledModel:
        if isinstance(value, BundledModel) or value == "":
            return BUNDLED
        if not isinstance(value, str | Path):
            raise ValueError
        return Path(value).expanduser()

    def allowed(self) -> str:
        return "the path of a GGUF file, or empty for the bundled model"


@dataclass(frozen=True)
class _Ratio(_Real):
    def read(self, value: object) -> float | FromDial:  # type: ignore[override]
        return FROM_DIAL if isinstance(value, FromDial) or value == "" else super().read(value)

    def allowed(self) -> str:
        return f"{super().allowed()}, or empty to follow the dial"


_BITS = _Choice((2, 3, 4, 8, 16))


@dataclass(frozen=True)
class Settings:
    """Everything a person can set: its type, what it accepts, what it means (shown by the command line)."""

    model: Annotated[Path | BundledModel, _Model(), "GGUF file to use; empty: the bundled one"] = BUNDLED
    dial: Annotated[
        Dial, _Choice(("fast", "balanced", "exact")), "how much is recomputed; exact reads everything again"
    ] = "balanced"
    ratio: Annotated[
        float | FromDial, _Ratio(0, 1), "share of the reused tokens to recompute; empty: the dial decides"
    ] = FROM_DIAL
    selector: Annotated[str, _Name(), "rule that picks the tokens to recompute"] = "default"
    context_tokens: Annotated[int, _Whole(64, 1_000_000), "tokens of documents a question may use"] = 1500
    chunk_tokens: Annotated[int, _Whole(32, 8192), "largest chunk; changing it caches all anew"] = 512
    max_tokens: Annotated[int, _Whole(1, 100_000), "longest answer"] = 256
    temperature: Annotated[float, _Real(0, 2), "0: always the likeliest word; higher: more varied"] = 0.0
    threads: Annotated[int, _Whole(0, 1024), "processor threads to compute with; 0: all cores"] = 0
    k_bits: Annotated[int, _BITS, "bits per stored value of a key; 16: not compressed"] = 8
    v_bits: Annotated[int, _BITS, "bits per stored value of a value; 16: not compressed"] = 8
    max_file_mb: Annotated[int, _Whole(1, 4096), "larger files are skipped, and listed"] = 20


_RULES: Final[dict[str, _Rule]] = {f.name: get_args(f.type)[1] for f in fields(Settings)}
_MEANINGS: Final[dict[str, str]] = {f.name: get_args(f.type)[2] for f in fields(Settings)}


@dataclass(frozen=True)
class Explained:
    """One setting for a help page."""

    name: str
    default: object
    allowed: str
    meaning: str


def explained() -> list[Explained]:
    """All settings with what they mean and accept, in the order of their declaration."""
    return [Explained(f.name, f.default, _RULES[f.name].allowed(), _MEANINGS[f.name]) for f in fields(Settings)]


def load(
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """The settings in force. file: config.toml of the configuration directory unless another one is named.

    Raises QuireError for an unreadable file, an unknown name, or a value that is not allowed.
    """
    file = file or paths.config_dir() / "config.toml"
    values = _checked(_from_file(file), str(file))
    values |= _checked(_from_environment(environ), "the environment", lambda name: f"QUIRE_{name.upper()}")
    values |= _checked(overrides or {}, "the command line")
    return Settings(**cast(Any, values))


def _from_file(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise QuireError(f"{file} is not valid TOML: {error}.", "Correct the file, or delete it.") from error
    except OSError as error:
        raise QuireError(f"{file} cannot be read: {error.strerror or error}.", "Check its permissions.") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Settings among the variables. An empty one counts as not set; a near miss of a name is refused."""
    names = {f"QUIRE_{f.name.upper()}": f.name for f in fields(Settings)}
    for variable in environ:
        if not variable.startswith("QUIRE_") or variable in names or variable in _NOT_SETTINGS:
            continue
        # Tools around Quire may have variables of their own; only what looks like a typing error is one.
        if close := difflib.get_close_matches(variable, names, n=1, cutoff=0.85):
            raise QuireError(f"The environment sets {variable}, which is no setting.", f"Did you mean {close[0]}?")
    return {name: environ[variable] for variable, name in names.items() if environ.get(variable)}


def _checked(values: Mapping[str, object], source: str, spell: Any = str) -> dict[str, object]:
    """The values as their types; spell: how this source writes a setting's name."""
    known = [f.name for f in fields(Settings)]
    checked: dict[str, object] = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"The settings are: {', '.join(known)}."
            raise QuireError(f"{source} sets {name}, which is no setting.", hint)
        try:
            checked[name] = _RULES[name].read(value)
        except (ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: ~ without a home directory
            message = f"{source} sets {spell(name)} to {value!r}, which is not allowed."
            raise QuireError(message, f"{spell(name)} is {_RULES[name].allowed()}.") from error
    return checked
