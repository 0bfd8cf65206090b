"""Settings: defaults, precedence, and refusals that say what would be right."""

import errno
import stat
from pathlib import Path

import pytest

from quire import config, paths
from quire.config import Settings, load
from quire.config_values import BUNDLED, FROM_DIAL
from quire_engine.errors import QuireError


def write_config(text: str) -> Path:
    file = paths.config_dir() / "config.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_without_anything_the_defaults_hold() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert settings.model == BUNDLED
    assert settings.ratio == FROM_DIAL
    assert (settings.dial, settings.chunk_tokens, settings.max_file_mb) == ("balanced", 512, 200)


def test_precedence_is_override_environment_file_default() -> None:
    write_config("max_tokens = 11\nthreads = 12\nprecision = 'tiny'\n")
    environ = {"QUIRE_MAX_TOKENS": "21", "QUIRE_THREADS": "22"}
    settings = load({"max_tokens": 31}, environ)
    assert (settings.max_tokens, settings.threads, settings.precision, settings.chunk_tokens) == (31, 22, "tiny", 512)


def test_values_become_their_types() -> None:
    write_config('model = "~/models/a.gguf"\nratio = 1\ntemperature = 1\n')
    settings = load(environ={"QUIRE_DIAL": "exact"})
    assert settings.model == Path.home() / "models" / "a.gguf"
    assert (settings.ratio, settings.dial) == (1.0, "exact")
    assert type(settings.ratio) is type(settings.temperature) is float


def test_empty_values_fall_back() -> None:
    write_config('model = "a.gguf"\nratio = 0.5\n')
    assert load({"model": "", "ratio": ""}, {}) == Settings()
    assert load(environ={"QUIRE_MODEL": ""}).model == Path("a.gguf")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("dail = 'fast'", "dail", "Did you mean dial?"),
        ("zzz = 1", "zzz", "model, dial"),
        ("dial = 'quick'", "'quick'", "fast, balanced, exact"),
        ("max_tokens = 0", "max_tokens", "from 1 to 100,000"),
        ("max_tokens = true", "True", "a whole number"),
        ("max_tokens = 1.5", "1.5", "a whole number"),
        ("max_tokens = [1]", "[1]", "a whole number"),
        ("temperature = nan", "nan", "from 0 to 2"),
        ("ratio = 1.5", "1.5", "from 0 to 1"),
        ("precision = 'small'", "small", "safe, default, compact, tiny, kvmix, fp16"),
        ("precision = true", "True", "safe, default, compact, tiny, kvmix, fp16"),
        ("model = 3", "3", "GGUF"),
        ("selector = ' '", "selector", "a name"),
        ("dial = ", "not valid TOML", "Correct"),
    ],
)
def test_what_is_wrong_is_refused_with_what_is_right(text: str, message: str, hint: str) -> None:
    write_config(text)
    with pytest.raises(QuireError) as caught:
        load(environ={})
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_file_that_is_not_utf8_or_no_file_is_refused() -> None:
    file = write_config("")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuireError, match="not valid TOML"):
        load(environ={})
    with pytest.raises(QuireError, match="cannot be read"):
        load(environ={}, file=paths.config_dir())


def test_the_environment_is_named_in_full() -> None:
    with pytest.raises(QuireError, match="QUIRE_MAX_TOKENS") as caught:
        load(environ={"QUIRE_MAX_TOKENS": "many"})
    assert "QUIRE_MAX_TOKENS" in caught.value.hint


def test_a_near_miss_in_the_environment_is_refused_but_others_may_use_the_prefix() -> None:
    with pytest.raises(QuireError) as caught:
        load(environ={"QUIRE_MAX_TOKEN": "3"})
    assert caught.value.hint == "Did you mean QUIRE_MAX_TOKENS?"
    assert load(environ={"QUIRE_DATA_DIR": "/x", "QUIRE_CI_JOB": "1"}) == Settings()


def test_every_setting_is_explained() -> None:
    explained = {entry.name: entry for entry in config.explained()}
    assert list(explained) == list(vars(Settings()))
    assert all(entry.meaning and entry.allowed for entry in explained.values())


