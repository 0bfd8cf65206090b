"""The models a person can choose: on this computer, and well-known ones to fetch; what switching to one costs.

One core for the command line and the models screen. Knows files, sizes and this machine's memory; what is in a GGUF it
asks the engine, which it imports late, because the welcome names the recommended model before anything is loaded.
"""

import difflib
import os
import shutil
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from quire import model_files, paths
from quire.config import Settings
from quire.config_values import BUNDLED, BundledModel
from quire.terminal import printable
from quire_engine.errors import ModelError, QuireError

if TYPE_CHECKING:
    from quire.download import Fetching
    from quire.library import Library
    from quire.render import Json
    from quire.session import Session
    from quire_engine.engine import Engine
    from quire_engine.kv.store import KVStore

BUNDLED_NAME = "bundled"
BUNDLED_TITLE = "SmolLM2 135M Instruct"  # its file calls itself something else
_WORK_BYTES = 500_000_000  # of memory, beside the model's own: its live context, Python
_LEFT_TO_OTHERS = 0.25  # of memory
_LOOKED_AT = 50


@dataclass(frozen=True)
class Known:
    """A model of assets/models.toml. source: repository and file.  billions: of weights.  everyday: quick enough
    without a graphics card.  restricted: its licence forbids some uses, so it is not recommended."""

    name: str
    title: str
    source: str
    size_gb: float
    billions: float
    licence: str
    everyday: bool
    restricted: bool = False

    @property
    def size_bytes(self) -> int:
        return int(1e9 * self.size_gb)

    @property
    def memory_bytes(self) -> int:
        """What it takes to answer with it on the processor."""
        return self.size_bytes + _WORK_BYTES

    @property
    def path(self) -> Path:
        """Where it lies once it is fetched."""
        return model_files.models_dir() / Path(self.source).name


@dataclass(frozen=True)
class Model:
    """One line of the list.  name: how it is named to Quire.  here: on this computer.  problem: why Quire would not
    stitch it or, when it is not readable, cannot open it."""

    name: str
    title: str
    path: Path
    size_bytes: int
    here: bool
    in_use: bool = False
    bundled: bool = False
    recommended: bool = False
    fits: bool = True
    licence: str = ""
    problem: str = ""
    readable: bool = True

    @property
    def choice(self) -> Path | BundledModel:
        """What the setting `model` says to use it."""
        return BUNDLED if self.bundled else self.path

    @property
    def fetched(self) -> bool:
        """Whether its file is Quire's own, to be deleted with it."""
        return self.here and self.path.parent == model_files.models_dir()

    def notes(self) -> list[str]:
        """What to know of it before it is used, the most important first."""
        parts = [
            "in use" if self.in_use else "",
            "recommended for this machine" if self.recommended else "",
            "" if self.fits else "needs more memory than this machine has",
            self.problem,
            "came with Quire; small" if self.bundled else "",
            f"licence: {self.licence}" if self.licence else "",
        ]
        return [printable(part).replace("\n", " ") for part in parts if part]


@dataclass(frozen=True)
class Price:
    """What other settings cost.  unused_bytes: KV on disk they have no use for; it is kept for the way back.
    tokens: to cache anew.  ms: how long that takes, 0 when unknown.  reuse_off: why nothing would be cached."""

    unused_bytes: int
    tokens: int
    ms: float
    reuse_off: str = ""

    def sentence(self) -> str:
        """Invalidates 1.2 GB, kept for the way back; caching again takes about 12 min."""
        from quire.render import duration, size

        lost = f"invalidates {size(self.unused_bytes)}, kept for the way back" if self.unused_bytes else ""
        if self.reuse_off:
            again = f"nothing is cached with it: {printable(self.reuse_off).rstrip('.')}"
        elif self.tokens:
            rounded = 60_000 * round(self.ms / 60_000) if self.ms > 90_000 else self.ms
            takes = f"takes about {duration(rounded)}" if self.ms >= 1000 else "takes a moment"
            takes = takes if self.ms else f"is needed for {self.tokens} tokens"
            again = f"caching {'again ' if lost else ''}{takes}"
        else:
            again = "everything is cached for it already"
        sentence = "; ".join(part for part in (lost, again) if part)
        return f"{sentence[0].upper()}{sentence[1:]}."


# What there is


@cache
def known() -> tuple[Known, ...]:
    """The well-known models, from small to large."""
    table = tomllib.loads((paths.assets() / "models.toml").read_text(encoding="utf-8"))
    return tuple(Known(**entry) for entry in table["model"])


