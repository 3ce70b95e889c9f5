"""The first words on a pipe: before anything else each end shows that it knows the secret.

A port is reached by others too: by who floods it, and, once a tunnel has ended, by who listens in
its place. The greeting has a nonce of the server; the mount answers with one of its own and says
what it wants; the server answers that. What both say lies under a pad that is made of the secret
and both nonces, and is signed with them (HMAC-SHA256, RFC 2104). So one hash tells a mount from a
stranger, before anything that costs more is begun, nothing can be said again to the tunnel or to
another mount, and who listens in the tunnel's place learns nothing of the streams.

The secret opens no file: that takes the keys of tunnel/proof.py, or SSH's.
"""

from __future__ import annotations

import hmac
import re
import struct
from dataclasses import dataclass, field

from hpcfs.tunnel.stream import ID_BYTES, Garbled

GREETING = b"HPCFS-TUNNEL/2 "
NONCE_BYTES = 16
OPENING = struct.Struct(f">{ID_BYTES}sQ")
"""A stream's id, and how many of its bytes have come."""
_PROOF_BYTES = 32
SEALED_BYTES = OPENING.size + _PROOF_BYTES
_NONCE = re.compile(rb"[0-9a-f]{%d}" % (2 * NONCE_BYTES))
KNOCK_BYTES = NONCE_BYTES + SEALED_BYTES
"""The mount's nonce, and its opening, sealed."""
MAX_GREETING_BYTES = 100


@dataclass(frozen=True)
class Door:
    """A tunnel, to who knows its `secret`."""

    tunnel_id: str
    secret: str = field(repr=False)

    @property
    def _greeting(self) -> bytes:
        return GREETING + self.tunnel_id.encode() + b" "

    def greeting(self, nonce: bytes) -> bytes:
        """A line."""
        return self._greeting + nonce.hex().encode() + b"\n"

    def nonce_in(self, line: bytes) -> bytes:
        """Of a greeting without its newline. Raises Garbled for what is not this tunnel's."""
        digits = line.removeprefix(self._greeting)
        if digits == line or not _NONCE.fullmatch(digits):
            raise Garbled("it is not this tunnel")
        return bytes.fromhex(digits.decode())

    def seal(self, who: bytes, nonces: bytes, stream_id: bytes, seen: int) -> bytes:
        """What `who` (client or server) says, for who has heard both nonces."""
        said = self._padded(who, nonces, OPENING.pack(stream_id, seen))
        return said + self._mac(b"proof of the " + who, nonces + said)

    def unseal(self, who: bytes, nonces: bytes, sealed: bytes) -> tuple[bytes, int]:
        """Raises Garbled where it was not said by `who` in this conversation."""
        said, proof = sealed[: OPENING.size], sealed[OPENING.size :]
        if not hmac.compare_digest(proof, self._mac(b"proof of the " + who, nonces + said)):
            raise Garbled("it does not know the tunnel's secret")
        stream_id, seen = OPENING.unpack(self._padded(who, nonces, said))
        return stream_id, seen

    def _padded(self, who: bytes, nonces: bytes, data: bytes) -> bytes:
        pad = self._mac(b"pad of the " + who, nonces)
        return bytes(one ^ other for one, other in zip(data, pad, strict=False))

    def _mac(self, purpose: bytes, data: bytes) -> bytes:
        words = b"\0".join((purpose, self.tunnel_id.encode(), data))
        return hmac.digest(bytes.fromhex(self.secret), words, "sha256")