def test_directories_are_private_and_made_on_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tmp_path / "deep" / "data"
    monkeypatch.setenv("QUIRE_DATA_DIR", str(wanted))
    assert not wanted.exists()
    assert paths.data_dir() == wanted
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(QuireError, match="cannot be used") as caught:
        paths.cache_dir()
    assert "QUIRE_CACHE_DIR" in caught.value.hint


# Saving


def test_saving_keeps_comments_order_and_the_rest() -> None:
    text = '# mine\nthreads = 2  # laptop\n\n# exact at work\ndial = "fast"\n'
    file = write_config(text)
    config.save({"dial": "exact"})
    assert file.read_text() == text.replace("fast", "exact")
    config.save({"max_tokens": "99", "animations": "off"})
    assert file.read_text().startswith(text.replace("fast", "exact"))
    assert "\n# longest answer (a whole number from 1 to 100,000)\nmax_tokens = 99\n" in file.read_text()
    settings = load(environ={})
    assert (settings.dial, settings.max_tokens, settings.animations) == ("exact", 99, False)


def test_saving_makes_file_and_directory(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "config.toml"
    config.save({"model": "~/m.gguf"}, file)
    assert load(environ={}, file=file).model == Path.home() / "m.gguf"
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_a_relative_path_of_a_model_is_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config.save({"model": "a.gguf"})
    assert load(environ={}).model == tmp_path / "a.gguf"


def test_taking_out_takes_its_own_comment_along() -> None:
    file = write_config("# mine\nthreads = 2\n")
    config.save({"dial": "fast", "ratio": 0.5, "model": "a.gguf"})
    config.save({"ratio": "", "model": ""})
    assert config.unset("dial")
    assert file.read_text() == "# mine\nthreads = 2\n"
    assert not config.unset("dial")
    assert config.unset("threads")
    assert load(environ={}) == Settings()


def test_a_wrong_key_in_the_file_can_be_taken_out() -> None:
    write_config("dail = 1\n")
    with pytest.raises(QuireError):
        load(environ={})
    assert config.unset("dail")
    assert load(environ={}) == Settings()
    with pytest.raises(QuireError, match="You set dail, which is no setting"):
        config.unset("dail")


@pytest.mark.parametrize(("name", "value"), [("dail", "fast"), ("dial", "quick"), ("animations", "perhaps")])
def test_what_load_refuses_is_not_saved(name: str, value: str) -> None:
    file = write_config("threads = 2\n")
    with pytest.raises(QuireError):
        config.save({"max_tokens": 5, name: value})
    assert file.read_text() == "threads = 2\n"


def test_an_invalid_file_is_named_and_left_alone() -> None:
    file = write_config("threads = [\n")
    with pytest.raises(QuireError, match="not valid TOML"):
        config.save({"dial": "fast"})
    assert file.read_text() == "threads = [\n"


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("threads = 2\n")
    real.chmod(0o640)
    (paths.config_dir() / "config.toml").symlink_to(real)
    config.save({"threads": 3})
    assert (paths.config_dir() / "config.toml").is_symlink()
    assert real.read_text() == "threads = 3\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_file_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write_config("threads = 2\n")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(QuireError, match="cannot be written: No space left on device"):
        config.save({"threads": 3})
    assert file.read_text() == "threads = 2\n"
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_every_value_can_be_written_and_read_again() -> None:
    for setting in config.explained():
        for choice in setting.choices or (config.written(setting.default),):
            config.save({setting.name: choice})
            assert config.written(getattr(load(environ={}), setting.name)) == choice


def test_where_a_value_comes_from() -> None:
    write_config("threads = 2\nprecision = 'tiny'\n")
    _, origins = config.in_force({"dial": "fast"}, {"QUIRE_THREADS": "3"})
    assert [origins[name] for name in ("dial", "threads", "precision", "chunk_tokens")] == [
        "flag", "environment", "file", "default",
    ]  # fmt: skip
