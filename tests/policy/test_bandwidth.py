"""The link's estimates, in virtual time."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from hpcfs.site.bandwidth import (
    FIRST_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
    Bandwidth,
    Mark,
)

repeatable = settings(deadline=None, derandomize=True, database=None)
MIB = 1024 * 1024


class Emulated:
    """A pipe of `rate` bytes/s and `delay` seconds, kept full as far as the window allows."""

    def __init__(self, rate: float, delay: float) -> None:
        self.seconds = 100.0
        self.rate, self.delay = rate, delay
        self.link = Bandwidth(lambda: self.seconds)
        self._free_at = 0.0
        self._under_way: list[tuple[float, Mark, int]] = []

    def send(self, length: int) -> None:
        begins = max(self.seconds + self.delay / 2, self._free_at)
        self._free_at = begins + length / self.rate
        self._under_way.append((self._free_at + self.delay / 2, self.link.begin(), length))

    def receive(self) -> None:
        self.seconds, mark, length = self._under_way.pop(0)
        self.link.delivered(mark, length)

    def read(self, total: int) -> float:
        """Seconds that a reader needs who has always a window under way."""
        began, sent, under_way = self.seconds, 0, 0
        while sent < total or self._under_way:
            while sent < total and under_way < self.link.window:
                self.send(MIB)
                sent, under_way = sent + MIB, under_way + MIB
            self.receive()
            under_way -= MIB
        return self.seconds - began


def test_before_anything_is_known_there_is_a_cautious_window() -> None:
    assert Bandwidth().window == FIRST_WINDOW_BYTES


def test_a_fast_far_link_is_filled() -> None:
    for delay in (0.001, 0.020, 0.100):
        wan = Emulated(125e6, delay)
        wan.link.answered(delay)
        assert wan.read(1024 * MIB) < (1024 * MIB / 125e6) * 1.05 + 5 * delay
        assert wan.link.rate is not None
        assert 0.9 * 125e6 < wan.link.rate < 1.3 * 125e6


def test_a_slow_link_gets_a_small_window_and_small_fetches() -> None:
    wan = Emulated(1e6, 0.050)
    wan.link.answered(0.050)
    wan.read(64 * MIB)
    assert wan.link.window == MIN_WINDOW_BYTES
    assert wan.link.fetch_bytes == 256 * 1024


def test_what_the_link_once_carried_is_forgotten() -> None:
    wan = Emulated(125e6, 0.020)
    wan.link.answered(0.020)
    wan.read(512 * MIB)
    wan.rate = 2e6
    wan.seconds += 30
    wan.read(64 * MIB)
    assert wan.link.rate is not None
    assert wan.link.rate < 3e6


def test_small_fetches_tell_nothing_of_the_rate() -> None:
    link = Emulated(125e6, 0.020).link
    mark = link.begin()
    link.delivered(mark, 4096)
    assert link.rate is None


@repeatable
@given(st.floats(1e3, 1e11), st.floats(1e-6, 10.0))
def test_the_window_stays_within_its_bounds(rate: float, delay: float) -> None:
    wan = Emulated(rate, delay)
    wan.link.answered(delay)
    wan.send(4 * MIB)
    wan.receive()
    assert MIN_WINDOW_BYTES <= wan.link.window <= MAX_WINDOW_BYTES
    assert wan.link.fetch_bytes <= wan.link.window
