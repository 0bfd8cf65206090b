"""What measurements are made of: questions over passages, and an engine that leaves nothing behind.

Questions come from a file of them, or else from the headings of a folder, of the person's own library or of the sample
documents. Knows nothing of what is measured.
"""

import json
import re
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from quire import chunking, paths
from quire.documents import markup_of
from quire.indexer import index_roots
from quire.library import Library
from quire.session import Session
from quire_engine.engine import Engine, Request
from quire_engine.errors import Aborted, ContextOverflow, QuireError
from quire_engine.plan import Prompt

_LONGEST_TOKEN_CHARS = 16  # on average; only saves counting a whole book

Cut = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Case:
    """A question, answers that count as right (none where nobody knows), and the passages it is asked over, all of them
    different."""

    question: str
    gold: tuple[str, ...]
    passages: tuple[str, ...]


def contains(answer: str, gold: Sequence[str]) -> bool:
    """Whether it has a gold answer in it, letter case and punctuation aside."""
    return any(" ".join(_words(text)) in " ".join(_words(answer)) for text in gold)


def f1(answer: str, gold: Sequence[str]) -> float:
    """Words shared with the gold answer that fits best: SQuAD's F1, articles counted."""

    def shared(text: str) -> float:
        given, wanted = Counter(_words(answer)), Counter(_words(text))
        return 2 * (given & wanted).total() / max(1, given.total() + wanted.total())

    return max(map(shared, gold), default=0.0)


def _words(text: str) -> list[str]:
    return re.sub(r"\W+", " ", text.lower()).split()


@contextmanager
def scratch_engine(session: Session) -> Iterator[Engine]:
    """An engine like the session's whose cache is thrown away, so that a benchmark neither uses nor leaves anything."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-", dir=paths.cache_dir()) as folder:
        engine = session.make_engine(Path(folder))
        try:
            yield engine
        finally:
            engine.catalogue.close()


def prompt_of(engine: Engine, case: Case) -> Prompt:
    """Raises ContextOverflow when it does not fit the model."""
    try:
        return engine.prompt(Request(case.question, case.passages))
    except ContextOverflow as error:
        hint = "Take fewer or shorter passages: --passages, --passage-tokens."
        raise ContextOverflow(error.message, hint, error.details) from error


def try_out(engine: Engine, should_stop: Callable[[], bool]) -> None:
    """Raises QuireError when the model's KV is not reused, or when it was stopped while finding that out."""
    try:
        reason = engine.try_out(should_stop)
    except Aborted:
        raise stopped() from None
    if reason:
        raise QuireError(f"There is nothing to compare: {reason}")


def stopped() -> QuireError:
    return QuireError("It was stopped before the first question was done.", "Compare less at a time: see --help.")


def cut_to(engine: Engine, tokens: int) -> Cut:
    """Cuts a text between words into passages of nearly so many tokens, so that passages are of one size; the
    application, which cuts where it means something, makes them shorter."""
    limit = min(tokens, engine.limits.chunk_tokens)

    def cut(text: str) -> Iterator[str]:
        while text := text.strip():
            lengths = range(1, min(len(text), limit * _LONGEST_TOKEN_CHARS) + 1)
            fitting = bisect_right(lengths, limit, key=lambda length: engine.count_tokens(text[:length]))
            end = max(1, fitting)
            if end < len(text) and " " in text[:end]:
                end = text.rindex(" ", 0, end)
            yield text[:end]
            text = text[end:]

    return lambda text: list(cut(text))


def whole(text: str) -> Sequence[str]:
    """A text as one passage."""
    return [text]


def from_file(data: Path, questions: int, passages: int, cut: Cut = whole) -> list[Case]:
    """Questions of a file in SQuAD's format, spread over its articles and asked over their first passages, or in
    MuSiQue's: a list of {"question", "answers", "ctxs": [{"text"}]}.

    cut: texts that are cut give their first pieces first, so that passages come from as many texts as possible.
    """
    try:
        content = json.loads(data.read_text(encoding="utf-8"))
        asked = _of_list(content) if isinstance(content, list) else _of_articles(content["data"], passages)
        cases = [
            Case(question, gold, tuple(islice(dict.fromkeys(_by_turns(map(cut, texts))), passages)))
            for question, gold, texts in islice(asked, questions)
        ]
        if not cases or not all(case.passages for case in cases):
            raise ValueError("no questions, or none with passages")
        return cases
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise QuireError(
            f"{data} is not a question file.",
            "Give a JSON file in the format of SQuAD (such as XQuAD) or of MuSiQue.",
            repr(error),
        ) from error


_Asked = tuple[str, tuple[str, ...], list[str]]


def _of_list(items: list[Any]) -> Iterator[_Asked]:
    for item in items:
        yield item["question"], tuple(item["answers"]), [context["text"] for context in item["ctxs"]]


