"""Tells that a server works for long on bytes: an fsync to a busy disk, a read of what is on tape.

Whoever waits for the call counts its silence. The connection can tell that from a lost one: while
nothing of the call moves, it is asked for a sign of life, and the sign is reported (life.py). Not
without end: a disk that hangs for good must end the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from hpcfs.remotes import life

REPORT_SECONDS = 10.0
"""Between the reports: less than a patience (site/patience.py)."""
WORKING_SECONDS = 90.0
"""A server that moved nothing for so long counts as hanging."""


class Work:
    """What a server is doing for a call; `answers` asks the server for a sign of life."""

    def __init__(self, answers: Callable[[], Awaitable[bool]]) -> None:
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._moved_at = self._loop.time()
        self._timer = self._loop.call_later(REPORT_SECONDS, self._begin)
        self._telling: asyncio.Task[None] | None = None

    def moved(self) -> None:
        """Note that something of the call is done."""
        self._moved_at = self._loop.time()

    def end(self) -> None:
        """Tell nothing any more."""
        self._timer.cancel()
        if self._telling is not None:
            self._telling.cancel()

    def _begin(self) -> None:
        """Most calls are over before there is a task for them."""
        self._telling = self._loop.create_task(self._tell())

    async def _tell(self) -> None:
        while True:
            is_hanging = self._loop.time() - self._moved_at > WORKING_SECONDS
            if not is_hanging and await self._answers():
                life.report()
            await asyncio.sleep(REPORT_SECONDS)


@contextmanager
def working(answers: Callable[[], Awaitable[bool]]) -> Iterator[Work]:
    """Report the life of the call now and then, while the block waits for the server."""
    work = Work(answers)
    try:
        yield work
    finally:
        work.end()
