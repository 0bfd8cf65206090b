"""What `quire doctor` looks at: everything that Quire stands on, each with its state, what was found, and a remedy.

Every check is tried and none stops another, whatever fails. Repairs nothing and deletes nothing; a remedy is for the
person to follow. Knows nothing of how the findings are printed.
"""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Literal

from quire import config, holdings, models, paths
from quire.config import Settings
from quire.config_values import BundledModel, NoEmbedder
from quire.conversation import open_history
from quire.elsewhere import server_of
from quire.embedding import described, embedder_of, pools
from quire.library import Library
from quire.model_files import model_file
from quire.render import duration, size
from quire.session import Session
from quire.terminal import printable
from quire.watcher import Pace, Watcher, network_mount
from quire_engine import gguf
from quire_engine.engine import never
from quire_engine.errors import QuireError
from quire_engine.kv.catalogue import Catalogue
from quire_engine.runtimes import choose
from quire_kernels import dispatch

State = Literal["ok", "warn", "fail"]
STATES: tuple[State, ...] = ("ok", "warn", "fail")  # from well to worst

_NOTHING: Mapping[str, float] = MappingProxyType({})
_TRIAL_BYTES, _PIECE_BYTES = 64 << 20, 1 << 20
_SLOW_BYTES_PER_SECOND = 150e6  # of a disk with a head; stored KV is worth least there
_SPARE_BYTES = 2e9  # of disk space, that should be free
_MOST_NAMED = 3  # of a server's models
_SAMPLE = 50  # stored files that are read
_EVENT_SECONDS = 2.0
_WATCH_LIMIT = Path("/proc/sys/fs/inotify/max_user_watches")
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


@dataclass(frozen=True)
class Finding:
    """check: what was looked at.  found: a sentence or less.  remedy: what a person can do; empty where all is well.
    numbers: what was measured, for scripts."""

    check: str
    state: State
    found: str
    remedy: str = ""
    numbers: Mapping[str, float] = field(default_factory=lambda: _NOTHING)

    def as_json(self) -> dict[str, object]:
        words: dict[str, object] = {"check": self.check, "state": self.state, "found": self.found}
        return {**words, "remedy": self.remedy, "numbers": dict(self.numbers)}


@dataclass(frozen=True)
class DiskSpeed:
    """Of one file of some size, in bytes per second. read: past the memory, where the system lets one."""

    write: float
    read: float


def worst(findings: list[Finding]) -> State:
    return max((finding.state for finding in findings), key=STATES.index, default="ok")


def look(overrides: Mapping[str, object]) -> Iterator[Finding]:
    """All findings, one by one as they come; some take seconds. overrides: flags, which outrank the settings."""
    with ExitStack() as stack:
        doctor = _Doctor(overrides, stack)
        for check in doctor.checks():
            yield _tried(check)


def _tried(check: Callable[[], Finding]) -> Finding:
    name = check.__name__.replace("_", " ")
    try:
        return check()
    except QuireError as error:
        return Finding(name, "fail", printable(error.message), printable(error.hint or "See README.md."))
    except Exception as error:  # a mistake of ours, or a broken installation, which is what a doctor is for
        said = printable(str(error)).strip() or "without a word"
        return Finding(name, "fail", f"{type(error).__name__}: {said}", "Install Quire again: pipx reinstall quire")


