"""When a site's connection is made, made again and closed: without a network, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest

from hpcfs.model.backoff import LONGEST_SECONDS
from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    LoginEnded,
    LoginNeeded,
    NoService,
    NotConnected,
    RemoteError,
    RemoteFailure,
    Unreachable,
    WrongSettings,
)
from hpcfs.remotes.ssh.shared_session import SharedSession


class FakeSession:
    def __init__(self, *, attended: bool = False) -> None:
        self.lost = self.closed = False
        self.attended = attended
        self.is_idle = True
        self.closings = 0
        self.checks: list[bool] = []
        self.ended = asyncio.Event()

    async def check(self, *, doubted: bool = False) -> None:
        self.checks.append(doubted)

    async def close(self) -> None:
        self.closed = True
        self.closings += 1


class Opener:
    """Opens sessions, or fails with what it is told, one after the other; None is a success."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)
        self.attempts = 0
        self.attended = False

    async def __call__(self) -> FakeSession:
        self.attempts += 1
        await asyncio.sleep(0)
        outcome = self._outcomes.pop(0) if self._outcomes else None
        if outcome is not None:
            raise outcome
        return FakeSession(attended=self.attended)


class World:
    """A shared session with a clock of its own; `offers_else` is what a look finds."""

    longest_pauses: ClassVar[Callable[[], float]] = lambda: 0.0

    def __init__(self, *outcomes: Exception | None) -> None:
        self.now = 100.0
        self.opener = Opener(*outcomes)
        self.offers_else = False
        self.looks = 0
        self.kept = SharedSession(self.opener, lambda: self.now, self._look)
        self.kept._backoff._draw = World.longest_pauses

    async def _look(self) -> bool:
        self.looks += 1
        return self.offers_else

    async def fails(self, kind: type[RemoteError], *, attempts: int) -> None:
        """Requests fail so, three at once and one after them; so many attempts were made so far."""
        for error in await asyncio.gather(
            *(self.kept.get() for _ in range(3)), return_exceptions=True
        ):
            assert type(error) is kind
        with pytest.raises(kind):
            await self.kept.get()
        assert self.opener.attempts == attempts


