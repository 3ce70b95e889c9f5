"""A set of byte positions, kept as sorted, disjoint, non-adjacent ranges.

It holds the dirty ranges of a file. A file written front to back is one range; only a program that
writes at random makes many, and each costs two ints.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class RangeSet:
    """A set of half-open ranges [start, end), in bytes."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def total(self) -> int:
        """The number of bytes in the set."""
        return sum(self._ends) - sum(self._starts)

    def add(self, start: int, end: int) -> None:
        """Add [start, end)."""
        if start >= end:
            return
        if self._ends and start == self._ends[-1]:  # the next piece of a sequential write
            self._ends[-1] = end
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Remove [start, end)."""
        if start >= end:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        kept = [(self._starts[first], start), (end, self._ends[last - 1])]
        kept = [(left, right) for left, right in kept if left < right]
        self._starts[first:last] = [left for left, _ in kept]
        self._ends[first:last] = [right for _, right in kept]

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether any byte of [start, end) is in the set."""
        first = bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end

    def covers(self, start: int, end: int) -> bool:
        """Return whether all of [start, end) is in the set."""
        at = bisect_right(self._starts, start) - 1
        return start >= end or (at >= 0 and self._ends[at] >= end)

    def without(self, other: RangeSet) -> RangeSet:
        """Return this set minus the other one."""
        rest = self.copy()
        for start, end in other:
            rest.remove(start, end)
        return rest

    def copy(self) -> RangeSet:
        """Return an independent copy."""
        twin = RangeSet()
        twin._starts = self._starts.copy()
        twin._ends = self._ends.copy()
        return twin
