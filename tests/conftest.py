"""No test reaches the real home: every directory that Quire would use lies in the test's own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ".home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"QUIRE_{name}_DIR", str(home / name.lower()))
