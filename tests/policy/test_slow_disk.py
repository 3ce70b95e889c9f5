"""Whether the cache's disk keeps up: the judgement, in virtual time."""

from __future__ import annotations

import heapq

from hypothesis import given, settings, strategies as st

from hpcfs.cache.slow_disk import (
    BUSY_SECONDS,
    FAST_RATE,
    MAX_PAUSE_SECONDS,
    PAUSE_SECONDS,
    SlowDisk,
)

repeatable = settings(deadline=None, derandomize=True, database=None)
MIB = 1024 * 1024


class Emulated:
    """A link and a disk, each with its rate in bytes/s, and a reader who keeps the window of
    site/bandwidth.py full that fits to the slower one."""

    def __init__(self, link: float, disk: float, delay: float = 0.0) -> None:
        self.seconds = 100.0
        self.link, self.disk, self.delay = link, disk, delay
        self.pace = SlowDisk(lambda: self.seconds)

    def read(self, total: int) -> float | None:
        """Seconds after which the disk was found slow, or None."""
        began = link_free = disk_free = self.seconds
        window = max(MIB, int(min(self.link, self.disk) * (2 * self.delay + 0.05)))
        piece = min(4 * MIB, max(MIB // 4, window // 8))
        ends = [began] * (window // piece)
        for _ in range(total // piece):
            sent = heapq.heappop(ends)
            link_free = max(link_free, sent + self.delay / 2) + piece / self.link
            came = link_free + self.delay / 2
            disk_free = max(disk_free, came) + piece / self.disk
            heapq.heappush(ends, disk_free)
            self.seconds = disk_free
            if self.pace.stored(piece, came - sent, disk_free - came):
                return self.seconds - began
        return None


rates = st.floats(2e6, 400e6)


@repeatable
@given(st.floats(2e6, 0.9 * FAST_RATE), st.floats(3.0, 100.0), st.floats(0.0, 0.05))
def test_a_slow_disk_is_noticed_soon(disk: float, times: float, delay: float) -> None:
    site = Emulated(disk * times, disk, delay)
    found = site.read(int(disk * 30) + 64 * MIB)
    assert found is not None
    assert found < 3 * BUSY_SECONDS
    assert site.pace.is_slow


@repeatable
@given(rates, st.floats(1.5, 100.0), st.floats(0.0, 0.2))
def test_a_disk_that_keeps_up_is_used(link: float, times: float, delay: float) -> None:
    site = Emulated(link, link * times, delay)
    assert site.read(int(link * 30) + 64 * MIB) is None
    assert not site.pace.is_slow


@repeatable
@given(st.floats(1.1 * FAST_RATE, 1e9), st.floats(1.0, 20.0), st.floats(0.0, 0.02))
def test_a_fast_disk_is_used_where_the_server_is_faster_still(
    disk: float, times: float, delay: float
) -> None:
    site = Emulated(disk * times, disk, delay)
    assert site.read(int(disk * 10) + 64 * MIB) is None


@repeatable
@given(st.lists(st.tuples(st.floats(1.0, 100.0), st.floats(0.0, 0.4)), max_size=50))
def test_a_stall_now_and_then_is_no_slow_disk(stalls: list[tuple[float, float]]) -> None:
    site = Emulated(1, 1)
    for idle, stall in stalls:
        site.seconds += idle + stall
        assert not site.pace.stored(MIB, 0.01, stall)


def test_a_slow_disk_is_tried_again_and_left_alone_longer_each_time() -> None:
    site = Emulated(100e6, 5e6)
    pauses = []
    for _ in range(6):
        assert site.read(64 * MIB) is not None
        began = site.seconds
        assert not site.pace.stored(MIB, 0.0, 100.0), "what was under way tells nothing new"
        while site.pace.is_slow:
            site.seconds += 1
        pauses.append(round(site.seconds - began))
    assert pauses == [30, 60, 120, 240, 300, 300]
    assert (pauses[0], pauses[-1]) == (PAUSE_SECONDS, MAX_PAUSE_SECONDS)


def test_a_disk_that_was_well_in_between_is_left_alone_for_a_short_time() -> None:
    site = Emulated(100e6, 5e6)
    assert site.read(64 * MIB) is not None
    site.seconds += PAUSE_SECONDS
    site.disk = 1e9
    assert site.read(8192 * MIB) is None
    site.disk = 5e6
    assert site.read(64 * MIB) is not None
    site.seconds += PAUSE_SECONDS
    assert not site.pace.is_slow