class _Doctor:
    """The checks, in the order in which one builds on another. A method's name is what is shown."""

    def __init__(self, overrides: Mapping[str, object], stack: ExitStack) -> None:
        self._overrides = overrides
        self._stack = stack
        self._settings = Settings()
        self._session: Session | None = None
        self._reuses = False

    def checks(self) -> tuple[Callable[[], Finding], ...]:
        return (
            self.config,
            self.directories,
            self.index,
            self.conversations,
            self.watches,
            self.model,
            self.finding,
            self.runtime,
            self.pytorch,
            self.kernels,
            self.ratio,
            self.disk,
            self.space,
            self.cache,
        )

    def config(self) -> Finding:
        self._settings, origins = config.in_force(self._overrides)
        own = sum(origin != "default" for origin in origins.values())
        file = config.config_file()
        where = printable(str(file)) if file.exists() else "no file"
        return Finding("config", "ok", f"{where}; {own or 'no'} settings differ from the defaults")

    def directories(self) -> Finding:
        """Writable, and readable by nobody else."""
        places = tuple(dict.fromkeys((paths.data_dir(), paths.cache_dir(), paths.config_dir())))
        for directory in places:
            name = printable(str(directory))
            try:
                tempfile.TemporaryFile(dir=directory).close()
            except OSError as error:
                found = f"{name} cannot be written: {error.strerror}"
                return Finding("directories", "fail", found, "Check its permissions, or what mounts it.")
            if os.name == "posix" and directory.stat().st_mode & 0o077:
                return Finding("directories", "warn", f"others can look into {name}", f"chmod 700 {name}")
            if kind := network_mount(directory):
                found = f"{name} lies on a network ({kind}): slow, and a broken connection can damage it"
                return Finding("directories", "warn", found, "Move it: set QUIRE_DATA_DIR and QUIRE_CACHE_DIR.")
        return Finding("directories", "ok", ", ".join(printable(str(place)) for place in places))

    def index(self) -> Finding:
        session = self._stack.enter_context(Session(self._settings))
        session.library.check()
        self._session = session
        states = [document.state for document in session.library.documents()]
        passages, skipped = len(session.library.tokens()), states.count("skipped")
        found = f"{_count(len(states) - skipped, 'document')}, {_count(passages, 'passage')}"
        numbers = {"documents": len(states) - skipped, "skipped": skipped, "passages": passages}
        if not session.library.roots():
            return Finding("index", "ok", "sound; nothing was added yet: quire add ~/notes", numbers=numbers)
        aside = f", {skipped:,} skipped: quire status" if skipped else ""
        return Finding("index", "ok", f"sound; {found}{aside}", numbers=numbers)

    def conversations(self) -> Finding:
        with open_history() as history:
            history.check()
        return Finding("conversations", "ok", "sound")

    def watches(self) -> Finding:
        return _watches(self._session.library if self._session else None)

    def model(self) -> Finding:
        file = model_file(self._settings.model)
        header, size_bytes = gguf.read(file), file.stat().st_size
        bundled = isinstance(self._settings.model, BundledModel)
        found = f"{models.BUNDLED_TITLE if bundled else printable(header.name)}, {size(size_bytes)}"
        numbers = {"size_bytes": size_bytes, "memory_bytes": models.memory_bytes()}
        if self._settings.runtime == choose.OPENAI:
            return Finding("model", "ok", f"{found}; it counts tokens, a server answers", numbers=numbers)
        off = gguf.why_not_stitchable(header) or (self._session.engine.known_reuse_off if self._session else "")
        self._reuses = not off
        if not models.fits(size_bytes):
            found = f"{found}; too large for {size(models.memory_bytes())} of memory with other programs beside it"
            return Finding("model", "warn", found, "Choose a smaller one: quire models recommend", numbers)
        if off:
            remedy = "Every question is read in full. Choose another one: quire models recommend"
            return Finding("model", "warn", f"{found}; {printable(off)}", remedy, numbers)
        small = "; it came with Quire and is small: quire models recommend"
        return Finding("model", "ok", found + small * bundled, numbers=numbers)

    def finding(self) -> Finding:
        """How passages are found; an embedding model is opened and tried."""
        file = self._settings.embedder
        if isinstance(file, NoEmbedder):
            return Finding(
                "finding", "ok", "by words alone; an embedding model adds meaning: quire config set embedder"
            )
        embedder = embedder_of(file, self._settings.threads)
        began = time.perf_counter()
        embedder.question("Does it find by meaning?")
        took_ms = 1000 * (time.perf_counter() - began)
        found = f"by words and meaning ({described(file)}); a question takes it {duration(took_ms)}"
        numbers = {"question_ms": round(took_ms, 1)}
        if not pools(gguf.read(file)):
            remedy = "It is a chat model. Choose one made for embedding: quire config set embedder FILE.gguf"
            return Finding("finding", "warn", found, remedy, numbers)
        return Finding("finding", "ok", found, numbers=numbers)

    def runtime(self) -> Finding:
        if self._settings.runtime == choose.OPENAI:
            server = server_of(self._settings).checked()
            names = ", ".join(map(printable, server.models()[:_MOST_NAMED])) or "no model"
            return Finding("runtime", "ok", printable(f"{server.statement} It lists {names}."))
        choice = choose.choose(self._settings.runtime, gguf.read(model_file(self._settings.model)))
        return Finding("runtime", "ok", printable(choice.reason.removeprefix("Runtime: ")))

    def pytorch(self) -> Finding:
        try:
            installed = version("torch")
        except PackageNotFoundError:
            found = "not installed: precision plans cannot be measured, and no graphics device is used"
            return Finding("pytorch", "warn", found, "pipx inject quire torch; answers do without")
        if installed.endswith("+cpu") and any(driver.exists() for driver in _DRIVERS):
            found = f"{installed} is built for the processor alone, and there is a graphics driver"
            return Finding("pytorch", "warn", found, "Install its CUDA or ROCm build: pytorch.org/get-started")
        return Finding("pytorch", "ok", installed)

    def kernels(self) -> Finding:
        why = dispatch.why().removeprefix("Kernels: ")
        found = printable(why)
        if why.startswith(dispatch.VARIABLE):
            return Finding("kernels", "fail", found, f"Unset {dispatch.VARIABLE}.")
        if why.startswith("Triton") or choose.device() is None:
            return Finding("kernels", "ok", found)
        remedy = "Answers are slower than they need be. Triton needs a C compiler and a driver of this year or last."
        return Finding("kernels", "warn", found, remedy)

    def ratio(self) -> Finding:
        """How much of a question's passages is computed again, and whether what was measured of it still holds."""
        if not (self._session and self._reuses):
            return Finding("ratio", "ok", "nothing is reused")
        asked, (fastest, outdated) = self._session.ratio, self._session.engine.fastest_ratios
        found = f"{asked:.0%} of a question's passages are computed again"
        measured = ", ".join(f"{ratio:.0%} from {pool}" for pool, ratio in fastest.items() if ratio > asked)
        numbers = {"ratio": asked, **{f"fastest_from_{pool}": ratio for pool, ratio in fastest.items()}}
        if outdated:
            found += f"; since the fastest from {' and '.join(outdated)} was measured, this machine has changed"
            return Finding("ratio", "warn", found, "Measure it again: quire bench ratio", numbers)
        return Finding("ratio", "ok", f"{found}; {measured} is faster" if measured else found, numbers=numbers)

    def disk(self) -> Finding:
        directory = paths.cache_dir()
        if shutil.disk_usage(directory).free < 4 * _TRIAL_BYTES:
            return Finding("disk", "fail", "too full to measure its speed", "Make room: quire cache clear")
        speed = disk_speed(directory, _TRIAL_BYTES)
        found = f"reads {size(speed.read)} and writes {size(speed.write)} a second"
        numbers = {"read_bytes_per_second": round(speed.read), "write_bytes_per_second": round(speed.write)}
        if speed.read < _SLOW_BYTES_PER_SECOND:
            remedy = "Reading stored KV may save little. Set QUIRE_CACHE_DIR to a folder on an SSD."
            return Finding("disk", "warn", found, remedy, numbers)
        return Finding("disk", "ok", found, numbers=numbers)

    def space(self) -> Finding:
        catalogue = self._catalogue()
        catalogue.look()
        free, used, limit = shutil.disk_usage(catalogue.root.parent).free, catalogue.size_bytes(), self._limit_bytes()
        found = f"{size(used)} of KV, of at most {size(limit)}; {size(free)} free" if limit else f"{size(free)} free"
        numbers = {"used_bytes": used, "limit_bytes": limit, "free_bytes": free}
        if limit and limit - used + _SPARE_BYTES > free:
            most = max(0.0, (used + free - _SPARE_BYTES) / 1e9)
            remedy = f"The budget promises more than there is: quire cache budget {most:.0f}" if most >= 1 else ""
            return Finding("space", "warn", found, remedy or "Make room on the disk, or: quire cache clear", numbers)
        if free < _SPARE_BYTES:
            return Finding("space", "warn", found, "Make room on the disk, or: quire cache clear", numbers)
        return Finding("space", "ok", found, numbers=numbers)

    def cache(self) -> Finding:
        """The catalogue, and some of the files that it lists."""
        catalogue = self._catalogue()
        catalogue.look()
        entries = catalogue.entries()
        sample = random.sample(entries, min(_SAMPLE, len(entries)))
        checked = holdings.check(catalogue, sample, True, lambda done, total: None, never)
        numbers = {"files": len(entries), "checked": checked.chunks, "damaged": len(checked.damaged)}
        if notice := catalogue.take_notice():
            return Finding("cache", "warn", printable(notice), "Nothing is lost; if it comes again, look at the disk.")
        if checked.damaged:
            found = f"{len(checked.damaged)} of {checked.chunks} stored files that were read are damaged"
            return Finding("cache", "fail", found, "Look at all of them, and remove those: quire cache verify", numbers)
        if not entries:
            return Finding("cache", "ok", "nothing is cached yet", numbers=numbers)
        found = f"{len(entries):,} stored files; {checked.chunks} of them read, all sound"
        return Finding("cache", "ok", found, numbers=numbers)

    def _catalogue(self) -> Catalogue:
        catalogue = Catalogue.of(paths.cache_dir())
        self._stack.callback(catalogue.close)
        return catalogue

    def _limit_bytes(self) -> int:
        return int(self._settings.cache_gb * 1e9)


