"""Who gets into a laptop's shares: who has the key of this run of the tunnel, for files only."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh
import msgspec
import pytest

from hpcfs.laptop import connected_mounts
from hpcfs.laptop.acceptor import EndpointKind
from hpcfs.laptop.shares import Share
from hpcfs.remotes.tunnel.line import Line, Pulse, RendezvousFile
from hpcfs.tunnel.file import UnixEndpoint, read
from hpcfs.tunnel.proof import (
    NONCE_BYTES,
    SESSION_BYTES,
    Challenge,
    ClientProof,
    HandshakeMessages,
    NotProved,
    ServerProof,
    prove_as_client,
    prove_as_server,
)
from hpcfs.tunnel.pump import socket_of
from hpcfs.tunnel.stream import TunnelStream
from tests.support.command import REPOSITORY
from tests.support.laptop import NAME, Laptop, laptop

SESSION = b"s" * SESSION_BYTES
ALGORITHM = b"ssh-ed25519"


@pytest.fixture
def share(tmp_path: Path) -> Share:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(b"content")
    return Share("data", tmp_path / "data")


@pytest.fixture
def unix(tmp_path: Path, share: Share) -> Iterator[Laptop]:
    with laptop(tmp_path, share, kind="unix") as running:
        yield running


@pytest.fixture
def tcp(tmp_path: Path, share: Share) -> Iterator[Laptop]:
    with laptop(tmp_path, share, kind="tcp") as running:
        yield running


@asynccontextmanager
async def line_to(running: Laptop) -> AsyncIterator[Line]:
    line = await Line.open(RendezvousFile(running.directory, NAME), Pulse())
    try:
        yield line
    finally:
        await line.close()


def run(story: Coroutine[Any, Any, object]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def settled(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def nobody_is_in(running: Laptop) -> bool:
    return not running.call(lambda: running.mounts.all)


# --- the proof ------------------------------------------------------------------------------------


async def until_ended(stream: TunnelStream) -> None:
    ended = asyncio.Event()
    stream.listen(lambda data: None, lambda reason: ended.set())
    async with asyncio.timeout(5):
        await ended.wait()


def said(running: Laptop, challenge: Challenge, nonce: bytes, session: bytes) -> bytes:
    tunnel = bytes.fromhex(running.identity.id)
    return b" of hpcfs tunnel " + tunnel + challenge.nonce + nonce + session


def test_who_has_the_keys_is_let_in(unix: Laptop) -> None:
    async def story() -> None:
        async with line_to(unix) as line:
            await prove_as_client(
                line.stream,
                bytes.fromhex(unix.identity.id),
                unix.identity.client_key,
                unix.identity.host_key.convert_to_public(),
                session=SESSION,
                host="a\nnode\x1b[2J" + "x" * 1000,
            )
            (mount,) = unix.call(lambda: unix.mounts.all)
            assert mount.host.startswith("anode[2Jxxx")
            assert len(mount.host) <= 100

    run(story())


Forge = Callable[[Laptop, Challenge], bytes]
NONCE = b"n" * NONCE_BYTES


def letter(signature: bytes, nonce: bytes = NONCE, session: bytes = SESSION) -> bytes:
    return msgspec.msgpack.encode(ClientProof(nonce, session, "host", signature))


def signed(running: Laptop, challenge: Challenge, who: bytes, key: asyncssh.SSHKey) -> bytes:
    return key.sign(who + said(running, challenge, NONCE, SESSION), ALGORITHM)


def _of_another_tunnel(running: Laptop, challenge: Challenge) -> bytes:
    key = asyncssh.generate_private_key("ssh-ed25519")
    return letter(signed(running, challenge, b"client", key))


def _of_the_server(running: Laptop, challenge: Challenge) -> bytes:
    return letter(signed(running, challenge, b"client", running.identity.host_key))


def _meant_for_a_server(running: Laptop, challenge: Challenge) -> bytes:
    return letter(signed(running, challenge, b"server", running.identity.client_key))


def _of_an_older_challenge(running: Laptop, challenge: Challenge) -> bytes:
    older = Challenge(b"o" * NONCE_BYTES)
    return letter(signed(running, older, b"client", running.identity.client_key))


def _of_another_session(running: Laptop, challenge: Challenge) -> bytes:
    good = signed(running, challenge, b"client", running.identity.client_key)
    return letter(good, session=b"t" * SESSION_BYTES)


def _shifted(running: Laptop, challenge: Challenge) -> bytes:
    """The same bytes, parted elsewhere."""
    good = signed(running, challenge, b"client", running.identity.client_key)
    return letter(good, nonce=NONCE[:-1], session=NONCE[-1:] + SESSION)


FORGED: dict[str, Forge] = {
    "another tunnel's key": _of_another_tunnel,
    "the server's key": _of_the_server,
    "a server's words": _meant_for_a_server,
    "replayed": _of_an_older_challenge,
    "of another session": _of_another_session,
    "shifted": _shifted,
    "no signature": lambda *_: letter(b""),
    "half a signature": lambda *_: letter(struct.pack(">I", 11) + ALGORITHM),
    "an RSA signature": lambda *_: letter(struct.pack(">I", 7) + b"ssh-rsa" + bytes(4)),
    "nothing": lambda *_: b"",
    "another letter": lambda *_: msgspec.msgpack.encode(Challenge(NONCE)),
    "the challenge": lambda _, challenge: msgspec.msgpack.encode(challenge),
    "no text": lambda *_: b"\x84\xa4host\xa2\xff\xff",
    "endless depth": lambda *_: b"\x82\xa2zz" + b"\x91" * 60_000,
    "noise": lambda *_: secrets.token_bytes(1000),
}


@pytest.mark.parametrize("forged", FORGED)
def test_who_has_not_is_not(unix: Laptop, forged: str, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with line_to(unix) as line:
            letters = HandshakeMessages(line.stream)
            challenge = await letters.receive(Challenge)
            body = FORGED[forged](unix, challenge)
            line.stream.write(struct.pack(">H", len(body)) + body)
            with pytest.raises(NotProved):
                await letters.receive(ServerProof)
            await until_ended(line.stream)

    run(story())
    assert nobody_is_in(unix)
    (problem,) = [record for record in caplog.records if record.levelname != "INFO"]
    assert "not let in" in problem.getMessage()


def test_a_server_without_the_tunnels_key_is_left() -> None:
    """Though it passes on what the true one asked: it would have to sign the client's nonce."""
    client, host, other = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(3))
    tunnel = secrets.token_bytes(16)

    class Wire:
        def __init__(self, to: TunnelStream) -> None:
            self.to = to

        def write(self, data: bytes) -> None:
            asyncio.get_running_loop().call_soon(self.to.feed, data)

        def close(self) -> None:
            """Nothing to do."""

    async def meet(key: asyncssh.SSHKey) -> None:
        here, there = TunnelStream(b"a" * 16), TunnelStream(b"a" * 16)
        here.attach(Wire(there), 0)
        there.attach(Wire(here), 0)
        serving = asyncio.create_task(
            prove_as_server(there, tunnel, key, client.convert_to_public())
        )
        await prove_as_client(
            here, tunnel, client, host.convert_to_public(), session=SESSION, host="h"
        )
        await serving

    run(meet(host))
    with pytest.raises(NotProved, match="has not the key"):
        run(meet(other))


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_noise_on_the_port_harms_nobody(
    kind: EndpointKind, tmp_path: Path, share: Share, caplog: pytest.LogCaptureFixture
) -> None:
    beginnings = [b"", bytes(24), bytes(24) + b"D\0\0\x13\x88", b"GET / HTTP/1.1\r\n"]
    beginnings.append(bytes(24) + b"D\0\0\x13\x88SSH-2.0-x\r\n\0\0\x0f\0")
    with laptop(tmp_path, share, kind=kind) as running:
        before = len(os.listdir("/proc/self/fd"))
        (place,) = read(running.directory, NAME).places
        for beginning in beginnings * 5:
            unix = isinstance(place, UnixEndpoint)
            with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as sock:
                sock.connect(
                    place.path if isinstance(place, UnixEndpoint) else (place.host, place.port)
                )
                with suppress(ConnectionError):
                    sock.sendall(beginning + os.urandom(5000))
        assert settled(lambda: not running.connections)
        assert settled(lambda: len(os.listdir("/proc/self/fd")) <= before)
        assert nobody_is_in(running)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- over TCP -------------------------------------------------------------------------------------


