"""The identity of one run of `hpcfs tunnel`: an id, two keys and a secret.

They are made in memory, kept over reconnects, and gone with the process. Only the file on the
cluster has the key that opens the shares.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cached_property

import asyncssh

from hpcfs.tunnel.file import SECRET_BYTES
from hpcfs.tunnel.knock import TunnelHandshake


def _new_key() -> asyncssh.SSHKey:
    return asyncssh.generate_private_key("ssh-ed25519")


@dataclass(frozen=True)
class TunnelIdentity:
    """The tunnel's id (32 hex digits), its server's key, its clients' key and its secret (hex)."""

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    host_key: asyncssh.SSHKey = field(default_factory=_new_key, repr=False)
    client_key: asyncssh.SSHKey = field(default_factory=_new_key, repr=False)
    secret: str = field(default_factory=lambda: secrets.token_hex(SECRET_BYTES), repr=False)

    @property
    def handshake(self) -> TunnelHandshake:
        """The handshake's parameters (tunnel/knock.py)."""
        return TunnelHandshake(self.id, self.secret)

    @property
    def client_public(self) -> asyncssh.SSHKey:
        """The public key that mounts authenticate with."""
        return self.client_key.convert_to_public()

    @property
    def host_key_line(self) -> str:
        """The server's public key as a line of authorized_keys."""
        return self.host_key.export_public_key().decode().strip()

    @cached_property
    def client_key_text(self) -> str:
        """The client's private key in OpenSSH's format. Cached, since the encoding has random
        parts."""
        return self.client_key.export_private_key().decode()
