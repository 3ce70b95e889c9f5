"""Both ends of a stream prove that they are the tunnel's: over a Unix socket that only the user can
reach, where SSH's encryption would cost half the speed and protect nothing.

Each signs the other's nonce, both nonces and the tunnel's id, with its Ed25519 key (RFC 8032; SSH's
encoding of keys and signatures, RFC 8709). The server's signature comes last: it signs for nobody
who has not proved itself. Each message is a 2-byte length and a MessagePack body.
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
    nonce: bytes


class ClientProof(msgspec.Struct, frozen=True):
    """`host` is what the client calls itself, for the laptop's status. Streams of one `session`
    share their open files."""

    nonce: bytes
    session: bytes
    host: str
    signature: bytes


class ServerProof(msgspec.Struct, frozen=True):
    signature: bytes


class Letters:
    """Short messages at the beginning of a stream."""

    def __init__(self, stream: TunnelStream) -> None:
        self._stream = stream
        self._came = bytearray()
        self._more = asyncio.Event()
        self._over = False
        stream.listen(self._arrived, self._ended)

    def finish(self) -> None:
        """What came after them is the next listener's."""
        self._stream.listen_no_more(bytes(self._came))

    def send(self, letter: msgspec.Struct) -> None:
        body = msgspec.msgpack.encode(letter)
        self._stream.write(_LENGTH.pack(len(body)) + body)

    async def receive(self, kind: type[T]) -> T:
        """Raises NotProved where none comes."""
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
    """`key` is the client's private key, `server` the server's public one. Raises NotProved."""
    letters = Letters(stream)
    challenge = await letters.receive(Challenge)
    nonce = secrets.token_bytes(NONCE_BYTES)
    said = _said(tunnel, challenge.nonce, nonce, session)
    letters.send(ClientProof(nonce, session, host, key.sign(b"client" + said, _ALGORITHM)))
    proof = await letters.receive(ServerProof)
    if not server.verify(b"server" + said, proof.signature):
        raise NotProved("it has not the key of the tunnel's server")
    letters.finish()


async def prove_as_server(
    stream: TunnelStream, tunnel: bytes, key: asyncssh.SSHKey, client: asyncssh.SSHKey
) -> ClientProof:
    """What the client said. `key` is the server's private key, `client` the client's public one.
    Raises NotProved."""
    letters = Letters(stream)
    nonce = secrets.token_bytes(NONCE_BYTES)
    letters.send(Challenge(nonce))
    proof = await letters.receive(ClientProof)
    said = _said(tunnel, nonce, proof.nonce, proof.session)
    if not client.verify(b"client" + said, proof.signature):
        raise NotProved("it has not the key that was made for this tunnel")
    letters.send(ServerProof(key.sign(b"server" + said, _ALGORITHM)))
    letters.finish()
    return proof


def _said(tunnel: bytes, server_nonce: bytes, client_nonce: bytes, session: bytes) -> bytes:
    """What both sign. Raises NotProved for parts of another length: with those that may be
    anything, two conversations could come to the same bytes."""
    lengths = len(server_nonce), len(client_nonce), len(session)
    if lengths != (NONCE_BYTES, NONCE_BYTES, SESSION_BYTES):
        raise NotProved("its nonce has not the length of one")
    return b" of hpcfs tunnel " + tunnel + server_nonce + client_nonce + session
