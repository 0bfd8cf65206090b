"""The list of models, and fetching one: from a real web server on this machine, which fails in the ways they do."""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from file_server import FileServer, serving
from quire import config, model_files, models
from quire.config import Settings
from quire.config_values import BUNDLED
from quire.download import Fetching
from quire.models import Price
from quire_engine.errors import Aborted, ModelError, QuireError
from tiny_gguf import write_tiny_gguf

DATA = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB
GB = 1_000_000_000


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer({"tiny.gguf": DATA})) as server:
        yield server


def never() -> bool:
    return False


def fetch(server: FileServer, **changes: Any) -> Path:
    given: dict[str, Any] = {"progress": lambda _: None, "should_stop": never}
    return models.pull(f"{server.address}/tiny.gguf", **(given | changes))


def part() -> Path:
    return model_files.models_dir() / "tiny.gguf.part"


# The list


def test_the_list_has_the_bundled_model_those_here_and_those_to_fetch(tmp_path: Path) -> None:
    elsewhere = write_tiny_gguf(tmp_path / "mine.gguf", "qwen2")
    write_tiny_gguf(model_files.models_dir() / "fetched.gguf", "gemma")
    (model_files.models_dir() / "broken.gguf").write_bytes(b"no model")
    model_files.remember(elsewhere)
    listed = {model.name: model for model in models.listing(Settings(model=elsewhere))}
    assert listed["bundled"].bundled
    assert listed["bundled"].choice == BUNDLED
    assert [name for name, model in listed.items() if model.in_use] == ["mine"]
    assert listed["mine"].problem == ""
    assert "gemma" in listed["fetched"].problem
    assert "not a GGUF model" in listed["broken"].problem
    assert [model.name for model in listed.values() if not model.readable] == ["broken"]
    assert not listed["qwen3-4b"].here
    assert listed["qwen3-4b"].size_bytes == 2.5 * GB


def test_a_model_in_use_that_was_never_remembered_is_listed(tmp_path: Path) -> None:
    used = write_tiny_gguf(tmp_path / "used.gguf")
    assert [m.path for m in models.listing(Settings(model=used)) if m.in_use] == [used]
    assert [m.bundled for m in models.listing(Settings()) if m.in_use] == [True]


def test_a_fetched_model_of_the_catalogue_is_listed_once_by_its_name() -> None:
    known = models.known()[0]
    write_tiny_gguf(known.path)
    named = [model for model in models.listing(Settings()) if model.name == known.name]
    assert [(model.here, model.title, model.licence) for model in named] == [(True, known.title, known.licence)]


@pytest.mark.parametrize(("memory_gb", "name"), [(2, None), (4, "qwen2.5-1.5b"), (8, "qwen3-4b"), (256, "qwen3-4b")])
def test_the_recommended_model_fits_and_leaves_room(memory_gb: int, name: str | None) -> None:
    best = models.recommended(memory_gb * GB)
    assert (best.name if best else None) == name


def test_the_catalogue_can_be_fetched_from_whole_files() -> None:
    names = [model.name for model in models.known()]
    assert len(set(names)) == len(names) > 3
    for model in models.known():
        fetchable = models.fetchable(model.name)
        assert (
            fetchable.address
            == f"https://huggingface.co/{'/'.join(model.source.split('/')[:2])}/resolve/main/"
            + (model.source.split("/")[2])
        )
        assert fetchable.path == model.path
        assert model.licence
    everyday = [model.size_gb for model in models.known() if model.everyday]
    assert everyday == sorted(everyday)


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("qwen3-4", "no model qwen3-4", "Did you mean qwen3-4b?"),
        ("Qwen/Qwen3-4B-GGUF", "names no file", "Qwen/Qwen3-4B-GGUF/FILE.gguf"),
        ("https://example.org/model.bin", "no .gguf file", "GGUF"),
        ("https://example.org/..%2f.gguf", "no .gguf file", "GGUF"),
        ("a/b/c-00001-of-00002.gguf", "several parts", "single file"),
        ("ftp://example.org/a.gguf", "cannot be fetched", "https://"),
    ],
)
def test_what_cannot_be_fetched_is_refused(source: str, message: str, hint: str) -> None:
    with pytest.raises(QuireError) as caught:
        models.pull(source, lambda _: None, never)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_page_of_hugging_face_means_its_file() -> None:
    page = "https://huggingface.co/a/b/blob/main/c.gguf"
    assert models.fetchable(page).address == "https://huggingface.co/a/b/resolve/main/c.gguf"


