"""The handshake on a new pipe: before anything else each end proves that it knows the secret.

Other users can reach a port too: they may flood it and, once a tunnel has ended, listen in its
place. The server's greeting holds a nonce; the mount answers with its own nonce and a request; the
server answers that. Both messages are XORed with a pad derived from the secret and both nonces, and
authenticated with the same inputs (HMAC-SHA256, RFC 2104). So one hash tells a mount from a
stranger before any costlier work starts, no message can be replayed to the tunnel or to another
mount, and an impostor that listens in the tunnel's place learns nothing about the streams.

The secret opens no file: that takes the keys of tunnel/proof.py, or SSH's.
"""

from __future__ import annotations

import hmac
import re
import struct
from dataclasses import dataclass, field

from hpcfs.tunnel.stream import ID_BYTES, ProtocolViolation

GREETING = b"HPCFS-TUNNEL/2 "
NONCE_BYTES = 16
OPENING = struct.Struct(f">{ID_BYTES}sQ")
"""A stream's id, and the number of its bytes received."""
_PROOF_BYTES = 32
SEALED_BYTES = OPENING.size + _PROOF_BYTES
_NONCE = re.compile(rb"[0-9a-f]{%d}" % (2 * NONCE_BYTES))
KNOCK_BYTES = NONCE_BYTES + SEALED_BYTES
"""Length of the mount's message: its nonce and its sealed opening."""
MAX_GREETING_BYTES = 100


@dataclass(frozen=True)
class TunnelHandshake:
    """Encodes and decodes the handshake of one tunnel; `secret` is in hex."""

    tunnel_id: str
    secret: str = field(repr=False)

    @property
    def _greeting(self) -> bytes:
        return GREETING + self.tunnel_id.encode() + b" "

    def greeting(self, nonce: bytes) -> bytes:
        """Return the server's first line, with its nonce."""
        return self._greeting + nonce.hex().encode() + b"\n"

    def nonce_in(self, line: bytes) -> bytes:
        """Return the nonce in a greeting (without its newline).

        Raises ProtocolViolation if the greeting is not this tunnel's.
        """
        digits = line.removeprefix(self._greeting)
        if digits == line or not _NONCE.fullmatch(digits):
            raise ProtocolViolation("it is not this tunnel")
        return bytes.fromhex(digits.decode())

    def seal(self, who: bytes, nonces: bytes, stream_id: bytes, seen: int) -> bytes:
        """Encrypt and authenticate an opening.

        `who` is the sender, b"client" or b"server"; `nonces` are the server's and the client's,
        concatenated; `seen` is the number of the stream's bytes received.
        """
        said = self._padded(who, nonces, OPENING.pack(stream_id, seen))
        return said + self._mac(b"proof of the " + who, nonces + said)

    def unseal(self, who: bytes, nonces: bytes, sealed: bytes) -> tuple[bytes, int]:
        """Return the stream id and the number of bytes in a sealed opening.

        Raises ProtocolViolation if `who` did not seal it for these nonces.
        """
        said, proof = sealed[: OPENING.size], sealed[OPENING.size :]
        if not hmac.compare_digest(proof, self._mac(b"proof of the " + who, nonces + said)):
            raise ProtocolViolation("it does not know the tunnel's secret")
        stream_id, seen = OPENING.unpack(self._padded(who, nonces, said))
        return stream_id, seen

    def _padded(self, who: bytes, nonces: bytes, data: bytes) -> bytes:
        pad = self._mac(b"pad of the " + who, nonces)
        return bytes(one ^ other for one, other in zip(data, pad, strict=False))

    def _mac(self, purpose: bytes, data: bytes) -> bytes:
        words = b"\0".join((purpose, self.tunnel_id.encode(), data))
        return hmac.digest(bytes.fromhex(self.secret), words, "sha256")
