"""The user's keys for one login: files, certificates, and which of an agent's may be shown."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh.public_key import load_keypairs

from hpcfs.remotes.ssh.said import Said
from hpcfs.remotes.ssh.tokens import Tokens
from hpcfs.transfer.messages import SshSite, WrongSettings

log = logging.getLogger(__name__)

DEFAULT_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


class _Keys(list[asyncssh.SSHKeyPair]):
    """asyncssh takes an empty list for "look into ~/.ssh yourself"; this one is none."""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Identities:
    """`key_files` are private keys that exist, some of which may need a passphrase."""

    key_files: tuple[Path, ...]
    options: dict[str, Any] = field(repr=False)


def read(site: SshSite, answer: Said, tokens: Tokens) -> Identities:
    """Raises WrongSettings when the mount's own identity_file is not there; what ssh_config names
    and is not there is passed over, as ssh does."""
    named = _named(site, answer, tokens)
    existing = [path for path in named if path.is_file() and os.access(path, os.R_OK)]
    private = [path for path in existing if b"PRIVATE KEY" in path.read_bytes()]
    paths = [tokens.path(name) for name in answer.all("certificatefile") if name.lower() != "none"]
    certificates = list(_certificates(paths))
    agent = _agent(answer)
    only = list(_public(named, certificates)) if answer.is_on("identitiesonly") else None
    if only == []:
        agent = ""
    return Identities(
        tuple(private),
        {
            "client_keys": _Keys(_unlocked(private, certificates)),
            "agent_path": agent,
            "agent_identities": only or None,
            "pkcs11_provider": _provider(answer),
        },
    )


def _named(site: SshSite, answer: Said, tokens: Tokens) -> list[Path]:
    if site.identity_file is not None:
        chosen = Path(site.identity_file).expanduser()
        if not chosen.is_file():
            raise WrongSettings(f"the identity file {chosen} for {site.host} does not exist")
        return [chosen]
    names = answer.all("identityfile") or [f"~/.ssh/{name}" for name in DEFAULT_KEY_NAMES]
    paths = (tokens.path(name) for name in names if name.lower() != "none")
    return list(dict.fromkeys(paths))


def _unlocked(
    files: Sequence[Path], certificates: Sequence[asyncssh.SSHCertificate]
) -> Iterator[asyncssh.SSHKeyPair]:
    """Those that need no passphrase; for the others the user is asked when all else was refused."""
    for path in files:
        try:
            yield from load_keypairs([str(path)], None, certificates, ignore_encrypted=True)
        except (asyncssh.KeyImportError, OSError, ValueError) as error:
            log.warning("the key %s is passed over: %s", path, error)


def _certificates(files: Sequence[Path]) -> Iterator[asyncssh.SSHCertificate]:
    for path in files:
        try:
            yield asyncssh.read_certificate(path)
        except FileNotFoundError:
            continue
        except (asyncssh.KeyImportError, OSError, ValueError) as error:
            log.warning("the certificate %s is passed over: %s", path, error)


def _public(
    named: Sequence[Path], certificates: Sequence[asyncssh.SSHCertificate]
) -> Iterator[bytes]:
    """What IdentitiesOnly lets an agent show: the keys of the files, told by their public half."""
    for path in named:
        for name in (path.with_name(f"{path.name}.pub"), path):
            try:
                yield asyncssh.read_public_key(name).public_data
                break
            except (asyncssh.KeyImportError, OSError, ValueError):
                continue
        try:
            yield asyncssh.read_certificate(f"{path}-cert.pub").public_data
        except (asyncssh.KeyImportError, OSError, ValueError):
            continue
    yield from (certificate.public_data for certificate in certificates)


def _agent(answer: Said) -> str:
    """The agent's socket, or nothing. IdentityAgent may name a variable in its old form."""
    values = answer.all("identityagent")
    if not values or values[0] == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK", "")
    if values[0].lower() == "none":
        return ""
    if values[0].startswith("$"):
        return os.environ.get(values[0][1:].strip("{}"), "")
    return os.path.expanduser(values[0])


def _provider(answer: Said) -> str | None:
    provider = answer.one("pkcs11provider")
    return provider if provider and os.path.exists(provider) else None
