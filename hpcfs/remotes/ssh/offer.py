"""Remembers what a login offered: keys, certificates, an agent's, and which hosts were known.

Whether a refused login is worth another attempt is seen by this, without asking the server. Of
files it keeps the times and sizes, of an agent the public keys; nothing secret.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh.identities import shown_by
from hpcfs.remotes.ssh.options import SYSTEM_FILE

AGENT_SECONDS = 2.0
"""For an agent to tell its keys."""

_Stamp = tuple[int, int, int] | None


class LoginOffer:
    """What was offered at the last attempt to log in to a site, at its jump hosts too."""

    def __init__(self, site: SshSite) -> None:
        config = Path(site.ssh_config or "~/.ssh/config").expanduser()
        self._always = [config, Path(SYSTEM_FILE), _tickets(), *with_halves(site.identity_file)]
        self._files: dict[Path, _Stamp] = {}
        self._agents: dict[str, frozenset[bytes] | None] = {}

    def begin(self) -> None:
        """Forget the attempt before: another one begins."""
        self._agents.clear()
        self._files = {path: _stamp(path) for path in self._always}

    async def note(self, files: Iterable[Path], agent: str) -> None:
        """Remember how these files are now, whether they exist or not, and the keys of the agent at
        this socket (empty: none)."""
        self._files |= {path: _stamp(path) for path in files}
        if agent:
            self._agents[agent] = await _keys(agent)

    async def is_else(self) -> bool:
        """Return whether a login would offer something else now. An agent that does not answer, now
        or then, tells nothing of that."""
        if any(_stamp(path) != stamp for path, stamp in self._files.items()):
            return True
        for agent, before in self._agents.items():
            if before is not None and await _keys(agent) not in (None, before):
                return True
        return False


def with_halves(identity_file: Path | str | None) -> list[Path]:
    """Return a private key's file with those of its public key and certificate, there or not."""
    if identity_file is None:
        return []
    path = Path(identity_file).expanduser()
    return [path, *(path.with_name(f"{path.name}{end}") for end in (".pub", "-cert.pub"))]


def _tickets() -> Path:
    """Return the file of Kerberos tickets (GSSAPIAuthentication), where they are in one: see
    krb5.conf(5), default_ccache_name."""
    place = os.environ.get("KRB5CCNAME", "").removeprefix("FILE:")
    return Path(place or f"/tmp/krb5cc_{os.getuid()}")  # noqa: S108 - only looked at


def _stamp(path: Path) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


async def _keys(agent: str) -> frozenset[bytes] | None:
    """Return the public keys; None where the agent does not answer."""
    try:
        async with asyncio.timeout(AGENT_SECONDS):
            async with shown_by(agent) as keys:
                return frozenset(key.public_data for key in keys)
    except TimeoutError:
        return None
