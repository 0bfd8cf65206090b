"""How index and search behave in a large library: 10,000 generated files, 1 GB of text.

    python packaging/scale_figures.py [FOLDER ...] [--files 10000] [--mb 1000] [--at DIRECTORY] [--no-watch]

Generates Markdown, text, source code and web pages (always the same for the same arguments and Python version), indexes
them and the folders given with the model that comes along, caches nothing, and asks 200 questions when there are
100,000 passages and at the end. Then `quire watch` keeps that library: how soon a save is searchable, and cached.
Everything happens in a temporary directory below --at. Prints a table, and JSON as the last line. Processor time is
this process's and its parser's, without other programs on the machine.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from threading import Event, Thread
from typing import Any

QUESTIONS = 200
PASSAGES = 100_000  # at which the questions are asked the first time
HITS = 40  # what a question of the application asks for
SYLLABLES = [
    a + b for a in ("b", "br", "d", "f", "gr", "k", "l", "m", "n", "p", "r", "st", "t", "v", "z") for b in "aeiou"
]
NAMES = 400_000  # words that are no English ones: their frequencies fall as those of names do
KINDS = (("md", 0.4), ("txt", 0.25), ("py", 0.2), ("html", 0.15))
SAVES = 12
PATIENCE_S = 3600.0


# What is generated


class Text:
    """Sentences of Python's own documentation, and blocks of its own modules, in which words are exchanged."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def word(self) -> str:
        """One that stands in the documentation, as often as there, or one of many rare ones."""
        if self.random.random() < 0.7:
            return self.random.choice(WORDS)
        rank = int(NAMES ** self.random.random())  # the tenth as often as the first
        syllables = []
        number = rank + 3_000
        while number:
            number, at = divmod(number, len(SYLLABLES))
            syllables.append(SYLLABLES[at])
        return "".join(syllables)

    def sentence(self) -> str:
        words = list(self.random.choice(SENTENCES))
        for _ in range(3):
            words[self.random.randrange(len(words))] = self.word()
        return " ".join(words)

    def paragraph(self) -> str:
        return " ".join(self.sentence() for _ in range(self.random.randrange(2, 7)))

    def title(self) -> str:
        return " ".join(self.word() for _ in range(3)).capitalize()

    def block(self) -> str:
        """A function or class with other names in it."""
        block = self.random.choice(BLOCKS)
        for name in self.random.sample(NAMED.findall(block) or ["self"], 1):
            block = block.replace(name, f"{name}_{self.word()}")
        return block

    def of_kind(self, kind: str, size: int) -> Iterator[str]:
        """Its parts, until the size is reached."""
        made = 0
        while made < size:
            match kind:
                case "md":
                    items = "".join(f"- {self.sentence()}\n" for _ in range(self.random.randrange(4)))
                    part = f"## {self.title()}\n\n{self.paragraph()}\n\n{items}\n{self.paragraph()}\n\n"
                case "py":
                    part = f"# {self.sentence()}\n{self.block()}\n\n"
                case "html":
                    part = f"<h2>{self.title()}</h2>\n<p>{self.paragraph()}</p>\n<ul><li>{self.sentence()}</li></ul>\n"
                case _:
                    part = f"{self.paragraph()}\n\n"
            made += len(part)
            yield part


def sentences() -> list[list[str]]:
    text = " ".join(topics.values())
    plain = (re.sub(r"[^A-Za-z ,']+", " ", sentence).split() for sentence in re.split(r"[.:;]\s", text))
    return [words for words in plain if 6 <= len(words) <= 40]


def blocks() -> list[str]:
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += re.split(r"\n(?=def |class )", file.read_text(encoding="utf-8", errors="replace"))[1:]
    return [block.rstrip() for block in found if len(block) < 4_000]


SENTENCES, BLOCKS = sentences(), blocks()
WORDS = [word for sentence in SENTENCES for word in sentence]
NAMED = re.compile(r"\b[a-z_]{4,}\b")


def generate(folder: Path, files: int, size_bytes: int) -> None:
    """Files of all sizes, most of them small, in folders of a hundred."""
    sizes = [random.Random(f"size {number}").lognormvariate(0, 1) for number in range(files)]
    for number, share in enumerate(sizes):
        text = Text(f"file {number}")
        [kind] = text.random.choices([name for name, _ in KINDS], [weight for _, weight in KINDS])
        place = folder / f"{number // 100:03}"
        place.mkdir(parents=True, exist_ok=True)
        body = "".join(text.of_kind(kind, int(size_bytes * share / sum(sizes))))
        (place / f"{number:05} {text.word()}.{kind}").write_text(f"# {text.title()}\n\n{body}", encoding="utf-8")


