"""How often a search finds the right paragraph: recall among the first, and the mean reciprocal rank.

Every paragraph of a question file is written as a file of its own, in a folder for its article, and indexed; every
question should find the paragraph it was written for, among all. Nothing is computed with the model but token counts.
Knows nothing of how searching is done.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quire import paths
from quire.config_values import NoEmbedder
from quire.embedding import Vectors, embedder_of
from quire.indexer import index_roots
from quire.library import EVERYWHERE, Library
from quire.retrieval import Ranking, Retriever
from quire.session import Session
from quire_engine.errors import QuireError

_AMONG = 5
_DEPTH = 50  # where a paragraph comes later, it was not found


@dataclass(frozen=True)
class Row:
    """A way of finding: the shares of questions whose paragraph came first and among the first five, the mean of 1 /
    rank, and the middle and the 95th percentile of the time."""

    method: str
    first: float
    recall_at_5: float
    mrr: float
    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    questions: int
    paragraphs: int


@dataclass(frozen=True)
class _Asked:
    question: str
    file: Path


def measure(session: Session, data: Path, progress: Callable[[int, int], None]) -> Report:
    """Words alone, and with vectors where the session has them. Raises QuireError for another kind of file."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-", dir=paths.data_dir()) as place:
        folder = (Path(place) / "documents").resolve()
        asked = list(_written(data, folder))
        library = Library(Path(place) / "index.sqlite")
        try:
            settings = replace(session.settings, chunk_tokens=session.engine.limits.chunk_tokens)
            engine, root = session.engine, library.add_root(folder)
            index_roots(library, [root], engine.count_tokens, engine.tokenizer_id, settings, lambda _: None)
            ways = _ways(session, library, progress)
            total = len(ways) * len(asked)
            starts = range(0, total, len(asked))
            rows = [
                _row(name, way, asked, lambda done, start=start: progress(start + done, total))  # type: ignore[misc]
                for start, (name, way) in zip(starts, ways.items(), strict=True)
            ]
        finally:
            library.close()
    return Report(tuple(rows), len(asked), len({question.file for question in asked}))


_Way = Callable[[str], Sequence[Path]]  # a question -> the files of what is found, best first


def _ways(session: Session, library: Library, progress: Callable[[int, int], None]) -> dict[str, _Way]:
    def files(others: Sequence[Ranking]) -> _Way:
        retriever = Retriever(library, others)
        return lambda question: [hit.path for hit in retriever.search(question, _DEPTH).hits]

    ways = {"words (BM25)": files(())}
    if not isinstance(file := session.settings.embedder, NoEmbedder):
        vectors = Vectors(library, embedder_of(file, session.settings.threads))
        vectors.complete(progress, lambda: False)
        ways["vectors"] = lambda question: [hit.path for hit in vectors.nearest(question, _DEPTH, EVERYWHERE)]
        ways["both (RRF)"] = files([vectors])
    return ways


def _written(data: Path, folder: Path) -> Iterator[_Asked]:
    """Writes the paragraphs of a file in SQuAD's format; yields every question with the file it belongs to."""
    try:
        articles = json.loads(data.read_text(encoding="utf-8"))["data"]
        for number, article in enumerate(articles, 1):
            of_article = folder / f"{number:02}"  # not its title, which would give the answer away
            of_article.mkdir(parents=True)
            for at, paragraph in enumerate(article["paragraphs"], 1):
                file = of_article / f"{at:02}.txt"
                file.write_text(paragraph["context"], encoding="utf-8")
                yield from (_Asked(qa["question"], file) for qa in paragraph["qas"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "Give a JSON file in the format of SQuAD, such as XQuAD."
        raise QuireError(f"{data} is not a question file.", hint, repr(error)) from error


def _row(name: str, find: _Way, asked: Sequence[_Asked], progress: Callable[[int], None]) -> Row:
    ranks, times = list[float](), list[float]()
    for number, question in enumerate(asked, 1):
        began = time.perf_counter()
        found = find(question.question)
        times.append(1000 * (time.perf_counter() - began))
        ranks.append(found.index(question.file) + 1 if question.file in found else float("inf"))
        progress(number)
    return Row(
        method=name,
        first=sum(rank == 1 for rank in ranks) / len(ranks),
        recall_at_5=sum(rank <= _AMONG for rank in ranks) / len(ranks),
        mrr=statistics.fmean(1 / rank for rank in ranks),
        median_ms=statistics.median(times),
        p95_ms=sorted(times)[int(0.95 * (len(times) - 1))],
    )


def table(report: Report) -> list[str]:
    lines = [f"{report.questions} questions, each for one of {report.paragraphs} paragraphs", ""]
    lines.append(f"{'found by':<22} {'first':>7} {'recall@5':>9} {'MRR':>6} {'median':>9} {'95 %':>9}")
    for row in report.rows:
        shares = f"{row.first:>7.1%} {row.recall_at_5:>9.1%} {row.mrr:>6.3f}"
        lines.append(f"{row.method:<22} {shares} {row.median_ms:>6.1f} ms {row.p95_ms:>6.1f} ms")
    return lines


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2)
