"""A login with its SFTP channels, which all namespaces of one site share while a connection lasts.

Two channels on the one SSH connection, so that a stat does not queue behind megabytes of reads:
`meta` for small requests, `bulk` for bytes. A server that grants one channel only gets both kinds
on it, and so does a child `ssh` where a second one would be a second login (stdio.py). We drive
asyncssh's SFTPClientHandler, the layer of single requests, not its SFTPClient: ours are the pieces
in flight and the offsets, and the paths are bytes as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hpcfs.model.errors import ProtocolError, Unreachable, WrongSettings
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.model.usage import Traffic
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.rate import RateLimit
from hpcfs.remotes.sftp.attrs import Owners
from hpcfs.remotes.sftp.channels import of_service, open_channel, open_channels, open_more
from hpcfs.remotes.sftp.flow import Flow
from hpcfs.remotes.sftp.handles import Handles
from hpcfs.remotes.sftp.hashes import Hasher
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.stdio import log_in_by_ssh
from hpcfs.remotes.sftp.translate import translated
from hpcfs.remotes.ssh.login import log_in
from hpcfs.remotes.ssh.offer import LoginOffer
from hpcfs.remotes.ssh.receiver import shorten
from hpcfs.remotes.ssh.sender import shorten_sending
from hpcfs.remotes.ssh.shared_session import SharedSession
from hpcfs.remotes.ssh.shell import Shell

UPLOAD_BYTES_UNDER_WAY = 16 * 1024 * 1024
MAX_UPLOADS = 64
"""At once: each has a file open on the server, which grants a few hundred."""


class AnyLogin(Protocol):
    """A login that carries the channels: asyncssh's connection, or the user's own ssh."""

    @property
    def user(self) -> str:
        """The remote user's name."""
        ...

    @property
    def shown(self) -> str:
        """The host as the user knows it, for messages."""
        ...

    @property
    def connections(self) -> int:
        """How many connections there are."""
        ...

    @property
    def ended(self) -> asyncio.Event:
        """Set when it has ended, for any reason."""
        ...

    async def open_shell(self) -> Shell | None:
        """Start a shell; None where that would be a login of its own. Raises asyncssh's errors and
        OSError."""
        ...

    async def check(self, *, doubted: bool = False) -> None:
        """Ask for a sign of life (see `AnySession.check`)."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


async def _unknown() -> bool:
    """Nothing tells whether a server that is busy is still there."""
    return False


@dataclass
class SftpSession:
    """Everything that ends when the connection ends; remote handles belong to one session."""

    login: AnyLogin
    channels: list[Requests]
    home: bytes
    """The remote user's home directory, an absolute path."""
    owners: Owners
    reading: Flow = field(default_factory=Flow)
    writing: Flow = field(default_factory=lambda: Flow(UPLOAD_BYTES_UNDER_WAY))
    sets_without_following: bool = True
    """Whether lsetstat@openssh.com is there and works: before glibc 2.32 it could set no modes."""
    reads_target_first: bool | None = None
    """The order of a symlink request's paths (links.py); None until it was looked for."""
    uploading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_UPLOADS))
    appends: bool = True
    """Whether files can be opened for appending; false once that has failed."""
    shared_handles: bool = False
    """A handle counts on all channels, so that a file can be read over several."""
    open_channel: Callable[[], Awaitable[Requests]] | None = None
    """One more; None where that would be a login of its own."""
    answers: Callable[[], Awaitable[bool]] = _unknown
    """Asks the server for a sign of life, though it may be busy with a request."""
    attended: bool = False
    """Whether the user took part in the login, and would have to again."""
    _more: asyncio.Task[list[Requests]] | None = None

    def __post_init__(self) -> None:
        self.hasher = Hasher(self.login.shown, self.login.open_shell)
        self.handles = Handles()
        self._share_handles(self.channels)

    def _share_handles(self, channels: Iterable[Requests]) -> None:
        for channel in channels:
            channel.handles = self.handles

    @property
    def meta(self) -> Requests:
        """The channel for small requests."""
        return self.channels[0]

    @property
    def bulk(self) -> Requests:
        """The channel for bytes."""
        return self.channels[-1]

    @property
    def is_read_only(self) -> bool:
        """OpenSSH's sftp-server -R: of its extensions it then offers only those that read."""
        meta = self.meta
        writing = (meta._supports_posix_rename, meta._supports_hardlink, meta._supports_fsync)
        return meta._supports_statvfs and not any(writing)

    def reader(self) -> Requests:
        """Return the channel for one more piece of a file: that with the fewest bytes to come."""
        if not self.shared_handles:
            return self.bulk
        return min(self.channels[1:], key=lambda channel: channel.bytes_asked_for)

    async def more_channels(self) -> list[Requests]:
        """Return the further channels for large uploads; the first call opens as many as the server
        grants then."""
        if self.open_channel is None or len(self.channels) < 2:
            return []
        if self._more is None:
            self._more = asyncio.create_task(open_more(self.open_channel))
        channels = [channel for channel in await asyncio.shield(self._more) if not channel.ended]
        self._share_handles(channels)
        return channels

    def traffic(self) -> Traffic:
        """Return what is open. Channels for large uploads count once all are there."""
        more = self._more.result() if self._more is not None and self._more.done() else []
        channels = [channel for channel in (*self.channels, *more) if not channel.ended]
        under_way = sum(channel.under_way for channel in channels)
        received = sum(channel.received_bytes for channel in channels)
        return Traffic(self.login.connections, len(channels), under_way, received=received)

    @property
    def shown(self) -> str:
        """The host as the user knows it, for messages."""
        return self.login.shown

    @property
    def ended(self) -> asyncio.Event:
        """Set when the connection has ended."""
        return self.login.ended

    @property
    def lost(self) -> bool:
        """Whether the connection or a channel has ended."""
        return self.ended.is_set() or any(channel.ended for channel in self.channels)

    @property
    def read_bytes(self) -> int:
        """The largest read that the server takes, in bytes."""
        return self.bulk.limits.max_read_len

    @property
    def write_bytes(self) -> int:
        """The largest write that the server takes, in bytes."""
        return self.bulk.limits.max_write_len

    @property
    def is_idle(self) -> bool:
        """Whether nothing is open or under way (see `AnySession.is_idle`)."""
        is_used = self.handles.open_count or self.traffic().requests or self.hasher.is_busy
        return not is_used

    async def check(self, *, doubted: bool = False) -> None:
        """Ask for a sign of life (see `AnySession.check`)."""
        await self.login.check(doubted=doubted)

    async def close(self) -> None:
        """Close the connection with all channels."""
        await self.login.close()


