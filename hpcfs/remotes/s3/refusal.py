"""Remembers that the credentials of a site were refused, and when it is worth asking again.

On use, their providers are asked for others at most every LOOK_SECONDS, which the server does not
notice; others are tried at once. The same ones are offered again after a minute, then two, then
every four: the server's side may have been mended. One request tries, and the others that come
meanwhile wait for what it finds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from hpcfs.model.backoff import REFUSED, Backoff
from hpcfs.model.errors import AccessRefused

LOOK_SECONDS = 4.0

Renew = Callable[[], Awaitable[bool]]
"""Asks the providers of credentials anew and returns whether they gave others."""


class Refusal:
    """A refusal of a site's credentials, if there was one. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._error: AccessRefused | None = None
        self._backoff = Backoff(clock)
        self._look_at = 0.0
        self._trying = asyncio.Lock()

    @asynccontextmanager
    async def outlived(self, renew: Renew) -> AsyncIterator[None]:
        """Surround a request. Raise the refusal, unless there are other credentials by now or it is
        time to try those that there are."""
        if not self._counts():
            yield
            return
        async with self._trying:
            if self._counts():
                await self._check(renew)
                yield
                return
        yield

    def _counts(self) -> bool:
        return self._error is not None

    async def _check(self, renew: Renew) -> None:
        assert self._error is not None
        error = self._error
        if not await self._may_try(renew):
            raise type(error)(*error.args)

    async def _may_try(self, renew: Renew) -> bool:
        if not self._backoff.is_waiting:
            return True
        if self._clock() < self._look_at:
            return False
        self._look_at = self._clock() + LOOK_SECONDS
        return await renew()

    def failed(self, error: AccessRefused) -> None:
        """Remember that the server refused the credentials, or that there are none to be had."""
        if not self._backoff.is_waiting:  # requests that fail together count once
            self._backoff.failed(REFUSED)
        if self._error is None:
            self._look_at = self._clock() + LOOK_SECONDS
        self._error = error

    def forget(self) -> None:
        """Forget it: they are accepted, or the user wants them tried."""
        self._error = None
        self._backoff.succeeded()
