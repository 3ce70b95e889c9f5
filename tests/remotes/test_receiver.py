"""The shorter way of a channel's bytes: that it is taken, and that it is never the wrong one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from asyncssh.channel import SSHChannel
from hypothesis import given, strategies as st

from hpcfs.model.errors import Unreachable
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.remotes.sftp.decoder import DataSink, Malformed, MessageDecoder
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh.login import log_in
from hpcfs.remotes.ssh.receiver import PacketReceiver, shorten
from hpcfs.remotes.ssh.settings import CHANNEL_WINDOW_BYTES
from tests.support.sshd import ALIAS, ScriptedPrompter, SshServer, ssh_server

MIB = 1024 * 1024
CONTENT = b"".join(number.to_bytes(8, "big") for number in range(8 * MIB // 8))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with ssh_server(tmp_path_factory.mktemp("receiver") / "s") as server:
        (server.root / "file").write_bytes(CONTENT)
        yield server


def receiver_of(remote: SftpRemote) -> PacketReceiver:
    session = remote._shared._session
    assert session is not None
    transport: Any = session.login.connection._transport
    through_jump_host = isinstance(transport, SSHChannel)
    receiver = transport._session if through_jump_host else transport.get_protocol()
    assert isinstance(receiver, PacketReceiver), "asyncssh has changed: see remotes/ssh/receiver.py"
    return receiver


async def fetched(remote: SftpRemote, length: int = len(CONTENT)) -> bytes:
    entry = await remote.stat(b"file")
    return b"".join(await remote.fetch(b"file", entry.version, 0, length, 1))


def taken_by_a_fetch(
    spec: SiteSpec,
    prepare: Callable[[PacketReceiver], None] = lambda receiver: None,
    runner: Callable[..., int] = asyncio.run,
) -> int:
    """How many packets went the shorter way while the content came as it is."""

    async def main() -> int:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            remote = site.remote("ns")
            await remote.connect()
            receiver = receiver_of(remote)
            prepare(receiver)
            assert await fetched(remote) == CONTENT
            return receiver.taken
        finally:
            await site.close()

    return runner(main())


def test_no_empty_packets_are_sent_where_they_protect_nothing(served: SshServer) -> None:
    async def main() -> None:
        site = SshSiteConnection(served.site_spec(), ScriptedPrompter())
        try:
            remote = site.remote("ns")
            await remote.connect()
            connection: Any = receiver_of(remote)._connection
            before = connection._send_seq
            for _ in range(10):
                await remote.stat(b"file")
            assert connection._send_seq == before + 10, "asyncssh has changed: see ssh/sender.py"
        finally:
            await site.close()

    asyncio.run(main())


def test_where_a_cipher_needs_them_empty_packets_are_sent(tmp_path: Path) -> None:
    async def main(spec: SiteSpec) -> None:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            remote = site.remote("ns")
            await remote.connect()
            session = remote._shared._session
            assert session is not None
            connection: Any = session.login.connection
            before = connection._send_seq
            for _ in range(10):
                await remote.stat(b"")
            assert connection._send_seq == before + 20
        finally:
            await site.close()

    with ssh_server(tmp_path / "s", "Ciphers aes128-ctr") as server:
        asyncio.run(main(server.site_spec()))


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_bytes_take_the_shorter_way(served: SshServer, runner: Callable[..., int]) -> None:
    assert taken_by_a_fetch(served.site_spec(), runner=runner) >= len(CONTENT) / (32 * 1024)


def test_sessions_of_asyncssh_keep_what_comes(served: SshServer) -> None:
    """A tunnel has its SFTP client beside channels of ours."""

    async def main() -> None:
        login = await log_in(served.site(), ScriptedPrompter())
        receiver = shorten(login.connection)
        assert receiver is not None
        sftp = await login.connection.start_sftp_client()
        for _ in range(4):
            async with sftp.open(str(served.root / "file"), "rb", encoding=None) as file:
                assert await file.read() == CONTENT
        assert receiver.taken
        await login.close()

    asyncio.run(main())


def test_whatever_comes_is_a_sign_of_life(served: SshServer) -> None:
    """The answer to a keepalive may wait behind much that is sent."""

    async def main() -> None:
        login = await log_in(served.site(), ScriptedPrompter())
        shorten(login.connection)
        inside: Any = login.connection
        sftp = await login.connection.start_sftp_client()
        inside._keepalive_count = 3
        await sftp.stat(".")
        assert inside._keepalive_count == 0
        await login.close()

    asyncio.run(main())


def test_packets_that_come_in_crumbs(served: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def crumbs(receiver: PacketReceiver) -> None:
        whole = receiver.get_buffer
        sizes = iter([7, 1, 3, 5000, 40_000, 16, 4] * 1_000_000)
        monkeypatch.setattr(receiver, "get_buffer", lambda hint: whole(hint)[: next(sizes)])

    assert taken_by_a_fetch(served.site_spec(), crumbs) > 0


def test_new_keys_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ssh_server(tmp_path / "s", "RekeyLimit 1M") as server:
        (server.root / "file").write_bytes(CONTENT)
        seen = set[int]()

        def watch(receiver: PacketReceiver) -> None:
            current = receiver._current_cipher

            def noted() -> object:
                cipher = current()
                seen.add(id(cipher))
                return cipher

            monkeypatch.setattr(receiver, "_current_cipher", noted)

        taken = taken_by_a_fetch(server.site_spec(), watch)
        assert taken >= len(CONTENT) / (32 * 1024) - 16
        assert len(seen) > 2, "the keys changed"


def test_other_ciphers_go_the_usual_way(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s", "Ciphers aes128-ctr,chacha20-poly1305@openssh.com") as server:
        (server.root / "file").write_bytes(CONTENT)
        assert taken_by_a_fetch(server.site_spec()) == 0


def test_through_a_jump_host_the_way_is_short_twice(served: SshServer, tmp_path: Path) -> None:
    with ssh_server(tmp_path / "gate") as gate:
        known = tmp_path / "known_hosts"
        known.write_text(served.known_hosts.read_text() + gate.known_hosts.read_text())
        text = served.config_text(ALIAS, "ProxyJump gate") + gate.config_text("gate")
        for server in (served, gate):
            text = text.replace(str(server.known_hosts), str(known))
        config = tmp_path / "config"
        config.write_text(text)
        spec = served.site_spec(site=SshSite(ALIAS, ssh_config=str(config)))
        outer = list[PacketReceiver]()

        def note(receiver: PacketReceiver) -> None:
            channel = receiver._connection._transport
            assert channel.get_recv_window() == CHANNEL_WINDOW_BYTES
            outer.append(channel.get_connection()._transport.get_protocol())

        assert taken_by_a_fetch(spec, note) >= len(CONTENT) / (32 * 1024)
        assert outer[0].taken >= len(CONTENT) / (32 * 1024)


def test_a_forged_packet_ends_the_connection(
    served: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        site = SshSiteConnection(served.site_spec(), ScriptedPrompter())
        try:
            remote = site.remote("ns")
            await remote.connect()
            receiver = receiver_of(remote)
            take = receiver._take

            def forged(cipher: object, packet: memoryview) -> bool:
                if len(packet) > 10_000:
                    packet[100] ^= 1
                return take(cipher, packet)

            monkeypatch.setattr(receiver, "_take", forged)
            with pytest.raises(Unreachable, match="MAC"):
                await fetched(remote, MIB)
            assert remote._shared._session is not None
            assert remote._shared._session.lost
        finally:
            await site.close()

    asyncio.run(main())


# --- SFTP's messages ----------------------------------------------------------------------------


class Collected:
    """Collects what a decoder hands on: messages, and bytes by request."""

    def __init__(self, unwanted: frozenset[int] = frozenset()) -> None:
        self.unwanted = unwanted
        self.messages: list[bytes] = []
        self.pieces: list[tuple[int, bytes]] = []

    def message(self, message: bytes) -> None:
        self.messages.append(message)

    def data(self, request: int, length: int) -> DataSink | None:
        return None if request in self.unwanted else _Piece(self, request)


class _Piece:
    def __init__(self, collected: Collected, request: int) -> None:
        self.collected, self.request, self.content = collected, request, b""

    def add(self, chunk: bytes) -> None:
        self.content += chunk

    def end(self) -> None:
        self.collected.pieces.append((self.request, self.content))


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def data_message(request: int, content: bytes) -> bytes:
    return framed(b"\x67" + request.to_bytes(4, "big") + framed(content))


small = st.binary(min_size=4, max_size=40).map(lambda rest: b"\x65" + rest)
pieces = st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=60))


@given(st.lists(st.one_of(small, pieces)), st.lists(st.integers(1, 30), min_size=1), st.booleans())
def test_messages_come_out_whole_wherever_the_stream_is_cut(
    told: list[bytes | tuple[int, bytes]], cuts: list[int], unwanted: bool
) -> None:
    messages = [item for item in told if isinstance(item, bytes)]
    given_pieces = [item for item in told if isinstance(item, tuple)]
    refused = frozenset(number for number, _ in given_pieces[::2]) if unwanted else frozenset()
    stream = b"".join(
        framed(item) if isinstance(item, bytes) else data_message(*item) for item in told
    )
    collected = Collected(refused)
    decoder = MessageDecoder(collected)
    at = turn = 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        decoder.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert collected.messages == messages
    assert collected.pieces == [item for item in given_pieces if item[0] not in refused]


@pytest.mark.parametrize(
    "stream",
    [
        framed(b"\x67" + bytes(4) + framed(b"abc")[:-1]),
        b"Welcome to the cluster", bytes(4), framed(bytes(4)),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(stream: bytes) -> None:
    with pytest.raises(Malformed):
        MessageDecoder(Collected()).feed(stream)