def story(tell: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(tell())  # type: ignore[arg-type] # a coroutine

    run.__name__, run.__doc__ = tell.__name__, tell.__doc__
    return run


@story
async def test_pauses_double_up_to_a_limit_and_start_anew() -> None:
    world = World(*(Unreachable("down") for _ in range(7)))
    pauses = []
    for attempt in range(1, 8):
        await world.fails(NotConnected, attempts=attempt)
        pauses.append(world.kept._backoff.retry_at - world.now)
        world.now = world.kept._backoff.retry_at
    assert pauses == [1, 2, 4, 8, 16, LONGEST_SECONDS, LONGEST_SECONDS]
    session = await world.kept.get()
    assert await world.kept.get() is session
    session.lost = True
    assert await world.kept.get() is not session, "a lost connection is replaced at once"
    assert session.closed


@story
async def test_where_nobody_answers_it_is_tried_every_two_seconds() -> None:
    world = World(*(NotConnected("nobody") for _ in range(4)))
    for attempt, pause in enumerate((0.5, 1, 2, 2), 1):
        await world.fails(NotConnected, attempts=attempt)
        world.now += pause
    await world.kept.get()


@pytest.mark.parametrize("error", [AccessRefused, WrongSettings, NoService])
def test_a_refusal_is_repeated_once_a_minute_at_most(error: type[RemoteError]) -> None:
    async def main() -> None:
        world = World(error("no"), error("no"), None)
        await world.fails(error, attempts=1)
        world.now += 59
        world.kept.try_now()
        await world.fails(error, attempts=1)
        world.now += 1
        await world.fails(error, attempts=2)
        world.now += 119
        await world.fails(error, attempts=2)
        world.now += 1
        assert not (await world.kept.get()).lost

    asyncio.run(main())


@pytest.mark.parametrize("error", [LoginNeeded, HostKeyRefused])
def test_what_a_person_is_needed_for_is_never_tried_again_by_itself(
    error: type[RemoteError],
) -> None:
    async def main() -> None:
        world = World(error("no"))
        for world.now in (0.0, 10.0, 10.0**9):
            await world.fails(error, attempts=1)
        assert world.looks == 2

    asyncio.run(main())


@pytest.mark.parametrize("error", [AccessRefused, LoginNeeded, HostKeyRefused, WrongSettings])
def test_what_would_be_offered_now_is_looked_at_on_use(error: type[RemoteError]) -> None:
    async def main() -> None:
        world = World(error("no"), None)
        await world.fails(error, attempts=1)
        world.offers_else = True
        await world.fails(error, attempts=1)
        world.now += 5
        sessions = await asyncio.gather(*(world.kept.get() for _ in range(3)))
        assert (len(set(sessions)), world.looks) == (1, 1), "whoever asks first waits for it too"

    asyncio.run(main())


@story
async def test_whoever_logs_in_by_hand_need_not_wait() -> None:
    world = World(LoginNeeded("no"), None)
    await world.fails(LoginNeeded, attempts=1)
    await world.kept.renew()
    session = await world.kept.get()
    await world.kept.renew()
    assert session.checks == [True], "one that is there is only doubted"


@story
async def test_whoever_logs_in_by_hand_waits_for_an_attempt_without_them() -> None:
    world = World(LoginNeeded("nobody is there"), None)
    alone = asyncio.ensure_future(world.kept.get())
    await asyncio.sleep(0)
    await world.kept.renew()
    with pytest.raises(LoginNeeded):
        await alone
    assert not (await world.kept.get()).lost


@story
async def test_keys_that_were_enough_are_tried_again_where_the_server_asks_for_more() -> None:
    """Its home directories may be out of reach: then sshd finds no authorized_keys."""
    world = World(None, LoginNeeded("a password"), None)
    (await world.kept.get()).lost = True
    await world.fails(LoginNeeded, attempts=2)
    world.now += 60
    await world.kept.get()


@story
async def test_a_login_with_a_second_factor_that_is_lost_is_not_repeated_by_itself() -> None:
    world = World(None, LoginNeeded("a code"))
    world.opener.attended = True
    (await world.kept.get()).lost = True
    await world.fails(LoginNeeded, attempts=2)
    world.now += 1e6
    await world.fails(LoginNeeded, attempts=2)


@story
async def test_where_it_worked_before_it_is_tried_again() -> None:
    """A site in maintenance ends each login at once, and an end to that comes by itself."""
    world = World(None, NoService("Back at noon"), None)
    (await world.kept.get()).lost = True
    for kind in (Unreachable, NotConnected):
        with pytest.raises(kind, match="Back at noon"):
            await world.kept.get()
    world.now += 60
    assert not (await world.kept.get()).lost


@story
async def test_an_account_that_expires_is_tried_a_few_times_an_hour() -> None:
    """Its logins are ended, as may be one by a link that breaks; sites ban who goes on."""
    world = World(None, *[LoginEnded("expired")] * 30)
    (await world.kept.get()).lost = True
    began, attempts = world.now, list[float]()
    while world.now < began + 3600:
        before = world.opener.attempts
        with pytest.raises(Unreachable, match="expired"):
            await world.kept.get()
        if world.opener.attempts > before:
            attempts.append(world.now - began)
        world.now += 1
    assert attempts[1] <= 2, "it may have been the link"
    assert len(attempts) <= 20
    assert all(fifth - first > 600 for first, fifth in zip(attempts, attempts[4:], strict=False))


@story
async def test_a_change_of_the_network_ends_the_pause_and_doubts_the_connection() -> None:
    world = World(Unreachable("down"), None)
    await world.fails(NotConnected, attempts=1)
    await world.kept.check()
    session = await world.kept.get()
    await world.kept.check()
    assert session.checks == [False]


@story
async def test_a_connection_that_nobody_uses_is_closed() -> None:
    world = World()
    session = await world.kept.get()
    world.now += 599
    assert await world.kept.close_if_idle(600) >= 1
    assert session.closings == 0
    world.now += 1
    session.is_idle = False  # a file is open
    await world.kept.close_if_idle(600)
    session.is_idle, session.attended = True, True  # it would ask again
    await world.kept.close_if_idle(600)
    assert session.closings == 0
    session.attended = False
    await world.kept.close_if_idle(600)
    assert session.closings == 1
    assert await world.kept.get() is not session


@story
async def test_a_cancelled_request_does_not_cancel_the_attempt() -> None:
    world = World()
    first = asyncio.ensure_future(world.kept.get())
    second = asyncio.ensure_future(world.kept.get())
    await asyncio.sleep(0)
    first.cancel()
    session = await second
    assert world.opener.attempts == 1
    await world.kept.close()
    assert session.closed


@story
async def test_a_failure_that_nobody_foresaw_is_reported_as_one() -> None:
    world = World(KeyError("surprise"))
    with pytest.raises(RemoteFailure, match="surprise"):
        await world.kept.get()
