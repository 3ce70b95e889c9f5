"""Readahead within one open file: pure policy, no I/O, never awaits.

Every read either goes on with one of a handle's streams or begins a new one. A stream moves by
steps: a *sequential* one goes on near where it ended, a *strided* one repeats its last step, which
may be negative (a backward reader). A stream that repeats itself is worth a window: a quarter
megabyte at first, doubled with each read up to what the caller allows (the bandwidth-delay product,
site/bandwidth.py). A read that begins a stream asks for nothing: random access costs nothing extra.

The pattern detection follows what Linux does for one stream (mm/readahead.c) and adds several
streams per handle, strides, and what no longer needs to be fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_WINDOW_BYTES = 256 * 1024
MAX_STREAMS = 8
"""Streams of one handle: threads and libraries (HDF5, zip) read a few places in turn."""
_IDLE_READS = 24
"""A stream that so many reads of the handle passed by has ended."""
_OUT_OF_ORDER = 4
"""The kernel keeps several requests of one sequential read under way, and they arrive out of order
by a few: a read this many lengths from where the stream ended still goes on."""
_STEP_TOLERANCE = 4096
"""Reads arrive rounded to pages."""
_STEPS_TO_TRUST = 2
"""Steps alike before a stride is believed; two random offsets always have one."""
_MAX_STEPS_AHEAD = 64

Range = tuple[int, int]
"""[start, end) in bytes."""


@dataclass
class Plan:
    """Ranges to fetch ahead (`wanted`, most urgent first), and those to cancel (`dropped`)."""

    wanted: list[Range] = field(default_factory=list)
    dropped: list[Range] = field(default_factory=list)


class _Stream:
    """Where one reader is. `frontier` is how far its window was asked for already."""

    __slots__ = ("end", "frontier", "hits", "offset", "seen", "step", "steps", "window")

    def __init__(self, offset: int, length: int, step: int, steps: int) -> None:
        self.offset = offset
        self.end = offset + length
        self.step = step
        self.steps = steps
        self.hits = 0
        self.seen = 0
        self.window = 0
        self.frontier = self.end

    @property
    def is_strided(self) -> bool:
        return self.steps >= _STEPS_TO_TRUST

    def continues(self, offset: int, length: int) -> bool:
        """Whether a sequential reader would read here next, or skips ahead within its window."""
        if self.is_strided:
            return False
        slack = _OUT_OF_ORDER * length
        earliest = self.end - slack if self.hits else self.offset
        return earliest <= offset <= max(self.end + slack, self.frontier)

    def repeats(self, offset: int) -> bool:
        return bool(self.step) and abs(self.offset + self.step - offset) <= _STEP_TOLERANCE

    def grow_window(self, limit: int) -> int:
        self.window = min(limit, max(FIRST_WINDOW_BYTES, 2 * self.window))
        return self.window


class Readahead:
    """Recognises the readers of one open file. Offsets and lengths are in bytes."""

    __slots__ = ("_reads", "_streams")

    def __init__(self) -> None:
        self._streams: list[_Stream] = []
        """Most recently read first."""
        self._reads = 0

    def observe(self, offset: int, length: int, limit: int) -> Plan:
        """Take note of a read of [offset, offset + length); return what to fetch ahead.

        No stream may run more than `limit` bytes ahead. Ranges begin beyond what was read and may
        reach beyond the end of the file.
        """
        self._reads += 1
        plan = Plan()
        if stream := self._find_sequential(offset, length):
            self._go_on(stream, offset, length, limit, plan)
        else:
            stream = self._step(offset, length, plan)
            if stream.is_strided:
                self._look_ahead_in_steps(stream, length, limit, plan)
        stream.seen = self._reads
        self._streams.remove(stream)
        self._streams.insert(0, stream)
        self._end_idle(plan)
        return plan

    def _find_sequential(self, offset: int, length: int) -> _Stream | None:
        near = [stream for stream in self._streams if stream.continues(offset, length)]
        return min(near, key=lambda stream: abs(stream.end - offset), default=None)

    def _step(self, offset: int, length: int, plan: Plan) -> _Stream:
        """Return the stream that repeats its step, or a new one: its step from the read before is a
        guess that the next reads confirm or not."""
        before = next((stream for stream in self._streams if stream.repeats(offset)), None)
        if before is not None and before.is_strided:
            before.offset = offset
            before.end = before.frontier = offset + length
            return before
        if before is not None:
            stream = _Stream(offset, length, before.step, before.steps + 1)
        else:
            step = offset - self._streams[0].offset if self._streams else 0
            stream = _Stream(offset, length, step, 0)
        self._streams.insert(0, stream)
        if len(self._streams) > MAX_STREAMS:
            self._drop(self._streams.pop(), plan)
        return stream

    def _go_on(self, stream: _Stream, offset: int, length: int, limit: int, plan: Plan) -> None:
        if offset - stream.end > _OUT_OF_ORDER * length:  # skipped a part of what was asked for
            plan.dropped.append((stream.end, offset))
        is_exact = offset == stream.end
        stream.hits += 1
        stream.step = stream.steps = 0
        stream.offset = offset
        stream.end = max(stream.end, offset + length)
        if stream.hits == 1 and not is_exact:
            return  # near by chance, perhaps
        window = stream.grow_window(limit)
        start = max(stream.end, stream.frontier)
        end = stream.end + window
        if end - start < window // 4 and stream.frontier > stream.end:
            return  # ask in pieces worth a request
        stream.frontier = max(stream.frontier, end)
        if start < end:
            plan.wanted.append((start, end))

    def _look_ahead_in_steps(self, stream: _Stream, length: int, limit: int, plan: Plan) -> None:
        stream.window = min(_MAX_STEPS_AHEAD, max(1, 2 * stream.window), limit // max(1, length))
        for number in range(1, stream.window + 1):
            start = stream.offset + number * stream.step
            if start < 0:
                break
            plan.wanted.append((start, start + length))

    def _end_idle(self, plan: Plan) -> None:
        while self._reads - self._streams[-1].seen > _IDLE_READS:
            self._drop(self._streams.pop(), plan)

    def _drop(self, stream: _Stream, plan: Plan) -> None:
        if stream.frontier > stream.end:
            plan.dropped.append((stream.end, stream.frontier))
