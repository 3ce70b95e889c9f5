"""What ~/.ssh/config and the mount's own settings say about reaching one host.

Owns the reading of ssh_config and the choice of connection options. Asyncssh reads the file once
to learn what it says (`read_hop`), so that a few of its answers can be mended here before the
connection is made: missing identity files are passed over as ssh does, the jump hosts are ours to
connect (their keys and prompts matter as much as the target's), and AES-GCM goes first where the
user named no ciphers, since it is what saturates a link from Python.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from hpcfs.remotes.ssh.hostkeys import HostKeys
from hpcfs.transfer.messages import SshSite, WrongSettings

KEEPALIVE_SECONDS = 15
KEEPALIVES_MISSED = 3
CHANNEL_WINDOW_BYTES = 80 * 1024 * 1024
"""What one channel may carry before we say that we have it, which asyncssh says at half of it. So
more than twice what is ever asked for at once (sftp/flow.py), and that is what bounds memory.
Asyncssh's own 2 MiB is 35 MB/s at 20 ms."""

FAST_CIPHER = "aes128-gcm@openssh.com"
HOST_KEY_KINDS = (
    "+ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,"
    "rsa-sha2-512,rsa-sha2-256"
)
"""Offered after the kinds that known_hosts has for the host. Asyncssh would offer those only, and a
server that changed its kind of key would end the connection without a reason we could show."""

DEFAULT_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class Hop:
    """One host to log in to: the target, or a jump host on the way."""

    alias: str
    host: str
    port: int
    user: str
    jumps: tuple[str, ...]
    key_files: tuple[Path, ...]
    host_keys: HostKeys = field(compare=False)
    options: dict[str, Any] = field(compare=False, repr=False)

    @property
    def shown(self) -> str:
        return self.alias if self.alias == self.host else f"{self.alias} ({self.host})"


async def read_hop(site: SshSite) -> Hop:
    """What the configuration says about `site`.

    Raises WrongSettings when the file can't be read or understood.
    """
    try:
        return await asyncio.to_thread(_read_hop, site)
    except (asyncssh.ConfigParseError, asyncssh.KeyImportError, ValueError) as error:
        raise WrongSettings(
            f"the SSH configuration for {site.host} is not usable: {error}"
        ) from None
    except OSError as error:
        name = error.filename or site.ssh_config or "~/.ssh/config"
        raise WrongSettings(f"{name} can't be read: {error.strerror}") from None


def jump_site(jump: str, site: SshSite) -> SshSite:
    """One element of ProxyJump, "[user@]host[:port]", as a site of its own."""
    user, _, address = jump.rpartition("@")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or ("]" not in host and ":" in host):
        host, port = address, ""
    return SshSite(
        host=host.strip("[]"),
        user=user or None,
        port=int(port) if port else None,
        ssh_config=site.ssh_config,
        connect_timeout=site.connect_timeout,
    )


def _read_hop(site: SshSite) -> Hop:
    common: dict[str, Any] = {
        "config": _config_files(site),
        "username": site.user or (),
        "agent_forwarding": False,
        "x11_forwarding": False,
    }
    read = asyncssh.SSHClientConnectionOptions(
        host=site.host,
        port=site.port or (),
        client_keys=None,
        known_hosts=None,
        **common,
    )
    said = read.config.get
    host_keys = HostKeys(_texts(said("UserKnownHostsFile")), _texts(said("GlobalKnownHostsFile")))
    key_files, others = _identity_files(site, _texts(said("IdentityFile")))
    certificates = _texts(said("CertificateFile")) or []
    return Hop(
        alias=site.host,
        host=read.host,
        port=read.port,
        user=read.username,
        jumps=_jumps(read.tunnel),
        key_files=tuple(key_files),
        host_keys=host_keys,
        options=common
        | {
            "known_hosts": host_keys.trusted,
            "client_keys": [str(path) for path in key_files]
            + (others if said("IdentitiesOnly") else []),
            "server_host_key_algs": () if said("HostKeyAlgorithms") else HOST_KEY_KINDS,
            "client_certs": [name for name in certificates if Path(name).expanduser().exists()],
            "ignore_encrypted": True,
            "encryption_algs": () if said("Ciphers") else f"^{FAST_CIPHER}",
            "compression_algs": None,
            "connect_timeout": None,
            "login_timeout": 0,
            "keepalive_interval": KEEPALIVE_SECONDS,
            "keepalive_count_max": KEEPALIVES_MISSED,
        },
    )


def _config_files(site: SshSite) -> list[str]:
    if site.ssh_config is not None:
        return [str(Path(site.ssh_config).expanduser())]
    default = Path("~/.ssh/config").expanduser()
    return [str(default)] if default.is_file() else []


def _texts(value: object) -> list[str] | None:
    if value is None or value == ():
        return None
    return [str(item) for item in value] if isinstance(value, Sequence) else [str(value)]


def _jumps(proxy_jump: object) -> tuple[str, ...]:
    if not isinstance(proxy_jump, str):
        return ()
    return tuple(part.strip() for part in proxy_jump.split(",") if part.strip())


def _identity_files(site: SshSite, named: list[str] | None) -> tuple[list[Path], list[str]]:
    """Private key files that exist, and other files (public keys that choose among an agent's)."""
    if site.identity_file is not None:
        chosen = Path(site.identity_file).expanduser()
        if not chosen.is_file():
            raise WrongSettings(f"the identity file {chosen} for {site.host} does not exist")
        return [chosen], []
    names = named or [f"~/.ssh/{name}" for name in DEFAULT_KEY_NAMES]
    existing = [path for name in names if (path := Path(name).expanduser()).is_file()]
    private = [path for path in existing if b"PRIVATE KEY" in path.read_bytes()]
    return private, [str(path) for path in existing if path not in private]
