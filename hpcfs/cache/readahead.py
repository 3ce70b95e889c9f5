"""How far ahead of a reader to fetch: pure policy, no I/O, never awaits.

A reader that goes on where it stopped is sequential: from its second such read on, the next
WINDOW_BYTES are wanted. Everything else is random access and gets nothing extra. The window is
fixed; 16 MiB is the bandwidth-delay product of 1 Gbit/s at 128 ms.
"""

from __future__ import annotations

WINDOW_BYTES = 16 * 1024 * 1024

_SLACK_BYTES = 1024 * 1024
"""The kernel keeps several requests of one sequential read under way, and they arrive out of order
by a few: a read this near to where the last one ended still goes on."""


class Readahead:
    """One reader of one open file."""

    __slots__ = ("_end", "_sequential", "_wanted_to")

    def __init__(self) -> None:
        self._end = 0
        self._sequential = 0
        self._wanted_to = 0

    def observe(self, offset: int, length: int) -> tuple[int, int]:
        """A read of [offset, offset + length) came: the range [start, end) to prefetch, in bytes.

        The range is empty (start >= end) for random access, and starts where the last one ended.
        """
        if abs(offset - self._end) <= _SLACK_BYTES:
            self._sequential += 1
            self._end = max(self._end, offset + length)
        else:
            self._sequential = 0
            self._wanted_to = 0
            self._end = offset + length
        if self._sequential < 2:
            return self._end, self._end
        start = max(self._end, self._wanted_to)
        end = self._end + WINDOW_BYTES
        if end - start < WINDOW_BYTES // 4 and self._wanted_to:
            return start, start  # ask in pieces worth a request
        self._wanted_to = end
        return start, end