def recommended(memory: int | None = None) -> Known | None:
    """The best everyday model that leaves room for other programs; None on a very small machine.

    Knows nothing of graphics devices, which take seconds to ask for: see `quire.advice`.
    """
    fitting = [
        model for model in known() if model.everyday and not model.restricted and fits(2 * model.size_bytes, memory)
    ]
    return fitting[-1] if fitting else None


def fits(size_bytes: int, memory: int | None = None) -> bool:
    """Whether a model file of this size can be worked with in this machine's memory (or so many bytes)."""
    return size_bytes + _WORK_BYTES <= (1 - _LEFT_TO_OTHERS) * (memory_bytes() if memory is None else memory)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def listing(settings: Settings) -> list[Model]:
    """All models: the bundled one, those on this computer, those that can be fetched."""
    choice, best = settings.model, recommended()
    titles = {model.path: model for model in known()}
    listed: list[Model] = []
    try:
        bundled = model_files.bundled()
        listed.append(_on_disk(BUNDLED_NAME, bundled, isinstance(choice, BundledModel), bundled=True))
    except ModelError:
        pass  # an installation without it has other models
    files = model_files.others()
    if isinstance(choice, Path) and choice.absolute() not in files and choice.is_file():
        files.append(choice.absolute())
    for path in files:
        entry = titles.get(path)
        in_use = isinstance(choice, Path) and choice.absolute() == path
        listed.append(_on_disk(entry.name if entry else path.stem, path, in_use, entry))
    here = {model.path for model in listed}
    listed += [
        Model(
            m.name,
            m.title,
            m.path,
            m.size_bytes,
            False,
            fits=fits(m.size_bytes),
            licence=m.licence,
            recommended=m == best,
        )
        for m in known()
        if m.path not in here
    ]
    return listed


def lines(models: list[Model]) -> list[str]:
    """The list for a terminal; * marks the model in use."""
    from quire.render import size

    shown = []
    for heading, here in (("On this computer", True), ("To fetch: quire models pull NAME", False)):
        shown += [heading] if any(model.here == here for model in models) else []
        for model in (m for m in models if m.here == here):
            about = "; ".join(note for note in model.notes() if note != "in use")
            shown.append(
                f"{'*' if model.in_use else ' '} {printable(model.name):<16} {size(model.size_bytes):>7}  {about}"
            )
    if taken := sum(model.size_bytes for model in models if model.fetched):
        shown.append(f"Fetched models take {size(taken)} in {printable(str(model_files.models_dir()))}")
    return shown


def as_json(models: list[Model]) -> "Json":
    return {
        "models": [
            {
                "name": model.name,
                "title": model.title,
                "path": str(model.path),
                "size_bytes": model.size_bytes,
                "here": model.here,
                "in_use": model.in_use,
                "recommended": model.recommended,
                "fits": model.fits,
                "licence": model.licence,
                "problem": model.problem,
            }
            for model in models
        ],
        "disk_bytes": sum(model.size_bytes for model in models if model.fetched),
    }


def _on_disk(name: str, path: Path, in_use: bool, entry: Known | None = None, bundled: bool = False) -> Model:
    from quire_engine import gguf

    size, title, problem, readable = path.stat().st_size, path.stem, "", True
    try:
        header = gguf.read(path)
        title, problem = header.name, gguf.why_not_stitchable(header)
    except QuireError as error:
        problem, readable = error.message, False
    return Model(
        name,
        entry.title if entry else BUNDLED_TITLE if bundled else title,
        path,
        size,
        True,
        in_use,
        bundled,
        entry is not None and entry == recommended(),
        fits(size),
        entry.licence if entry else "",
        problem,
        readable,
    )


def find(name: str, settings: Settings) -> Model:
    """A model that is on this computer, by its name, its file's name or a path. Raises QuireError."""
    models = [model for model in listing(settings) if model.here]
    path = Path(name).expanduser().absolute()
    for model in models:
        if name in (model.name, model.path.name, model.path.stem) or path == model.path:
            return model
    if path.is_file():
        return _on_disk(path.stem, path, False)
    if any(name == model.name for model in known()):
        raise QuireError(f"The model {name} is not on this computer.", f"Fetch it: quire models pull {name}")
    raise _unknown(name, [model.name for model in models])


def _unknown(name: str, names: list[str]) -> QuireError:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names)}; or give the path of a .gguf file."
    return QuireError(f"There is no model {name}.", hint)


# Fetching and deleting


@dataclass(frozen=True)
class Fetchable:
    """Where a model comes from and where it will lie."""

    address: str
    path: Path


