"""How soon a dead SSH connection is noticed, and that a live one is not taken for dead."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohappyeyeballs
import asyncssh
import pytest

from hpcfs.model.errors import NotConnected, RemoteError, Unreachable
from hpcfs.model.sites import SshSite
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh import liveness, reach, settings
from hpcfs.remotes.ssh.liveness import Liveness
from hpcfs.remotes.ssh.reach import Destination
from tests.support.link import Link
from tests.support.sshd import ALIAS, LOOPBACK, ScriptedPrompter, SshServer

OUTER = 30.0
"""Within which what is awaited must come, however busy the machine is."""


@pytest.fixture
def link(sshd: SshServer) -> Iterator[Link]:
    found = Link(sshd.port)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "KEEPALIVE_SECONDS", 0.5)
    monkeypatch.setattr(liveness, "CHECK_SECONDS", 0.3)


@asynccontextmanager
async def through(
    link: Link, sshd: SshServer, tmp_path: Path, *, by_jump: bool = False
) -> AsyncIterator[SftpRemote]:
    """A remote that is connected over the link, or over a jump host behind the link."""
    known = tmp_path / "known"
    line = sshd.known_hosts_line(sshd.host_key)
    known.write_text(line + line.replace(f":{sshd.port} ", f":{link.port} "))
    behind = sshd.config_text("gate").replace(f"Port {sshd.port}", f"Port {link.port}")
    text = (
        sshd.config_text(ALIAS, "ProxyJump gate") + behind
        if by_jump
        else behind.replace("gate", ALIAS)
    )
    config = tmp_path / "config"
    config.write_text(text.replace(str(sshd.known_hosts), str(known)))
    site = SshSite(ALIAS, ssh_config=str(config), connect_timeout=2.0)
    connection = SshSiteConnection(sshd.site_spec(site=site), ScriptedPrompter())
    try:
        remote = connection.remote("ns")
        await remote.connect()
        yield remote
    finally:
        link.mend()
        await connection.close()


async def failure(request: Awaitable[object]) -> RemoteError:
    async with asyncio.timeout(OUTER):
        with pytest.raises(RemoteError) as found:
            await request
    return found.value


def test_fifteen_seconds_of_silence_are_the_limit() -> None:
    assert settings.KEEPALIVE_SECONDS * (settings.KEEPALIVES_MISSED + 1) == 15


@pytest.mark.usefixtures("_short_silence")
@pytest.mark.parametrize("by_jump", [False, True])
def test_what_is_under_way_on_a_silent_connection_fails(
    by_jump: bool, sshd: SshServer, link: Link, tmp_path: Path
) -> None:
    async def main() -> None:
        async with through(link, sshd, tmp_path, by_jump=by_jump) as remote:
            link.freeze()
            for error in await asyncio.gather(
                failure(remote.stat(b"")), failure(remote.make_directory(b"d", 0o755))
            ):
                assert type(error) is Unreachable, "it may have been carried out"
            link.mend()
            async with asyncio.timeout(OUTER):
                while True:
                    with contextlib.suppress(NotConnected):
                        await remote.stat(b"")
                        return
                    await asyncio.sleep(0.05)

    asyncio.run(main())


@pytest.mark.usefixtures("_short_silence")
def test_a_link_that_is_cut_is_tried_again_soon(
    sshd: SshServer, link: Link, tmp_path: Path
) -> None:
    async def main() -> None:
        async with through(link, sshd, tmp_path) as remote:
            link.cut()
            assert type(await failure(remote.stat(b""))) in (Unreachable, NotConnected)
            for _ in range(6):
                assert type(await failure(remote.stat(b""))) is NotConnected
                backoff = remote._shared._backoff
                pause = backoff.retry_at - backoff._clock()
                assert pause <= 2, "nobody was logged in, so nobody minds"
                backoff.try_now()

    asyncio.run(main())


class Wire:
    """As much of asyncssh's connection as Liveness looks at; `left` waits to be sent."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self._transport = self
        self._keepalive_count = 2
        self.lost: Exception | None = None
        self.answers = False

    def set_keepalive(self, interval: float, count: int) -> None: ...

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self.left.pop(0) if self.left else 0

    def _reset_keepalive_timer(self) -> None: ...

    async def _make_global_request(self, name: bytes) -> None:
        if not self.answers:
            await asyncio.Event().wait()

    def connection_lost(self, error: Exception) -> None:
        self.lost = error


