"""What is told of a server that works for long (remotes/sftp/working.py), in virtual time."""

from __future__ import annotations

import asyncio

from hpcfs.remotes import life
from hpcfs.remotes.sftp.working import REPORT_SECONDS, WORKING_SECONDS, Work, working
from tests.support.virtual_time import run_virtually


class Told:
    """Keeps when a sign of life was reported."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def note(self) -> None:
        self.at.append(asyncio.get_running_loop().time())


async def there() -> bool:
    return True


async def gone() -> bool:
    return False


def test_a_server_that_works_is_told_of_more_often_than_a_patience_ends() -> None:
    async def story() -> list[float]:
        told = Told()
        with life.reported_to(told.note), working(there):
            await asyncio.sleep(45.0)
        await asyncio.sleep(60.0)
        return told.at

    assert run_virtually(story()) == [REPORT_SECONDS * number for number in range(1, 5)]


def test_nothing_is_told_of_a_server_that_is_gone() -> None:
    async def story() -> list[float]:
        told = Told()
        with life.reported_to(told.note), working(gone):
            await asyncio.sleep(45.0)
        return told.at

    assert run_virtually(story()) == []


def test_a_server_that_hangs_is_not_told_of_for_ever() -> None:
    async def story() -> list[float]:
        told = Told()
        with life.reported_to(told.note), working(there):
            await asyncio.sleep(10_000.0)
        return told.at

    told = run_virtually(story())
    assert WORKING_SECONDS - REPORT_SECONDS <= told[-1] <= WORKING_SECONDS


def test_what_moves_begins_the_time_anew() -> None:
    async def story() -> list[float]:
        told = Told()

        async def move(work: Work) -> None:
            await asyncio.sleep(150.0)
            work.moved()

        with life.reported_to(told.note), working(there) as work:
            await asyncio.gather(move(work), asyncio.sleep(200.0))
        return told.at

    told = run_virtually(story())
    assert [at for at in told if WORKING_SECONDS < at < 150.0] == []
    assert told[-1] >= 200.0 - REPORT_SECONDS
