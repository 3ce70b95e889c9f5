"""The limit of transfers (remotes/rate.py), on a clock of the test's own."""

from __future__ import annotations

import asyncio

from hypothesis import given, strategies as st

from hpcfs.remotes import life
from hpcfs.remotes.rate import BURST_SECONDS, TELL_SECONDS, RateLimit


class Told:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(
    st.lists(st.tuples(st.integers(1, 4_000_000), st.floats(0, 3)), min_size=1, max_size=40),
    st.integers(64_000, 50_000_000),
)
def test_no_more_passes_than_may(takes: list[tuple[int, float]], rate: int) -> None:
    """At any time: what was let pass before this piece fits the rate, but for a burst."""

    async def run() -> None:
        told = Told()
        limit = RateLimit(rate, told, told.sleep)
        began, passed = told.now, 0
        for size, pause in takes:
            told.now += pause
            await limit.take(size)
            assert passed <= rate * (told.now - began + BURST_SECONDS) * 1.001 + 1
            passed += size

    asyncio.run(run())


def test_the_rate_is_reached() -> None:
    async def run() -> float:
        told = Told()
        limit = RateLimit(1_000_000, told, told.sleep)
        for _ in range(101):
            await limit.take(100_000)
        return told.now - 100.0

    assert 9.5 <= asyncio.run(run()) <= 10.5


def test_without_a_limit_nothing_waits() -> None:
    async def run() -> float:
        told = Told()
        limit = RateLimit(0, told, told.sleep)
        await limit.take(10**12)
        return told.now

    assert asyncio.run(run()) == 100.0


def test_who_waits_long_is_alive() -> None:
    async def run() -> int:
        told = Told()
        limit = RateLimit(100_000, told, told.sleep)
        signs: list[None] = []
        with life.reported_to(lambda: signs.append(None)):
            await limit.take(4_000_000)
            await limit.take(1)
        return len(signs)

    assert asyncio.run(run()) >= 40 / TELL_SECONDS - 1