def test_models_are_found_by_name_file_and_path(tmp_path: Path) -> None:
    file = write_tiny_gguf(model_files.models_dir() / "a-b.gguf")
    other = write_tiny_gguf(tmp_path / "other.gguf")
    for name in ("a-b", "a-b.gguf", str(file)):
        assert models.find(name, Settings()).path == file
    assert models.find(str(other), Settings()).path == other
    assert models.find("bundled", Settings()).bundled
    with pytest.raises(QuireError) as caught:
        models.find("a-bc", Settings())
    assert caught.value.hint == "Did you mean a-b?"
    with pytest.raises(QuireError) as caught:
        models.find("qwen3-4b", Settings())
    assert "quire models pull qwen3-4b" in caught.value.hint


def test_removing_deletes_what_was_fetched_and_forgets_what_lies_elsewhere(tmp_path: Path) -> None:
    fetched = write_tiny_gguf(model_files.models_dir() / "fetched.gguf")
    elsewhere = write_tiny_gguf(tmp_path / "mine.gguf")
    model_files.remember(elsewhere)
    for name in ("fetched", "mine"):
        models.remove(models.find(name, Settings()))
    assert not fetched.exists()
    assert elsewhere.exists()
    assert all(model.bundled for model in models.listing(Settings()) if model.here)


def test_what_is_needed_is_not_removed() -> None:
    used = write_tiny_gguf(model_files.models_dir() / "used.gguf")
    for name, settings in (("bundled", Settings()), ("used", Settings(model=used))):
        with pytest.raises(QuireError):
            models.remove(models.find(name, settings))
    assert used.exists()
    assert model_files.bundled().exists()


def test_a_model_that_is_gone_is_named() -> None:
    with pytest.raises(ModelError, match="There is no model file at"):
        model_files.model_file(Path("/nowhere/a.gguf"))


def test_the_price_is_one_sentence() -> None:
    assert Price(1_200_000_000, 90_000, 725_000).sentence() == (
        "Invalidates 1.2 GB, kept for the way back; caching again takes about 12 min."
    )
    assert Price(0, 900, 42_000).sentence() == "Caching takes about 42.0 s."
    assert Price(0, 900, 1).sentence() == "Caching takes a moment."
    assert Price(0, 900, 0).sentence() == "Caching is needed for 900 tokens."
    assert Price(5_000, 0, 0).sentence().endswith("; everything is cached for it already.")
    assert "It is recurrent." in Price(0, 0, 0, "It is recurrent.").sentence()


# Fetching


def test_a_file_is_fetched_whole_and_progress_is_told(server: FileServer) -> None:
    steps: list[Fetching] = []
    path = fetch(server, progress=steps.append)
    assert path == model_files.models_dir() / "tiny.gguf"
    assert path.read_bytes() == DATA
    assert steps[0] == Fetching(0, len(DATA))
    assert steps[-1] == Fetching(len(DATA), len(DATA))
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]
    fetch(server)
    assert len(server.asked) == 1, "what is here is not fetched again"


def test_a_stopped_one_goes_on_where_it_stopped(server: FileServer) -> None:
    seen: list[int] = []
    with pytest.raises(Aborted):
        fetch(server, progress=lambda f: seen.append(f.done_bytes), should_stop=lambda: seen[-1] > 300_000)
    kept = part().stat().st_size
    assert 300_000 < kept < len(DATA)
    assert fetch(server).read_bytes() == DATA
    assert server.asked[-1][1] == f"bytes={kept}-"


def test_a_connection_that_breaks_is_taken_up_again(server: FileServer) -> None:
    server.breaks_after = 400_000
    assert fetch(server).read_bytes() == DATA
    assert [span for _, span in server.asked] == ["", "bytes=400000-", "bytes=800000-"]


def test_a_server_without_ranges_sends_all_again(server: FileServer) -> None:
    server.breaks_after, server.ranges = 400_000, False
    with pytest.raises(QuireError, match="could not be fetched whole: the connection broke"):
        fetch(server)
    server.breaks_after = 0
    assert fetch(server).read_bytes() == DATA


def test_a_file_that_changed_meanwhile_is_begun_anew(server: FileServer) -> None:
    seen: list[int] = []
    with pytest.raises(Aborted):
        fetch(server, progress=lambda f: seen.append(f.done_bytes), should_stop=lambda: seen[-1] > 300_000)
    server.files["tiny.gguf"] = changed = b"GGUF" + DATA[::-1]
    assert fetch(server).read_bytes() == changed


def test_all_bytes_but_the_last_step(server: FileServer) -> None:
    """The process died between the last byte and the renaming."""
    fetch(server)
    path = model_files.models_dir() / "tiny.gguf"
    path.rename(part())
    assert fetch(server).read_bytes() == DATA


