"""An event loop on which no time passes: where nothing is ready, its clock jumps to the next timer.

For asyncio code without sockets and threads. A deadline of minutes costs nothing, and a story ends
the same way however loaded the machine is.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NothingWillHappen(Exception):
    """Raised where everything waits and no timer runs."""


class _NeverWaiting(selectors.SelectSelector):
    """Polls; the time that it was to wait is added to the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingWillHappen
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`complaints` are what the loop's exception handler was told: asyncio would log it."""

    def __init__(self) -> None:
        self._clock = _NeverWaiting()
        super().__init__(self._clock)
        self.complaints: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.complaints.append(context))

    def time(self) -> float:
        return self._clock.now


def run_virtually(story: Coroutine[Any, Any, T]) -> T:
    """Run a story on a VirtualLoop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(story)
