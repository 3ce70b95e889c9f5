"""The connected mounts: serves each client that has proved to hold the tunnel's client key.

Over a Unix socket each stream is one SFTP channel once its client has proved its key; over TCP it
carries an SSH connection, which accepts that one key and opens SFTP channels only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import asyncssh

from hpcfs.laptop.acceptor import Acceptor, EndpointKind
from hpcfs.laptop.channel import HandleTable, ServerChannel
from hpcfs.laptop.identity import TunnelIdentity
from hpcfs.laptop.sftp_server import Shares, ShareServer
from hpcfs.remotes.ssh.settings import CHANNEL_WINDOW_BYTES, FAST_CIPHER, KEY_EXCHANGE
from hpcfs.system.text import printable
from hpcfs.tunnel.proof import NotProved, prove_as_server
from hpcfs.tunnel.pump import WAITING_BYTES, socket_of
from hpcfs.tunnel.stream import TunnelStream

log = logging.getLogger(__name__)

MAX_NAME_LETTERS = 100
CLOSE_SECONDS = 3.0
MOST_UNTAKEN_BYTES = 32 * 1024 * 1024
"""Answers on a stream that the mount may leave untaken. With an SSH connection on it, its pump's
limit applies (tunnel/pump.py)."""
MAX_CHANNELS = 8
"""Channels of an SSH connection. A mount opens two, and some more for a large upload
(sftp/session.py)."""
LEAST_PACKET_BYTES = 4096
"""OpenSSH and asyncssh accept 32 KiB."""
SERVER_VERSION = "hpcfs_as_OpenSSH"
"""Clients that find "OpenSSH" in it send a symlink's paths in the order that laptop/channel.py
expects."""


@dataclass(eq=False)
class ConnectedMount:
    """A connected mount: `host` is its own name for its machine, `since` in seconds since the
    epoch."""

    host: str
    since: float = field(default_factory=time.time)
    files: HandleTable = field(default_factory=HandleTable)
    channels: int = 0


class ConnectedMounts:
    """Serves all connected mounts. Give `acceptor` the pipes. `on_change` is called when a mount
    came or went."""

    def __init__(
        self, shares: Shares, identity: TunnelIdentity, on_change: Callable[[], None]
    ) -> None:
        self.acceptor = Acceptor(identity.handshake, self._arrived)
        self._shares = shares
        self._identity = identity
        self._on_change = on_change
        self._by_session: dict[bytes, ConnectedMount] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def all(self) -> list[ConnectedMount]:
        """The mounts that are connected now."""
        return list(self._by_session.values())

    def _arrived(self, stream: TunnelStream, kind: EndpointKind) -> None:
        self._run(self._serve_private(stream) if kind == "unix" else self._serve_ssh(stream))

    async def close(self) -> None:
        """End every stream, which tells each mount that the tunnel ends, and wait for their
        tasks."""
        self.acceptor.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, serving: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def enter(self, session: bytes, host: str) -> ConnectedMount:
        """Count one more channel of that session; the first one makes it a connected mount."""
        shown = printable(host[:MAX_NAME_LETTERS], "")
        mount = self._by_session.setdefault(session, ConnectedMount(shown))
        mount.channels += 1
        if mount.channels == 1:
            log.info("a mount on %s is connected", mount.host)
            self._on_change()
        return mount

    def leave(self, session: bytes, mount: ConnectedMount) -> None:
        """Count one channel less; with the last one the mount's files are closed."""
        mount.channels -= 1
        if not mount.channels:
            mount.files.close(ShareServer(self._shares))
            del self._by_session[session]
            log.info("a mount on %s has left", mount.host)
            self._on_change()

    # --- over a Unix socket -----------------------------------------------------------------------

    async def _serve_private(self, stream: TunnelStream) -> None:
        tunnel, client = bytes.fromhex(self._identity.id), self._identity.client_public
        try:
            proof = await prove_as_server(stream, tunnel, self._identity.host_key, client)
        except NotProved as error:
            log.warning("somebody who knocked at the tunnel was not let in: %s", error)
            stream.close()
            return
        self.acceptor.keep(stream)
        mount = self.enter(proof.session, proof.host)
        try:
            channel = ServerChannel(
                self._shares,
                mount.files,
                stream.write,
                lambda: stream.unacknowledged,
                MOST_UNTAKEN_BYTES,
            )
            stream.on_acknowledged.append(channel.taken)
            stream.listen(channel.received, lambda reason: channel.ended())
            await channel.run()
        finally:
            stream.close()
            self.leave(proof.session, mount)

    # --- over TCP ---------------------------------------------------------------------------------

    async def _serve_ssh(self, stream: TunnelStream) -> None:
        try:
            connection = await asyncssh.run_server(
                await socket_of(stream),
                server_factory=lambda: _SshServer(self, stream),
                server_version=SERVER_VERSION,
                server_host_keys=[self._identity.host_key],
                kex_algs=[KEY_EXCHANGE],
                encryption_algs=[FAST_CIPHER],
                compression_algs=None,
                allow_pty=False,
                line_editor=False,  # it would stand between us and the channel
                agent_forwarding=False,
                gss_host=None,  # the default looks this machine's name up in DNS, which blocks
                login_timeout=0,  # the acceptor enforces its own time limit
                encoding=None,
                window=CHANNEL_WINDOW_BYTES,
            )
        except (asyncssh.Error, OSError) as error:
            log.warning("somebody who knocked at the tunnel was not let in: %s", error)
            stream.close()
            return
        await connection.wait_closed()

    def is_known(self, key: asyncssh.SSHKey) -> bool:
        """Return whether this is the tunnel's client key."""
        return key == self._identity.client_public

    def proved(self, stream: TunnelStream) -> None:
        """Keep the stream, whose client has proved its key."""
        self.acceptor.keep(stream)

    def open_channel(
        self, stream: TunnelStream, mount: ConnectedMount, chan: asyncssh.SSHServerChannel[bytes]
    ) -> ServerChannel:
        """Start to serve SFTP on a channel of the stream's SSH connection."""
        channel = ServerChannel(
            self._shares,
            mount.files,
            chan.write,
            lambda: stream.unacknowledged + chan.get_write_buffer_size(),
            WAITING_BYTES,
        )

        async def serve() -> None:
            stream.on_acknowledged.append(channel.taken)
            try:
                await channel.run()
            finally:
                stream.on_acknowledged.remove(channel.taken)
                chan.close()

        self._run(serve())
        return channel


