"""The daemon's housekeeping: what fails is told once and started again, and ends nothing else."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from hpcfs.daemon.services import PAUSE_SECONDS, Services, keep_running
from hpcfs.kernel.errno import shortage
from hpcfs.model.errors import CacheFull
from hpcfs.model.troubles import MOST_TOLD, Troubles

FORESEEN = [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    sqlite3.OperationalError("database or disk is full"),
    MemoryError(),
    CacheFull("the local disk with the cache is full"),
    ExceptionGroup("several", [OSError(errno.ENFILE, "no files"), MemoryError()]),
]


def in_virtual_time(work: Callable[[], Awaitable[None]]) -> None:
    trio.run(work, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("error", FORESEEN, ids=lambda error: type(error).__name__)
def test_a_service_that_fails_is_started_again_after_a_pause(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred times: one line in the log, and no traceback."""
    troubles, starts = Troubles(), list[float]()

    async def service() -> None:
        starts.append(trio.current_time())
        if len(starts) <= 100:
            raise error

    async def run() -> None:
        await keep_running(troubles, "the service", service)

    in_virtual_time(run)
    assert len(starts) == 101
    assert starts[-1] - starts[0] == pytest.approx(100 * PAUSE_SECONDS)
    (line,) = caplog.records
    assert line.getMessage().startswith("the service failed and is started again: ")
    assert line.exc_info is None
    assert troubles.sentences == [line.getMessage()]


def test_a_bug_has_a_traceback_and_ends_nothing_either(caplog: pytest.LogCaptureFixture) -> None:
    troubles, done = Troubles(), trio.Event()

    async def buggy(number: int) -> None:
        await trio.sleep(number)
        raise ValueError("a bug")

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            services = Services(nursery, troubles)
            services.start_soon(buggy, 1)
            await trio.sleep(5)
            done.set()

    in_virtual_time(run)
    assert done.is_set()
    assert any(record.exc_info for record in caplog.records)
    assert "buggy" in troubles.sentences[0]


def test_a_task_that_fails_before_it_has_started_fails_its_starter() -> None:
    troubles = Troubles()

    async def fails(*, task_status: trio.TaskStatus[int]) -> None:
        await trio.sleep(1)
        raise OSError(errno.EMFILE, "no files")

    async def fails_later(*, task_status: trio.TaskStatus[int]) -> None:
        task_status.started(7)
        await trio.sleep(1)
        raise OSError(errno.EMFILE, "no files")

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            services = Services(nursery, troubles)
            with pytest.raises(OSError, match="no files"):
                await services.start(fails)
            assert troubles.sentences == []
            assert await services.start(fails_later) == 7
        assert len(troubles.sentences) == 1

    in_virtual_time(run)


def test_the_end_of_the_mount_ends_services() -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            Services(nursery, Troubles()).keep_running("sleeping", trio.sleep_forever)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()

    in_virtual_time(run)


def test_troubles_are_few_and_each_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    troubles = Troubles()
    for number in range(MOST_TOLD + 5):
        for _ in range(3):
            troubles.tell(f"trouble {number}")
    assert len(troubles.sentences) == MOST_TOLD
    assert troubles.sentences[-1] == f"trouble {MOST_TOLD + 4}"
    assert len([one for one in caplog.records if one.levelno == logging.ERROR]) == MOST_TOLD + 5


def test_programs_hear_what_the_machine_lacks() -> None:
    assert shortage(MemoryError()) == errno.ENOMEM
    assert shortage(OSError(errno.EMFILE, "")) == errno.EMFILE
    assert shortage(OSError(errno.ENOSPC, "")) == errno.ENOSPC
    assert shortage(OSError(errno.EBADF, "")) is None  # a bug of ours
