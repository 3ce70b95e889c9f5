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

import trio

from hpcfs.kernel.callers import Callers
from hpcfs.model.errors import Unreachable
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""Between two looks at the callers of requests that are older than OLD_SECONDS, at least."""
LOOK_SHARE = 0.05
"""Of the time, at most, is spent on looking: 0.1 ms for each thread."""
OLD_SECONDS = 0.2
"""A request may take so long before anybody looks for its caller."""
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
        took = 0.0
        while True:
            if not self._under_way:
                self._begun = trio.Event()
                await self._begun.wait()
            await trio.sleep(max(LOOK_SECONDS, took / LOOK_SHARE))
            began = self._now()
            self._look()
            took = self._now() - began

    def _look(self) -> None:
        now = self._now()
        found: dict[tuple[int, bool], bool] = {}
        for request in list(self._under_way):
            if now - request.since < OLD_SECONDS:
                break  # in the order in which they began
            caller = request.caller, request.by_handle
            if caller not in found:
                found[caller] = self._is_interrupted(*caller)
            if found[caller]:
                log.debug("who waited for %g s was interrupted", now - request.since)
                request.give_up(errno.EINTR)

    def _is_interrupted(self, caller: int, by_handle: bool) -> bool:
        if not caller:
            return False
        if by_handle:
            return self._callers.is_any_interrupted(caller)
        return self._callers.is_interrupted(caller)
