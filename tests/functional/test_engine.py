"""The engine from passages to answers: on tiny models for what is counted and repaired, on the real one for meaning."""

import dataclasses
import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quire_engine import gguf, selfcheck
from quire_engine.engine import Engine, EngineSettings, Request, never
from quire_engine.errors import Aborted, ContextOverflow, DamagedChunk, ModelError, QuireError
from quire_engine.kv.format import ChunkReader
from quire_engine.kv.store import KVStore
from quire_engine.prompt import Wording
from quire_engine.runtimes.llama_context import LlamaContext
from quire_engine.runtimes.llama_cpp import LlamaCppRuntime
from quire_engine.types import Answered, Forecast, ModelShape, Text
from stitching import PASSAGES, SETTINGS, tried_out

Tiny = Callable[[str], Path]


@dataclass(frozen=True)
class Told:
    """All that an answer said."""

    forecast: Forecast
    text: str
    end: Answered


def ask(engine: Engine, request: Request, should_stop: Callable[[], bool] = never) -> Told:
    forecast, *texts, end = engine.answer(request, should_stop)
    assert isinstance(forecast, Forecast)
    assert isinstance(end, Answered)
    pieces = [event.text for event in texts if isinstance(event, Text)]
    assert len(pieces) == len(texts) == end.tokens.generated
    return Told(forecast, "".join(pieces), end)


def question(ratio: float = 0.3, passages: tuple[str, ...] = PASSAGES, max_tokens: int = 12) -> Request:
    """Insists on stitching: tiny models prefill faster than any disk."""
    return Request("When was it built?", passages, ratio, max_tokens=max_tokens, insist=True)


def check_counts(engine: Engine, told: Told, request: Request) -> None:
    """context + question = reused + recomputed + fresh, and the context is what the passages and preamble have."""
    tokens = told.end.tokens
    preamble = len(engine._writer.preamble)
    assert tokens.context == preamble + sum(map(engine.count_tokens, request.passages))
    asked = len(engine._writer.question(request.question))
    assert tokens.context + asked == tokens.reused + tokens.recomputed + tokens.fresh


@pytest.fixture
def cache(checked: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(checked, tmp_path / "cache"))


@pytest.fixture
def start(tiny: Tiny, cache: Path) -> Callable[[], Engine]:
    """A new process, as it were, with the same cache."""
    return lambda: Engine(tiny("llama"), cache, SETTINGS)


@pytest.fixture
def engine(start: Callable[[], Engine]) -> Engine:
    return start()


def no_check(*_: object) -> None:
    raise AssertionError("the self-check was run again")


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, reading a passage into KV fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("a passage was encoded again")

    return lambda: monkeypatch.setattr(LlamaCppRuntime, "encode", refuse)


# The self-check


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "factors", "head8", "linear"])
def test_the_self_check_passes_and_is_remembered(
    tiny: Tiny, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Engine(tiny(kind), tmp_path, SETTINGS)
    assert first.reuse_off == ""
    assert first._verdict.rope_error < 0.002
    assert max(first._verdict.exact_rows_kl, first._verdict.recomputed_kl) < 1e-3
    monkeypatch.setattr(selfcheck, "check", no_check)
    second = Engine(tiny(kind), tmp_path, SETTINGS)
    assert second.reuse_off == ""
    assert second._verdict == first._verdict
    assert second.costs == first.costs


@pytest.mark.parametrize("content", [b"", b"{", b'{"reason": ""}', b"null", b"\xff\xfe\x00"])
def test_a_corrupted_verdict_is_checked_again(start: Callable[[], Engine], cache: Path, content: bytes) -> None:
    (verdict,) = (cache / "checks").iterdir()
    verdict.write_bytes(content)
    assert start().reuse_off == ""
    assert json.loads(verdict.read_text())["rope_error"] < 0.01


@pytest.mark.parametrize(
    "wrong",
    [{"base": 20000.0}, {"layout": "halves"}, {"scale": 0.5}, {"dims": 8}],
    ids=["base", "layout", "scale", "dims"],
)
def test_a_wrong_position_encoding_turns_reuse_off(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, float]
) -> None:
    real = gguf.shape

    def misread(header: gguf.Gguf) -> ModelShape:
        shape = real(header)
        return dataclasses.replace(shape, rope=dataclasses.replace(shape.rope, **wrong))  # type: ignore[arg-type]

    monkeypatch.setattr(gguf, "shape", misread)
    engine = Engine(tiny("llama"), tmp_path, SETTINGS)
    assert engine.known_reuse_off == ""  # nothing is known before the check
    assert engine.reuse_off.startswith(
        "tiny llama failed its self-check: its position encoding is not the one its file describes (error"
    )
    assert engine.known_reuse_off == engine.reuse_off
    engine.cache(PASSAGES)
    assert engine.chunks.store.keys() == []
    told = ask(engine, question())
    assert (told.forecast.ratio, told.forecast.reason) == (1.0, engine.reuse_off)
    check_counts(engine, told, question())


