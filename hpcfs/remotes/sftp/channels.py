"""SFTP channels on an SSH connection of asyncssh's: opened, fed, and why one came to nothing.

A login that is accepted is no SFTP service yet. Accounts print text before it, have a shell that
ends at once, a forced command, or an expired password: what the server says and how it ends is kept
until the first message, since it is the only reason that there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import asyncssh
from asyncssh.constants import OPEN_REQUEST_SESSION_FAILED

from hpcfs.model.errors import NoService, Unreachable
from hpcfs.remotes.sftp.handshake import shake_hands
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.ssh.login import SshLogin
from hpcfs.remotes.ssh.settings import CHANNEL_WINDOW_BYTES
from hpcfs.remotes.ssh.translate import no_service

log = logging.getLogger(__name__)

MORE_CHANNELS = 2
"""For large uploads, beside the two: servers grant ten (sshd_config(5), MaxSessions)."""
LAST_WORDS_SECONDS = 2.0
"""The longest that a channel may take from the end of its data to its exit code."""
COMPLAINT_BYTES = 300


T = TypeVar("T")


class ServiceEnded(asyncssh.SFTPConnectionLost):
    """Raised when the server ends the channel before SFTP's first message. `how` it ended, and what
    it `said`."""

    def __init__(self, how: str, said: bytes) -> None:
        super().__init__(how or "Connection closed")
        self.how = how
        self.said = said


class Channel(asyncssh.SSHClientSession[bytes]):
    """One SFTP subsystem of an asyncssh connection: hands on what comes."""

    requests: Requests

    def __init__(self) -> None:
        self._complaint = b""
        self._how = ""
        self._closed = asyncio.Event()

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        """Begin (asyncssh calls this)."""
        self.requests = Requests(chan)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Hand the server's bytes on (asyncssh calls this)."""
        if datatype is None:
            self.requests.received(data)
        elif len(self._complaint) < COMPLAINT_BYTES:  # what the server's shell complains about
            self._complaint += bytes(data[:COMPLAINT_BYTES])

    def exit_status_received(self, status: int) -> None:
        """Note how the server's program ended (asyncssh calls this)."""
        self._how = f"exit code {status}"

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        """Note which signal ended the server's program (asyncssh calls this)."""
        self._how = f"signal {signal}"

    def eof_received(self) -> bool:
        """Fail the requests under way (asyncssh calls this)."""
        self.requests.lost(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the requests under way (asyncssh calls this)."""
        self.requests.lost(exc)
        self._closed.set()

    async def last_words(self) -> ServiceEnded:
        """Return how the service ended and what it said, as far as the server tells."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self._closed.wait()
        return ServiceEnded(self._how, self._complaint.strip() or self.requests.beginning)


async def open_channel(login: SshLogin) -> Requests:
    """Open a channel with SFTP on it. Raises ServiceEnded, NoService, and asyncssh's errors."""
    _, session = await login.connection.create_session(
        Channel, subsystem="sftp", command=None, request_pty=False, encoding=None,
        window=CHANNEL_WINDOW_BYTES,
    )  # fmt: skip
    assert isinstance(session, Channel)
    try:
        await shake_hands(session.requests, login.shown)
    except asyncssh.SFTPConnectionLost as error:
        if login.ended.is_set() or session.requests.made_no_sense:
            raise
        raise await session.last_words() from error
    return session.requests


async def open_channels(login: SshLogin) -> list[Requests]:
    """Open one or two channels, asked for at once: each takes four round trips."""
    both = await asyncio.gather(open_channel(login), open_channel(login), return_exceptions=True)
    failures = [result for result in both if isinstance(result, BaseException)]
    granted = [result for result in both if isinstance(result, Requests)]
    for error in failures:
        if not granted or not isinstance(error, (asyncssh.ChannelOpenError, asyncssh.SFTPError)):
            raise _opening_error(error, login) from error
        log.info("%s grants one SFTP channel only: %s", login.shown, error.reason)
    return granted


async def open_more(opening: Callable[[], Awaitable[Requests]]) -> list[Requests]:
    """Open further channels for large uploads, as many as the server grants."""
    opened = await asyncio.gather(
        *(opening() for _ in range(MORE_CHANNELS)), return_exceptions=True
    )
    for result in opened:
        if isinstance(result, BaseException):
            log.info("the server grants no further SFTP channel for large uploads: %s", result)
    return [result for result in opened if isinstance(result, Requests)]


def _opening_error(error: BaseException, login: SshLogin) -> BaseException:
    if login.ended.is_set() or not isinstance(error, asyncssh.ChannelOpenError):
        return error
    if error.code == OPEN_REQUEST_SESSION_FAILED:
        return NoService(
            f"{login.shown} lets us in but has no SFTP service: ask the site to enable the "
            "sftp subsystem of its SSH server"
        )
    return Unreachable(f"{login.shown} opens no SFTP session now: {error.reason}")


async def check_service(login: SshLogin) -> None:
    """Raise NoService where a channel opens and SFTP does not begin; or asyncssh's errors."""
    (await of_service(open_channel(login), login)).lost(None)


async def of_service(opening: Awaitable[T], login: SshLogin) -> T:
    """Return what is opened. Raises NoService where the server ends it by itself: it would do so
    again."""
    try:
        return await opening
    except ServiceEnded as error:
        raise no_service(login.shown, error.how, error.said) from error
