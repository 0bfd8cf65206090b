"""A long trial of `quire watch`: random file operations with questions in between, and agreement at the end.

    python packaging/soak.py --minutes 10
    python packaging/soak.py --minutes 10 --kill-every 4    the watching process is killed again and again
    python packaging/soak.py --latency 20                   only: how soon a save is searchable, and cached
    python packaging/soak.py --give-way 20                  only: how soon caching stops when a question comes

Everything happens in a temporary directory, with a generated model unless --model names one (give way: with the model
that comes along). Ends with 1 where index,
catalogue and disk do not agree.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread, Timer
from typing import Self

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from quire.documents import walk  # noqa: E402
from quire.ignore import Rules  # noqa: E402
from quire.library import Library  # noqa: E402
from quire_engine.kv.catalogue import Catalogue  # noqa: E402
from tiny_gguf import write_tiny_gguf  # noqa: E402

WORDS = [
    "river", "stone", "lamp", "harbour", "seed", "copper", "wind", "ladder", "orchard", "signal", "winter", "bread",
    "anchor", "mill", "glass", "rope",
]  # fmt: skip
PATIENCE_S = 300.0


class Watching:
    """`quire watch` as a process that may be killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.complete_at = 0.0  # when it last said that everything is cached
        self.failures: list[str] = []
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire", "watch", "--json", str(self._folder)], stdout=subprocess.PIPE, text=True
        )
        Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "complete":
                self.complete_at = time.monotonic()
            elif event["event"] == "failed":
                self.failures += event["lines"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Chaos:
    """What people, editors and Git do to files, at random."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._kinds: list[Callable[[], None]] = [
            self.create, self.edit, self.edit, self.append, self.rename, self.move, self.delete, self.save_by_renaming,
            self.copy, self.new_folder, self.move_folder, self.delete_folder, self.link_in_a_loop, self.clock_back,
            self.same_size_and_time, self.permissions, self.ignore_something, self.checkout, self.burst,
        ]  # fmt: skip
        for _ in range(40):
            self.create()
        self._repository()

    def step(self) -> None:
        kind = self.random.choice(self._kinds)
        with suppress(FileNotFoundError, FileExistsError, NotADirectoryError):
            kind()
            self.done[kind.__name__] += 1

    def text(self, lines: int = 12) -> str:
        heads = [f"# {' '.join(self.random.choices(WORDS, k=3))}\n"]
        return "\n".join(heads + [" ".join(self.random.choices(WORDS, k=14)) + "." for _ in range(lines)]) + "\n"

    def files(self) -> list[Path]:
        return [p for p in self.folder.rglob("*.md") if ".git" not in p.parts and p.is_file() and not p.is_symlink()]

    def folders(self) -> list[Path]:
        inside = [p for p in self.folder.rglob("*") if p.is_dir() and not p.is_symlink() and ".git" not in p.parts]
        return [p for p in inside if "repository" not in p.parts]

    def file(self) -> Path:
        return self.random.choice(self.files() or [self.new()])

    def new(self) -> Path:
        return self.random.choice([self.folder, *self.folders()]) / f"{self.random.randrange(10**9)}.md"

    def create(self) -> None:
        self.new().write_text(self.text(self.random.randrange(4, 60)))

    def edit(self) -> None:
        file = self.file()
        lines = file.read_text().splitlines()
        lines[self.random.randrange(len(lines))] = " ".join(self.random.choices(WORDS, k=14))
        file.write_text("\n".join(lines))

    def append(self) -> None:
        with open(self.file(), "a") as file:
            file.write(self.text(4))

    def rename(self) -> None:
        file = self.file()
        file.rename(file.with_name(f"renamed {self.random.randrange(10**9)}.md"))

    def move(self) -> None:
        self.file().rename(self.new())

    def delete(self) -> None:
        self.file().unlink()

    def save_by_renaming(self) -> None:
        file = self.file()
        beside = file.with_name(f".{file.name}.swp")
        beside.write_text(self.text())
        beside.rename(file)

    def copy(self) -> None:
        shutil.copy2(self.file(), self.new())

    def new_folder(self) -> None:
        place = self.random.choice([self.folder, *self.folders()]) / f"folder {self.random.randrange(100)}" / "sub"
        place.mkdir(parents=True)
        (place / "first.md").write_text(self.text())

    def move_folder(self) -> None:
        folders = self.folders() or [self.folder / "nothing"]
        folder, target = self.random.choice(folders), self.random.choice([self.folder, *folders])
        if not target.is_relative_to(folder):
            folder.rename(target / f"moved {self.random.randrange(10**9)}")

    def delete_folder(self) -> None:
        if len(folders := self.folders()) > 6:
            shutil.rmtree(self.random.choice(folders))

    def link_in_a_loop(self) -> None:
        (self.random.choice([self.folder, *self.folders()]) / f"loop {self.random.randrange(50)}").symlink_to(
            self.folder
        )

    def clock_back(self) -> None:
        file = self.file()
        file.write_text(self.text())
        os.utime(file, (1_000_000_000, 1_000_000_000))

    def same_size_and_time(self) -> None:
        file = self.file()
        status = file.stat()
        file.write_bytes(bytes(reversed(file.read_bytes())))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def permissions(self) -> None:
        file = self.file()
        file.chmod(0o600 if file.stat().st_mode & 0o200 else 0o644)

    def ignore_something(self) -> None:
        name = self.random.choice([".gitignore", ".quireignore"])
        lines = self.random.choice(["", "1*.md\n", "renamed*\n!renamed 1*\n", "folder*/\n", "/moved*\n*7.md\n"])
        (self.random.choice([self.folder, *self.folders()]) / name).write_text(lines)

    def burst(self) -> None:
        place = self.folder / "burst"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for number in range(self.random.randrange(120)):
            (place / f"{number}.md").write_text(self.text(3))

    def _repository(self) -> None:
        place = self.folder / "repository"
        place.mkdir()
        self._git("init", "-q", "-b", "main")
        for branch in ("main", "other"):
            if branch == "other":
                self._git("checkout", "-q", "-b", branch)
            for number in range(15):
                (place / f"{number if number % 2 else f'{branch} {number}'}.md").write_text(self.text())
            self._git("add", "-A")
            self._git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", branch)

    def checkout(self) -> None:
        self._git("checkout", "-q", "-f", self.random.choice(["main", "other"]))

    def _git(self, *words: str) -> None:
        subprocess.run(["git", "-C", str(self.folder / "repository"), *words], check=False, capture_output=True)


class Questions:
    """Asked by processes of their own while all that goes on."""

    def __init__(self) -> None:
        self.took_s: list[float] = []
        self.nothing_found = 0
        self.failed: list[str] = []

    def ask(self, words: list[str]) -> None:
        began = time.monotonic()
        command = [sys.executable, "-m", "quire", "ask", "--json", "--max-tokens", "4", f"Where is {' '.join(words)}?"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode == 0 and json.loads(ran.stdout)["sources"]:
            self.took_s.append(time.monotonic() - began)
        elif "matches the words" in ran.stderr:
            self.nothing_found += 1
        else:
            self.failed.append(ran.stderr.strip()[-300:])


def settled(watching: Watching, library: Path, chaos: Chaos) -> None:
    """Waits until the watching process has come to rest."""
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE_S:
        time.sleep(1)
        if watching.complete_at > began and not disagreements(library, chaos.folder):
            return


def disagreements(data: Path, folder: Path) -> list[str]:
    """Between what is on disk and what the index says."""
    with Library(data / "index.sqlite") as library:
        known = {document.path: document.sha256 for document in library.documents() if document.state == "indexed"}
    on_disk = {}
    for path in walk(folder, Rules(folder).keeps):
        with suppress(FileNotFoundError):
            if (data_of := path.read_bytes()).strip():
                on_disk[path] = hashlib.sha256(data_of).hexdigest()
    return [
        *(f"not in the index: {path}" for path in on_disk.keys() - known.keys()),
        *(f"not on disk: {path}" for path in known.keys() - on_disk.keys()),
        *(f"different: {path}" for path in on_disk.keys() & known.keys() if on_disk[path] != known[path]),
    ]


def unsound(data: Path, cache: Path) -> tuple[list[str], str]:
    """What is wrong within the index, and between catalogue and files; and a line of figures."""
    found = []
    with sqlite3.connect(data / "index.sqlite") as db:
        db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")  # raises where it fails
        found += [f"index: {row}" for (row,) in db.execute("PRAGMA integrity_check") if row != "ok"]
        [orphans] = db.execute("SELECT count(*) FROM chunks WHERE id NOT IN (SELECT chunk FROM passages)").fetchone()
        [wanted] = db.execute("SELECT count(*) FROM chunks").fetchone()
        addresses = {row for (row,) in db.execute("SELECT address FROM addresses")}
    db.close()
    found += [f"{orphans} chunks of no document"] if orphans else []
    files = {path.stem: path.stat().st_size for path in (cache / "kv").rglob("*.kv")}
    with sqlite3.connect(cache / "kv" / "catalogue.sqlite") as db:
        rows = dict(db.execute("SELECT key, bytes FROM chunks"))
        [claims] = db.execute("SELECT count(*) FROM claims").fetchone()
    db.close()
    found += [f"catalogue and files differ in {len(rows.items() ^ files.items())}"] if rows != files else []
    found += (
        [f"{len(addresses - files.keys())} of {wanted} passages are not cached"] if addresses - files.keys() else []
    )
    catalogue = Catalogue.of(cache)
    written, stored = sum(s.total_written_bytes() for s in catalogue.stores()), sum(files.values())
    leftovers = len([path for path in (cache / "kv").rglob("*") if path.is_file() and ".tmp" in path.name])
    return found, (
        f"passages {wanted}, files {len(files)}, {stored:,} bytes stored, {written:,} written "
        f"({written / max(1, stored):.3f} times), {claims} claims left, {leftovers} unfinished files left"
    )


def latency(folder: Path, data: Path, samples: int) -> None:
    """How soon a saved file is found by a search, and its passages are cached, with everything else at rest."""
    searchable, cached = [], []
    with Watching(folder) as watching:
        while not watching.complete_at:
            time.sleep(0.1)
        with Library(data / "index.sqlite") as library:
            for number in range(samples):
                word, was = f"unheardof{number}", watching.complete_at
                (folder / "saved.md").write_text(f"# Saved\n\nThe word is {word}.\n" + 20 * "It stands in a file. ")
                began = time.monotonic()
                while not library.search(word, 1):
                    time.sleep(0.01)
                searchable.append(time.monotonic() - began)
                while watching.complete_at == was:
                    time.sleep(0.01)
                cached.append(time.monotonic() - began)
                time.sleep(0.5)
    for name, seconds in (("searchable", searchable), ("cached", cached)):
        print(f"a save is {name} after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (longest)")


def give_way(folder: Path, samples: int) -> None:
    """How soon caching stops when a question comes."""
    from quire import config
    from quire.session import Session

    took_ms = []
    with Session(config.load()) as session:
        session.index([session.library.add_root(folder)], lambda _: None)
        assert not session.engine.reuse_off  # tries the model out, once
        for number in range(samples):
            came: list[float] = []
            Timer(0.2 + 0.05 * number, lambda came=came: came.append(time.perf_counter())).start()  # type: ignore[misc]
            session.cache(lambda _: None, lambda came=came: bool(came))  # type: ignore[misc]
            took_ms.append(1000 * (time.perf_counter() - came[0]))
        assert session.shelf.waiting, "caching was over before the question came"
    print(f"caching gives way after {statistics.median(took_ms):.0f} ms (median), {max(took_ms):.0f} ms (longest)")


def soak(folder: Path, home: Path, minutes: float, kill_every: float, seed: int) -> int:
    chaos, questions = Chaos(folder, seed), Questions()
    watching = Watching(folder)
    with watching:
        code = _drive(chaos, questions, watching, home, minutes, kill_every)
    found, figures = unsound(home / "data", home / "cache")
    found += disagreements(home / "data", folder) + watching.failures + questions.failed
    found += [f"it ended with {code}"] if code else []
    print(f"{sum(chaos.done.values())} operations: {', '.join(f'{n} {c}' for n, c in chaos.done.most_common())}")
    took = sorted(questions.took_s) or [0.0]
    print(
        f"{len(questions.took_s)} questions answered, {questions.nothing_found} found nothing, whole process "
        f"{took[len(took) // 2]:.1f} s (median), {took[-1]:.1f} s (longest); started {watching.starts} times"
    )
    print(figures)
    print("\n".join(found[:20]) or "index, catalogue and disk agree")
    return 1 if found else 0


def _drive(
    chaos: Chaos, questions: Questions, watching: Watching, home: Path, minutes: float, kill_every: float
) -> int:
    """Operations, questions and kills for that long, then rest; returns how the watching process ended."""
    end, kill_at, ask_at = time.monotonic() + 60 * minutes, time.monotonic() + kill_every, time.monotonic() + 3
    asking: Thread | None = None
    while time.monotonic() < end:
        chaos.step()
        time.sleep(chaos.random.choice([0, 0, 0.01, 0.05, 0.3, 1.0]))
        if kill_every and time.monotonic() > kill_at:
            watching.kill()
            kill_at = time.monotonic() + chaos.random.uniform(0.5, 1.5) * kill_every
        if time.monotonic() > ask_at and not (asking and asking.is_alive()):
            asking = Thread(target=questions.ask, args=(chaos.random.choices(WORDS, k=2),))
            asking.start()
            ask_at = time.monotonic() + 5
    if asking:
        asking.join()
    settled(watching, home / "data", chaos)
    return watching.end()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--kill-every", type=float, default=0, metavar="SECONDS")
    options.add_argument("--latency", type=int, default=0, metavar="SAMPLES")
    options.add_argument("--give-way", type=int, default=0, metavar="SAMPLES")
    options.add_argument("--model", type=Path)
    options.add_argument("--seed", type=int, default=1)
    wanted = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home, folder = Path(place), Path(place) / "folder"
        folder.mkdir()
        for name in ("data", "cache", "config", "log"):
            os.environ[f"QUIRE_{name.upper()}_DIR"] = str(home / name)
        model = wanted.model or write_tiny_gguf(home / "tiny.gguf", metadata={"general.name": "Tiny"})
        os.environ |= {"QUIRE_MODEL": str(model), "QUIRE_THREADS": "1", "QUIRE_CONSIDERATE": "off"}
        if wanted.give_way:
            os.environ["QUIRE_MODEL"] = str(wanted.model or "")
            Chaos(folder, wanted.seed)
            give_way(folder, wanted.give_way)
            sys.exit(0)
        if wanted.latency:
            Chaos(folder, wanted.seed)
            latency(folder, home / "data", wanted.latency)
            sys.exit(0)
        sys.exit(soak(folder, home, wanted.minutes, wanted.kill_every, wanted.seed))


if __name__ == "__main__":
    main()
