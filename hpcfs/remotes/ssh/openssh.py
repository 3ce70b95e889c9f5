"""The command line of the user's own `ssh` as the way to a site, and what it says beforehand.

For what asyncssh can't do and ssh can: ControlMaster connections, ProxyCommand, hardware keys,
whatever else ~/.ssh/config has. An existing master is used, but none is made: a connection that
others depend on must not end with a mount, nor a mount's live on after it. No shell takes part, and
no secret is on a command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpcfs.model.errors import Unreachable, WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh import identities, options, program
from hpcfs.remotes.ssh.offer import with_halves
from hpcfs.remotes.ssh.options import SshOptions
from hpcfs.remotes.ssh.program import Program
from hpcfs.remotes.ssh.settings import KEEPALIVE_SECONDS, KEEPALIVES_MISSED
from hpcfs.remotes.ssh.shell import COMMAND

_OPTIONS = (
    "ClearAllForwardings=yes",
    "Compression=no",
    "ControlMaster=no",
    "EscapeChar=none",
    "LogLevel=ERROR",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    f"ServerAliveInterval={KEEPALIVE_SECONDS}",
    f"ServerAliveCountMax={KEEPALIVES_MISSED}",
)


@dataclass(frozen=True)
class OpenSshTarget:
    """A site as `ssh -G` understands it."""

    site: SshSite = field(repr=False)
    host: str
    port: str
    user: str
    control_path: str | None
    sources: tuple[Path, ...] = ()
    """The files that ssh takes keys, certificates and known hosts from, there or not."""
    agent: str = ""

    @property
    def shown(self) -> str:
        """The alias, with the host name where that is another one."""
        alias = self.site.host
        return alias if alias == self.host else f"{alias} ({self.host})"


def command(site: SshSite, *more: str, options: tuple[str, ...] = ()) -> list[str]:
    """Return the command line `ssh ... HOST sftp`, with `more` before the host; the first of
    several options counts."""
    return [*_beginning(site, options), *more, "-s", "--", site.host, "sftp"]


def shell_command(site: SshSite) -> list[str]:
    """Return the command line of a shell that reads a script, over an existing connection that
    needs no questions."""
    return [*_beginning(site, ("BatchMode=yes",)), "--", site.host, COMMAND]


def _beginning(site: SshSite, options: tuple[str, ...]) -> list[str]:
    line = ["ssh", "-T", "-x", "-a"]
    if site.ssh_config is not None:
        line += ["-F", str(Path(site.ssh_config).expanduser())]
    if site.user is not None:
        line += ["-l", site.user]
    if site.port is not None:
        line += ["-p", str(site.port)]
    if site.identity_file is not None:
        line += ["-i", str(_existing(site.identity_file, site.host))]
    for option in (*options, *_OPTIONS, f"ConnectTimeout={math.ceil(site.connect_timeout)}"):
        line += ["-o", option]
    return line


def _existing(identity_file: str, host: str) -> Path:
    """ssh would pass over a missing one and be refused later."""
    chosen = Path(identity_file).expanduser()
    if not chosen.is_file():
        raise WrongSettings(f"the identity file {chosen} for {host} does not exist")
    return chosen


async def read_target(site: SshSite) -> OpenSshTarget:
    """Return the site as ssh understands it. Raises WrongSettings when ssh is missing or does not
    understand its configuration."""
    found = options.parse(await options.ask_ssh(command(site, "-G"), site))
    return OpenSshTarget(
        site,
        found.one("hostname") or site.host,
        found.one("port") or "22",
        found.one("user") or "",
        found.one("controlpath"),
        tuple(_sources(found)),
        identities.agent_of(found),
    )


def _sources(found: SshOptions) -> Iterator[Path]:
    for option in ("identityfile", "certificatefile"):
        for name in found.all(option):
            yield from with_halves(name)
    yield from (Path(name).expanduser() for name in found.files("userknownhostsfile") or ())


async def has_master(target: OpenSshTarget) -> bool:
    """Return whether a ControlMaster connection is there, over which more channels cost nothing."""
    if target.control_path is None:
        return False
    site = target.site
    try:
        code, _, _ = await program.ask(command(site, "-O", "check"), site.connect_timeout)
    except TimeoutError:
        raise Unreachable(f"'ssh -O check {site.host}' did not answer in time") from None
    return code == 0


async def start(line: list[str], environ: Mapping[str, str] | None = None) -> Program:
    """Start a child ssh. Raises WrongSettings where there is no ssh."""
    try:
        return await Program.start("ssh", line, environ)
    except OSError as error:
        raise options.no_ssh(error) from error
