"""`quire watch` as a service of the person's own: a systemd user unit, or a launchd agent on macOS.

Writes and deletes one file, from the templates in `packaging`; starts and stops nothing, but says how. Knows nothing of
what the service does.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from xml.sax.saxutils import escape

from quire_engine.errors import QuireError

COMMAND = (sys.executable, "-P", "-m", "quire", "watch")


@dataclass(frozen=True)
class Service:
    """file: where the system looks for it.  template: its name.  start, stop: what a person types."""

    file: Path
    template: str
    start: str
    stop: str

    def install(self, command: tuple[str, ...] = COMMAND, environ: Mapping[str, str] = os.environ) -> None:
        """Writes the file, with the QUIRE_ variables of now. Raises QuireError."""
        variables = {name: value for name, value in sorted(environ.items()) if name.startswith("QUIRE_")}
        written = _launchd if self.template.endswith(".plist.in") else _systemd
        text = _template(self.template)
        for mark, value in zip(("@COMMAND@", "@ENVIRONMENT@"), written(command, variables), strict=True):
            text = text.replace(mark if value else f"{mark}\n", value)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.file, error) from error

    def uninstall(self) -> bool:
        """Deletes the file; False when there was none. Raises QuireError."""
        try:
            self.file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unwritable(self.file, error) from error
        return True


def of_this_system(platform: str = sys.platform) -> Service:
    """Raises QuireError where there is neither systemd nor launchd."""
    home = Path.home()
    if platform == "darwin":
        file = home / "Library" / "LaunchAgents" / "quire.watch.plist"
        return Service(
            file,
            "quire.plist.in",
            f"launchctl bootstrap gui/{os.getuid()} {file}",
            f"launchctl bootout gui/{os.getuid()}/quire.watch",
        )
    if platform.startswith("linux"):
        base = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return Service(
            base / "systemd" / "user" / "quire.service",
            "quire.service.in",
            "systemctl --user daemon-reload && systemctl --user enable --now quire",
            "systemctl --user disable --now quire",
        )
    raise QuireError("There is no template for a service of this system.", "Run `quire watch` yourself.")


def _systemd(command: tuple[str, ...], variables: Mapping[str, str]) -> tuple[str, str]:
    lines = [f"Environment={_quoted(f'{name}={value}')}" for name, value in variables.items()]
    return " ".join(_quoted(part).replace("$", "$$") for part in command), "\n".join(lines)


def _quoted(text: str) -> str:
    """As systemd reads it: % begins a specifier."""
    inner = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("\n", "\\n")
    return f'"{inner}"'


def _launchd(command: tuple[str, ...], variables: Mapping[str, str]) -> tuple[str, str]:
    words = [f"    <string>{escape(part)}</string>" for part in command]
    pairs = [f"    <key>{escape(n)}</key><string>{escape(v)}</string>" for n, v in variables.items()]
    return "\n".join(words), "\n".join(pairs)


def _template(name: str) -> str:
    """From inside the installed package, or from a checkout."""
    packaged = files("quire") / "packaging" / name
    place = packaged if packaged.is_file() else Path(__file__).resolve().parents[2] / "packaging" / name
    return place.read_text(encoding="utf-8")


def _unwritable(file: Path, error: OSError) -> QuireError:
    return QuireError(f"{file} cannot be changed: {error.strerror or error}.", "Check its permissions.")