@asynccontextmanager
async def ssh_to(running: Laptop, **options: Any) -> AsyncIterator[asyncssh.SSHClientConnection]:
    async with line_to(running) as line:
        wanted: dict[str, Any] = {
            "config": None,
            "username": "node",
            "known_hosts": ([running.identity.host_key.convert_to_public()], [], []),
            "client_keys": [running.identity.client_key],
            "agent_path": None,
        }
        connection = await asyncssh.connect(
            NAME, sock=await socket_of(line.stream), **(wanted | options)
        )
        try:
            yield connection
        finally:
            connection.close()
            await connection.wait_closed()


@pytest.mark.parametrize(
    "options",
    [
        {"client_keys": [asyncssh.generate_private_key("ssh-ed25519")]},
        {"client_keys": [asyncssh.generate_private_key("ecdsa-sha2-nistp256")]},
        {"client_keys": None, "password": "password"},
        {"client_keys": None},
    ],
)
def test_no_other_key_opens_the_port(tcp: Laptop, options: dict[str, Any]) -> None:
    async def story() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            async with ssh_to(tcp, **options):
                pytest.fail("it is open")

    run(story())
    assert nobody_is_in(tcp)


def test_a_certificate_of_the_tunnels_own_key_is_no_key(tcp: Laptop) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    certificate = tcp.identity.client_key.generate_user_certificate(key, "id")

    async def story() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            async with ssh_to(tcp, client_keys=[(key, certificate)]):
                pytest.fail("it is open")

    run(story())


