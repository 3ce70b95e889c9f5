"""Looks at remotes that nobody waits long for: df(1), and `ls` of the mount's top."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from hpcfs.site.namespace import Namespace

AGAIN_SECONDS = 10.0
"""A namespace that did not answer in time is not asked for so long: else each `ls` would wait."""


class Glances:
    """Each may take `seconds`, by trio's clock; `now` is a clock in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._seconds = seconds
        self._now = now
        self._unanswered: dict[Namespace, float] = {}
        """When a namespace last did not answer in time."""

    async def take(self, namespace: Namespace, ask: Callable[[], Awaitable[None]]) -> None:
        """Ask, but give up after `seconds`, and leave it for a while after that happened."""
        missed = self._unanswered.get(namespace)
        if missed is not None and self._now() - missed < AGAIN_SECONDS:
            return
        with trio.move_on_after(self._seconds) as scope:
            await ask()
        if scope.cancelled_caught:
            self._unanswered[namespace] = self._now()
        else:
            self._unanswered.pop(namespace, None)
