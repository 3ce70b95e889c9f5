"""Who comes to a tunnel's port: what strangers are allowed, and how long a mount is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace

import pytest

from hpcfs.laptop import acceptor as acceptors, strangers
from hpcfs.laptop.acceptor import Acceptor, EndpointKind, Incoming
from hpcfs.tunnel import stream as streams
from hpcfs.tunnel.knock import KNOCK_BYTES, NONCE_BYTES, SEALED_BYTES, TunnelHandshake
from hpcfs.tunnel.stream import ID_BYTES, NEW_STREAM, TunnelStream

DOOR = TunnelHandshake("f" * 32, "5" * 64)
NONCE = b"n" * NONCE_BYTES
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
        self.acceptor = Acceptor(DOOR, self._arrived)
        self.streams: list[TunnelStream] = []

    def _arrived(self, stream: TunnelStream, _: EndpointKind) -> None:
        self.streams.append(stream)

    def connect(self, kind: EndpointKind = "tcp") -> tuple[Pipe, Incoming]:
        pipe = Pipe()
        return pipe, self.acceptor.pipe(pipe, kind)

    def open(
        self, stream_id: bytes = NEW_STREAM, seen: int = 0, kind: EndpointKind = "tcp"
    ) -> tuple[Pipe, Incoming]:
        pipe, incoming = self.connect(kind)
        incoming.received(knock(pipe, stream_id, seen))
        return pipe, incoming

    def proved(self) -> tuple[Pipe, Incoming, TunnelStream]:
        pipe, incoming = self.open()
        self.acceptor.keep(self.streams[-1])
        return pipe, incoming, self.streams[-1]


def nonces(pipe: Pipe) -> bytes:
    return DOOR.nonce_in(bytes(pipe.written).partition(b"\n")[0]) + NONCE


def knock(
    pipe: Pipe, stream_id: bytes = NEW_STREAM, seen: int = 0, handshake: TunnelHandshake = DOOR
) -> bytes:
    """What a mount says that has read the greeting on this pipe."""
    return NONCE + handshake.seal(b"client", nonces(pipe), stream_id, seen)


def answered(pipe: Pipe) -> tuple[bytes, int]:
    sealed = bytes(pipe.written).partition(b"\n")[2][:SEALED_BYTES]
    return DOOR.unseal(b"server", nonces(pipe), sealed)


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
    monkeypatch.setattr(strangers, "SECONDS", 0.1)

    async def story(tunnel: Tunnel) -> None:
        silent, _ = tunnel.connect()
        half, incoming = tunnel.connect()
        incoming.received(knock(half)[:-1])
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
        more = [tunnel.open()[0] for _ in range(acceptors.MAX_PROVING + 1)]
        assert [waiting.closed for waiting in more] == [True] + [False] * (len(more) - 1)
        assert not any(waiting.closed for waiting in (pipe, *crowd[1:]))
        assert not stream.ended

    in_loop(story)


def test_of_a_flood_some_are_admitted_as_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that comes again and again is soon among them, and what is done for all others does
    not depend on how many they are."""
    now = 100.0
    monkeypatch.setattr(strangers, "time", SimpleNamespace(monotonic=lambda: now))
    rate = int(acceptors.ADMITTED_PER_SECOND)

    async def story(tunnel: Tunnel) -> None:
        nonlocal now
        crowd = [tunnel.acceptor.has_room() for _ in range(3 * rate)]
        assert crowd == [True] * rate + [False] * 2 * rate
        admitted = 0
        for _ in range(20):
            now += 0.05
            admitted += sum(tunnel.acceptor.has_room() for _ in range(rate))
        assert rate - 1 <= admitted <= rate
        now += 3600
        assert sum(tunnel.acceptor.has_room() for _ in range(3 * rate)) == rate

    in_loop(story)


def test_a_flood_takes_few_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def story(tunnel: Tunnel) -> None:
        for _ in range(acceptors.MAX_STRANGERS):
            _, incoming = tunnel.connect()
            incoming.received(bytes(KNOCK_BYTES))
            tunnel.connect()
            tunnel.connect()

    in_loop(story)
    assert [record.getMessage() for record in caplog.records] == [
        "strangers at the tunnel's port, sent away: 1",
        f"strangers at the tunnel's port, sent away: {2 * acceptors.MAX_STRANGERS - 1}",
    ]


@pytest.mark.parametrize(
    "handshake",
    [TunnelHandshake("f" * 32, "6" * 64), TunnelHandshake("e" * 32, "5" * 64)],
    ids=["another secret", "another tunnel"],
)
def test_who_does_not_know_the_secret_begins_nothing(handshake: TunnelHandshake) -> None:
    """No stream, and so no SSH connection, is made for who guesses, or says again what a mount
    said."""

    async def story(tunnel: Tunnel) -> None:
        pipe, incoming = tunnel.connect()
        said = knock(pipe)
        incoming.received(said)
        assert len(tunnel.streams) == 1
        again, incoming = tunnel.connect()
        greeting = bytes(again.written)
        incoming.received(said)
        guessing, incoming = tunnel.connect()
        incoming.received(knock(guessing)[:NONCE_BYTES] + bytes(SEALED_BYTES))
        wrong, incoming = tunnel.connect()
        incoming.received(
            NONCE + handshake.seal(b"client", nonces(wrong), NEW_STREAM, 0),
        )
        assert (again.closed, guessing.closed, wrong.closed) == (True, True, True)
        assert bytes(again.written) == greeting
        assert len(tunnel.streams) == 1

    in_loop(story)


def test_streams_are_not_made_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptors, "MAX_STREAMS", 3)

    async def story(tunnel: Tunnel) -> None:
        kept = [tunnel.proved() for _ in range(3)]
        pipe, _ = tunnel.open()
        assert (answered(pipe), pipe.closed) == ((NEW_STREAM, 0), True)
        _, incoming, stream = kept[0]
        incoming.lost()
        pipe, _ = tunnel.open(stream.id)
        assert answered(pipe) == (stream.id, 0)

    in_loop(story)


def test_a_stranger_says_little() -> None:
    async def story(tunnel: Tunnel) -> None:
        pipe, incoming = tunnel.open()
        for _ in range(acceptors.MAX_PROVING_BYTES):
            incoming.received(ASK)
        assert pipe.closed
        assert tunnel.streams[0].ended
        assert len(pipe.written) < 5 * acceptors.MAX_PROVING_BYTES
        known, incoming, _ = tunnel.proved()
        for _ in range(acceptors.MAX_PROVING_BYTES):
            incoming.received(ASK)
        assert not known.closed

    in_loop(story)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\nAccept: */*" + b"\r\n" * 50, b"\xff" * 100, bytes(99)],
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
        pipe, _ = tunnel.open(stream.id, kind="unix")
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