def traffic_of(shared: SharedSession[SftpSession]) -> Traffic:
    """Return what is open on the session; nothing where there is none."""
    return Traffic() if shared.session is None else shared.session.traffic()


async def open_session(
    spec: SiteSpec, prompter: Prompter, offer: LoginOffer | None = None
) -> SftpSession:
    """Log in and start SFTP; `offer` remembers what was offered. Raises RemoteErrors only."""
    site = spec.site
    if not isinstance(site, SshSite):
        raise WrongSettings("an SSH site was expected")
    if site.transport == "openssh":
        login = await log_in_by_ssh(site, prompter, offer)
        session = await begin(login, spec, login.open_channels())
        session.attended = login.attended
        session.answers = login.answers
        return session
    connected = await log_in(site, prompter, offer=offer)
    for connection in (*connected.jumps, connected.connection):
        shorten(connection)
        shorten_sending(connection)
    session = await begin(connected, spec, of_service(open_channels(connected), connected))
    session.open_channel = lambda: open_channel(connected)
    session.attended = connected.attended
    if connected.liveness is not None:
        session.answers = connected.liveness.answers
    return session


async def begin(
    login: AnyLogin,
    spec: SiteSpec,
    opening: Awaitable[list[Requests]],
    *,
    shared_handles: bool = False,
) -> SftpSession:
    """Return the session of a login; on failure the login is closed. Raises RemoteErrors only."""
    try:
        async with asyncio.timeout(spec.site.connect_timeout):
            with translated(b"", login.shown):
                channels = await opening
            home, owners = await _look_around(channels[0], login, spec)
    except TimeoutError:
        await login.close()
        raise Unreachable(
            f"{login.shown} let us in, but its SFTP service did not answer within "
            f"{spec.site.connect_timeout:g} s"
        ) from None
    except BaseException as error:
        is_over = login.ended.is_set()
        await login.close()
        if is_over and isinstance(error, Unreachable):
            raise Unreachable(
                f"{login.shown} let us in, and ended the connection before SFTP began"
            ) from error
        raise
    return SftpSession(
        login,
        channels,
        home,
        owners,
        Flow(rate=RateLimit(spec.download_limit)),
        Flow(UPLOAD_BYTES_UNDER_WAY, rate=RateLimit(spec.upload_limit)),
        shared_handles=shared_handles,
    )


async def _look_around(requests: Requests, login: AnyLogin, spec: SiteSpec) -> tuple[bytes, Owners]:
    """The home directory, and who owns it: that is the remote user."""
    with translated(b"~", login.shown):
        home, attrs = await together(find_home(requests, login.shown), requests.stat(b".", 0))
    uid, gid = attrs.uid, attrs.gid
    if uid == 0 and login.user != "root":
        # A chroot's top belongs to root by sshd's own rule: it does not tell who we are.
        uid = gid = None
    return home, Owners(spec.uid, spec.gid, uid, gid)


async def find_home(requests: Requests, shown: str) -> bytes:
    """Ask for the home directory. Raises ProtocolError where the answer is no absolute path, and
    asyncssh's errors."""
    names, _ = await requests.realpath(b".")
    home = names[0].filename if names else None
    if not isinstance(home, bytes) or not home.startswith(b"/") or b"\0" in home:
        raise ProtocolError(f"{shown} does not tell its home directory")
    return home


async def together(*requests: Coroutine[Any, Any, Any]) -> list[Any]:
    """Send requests at once, in this order, and wait for all; when one fails, for its failure.

    SFTP servers must treat requests about one file in the order in which they come.
    """
    tasks = [asyncio.ensure_future(request) for request in requests]
    return await all_of(tasks)


async def all_of(tasks: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Return the results; when a task fails or we are cancelled, no task is left behind."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await give_up(tasks)
        raise


async def give_up(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """End tasks whose results nobody wants any more, whatever has become of them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
