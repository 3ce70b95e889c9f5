"""The time that a login may take, which stands still while the user is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpcfs.remotes.base import Prompter


class Clock:
    def __init__(self, seconds: float, prompter: Prompter):
        self._seconds = seconds
        self._prompter = prompter
        self._timeout: asyncio.Timeout | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._seconds) as self._timeout:
                yield
        finally:
            self._timeout = None

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        self._set(None)
        try:
            return await self._prompter.ask(text, echo=echo)
        finally:
            self._set(asyncio.get_running_loop().time() + self._seconds)

    def _set(self, when: float | None) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(when)
