"""Signs of life of a call that a server keeps waiting on purpose.

Whoever waits for a remote's answer with a deadline of its own can't tell a server that works for
long, or asks to be asked later, from one that is gone. The code that can tell calls `report`; the
caller of the remote says by `reported_to` where that goes. Tasks that the call starts inherit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Report = Callable[[], None]


def _nobody() -> None:
    """Ignore the sign."""


_listener: ContextVar[Report] = ContextVar("_listener", default=_nobody)


@contextmanager
def reported_to(report: Report) -> Iterator[None]:
    """Call `report` for the signs of life of what runs inside of the block."""
    token = _listener.set(report)
    try:
        yield
    finally:
        _listener.reset(token)


def listener() -> Report:
    """Return where the signs of life of this call go, for code that runs outside of it."""
    return _listener.get()


def report() -> None:
    """Tell that the server is there, and the call goes on."""
    _listener.get()()