def test_the_hub_gives_the_checksum_and_sends_elsewhere(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    path = models.pull("someone/models/tiny.gguf", lambda _: None, never)
    assert path.read_bytes() == DATA
    assert [where for where, _ in server.asked] == ["/someone/models/resolve/main/tiny.gguf", "/tiny.gguf?signed=1"]


def test_the_token_is_for_the_hub_alone(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(server)
    path = model_files.models_dir() / "tiny.gguf"
    path.unlink()
    monkeypatch.setenv("HF_ENDPOINT", server.address.replace("http:", "https:"))  # the same, but not in clear
    fetch(server)
    path.unlink()
    assert set(server.tokens) == {""}
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    models.pull("someone/models/tiny.gguf", lambda _: None, never)
    assert server.tokens[-1] == "Bearer secret"


def test_a_wrong_checksum_leaves_nothing(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    server.checksum = "0" * 64
    with pytest.raises(QuireError, match="its checksum is wrong"):
        models.pull("someone/models/tiny.gguf", lambda _: None, never)
    with pytest.raises(QuireError, match="its checksum is wrong"):
        fetch(server, sha256="1" * 64)
    assert list(model_files.models_dir().iterdir()) == []
    assert fetch(server, sha256=hashlib.sha256(DATA).hexdigest()).read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [(401, "permission", "HF_TOKEN"), (404, "no file", "Check"), (503, "status 503", "later")],
)
def test_refusals_say_what_to_do(server: FileServer, status: int, message: str, hint: str) -> None:
    server.status = status
    with pytest.raises(QuireError) as caught:
        fetch(server)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert list(model_files.models_dir().iterdir()) == []


def test_what_is_no_model_is_not_kept(server: FileServer) -> None:
    server.files["tiny.gguf"] = b"<html>Please log in</html>"
    with pytest.raises(QuireError, match="is no GGUF model"):
        fetch(server)
    assert list(model_files.models_dir().iterdir()) == []


def test_no_server_is_an_error_with_a_reason() -> None:
    with pytest.raises(QuireError, match="could not be fetched: Connection refused") as caught:
        models.pull("http://127.0.0.1:9/tiny.gguf", lambda _: None, never)
    assert "work without a network" in caught.value.hint


def test_stopping_does_not_wait_for_a_silent_server(server: FileServer) -> None:
    server.gate.clear()  # nobody sets it before the fixture ends, so that nothing comes after the headers
    begun = threading.Event()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            fetch(server, progress=lambda _: begun.set(), should_stop=begun.is_set)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)  # the server would be silent for twice as long
    assert not thread.is_alive()
    assert [type(error) for error in ended] == [Aborted]


def test_a_server_that_is_gone_for_a_moment_is_waited_for() -> None:
    """It breaks the connection, is not there, and comes back at the same address."""
    files = {"tiny.gguf": DATA}
    with ExitStack() as first, ExitStack() as second:
        server = first.enter_context(serving(FileServer(files, breaks_after=400_000)))
        back = FileServer(files, port=int(server.address.rsplit(":", 1)[1]))
        comes_back = threading.Timer(0.5, lambda: second.enter_context(serving(back)))

        def progress(at: Fetching) -> None:
            if at.done_bytes >= 400_000 and not comes_back.is_alive() and not back.asked:
                first.close()
                comes_back.start()

        assert fetch(server, progress=progress).read_bytes() == DATA
        comes_back.join()
    assert [span for _, span in back.asked] == ["bytes=400000-"]


def test_a_full_disk_is_told_before_anything_is_written(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(QuireError, match=r"no room for tiny.gguf: 0.0 GB more"):
        fetch(server)
    assert list(model_files.models_dir().iterdir()) == []


def test_two_at_once_do_not_write_the_same_file(server: FileServer) -> None:
    def second(_: Fetching) -> None:
        with pytest.raises(QuireError, match="by another Quire"):
            fetch(server)

    assert fetch(server, progress=second).read_bytes() == DATA


def test_the_themes_of_the_settings_are_those_of_the_application() -> None:
    from textual.theme import BUILTIN_THEMES

    assert set(config.THEMES) == {*BUILTIN_THEMES, config.HIGH_CONTRAST}


def test_the_kinds_of_settings_name_settings() -> None:
    names = {setting.name for setting in config.explained()}
    assert names > config.CACHE_DEPENDS_ON
    assert names > config.COUNTS_AT_ONCE
    assert not config.CACHE_DEPENDS_ON & config.COUNTS_AT_ONCE