def fetchable(source: str) -> Fetchable:
    """What NAME, https://... or organisation/repository/file.gguf means. Raises QuireError."""
    from quire import download

    source = source.strip()
    for model in known():
        source = model.source if source == model.name else source
    if "://" in source:
        address = source.replace("/blob/", "/resolve/") if "huggingface.co/" in source else source
    else:
        parts = source.split("/")
        if len(parts) < 3:
            if len(parts) == 2:
                raise QuireError(f"{source} names no file.", f"Add the name of its .gguf file: {source}/FILE.gguf")
            raise _unknown(source, [model.name for model in known()])
        address = download.hub_address("/".join(parts[:2]), "/".join(parts[2:]))
    name = printable(unquote(Path(urlsplit(address).path).name))
    if not name.endswith(".gguf") or "/" in name or name.startswith("."):
        raise QuireError(f"{source} names no .gguf file.", "Quire runs models in llama.cpp's GGUF format.")
    if "-of-0" in name:
        raise QuireError(f"{source} is one of several parts.", "Choose a model that is a single file.")
    return Fetchable(address, model_files.models_dir() / name)


def pull(
    source: str, progress: "Callable[[Fetching], None]", should_stop: Callable[[], bool], sha256: str = ""
) -> Path:
    """Fetches a model; goes on where an earlier try stopped. Raises QuireError, and Aborted when stopped."""
    from quire import download

    wanted = fetchable(source)
    if not wanted.path.exists():
        download.fetch(wanted.address, wanted.path, progress, should_stop, sha256)
    return wanted.path


def offer(model: "Model | Known") -> str:
    """Fetch Qwen3 4B Instruct 2507? It takes 2.5 GB; 31.0 GB are free."""
    from quire.render import size

    free = shutil.disk_usage(model_files.models_dir()).free
    room = f"{'' if free > model.size_bytes else 'only '}{size(free)} are free"
    return f"Fetch {printable(model.title)}? It takes {size(model.size_bytes)}; {room}."


def remove(model: Model) -> None:
    """Deletes a fetched model, or forgets one that lies elsewhere. Raises QuireError for those that must stay."""
    if model.bundled:
        raise QuireError("The bundled model belongs to the installation.", "It is deleted together with Quire.")
    if model.in_use:
        raise QuireError(f"{model.name} is in use.", "Use another one first, for example: quire models use bundled")
    try:
        model_files.forget(model.path)
    except OSError as error:
        raise QuireError(f"{model.path} cannot be deleted: {error.strerror}.", "Check its permissions.") from error


def price(session: "Session", wanted: Settings) -> Price:
    """What it costs to go from the session's settings to these. Raises QuireError for a model that cannot be opened.

    Opens the vocabulary of the other model, not its weights; takes a moment.
    """
    from quire.session import Session

    with Session(wanted) as other:
        there = other.engine
        try:
            here = session.engine
        except ModelError:  # it is gone, which is why another one is wanted
            here = there
        unused = here.chunks.store.size_bytes() if here is not there else 0
        if there.known_reuse_off:
            return Price(unused, 0, 0.0, there.known_reuse_off)
        lengths, slower = _missing(session.library, here, there), 1.0
        costs = there.known_costs
        if costs is None and (costs := here.known_costs):  # roughly: work grows with the size of the weights
            slower = there.model_file.stat().st_size / here.model_file.stat().st_size
        ms = costs.encode(lengths, len(there.chunks.preamble))["encode"] if costs else 0.0
        return Price(unused, sum(lengths), slower * ms)


def _missing(library: "Library", here: "Engine", there: "Engine") -> list[int]:
    """The lengths of the passages that would have to be cached.

    Where they would be cut anew they are not known yet: as many tokens as the library has, less those that lie there
    and belong to no passage of now, as after a switch to and fro.
    """
    tokens, store = library.tokens(), there.chunks.store
    known, stored = library.addresses(store.root.name), set(store.keys())
    if here.limits.chunk_tokens == there.limits.chunk_tokens:
        unknown = [chunk for chunk in tokens if chunk not in known]
        known |= {chunk: there.address(text) for chunk, text in library.texts(unknown).items()}
        return [length for chunk, length in tokens.items() if known.get(chunk) not in stored]
    others = sorted(stored - {*known.values(), there.chunks.preamble.key})
    left = max(0, sum(tokens.values()) - _tokens_of(store, others))
    whole, rest = divmod(left, there.limits.chunk_tokens)
    return [there.limits.chunk_tokens] * whole + [rest] * bool(rest)


def _tokens_of(store: "KVStore", keys: list[str]) -> int:
    """How many tokens these stored passages have, from a look at some."""
    lengths = []
    for key in keys[:: max(1, len(keys) // _LOOKED_AT)]:
        with suppress(QuireError), store.open(key) as chunk:
            lengths.append(chunk.header.tokens)
    return round(len(keys) * sum(lengths) / len(lengths)) if lengths else 0