def test_the_key_opens_files_and_nothing_else(tcp: Laptop, tmp_path: Path) -> None:
    sessions: list[dict[str, Any]] = [
        {"command": "touch harm"},
        {"command": "scp -t ."},
        {"command": "/usr/lib/openssh/sftp-server"},
        {"subsystem": "netconf"},
        {"subsystem": ""},
        {},
        {"term_type": "xterm"},
    ]

    async def story() -> None:
        async with ssh_to(tcp) as connection:
            for wanted in sessions:
                with pytest.raises(asyncssh.ChannelOpenError):
                    await connection.create_process(encoding=None, **wanted)
            forwards: list[Awaitable[object]] = [
                connection.open_connection("127.0.0.1", 22),
                connection.open_unix_connection(os.fspath(tmp_path / "x")),
                connection.forward_remote_port("127.0.0.1", 0, "127.0.0.1", 22),
                connection.forward_remote_path(os.fspath(tmp_path / "new"), "/x"),
                connection.open_tun(0),
                connection.open_tap(0),
            ]
            for forward in forwards:
                with pytest.raises((asyncssh.ChannelOpenError, asyncssh.ChannelListenError)):
                    await forward
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process(
                    encoding=None, subsystem="sftp", x11_forwarding=True, x11_display=":0"
                )
            async with connection.start_sftp_client(env={"LD_PRELOAD": "/tmp/x"}) as sftp:
                assert await sftp.listdir("/data") == ["file"]
                assert await sftp.getsize("/data/file") == len("content")

    run(story())
    assert not (tmp_path / "new").exists()


