"""Readahead: nothing for random access, a window ahead of a sequential reader, in large pieces."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from hpcfs.cache.readahead import WINDOW_BYTES, Readahead

repeatable = settings(deadline=None, derandomize=True, database=None)
READ = 128 * 1024


def test_the_first_read_asks_for_nothing_ahead() -> None:
    start, end = Readahead().observe(0, READ)
    assert start >= end


def test_a_sequential_reader_never_overtakes_what_was_asked_for() -> None:
    reader, wanted_to, requests = Readahead(), 0, 0
    for number in range(2000):
        start, end = reader.observe(number * READ, READ)
        if start < end:
            assert start == max(wanted_to, (number + 1) * READ)
            assert end <= (number + 1) * READ + WINDOW_BYTES
            wanted_to, requests = end, requests + 1
        if number > 1:
            assert wanted_to >= (number + 1) * READ
    assert requests < 2000 * READ / (WINDOW_BYTES // 4) + 2


def test_random_access_asks_for_nothing() -> None:
    reader, generator = Readahead(), random.Random(1)
    for _ in range(1000):
        start, end = reader.observe(generator.randrange(100) * 10 * WINDOW_BYTES, READ)
        assert start >= end
        reader.observe(200 * 10 * WINDOW_BYTES, READ)


def test_reads_that_arrive_out_of_order_are_still_sequential() -> None:
    reader, generator, wanted_to = Readahead(), random.Random(1), 0
    offsets = [number * READ for number in range(64)]
    for at in range(0, 64, 4):
        group = offsets[at : at + 4]
        generator.shuffle(group)
        for offset in group:
            start, end = reader.observe(offset, READ)
            if start < end:
                wanted_to = end
    assert wanted_to >= 64 * READ


def test_after_a_jump_it_starts_anew() -> None:
    reader = Readahead()
    for number in range(4):
        reader.observe(number * READ, READ)
    far = 100 * WINDOW_BYTES
    start, end = reader.observe(far, READ)
    assert start >= end
    reader.observe(far + READ, READ)
    start, end = reader.observe(far + 2 * READ, READ)
    assert far < start < end <= far + 3 * READ + WINDOW_BYTES


@repeatable
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**21)), max_size=50))
def test_it_never_asks_for_more_than_a_window_ahead(reads: list[tuple[int, int]]) -> None:
    reader, furthest = Readahead(), 0
    for offset, length in reads:
        furthest = max(furthest, offset + length)
        start, end = reader.observe(offset, length)
        assert end - start <= WINDOW_BYTES
        assert end <= furthest + WINDOW_BYTES