def questions() -> list[str]:
    """Varied: rare words, common ones, sentences, a page, what is nowhere."""
    text = Text("questions")
    kinds: list[Callable[[], str]] = [
        lambda: f"What is {text.word()}?",
        lambda: f"How does {text.word()} go with {text.word()} and {text.word()}?",
        lambda: text.sentence() + "?",
        lambda: " ".join(text.random.choice(WORDS) for _ in range(6)),
        lambda: "object value method called class name",
        lambda: f"Where is the {text.random.choice(WORDS)} of the {text.random.choice(WORDS)} defined?",
        text.paragraph,
        lambda: f"{text.random.choice(WORDS)}",
        lambda: f"def {text.random.choice(NAMED.findall(text.random.choice(BLOCKS)) or ['self'])} return",
        lambda: f"unheardof{text.random.randrange(10**6)} {text.random.choice(WORDS)}",
    ]
    return [kinds[number % len(kinds)]() for number in range(QUESTIONS)]


# What is measured


@dataclass
class Memory:
    """The resident memory of a process and its children, once a second."""

    pid: int
    samples_mb: list[tuple[float, float]] = field(default_factory=list)
    _end: Event = field(default_factory=Event)

    def __enter__(self) -> "Memory":
        self._began = time.monotonic()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(1.0):
            own = sum(map(_resident_mb, [self.pid, *_children(self.pid)]))
            self.samples_mb.append((round(time.monotonic() - self._began), round(own)))

    @property
    def peak_mb(self) -> float:
        return max((mb for _, mb in self.samples_mb), default=0.0)

    def by_tenths(self) -> list[float]:
        """At ten moments, equally far apart."""
        step = max(1, len(self.samples_mb) // 10)
        return [mb for _, mb in self.samples_mb[step - 1 :: step]]


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 1e6


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def cpu_s() -> float:
    """Of this process and of its children that ended."""
    return sum(os.times()[:4])


def search_times(library: Any, asked: Sequence[str], within: Any) -> dict[str, float]:
    """Milliseconds: waited, and of the processor."""
    from quire.retrieval import Retriever

    retriever, waited, worked = Retriever(library), [], []
    for question in asked:
        began, cpu = time.perf_counter(), time.process_time()
        retriever.search(question, HITS, within)
        waited.append(1000 * (time.perf_counter() - began))
        worked.append(1000 * (time.process_time() - cpu))
    slowest = max(range(len(asked)), key=lambda at: worked[at])
    return {**_spread(waited, ""), **_spread(worked, "cpu_"), "slowest": asked[slowest][:80]}  # type: ignore[dict-item]


def _spread(values: Sequence[float], name: str) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"{name}p50": round(statistics.median(values), 1),
        f"{name}p95": round(ordered[int(0.95 * (len(ordered) - 1))], 1),
        f"{name}max": round(ordered[-1], 1),
    }


def indexed(roots: Sequence[Path], data: Path) -> dict[str, Any]:
    """Indexes these folders, and asks on the way and at the end."""
    from quire import config
    from quire.library import EVERYWHERE, Library
    from quire.session import Session

    asked, found = questions(), dict[str, Any]()
    with Session(config.load()) as session, Library(data / "index.sqlite") as reader:
        _ = session.engine  # opening the model is not indexing
        added = [session.library.add_root(root) for root in roots]
        paused, paused_cpu = 0.0, 0.0

        def progress(now: Any) -> None:
            nonlocal paused, paused_cpu
            if now.done % 500 == 0 and now.done:
                passages = reader._rows("SELECT max(id) FROM passages")[0][0] or 0
                print(
                    f"  {now.done} files, {passages} passages, {cpu_s() - cpu:.0f} s CPU", file=sys.stderr, flush=True
                )
                if "search_100k" not in found and passages >= PASSAGES:
                    began, cpu_began = time.monotonic(), cpu_s()
                    found["search_100k"] = search_times(reader, asked, EVERYWHERE) | {"passages": passages}
                    paused, paused_cpu = time.monotonic() - began, cpu_s() - cpu_began

        began, cpu = time.monotonic(), cpu_s()
        with Memory(os.getpid()) as memory:
            report = session.index(added, progress)
        took, worked = time.monotonic() - began - paused, cpu_s() - cpu - paused_cpu
        size = sum(document.size_bytes for document in reader.documents()) / 1e6
        files = len(report.changes)
        found |= {
            "files": files, "skipped": len(report.skipped), "mb": round(size), "passages": report.chunks_total,
            "seconds": round(took), "cpu_seconds": round(worked),
            "files_per_s": round(files / took, 1), "mb_per_s": round(size / took, 2),
            "files_per_cpu_s": round(files / worked, 1), "mb_per_cpu_s": round(size / worked, 2),
            "peak_rss_mb": memory.peak_mb, "rss_by_tenths_mb": memory.by_tenths(),
            "index_mb": round(sum(file.stat().st_size for file in data.glob("index.sqlite*")) / 1e6),
        }  # fmt: skip
        found["search_all"] = search_times(reader, asked, EVERYWHERE)
        found["search_in_folder"] = search_times(reader, asked, roots[0] / "000")
        began, cpu = time.monotonic(), cpu_s()
        again = session.index(added, lambda _: None)
        assert not again.changes, again.changes[:3]
        found["nothing_changed_s"] = {"seconds": round(time.monotonic() - began, 1), "cpu": round(cpu_s() - cpu, 1)}
    return found


