"""Keeps one connection per site: made on first use, shared, noticed when lost, made anew.

`SharedSession` owns when to connect and what to answer while there is no connection; how one is
made is given to it (sftp/session.open_session). Three rules, each from invariant 4 of the design:
all requests share one attempt; a refused login is repeated rarely and, where the user is needed for
it, never by itself; after a failed attempt requests are answered at once for a while, instead of
each waiting for its own timeout. How long is in model/backoff.py: short where nobody answered, long
where the server did and refused. An account behind which there is no service counts as refused,
too, unless there was one before: then it is the site that is being mended.

What the login would offer (keys, an agent's, certificates) is looked at on use: once that is
something else, a refusal counts no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from hpcfs.model.backoff import ENDED, REACHED, REFUSED, UNREACHED, Backoff, PauseRange
from hpcfs.model.errors import (
    HostKeyRefused,
    LoginEnded,
    LoginNeeded,
    NoService,
    NotConnected,
    RemoteError,
    RemoteFailure,
    Unreachable,
)

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between looks at what a login that was refused would offer now: some files' times, and the keys
of an agent."""


class AnySession(Protocol):
    """A connection in use."""

    @property
    def lost(self) -> bool:
        """Whether it can't be used any more."""
        ...

    @property
    def ended(self) -> asyncio.Event:
        """Set when it is lost."""
        ...

    @property
    def attended(self) -> bool:
        """Whether the user took part in the login, and would have to in the next one."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether nothing is open or under way on it."""
        ...

    async def check(self, *, doubted: bool = False) -> None:
        """Ask the other end for a sign of life, and end the session where none comes soon; one that
        is attended only if it is `doubted`."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


S = TypeVar("S", bound=AnySession)


async def never() -> bool:
    """Tell that a login would offer the same as before: there is nothing to offer."""
    return False


class SharedSession(Generic[S]):
    """The one session of a site, whoever asks for it. `clock` is in seconds.

    `offers_else` tells whether a login would offer something else now than at the last attempt.
    """

    def __init__(
        self,
        open_session: Callable[[], Awaitable[S]],
        clock: Callable[[], float] = time.monotonic,
        offers_else: Callable[[], Awaitable[bool]] = never,
    ):
        self._open_session = open_session
        self._offers_else = offers_else
        self._clock = clock
        self._session: S | None = None
        self._attempt: asyncio.Task[S] | None = None
        self._failure: RemoteError | None = None
        self._backoff = Backoff(clock)
        self._look_at = 0.0
        self._used_at = clock()
        self._closed = False
        self._tended = False
        self._has_worked = False
        self._was_ended = False
        """Whether the server ended the last login, where an earlier one had worked."""
        self._worked_unattended = False
        """Whether keys were enough the last time: then a server that asks for more has trouble."""

    async def get(self) -> S:
        """Return the session; connects if there is none.

        Raises what the last attempt failed with, at once, while it makes no sense to try again.
        """
        self._used_at = self._clock()
        if self.session is not None:
            return self.session
        if self._attempt is None or self._tended:
            self._raise_remembered()
        try:
            return await asyncio.shield(self._attempting())
        except RemoteError as error:
            raise _again(error) from error

    @property
    def session(self) -> S | None:
        """The session that is there now, or None."""
        return None if self._session is None or self._session.lost else self._session

    @property
    def away(self) -> str:
        """Why there is no session, where the last attempt failed."""
        return "" if self.session or self._failure is None else self._failure.message

    async def tend(self, worth_trying: Callable[[RemoteError], Awaitable[None]]) -> None:
        """Connect whenever there is no connection, until cancelled, so that no request has to wait
        for an attempt after one has failed. `worth_trying` returns when there may be another one;
        it decides that for lasting failures too."""
        self._tended = True
        while True:
            try:
                session = await asyncio.shield(self._attempting())
            except RemoteError as error:
                await worth_trying(error)
            else:
                await session.ended.wait()

    def try_now(self) -> None:
        """End the pause after a failed attempt; that after a refused login stays as it is."""
        if self._failure is None or not self._failure.lasting:
            self._backoff.try_now()

    async def check(self) -> None:
        """Find out now whether the connection is still alive, and whether one can be had: the
        machine woke up, or its network changed."""
        self.try_now()
        if self.session is not None:
            await self.session.check()

    async def renew(self) -> None:
        """Forget a refused login, since the user is there to answer, and a session that gives no
        sign of life. The next request logs in."""
        if self._attempt is not None:  # one that has nobody to ask, perhaps
            await asyncio.wait([self._attempt])
        self._failure = None
        self._backoff.succeeded()
        if self.session is not None:
            await self.session.check(doubted=True)

    async def close_if_idle(self, seconds: float) -> float:
        """Close a session that nobody has used for so many seconds; the next request connects
        again. Returns when to look again, in seconds."""
        left = self._used_at + seconds - self._clock()
        session = self.session
        if session is None or self._attempt is not None:
            return seconds
        if left > 0 or session.attended or not session.is_idle:
            return max(left, seconds / 10)
        log.info("the connection is closed: nobody has used it for %.0f s", seconds)
        self._session = None
        await session.close()
        return seconds

    def _attempting(self) -> asyncio.Task[S]:
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._try())
            self._attempt.add_done_callback(_observe)
        return self._attempt

    async def close(self) -> None:
        """Give up an attempt under way and close the session; later requests raise Unreachable."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait([self._attempt])
        if self._session is not None:
            await self._session.close()

    def _raise_remembered(self) -> None:
        if self._closed:
            raise Unreachable("the connection to this site is being closed")
        if self._failure is None:
            return
        if self._failure.lasting and not self._tended:
            waits = self._clock() < self._look_at and not self._may_repeat()
        else:
            waits = self._tended or self._backoff.is_waiting
        if waits:
            raise _again(self._failure)

    def _may_repeat(self) -> bool:
        """Whether the time has come to repeat a refused login by itself; what the user is needed
        for is left to the user."""
        if isinstance(self._failure, LoginNeeded | HostKeyRefused) and not self._worked_unattended:
            return False
        return not self._backoff.is_waiting

    async def _try(self) -> S:
        """Connect, unless it was refused and would be refused again."""
        try:
            failure = self._failure
            if failure is not None and failure.lasting and not self._tended:
                self._look_at = self._clock() + LOOK_SECONDS
                if not self._may_repeat() and not await self._offers_else():
                    raise _again(failure)
            return await self._connect()
        finally:
            self._attempt = None

    async def _connect(self) -> S:
        try:
            if self._session is not None:
                await self._session.close()
                self._session = None
            self._session = await self._open_session()
        except NoService as error:
            if not self._has_worked:
                self._remember(error)
                raise
            failure = Unreachable(error.message)
            is_ended = isinstance(error, LoginEnded)
            self._remember(failure, ENDED if is_ended and self._was_ended else REACHED)
            self._was_ended = is_ended
            raise failure from error
        except RemoteError as error:
            self._was_ended = False
            self._remember(error)
            raise
        except Exception as error:
            log.exception("connecting failed in a way that was not foreseen")
            unforeseen = RemoteFailure(f"connecting failed: {error}")
            self._remember(unforeseen)
            raise unforeseen from error
        self._failure, self._has_worked, self._was_ended = None, True, False
        self._worked_unattended = not self._session.attended
        self._backoff.succeeded()
        return self._session

    def _remember(self, error: RemoteError, pauses: PauseRange | None = None) -> None:
        is_news = self._failure is None or self._failure.message != error.message
        log.log(logging.WARNING if is_news else logging.DEBUG, "%s", error.message)
        self._failure = error
        self._look_at = self._clock() + LOOK_SECONDS
        self._backoff.failed(pauses or _pauses(error))


def _pauses(error: RemoteError) -> PauseRange:
    """Return how long to wait after an attempt that ended in this way."""
    if error.lasting:
        return REFUSED
    return UNREACHED if isinstance(error, NotConnected) else REACHED


def _again(error: RemoteError) -> RemoteError:
    """Return a fresh exception: raising one object from many requests would pile up their
    tracebacks. It says that nothing was sent."""
    kind = NotConnected if type(error) is Unreachable else type(error)
    return kind(error.message)


def _observe(task: asyncio.Task[S]) -> None:
    """Marks the outcome as seen where every waiter was cancelled before it came."""
    if not task.cancelled():
        task.exception()
