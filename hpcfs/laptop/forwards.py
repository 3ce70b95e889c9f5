"""Requests the reverse forwards, and explains each refusal of sshd.

The best one is a Unix socket that only the user can reach. Where sshd forbids those, a loopback
port that it chooses takes its place. With `bind`, a port on the address that compute nodes reach is
added: an sshd without GatewayPorts accepts that request and binds loopback, which only a check from
there reveals.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import asyncssh
from asyncssh.constants import OPEN_RESOURCE_SHORTAGE

from hpcfs.laptop import listening, probing
from hpcfs.laptop.acceptor import Acceptor, EndpointKind, Incoming
from hpcfs.laptop.connected_mounts import takes_packets
from hpcfs.model.errors import WrongSettings
from hpcfs.remotes.ssh.login import SshLogin
from hpcfs.remotes.ssh.settings import CHANNEL_WINDOW_BYTES
from hpcfs.tunnel.file import Endpoint, TcpEndpoint, UnixEndpoint

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_FORBIDDEN = {
    "Server has disabled streamlocal forwarding": "AllowStreamLocalForwarding",
    "Server has disabled port forwarding": "AllowTcpForwarding",
    "port forwarding refused": "AllowTcpForwarding or PermitListen",
}
"""OpenSSH's debug messages that precede a refusal by configuration, and the setting
(sshd_config(5)) that causes each. DisableForwarding causes all of them."""

OTHER_WAYS = (
    "start the tunnel straight to the compute node (ProxyJump through the login node) where the "
    "site lets you log in to nodes with a job of yours, ask the site for 'GatewayPorts "
    "clientspecified', or mount on the login node"
)
NO_WAY = (
    "ask the site to allow one, try another login node, or mount the cluster on the laptop "
    "instead ('hpcfs mount HOST: DIRECTORY'), which needs none"
)


@dataclass
class Forwards:
    """The granted forwards: `places` in the order in which a mount is to try them; `notes` say what
    was refused."""

    places: list[Endpoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ForwardEnds:
    """The parties that a forward connects. `sftp` is the session on the login node."""

    login: SshLogin
    sftp: asyncssh.SFTPClient
    acceptor: Acceptor


async def open_forwards(ends: ForwardEnds, socket_path: str | None, bind: str | None) -> Forwards:
    """Open at least one forward. Raises WrongSettings if none is granted, and asyncssh.Error or
    OSError where the connection is lost meanwhile."""
    found = Forwards()
    place: Endpoint | None
    place, refusal = await try_unix(ends, socket_path)
    if place is None:
        found.notes.append(refusal)
        place, refusal = await try_tcp(ends, LOOPBACK)
    if place is None:
        found.notes.append(refusal)
    else:
        found.places.append(place)
    if bind is not None:
        place, refusal = await try_bind(ends, bind)
        if place is None:
            found.notes.append(refusal)
        else:
            found.places.append(place)
    if not found.places:
        shown = ends.login.shown
        raise WrongSettings(
            f"{shown} grants no reverse forward ({'; '.join(found.notes)}): {NO_WAY}"
        )
    return found


async def try_unix(ends: ForwardEnds, path: str | None) -> tuple[UnixEndpoint | None, str]:
    """Forward a Unix socket at that path; return it, or None and the reason why there is none."""
    if path is None:
        return None, "no Unix socket: the home directory's name is too long for one"
    said = len(ends.login.said)
    try:
        await ends.login.connection.create_unix_server(
            lambda: _Arrival(ends, "unix"), path, window=CHANNEL_WINDOW_BYTES
        )
    except asyncssh.ChannelListenError:
        reason = _forbidding(ends.login, said) or f"it can't be made at {path}"
        return None, f"no Unix socket: {reason}"
    return UnixEndpoint(path), ""


async def try_tcp(ends: ForwardEnds, host: str) -> tuple[TcpEndpoint | None, str]:
    """Forward a port that the server chooses; return it, or None and the reason."""
    said = len(ends.login.said)
    try:
        listener = await ends.login.connection.create_server(
            lambda _host, _port: _Arrival(ends, "tcp"), host, 0, window=CHANNEL_WINDOW_BYTES
        )
    except asyncssh.ChannelListenError:
        reason = _forbidding(ends.login, said) or f"{ends.login.shown} has not that address"
        return None, f"no port on {host}: {reason}"
    _guard(listener, ends.acceptor)
    return TcpEndpoint(host, listener.get_port()), ""


def _guard(listener: Any, acceptor: Acceptor) -> None:
    """Refuse surplus connections before asyncssh makes a channel for them, which it does before it
    asks us."""
    process = listener.process_connection

    def process_connection(host: str, port: int) -> Any:
        if not acceptor.has_room():
            raise asyncssh.ChannelOpenError(OPEN_RESOURCE_SHORTAGE, "too many strangers")
        return process(host, port)

    listener.process_connection = process_connection


def _forbidding(login: SshLogin, said_before: int) -> str:
    for text in list(login.said)[said_before:]:
        for words, setting in _FORBIDDEN.items():
            if text.startswith(words):
                return f"the SSH server forbids it ({setting})"
    return ""


async def try_bind(ends: ForwardEnds, bind: str) -> tuple[TcpEndpoint | None, str]:
    """Forward a port that other machines can reach; return it, or None and the reason."""
    place, obstacle = await try_tcp(ends, bind)
    if place is not None:
        obstacle = await _obstacle(ends, place)
        if not obstacle:
            return place, ""
        await ends.login.connection.close_client_tcp_listener(place.host.lower(), place.port)
    return None, f"compute nodes can't reach this tunnel, since {obstacle}: {OTHER_WAYS}"


async def _obstacle(ends: ForwardEnds, place: TcpEndpoint) -> str:
    """Return why other machines can't reach this port, as far as can be seen from here; else an
    empty string."""
    heard = await listening.addresses(ends.sftp, place.port)
    if heard and all(address.is_loopback for address in heard):
        shown = " and ".join(str(address) for address in heard)
        return (
            f"{ends.login.shown} listens on {shown} only, though it was asked for {place.host} "
            f"(GatewayPorts no, or a name that means loopback there)"
        )
    answer = await probing.look(ends.login.connection, place, ends.acceptor.handshake)
    if answer in ("refused", "other"):
        return (
            f"nothing of ours answers at {place.host} port {place.port}, seen from "
            f"{ends.login.shown} (GatewayPorts no, or an address of another machine)"
        )
    if answer == "forbidden" and not heard:
        log.info("whether %s can be reached from other machines could not be seen", place.host)
    return ""


# --- incoming connections -----------------------------------------------------------------------


class _ChannelPipe:
    """A pipe of tunnel/stream.py over an SSH channel. Bytes that can no longer be sent are sent
    again on the next pipe."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def write(self, data: bytes) -> None:
        """Send bytes, unless the channel is closing."""
        if not self._channel.is_closing():
            self._channel.write(data)

    def close(self) -> None:
        """Abort the channel: asyncssh's close would buffer the unsent bytes until the other end
        takes them."""
        self._channel.abort()


class _Arrival(asyncssh.SSHTCPSession[bytes], asyncssh.SSHUNIXSession[bytes]):
    """A connection that somebody made to one of our endpoints."""

    def __init__(self, ends: ForwardEnds, kind: EndpointKind) -> None:
        self._ends = ends
        self._kind = kind
        self._incoming: Incoming | None = None

    def connection_made(self, chan: Any) -> None:
        """Hand the channel to the acceptor, or abort it where its packets are too small."""
        if takes_packets(chan):
            self._incoming = self._ends.acceptor.pipe(_ChannelPipe(chan), self._kind)
        else:
            chan.abort()

    def data_received(self, data: bytes | memoryview, datatype: int | None) -> None:
        """Pass bytes on."""
        if self._incoming is not None:
            self._incoming.received(data)

    def eof_received(self) -> bool:
        """Close the channel."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the acceptor that the pipe broke."""
        if self._incoming is not None:
            self._incoming.lost()