def _watches(library: Library | None) -> Finding:
    """Watches the folders for a moment, and one of its own, in which something happens."""
    roots = library.roots() if library else []
    refused: dict[Path, str] = {}
    noticed = Event()
    with tempfile.TemporaryDirectory(dir=paths.data_dir(), prefix="doctor-") as name:
        own = Path(name).resolve()

        def changed(places: frozenset[Path]) -> None:
            if any(place.is_relative_to(own) for place in places):
                noticed.set()

        with Watcher(changed, refused.__setitem__, Pace(settled=0.0)) as watcher:
            watcher.watch([*roots, own])
            began = time.monotonic()
            (own / "note.txt").write_text("noticed?", encoding="utf-8")
            seen = noticed.wait(_EVENT_SECONDS)
            took_ms = 1000 * (time.monotonic() - began)
    numbers = {"folders": float(len(roots)), "unwatched": float(len(refused)), **_watch_limit()}
    if refused:
        path, reason = next(iter(refused.items()))
        found = f"{len(refused)} of {len(roots)} folders are not watched: {printable(str(path))}, {printable(reason)}"
        return Finding("watches", "warn", found, _watch_remedy(path), numbers)
    if not seen:
        found = f"no change was noticed within {_EVENT_SECONDS:.0f} s"
        return Finding(
            "watches", "warn", found, "Folders are looked through now and then instead; or: quire add", numbers
        )
    limit = f"; the system allows {int(numbers['limit']):,} folders" if "limit" in numbers else ""
    of_what = f"in {_count(len(roots), 'place')} that you added" if roots else "in a folder that was made to try it"
    found = f"a change {of_what} is noticed after {duration(took_ms)}{limit}"
    return Finding("watches", "ok", found, numbers={**numbers, "noticed_ms": round(took_ms, 1)})