def takes_packets(channel: object) -> bool:
    """Return whether the other end accepts packets of a reasonable size. asyncssh cuts all data
    into packets of the size that the other end wants: a megabyte in packets of one byte takes half
    a minute, in which nothing else is served."""
    wanted: int = getattr(channel, "_send_pktsize", LEAST_PACKET_BYTES)
    return wanted >= LEAST_PACKET_BYTES


class _SshServer(asyncssh.SSHServer):
    """An SSH connection on a stream, of one mount."""

    def __init__(self, mounts: ConnectedMounts, stream: TunnelStream) -> None:
        self._mounts = mounts
        self._stream = stream
        self._host = ""
        self._mount: ConnectedMount | None = None
        self._channels = 0

    def begin_auth(self, username: str) -> bool:
        """Take the user name for the name of the client's machine, which the client sends as
        such."""
        self._host = username
        return True

    def public_key_auth_supported(self) -> bool:
        """Allow public keys only."""
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Accept the tunnel's client key."""
        return self._mounts.is_known(key)

    def auth_completed(self) -> None:
        """Register the mount."""
        self._mounts.proved(self._stream)
        self._mount = self._mounts.enter(self._stream.id, self._host)

    def session_requested(self) -> Any:
        """Open a channel; return False where there are too many."""
        assert self._mount is not None
        if self._channels >= MAX_CHANNELS:
            return False
        self._channels += 1
        return _SshChannel(self._mounts, self._stream, self._mount, self._closed)

    def _closed(self) -> None:
        self._channels -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        """Deregister the mount."""
        if self._mount is not None:
            self._mounts.leave(self._stream.id, self._mount)


class _SshChannel(asyncssh.SSHServerSession[bytes]):
    """A channel that serves SFTP only: no shell, no command."""

    def __init__(
        self,
        mounts: ConnectedMounts,
        stream: TunnelStream,
        mount: ConnectedMount,
        on_closed: Callable[[], None],
    ) -> None:
        self._mounts = mounts
        self._stream = stream
        self._mount = mount
        self._on_closed = on_closed
        self._channel: ServerChannel | None = None

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        """Remember the channel, and refuse environment variables: they are of no use here, and
        asyncssh would keep as many as a client sends."""
        self._chan = chan
        vars(chan)["_process_env_request"] = lambda packet: False

    def subsystem_requested(self, subsystem: str) -> bool:
        """Accept SFTP."""
        return subsystem == "sftp" and takes_packets(self._chan)

    def session_started(self) -> None:
        """Start to serve."""
        self._channel = self._mounts.open_channel(self._stream, self._mount, self._chan)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Pass on the bytes of requests."""
        if self._channel is not None:
            self._channel.received(data)

    def eof_received(self) -> bool:
        """End the requests, and close the channel: sftp(1) sends EOF when it is done and waits for
        that."""
        if self._channel is not None:
            self._channel.ended()
        return False

    def resume_writing(self) -> None:
        """Note that the client took answers."""
        if self._channel is not None:
            self._channel.taken()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the channel."""
        self._on_closed()
        if self._channel is not None:
            self._channel.ended()
