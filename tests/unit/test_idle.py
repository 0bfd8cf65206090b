"""Battery, load, and whether another process answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire.idle import Idleness, OthersLoad, asking, on_battery, somebody_asks


def supply(power: Path, name: str, **says: str) -> None:
    (power / name).mkdir(parents=True)
    for what, value in says.items():
        (power / name / what).write_text(value + "\n")


def test_a_battery_that_discharges(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", status="Discharging")
    assert on_battery(tmp_path)
    supply(tmp_path, "AC", type="Mains", online="0")
    assert on_battery(tmp_path)


@pytest.mark.parametrize(
    "supplies",
    [
        {},
        {"BAT0": {"type": "Battery", "status": "Charging"}},
        {"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": "1"}},
        {"BAT0": {"type": "Battery", "status": "Discharging"}, "usb": {"type": "USB", "online": "1"}},
        {"mouse": {"type": "Battery", "status": "Discharging", "scope": "Device"}},
        {"odd": {}},
    ],
)
def test_mains_power(tmp_path: Path, supplies: dict[str, dict[str, str]]) -> None:
    for name, says in supplies.items():
        supply(tmp_path, name, **says)
    assert not on_battery(tmp_path)
    assert not on_battery(tmp_path / "nothing")


class Machine:
    """A system whose load follows what runs on it, as the kernel averages it."""

    def __init__(self) -> None:
        self.time = self.ours_s = self.load = 0.0

    def run(self, seconds: int, ours: float, others: float, look: OthersLoad | None = None) -> float:
        """Returns what was last said of the others."""
        said = 0.0
        for _ in range(seconds):
            self.time += 1
            self.ours_s += ours
            self.load += (ours + others - self.load) * (1 - 2.718281828 ** (-1 / 60))
            said = look.now() if look else 0.0
        return said

    def watched(self) -> OthersLoad:
        return OthersLoad(lambda: (self.load, 0.0, 0.0), lambda: self.ours_s, lambda: self.time)


def test_our_own_work_is_no_load_of_others() -> None:
    machine = Machine()
    load = machine.watched()
    assert machine.run(300, ours=2.0, others=0.0, look=load) < 0.05
    assert machine.run(300, ours=2.0, others=1.5, look=load) == pytest.approx(1.5, abs=0.05)
    assert machine.run(300, ours=0.0, others=0.0, look=load) < 0.05, "what was ours does not turn into theirs"


def test_a_machine_that_others_keep_busy() -> None:
    cores = os.cpu_count() or 1
    machine = Machine()
    idleness = Idleness(machine.watched(), lambda: machine.time)
    assert not idleness.busy
    machine.run(300, ours=0.0, others=1.5 * cores)
    assert idleness.busy
    machine.run(300, ours=0.0, others=0.1)
    assert not idleness.busy


def test_a_system_that_does_not_tell_its_load() -> None:
    def fails() -> tuple[float, float, float]:
        raise OSError

    assert OthersLoad(fails).now() == 0.0


def test_the_battery_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supply(tmp_path, "BAT0", type="Battery", status="Discharging")
    assert not Idleness().on_battery
    monkeypatch.setattr("quire.idle.POWER", tmp_path)
    assert Idleness().on_battery


def test_another_process_that_asks_is_noticed_until_it_dies(tmp_path: Path) -> None:
    assert not somebody_asks(tmp_path)
    code = (
        "import sys; from pathlib import Path; from quire.idle import asking\n"
        "with asking(Path(sys.argv[1])): print('asks', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "asks\n"
    assert somebody_asks(tmp_path)
    other.kill()
    other.wait()
    assert not somebody_asks(tmp_path)


def test_an_error_while_asking_is_not_swallowed(tmp_path: Path) -> None:
    def fails() -> None:
        with asking(tmp_path):
            assert somebody_asks(tmp_path)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fails()
    assert not somebody_asks(tmp_path)
    with asking(tmp_path / "nothing"):
        assert not somebody_asks(tmp_path / "nothing")