def test_rows_that_do_not_come_back_turn_reuse_off(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if llama.cpp laid out its state in another way: the last layer's values are lost."""
    real = LlamaContext.write_state

    def without_the_end(self: LlamaContext, sequence: int, blob: npt.NDArray[np.uint8]) -> None:
        damaged = blob.copy()
        damaged[-blob.size // 5 :] = 0
        real(self, sequence, damaged)

    monkeypatch.setattr(LlamaContext, "write_state", without_the_end)
    reason = Engine(tiny("llama"), tmp_path, SETTINGS).reuse_off
    assert reason.startswith("tiny llama failed its self-check: stitched and full prefill disagree (KL")


def test_another_architecture_is_answered_by_full_prefill(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "check", no_check)
    engine = Engine(tiny("gemma"), tmp_path, SETTINGS)
    reason = "Reuse has not been verified for the architecture gemma."
    assert engine.reuse_off == engine.known_reuse_off == reason
    assert engine.costs is None
    engine.cache(PASSAGES)
    told = ask(engine, question())
    assert (told.forecast.reason, told.forecast.ratio) == (reason, 1.0)
    assert told.end.tokens.reused == told.end.tokens.recomputed == 0
    assert told.end.tokens.generated > 0
    check_counts(engine, told, question())
    assert not list(tmp_path.rglob("*.kv"))


def test_a_truncated_model_is_a_model_error(tiny: Tiny, tmp_path: Path) -> None:
    data = tiny("llama").read_bytes()
    broken = tmp_path / "broken.gguf"
    for length in (100, len(data) // 3, len(data) - 100):
        broken.write_bytes(data[:length])
        with pytest.raises(ModelError) as error:
            Engine(broken, tmp_path, SETTINGS)
        assert error.value.hint


# Caching and reuse


def test_what_is_cached_is_reused_by_the_next_process(
    start: Callable[[], Engine], no_encoding: Callable[[], None]
) -> None:
    first = start()
    assert not first.is_cached(PASSAGES[0])
    first.cache(PASSAGES)
    assert all(map(first.is_cached, PASSAGES))
    assert len(first.chunks.store.keys()) == 4  # the preamble too
    no_encoding()
    second, request = start(), question(ratio=0.3)
    told = ask(second, request)
    tokens = told.end.tokens
    assert told.forecast.missing_tokens == 0
    assert tokens.fresh == len(second._writer.question(request.question))
    passages = tokens.context - len(second._writer.preamble)
    assert 0 <= tokens.recomputed - 0.3 * passages < second.runtime.tile_tokens
    assert tokens.reused == tokens.context - tokens.recomputed > 0
    assert tokens.generated == 12
    check_counts(second, told, request)


def test_an_answer_stores_what_was_missing(start: Callable[[], Engine]) -> None:
    one, request = start(), question()
    one.cache(PASSAGES[:1])
    told = ask(one, request)
    missing = sum(map(one.count_tokens, PASSAGES[1:]))
    assert told.forecast.missing_tokens == missing
    assert told.end.tokens.fresh > missing * 0.4  # those of them that were not computed twice
    assert told.end.timings.encode_ms > 0
    check_counts(one, told, request)
    again = ask(start(), request)
    assert again.forecast.missing_tokens == 0
    assert again.text == told.text
    assert again.end.tokens.recomputed == told.end.tokens.recomputed


def test_the_same_chunks_in_another_order(engine: Engine, no_encoding: Callable[[], None]) -> None:
    engine.cache(PASSAGES)
    no_encoding()
    straight = ask(engine, question(ratio=0.0))
    keys = engine.chunks.store.keys()
    turned = question(ratio=0.0, passages=PASSAGES[::-1])
    told = ask(engine, turned)
    assert engine.chunks.store.keys() == keys
    assert told.end.tokens.reused == told.end.tokens.context == straight.end.tokens.reused
    assert told.text != straight.text, "order matters to the model"
    check_counts(engine, told, turned)


def test_one_passage_twice_in_a_prompt(engine: Engine) -> None:
    request = question(passages=(PASSAGES[0], PASSAGES[0]))
    for _ in range(2):
        check_counts(engine, ask(engine, request), request)
    assert len(engine.chunks.store.keys()) == 2


@pytest.mark.parametrize("selector", ["default", "spectral", "sensitivity", "first", "random", "probe*spectral"])
@pytest.mark.parametrize("ratio", [0.0, 0.16, 0.99])
def test_counts_add_up(engine: Engine, selector: str, ratio: float) -> None:
    request = dataclasses.replace(question(ratio=ratio), selector=selector)
    told = ask(engine, request)
    assert told.end.ratio == ratio
    check_counts(engine, told, request)


def test_sensitivities_are_measured_when_a_selector_first_wants_them(engine: Engine) -> None:
    def scores() -> set[str]:
        with engine.chunks.store.open(engine.prompt(question()).chunks[0].key) as reader:
            return set(reader.scores)

    engine.cache(PASSAGES)
    assert scores() == {"spectral"}
    wanting = dataclasses.replace(question(), selector="probe*sensitivity")
    fresh = [ask(engine, wanting).end.tokens.fresh for _ in range(2)]
    assert scores() == {"spectral", "sensitivity"}
    assert fresh[0] > fresh[1] == len(engine.prompt(wanting).question)


def test_an_unknown_selector_is_refused_before_anything_is_computed(engine: Engine) -> None:
    with pytest.raises(QuireError, match="no selector 'prob'"):
        next(engine.answer(dataclasses.replace(question(), selector="prob")))
    assert engine.chunks.store.keys() == []


def test_a_full_disk_costs_time_and_no_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ask(engine, question(ratio=1.0))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    monkeypatch.setattr("os.replace", full)
    told = ask(engine, question())
    assert told.text == exact.text
    assert told.end.ratio == 1.0
    assert engine.chunks.store.keys() == []


def test_ratio_1_is_full_prefill(engine: Engine, tiny: Tiny, tmp_path: Path) -> None:
    told = ask(engine, question(ratio=1.0))
    assert told.end.tokens.reused == told.end.tokens.recomputed == 0
    assert engine.chunks.store.keys() == []  # nothing is encoded for it
    other = Engine(tiny("llama"), tmp_path / "other", dataclasses.replace(SETTINGS, precision="fp16"))
    exact = ask(other, question(ratio=0.0, passages=PASSAGES[:1]))
    assert exact.text == ask(other, question(ratio=1.0, passages=PASSAGES[:1])).text
    check_counts(engine, told, question())


def test_full_prefill_is_chosen_when_it_is_as_fast_unless_insisted(engine: Engine) -> None:
    request = dataclasses.replace(question(ratio=0.9, passages=PASSAGES[:2]), insist=False)
    forecast = engine.forecast(request)
    assert forecast.ratio == 1.0
    assert re.fullmatch(r"Full prefill is predicted to be as fast \(\d+ ms against \d+ ms\)\.", forecast.reason)
    assert engine.forecast(dataclasses.replace(request, insist=True)).ratio == 0.9


def test_no_passages(engine: Engine) -> None:
    request = question(passages=())
    told = ask(engine, request)
    assert told.forecast.reason == "There are no passages to reuse."
    check_counts(engine, told, request)


def test_other_settings_keep_their_chunks_apart(tiny: Tiny, cache: Path) -> None:
    """Another bit plan or preamble is another identity: nothing is mistaken for the other's."""
    settings = [
        SETTINGS,
        dataclasses.replace(SETTINGS, precision="fp16"),
        dataclasses.replace(SETTINGS, wording=Wording("Answer briefly.")),
    ]
    for one in settings:
        engine = Engine(tiny("llama"), cache, one)
        assert not engine.is_cached(PASSAGES[0])
        engine.cache(PASSAGES[:1])
        assert engine.is_cached(PASSAGES[0])
    stores = [path for path in (cache / "kv").iterdir() if path.is_dir() and not path.name.startswith("turns-")]
    assert len(stores) == 3


# Damage


def chunk_files(cache: Path, engine: Engine) -> list[Path]:
    """The file of each passage."""
    return [next(cache.rglob(f"{engine.address(passage)}.kv")) for passage in PASSAGES]


def regions(file: Path) -> dict[str, int]:
    """An offset in each part of a chunk file."""
    with KVStore(file.parent.parent).open(file.stem) as reader:
        header = reader.header
        layer = header.layers[-1]
        k_bytes = sum(header.cuts(len(header.layers) - 1)[0].part_lengths)
    return {
        "magic": 0,
        "sizes": 14,
        "key": 30,
        "header": header.header_bytes - 2,
        "order": header.header_bytes + 1,
        "sinks": header.header_bytes + 2 * header.tokens * 3 + 5,
        "front's padding": header.header_bytes + header.front_bytes - 1,
        "first layer": header.layers[0].offset + 3,
        "last layer's keys": layer.offset + k_bytes - 1,
        "last layer's values": layer.offset + k_bytes + 40,
        "last byte": header.file_bytes - 1,
    }


REGIONS = (
    *("magic", "sizes", "key", "header", "order", "sinks", "front's padding"),
    *("first layer", "last layer's keys", "last layer's values", "last byte"),
)


@pytest.fixture
def sound(engine: Engine) -> Told:
    """The answer from undamaged files, which are stored now."""
    engine.cache(PASSAGES)
    return ask(engine, question())


def check_repaired(engine: Engine, sound: Told, file: Path, before: bytes) -> None:
    """The next answer is the same, counts the damaged chunk as fresh, and leaves the file as it was."""
    told = ask(engine, question())
    assert told.text == sound.text
    tokens = told.end.tokens
    assert tokens.recomputed == sound.end.tokens.recomputed
    assert tokens.fresh > sound.end.tokens.fresh
    check_counts(engine, told, question())
    assert len(file.read_bytes()) == len(before)
    after = ask(engine, question())
    assert (after.text, after.end.tokens) == (sound.text, sound.end.tokens)


@pytest.mark.parametrize("region", REGIONS)
def test_one_wrong_byte(start: Callable[[], Engine], engine: Engine, cache: Path, sound: Told, region: str) -> None:
    file = chunk_files(cache, engine)[1]
    before = file.read_bytes()
    wrong = bytearray(before)
    wrong[regions(file)[region]] ^= 0x10
    file.write_bytes(wrong)
    check_repaired(start(), sound, file, before)


def test_one_wrong_byte_in_the_preamble(start: Callable[[], Engine], engine: Engine, cache: Path, sound: Told) -> None:
    file = next(cache.rglob(f"{engine.chunks.preamble.key}.kv"))
    before = file.read_bytes()
    wrong = bytearray(before)
    wrong[len(wrong) // 2] ^= 1
    file.write_bytes(wrong)
    check_repaired(start(), sound, file, before)


@pytest.mark.parametrize("left", [0, 50, 4096, -1])
def test_a_truncated_file(start: Callable[[], Engine], engine: Engine, cache: Path, sound: Told, left: int) -> None:
    file = chunk_files(cache, engine)[2]
    before = file.read_bytes()
    file.write_bytes(before[:left])
    check_repaired(start(), sound, file, before)


def test_all_files_damaged_at_once(start: Callable[[], Engine], engine: Engine, cache: Path, sound: Told) -> None:
    files = chunk_files(cache, engine)
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].unlink()
    files[2].write_bytes(before[2][:-9] + bytes(9 * [7]))
    check_repaired(start(), sound, files[0], before[0])


def test_a_deleted_file(start: Callable[[], Engine], engine: Engine, cache: Path, sound: Told) -> None:
    file = chunk_files(cache, engine)[0]
    before = file.read_bytes()
    file.unlink()
    again = start()
    assert again.forecast(question()).missing_tokens == again.count_tokens(PASSAGES[0])
    check_repaired(again, sound, file, before)


def test_a_file_deleted_between_looking_and_loading(
    engine: Engine, cache: Path, sound: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process clears the cache meanwhile."""
    file = chunk_files(cache, engine)[0]
    before = file.read_bytes()
    real = KVStore.open

    def open_late(self: KVStore, key: str) -> ChunkReader:
        if key == file.stem:
            monkeypatch.setattr(KVStore, "open", real)
            file.unlink()
        return real(self, key)

    monkeypatch.setattr(KVStore, "open", open_late)
    check_repaired(engine, sound, file, before)


def test_another_chunks_file_under_a_chunks_name(
    start: Callable[[], Engine], engine: Engine, cache: Path, sound: Told
) -> None:
    """Sound bytes, wrong passage, as a restored backup or a repaired file system may leave it."""
    first, second, _ = chunk_files(cache, engine)
    before = second.read_bytes()
    assert engine.count_tokens(PASSAGES[0]) != engine.count_tokens(PASSAGES[1])
    shutil.copy(first, second)
    check_repaired(start(), sound, second, before)


def test_a_disk_that_never_gives_anything_back(engine: Engine, sound: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing works and reading does not: the answer comes by full prefill, not never."""
    tries = 0

    def fail(self: KVStore, key: str) -> ChunkReader:
        nonlocal tries
        tries += 1
        assert tries < 100, "tried again without end"
        raise DamagedChunk("A stored passage could not be read from the disk.")

    monkeypatch.setattr(KVStore, "open", fail)
    assert ask(engine, question()).text == ask(engine, question(ratio=1.0)).text


# Limits


def test_a_prompt_that_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    engine = Engine(tiny("small"), tmp_path, SETTINGS)
    request = question(passages=PASSAGES * 4)
    tokens = sum(map(engine.count_tokens, request.passages)) + len(engine._writer.preamble)
    tokens += len(engine._writer.question(request.question))
    for call in (engine.forecast, lambda one: next(engine.answer(one))):
        with pytest.raises(ContextOverflow) as overflow:
            call(request)
        assert overflow.value.message == (f"The question and its passages have {tokens} tokens; tiny llama holds 512.")
        assert "fewer passages" in overflow.value.hint


def test_an_answer_ends_where_the_context_does(tiny: Tiny, tmp_path: Path) -> None:
    engine = Engine(tiny("small"), tmp_path, SETTINGS)
    base = question(passages=("",), max_tokens=1000)
    room = 512 - ask(engine, base).end.tokens.context - len(engine._writer.question(base.question))
    word = "b"
    while engine.count_tokens(word) < room - 5:
        word += "b"
    request = dataclasses.replace(base, passages=(word,))
    for ratio in (0.0, 1.0):
        told = ask(engine, dataclasses.replace(request, ratio=ratio))
        asked = len(engine._writer.question(request.question))
        assert told.end.tokens.context + asked + told.end.tokens.generated <= 512
        assert told.end.ending in ("length", "end")


def test_the_longest_answer(engine: Engine) -> None:
    told = ask(engine, question(max_tokens=10_000))
    assert told.end.tokens.generated <= engine.limits.answer_tokens


def test_limits_leave_room_for_everything(engine: Engine) -> None:
    limits = engine.limits
    assert limits.chunk_tokens <= limits.context_tokens
    assert limits.context_tokens + limits.answer_tokens + len(engine._writer.preamble) < 2048


# Stopping


class After:
    """Turns true after some asking."""

    def __init__(self, asked: int) -> None:
        self.left = asked

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("asked", [0, 10, 40])
def test_stopped_before_the_first_token(engine: Engine, ratio: float, asked: int) -> None:
    request = question(ratio=ratio)
    stopped = ask(engine, request, After(asked))
    assert (stopped.end.ending, stopped.text) == ("stopped", "")
    whole = ask(engine, request)
    assert whole.end.ending in ("end", "length")
    assert whole.text
    check_counts(engine, whole, request)


def test_stopped_while_answering(engine: Engine) -> None:
    request = question()
    engine.cache(PASSAGES)
    whole = ask(engine, request)
    texts = 0

    def enough() -> bool:
        return texts >= 3

    events = []
    for event in engine.answer(request, enough):
        events.append(event)
        texts += isinstance(event, Text)
    end = events[-1]
    assert isinstance(end, Answered)
    assert (end.ending, end.tokens.generated) == ("stopped", 3)
    assert whole.text.startswith("".join(event.text for event in events if isinstance(event, Text)))
    check_counts(engine, Told(whole.forecast, "", end), request)
    assert ask(engine, request).text == whole.text


def test_caching_stops_and_keeps_what_is_finished(start: Callable[[], Engine], no_encoding: Callable[[], None]) -> None:
    engine = start()
    engine.cache([])
    assert len(engine.chunks.store.keys()) == 1  # the preamble

    def two_are_there() -> bool:
        return len(engine.chunks.store.keys()) == 3

    with pytest.raises(Aborted):
        engine.cache(PASSAGES, two_are_there)
    assert [engine.is_cached(passage) for passage in PASSAGES] == [True, True, False]
    engine.cache(PASSAGES)
    no_encoding()
    assert ask(start(), question()).forecast.missing_tokens == 0


def test_an_answer_nobody_listens_to_the_end(engine: Engine) -> None:
    """The screen goes away in the middle; the next question finds all in order."""
    whole = ask(engine, question())
    events = engine.answer(question())
    for _ in range(4):
        next(events)
    del events
    assert ask(engine, question()).text == whole.text


# The real small model


@pytest.fixture(scope="module")
def real(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    wording = Wording("Answer from the documents, in one short sentence.")
    engine = tried_out(Engine(smollm, tmp_path_factory.mktemp("real"), EngineSettings(wording, threads=1)))
    engine.cache(REAL)
    return engine


REAL = (
    "The lighthouse of Cape Gull was built in 1871. It is painted in red and white stripes.",
    "The bakery on Mill Street is closed on Mondays. Its owner is called Martha Klein.",
)


@pytest.mark.parametrize(
    ("asked", "answer"), [("In which year was the lighthouse built?", "1871"), ("Who owns the bakery?", "Martha")]
)
def test_the_real_model_answers_from_stitched_passages(real: Engine, asked: str, answer: str) -> None:
    request = Request(asked, REAL, ratio=0.16, max_tokens=24, insist=True)
    told = ask(real, request)
    assert answer in told.text
    assert told.end.tokens.reused > 0.7 * told.end.tokens.context
    assert told.forecast.missing_tokens == 0
    check_counts(real, told, request)
