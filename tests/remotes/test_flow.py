"""Whose piece goes next, and how many bytes may be under way (hpcfs/remotes/sftp/flow.py)."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from hpcfs.remotes.sftp.flow import FEW_WAITING_BYTES, FIRST_BYTES, MOST_BYTES, Depth, Flow
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.sftp.site import SshSiteConnection
from tests.support import evil_sftp
from tests.support.evil_sftp import evil_site
from tests.support.sshd import ScriptedPrompter


class Log:
    """Runs requests and notes in which order they were let in."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.entered: list[str] = []

    def ask(
        self, name: str, size: int, turn: int | None = None, *, urgent: bool = False
    ) -> asyncio.Task[None]:
        async def enter() -> None:
            at = self.flow.turn() if turn is None else turn
            await self.flow.enter(size, at, urgent=urgent)
            self.entered.append(name)

        return asyncio.ensure_future(enter())


async def settled() -> None:
    """Every task has gone as far as it can: entering takes three turns of the loop at most."""
    for _ in range(5):
        await asyncio.sleep(0)


def story(
    check: Callable[[Log], Coroutine[None, None, None]], limit: int = 10, urgent_limit: int = 5
) -> None:
    asyncio.run(check(Log(Flow(limit, urgent_limit))))


def test_what_is_urgent_overtakes_and_may_exceed_the_limit_a_little() -> None:
    async def check(log: Log) -> None:
        log.ask("a", 6)
        log.ask("b", 6)
        log.ask("c", 1)
        await settled()
        assert log.entered == ["a"], "nobody overtakes because it is small"
        log.ask("urgent 1", 6, urgent=True)
        log.ask("urgent 2", 6, urgent=True)
        await settled()
        assert log.entered == ["a", "urgent 1"]
        log.flow.leave(6)
        await settled()
        assert log.entered == ["a", "urgent 1", "urgent 2"]
        log.flow.leave(6)
        log.flow.leave(6)
        await settled()
        assert log.entered[3:] == ["b", "c"]

    story(check)


def test_the_earlier_fetch_goes_first_with_all_its_pieces() -> None:
    async def check(log: Log) -> None:
        first, second = log.flow.turn(), log.flow.turn()
        log.ask("other", 10)
        log.ask("first 1", 10, first)
        log.ask("second 1", 10, second)
        await settled()
        log.flow.leave(10)
        await settled()
        log.ask("first 2", 10, first)
        await settled()
        log.flow.leave(10)
        log.flow.leave(0)
        await settled()
        assert log.entered == ["other", "first 1", "first 2"]

    story(check)


def test_a_piece_larger_than_the_limit_goes_alone() -> None:
    async def check(log: Log) -> None:
        log.ask("large", 100)
        log.ask("small", 1)
        await settled()
        assert log.entered == ["large"]
        log.flow.leave(100)
        await settled()
        assert log.entered == ["large", "small"]

    story(check)


def test_who_gives_up_takes_no_room_and_holds_nobody_up() -> None:
    async def check(log: Log) -> None:
        log.ask("a", 10)
        large, small = log.ask("large", 10), log.ask("small", 1)
        await settled()
        log.flow.leave(2)
        await settled()
        assert log.entered == ["a"], "the large one is next"
        large.cancel()
        await settled()
        assert log.entered == ["a", "small"]
        late = log.ask("late", 5)
        await settled()
        log.flow.leave(4)
        late.cancel()  # let in and given up in the same turn of the loop
        await settled()
        assert small.done()
        assert log.flow.under_way == 5

    story(check)


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_all_are_let_in_and_the_limit_holds(chance: random.Random, count: int) -> None:
    async def check() -> None:
        flow = Flow(10, 5)
        most = 0

        async def request(urgent: bool, size: int, patience: int) -> None:
            nonlocal most
            await flow.enter(size, flow.turn(), urgent=urgent)
            most = max(most, flow.under_way)
            try:
                for _ in range(patience):
                    await asyncio.sleep(0)
            finally:
                flow.leave(size)

        tasks = [
            asyncio.ensure_future(
                request(chance.random() < 0.3, chance.randint(1, 10), chance.randint(0, 5))
            )
            for _ in range(count)
        ]
        for _ in range(chance.randint(0, 3)):
            await asyncio.sleep(0)
        given_up = [task for task in tasks if chance.random() < 0.3 and task.cancel()]
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.done() and not task.cancelled() for task in tasks if task not in given_up)
        assert most <= 15
        assert flow.under_way == 0

    asyncio.run(check())


# --- how deep ------------------------------------------------------------------------------------

MIB = 1024 * 1024
STEP = 261_120


