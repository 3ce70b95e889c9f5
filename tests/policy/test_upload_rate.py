"""How fast uploads go now."""

from __future__ import annotations

from hypothesis import given, strategies as st

from hpcfs.site.namespace import RATE_SECONDS, UploadRate


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 10**6)), max_size=50))
def test_what_came_in_the_last_seconds_counts(steps: list[tuple[float, int]]) -> None:
    clock = 0.0
    meter = UploadRate(lambda: clock)
    for pause, count in steps:
        clock += pause
        meter.add(count)
    assert meter.total == sum(count for _, count in steps)
    assert 0 <= meter.rate() * RATE_SECONDS <= meter.total + 1e-6
    clock += RATE_SECONDS + 1
    assert meter.rate() == 0


def test_a_steady_rate_is_shown_as_it_is() -> None:
    clock = 0.0
    meter = UploadRate(lambda: clock)
    for _ in range(1000):
        clock += 0.01
        meter.add(10_000)
    assert abs(meter.rate() - 1_000_000) < 100_000
