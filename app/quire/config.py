"""The settings: each declared once with its meaning, default and limits; from config.toml or environment, saved there.

Precedence: explicit override (a command line flag), then environment QUIRE_<NAME>, then file, then default. A
name that does not exist and a value out of range are refused, with what would be right. Knows nothing of what
the values do.
"""

import difflib
import os
import tempfile
import tomllib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast, get_args

from quire import paths
from quire.config_values import (
    BUNDLED,
    FROM_DIAL,
    FROM_MACHINE,
    NO_EMBEDDER,
    Address,
    BundledModel,
    Choice,
    File,
    FromDial,
    FromMachine,
    Kind,
    Name,
    NoEmbedder,
    OrEmpty,
    Patterns,
    Real,
    Switch,
    Text,
    Whole,
)
from quire_engine.errors import QuireError

Dial = Literal["fast", "balanced", "exact"]
Origin = Literal["flag", "environment", "file", "default"]

KEY_VARIABLE: Final = "QUIRE_OPENAI_KEY"  # never in a file
_NOT_SETTINGS = ("QUIRE_DATA_DIR", "QUIRE_CACHE_DIR", "QUIRE_CONFIG_DIR", KEY_VARIABLE)

_RUNTIMES = ("auto", "llama.cpp", "torch", "openai")
_PRECISIONS = ("safe", "default", "compact", "tiny", "kvmix", "fp16")