def test_a_connection_asks_nobody_for_this_machines_name(
    tcp: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop that is offline waits seconds for DNS, and all its mounts with it."""
    asked: list[str] = []
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop")
    monkeypatch.setattr(socket, "getfqdn", asked.append)

    async def story() -> None:
        async with ssh_to(tcp, gss_host=None):
            assert not asked

    run(story())


PROXY = """
import asyncio, os, sys
from pathlib import Path
from hpcfs.remotes.tunnel.line import Line, Pulse, RendezvousFile

async def main():
    line = await Line.open(RendezvousFile(Path(sys.argv[1]), sys.argv[2]), Pulse())
    over = asyncio.Event()
    def out(data):
        while data:
            data = data[os.write(1, data):]
    line.stream.listen(out, lambda reason: over.set())
    def come():
        data = os.read(0, 65536)
        line.stream.write(data) if data else over.set()
    asyncio.get_running_loop().add_reader(0, come)
    await over.wait()
    await line.close()

asyncio.run(main())
"""


def test_openssh_understands_the_server(tcp: Laptop, tmp_path: Path, share: Share) -> None:
    """Its sftp(1), whose idea of the protocol is what our server's answers were made after."""
    key, known, proxy = tmp_path / "key", tmp_path / "known", tmp_path / "proxy.py"
    key.touch(mode=0o600)
    key.write_text(tcp.identity.client_key_text)
    known.write_text(f"lap {tcp.identity.host_key_line}\n")
    proxy.write_text(PROXY)
    (tmp_path / "sent").write_bytes(os.urandom(3_000_000))
    (share.directory / "out").symlink_to(tmp_path / "sent")
    commands = f"""
        cd data
        put -p {tmp_path}/sent there
        rename there moved
        get moved {tmp_path}/back
        chmod 600 moved
        mkdir dir
        symlink file link
        ln file hard
        ls -la
        df
        -get out {tmp_path}/leaked
        -get ../key {tmp_path}/leaked
        -cd ../..
        pwd
        -rm /data
        rm /data/hard
    """
    command = ["sftp", "-b", "-", "-F", "none", "-i", os.fspath(key)]
    for option in (
        "IdentitiesOnly=yes",
        f"UserKnownHostsFile={known}",
        "GlobalKnownHostsFile=none",
        "StrictHostKeyChecking=yes",
        f"ProxyCommand={sys.executable} {proxy} {tcp.directory} {NAME}",
    ):
        command += ["-o", option]
    said = subprocess.run(
        [*command, "node@lap"],
        input="".join(f"{line.strip()}\n" for line in commands.splitlines()),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()
    assert (share.directory / "moved").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(share.directory)) == ["dir", "file", "link", "moved", "out"]
    assert os.readlink(share.directory / "link") == "file"
    assert not (tmp_path / "leaked").exists()
    assert "Remote working directory: /\n" in said.stdout


def test_variables_are_not_kept(tcp: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing bounds how many a client sends."""
    seen: list[Any] = []
    opened = connected_mounts.ConnectedMounts.open_channel

    def open_channel(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return opened(*arguments)

    monkeypatch.setattr(connected_mounts.ConnectedMounts, "open_channel", open_channel)

    async def story() -> None:
        async with ssh_to(tcp) as connection:
            variables = {f"NAME{number}": "x" * 1000 for number in range(100)}
            async with connection.start_sftp_client(env=variables) as sftp:
                assert await sftp.listdir("/data") == ["file"]

    run(story())
    (channel,) = seen
    assert channel._env == {}


@pytest.mark.parametrize(
    "options",
    [
        {"kex_algs": ["diffie-hellman-group14-sha1"]},
        {"kex_algs": ["ecdh-sha2-nistp256"]},
        {"encryption_algs": ["aes128-ctr"]},
        {"compression_algs": ["zlib@openssh.com"]},
    ],
)
def test_nothing_but_what_mounts_speak_is_spoken(tcp: Laptop, options: dict[str, Any]) -> None:
    async def story() -> None:
        with pytest.raises((asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost)):
            async with ssh_to(tcp, **options):
                pytest.fail("it is spoken")

    run(story())
    assert nobody_is_in(tcp)


async def sftp_channel(
    connection: asyncssh.SSHClientConnection, packet_bytes: int
) -> asyncssh.SSHClientChannel[bytes]:
    channel, _ = await connection.create_session(
        asyncssh.SSHClientSession, subsystem="sftp", encoding=None, max_pktsize=packet_bytes
    )
    return channel


def test_tiny_packets_are_not_made(tcp: Laptop) -> None:
    """A megabyte of them would keep everybody else waiting for half a minute."""

    async def story() -> None:
        async with ssh_to(tcp) as connection:
            for size in (1, connected_mounts.LEAST_PACKET_BYTES - 1):
                with pytest.raises(asyncssh.ChannelOpenError):
                    await sftp_channel(connection, size)
            (await sftp_channel(connection, connected_mounts.LEAST_PACKET_BYTES)).close()

    run(story())
