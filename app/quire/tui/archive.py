"""The history for the screens: on a thread of its own, so that no key waits for a disk or for another window.

Knows nothing of what is asked of it. SQLite and NumPy are imported on the thread, at the first request.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from quire.history import History

Result = TypeVar("Result")


class Archive:
    """One History on one thread, opened when first needed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-archive")
        self._opened: list[History] = []

    async def do(self, work: "Callable[[History], Result]") -> Result:
        """What `work` returns; raises QuireError where it does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._history()))

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _history(self) -> "History":
        from quire.conversation import open_history

        if not self._opened:
            self._opened.append(open_history())
        return self._opened[0]

    def _close(self) -> None:
        while self._opened:
            self._opened.pop().close()