def simulated(rate: float, rtt: float, seconds: float = 20) -> tuple[float, float]:
    """A link with endless demand, and a server that answers in order -> what part of the rate was
    used in the second half of the time, and how many bytes waited in the server then at most."""
    depth, now, free_at, under_way = Depth(), 0.0, 0.0, 0
    answers: deque[tuple[float, float, int]] = deque()
    received, most_waiting = 0, 0.0
    while now < seconds:
        while under_way + STEP <= depth.limit:
            under_way += STEP
            free_at = max(free_at, now + rtt / 2) + STEP / rate
            answers.append((free_at + rtt / 2, now, under_way))
        at, asked_at, beside = answers.popleft()
        now, under_way = at, under_way - STEP
        if now > seconds / 2:
            received += STEP
            most_waiting = max(most_waiting, under_way - rate * rtt)
        depth.arrived(STEP, now - asked_at, beside, full=True)
    return received / (rate * seconds / 2), most_waiting


@pytest.mark.parametrize("rtt", [0.0002, 0.001, 0.02, 0.1, 0.2])
@pytest.mark.parametrize("rate", [1.25e6, 12.5e6, 125e6, 1e9])
def test_the_link_is_filled_and_little_waits_in_the_server(rate: float, rtt: float) -> None:
    used, waiting = simulated(rate, rtt)
    assert used > 0.95 or rate * rtt > MOST_BYTES - FEW_WAITING_BYTES
    assert waiting < 10 * MIB


def test_a_link_too_long_for_the_limit_gets_all_of_it() -> None:
    used, waiting = simulated(1e9, 0.1)
    assert used == pytest.approx(MOST_BYTES / 1e8, rel=0.05)
    assert waiting <= 0


def test_a_small_demand_changes_nothing() -> None:
    depth = Depth()
    for _ in range(1000):
        depth.arrived(STEP, 0.02, STEP, full=False)
    assert depth.limit == FIRST_BYTES


# --- with a server ------------------------------------------------------------------------------


class Held(evil_sftp.Plain):
    """Answers no read before `released`, then with zeros."""

    released: asyncio.Event

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        await self.released.wait()
        return bytes(size)


FAR = 1024 * 1024 * 1024
SIZE = 2 * FAR


@dataclass
class Case:
    """A file whose reads are not answered; `asked` are the offsets of those that went out."""

    remote: SftpRemote
    version: bytes
    session: SftpSession
    asked: list[int] = field(default_factory=list)
    went_out: asyncio.Event = field(default_factory=asyncio.Event)

    def fetch(self, offset: int, length: int, *, urgent: bool = False) -> asyncio.Task[int]:
        async def fetch() -> int:
            chunks = await self.remote.fetch(
                b"file", self.version, offset, length, 1, urgent=urgent
            )
            return sum(map(len, chunks))

        return asyncio.ensure_future(fetch())

    async def until_asked(self, count: int) -> None:
        while len(self.asked) < count:
            self.went_out.clear()
            await self.went_out.wait()


def on_held(base: Path, check: Callable[[Case], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        Held.released = asyncio.Event()
        async with asyncio.timeout(30), evil_site(base, Held) as evil:
            site = SshSiteConnection(evil.spec, ScriptedPrompter())
            try:
                with (evil.directory / "file").open("wb") as file:
                    file.truncate(SIZE)
                remote = site.remote("ns")
                version = (await remote.stat(b"file")).version
                session = (await remote._place(b"")).session
                case = Case(remote, version, session)
                _note_reads(case)
                await check(case)
            finally:
                Held.released.set()
                await site.close()

    asyncio.run(main())


def _note_reads(case: Case) -> None:
    plain = case.session.bulk.read_piece

    def noted(handle: bytes, offset: int, length: int) -> asyncio.Future[list[bytes]]:
        case.asked.append(offset)
        case.went_out.set()
        return plain(handle, offset, length)

    case.session.bulk.read_piece = noted  # type: ignore[method-assign]


def test_an_urgent_fetch_is_asked_for_before_those_that_wait(tmp_path: Path) -> None:
    async def check(case: Case) -> None:
        size = case.session.read_bytes
        case.session.reading = Flow(4 * size, size)
        ahead = case.fetch(0, 8 * size)
        await case.until_asked(4)
        urgent = case.fetch(FAR, 1000, urgent=True)
        await case.until_asked(5)
        assert case.asked == [0, size, 2 * size, 3 * size, FAR]
        Held.released.set()
        assert await urgent == 1000
        assert await ahead == 8 * size

    on_held(tmp_path, check)


def test_a_cancelled_fetch_asks_for_nothing_more_and_frees_its_room(tmp_path: Path) -> None:
    async def check(case: Case) -> None:
        size = case.session.read_bytes
        case.session.reading = Flow(4 * size, 0)
        ahead = case.fetch(0, 8 * size)
        await case.until_asked(4)
        ahead.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ahead
        assert case.session.reading.under_way == 0
        next_one = case.fetch(FAR, 1000)
        await case.until_asked(5)
        assert case.asked[4] == FAR
        Held.released.set()
        assert await next_one == 1000

    on_held(tmp_path, check)
