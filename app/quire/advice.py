"""Which of the well-known models suits a machine: its memory, and its graphics device where there is one.

Asking for the device takes seconds, so only `quire models recommend` does. Knows sizes, not how well models answer.
"""

from dataclasses import dataclass

from quire import models
from quire.models import Known
from quire.render import Json, size
from quire.terminal import printable
from quire_engine.runtimes import choose


@dataclass(frozen=True)
class Machine:
    """memory_bytes: of it all.  device: what its maker calls the graphics device; empty where there is none.
    device_bytes: that are free on it.  keeps_blocks: whether weights take no more room there than in their file."""

    memory_bytes: int
    device: str = ""
    device_bytes: int = 0
    keeps_blocks: bool = False


@dataclass(frozen=True)
class Suited:
    """A model, and where it can be worked with.  memory_bytes, device_bytes: what it takes there."""

    model: Known
    memory_bytes: int
    device_bytes: int
    in_memory: bool
    on_device: bool


@dataclass(frozen=True)
class Advice:
    """machine: for which it is given.  each: the models, from small to large.  best: empty where none suits."""

    machine: Machine
    each: tuple[Suited, ...]
    best: tuple[Suited, ...]

    def lines(self) -> list[str]:
        machine = self.machine
        device = f"{printable(machine.device)} with {size(machine.device_bytes)} free" if machine.device else "none"
        lines = [f"Memory           {size(machine.memory_bytes)}", f"Graphics device  {device}", ""]
        lines += [self._line(suited) for suited in self.each]
        if not self.best:
            return [*lines, "", "None of them leaves room for other programs here. The one that came with Quire does."]
        best = self.best[0]
        command = "use" if best.model.path.exists() else "pull"
        return [
            *lines,
            "",
            f"Recommended: {best.model.title}, {_why(best)}",
            f"  quire models {command} {best.model.name}",
        ]

    def _line(self, suited: Suited) -> str:
        model, mark = suited.model, "*" if suited in self.best else " "
        return f"{mark} {model.name:<13} {size(model.size_bytes):>7}  {_where(suited):<39}  {model.licence}"

    def as_json(self) -> Json:
        machine = self.machine
        device = {"title": machine.device, "free_bytes": machine.device_bytes} if machine.device else None
        return {
            "memory_bytes": machine.memory_bytes,
            "device": device,
            "recommended": self.best[0].model.name if self.best else None,
            "models": [
                {
                    "name": suited.model.name,
                    "title": suited.model.title,
                    "size_bytes": suited.model.size_bytes,
                    "memory_bytes": suited.memory_bytes,
                    "device_bytes": suited.device_bytes,
                    "fits_memory": suited.in_memory,
                    "fits_device": suited.on_device,
                    "everyday": suited.model.everyday,
                    "licence": suited.model.licence,
                    "restricted": suited.model.restricted,
                    "here": suited.model.path.exists(),
                }
                for suited in self.each
            ],
        }


def this_machine() -> Machine:
    """Imports PyTorch where there is a graphics driver."""
    if device := choose.device():
        return Machine(models.memory_bytes(), device.title, device.free_bytes, device.keeps_blocks)
    return Machine(models.memory_bytes())


def on(machine: Machine) -> Advice:
    """The best one is the largest that is quick; without a graphics device that is what the welcome recommends."""
    each = tuple(_suited(model, machine) for model in models.known())
    everyday = models.recommended(machine.memory_bytes)
    good = [s for s in each if s.model == everyday or (s.on_device and not s.model.restricted)]
    return Advice(machine, each, tuple(good[-1:]))


def _suited(model: Known, machine: Machine) -> Suited:
    numbers = int(1e9 * model.billions * choose.BYTES_PER_WEIGHT)
    device_bytes = model.size_bytes if machine.keeps_blocks else numbers
    return Suited(
        model,
        model.memory_bytes,
        device_bytes,
        models.fits(model.size_bytes, machine.memory_bytes),
        device_bytes <= choose.room_for_weights(machine.device_bytes),
    )


def _where(suited: Suited) -> str:
    if suited.on_device:
        return f"{size(suited.device_bytes)} of the device's memory"
    if not suited.in_memory:
        return f"needs {size(suited.memory_bytes)} of memory: too large"
    return f"{size(suited.memory_bytes)} of memory{'' if suited.model.everyday else '; slow'}"


def _why(suited: Suited) -> str:
    if suited.on_device:
        return "the largest that fits the graphics device."
    return "the largest that is quick on a processor and leaves room for other programs."
