"""Caches that save requests: bounded, and safe to lose at any time.

`ExpiringCache` forgets by age. `MetadataCache` does not need to: an object's metadata can't change
without its modification time changing with it, except within that time's resolution and on servers
that report a time which writers choose. Neither kind is kept (see `is_settled`).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from hpcfs.remotes.s3.metadata import NANOSECONDS
from hpcfs.remotes.s3.objects import Info, Summary

V = TypeVar("V")
SETTLED_NS = 2 * NANOSECONDS
MILLISECOND_NS = 1_000_000


class ExpiringCache(Generic[V]):
    """Values by key, for `seconds`, the oldest out first."""

    def __init__(
        self, seconds: float, size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._size, self._clock = seconds, size, clock
        self._values: OrderedDict[str, tuple[float, V]] = OrderedDict()
        """Each with the time at which it came."""

    def get(self, key: str, seconds: float | None = None) -> V | None:
        """`seconds` is how old it may be, where that is less than for others."""
        found = self._values.get(key)
        if found is None or self._clock() - found[0] > min(seconds or math.inf, self._seconds):
            return None
        return found[1]

    def put(self, key: str, value: V) -> None:
        """Keep a value from now on, and drop the oldest ones beyond the limit."""
        self._values.pop(key, None)
        self._values[key] = (self._clock(), value)
        while len(self._values) > self._size:
            self._values.popitem(last=False)

    def drop(self, key: str) -> None:
        """Forget a key."""
        self._values.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()


class MetadataCache:
    """Headers of objects, valid as long as the listing shows the same ETag, size and time."""

    def __init__(self, size: int = 50_000) -> None:
        self._size = size
        self._found: OrderedDict[str, tuple[Summary, Info]] = OrderedDict()

    def get(self, listed: Summary) -> Info | None:
        """Return the headers of an object as the listing shows it now, or None."""
        found = self._found.get(listed.key)
        if found is None or found[0] != listed:
            return None
        self._found.move_to_end(listed.key)
        return found[1]

    def put(self, listed: Summary, info: Info) -> None:
        """Keep the headers, if a later change is sure to show in the listing."""
        if not is_settled(listed, info):
            return
        self._found[listed.key] = (listed, info)
        self._found.move_to_end(listed.key)
        while len(self._found) > self._size:
            self._found.popitem(last=False)

    def drop(self, key: str) -> None:
        """Forget a key."""
        self._found.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()


def is_settled(listed: Summary, info: Info) -> bool:
    """Whether any later change must show in the listing.

    Not while the object is so young that a second change could carry the same time; not where the
    time is the `mtime` that a writer chose (rclone's server); not where the two answers differ.
    """
    same = (
        listed.etag == info.etag
        and listed.size == info.size
        and listed.modified_ns // NANOSECONDS == info.modified_ns // NANOSECONDS
    )
    if not same or not listed.etag or info.server_time_ns is None:
        return False
    mtime_ns = info.metadata.mtime_ns
    if mtime_ns is not None and abs(listed.modified_ns - mtime_ns) < MILLISECOND_NS:
        return False
    return listed.modified_ns <= info.server_time_ns - SETTLED_NS