def _watch_remedy(path: Path) -> str:
    if not path.exists():
        return f"Mount it again, or forget it: quire remove {printable(str(path))}"
    if network_mount(path):
        return "It is looked through every minute instead."
    if _WATCH_LIMIT.exists():
        return "Looked through every minute instead. More watches: sudo sysctl fs.inotify.max_user_watches=1000000"
    return "It is looked through every minute instead. Check its permissions."


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def _watch_limit() -> dict[str, float]:
    try:
        return {"limit": float(_WATCH_LIMIT.read_text())}
    except (OSError, ValueError):
        return {}  # not Linux


def disk_speed(directory: Path, trial_bytes: int) -> DiskSpeed:
    """Measured with a file that has no name, so that nothing is left whatever happens. Raises OSError."""
    piece = os.urandom(_PIECE_BYTES)  # a disk that compresses must not look faster
    pieces = max(1, trial_bytes // _PIECE_BYTES)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        number = file.fileno()
        began = time.perf_counter()
        for _ in range(pieces):
            file.write(piece)
        os.fsync(number)
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        ready = time.perf_counter()
        file.seek(0)
        while file.read(_PIECE_BYTES):
            pass
        read = time.perf_counter()
    total = pieces * _PIECE_BYTES
    return DiskSpeed(total / max(written - began, 1e-9), total / max(read - ready, 1e-9))