def kept(folder: Path, data: Path) -> dict[str, Any]:
    """What a save costs while `quire watch` keeps the library, which has far too much to cache."""
    from quire import config
    from quire.library import Library
    from quire.session import Session

    found = dict[str, Any]()
    log = data / "watch.log"
    with open(log, "wb") as events, Session(config.load()) as session, Library(data / "index.sqlite") as reader:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "quire", "watch", "--json"], stdout=events)
        try:
            with Memory(process.pid) as memory:
                store = session.engine.chunks.store
                while not any(store.root.rglob("*.kv")):  # it began to cache: everything was listed
                    if process.poll() is not None or time.monotonic() > began + PATIENCE_S:
                        raise SystemExit(f"quire watch cached nothing: {log.read_text()[-2000:]}")
                    time.sleep(0.2)
                found["watch_ready_s"] = round(time.monotonic() - began, 1)
                saves = [_save(folder, number, session, reader) for number in range(SAVES)]
            found["watch_peak_rss_mb"] = memory.peak_mb
        finally:
            process.terminate()
            process.wait(60)
    found["searchable_s"] = _spread([save[0] for save in saves], "")
    found["cached_s"] = _spread([save[1] for save in saves], "")
    found["passages_need_s"] = _spread([save[2] for save in saves], "")
    return found


def _save(folder: Path, number: int, session: Any, reader: Any) -> tuple[float, float, float]:
    """Saves a file; seconds until it is found, until it is cached, and what its passages took."""
    text, word = Text(f"save {number}"), f"unheardof{number}"
    file = folder / "saved.md"
    body = "\n\n".join(text.paragraph() for _ in range(4))
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(f"{before}## {text.title()}\n\nThe word is {word}. {body}\n\n", encoding="utf-8")
    began = time.monotonic()
    while not (hits := reader.search(word, 1)):
        if time.monotonic() > began + PATIENCE_S:
            raise SystemExit("a save was never found")
        time.sleep(0.01)
    searchable = time.monotonic() - began
    store = session.engine.chunks.store
    addresses = [session.engine.address(passage.text) for passage in reader.chunks_of(hits[0].path)]
    lacking = [address for address in addresses if not store.has(address)]
    while not all(store.has(address) for address in lacking):
        if time.monotonic() > began + PATIENCE_S:
            raise SystemExit("a save was never cached")
        time.sleep(0.02)
    cached = time.monotonic() - began
    time.sleep(1.0)
    took = {entry.key: entry.seconds for entry in session.engine.catalogue.entries()}
    return searchable, cached, sum(took.get(address, 0.0) for address in lacking)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--mb", type=int, default=1_000)
    parser.add_argument("--at", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--no-watch", action="store_true")
    chosen = parser.parse_args()
    needed, free = chosen.mb * 5_000_000, shutil.disk_usage(chosen.at).free
    if free < needed:
        raise SystemExit(
            f"{chosen.at} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed. Name another: --at"
        )
    with tempfile.TemporaryDirectory(prefix="quire-scale-", dir=chosen.at) as place:
        home = Path(place).resolve()
        for name in ("DATA", "CACHE", "CONFIG", "LOG"):
            os.environ[f"QUIRE_{name}_DIR"] = str(home / name.lower())
            (home / name.lower()).mkdir(mode=0o700)
        began = time.monotonic()
        generate(home / "documents", chosen.files, chosen.mb * 1_000_000)
        print(f"generated in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        found = indexed([home / "documents", *chosen.folders], home / "data")
        for name, value in found.items():
            print(f"{name:<20} {value}", flush=True)
        if not chosen.no_watch:
            saved = kept(home / "documents", home / "data")
            for name, value in saved.items():
                print(f"{name:<20} {value}")
            found |= saved
        print(json.dumps(found))


if __name__ == "__main__":
    main()
