"""Keeps one connection per site: made on first use, shared, noticed when lost, made anew.

`SharedSession` owns when to connect and what to answer while there is no connection; how one is
made is given to it (sftp/session.open_session). Three rules, each from invariant 4 of the design:
all requests share one attempt; what only the user can mend is never tried again on its own; after a
failed attempt requests are answered at once for a while (1 s, doubling to 30 s) instead of each
waiting for its own timeout. An account behind which there is no service is the user's to mend, too,
unless there was one before: then it is the site that is being mended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from hpcfs.model.backoff import Backoff
from hpcfs.model.errors import NoService, NotConnected, RemoteError, RemoteFailure, Unreachable

log = logging.getLogger(__name__)


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

    async def close(self) -> None:
        """End it."""
        ...


S = TypeVar("S", bound=AnySession)


class SharedSession(Generic[S]):
    """The one session of a site, whoever asks for it. `clock` is in seconds."""

    def __init__(
        self, open_session: Callable[[], Awaitable[S]], clock: Callable[[], float] = time.monotonic
    ):
        self._open_session = open_session
        self._session: S | None = None
        self._attempt: asyncio.Task[S] | None = None
        self._failure: RemoteError | None = None
        self._backoff = Backoff(clock)
        self._closed = False
        self._tended = False
        self._has_worked = False

    async def get(self) -> S:
        """Return the session; connects if there is none.

        Raises what the last attempt failed with, at once, while it makes no sense to try again.
        """
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
        """End the pause after a failed attempt; what only the user can mend stays as it is."""
        self._backoff.try_now()

    def _attempting(self) -> asyncio.Task[S]:
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._connect())
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
        if self._failure.lasting or self._tended or self._backoff.is_waiting:
            raise _again(self._failure)

    async def _connect(self) -> S:
        try:
            if self._session is not None:
                await self._session.close()
                self._session = None
            self._session = await self._open_session()
        except NoService as error:
            failure = Unreachable(error.message) if self._has_worked else error
            self._remember(failure)
            raise failure from error
        except RemoteError as error:
            self._remember(error)
            raise
        except Exception as error:
            log.exception("connecting failed in a way that was not foreseen")
            unforeseen = RemoteFailure(f"connecting failed: {error}")
            self._remember(unforeseen)
            raise unforeseen from error
        finally:
            self._attempt = None
        self._failure, self._has_worked = None, True
        self._backoff.succeeded()
        return self._session

    def _remember(self, error: RemoteError) -> None:
        is_news = self._failure is None or self._failure.message != error.message
        log.log(logging.WARNING if is_news else logging.DEBUG, "%s", error.message)
        self._failure = error
        self._backoff.failed()


def _again(error: RemoteError) -> RemoteError:
    """Return a fresh exception: raising one object from many requests would pile up their
    tracebacks. It says that nothing was sent."""
    kind = NotConnected if type(error) is Unreachable else type(error)
    return kind(error.message)


def _observe(task: asyncio.Task[S]) -> None:
    """Marks the outcome as seen where every waiter was cancelled before it came."""
    if not task.cancelled():
        task.exception()
