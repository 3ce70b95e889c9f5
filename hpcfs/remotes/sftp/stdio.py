"""SFTP over the stdin and stdout of the user's own `ssh` (../ssh/openssh.py).

A child carries one channel. Over a ControlMaster connection a second one costs nothing, so small
requests get theirs; otherwise it would be a second login, perhaps with a second factor, and one
channel serves all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import asyncssh
from asyncssh.logging import SSHLogger, logger as asyncssh_logger

from hpcfs.model.errors import LoginNeeded, RemoteError, Unreachable
from hpcfs.model.sites import SshSite
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.sftp.handshake import shake_hands
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.ssh.askpass_server import asking
from hpcfs.remotes.ssh.liveness import ANSWER_SECONDS
from hpcfs.remotes.ssh.login_clock import LOGIN_SECONDS, LoginClock
from hpcfs.remotes.ssh.offer import LoginOffer
from hpcfs.remotes.ssh.openssh import (
    OpenSshTarget,
    command,
    has_master,
    read_target,
    shell_command,
    start,
)
from hpcfs.remotes.ssh.program import Program
from hpcfs.remotes.ssh.shell import Shell, StreamShell
from hpcfs.remotes.ssh.stderr import ending

log = logging.getLogger(__name__)


class Stdio(asyncio.Protocol):
    """One channel: carries the requests, and feeds them what comes."""

    def __init__(self) -> None:
        self.requests = Requests(self)
        self.on_lost: Callable[[], None] = lambda: None

    @property
    def logger(self) -> SSHLogger:
        """The logger of asyncssh, for its SFTP layer."""
        return asyncssh_logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncssh asks of a channel; `default` where it is not known."""
        return default

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (asyncio calls this)."""
        self._transport = cast(asyncio.Transport, transport)

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""
        self._transport.write(data)

    def close(self) -> None:
        """Close the channel."""
        self._transport.close()

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""
        return self._transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Hand the bytes on (asyncio calls this)."""
        self.requests.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the requests under way (asyncio calls this)."""
        self.requests.lost(exc)
        self.on_lost()


@dataclass
class OpenSshLogin:
    """The child processes of one login and their channels."""

    target: OpenSshTarget
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a channel ends that did speak SFTP."""
    programs: list[Program] = field(default_factory=list)
    begun: list[Requests] = field(default_factory=list)
    channels: list[Requests] = field(default_factory=list)
    """Those that speak SFTP."""
    attended: bool = False
    """Whether the user typed something, which the next login would ask for again."""

    @property
    def user(self) -> str:
        """The remote user's name."""
        return self.target.user

    @property
    def shown(self) -> str:
        """The host as the user knows it, for messages."""
        return self.target.shown

    @property
    def connections(self) -> int:
        """Return 1: further children share a ControlMaster's. What jump hosts there are only ssh
        knows."""
        return 1

    async def open_channels(self) -> list[Requests]:
        """Return the first channel, and a second one where it is free."""
        if await has_master(self.target):
            try:
                line = command(self.target.site, options=("BatchMode=yes",))
                await self.begin(await self.start(line))
            except (asyncssh.SFTPError, OSError, RemoteError) as error:
                log.info("%s grants one SFTP channel only: %s", self.shown, error)
        return self.channels

    async def open_shell(self) -> Shell | None:
        """Start a shell over a ControlMaster connection; None where there is none."""
        if not await has_master(self.target):
            return None
        program = await self.start(shell_command(self.target.site))
        reader, writer = await asyncio.open_connection(sock=program.socket)
        return StreamShell(reader, writer)

    async def start(self, line: list[str], environ: Mapping[str, str] | None = None) -> Program:
        """Start a child `ssh`, which is closed with the login. Raises WrongSettings."""
        program = await start(line, environ)
        self.programs.append(program)
        return program

    async def begin(self, program: Program) -> None:
        """Begin SFTP with a child `ssh`. Raises asyncssh's errors and OSError."""
        loop = asyncio.get_running_loop()
        _, stdio = await loop.create_connection(Stdio, sock=program.socket)
        self.begun.append(stdio.requests)
        await shake_hands(stdio.requests, self.shown)
        stdio.on_lost = self.ended.set
        self.channels.append(stdio.requests)

    async def answers(self) -> bool:
        """Return whether the server is there. A connection of its own ends soon where it is not
        (ServerAliveInterval); a ControlMaster's has the user's settings, and the channel for small
        requests is asked."""
        if len(self.channels) < 2:
            return not self.ended.is_set()
        with suppress(TimeoutError, asyncssh.SFTPError, OSError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.channels[0].realpath(b".")
                return True
        return False

    async def check(self, *, doubted: bool = False) -> None:
        """Leave it to ssh, which asks by itself and ends (ServerAliveInterval)."""

    async def close(self) -> None:
        """End all children."""
        for channel in self.begun:
            channel.lost(None)
        await asyncio.gather(*(program.close() for program in self.programs))


async def log_in_by_ssh(
    site: SshSite, prompter: Prompter, offer: LoginOffer | None = None
) -> OpenSshLogin:
    """Log in and open the first channel; `offer` remembers what ssh could offer. Raises
    RemoteErrors only."""
    offer = offer or LoginOffer(site)
    offer.begin()
    login = OpenSshLogin(await read_target(site))
    await offer.note(login.target.sources, login.target.agent)
    try:
        await _log_in(login, prompter)
    except BaseException:
        await login.close()
        raise
    return login


async def _log_in(login: OpenSshLogin, prompter: Prompter) -> None:
    seconds = max(login.target.site.connect_timeout, LOGIN_SECONDS)
    clock = LoginClock(seconds, prompter)
    async with asking(clock) as questions:
        program = await login.start(command(login.target.site), questions.environ)
        try:
            async with clock.running():
                await login.begin(program)
        except TimeoutError:
            raise _not_in_time(login.shown, seconds, answered=clock.was_answered) from None
        except (asyncssh.SFTPError, OSError) as error:
            code, lines = await program.last_words()
            lines = lines or [login.begun[-1].beginning.decode(errors="replace")]
            raise ending(
                login.target, lines, questions.unanswered, code, answered=clock.was_answered
            ) from error
    login.attended = clock.was_answered


def _not_in_time(shown: str, seconds: float, *, answered: bool) -> RemoteError:
    """Whoever typed something may have been asked to confirm it on a phone, too: not once more by
    itself."""
    text = f"ssh did not get into {shown} within {seconds:g} s"
    return LoginNeeded(f"{text}: run 'hpcfs login'") if answered else Unreachable(text)
