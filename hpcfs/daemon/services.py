"""The daemon's housekeeping: tasks of a mount whose failure must not end it.

A *service* runs as long as the mount. One that fails is started again after a pause, for as long as
it takes: what it lacked (descriptors, memory, room on the disk) may come back. A task that runs
once is given up; who waits for its result has a deadline. The user is told once, in the log and in
`hpcfs status`.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from hpcfs.model.errors import HpcfsError
from hpcfs.model.troubles import Troubles

log = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0
"""Before a service is started again."""
Work = Callable[..., Awaitable[object]]


class Services:
    """The tasks of one mount, in a nursery that no failure reaches. Implements site.tasks.Tasks."""

    def __init__(self, nursery: trio.Nursery, troubles: Troubles) -> None:
        self._nursery = nursery
        self._troubles = troubles

    def start_soon(self, work: Work, /, *args: Any) -> None:
        """Start a task that runs once. A failure is told, and ends nothing else."""
        self._nursery.start_soon(self._once, work, args)

    async def start(self, work: Work, /, *args: Any) -> Any:
        """Do so, and wait until the task has started; raises its failure until then."""
        return await self._nursery.start(self._started, work, args)

    def keep_running(self, name: str, work: Work, /, *args: Any) -> None:
        """Start a service. `name` is the subject of the sentence that tells of its failure."""
        self._nursery.start_soon(keep_running, self._troubles, name, work, *args)

    async def _once(self, work: Work, args: tuple[Any, ...]) -> None:
        try:
            await work(*args)
        except Exception as error:
            _tell(self._troubles, _name(work), "failed", error)

    async def _started(
        self, work: Work, args: tuple[Any, ...], *, task_status: trio.TaskStatus[Any]
    ) -> None:
        has_started = False

        class Status:
            def started(self, value: Any = None) -> None:
                nonlocal has_started
                has_started = True
                task_status.started(value)

        try:
            await work(*args, task_status=Status())
        except Exception as error:
            if not has_started:
                raise
            _tell(self._troubles, _name(work), "failed", error)


async def keep_running(troubles: Troubles, name: str, work: Work, /, *args: Any) -> None:
    """Run a service until it returns or is cancelled, again and again if it fails."""
    while True:
        try:
            await work(*args)
            return
        except Exception as error:
            _tell(troubles, name, "failed and is started again", error)
        await trio.sleep(PAUSE_SECONDS)


def _name(work: Work) -> str:
    name: str = getattr(work, "__qualname__", repr(work))
    return f"a task of the mount ({name})"


def _tell(troubles: Troubles, name: str, what: str, error: Exception) -> None:
    """A failure that is no lack of something is a bug: the log has its traceback."""
    found = list(_leaves(error))
    if not all(isinstance(one, (OSError, sqlite3.Error, MemoryError, HpcfsError)) for one in found):
        log.error("%s %s", name, what, exc_info=error)
    reasons = dict.fromkeys(str(one) or type(one).__name__ for one in found)
    troubles.tell(f"{name} {what}: {', '.join(reasons)}")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error
