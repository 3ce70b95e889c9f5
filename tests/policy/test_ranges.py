"""RangeSet against a plain set of positions."""

from __future__ import annotations

import itertools

from hypothesis import given, settings, strategies as st

from hpcfs.cache.ranges import RangeSet

repeatable = settings(deadline=None, derandomize=True, database=None)
SPACE = 24
positions = st.integers(0, SPACE)
steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), positions, positions), max_size=12)


@repeatable
@given(steps, positions, positions)
def test_it_is_a_set_of_positions(steps: list[tuple[str, int, int]], start: int, end: int) -> None:
    ranges, naive = RangeSet(), set[int]()
    for action, left, right in steps:
        if action == "add":
            ranges.add(left, right)
            naive |= set(range(left, right))
        else:
            ranges.remove(left, right)
            naive -= set(range(left, right))
        listed = list(ranges)
        assert {at for left, right in listed for at in range(left, right)} == naive
        assert all(left < right for left, right in listed)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(listed)), "touching ranges"
        assert ranges.total == len(naive)
        assert bool(ranges) == bool(naive)
    if start < end:
        assert ranges.overlaps(start, end) == bool(naive & set(range(start, end)))


@repeatable
@given(steps)
def test_a_copy_is_another_set(steps: list[tuple[str, int, int]]) -> None:
    ranges = RangeSet((left, right) for _, left, right in steps)
    before, twin = list(ranges), ranges.copy()
    twin.add(0, SPACE + 1)
    assert list(ranges) == before
    assert list(RangeSet(before)) == before


def test_sequential_writes_are_one_range() -> None:
    ranges = RangeSet()
    for number in range(1000):
        ranges.add(number * 10, number * 10 + 10)
    assert list(ranges) == [(0, 10_000)]
