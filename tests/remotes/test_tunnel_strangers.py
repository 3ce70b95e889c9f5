"""Others at a tunnel's port: those who flood it, and those who listen in its place."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import uvloop

from hpcfs.laptop.shares import Share
from hpcfs.model.sites import SftpRoot, SiteSpec, TunnelSite
from hpcfs.remotes.tunnel import line, pipe
from hpcfs.remotes.tunnel.line import Line, Pulse, RendezvousFile
from hpcfs.remotes.tunnel.site import TunnelSiteConnection
from hpcfs.tunnel.file import TcpEndpoint
from hpcfs.tunnel.knock import GREETING, KNOCK_BYTES, SEALED_BYTES
from tests.support.laptop import NAME, Laptop, laptop
from tests.support.tunnels import LoginNode, login_node, make_laptop, running

FLOOD_PER_SECOND = 2000
OUT_SECONDS = 2.0
"""A mount is kept out for no longer."""
NO_SOCKETS = "AllowStreamLocalForwarding no"

FLOOD = """
import collections, socket, sys, time
port, rate, words = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
held, made, began = collections.deque(), 0, time.monotonic()
print("begun", flush=True)
while True:
    now = time.monotonic()
    while made < (now - began) * rate:
        made += 1
        stranger = socket.socket()
        stranger.setblocking(False)
        try:
            stranger.connect(("127.0.0.1", port))
        except BlockingIOError:
            pass
        try:
            stranger.send(words)
        except OSError:
            pass
        held.append((now, stranger, made))
    while held and held[0][0] < now - 0.5:
        held.popleft()[1].close()
    time.sleep(0.002)
"""


@contextmanager
def flood(place: TcpEndpoint, words: bytes) -> Iterator[None]:
    command = [sys.executable, "-c", FLOOD, str(place.port), str(FLOOD_PER_SECOND), words.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize("words", [b"", bytes(24), b"\xff" * 200], ids=["silent", "old", "noise"])
def test_a_flood_keeps_no_mount_out(tmp_path: Path, words: bytes) -> None:
    """Neither one that comes, nor one that was there."""

    async def mount(node: LoginNode) -> TunnelSiteConnection:
        site = TunnelSiteConnection(
            SiteSpec(
                TunnelSite(NAME, str(node.tunnels)), {"ns": SftpRoot("data")}, str(tmp_path), 1, 1
            )
        )
        await site.remote("ns").connect()
        return site

    async def main(node: LoginNode) -> None:
        async with running(node):
            (place,) = node.rendezvous().places
            assert isinstance(place, TcpEndpoint)
            first = await mount(node)
            with flood(place, words):
                await asyncio.sleep(1)
                for _ in range(3):
                    began = time.monotonic()
                    site = await mount(node)
                    assert time.monotonic() - began < OUT_SECONDS
                    await site.close()
                    began = time.monotonic()
                    await first.remote("ns").stat(b"file")
                    assert time.monotonic() - began < OUT_SECONDS
            await first.close()

    with login_node(tmp_path, NO_SOCKETS) as node:
        (node.server.root / "file").write_bytes(b"content")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(node))


# --- who listens in its place ---------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what strangers do tells nobody
            await asyncio.sleep(0.01)


class Squatter(asyncio.Protocol):
    """Says what the tunnel said when it was there, then `answer`; hears what mounts say."""

    def __init__(self, greeting: bytes, answer: bytes, heard: list[bytearray]) -> None:
        self._greeting = greeting
        self._answer = answer
        self._heard = bytearray()
        heard.append(self._heard)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._greeting)

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if len(self._heard) == KNOCK_BYTES:
            self._transport.write(self._answer)


@asynccontextmanager
async def squatted(port: int, greeting: bytes, answer: bytes) -> AsyncIterator[list[bytearray]]:
    heard: list[bytearray] = []
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        while True:
            try:
                server = await loop.create_server(
                    lambda: Squatter(greeting, answer, heard), "127.0.0.1", port
                )
                break
            except OSError:  # sshd has not heard yet that the tunnel is dead
                await asyncio.sleep(0.01)
    try:
        yield heard
    finally:
        server.close()
        await server.wait_closed()


def said_to_strangers(place: TcpEndpoint) -> bytes:
    with socket.create_connection((place.host, place.port)) as stranger:
        found = b""
        while not found.endswith(b"\n"):
            found += stranger.recv(1000)
        return found


def place_of(running: Laptop) -> TcpEndpoint:
    (place,) = RendezvousFile(running.directory, NAME).read().places
    assert isinstance(place, TcpEndpoint)
    return place


@pytest.mark.parametrize(
    "answer",
    [b"", bytes(24), bytes(SEALED_BYTES), os.urandom(SEALED_BYTES)],
    ids=["silence", "no such stream", "zeros", "noise"],
)
def test_who_takes_the_port_is_neither_told_nor_believed(
    tmp_path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream, and what is open on it, goes on when the tunnel is back."""
    monkeypatch.setattr(line, "CROWD_SECONDS", 0.2)
    monkeypatch.setattr(pipe, "PLACE_SECONDS", 0.3)
    (tmp_path / "data").mkdir()

    async def story(running: Laptop) -> None:
        place = place_of(running)
        greeting = said_to_strangers(place)
        found = await Line.open(RendezvousFile(running.directory, NAME), Pulse())
        stream_id = found.stream.id
        running.call(lambda: running.acceptor.keep(running.acceptor._proving.all()[0].stream))
        await asyncio.to_thread(running.deafen)
        async with squatted(place.port, greeting, answer) as heard:
            await until(lambda: [len(words) for words in heard[:2]] == [KNOCK_BYTES] * 2)
        assert stream_id not in b"".join(heard)
        assert not found.stream.ended
        await asyncio.to_thread(running.listen)
        await until(lambda: bool(found.stream.attached and running.connections))
        assert found.stream.id == stream_id
        await found.close()

    with laptop(tmp_path, Share("data", tmp_path / "data"), kind="tcp") as running:
        asyncio.run(story(running))


def test_who_takes_the_port_of_a_dead_tunnel_does_not_keep_its_name(tmp_path: Path) -> None:
    with login_node(tmp_path / "node", NO_SOCKETS) as node:
        home = make_laptop(tmp_path / "laptop", node)
        process = home.start_tunnel()
        home.wait_until_up()
        stale = node.rendezvous()
        (place,) = stale.places
        assert isinstance(place, TcpEndpoint)
        greeting = said_to_strangers(place)
        assert greeting.startswith(GREETING + stale.id.encode())
        process.kill()
        process.communicate()

        async def main() -> None:
            async with squatted(place.port, greeting, bytes(SEALED_BYTES)) as heard:
                async with running(node):
                    assert node.rendezvous().id != stale.id
                assert [len(words) for words in heard] == [KNOCK_BYTES]

        asyncio.run(main())
