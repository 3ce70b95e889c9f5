"""The user's keys for one login: files, certificates, and which of an agent's may be shown."""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh.packet import SSHPacket
from asyncssh.public_key import load_keypairs

from hpcfs.model.errors import WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh.options import SshOptions
from hpcfs.remotes.ssh.tokens import Tokens

log = logging.getLogger(__name__)

MOST_BYTES = 256 * 1024
"""Of a key file: what is longer is none."""
_MAGIC = b"openssh-key-v1\0"
DEFAULT_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


class _NonEmptyKeys(list[asyncssh.SSHKeyPair]):
    """asyncssh takes an empty list for "look into ~/.ssh yourself"; this one is none."""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Identities:
    """`key_files` are private keys that exist, some of which may need a passphrase; `pairs` those
    that need none, and `public` the public halves of all, as far as they are known. `agent` is a
    socket, or empty; with `only` it shows nothing but what `public` has."""

    key_files: tuple[Path, ...] = ()
    pairs: tuple[asyncssh.SSHKeyPair, ...] = field(default=(), repr=False)
    public: frozenset[bytes] = field(default=frozenset(), repr=False)
    agent: str = ""
    only: bool = False
    provider: str | None = None
    sources: tuple[Path, ...] = field(default=(), repr=False)
    """All files that the configuration names for keys and certificates, there or not."""

    @asynccontextmanager
    async def options(self) -> AsyncIterator[dict[str, Any]]:
        """asyncssh's, for one login. The keys come in ssh's order, which counts where a server ends
        the connection after a few: certificates, those of the agent that are also named, its other
        ones, then what only files have."""
        async with shown_by(self.agent) as held:
            named = [pair for pair in held if pair.public_data in self.public]
            others = [] if self.only else [pair for pair in held if pair not in named]
            certified = [pair for pair in self.pairs if pair.public_data != pair.key_public_data]
            shown = {pair.public_data for pair in held}
            rest = [pair for pair in self.pairs if pair not in certified]
            files = [pair for pair in rest if pair.public_data not in shown]
            yield {
                "client_keys": _NonEmptyKeys([*certified, *named, *others, *files]),
                "agent_path": "",
                "pkcs11_provider": self.provider,
            }


@asynccontextmanager
async def shown_by(place: str) -> AsyncIterator[Sequence[asyncssh.SSHKeyPair]]:
    """Yield the keys of the agent at this socket. One that does not answer has nothing, as with
    ssh."""
    if not place:
        yield ()
        return
    try:
        agent = await asyncssh.connect_agent(place)
    except OSError as error:
        log.info("no agent at %s: %s", place, error)
        yield ()
        return
    try:
        yield await _held(agent)
    finally:
        agent.close()
        await agent.wait_closed()


async def _held(agent: asyncssh.SSHAgentClient) -> Sequence[asyncssh.SSHKeyPair]:
    try:
        return await agent.get_keys()
    except (OSError, ValueError) as error:
        log.warning("the agent does not tell its keys: %s", error)
        return ()


def read(site: SshSite, answer: SshOptions, tokens: Tokens) -> Identities:
    """Return the user's keys for a host. Raises WrongSettings when the mount's own identity_file is
    not there; what ssh_config names and is not there is passed over, as ssh does."""
    named = _named(site, answer, tokens)
    existing = [path for path in named if path.is_file() and os.access(path, os.R_OK)]
    private = [path for path in existing if b"PRIVATE KEY" in _beginning(path)]
    paths = [tokens.path(name) for name in answer.all("certificatefile") if name.lower() != "none"]
    certificates = list(_certificates(paths))
    return Identities(
        key_files=tuple(private),
        pairs=tuple(_unlocked(private, certificates)),
        public=frozenset(_public(named, certificates)),
        agent=agent_of(answer),
        only=answer.is_on("identitiesonly"),
        provider=_provider(answer),
        sources=(*named, *paths),
    )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES)


def _named(site: SshSite, answer: SshOptions, tokens: Tokens) -> list[Path]:
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
    """Return the keys that need no passphrase; for the others the user is asked when all else was
    refused."""
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
    """Return the public keys by which an agent's keys are told to be those of the files."""
    for path in named:
        for name in (path.with_name(f"{path.name}.pub"), path):
            try:
                yield asyncssh.read_public_key(name).public_data
                break
            except (asyncssh.KeyImportError, OSError, ValueError):
                continue
        else:
            yield from _public_half(path)
        try:
            yield asyncssh.read_certificate(f"{path}-cert.pub").public_data
        except (asyncssh.KeyImportError, OSError, ValueError):
            continue
    yield from (certificate.public_data for certificate in certificates)


def _public_half(path: Path) -> Iterator[bytes]:
    """OpenSSH's form of a private key has it in the clear, also under a passphrase (PROTOCOL.key in
    OpenSSH's sources)."""
    try:
        text = _beginning(path)
        body = re.search(rb"BEGIN OPENSSH PRIVATE KEY-+(.*?)-+END", text, re.DOTALL)
        packet = SSHPacket(base64.b64decode(body[1] if body else b""))
        if packet.get_bytes(len(_MAGIC)) == _MAGIC:
            for _ in ("cipher", "derivation", "its options"):
                packet.get_string()
            packet.get_uint32()
            yield packet.get_string()
    except (OSError, ValueError):
        return


def agent_of(answer: SshOptions) -> str:
    """Return the agent's socket, or nothing. IdentityAgent may name a variable in its old form."""
    values = answer.all("identityagent")
    if not values or values[0] == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK", "")
    if values[0].lower() == "none":
        return ""
    if values[0].startswith("$"):
        return os.environ.get(values[0][1:].strip("{}"), "")
    return os.path.expanduser(values[0])


def _provider(answer: SshOptions) -> str | None:
    provider = answer.one("pkcs11provider")
    return provider if provider and os.path.exists(provider) else None
