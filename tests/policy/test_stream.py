"""A byte stream over pipes that break at any byte: nothing is lost, doubled or out of order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from hpcfs.tunnel import stream as streams
from hpcfs.tunnel.stream import ProtocolViolation, TunnelStream

ID = b"0123456789abcdef"
SIZES = st.one_of(st.integers(1, 300), st.integers(1, 2 * streams.FRAME_BYTES + 1))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.booleans(), SIZES),
        st.tuples(st.just("deliver"), st.booleans(), st.integers(0, 3 * streams.FRAME_BYTES)),
        st.tuples(st.just("cut"), st.booleans(), st.just(0)),
    ),
    max_size=40,
)


class Wire:
    """What one end wrote and the other one has not got yet."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        self.bytes += data

    def close(self) -> None:
        self.closed = True

    def take(self, count: int) -> bytes:
        taken = bytes(self.bytes[:count])
        del self.bytes[:count]
        return taken


class End:
    def __init__(self) -> None:
        self.stream = TunnelStream(ID)
        self.wire = Wire()
        self.written = bytearray()
        self.came = bytearray()
        self.endings: list[str] = []
        self.stream.listen(self.came.extend, self.endings.append)
        self._next = 0

    def write(self, size: int) -> None:
        data = bytes((self._next + i * 7) % 251 for i in range(size % 1000)) * (size // 1000 + 1)
        self._next += 1
        self.written += data
        self.stream.write(data)


def join(one: End, other: End) -> None:
    """Each learns what the other one has, as they do on a new pipe."""
    has = one.stream.received, other.stream.received
    one.wire, other.wire = Wire(), Wire()
    one.stream.attach(one.wire, has[1])
    other.stream.attach(other.wire, has[0])


def deliver(source: End, target: End, count: int) -> None:
    target.stream.feed(source.wire.take(count))


def settle(one: End, other: End) -> None:
    one.stream.ask()
    other.stream.ask()
    while one.wire.bytes or other.wire.bytes:
        deliver(one, other, len(one.wire.bytes))
        deliver(other, one, len(other.wire.bytes))


@given(STEPS)
def test_what_is_written_comes_once_and_in_order(steps: list[tuple[str, bool, int]]) -> None:
    ends = End(), End()
    join(*ends)
    for what, first, number in steps:
        one, other = ends if first else ends[::-1]
        match what:
            case "write":
                one.write(number)
            case "deliver":
                deliver(one, other, number)
            case "cut":
                join(*ends)  # what was on the wires is gone
    settle(*ends)
    for one, other in (ends, ends[::-1]):
        assert one.came == other.written
        assert one.stream.unacknowledged == 0


def test_what_is_written_without_a_pipe_goes_with_the_next() -> None:
    ends = End(), End()
    ends[0].write(1234)
    join(*ends)
    ends[0].stream.detach(ends[0].wire)
    assert not ends[0].stream.attached
    ends[0].write(99)
    join(*ends)
    settle(*ends)
    assert ends[1].came == ends[0].written


def test_who_waits_for_room_hears_of_it_when_the_next_pipe_tells() -> None:
    """All had come, and only the word of it was lost."""
    ends = End(), End()
    join(*ends)
    rooms: list[int] = []
    ends[0].stream.on_acknowledged.append(lambda: rooms.append(ends[0].stream.unacknowledged))
    ends[0].write(1000)
    deliver(*ends, 10_000)
    assert not rooms
    join(*ends)
    assert rooms == [0]


def test_what_comes_early_waits_for_a_listener() -> None:
    ends = End(), End()
    join(*ends)
    ends[1].stream.stop_listening(b"put back,")
    ends[0].stream.write(b" early,")
    ends[0].stream.close()
    deliver(ends[0], ends[1], 100)
    heard, endings = bytearray(), list[str]()
    ends[1].stream.listen(heard.extend, endings.append)
    assert heard == b"put back, early,"
    assert endings == [""]


def test_a_newer_pipe_closes_the_older() -> None:
    ends = End(), End()
    join(*ends)
    old = ends[0].wire
    join(*ends)
    assert old.closed
    ends[0].stream.detach(old)  # its end is heard of late
    assert ends[0].stream.attached


def test_the_end_is_told_once() -> None:
    ends = End(), End()
    join(*ends)
    ends[0].write(10)
    ends[0].stream.close()
    deliver(ends[0], ends[1], 10_000)
    assert ends[1].came == ends[0].written
    assert ends[0].endings == ends[1].endings == [""]
    ends[1].stream.write(b"too late")
    ends[1].stream.end("again")
    assert ends[1].endings == [""]


def test_an_end_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_UNACKNOWLEDGED_BYTES", 1000)
    ends = End(), End()
    join(*ends)
    ends[0].stream.write(bytes(1000))
    assert not ends[0].endings
    ends[0].stream.write(bytes(1))
    assert len(ends[0].endings) == 1


@pytest.mark.parametrize("seen", [-1, 11, 2**63])
def test_nobody_can_have_what_was_not_sent(seen: int) -> None:
    end = End()
    end.stream.write(bytes(10))
    with pytest.raises(ProtocolViolation):
        end.stream.attach(end.wire, seen)


@given(st.binary(min_size=1, max_size=200))
def test_nonsense_is_refused_or_ignored(data: bytes) -> None:
    """Whatever comes: no other exception, and no memory for lengths that are only claimed."""
    end = End()
    end.stream.attach(end.wire, 0)
    try:
        end.stream.feed(data)
    except ProtocolViolation:
        return
    assert len(end.came) <= len(data)


def test_who_asks_without_end_is_not_answered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be reading, and nothing says that an answer came. On a new pipe it may ask at
    once."""
    now = 100.0
    monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: now))
    answer = streams.HEAD.size + 8
    asking = streams.HEAD.pack(streams.ASK, 0) * 10_000
    end = End()
    end.stream.attach(end.wire, 0)
    for seconds in range(3):
        now += seconds
        end.stream.feed(asking)
        assert len(end.wire.take(10**9)) == answer
    end.stream.detach(end.wire)
    end.stream.attach(end.wire, 0)
    end.stream.feed(asking)
    assert len(end.wire.bytes) == answer
