"""Shortens the way of a channel's bytes from the socket to its session.

Asyncssh takes a packet apart by slicing: what waits in its buffer is copied twice per packet, and a
packet's own bytes six times more, in all 1 CPU second per GB. This receiver takes the socket over
once the login is done, and treats one kind of packet itself: data of an open channel under AES-GCM,
which is decrypted where it lies. Each other packet, and each one of which something is not as it
should be, goes to asyncssh as it came, whole and untouched, so that what SSH is remains in one
place; such a packet is decrypted twice.

Whatever comes shows that the other end is there, as OpenSSH sees it: asyncssh would count only
answers to its keepalives, which wait behind megabytes where much is sent over a slow link.

Packets larger than 32 KiB gain nothing: OpenSSH reads its SFTP server in pieces of that size.

This leans on names inside of asyncssh, and on a recent cryptography. `NAMES` lists them, `shorten`
looks for them and leaves everything as it is where one is missing; a test fails when that happens.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncssh
from asyncssh.channel import SSHChannel
from asyncssh.constants import MSG_CHANNEL_DATA
from asyncssh.encryption import GCMEncryption
from asyncssh.stream import SSHStreamSession
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

log = logging.getLogger(__name__)

BUFFER_BYTES = 512 * 1024
LENGTH_BYTES = 4
TAG_BYTES = 16
DATA_HEAD_BYTES = 10
"""Of the padding's length, the packet's type, the channel and the data's length."""

NAMES = {
    "connection": (
        "_transport", "_inpbuf", "_recv_handler", "_recv_pkthdr", "_recv_packet", "_recv_blocksize",
        "_recv_macsize", "_recv_encryption", "_recv_seq", "_pktlen", "_decompressor", "_channels",
        "_max_recv_pktlen", "_reset_keepalive_timer", "_keepalive_count",
        "data_received",
    ),
    "channel class": ("_accept_data",),
    "cipher": ("_key", "_iv", "_update_iv"),
    "cryptography's AESGCM": ("decrypt_into",),
}  # fmt: skip


def shorten(connection: asyncssh.SSHClientConnection) -> PacketReceiver | None:
    """Put a receiver between the socket and the connection; None where it can't be done."""
    missing = [name for name in NAMES["connection"] if not hasattr(connection, name)]
    missing += [name for name in NAMES["channel class"] if not hasattr(SSHChannel, name)]
    missing += [name for name in NAMES["cryptography's AESGCM"] if not hasattr(AESGCM, name)]
    transport: Any = getattr(connection, "_transport", None)
    through_jump_host = isinstance(transport, SSHChannel) and hasattr(transport, "_session")
    if missing or not (through_jump_host or hasattr(transport, "set_protocol")):
        log.debug("no receiver of ours: %s", missing or type(transport).__name__)
        return None
    receiver = PacketReceiver(connection)
    if through_jump_host:
        transport._session = receiver
    else:
        transport.set_protocol(receiver)
    return receiver


