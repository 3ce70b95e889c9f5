"""Where the parts of the filesystem start tasks that outlive the call that needs them.

A trio.Nursery is one. The daemon's (daemon/services.py) lets no failure of a task end the mount.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol


class Tasks(Protocol):
    """Starts tasks, as trio.Nursery does."""

    def start_soon(self, async_fn: Callable[..., Awaitable[object]], /, *args: Any) -> None:
        """Start a task; it runs from the next checkpoint on."""
        ...

    async def start(self, async_fn: Callable[..., Awaitable[object]], /, *args: Any) -> Any:
        """Start a task that takes `task_status`, and wait until it says that it has started."""
        ...
