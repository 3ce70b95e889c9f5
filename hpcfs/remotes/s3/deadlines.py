"""How long a request may stay without a byte. All times are in seconds.

A dead link is noticed by the system (pool.py) and by silence: most answers begin at once. A server
that lists, copies or puts together may say nothing for as long as its work takes, which depends on
how much it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SILENCE = 15.0
"""For most requests."""
LISTING = 25.0
"""For a page of a listing, for which some servers walk over much else. Less than what the mount
waits for any answer."""
DELETION = 0.05
"""For each object of a deletion of many, beside SILENCE."""
STORED_PER_SECOND = 8 * 1024 * 1024
"""Bytes that a slow server stores, or copies."""

_silence: ContextVar[float] = ContextVar("_silence", default=SILENCE)


def current() -> float:
    """Return how long the request that is made here may stay without a byte."""
    return _silence.get()


def for_bytes(size: int) -> float:
    """Return how long a server may be silent that stores or copies so many bytes."""
    return SILENCE + size / STORED_PER_SECOND


@contextmanager
def silence(seconds: float) -> Iterator[None]:
    """Allow the requests that are made inside of the block to be silent for so long."""
    token = _silence.set(seconds)
    try:
        yield
    finally:
        _silence.reset(token)
