"""Who comes to a tunnel's port: what strangers are allowed, and how long a mount is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from hpcfs.rendezvous import stream as streams
from hpcfs.rendezvous.stream import ID_BYTES, NEW_STREAM, OPENING, Stream
from hpcfs.tunnel import acceptor as acceptors
from hpcfs.tunnel.acceptor import Acceptor, Incoming, Kind

ASK = streams.HEAD.pack(streams.ASK, 0)


class Pipe:
    def __init__(self) -> None:
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True


class Tunnel:
    """An acceptor, and what came to it."""

    def __init__(self) -> None:
        self.acceptor = Acceptor("f" * 32, self._arrived)
        self.streams: list[Stream] = []

    def _arrived(self, stream: Stream, _: Kind) -> None:
        self.streams.append(stream)

    def connect(self, kind: Kind = "tcp") -> tuple[Pipe, Incoming]:
        pipe = Pipe()
        return pipe, self.acceptor.pipe(pipe, kind)

    def open(self, stream_id: bytes = NEW_STREAM, seen: int = 0) -> tuple[Pipe, Incoming]:
        pipe, incoming = self.connect()
        incoming.received(OPENING.pack(stream_id, seen))
        return pipe, incoming

    def proved(self) -> tuple[Pipe, Incoming, Stream]:
        pipe, incoming = self.open()
        self.acceptor.keep(self.streams[-1])
        return pipe, incoming, self.streams[-1]


def answered(pipe: Pipe) -> tuple[bytes, int]:
    greeting = streams.GREETING + b"f" * 32 + b"\n"
    assert pipe.written.startswith(greeting)
    found: tuple[bytes, int] = OPENING.unpack(pipe.written[len(greeting) :][: OPENING.size])
    return found


def in_loop(story: Callable[[Tunnel], Coroutine[object, object, None]]) -> None:
    async def main() -> None:
        tunnel = Tunnel()
        await story(tunnel)
        tunnel.acceptor.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - timers tell nobody
            await asyncio.sleep(0.01)


def test_who_says_nothing_or_proves_nothing_has_little_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptors, "STRANGER_SECONDS", 0.1)

    async def story(tunnel: Tunnel) -> None:
        silent, _ = tunnel.connect()
        half, incoming = tunnel.connect()
        incoming.received(b"\0" * (OPENING.size - 1))
        opened, _ = tunnel.open()
        kept, _, stream = tunnel.proved()
        await until(lambda: silent.closed and half.closed and opened.closed)
        assert tunnel.streams[0].ended
        assert not kept.closed
        assert not stream.ended

    in_loop(story)


def test_those_who_wait_keep_nobody_out() -> None:
    async def story(tunnel: Tunnel) -> None:
        crowd = [tunnel.connect()[0] for _ in range(acceptors.MAX_STRANGERS)]
        pipe, _, stream = tunnel.proved()
        assert [waiting.closed for waiting in crowd] == [True] + [False] * (len(crowd) - 1)
        more = [tunnel.open()[0] for _ in range(acceptors.MAX_STRANGERS)]
        assert all(waiting.closed for waiting in crowd)
        assert not any(waiting.closed for waiting in (pipe, *more[1:]))
        assert not stream.ended

    in_loop(story)


def test_a_stranger_says_little() -> None:
    async def story(tunnel: Tunnel) -> None:
        pipe, incoming = tunnel.open()
        for _ in range(acceptors.MAX_STRANGER_BYTES):
            incoming.received(ASK)
        assert pipe.closed
        assert tunnel.streams[0].ended
        assert len(pipe.written) < 5 * acceptors.MAX_STRANGER_BYTES
        known, incoming, _ = tunnel.proved()
        for _ in range(acceptors.MAX_STRANGER_BYTES):
            incoming.received(ASK)
        assert not known.closed

    in_loop(story)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 100, bytes(99)]
)
def test_garbage_ends_a_connection(garbage: bytes) -> None:
    async def story(tunnel: Tunnel) -> None:
        pipe, incoming = tunnel.connect()
        for number in garbage:
            incoming.received(bytes([number]))
        assert pipe.closed
        incoming.received(garbage)
        assert all(stream.ended for stream in tunnel.streams)

    in_loop(story)


def test_nobody_else_goes_on_with_a_stream() -> None:
    """Not with an id that was guessed, from another kind of place, before the client of it has
    proved itself, or with counts that can't be."""

    async def story(tunnel: Tunnel) -> None:
        stranger, _ = tunnel.open()
        (unproved,) = tunnel.streams
        mounts, _, stream = tunnel.proved()
        for wanted in (b"x" * ID_BYTES, unproved.id):
            pipe, _ = tunnel.open(wanted)
            assert (answered(pipe), pipe.closed) == ((NEW_STREAM, 0), True)
        pipe, incoming = tunnel.connect("unix")
        incoming.received(OPENING.pack(stream.id, 0))
        assert (answered(pipe), pipe.closed) == ((NEW_STREAM, 0), True)
        pipe, _ = tunnel.open(stream.id, seen=1)
        assert pipe.closed
        assert stream.is_on(mounts)
        assert not mounts.closed
        assert not stranger.closed

    in_loop(story)


def test_what_is_late_on_the_old_pipe_is_not_read_twice() -> None:
    """It comes again on the new one."""

    async def story(tunnel: Tunnel) -> None:
        _, old, stream = tunnel.proved()
        heard = bytearray()
        stream.listen(heard.extend, lambda reason: None)
        _, new = tunnel.open(stream.id)
        data = streams.HEAD.pack(streams.DATA, 5) + b"hello"
        old.received(data)
        new.received(data)
        old.received(data)
        assert heard == b"hello"
        assert stream.received == 5
        old.lost()
        assert stream.attached

    in_loop(story)


def test_a_mount_that_is_there_is_kept_and_one_that_vanished_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection of neither breaks; who is there answers when asked."""
    monkeypatch.setattr(acceptors, "WAIT_SECONDS", 0.4)

    async def story(tunnel: Tunnel) -> None:
        there, incoming, stream = tunnel.proved()
        vanished, _, gone = tunnel.proved()
        asked = 0
        while asked < 3:
            await asyncio.sleep(0.01)
            if there.written.endswith(ASK):
                there.written.clear()
                asked += 1
                incoming.received(streams.HEAD.pack(streams.SEEN, 0) + bytes(8))
        assert gone.ended
        assert vanished.closed
        assert not stream.ended

    in_loop(story)


def test_a_stream_waits_for_its_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptors, "WAIT_SECONDS", 0.2)

    async def story(tunnel: Tunnel) -> None:
        _, incoming, stream = tunnel.proved()
        incoming.lost()
        pipe, incoming = tunnel.open(stream.id)
        assert answered(pipe) == (stream.id, 0)
        incoming.lost()
        assert not stream.ended
        await until(lambda: stream.ended)
        pipe, _ = tunnel.open(stream.id)
        assert answered(pipe) == (NEW_STREAM, 0)

    in_loop(story)