def _of_articles(articles: list[Any], passages: int) -> Iterator[_Asked]:
    """Without end."""
    for number, article in enumerate(cycle(articles)):
        paragraphs = article["paragraphs"][:passages]
        qas = paragraphs[number * 7 % len(paragraphs)]["qas"]
        chosen = qas[number * 3 % len(qas)]
        gold = tuple(answer["text"] for answer in chosen["answers"])
        yield chosen["question"], gold, [paragraph["context"] for paragraph in paragraphs]


def _by_turns(texts: Iterator[Sequence[str]]) -> Iterator[str]:
    """The first piece of each text, then the second ones."""
    return (piece for piece in chain.from_iterable(zip_longest(*texts)) if piece is not None)


def from_headings(session: Session, engine: Engine, questions: int, passages: int, tokens: int) -> list[Case]:
    """Questions after the headings of the library, or of the sample documents while it is empty. Each is asked over the
    passage below its heading and those that follow, of at most so many tokens."""
    return _from_passages(_documents(session, engine), engine, questions, passages, tokens)


def from_folder(
    folder: Path, session: Session, engine: Engine, questions: int, passages: int, tokens: int
) -> list[Case]:
    """As from_headings, of the documents in a folder, which is not added to the library. Raises QuireError."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-", dir=paths.cache_dir()) as place:
        library = Library(Path(place) / "index.sqlite")
        try:
            root = library.add_root(folder)
            settings = replace(session.settings, chunk_tokens=engine.limits.chunk_tokens)
            index_roots(library, [root], engine.count_tokens, engine.tokenizer_id, settings, lambda _: None)
            documents = [(file, passage) for file in library.contents() for passage in library.chunks_of(file)]
        finally:
            library.close()
    if not documents:
        raise QuireError(f"Nothing in {folder} can be read.", "Give a folder of documents, or a file of questions.")
    return _from_passages(documents, engine, questions, passages, tokens)


def _from_passages(
    documents: Iterable[tuple[Path, chunking.Passage]], engine: Engine, questions: int, passages: int, tokens: int
) -> list[Case]:
    cut, firsts, texts = cut_to(engine, tokens), dict[str, int](), list[str]()
    for file, passage in documents:
        firsts.setdefault(passage.heading.split(" > ")[-1] or file.stem, len(texts))
        texts += cut(passage.text)
        if len(firsts) > questions and len(texts) >= passages:
            break
    return [
        Case(
            f"What do the documents say about {heading}?",
            (),
            tuple(islice(dict.fromkeys(texts[first:] + texts[:first]), passages)),
        )
        for heading, first in islice(firsts.items(), questions)
    ]


def _documents(session: Session, engine: Engine) -> Iterator[tuple[Path, chunking.Passage]]:
    """The library's passages with their files, or else the sample documents'."""
    files = list(session.library.contents())
    for file in files:
        for passage in session.library.chunks_of(file):
            yield file, passage
    if files:
        return
    for sample in sorted((paths.assets() / "sample").iterdir(), key=lambda file: file.name):
        text, file, tokens = sample.read_text(encoding="utf-8"), Path(sample.name), engine.limits.chunk_tokens
        for passage in chunking.split(text, engine.count_tokens, tokens, min_tokens=1, markup=markup_of(file)):
            yield file, passage


def passages_of(session: Session, engine: Engine, tokens: int) -> tuple[str, ...]:
    """Distinct passages of about so many tokens together: from the library, else from the sample documents."""
    texts = [chunk.text for chunk in session.library.all_chunks()]
    if sum(map(engine.count_tokens, texts)) < tokens:
        texts = _sample_passages(tokens)
    chosen: list[str] = []
    for text in texts:
        if tokens <= 0:
            break
        chosen.append(text)
        tokens -= engine.count_tokens(text)
    return tuple(chosen)


def pieces_of(session: Session, engine: Engine, tokens: int, most_tokens: int = 180) -> tuple[str, ...]:
    """Distinct passages of at most `most_tokens`, so many that they have nearly `tokens` together."""
    cut = cut_to(engine, most_tokens - 8)  # a number comes before each
    texts = chain.from_iterable(cut(text) for text in passages_of(session, engine, tokens))
    return within(engine, [f"{number}. {text}" for number, text in enumerate(texts, 1)], tokens)


def within(engine: Engine, passages: Sequence[str], tokens: int) -> tuple[str, ...]:
    """The first passages that have no more tokens together; at least one."""
    sizes = accumulate(map(engine.count_tokens, passages))
    return tuple(passages[: max(1, sum(size <= tokens for size in sizes))])


def _sample_passages(tokens: int) -> list[str]:
    """The sample documents in pieces of some 400 tokens, told apart by a number when they have to repeat."""
    sample = paths.assets() / "sample"
    words = " ".join(file.read_text() for file in sorted(sample.iterdir(), key=lambda f: f.name)).split()
    pieces = [" ".join(words[start : start + 300]) for start in range(0, len(words), 300)]
    return [f"Part {number}. {pieces[number % len(pieces)]}" for number in range(tokens // 250 + 1)]
