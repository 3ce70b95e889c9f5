"""The handles that a server grants on one connection, and what is given up where they run out.

Every server bounds them (libssh 256, wolfSSH 64, OpenSSH by its process's ulimit -n), none tells
how many, and one too many is refused with a plain "failure" like so much else. The reason is
found out with a file that could be opened a moment ago, and as many as were granted then count as
the limit for a while. From there on an open goes along with the close of the handle that was idle
for longest; where none is idle it waits until one is closed: what is in use is never taken away.

A handle that was given up is opened again when it is wanted, by its name: then it is known no more
which file it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from asyncssh import SFTPFailure

log = logging.getLogger(__name__)

BELIEVED_SECONDS = 60.0
"""Other sessions may share the limit, and end: then it is found out anew."""
_MOST_TRIED = 2
"""Idle files, to find out whether anything can be opened."""


_MOST_DOUBTS = 3
"""Attempts that fail though something else could be opened then: much comes and goes."""

CanOpen = Callable[[bytes | None], Awaitable[bool | None]]


@dataclass(frozen=True)
class _Idle:
    path: bytes
    give_up: Callable[[], None]


class Handles:
    """`rest` and `wake` tell of handles that are open and not in use: `give_up` closes one. Those
    whose loss costs something are the `last` to go."""

    def __init__(self) -> None:
        self._granted = 0
        self._asked = 0
        self._closed = 0
        self._limit: int | None = None
        self._until = 0.0
        self._idle: OrderedDict[Hashable, _Idle] = OrderedDict()
        self._costly: OrderedDict[Hashable, _Idle] = OrderedDict()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._looking = asyncio.Lock()

    @property
    def open_count(self) -> int:
        """How many handles are open, in use or not."""
        return self._granted

    @property
    def limit(self) -> int | None:
        """How many handles the server grants; None as long as it granted all that were asked
        for."""
        if self._limit is not None and _now() > self._until:
            self._limit = None
            self._wake_all()
        return self._limit

    # --- what could be given up -------------------------------------------------------------------

    def rest(
        self, key: Hashable, path: bytes, give_up: Callable[[], None], *, last: bool = False
    ) -> None:
        """Note that a handle is open and not in use, so that `give_up` may close it."""
        self.wake(key)
        (self._costly if last else self._idle)[key] = _Idle(path, give_up)
        self._wake_one()

    def wake(self, key: Hashable) -> None:
        """Note that a handle is in use again, or closed."""
        self._idle.pop(key, None)
        self._costly.pop(key, None)

    async def _give_one_up(self) -> bool:
        """Return once its close is on its way; whether there was one."""
        for found in (self._idle, self._costly):
            if found:
                _, idle = found.popitem(last=False)
                idle.give_up()
                await asyncio.sleep(0)  # it is sent by what the event loop runs next
                return True
        return False

    # --- opening and closing ----------------------------------------------------------------------

    async def granted(
        self,
        attempt: Callable[[], Awaitable[bytes]],
        can_open: CanOpen,
        is_explained: Callable[[], Awaitable[bool]],
    ) -> bytes:
        """Return what `attempt` brings, tried again where only a handle is wanting.

        `can_open` tries a path (None: the home directory); None says that it proves nothing.
        `is_explained` tells whether the server has another reason to refuse the attempt. Raises
        what that raises.
        """
        doubts = 0
        while True:
            await self._room()
            self._asked += 1
            try:
                handle = await attempt()
                self._granted += 1
                return handle
            except SFTPFailure:
                granted, closed = self._granted, self._closed
                if await is_explained():
                    raise
                if not await self._is_out(granted, can_open):
                    doubts += 1
                    if self._closed == closed or doubts > _MOST_DOUBTS:
                        raise  # nothing was closed meanwhile that could have been wanting
                self._believe(granted)
            finally:
                self._asked -= 1
                self._wake_one()

    async def spare(self, attempt: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return a handle that can be done without: nothing is given up for it. Raises
        SFTPFailure."""
        limit = self.limit
        if limit is not None and self._granted + self._asked >= limit:
            raise SFTPFailure(f"no more than {limit} files may be open")
        handle = await attempt()
        self._granted += 1
        return handle

    def closed(self) -> None:
        """Note that the close of a handle is on its way."""
        self._granted = max(0, self._granted - 1)
        self._closed += 1
        self._wake_one()

    async def _room(self) -> None:
        while (limit := self.limit) is not None and self._granted + self._asked >= limit:
            if not await self._give_one_up():
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(waiter)
                try:
                    async with asyncio.timeout(max(0.0, self._until - _now()) + 0.01):
                        await waiter
                except TimeoutError:
                    continue
                finally:
                    if waiter in self._waiting:
                        self._waiting.remove(waiter)

    def _believe(self, granted: int) -> None:
        limit = self.limit
        if limit is None or granted < limit:
            self._limit, self._until = max(1, granted), _now() + BELIEVED_SECONDS
            log.info("the server grants no more than %d open files", granted)

    async def _is_out(self, granted: int, can_open: CanOpen) -> bool:
        """Whether the server refuses all. One at a time finds it out."""
        async with self._looking:
            limit = self.limit
            if not granted or (limit is not None and granted >= limit):
                return granted > 0
            idle = [one.path for one in [*self._idle.values(), *self._costly.values()]]
            for path in [*idle[-_MOST_TRIED:], None]:
                opens = await can_open(path)
                if opens is not None:
                    return not opens
            return False

    def _wake_one(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()


def _now() -> float:
    return asyncio.get_running_loop().time()
