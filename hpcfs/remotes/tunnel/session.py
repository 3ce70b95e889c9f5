"""Opens an SFTP session with the laptop at the other end of a tunnel.

Over a Unix socket each channel is a stream of its own, and SFTP's packets travel on it as they are;
over TCP there is one stream with an SSH connection on it. In both cases the keys in the rendezvous
file decide who is who.

Several channels carry what is read: OpenSSH lets the laptop have 2 MiB under way in a forwarded
connection (CHAN_TCP_WINDOW_DEFAULT in its channels.h), 94 MB/s at 20 ms as measured and 20 at 100.
A file is opened once: streams of one session share their handles.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncssh
from asyncssh.logging import SSHLogger, logger as asyncssh_logger

from hpcfs.model.errors import AccessRefused, Unreachable
from hpcfs.model.sites import SiteSpec
from hpcfs.remotes.sftp.channels import open_channels
from hpcfs.remotes.sftp.handshake import shake_hands
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.session import SftpSession, begin, together
from hpcfs.remotes.ssh.login import SshLogin
from hpcfs.remotes.ssh.receiver import shorten
from hpcfs.remotes.ssh.sender import shorten_sending
from hpcfs.remotes.ssh.settings import FAST_CIPHER, KEY_EXCHANGE
from hpcfs.remotes.ssh.shell import Shell
from hpcfs.remotes.tunnel.line import Line, Pulse, RendezvousFile
from hpcfs.tunnel.file import Rendezvous
from hpcfs.tunnel.proof import SESSION_BYTES, NotProved, prove_as_client
from hpcfs.tunnel.pump import socket_of
from hpcfs.tunnel.stream import TunnelStream

PROVE_SECONDS = 10.0
READERS = 6


class StreamCarrier:
    """An SFTP channel on a stream of the tunnel: a Carrier."""

    def __init__(self, stream: TunnelStream, on_lost: Callable[[], None]) -> None:
        self._stream = stream
        self._on_lost = on_lost
        self.requests = Requests(self)
        stream.listen(self.requests.received, self._ended)

    @property
    def logger(self) -> SSHLogger:
        """The logger of asyncssh, for its SFTP layer."""
        return asyncssh_logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncssh asks of a channel; `default` where it is not known."""
        return default

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""
        self._stream.write(data)

    def close(self) -> None:
        """Close the channel."""
        self._stream.close()

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""
        return self._stream.ended

    def _ended(self, reason: str) -> None:
        self.requests.lost(ConnectionError(reason) if reason else None)
        self._on_lost()


@dataclass
class TunnelLogin:
    """The streams of one session: an AnyLogin."""

    user: str
    shown: str
    lines: list[Line]
    ssh: SshLogin | None = None
    channels: list[Requests] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def connections(self) -> int:
        """How many pipes to the laptop there are."""
        return len(self.lines)

    async def open_shell(self) -> Shell | None:
        """Return None: the laptop serves files only."""
        return None

    async def check(self, *, doubted: bool = False) -> None:
        """Leave it to the lines, which ask every two seconds."""

    async def close(self) -> None:
        """End all streams."""
        if self.ssh is not None:
            await self.ssh.close()
        for line in self.lines:
            await line.close()


async def open_session(spec: SiteSpec, rendezvous_file: RendezvousFile) -> SftpSession:
    """Open a session with the laptop. Raises RemoteErrors only."""
    pulse = Pulse()
    line = await Line.open(rendezvous_file, pulse)
    login = TunnelLogin(line.rendezvous.user, line.shown, [line])
    if line.is_private:
        channels = _private_channels(login, rendezvous_file, pulse)
        return await begin(login, spec, channels, shared_handles=True)
    return await begin(login, spec, _ssh_channels(login))


async def _private_channels(
    login: TunnelLogin, rendezvous_file: RendezvousFile, pulse: Pulse
) -> list[Requests]:
    """Open one channel for small requests and some for bytes."""
    opened = await asyncio.gather(
        *(Line.open(rendezvous_file, pulse) for _ in range(READERS)), return_exceptions=True
    )
    login.lines += [line for line in opened if isinstance(line, Line)]
    for failure in opened:
        if isinstance(failure, BaseException):
            raise failure
    if any(not line.is_private for line in login.lines):
        raise Unreachable(f"the tunnel {rendezvous_file.name} is moving")
    session = secrets.token_bytes(SESSION_BYTES)
    return await together(*(_channel(line, session, login.ended.set) for line in login.lines))


async def _channel(line: Line, session: bytes, on_lost: Callable[[], None]) -> Requests:
    keys = _TunnelKeys(line.rendezvous)
    here = socket.gethostname()
    try:
        async with asyncio.timeout(PROVE_SECONDS):
            await prove_as_client(
                line.stream, keys.tunnel, keys.client, keys.host, session=session, host=here
            )
    except TimeoutError:
        raise Unreachable(f"{line.shown} does not answer") from None
    except NotProved as error:
        raise AccessRefused(f"{line.shown} is not opened by the keys of its tunnel: {error}") from (
            None
        )
    carrier = StreamCarrier(line.stream, on_lost)
    await shake_hands(carrier.requests, line.shown)
    return carrier.requests


async def _ssh_channels(login: TunnelLogin) -> list[Requests]:
    line = login.lines[0]
    keys = _TunnelKeys(line.rendezvous)
    pair = await socket_of(line.stream)
    try:
        connection = await asyncssh.connect(
            line.rendezvous.name,
            sock=pair,
            config=None,
            username=socket.gethostname(),
            known_hosts=([keys.host], [], []),
            client_keys=[keys.client],
            agent_path=None,
            server_host_key_algs=["ssh-ed25519"],
            kex_algs=[KEY_EXCHANGE],
            encryption_algs=[FAST_CIPHER],
            compression_algs=None,
            client_factory=lambda: _LossListener(login.ended.set),
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise AccessRefused(f"{line.shown} is not the one whose tunnel this is") from error
    except asyncssh.PermissionDenied as error:
        raise AccessRefused(f"{line.shown} refuses the key of its tunnel") from error
    shorten(connection)
    shorten_sending(connection)
    login.ssh = SshLogin(connection, (), "hpcfs", line.shown)
    return await open_channels(login.ssh)


class _LossListener(asyncssh.SSHClient):
    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()


class _TunnelKeys:
    def __init__(self, rendezvous: Rendezvous) -> None:
        self.tunnel = bytes.fromhex(rendezvous.id)
        try:
            self.host = asyncssh.import_public_key(rendezvous.host_key)
            self.client = asyncssh.import_private_key(rendezvous.client_key)
        except asyncssh.KeyImportError as error:
            raise Unreachable(
                f"the rendezvous file of the tunnel {rendezvous.name} has a damaged key ({error}): "
                "run 'hpcfs tunnel' on the laptop again"
            ) from None
