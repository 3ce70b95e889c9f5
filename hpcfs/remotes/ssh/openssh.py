"""The user's own `ssh` as the way to a site: its command line, its process, and how that ends.

For what asyncssh can't do and ssh can: ControlMaster connections, ProxyCommand, hardware keys,
whatever else ~/.ssh/config has. An existing master is used, but none is made: a connection that
others depend on must not end with a mount, nor a mount's live on after it. No shell takes part, and
no secret is on a command line.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpcfs.remotes.ssh.settings import KEEPALIVE_SECONDS, KEEPALIVES_MISSED
from hpcfs.remotes.ssh.shell import COMMAND
from hpcfs.transfer.messages import SshSite, Unreachable, WrongSettings

log = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
"""Each for ending by itself, and for ending when told to."""
LINES_KEPT = 40
LINE_BYTES = 300

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
class Target:
    """A site as `ssh -G` understands it."""

    site: SshSite = field(repr=False)
    host: str
    port: str
    user: str
    control_path: str | None

    @property
    def shown(self) -> str:
        alias = self.site.host
        return alias if alias == self.host else f"{alias} ({self.host})"


def command(site: SshSite, *more: str, options: tuple[str, ...] = ()) -> list[str]:
    """`ssh ... HOST sftp`, with `more` before the host; the first of several options counts."""
    return [*_beginning(site, options), *more, "-s", "--", site.host, "sftp"]


def shell_command(site: SshSite) -> list[str]:
    """A shell that reads a script, over an existing connection that needs no questions."""
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


async def read_target(site: SshSite) -> Target:
    """Raises WrongSettings when ssh is missing or does not understand its configuration."""
    code, said, complaint = await _ask_ssh(site, "-G")
    if code != 0:
        reason = _one_line(complaint.decode(errors="replace"))
        raise WrongSettings(f"the SSH configuration for {site.host} is not usable: {reason}")
    found: dict[str, str] = {}
    for line in said.decode(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, value)
    control = found.get("controlpath", "none")
    return Target(
        site,
        found.get("hostname", site.host),
        found.get("port", "22"),
        found.get("user", ""),
        None if control == "none" else control,
    )


async def has_master(target: Target) -> bool:
    """Whether a ControlMaster connection is there, over which more channels cost nothing."""
    if target.control_path is None:
        return False
    code, _, _ = await _ask_ssh(target.site, "-O", "check")
    return code == 0


async def _ask_ssh(site: SshSite, *more: str) -> tuple[int | None, bytes, bytes]:
    """One of its commands that answer at once; only a `Match exec` can make them wait."""
    process = await _run(command(site, *more), (DEVNULL, PIPE, PIPE))
    try:
        async with asyncio.timeout(site.connect_timeout):
            said, complaint = await process.communicate()
    except TimeoutError:
        raise Unreachable(f"'ssh {more[0]} {site.host}' did not answer in time") from None
    finally:
        _signal(process, signal.SIGKILL)
    return process.returncode, said, complaint


async def _run(
    line: list[str], ends: tuple[int, int, int], environ: Mapping[str, str] | None = None
) -> Process:
    """In a session of its own: no terminal but ours asks, and what it starts can end with it."""
    stdin, stdout, stderr = ends
    try:
        return await asyncio.create_subprocess_exec(
            *line, stdin=stdin, stdout=stdout, stderr=stderr, env=environ, start_new_session=True
        )
    except OSError as error:
        raise WrongSettings(
            f'transport = "openssh" needs the program ssh, which can\'t be started '
            f"({error.strerror}): install it (openssh-client), or leave the key out"
        ) from error


def _signal(process: Process, how: signal.Signals) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)


class Program:
    """A running `ssh`, its stderr going to the log. `socket` is at its stdin and stdout; it
    belongs to whoever makes a transport of it."""

    def __init__(self, process: Process, ours: socket.socket, errors: socket.socket) -> None:
        self.pid = process.pid
        self.socket = ours
        self._errors = errors
        self._process = process
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, line: list[str], environ: Mapping[str, str] | None = None) -> Program:
        """asyncio's own pipe for stderr would not do: asyncio waits for its end too, and a process
        that a ProxyCommand left in the background may hold it open for ever."""
        ours, theirs = socket.socketpair()
        errors, their_errors = socket.socketpair()
        try:
            with theirs, their_errors:
                ends = theirs.fileno(), theirs.fileno(), their_errors.fileno()
                process = await _run(line, ends, environ)
        except BaseException:
            ours.close()
            errors.close()
            raise
        return cls(process, ours, errors)

    async def _listen(self) -> None:
        stderr, writer = await asyncio.open_connection(sock=self._errors)
        rest = b""
        try:
            while chunk := await stderr.read(4096):
                *lines, rest = (rest + chunk).split(b"\n")
                rest = rest[:LINE_BYTES]
                for line in lines:
                    self._heard(line)
        finally:
            self._heard(rest)
            writer.close()

    def _heard(self, line: bytes) -> None:
        text = _one_line(line[:LINE_BYTES].decode(errors="replace"))
        if text:
            log.info("ssh says: %s", text)
            self._lines.append(text)

    async def last_words(self) -> tuple[int | None, list[str]]:
        """Its exit code and what it wrote on stderr, once it has ended; where it does not, it is
        ended, and the code is None."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._process.wait()
                await asyncio.shield(self._listening)
        code = self._process.returncode
        await self.close()
        return code, list(self._lines)

    async def close(self) -> None:
        _signal(self._process, signal.SIGTERM)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            _signal(self._process, signal.SIGKILL)
            await self._process.wait()
        self._listening.cancel()
        await asyncio.wait([self._listening])


def _one_line(text: str) -> str:
    """Printable, without line ends."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(shown.split())
