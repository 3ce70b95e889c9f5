"""The kernel's requests that are under way: who waits for them, and how many a namespace holds.

A request may be answered before its time for one of two reasons: its caller was interrupted (a
stuck program must end by Ctrl-C or kill), or its namespace is out of reach and the mount is to end.
Then its scope is cancelled, and the caller gets an errno. Nobody looks for callers while all
requests end soon.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from hpcfs.kernel.callers import Callers
from hpcfs.model.errors import Unreachable
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_SECONDS = 0.1
"""Between two looks at the callers of old requests, at least."""
LONGEST_LOOK_SECONDS = 0.5
"""The same, at most."""
LOOK_SHARE = 0.05
"""Of the processor's time is spent on looking, as far as the pauses allow."""
OLD_SECONDS = 0.2
"""From which age on a request counts as old."""
SHARE = 1024
"""Requests that a namespace may hold while none of them ends: of the daemon's handlers, and of the
kernel's places for reads."""
STALLED_SECONDS = 2.0
"""Without the end of any request, after which a namespace with that many gets no more."""


@dataclass(eq=False, slots=True)
class KernelRequest:
    """One under way. `caller` is the thread that waits for it, or, if only the handle is known,
    the one that opened it (`by_handle`); 0 is unknown."""

    namespace: Namespace | None
    caller: int
    by_handle: bool
    since: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    errno: int = errno.EINTR
    """With which the caller is answered if the scope is cancelled."""

    def give_up(self, number: int) -> None:
        """Answer the caller with this errno."""
        self.errno = number
        self.scope.cancel()


class KernelRequests:
    """All requests of one mount that may have to wait for a remote. `now` is a clock in seconds."""

    def __init__(
        self, callers: Callers, now: Callable[[], float] = time.monotonic, share: int = SHARE
    ) -> None:
        self._callers = callers
        self._now = now
        self._share = share
        self._under_way: dict[KernelRequest, None] = {}
        self._held: Counter[Namespace | None] = Counter()
        self._moved_at: dict[Namespace | None, float] = {}
        """When one of its requests last ended, or the first one began."""
        self._begun = trio.Event()
        self._looking_took = 0.0
        """Seconds of the processor, for the last look."""

    def begin(self, namespace: Namespace | None, caller: int, *, by_handle: bool) -> KernelRequest:
        """Count a request; `end` is to follow. Raises Unreachable where too many of its namespace
        wait, and none of them ends."""
        now = self._now()
        held = self._held[namespace]
        if not held:
            self._moved_at[namespace] = now
        elif held >= self._share and namespace is not None:
            self._check_moving(namespace, now)
        request = KernelRequest(namespace, caller, by_handle, now)
        self._under_way[request] = None
        self._held[namespace] = held + 1
        if not self._begun.is_set():
            self._begun.set()
        return request

    def _check_moving(self, namespace: Namespace, now: float) -> None:
        if now - self._moved_at[namespace] >= STALLED_SECONDS:
            raise Unreachable(
                f"{namespace.name} does not answer, and {self._share} requests wait for it already"
            )

    def end(self, request: KernelRequest) -> None:
        """The request is answered."""
        del self._under_way[request]
        self._held[request.namespace] -= 1
        self._moved_at[request.namespace] = self._now()

    def held_by(self, namespace: Namespace) -> int:
        """Return how many requests wait for this one."""
        return self._held[namespace]

    def namespaces(self) -> set[Namespace]:
        """Return the namespaces for which somebody waits."""
        return {one.namespace for one in self._under_way if one.namespace is not None}

    def give_up(self, namespace: Namespace) -> None:
        """Answer all who wait for this one with EHOSTUNREACH."""
        for request in self._under_way:
            if request.namespace is namespace:
                request.give_up(errno.EHOSTUNREACH)

    async def watch(self) -> None:
        """Answer interrupted callers, until cancelled."""
        while True:
            if not self._under_way:
                self._begun = trio.Event()
                await self._begun.wait()
            pause = self._looking_took / LOOK_SHARE
            await trio.sleep(min(max(LOOK_SECONDS, pause), LONGEST_LOOK_SECONDS))
            await self._look()

    async def _look(self) -> None:
        now, look = self._now(), _Look(self._callers)
        for request in list(self._under_way):
            if now - request.since < OLD_SECONDS:
                break  # in the order in which they began
            ask = look.may_be_interrupted if request.by_handle else look.is_interrupted
            if await ask(request.caller):
                log.debug("who waited for %g s was interrupted", now - request.since)
                request.give_up(errno.EINTR)
        self._looking_took = look.took


class _Look:
    """One look at the callers: it asks about each thread once, and about each program once, however
    many requests they wait for. `took` is in seconds of the processor."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers
        self._threads = {0: False}
        """Which are interrupted; of 0 nothing is known."""
        self._processes: dict[int, bool] = {}
        """Whether any thread is that may use what a thread of the process opened."""
        self.took = 0.0

    async def is_interrupted(self, thread: int) -> bool:
        """Return whether this thread waits to end."""
        if thread not in self._threads:
            self._threads[thread] = await self._ask(self._callers.is_interrupted, thread)
        return self._threads[thread]

    async def may_be_interrupted(self, opener: int) -> bool:
        """Return whether any thread waits to end that may use what this one opened."""
        if not opener or await self.is_interrupted(opener):
            return self._threads[opener]
        process = await self._ask(self._callers.process_of, opener)
        if process not in self._processes:
            self._processes[process] = await self._is_any_interrupted(process)
        return self._processes[process]

    async def _is_any_interrupted(self, process: int) -> bool:
        users = self._callers.users_of(process)
        while user := await self._ask(next, users, 0):
            if await self.is_interrupted(user):
                return True
        return False

    async def _ask(self, question: Callable[..., T], *args: object) -> T:
        """Ask /proc, which takes some 0.1 ms: requests are answered in between."""
        began = time.thread_time()
        answer = question(*args)
        self.took += time.thread_time() - began
        await trio.lowlevel.checkpoint()
        return answer
