"""A stored chunk's bytes held in memory: what a chunk reader reads from when there is no file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemorySource:
    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> memoryview:
        """A view: reading from memory costs nothing."""
        return memoryview(self.data)[offset : offset + length]

    def close(self) -> None:
        """Nothing to give back."""