@pytest.mark.parametrize(
    ("left", "is_alive"),
    [
        ([900_000, 890_000], True),
        ([900_000, 900_000], False),
        ([10, 900_000], False),
        ([80, 0], False),  # a question of ours, which a kernel takes for a program that hangs
    ],
)
def test_bytes_that_leave_are_a_sign_of_life(
    left: list[int], is_alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow link, the answer to a keepalive waits behind megabytes that are sent."""
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.0)

    async def main() -> None:
        wire: Any = Wire()
        wire.left = list(left)
        watching = Liveness([wire], attended=False)
        async with asyncio.timeout(OUTER):
            while wire.left:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
        watching.end()
        assert (wire._keepalive_count == 0) is is_alive

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answers", "attended", "doubted", "is_kept"),
    [
        (True, False, False, True),
        (False, False, False, False),
        (False, True, False, True),  # it can't be had back without somebody who types
        (False, True, True, False),
    ],
)
def test_a_doubted_connection_gives_a_sign_of_life_or_ends(
    answers: bool,
    attended: bool,
    doubted: bool,
    is_kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "CHECK_SECONDS", 0.05)

    async def main() -> None:
        wire: Any = Wire()
        wire.answers = answers
        watching = Liveness([wire], attended=attended)
        await watching.check(doubted=doubted)
        watching.end()
        assert (wire.lost is None) is is_kept

    asyncio.run(main())


@pytest.mark.usefixtures("_short_silence")
@pytest.mark.parametrize("frozen", [False, True])
def test_after_a_change_of_the_network_the_connection_is_checked_at_once(
    frozen: bool, sshd: SshServer, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "KEEPALIVE_SECONDS", 3600)

    async def main() -> None:
        async with through(link, sshd, tmp_path) as remote:
            session = remote._shared.session
            assert session is not None
            if frozen:
                link.freeze()
            await remote._shared.check()
            async with asyncio.timeout(OUTER):
                if frozen:
                    await session.ended.wait()
            assert session.lost is frozen

    asyncio.run(main())


def test_names_that_this_leans_on_are_there() -> None:
    """Where asyncssh has changed, only its own keepalive is left: see ssh/liveness.py."""
    for name in ("_reset_keepalive_timer", "_make_global_request"):
        assert hasattr(asyncssh.SSHClientConnection, name)


def test_an_address_that_does_not_answer_is_tried_again_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's own next packet may be many seconds away when the link is back."""
    attempts = 0
    ours, theirs = socket.socketpair()

    async def start(*_: object, **__: object) -> socket.socket:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            await asyncio.Event().wait()
        return ours

    monkeypatch.setattr(aiohappyeyeballs, "start_connection", start)
    monkeypatch.setattr(reach, "AGAIN_SECONDS", 0.01)
    with ours, theirs:
        found = asyncio.run(reach.reach(Destination(LOOPBACK, 22), OUTER))
        assert found is ours
    assert attempts == 3


def test_an_idle_connection_is_closed_and_comes_back(sshd: SshServer) -> None:
    """Not while a file is open: what is open on a server ends with the connection."""
    (sshd.root / "idle").write_bytes(b"content")

    async def main() -> None:
        connection = SshSiteConnection(sshd.site_spec(), ScriptedPrompter())
        try:
            remote = connection.remote("ns")
            entry = await remote.stat(b"idle")
            await remote.fetch(b"idle", entry.version, 0, entry.size, 1)
            await remote._shared.close_if_idle(0.0)
            assert connection.traffic().connections == 1, "the file is open"
            await remote.release(1)
            async with asyncio.timeout(OUTER):
                while connection.traffic().connections:  # the close is on its way
                    await remote._shared.close_if_idle(0.0)
                    await asyncio.sleep(0.01)
            assert (await remote.stat(b"idle")).size == 7
        finally:
            await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("attended", [False, True])
def test_tcp_carries_a_login_that_somebody_typed_for_over_an_outage(attended: bool) -> None:
    """The kernel gives up after ten minutes, and not after as many attempts as usual, where it
    repeats more often (Linux 6.15)."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        with near:
            wire: Any = Wire()
            wire.get_extra_info = lambda name, default=None: near

            async def main() -> None:
                Liveness([wire], attended=attended).end()

            asyncio.run(main())
            limit = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert limit == (600_000 if attended and _repeats_soon(near) else 0)


def _repeats_soon(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return sock.getsockopt(socket.IPPROTO_TCP, liveness._TCP_RTO_MAX_MS) == 5000
    return False
