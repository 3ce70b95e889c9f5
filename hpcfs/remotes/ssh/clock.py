"""The time that a login may take, which stands still while the user is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpcfs.remotes.base import Prompter


class Clock:
    """`reach` is what may pass until the host answers at all, where that is less."""

    def __init__(self, seconds: float, prompter: Prompter, reach: float | None = None):
        self._seconds = seconds
        self._prompter = prompter
        self._reach = reach
        self.seconds = seconds
        """The limit that holds now."""
        self._timeout: asyncio.Timeout | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.seconds = self._seconds if self._reach is None else self._reach
        try:
            async with asyncio.timeout(self.seconds) as self._timeout:
                yield
        finally:
            self._timeout = None

    def reached(self) -> None:
        if self._reach is not None:
            self.seconds = self._seconds
            self._set(asyncio.get_running_loop().time() + self._seconds)

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        self._set(None)
        try:
            return await self._prompter.ask(text, echo=echo)
        finally:
            self._set(asyncio.get_running_loop().time() + self._seconds)

    def _set(self, when: float | None) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(when)