HIGH_CONTRAST: Final = "high-contrast"
THEMES: Final = (
    "textual-dark", "textual-light", HIGH_CONTRAST, "ansi-dark", "ansi-light", "atom-one-dark", "atom-one-light",
    "catppuccin-frappe", "catppuccin-latte", "catppuccin-macchiato", "catppuccin-mocha", "dracula", "flexoki",
    "gruvbox", "monokai", "nord", "rose-pine", "rose-pine-dawn", "rose-pine-moon", "solarized-dark",
    "solarized-light", "tokyo-night",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything a person can set: its type, what it accepts, what it means (shown by the command line)."""

    model: Annotated[
        Path | BundledModel,
        OrEmpty(File(), BUNDLED, "for the bundled model"),
        "GGUF file to use; empty: the bundled one",
    ] = BUNDLED
    dial: Annotated[
        Dial, Choice(("fast", "balanced", "exact")), "how near to full prefill: KL 0.05, KL 0.009, or all of it"
    ] = "balanced"
    ratio: Annotated[
        float | FromDial,
        OrEmpty(Real(0, 1), FROM_DIAL, "to follow the dial"),
        "share of the reused tokens to recompute; empty: the dial decides",
    ] = FROM_DIAL
    selector: Annotated[str, Name(), "rule that picks the tokens to recompute"] = "default"
    context_tokens: Annotated[int, Whole(64, 1_000_000), "tokens of documents a question may use"] = 1500
    chunk_tokens: Annotated[int, Whole(32, 8192), "largest chunk; changing it caches all anew"] = 512
    max_tokens: Annotated[int, Whole(1, 100_000), "longest answer"] = 256
    temperature: Annotated[float, Real(0, 2), "0: always the likeliest word; higher: more varied"] = 0.0
    threads: Annotated[int, Whole(0, 1024), "processor threads to compute with; 0: all cores"] = 0
    precision: Annotated[
        str, Choice(_PRECISIONS), "of cached KV: safe is larger, compact and tiny smaller; fp16 is not compressed"
    ] = "default"
    max_file_mb: Annotated[int, Whole(1, 4096), "larger files are skipped, and listed"] = 200
    include: Annotated[str, Patterns(), "which files of added folders are read; empty: all"] = ""
    considerate: Annotated[
        bool, Switch(), "caching waits on battery and makes room where the machine is busy; off: it does not"
    ] = True
    cache_gb: Annotated[float, Real(0, 1_000_000), "disk space for cached KV, in GB; 0: no limit"] = 20.0
    memory_gb: Annotated[
        float | FromMachine,
        OrEmpty(Real(0, 1_000_000), FROM_MACHINE, "for a sixteenth of this machine's"),
        "memory for KV that questions found lately, in GB; 0: none",
    ] = FROM_MACHINE
    embedder: Annotated[
        Path | NoEmbedder,
        OrEmpty(File(), NO_EMBEDDER, "to find by words alone"),
        "GGUF file of an embedding model, to find by meaning too; empty: by words alone",
    ] = NO_EMBEDDER
    runtime: Annotated[
        str, Choice(_RUNTIMES), "what computes; auto: torch where it finds a graphics device, else llama.cpp"
    ] = "auto"
    live_window: Annotated[
        int,
        Whole(0, 1_000_000),
        "tokens of a conversation, the latest, that the torch runtime keeps exactly; older ones are packed; 0: all",
    ] = 0
    openai_url: Annotated[
        str, Address("an address such as http://localhost:8000/v1"), "server that answers when the runtime is openai"
    ] = ""
    openai_model: Annotated[
        str, Text("as the server calls it; empty: the first that it lists"), "model to ask that server for"
    ] = ""
    theme: Annotated[str, Choice(THEMES), "colours; ansi-dark and ansi-light use the terminal's own"] = "textual-dark"
    animations: Annotated[bool, Switch(), "whether anything on the screen moves by itself"] = True


# What stored KV depends on; and what needs nothing to be opened again, but counts from the next question on.
CACHE_DEPENDS_ON: Final = frozenset({"model", "chunk_tokens", "precision"})
COUNTS_AT_ONCE: Final = frozenset(
    {
        "dial",
        "ratio",
        "selector",
        "context_tokens",
        "max_tokens",
        "temperature",
        "cache_gb",
        "considerate",
        "memory_gb",
        "theme",
        "animations",
    }
)

_KINDS: Final[dict[str, Kind]] = {f.name: get_args(f.type)[1] for f in fields(Settings)}
_MEANINGS: Final[dict[str, str]] = {f.name: get_args(f.type)[2] for f in fields(Settings)}


@dataclass(frozen=True)
class Explained:
    """One setting for a help page. choices: all it accepts, as written; empty where they are not countable."""

    name: str
    default: object
    allowed: str
    meaning: str
    choices: tuple[str, ...]


def explained() -> list[Explained]:
    """All settings with what they mean and accept, in the order of their declaration."""
    return [
        Explained(f.name, f.default, _KINDS[f.name].allowed(), _MEANINGS[f.name], _choices(_KINDS[f.name]))
        for f in fields(Settings)
    ]


def _choices(kind: Kind) -> tuple[str, ...]:
    if isinstance(kind, Choice):
        return tuple(map(str, kind.values))
    return ("on", "off") if isinstance(kind, Switch) else ()


def written(value: object) -> str:
    """A value as a person writes it; nothing for what stands for "nothing was chosen"."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if isinstance(value, str | int | float | Path) else ""


def load(
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """The settings in force. file: config.toml of the configuration directory unless another one is named.

    Raises QuireError for an unreadable file, an unknown name, or a value that is not allowed.
    """
    return in_force(overrides, environ, file)[0]


def in_force(
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> tuple[Settings, dict[str, Origin]]:
    """As load, and where the value of each setting comes from."""
    file = file or config_file()
    sources: tuple[tuple[Origin, dict[str, object]], ...] = (
        ("file", _checked(_from_file(file), f"{file} sets")),
        ("environment", _checked(_from_environment(environ), "The environment sets", variable)),
        ("flag", _checked(overrides or {}, "The command line sets")),
    )
    values: dict[str, object] = {}
    origins: dict[str, Origin] = {f.name: "default" for f in fields(Settings)}
    for origin, some in sources:
        values |= some
        origins |= dict.fromkeys(some, origin)
    return Settings(**cast(Any, values)), origins


def config_file() -> Path:
    return paths.config_dir() / "config.toml"


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"QUIRE_{name.upper()}"


def differences(old: Settings, new: Settings) -> dict[str, object]:
    """The settings that are not the same, with their new values."""
    return {f.name: getattr(new, f.name) for f in fields(Settings) if getattr(old, f.name) != getattr(new, f.name)}


def checked(name: str, value: object) -> object:
    """The value as its type. Raises QuireError, with what would be right, for anything else."""
    return _checked({name: value}, "You set")[name]


def save(changes: Mapping[str, object], file: Path | None = None) -> None:
    """Writes settings into config.toml, keeping its comments and order; a new one gets a comment that explains it.

    An empty value of `model` and `ratio` means that nothing is chosen, which is said by leaving the line out.
    Raises QuireError, with the file as it was, for what load would refuse and for a file that cannot be written.
    """
    import tomlkit

    file = file or config_file()
    values = _checked(changes, "You set")
    _from_file(file)  # an invalid file is named as load names it
    document = tomlkit.parse(_text(file))
    for name, value in values.items():
        if written(value) == "":
            document.pop(name, None)
        elif name in document:
            document[name] = _toml(value)
        else:
            if document.body:
                document.add(tomlkit.nl())
            document.add(tomlkit.comment(_comment(name)))
            document.add(name, _toml(value))
    _write(file, _without_comments_of({n for n, v in values.items() if written(v) == ""}, tomlkit.dumps(document)))


def unset(name: str, file: Path | None = None) -> bool:
    """Takes a setting, or anything else, out of config.toml; False when it was not there. Raises QuireError."""
    import tomlkit

    file = file or config_file()
    if name not in _from_file(file):
        _refuse_unknown(name, "You set")
        return False
    document = tomlkit.parse(_text(file))
    document.remove(name)
    _write(file, _without_comments_of({name}, tomlkit.dumps(document)))
    return True


def _toml(value: object) -> object:
    return str(value.absolute()) if isinstance(value, Path) else value  # it is not read from the same folder


def _comment(name: str) -> str:
    return f"{_MEANINGS[name]} ({_KINDS[name].allowed()})"


def _without_comments_of(names: Collection[str], text: str) -> str:
    """Without the lines that `save` wrote above these settings."""
    for name in names & _KINDS.keys():
        text = text.replace(f"# {_comment(name)}\n", "", 1)
    return f"{text.strip()}\n" if text.strip() else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _write(file: Path, text: str) -> None:
    """Beside and renamed, so that a crash leaves the old file. A symbolic link goes on pointing where it did."""
    file = file.resolve()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(".tmp", file.stem, file.parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(fd)
            with suppress(FileNotFoundError):
                os.chmod(temporary, file.stat().st_mode & 0o777)
            os.replace(temporary, file)
        finally:
            with suppress(FileNotFoundError):  # renamed
                os.unlink(temporary)
    except OSError as error:
        reason = error.strerror or str(error)
        raise QuireError(
            f"{file} cannot be written: {reason}.", "Nothing was changed. Check its permissions."
        ) from error


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


def _checked(values: Mapping[str, object], sets: str, spell: Callable[[str], str] = str) -> dict[str, object]:
    """The values as their types.  sets: who sets them, "The environment sets".  spell: how it writes their names."""
    checked: dict[str, object] = {}
    for name, value in values.items():
        _refuse_unknown(name, sets)
        try:
            checked[name] = _KINDS[name].read(value)
        except (ValueError, KeyError, OverflowError, RuntimeError) as error:  # RuntimeError: ~ without a home directory
            message = f"{sets} {spell(name)} to {value!r}, which is not allowed."
            raise QuireError(message, f"{spell(name)} is {_KINDS[name].allowed()}.") from error
    return checked


def _refuse_unknown(name: str, sets: str) -> None:
    if name not in _KINDS:
        close = difflib.get_close_matches(name, _KINDS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"The settings are: {', '.join(_KINDS)}."
        raise QuireError(f"{sets} {name}, which is no setting.", hint)
