"""Mutual authentication of a stream's two ends with the tunnel's keys, without encryption.

It is for a Unix socket that only the user can reach, where SSH's encryption would cost half the
speed and protect nothing.

Each end signs both nonces, the session and the tunnel's id with its Ed25519 key (RFC 8032; SSH's
encoding of keys and signatures, RFC 8709). The server's signature comes last: it signs only for a
client that has proved itself. Each message is a 2-byte big-endian length and a MessagePack body.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from typing import TypeVar

import asyncssh
import msgspec

from hpcfs.tunnel.stream import TunnelStream

NONCE_BYTES = 32
SESSION_BYTES = 16
_ALGORITHM = b"ssh-ed25519"
_LENGTH = struct.Struct(">H")

T = TypeVar("T")


class NotProved(Exception):
    """The other end is not the one with the tunnel's key, or ended the stream."""


class Challenge(msgspec.Struct, frozen=True):
    """The server's first message: its nonce."""

    nonce: bytes


class ClientProof(msgspec.Struct, frozen=True):
    """The client's answer to the challenge.

    `host` is the client's own name for its machine, for the laptop's status. Streams of one
    `session` share their open files.
    """

    nonce: bytes
    session: bytes
    host: str
    signature: bytes


class ServerProof(msgspec.Struct, frozen=True):
    """The server's signature over both nonces, the session and the tunnel's id."""

    signature: bytes


class HandshakeMessages:
    """Sends and receives the short messages at the beginning of a stream."""

    def __init__(self, stream: TunnelStream) -> None:
        self._stream = stream
        self._came = bytearray()
        self._more = asyncio.Event()
        self._over = False
        stream.listen(self._arrived, self._ended)

    def finish(self) -> None:
        """Stop listening; bytes that arrived after the last message go to the next listener."""
        self._stream.stop_listening(bytes(self._came))

    def send(self, message: msgspec.Struct) -> None:
        """Write one message to the stream."""
        body = msgspec.msgpack.encode(message)
        self._stream.write(_LENGTH.pack(len(body)) + body)

    async def receive(self, kind: type[T]) -> T:
        """Wait for the next message and decode it.

        Raises NotProved where the stream ends first or the message is invalid.
        """
        (length,) = _LENGTH.unpack(await self._take(_LENGTH.size))
        try:
            return msgspec.msgpack.decode(await self._take(length), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NotProved(f"what came makes no sense ({error})") from None

    async def _take(self, count: int) -> bytes:
        while len(self._came) < count:
            if self._over:
                raise NotProved("the other end closed the connection")
            self._more.clear()
            await self._more.wait()
        taken = bytes(self._came[:count])
        del self._came[:count]
        return taken

    def _arrived(self, data: memoryview) -> None:
        self._came += data
        self._more.set()

    def _ended(self, reason: str) -> None:
        self._over = True
        self._more.set()


async def prove_as_client(
    stream: TunnelStream,
    tunnel: bytes,
    key: asyncssh.SSHKey,
    server: asyncssh.SSHKey,
    *,
    session: bytes,
    host: str,
) -> None:
    """Authenticate as the mount's end: `key` is its private key, `server` the server's public one.

    Raises NotProved.
    """
    messages = HandshakeMessages(stream)
    challenge = await messages.receive(Challenge)
    nonce = secrets.token_bytes(NONCE_BYTES)
    said = _said(tunnel, challenge.nonce, nonce, session)
    messages.send(ClientProof(nonce, session, host, key.sign(b"client" + said, _ALGORITHM)))
    proof = await messages.receive(ServerProof)
    if not server.verify(b"server" + said, proof.signature):
        raise NotProved("it has not the key of the tunnel's server")
    messages.finish()


async def prove_as_server(
    stream: TunnelStream, tunnel: bytes, key: asyncssh.SSHKey, client: asyncssh.SSHKey
) -> ClientProof:
    """Authenticate as the laptop's end, and return the client's proof.

    `key` is the server's private key, `client` the client's public one. Raises NotProved.
    """
    messages = HandshakeMessages(stream)
    nonce = secrets.token_bytes(NONCE_BYTES)
    messages.send(Challenge(nonce))
    proof = await messages.receive(ClientProof)
    said = _said(tunnel, nonce, proof.nonce, proof.session)
    if not client.verify(b"client" + said, proof.signature):
        raise NotProved("it has not the key that was made for this tunnel")
    messages.send(ServerProof(key.sign(b"server" + said, _ALGORITHM)))
    messages.finish()
    return proof


def _said(tunnel: bytes, server_nonce: bytes, client_nonce: bytes, session: bytes) -> bytes:
    """Return the bytes that both ends sign.

    Raises NotProved for parts of another length: with variable lengths two handshakes could yield
    the same bytes.
    """
    lengths = len(server_nonce), len(client_nonce), len(session)
    if lengths != (NONCE_BYTES, NONCE_BYTES, SESSION_BYTES):
        raise NotProved("its nonce has not the length of one")
    return b" of hpcfs tunnel " + tunnel + server_nonce + client_nonce + session
