"""The kinds of values of settings: each reads what a file, a variable or a person gives, or says what is right.

Also what a setting holds where nothing was chosen. Knows nothing of which settings there are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit


@dataclass(frozen=True)
class BundledModel:
    """No model was chosen: the small one that the installation brought."""


@dataclass(frozen=True)
class FromDial:
    """No ratio was chosen: the dial decides."""


@dataclass(frozen=True)
class NoEmbedder:
    """No embedding model was chosen: passages are found by their words."""


@dataclass(frozen=True)
class FromMachine:
    """No amount was chosen: a share of what this machine has."""


BUNDLED: Final = BundledModel()
FROM_DIAL: Final = FromDial()
FROM_MACHINE: Final = FromMachine()
NO_EMBEDDER: Final = NoEmbedder()


class Kind(Protocol):
    """What a setting accepts: read() raises ValueError for anything else, allowed() says it in words."""

    def read(self, value: object) -> object: ...
    def allowed(self) -> str: ...


@dataclass(frozen=True)
class Whole:
    """A whole number."""

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
        return f"a whole number from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Real:
    """A number."""

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
        return f"a number from {self.low:,.12g} to {self.high:,.12g}"


@dataclass(frozen=True)
class Choice:
    """One of some words or numbers."""

    values: tuple[str | int, ...]

    def read(self, value: object) -> str | int:
        for choice in self.values:
            if not isinstance(value, bool | float) and str(value) == str(choice):
                return choice
        raise ValueError

    def allowed(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class Switch:
    """On or off."""

    def read(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        return {"on": True, "true": True, "off": False, "false": False}[str(value).lower()]

    def allowed(self) -> str:
        return "on or off"


@dataclass(frozen=True)
class Name:
    """A text that is not empty."""

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError
        return value.strip()

    def allowed(self) -> str:
        return "a name"


@dataclass(frozen=True)
class File:
    """The path of a GGUF file, which may begin with ~."""

    def read(self, value: object) -> Path:
        if not isinstance(value, str | Path):
            raise ValueError
        return Path(value).expanduser()

    def allowed(self) -> str:
        return "the path of a GGUF file"


@dataclass(frozen=True)
class OrEmpty:
    """What another kind accepts, or the empty text, which is read as `nothing`.  purpose: of leaving it empty."""

    kind: Kind
    nothing: object
    purpose: str

    def read(self, value: object) -> object:
        return self.nothing if value in ("", self.nothing) else self.kind.read(value)

    def allowed(self) -> str:
        return f"{self.kind.allowed()}, or empty {self.purpose}"


@dataclass(frozen=True)
class Patterns:
    """Names of files as in .gitignore."""

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError
        if value.strip():
            from quire import ignore  # only now: most people set none

            ignore.check(ignore.patterns(value))
        return value.strip()

    def allowed(self) -> str:
        return "patterns with commas between them, as in .gitignore: *.md, docs/**; empty for all"


@dataclass(frozen=True)
class Text:
    """Any text, also none."""

    meaning: str

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value.strip()

    def allowed(self) -> str:
        return self.meaning


@dataclass(frozen=True)
class Address(Text):
    """The address of a server, also none."""

    def read(self, value: object) -> str:
        address = super().read(value)
        parts = urlsplit(address)
        if address and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ValueError
        _ = parts.port  # ValueError where it is none
        return address
