"""The mounts that are let in: who has proved to hold the tunnel's client key is served.

Over a Unix socket each stream is an SFTP channel once its client has proved itself; over TCP it has
an SSH connection on it, which lets in that one key and opens SFTP channels only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import asyncssh

from hpcfs.laptop.acceptor import Acceptor, Kind
from hpcfs.laptop.channel import HandleTable, ServerChannel
from hpcfs.laptop.identity import Identity
from hpcfs.laptop.sftp_server import Shares, ShareServer
from hpcfs.remotes.ssh.settings import CHANNEL_WINDOW_BYTES, FAST_CIPHER, KEY_EXCHANGE
from hpcfs.tunnel.proof import NotProved, prove_as_server
from hpcfs.tunnel.pump import WAITING_BYTES, socket_of
from hpcfs.tunnel.stream import TunnelStream

log = logging.getLogger(__name__)

MAX_NAME_LETTERS = 100
CLOSE_SECONDS = 3.0
MOST_UNTAKEN_BYTES = 32 * 1024 * 1024
"""Of answers on a stream. With an SSH connection on it, as many as its pump lets in."""
MAX_CHANNELS = 8
"""On an SSH connection. A mount opens two, and some more for a large upload (sftp/session.py)."""
LEAST_PACKET_BYTES = 4096
"""OpenSSH and asyncssh take 32 KiB."""
SERVER_VERSION = "hpcfs_as_OpenSSH"
"""Clients look for the second name, and then give a symlink's paths in the order of
laptop/channel.py."""


@dataclass(eq=False)
class Guest:
    """A mount: `host` is what it calls the machine it runs on."""

    host: str
    since: float = field(default_factory=time.time)
    files: HandleTable = field(default_factory=HandleTable)
    channels: int = 0


class Guests:
    """Give `acceptor` the pipes. `on_change` hears that a mount came or went."""

    def __init__(self, shares: Shares, identity: Identity, on_change: Callable[[], None]) -> None:
        self.acceptor = Acceptor(identity.door, self._arrived)
        self._shares = shares
        self._identity = identity
        self._on_change = on_change
        self._by_session: dict[bytes, Guest] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def all(self) -> list[Guest]:
        return list(self._by_session.values())

    def _arrived(self, stream: TunnelStream, kind: Kind) -> None:
        self._run(self._serve_private(stream) if kind == "unix" else self._serve_ssh(stream))

    async def close(self) -> None:
        """Every mount is told that the tunnel ends."""
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

    def enter(self, session: bytes, host: str) -> Guest:
        shown = "".join(letter for letter in host[:MAX_NAME_LETTERS] if letter.isprintable())
        guest = self._by_session.setdefault(session, Guest(shown))
        guest.channels += 1
        if guest.channels == 1:
            log.info("a mount on %s is connected", guest.host)
            self._on_change()
        return guest

    def leave(self, session: bytes, guest: Guest) -> None:
        guest.channels -= 1
        if not guest.channels:
            guest.files.close(ShareServer(self._shares))
            del self._by_session[session]
            log.info("a mount on %s has left", guest.host)
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
        guest = self.enter(proof.session, proof.host)
        try:
            channel = ServerChannel(
                self._shares, guest.files, stream.write, lambda: stream.unseen, MOST_UNTAKEN_BYTES
            )
            stream.on_seen.append(channel.taken)
            stream.listen(channel.received, lambda reason: channel.ended())
            await channel.run()
        finally:
            stream.close()
            self.leave(proof.session, guest)

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
                line_editor=False,  # one would stand between us and the channel
                agent_forwarding=False,
                gss_host=None,  # its default asks DNS for this machine's name, and waits
                login_timeout=0,  # the acceptor ends who proves nothing in time
                encoding=None,
                window=CHANNEL_WINDOW_BYTES,
            )
        except (asyncssh.Error, OSError) as error:
            log.warning("somebody who knocked at the tunnel was not let in: %s", error)
            stream.close()
            return
        await connection.wait_closed()

    def is_known(self, key: asyncssh.SSHKey) -> bool:
        return key == self._identity.client_public

    def proved(self, stream: TunnelStream) -> None:
        self.acceptor.keep(stream)

    def open_channel(
        self, stream: TunnelStream, guest: Guest, chan: asyncssh.SSHServerChannel[bytes]
    ) -> ServerChannel:
        channel = ServerChannel(
            self._shares,
            guest.files,
            chan.write,
            lambda: stream.unseen + chan.get_write_buffer_size(),
            WAITING_BYTES,
        )

        async def serve() -> None:
            stream.on_seen.append(channel.taken)
            try:
                await channel.run()
            finally:
                stream.on_seen.remove(channel.taken)
                chan.close()

        self._run(serve())
        return channel


def takes_packets(channel: object) -> bool:
    """Asyncssh cuts what is sent into the packets that the other end wants: a megabyte in packets
    of one byte takes half a minute, in which nobody else is served."""
    wanted: int = getattr(channel, "_send_pktsize", LEAST_PACKET_BYTES)
    return wanted >= LEAST_PACKET_BYTES


class _SshServer(asyncssh.SSHServer):
    """An SSH connection on a stream: one mount."""

    def __init__(self, guests: Guests, stream: TunnelStream) -> None:
        self._guests = guests
        self._stream = stream
        self._host = ""
        self._guest: Guest | None = None
        self._channels = 0

    def begin_auth(self, username: str) -> bool:
        """The client gives the machine that it is on for a user's name."""
        self._host = username
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._guests.is_known(key)

    def auth_completed(self) -> None:
        self._guests.proved(self._stream)
        self._guest = self._guests.enter(self._stream.id, self._host)

    def session_requested(self) -> Any:
        """False where there are too many."""
        assert self._guest is not None
        if self._channels >= MAX_CHANNELS:
            return False
        self._channels += 1
        return _SshChannel(self._guests, self._stream, self._guest, self._closed)

    def _closed(self) -> None:
        self._channels -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self._guest is not None:
            self._guests.leave(self._stream.id, self._guest)


class _SshChannel(asyncssh.SSHServerSession[bytes]):
    """Only SFTP: no shell, no command."""

    def __init__(
        self, guests: Guests, stream: TunnelStream, guest: Guest, on_closed: Callable[[], None]
    ) -> None:
        self._guests = guests
        self._stream = stream
        self._guest = guest
        self._on_closed = on_closed
        self._channel: ServerChannel | None = None

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        """Variables are of no use here, and asyncssh would keep as many as a client sends."""
        self._chan = chan
        vars(chan)["_process_env_request"] = lambda packet: False

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == "sftp" and takes_packets(self._chan)

    def session_started(self) -> None:
        self._channel = self._guests.open_channel(self._stream, self._guest, self._chan)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if self._channel is not None:
            self._channel.received(data)

    def eof_received(self) -> bool:
        """sftp(1) says so when it is done, and waits for us to close the channel."""
        if self._channel is not None:
            self._channel.ended()
        return False

    def resume_writing(self) -> None:
        if self._channel is not None:
            self._channel.taken()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed()
        if self._channel is not None:
            self._channel.ended()