class PacketReceiver(asyncio.BufferedProtocol):
    """Stands between a transport and an SSH connection that is logged in."""

    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self._connection: Any = connection
        size = max(BUFFER_BYTES, 2 * self._connection._max_recv_pktlen)
        self._buffer = memoryview(bytearray(size))
        self._filled = 0
        self._plain = memoryview(bytearray(size))
        self._encryption: object = None
        self._cipher: Any = None
        self._aead: AESGCM | None = None
        self.taken = 0
        """Packets that took the shorter way."""

    # --- the transport's side -------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go (asyncio calls this)."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take the packets that are complete (asyncio calls this)."""
        self._filled += nbytes
        self._connection._reset_keepalive_timer()
        self._connection._keepalive_count = 0
        done = 0
        while step := self._step(self._buffer[done : self._filled]):
            done += step
        rest = self._filled - done
        if rest and done:
            self._buffer[:rest] = bytes(self._buffer[done : self._filled])
        self._filled = rest

    def data_received(self, data: bytes | memoryview, datatype: int | None = None) -> None:
        """Take bytes from a jump host's channel, which has no buffer of ours to fill."""
        rest = memoryview(data)
        while rest:
            room = self.get_buffer(len(rest))
            some = min(len(rest), len(room))
            room[:some] = rest[:some]
            rest = rest[some:]
            self.buffer_updated(some)

    def eof_received(self) -> None:
        """Hand the end on to asyncssh (asyncio calls this)."""
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand the loss on to asyncssh (asyncio calls this)."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hand on to asyncssh that the transport holds enough."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """Hand on to asyncssh that the transport takes more."""
        self._connection.resume_writing()

    # --- packets --------------------------------------------------------------------------------

    def _step(self, waiting: memoryview) -> int:
        """Deal with some of what waits; return how much, 0 when more has to come."""
        if not waiting:
            return 0
        cipher = self._current_cipher()
        begun = self._lacking()
        if cipher is None or begun:
            length = min(begun, len(waiting)) if begun else len(waiting)
        elif len(waiting) < LENGTH_BYTES:
            return 0
        else:
            length = LENGTH_BYTES + int.from_bytes(waiting[:LENGTH_BYTES], "big") + TAG_BYTES
            if length > len(self._buffer):
                length = len(waiting)  # asyncssh will refuse it
            elif length > len(waiting):
                return 0
            elif self._take(cipher, waiting[:length]):
                return length
        self._connection.data_received(bytes(waiting[:length]))
        return length

    def _lacking(self) -> int:
        """Return how much asyncssh needs of a packet that it has begun with; all of it while it is
        busy with one and only stores what comes."""
        connection = self._connection
        stored = len(connection._inpbuf)
        if connection._recv_handler == connection._recv_pkthdr:
            return connection._recv_blocksize - stored if stored else 0
        if connection._recv_handler == connection._recv_packet:
            whole = LENGTH_BYTES + connection._pktlen + connection._recv_macsize
            return int(whole - connection._recv_blocksize - stored)
        return len(self._buffer)

    def _current_cipher(self) -> Any:
        """Asyncssh's GCM cipher, None while packets come in another way. Keys change on the way."""
        connection = self._connection
        encryption = connection._recv_encryption
        if encryption is not self._encryption:
            self._encryption = encryption
            cipher: Any = getattr(encryption, "_cipher", None)
            usable = isinstance(encryption, GCMEncryption) and all(
                hasattr(cipher, name) for name in NAMES["cipher"]
            )
            self._cipher = cipher if usable and not connection._decompressor else None
            self._aead = AESGCM(cipher._key) if usable else None
        return self._cipher

    def _take(self, cipher: Any, packet: memoryview) -> bool:
        """Whether this was data of an open channel, which has it now. Otherwise nothing changed."""
        assert self._aead is not None
        plain = self._plain[: len(packet) - LENGTH_BYTES - TAG_BYTES]
        try:
            self._aead.decrypt_into(cipher._iv, packet[LENGTH_BYTES:], packet[:LENGTH_BYTES], plain)
        except (InvalidTag, ValueError):
            return False
        if len(plain) < DATA_HEAD_BYTES or plain[1] != MSG_CHANNEL_DATA:
            return False
        connection = self._connection
        channel = connection._channels.get(int.from_bytes(plain[2:6], "big"))
        length = int.from_bytes(plain[6:10], "big")
        if DATA_HEAD_BYTES + length + plain[0] != len(plain) or not _is_open(channel, length):
            return False
        cipher._update_iv()
        connection._recv_seq = (connection._recv_seq + 1) & 0xFFFFFFFF
        self.taken += 1
        data = plain[DATA_HEAD_BYTES : DATA_HEAD_BYTES + length]
        channel._accept_data(bytes(data) if _keeps_what_comes(channel) else data)
        return True


def _keeps_what_comes(channel: Any) -> bool:
    """Asyncssh's own sessions do, instead of copying it: the next packet would be decrypted to
    where it lies."""
    return isinstance(getattr(channel, "_session", None), SSHStreamSession)


def _is_open(channel: Any, length: int) -> bool:
    """Whether asyncssh would hand these bytes to the channel's session at once."""
    return (
        getattr(channel, "_recv_state", None) == "open"
        and getattr(channel, "_recv_paused", None) is False
        and length <= getattr(channel, "_recv_window", -1)
    )
