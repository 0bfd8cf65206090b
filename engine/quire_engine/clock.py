"""Measured milliseconds of one answer, step by step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs from when it is made. Steps may be entered more than once and add up."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.steps: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.steps[name] = self[name] + 1000 * (time.perf_counter() - began)

    def __getitem__(self, name: str) -> float:
        """Milliseconds spent in a step so far."""
        return self.steps.get(name, 0.0)

    def elapsed_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._started)
