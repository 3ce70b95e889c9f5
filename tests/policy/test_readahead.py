"""Readahead: nothing for random access, a growing window ahead of every other kind of reader."""

from __future__ import annotations

import random

from hypothesis import given, settings, strategies as st

from hpcfs.prefetch.readahead import FIRST_WINDOW_BYTES, Plan, Range, Readahead

repeatable = settings(deadline=None, derandomize=True, database=None)
KIB, MIB = 1024, 1024 * 1024
READ = 128 * KIB
LIMIT = 16 * MIB


class Reader:
    """Follows the plans: what was asked for and is not dropped."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.readahead = Readahead()
        self.limit = limit
        self.asked: list[Range] = []
        self.requests = 0
        self.late = 0
        """Reads of what had not been asked for before."""

    def read(self, offset: int, length: int = READ) -> Plan:
        if not any(start <= offset and offset + length <= end for start, end in self.asked):
            self.late += 1
        plan = self.readahead.observe(offset, length, self.limit)
        for start, end in plan.dropped:
            self.asked = [kept for asked in self.asked for kept in _without(asked, start, end)]
        self.asked = _joined([*self.asked, *plan.wanted])
        self.requests += len(plan.wanted)
        return plan


def _joined(ranges: list[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _without(asked: Range, start: int, end: int) -> list[Range]:
    left, right = (asked[0], min(asked[1], start)), (max(asked[0], end), asked[1])
    return [kept for kept in (left, right) if kept[0] < kept[1]]


def test_the_first_read_asks_for_nothing_ahead() -> None:
    assert Reader().read(0) == Plan()


def test_a_sequential_reader_never_overtakes_what_was_asked_for() -> None:
    reader = Reader()
    for number in range(2000):
        plan = reader.read(number * READ)
        for start, end in plan.wanted:
            assert (number + 1) * READ <= start
            assert end <= (number + 1) * READ + LIMIT
        assert plan.dropped == []
    assert reader.late <= 2
    assert reader.requests < 2000 * READ / (LIMIT // 4) + 10


def test_the_window_doubles_from_a_small_one() -> None:
    reader = Reader()
    reader.read(0)
    ahead = [
        max(end for _, end in plan.wanted) - (number + 1) * READ
        for number in range(1, 6)
        if (plan := reader.read(number * READ)).wanted
    ]
    assert ahead == [FIRST_WINDOW_BYTES << k for k in range(len(ahead))]


def test_a_small_limit_is_kept() -> None:
    reader = Reader(limit=MIB)
    for number in range(100):
        for _, end in reader.read(number * READ).wanted:
            assert end <= (number + 1) * READ + MIB


def test_random_access_asks_for_nothing() -> None:
    reader, generator = Reader(), random.Random(1)
    for _ in range(1000):
        plan = reader.read(generator.randrange(250_000) * 4 * KIB, 4 * KIB)
        assert plan.wanted == []


def test_reads_that_arrive_out_of_order_are_still_sequential() -> None:
    reader, generator = Reader(), random.Random(1)
    offsets = [number * READ for number in range(64)]
    for at in range(0, 64, 4):
        group = offsets[at : at + 4]
        generator.shuffle(group)
        for offset in group:
            reader.read(offset)
    assert reader.late <= 8
    assert reader.asked[-1][1] >= 64 * READ


def test_a_jump_begins_anew_and_the_old_place_is_kept_for_a_while() -> None:
    reader = Reader()
    for number in range(8):
        reader.read(number * READ)
    far = 100 * LIMIT
    assert reader.read(far).wanted == []
    assert reader.read(far + READ).wanted == [(far + 2 * READ, far + 2 * READ + FIRST_WINDOW_BYTES)]
    late = reader.late
    reader.read(8 * READ)
    assert reader.late == late, "what was asked for before the jump is still useful"


def test_what_a_reader_left_behind_is_dropped() -> None:
    reader = Reader()
    for number in range(8):
        reader.read(number * READ)
    assert reader.asked
    generator = random.Random(1)
    dropped: list[Range] = []
    for _ in range(40):
        dropped += reader.read(100 * LIMIT + generator.randrange(10_000) * MIB, 4 * KIB).dropped
    assert _joined(dropped)[0][0] == 8 * READ
    assert all(end <= 8 * READ for _, end in reader.asked)


def test_a_skip_within_the_window_keeps_what_lies_ahead() -> None:
    reader = Reader()
    for number in range(20):
        reader.read(number * READ)
    skipped = 20 * READ + 4 * MIB
    late = reader.late
    plan = reader.read(skipped)
    assert reader.late == late
    assert plan.dropped == [(20 * READ, skipped)]
    assert max(end for _, end in reader.asked) >= skipped + LIMIT // 2


def test_a_backward_reader_is_recognised() -> None:
    reader = Reader()
    for number in range(500, 0, -1):
        reader.read(number * READ)
    assert reader.late <= 5
    assert all(start >= 0 for start, _ in reader.asked)


def test_a_strided_reader_gets_its_pieces_and_nothing_between() -> None:
    reader, step, length = Reader(), 10 * MIB, 64 * KIB
    asked = 0
    for number in range(200):
        plan = reader.read(number * step, length)
        for start, end in plan.wanted:
            assert start % step == 0
            assert end - start == length
            asked += 1
    assert reader.late <= 5
    assert asked


def test_interleaved_readers_of_one_handle_each_get_a_window() -> None:
    reader = Reader()
    places = [base * 1024 * MIB for base in range(4)]
    for number in range(100):
        for place in places:
            reader.read(place + number * READ)
    assert reader.late <= 3 * len(places)


def test_two_handles_do_not_know_of_each_other() -> None:
    one, other = Reader(), Reader()
    for number in range(10):
        one.read(number * READ)
    assert other.read(10 * READ).wanted == []


@repeatable
@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 2**21)), max_size=80),
    st.integers(64 * KIB, 64 * MIB),
)
def test_it_never_asks_for_more_than_the_limit_ahead(
    reads: list[tuple[int, int]], limit: int
) -> None:
    reader, furthest = Readahead(), 0
    for offset, length in reads:
        furthest = max(furthest, offset + length)
        plan = reader.observe(offset, length, limit)
        assert sum(end - start for start, end in plan.wanted) <= max(limit, 2 * FIRST_WINDOW_BYTES)
        assert all(0 <= start < end for start, end in plan.wanted + plan.dropped)


@repeatable
@given(st.integers(0, 2**32), st.integers(1, 2**21), st.integers(2, 300))
def test_any_sequential_reader_is_late_only_at_its_start(
    offset: int, length: int, count: int
) -> None:
    reader = Reader()
    for number in range(count):
        reader.read(offset + number * length, length)
    assert reader.late <= 2 + (4 * length > FIRST_WINDOW_BYTES) * 4
