"""SFTP servers that misbehave in ways a real one can't be made to, and ones that ask questions.

All are asyncssh servers in the test's own event loop, over a directory on disk. The faults are
subclasses of asyncssh's SFTPServer; the server's list of extensions can be cut, the login can be
made to need passwords or a dialogue.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import asyncssh
from asyncssh.sftp import SFTPServerHandler

from hpcfs.model.sites import SftpRoot, SiteSpec, SshSite
from tests.support.sshd import ALIAS, LOCAL_GID, LOCAL_UID, LOOPBACK, write_key

USER = "tester"
SESSIONS_END_SECONDS = 20
HUGE = 2**64 - 1
"""What a size of -1 looks like on the wire."""


class Sessions:
    """Counts SFTP sessions, so that a server ends only when it has closed its files."""

    def __init__(self) -> None:
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()

    def begin(self) -> None:
        self._open += 1
        self._none_open.clear()

    def end(self) -> None:
        self._open -= 1
        if not self._open:
            self._none_open.set()

    async def over(self) -> None:
        async with asyncio.timeout(SESSIONS_END_SECONDS):
            await self._none_open.wait()


class Plain(asyncssh.SFTPServer):
    """No fault; serves one directory as "/"."""

    directory = b""
    sessions: Sessions

    def __init__(self, chan: Any) -> None:
        super().__init__(chan, chroot=self.directory)
        self.sessions.begin()

    def exit(self) -> None:
        self.sessions.end()

    def readlink(self, path: bytes) -> bytes:
        """As it is: asyncssh finds no relative target inside a chroot."""
        return os.readlink(self.map_path(path))

    def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        """So too."""
        os.symlink(oldpath, self.map_path(newpath))


class Counting(Plain):
    """No fault; counts the files that are open."""

    held = 0

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        opened = super().open(path, pflags, attrs)
        Counting.held += 1
        return opened

    def close(self, file_obj: Any) -> None:
        Counting.held -= 1
        super().close(file_obj)


class EvilNames(Plain):
    """Lists names that no directory can have, and one twice."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        names = [
            b".", b"..", b"", b"a/b", b"/etc/passwd", b"nul\0nul", b"x" * 256, b"twice", b"twice",
            b"good", b"../up",
        ]  # fmt: skip
        for name in names:
            yield asyncssh.SFTPName(name, attrs=asyncssh.SFTPAttrs(permissions=0o100644, size=1))


class HugeSizes(Plain):
    """Every file has an impossible size."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        attrs = asyncssh.SFTPAttrs(permissions=0o100644, size=HUGE, atime=0, mtime=2**32 - 1)
        yield asyncssh.SFTPName(b"huge", attrs=attrs)

    def lstat(self, path: bytes) -> asyncssh.SFTPAttrs:
        return asyncssh.SFTPAttrs(permissions=0o100644, size=HUGE)


class ChangingSizes(Plain):
    """An open file grows each time it is looked at."""

    looks = 0

    def fstat(self, file_obj: Any) -> asyncssh.SFTPAttrs:
        self.looks += 1
        found = os.fstat(file_obj.fileno())
        return asyncssh.SFTPAttrs(
            permissions=found.st_mode,
            size=found.st_size + self.looks,
            atime=0,
            mtime=int(found.st_mtime),
        )


class NoAttributes(Plain):
    """READDIR and LSTAT tell next to nothing."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        for name in os.listdir(self.map_path(path)):
            yield asyncssh.SFTPName(name, attrs=asyncssh.SFTPAttrs())

    def lstat(self, path: bytes) -> asyncssh.SFTPAttrs:
        return asyncssh.SFTPAttrs(size=os.lstat(self.map_path(path)).st_size)


def _without_type(attrs: asyncssh.SFTPAttrs) -> asyncssh.SFTPAttrs:
    attrs.permissions = stat.S_IMODE(attrs.permissions or 0)
    return attrs


class NoTypes(Plain):
    """No mode has type bits; what a listing shows to humans tells the type."""

    def lstat(self, path: bytes) -> asyncssh.SFTPAttrs:
        return _without_type(asyncssh.SFTPAttrs.from_local(os.lstat(self.map_path(path))))

    def stat(self, path: bytes) -> asyncssh.SFTPAttrs:
        return _without_type(asyncssh.SFTPAttrs.from_local(os.stat(self.map_path(path))))

    def fstat(self, file_obj: Any) -> asyncssh.SFTPAttrs:
        return _without_type(asyncssh.SFTPAttrs.from_local(os.fstat(file_obj.fileno())))

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        for entry in os.scandir(self.map_path(path)):
            found = entry.stat(follow_symlinks=False)
            line = f"{stat.filemode(found.st_mode)}    1 u  g  {found.st_size} Nov 30 ".encode()
            attrs = _without_type(asyncssh.SFTPAttrs.from_local(found))
            yield asyncssh.SFTPName(entry.name, line + entry.name, attrs)

    def format_longname(self, name: asyncssh.SFTPName) -> None:
        """It is there already."""


class NoTypesAtAll(NoTypes):
    """And nothing else tells."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        async for name in super().scandir(path):
            name.longname = name.filename
            yield name


class NoModes(Plain):
    """Sizes and times are all that is told."""

    def _told(self, found: os.stat_result) -> asyncssh.SFTPAttrs:
        return asyncssh.SFTPAttrs(size=found.st_size, atime=1, mtime=int(found.st_mtime))

    def lstat(self, path: bytes) -> asyncssh.SFTPAttrs:
        return self._told(os.lstat(self.map_path(path)))

    def stat(self, path: bytes) -> asyncssh.SFTPAttrs:
        return self._told(os.stat(self.map_path(path)))

    def fstat(self, file_obj: Any) -> asyncssh.SFTPAttrs:
        return self._told(os.fstat(file_obj.fileno()))

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        for entry in os.scandir(self.map_path(path)):
            told = self._told(entry.stat(follow_symlinks=False))
            yield asyncssh.SFTPName(entry.name, entry.name, told)


class ModesWithoutSizes(NoTypes):
    """A listing tells modes, with their types, and no sizes; LSTAT all but types."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        for entry in os.scandir(self.map_path(path)):
            mode = entry.stat(follow_symlinks=False).st_mode
            yield asyncssh.SFTPName(entry.name, b"", asyncssh.SFTPAttrs(permissions=mode))


class NamesWithoutAttributes(Plain):
    """READDIR tells names only; LSTAT answers well."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        for name in os.listdir(self.map_path(path)):
            yield asyncssh.SFTPName(name, attrs=asyncssh.SFTPAttrs())


class ShortReads(Plain):
    """No read returns more than 1,000 bytes."""

    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return super().read(file_obj, offset, min(size, 1000))


class EarlyEnd(Plain):
    """Files end after 1,000 bytes, whatever their size says."""

    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return super().read(file_obj, offset, max(0, min(size, 1000 - offset)))


class Endless(Plain):
    """Reads return more than was asked for."""

    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return b"x" * (size + 1)


class Silent(Plain):
    """Reads are not answered before `released`, which a test sets when it is over."""

    asked: asyncio.Event
    released: asyncio.Event

    async def read(self, file_obj: Any, offset: int, size: int) -> bytes:
        self.asked.set()
        await self.released.wait()
        return b""


class TargetFirst(Plain):
    """Reads a symlink request as OpenSSH does; asyncssh keeps to the draft, link first."""

    def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        super().symlink(newpath, oldpath)


class WithoutReasons:
    """A symlink is refused with a plain failure, whatever stands in its way."""

    def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        try:
            super().symlink(oldpath, newpath)  # type: ignore[misc]
        except OSError:
            raise asyncssh.SFTPFailure("Failure") from None


class VagueTargetFirst(WithoutReasons, TargetFirst):
    pass


class VagueLinkFirst(WithoutReasons, Plain):
    pass


class NoLinks(Plain):
    """Symlinks are refused with a plain failure."""

    def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        raise asyncssh.SFTPFailure("Failure")


class FullDisk(Plain):
    """Writes fail as OpenSSH's do on a full disk: a plain failure, and statvfs that explains it."""

    def write(self, file_obj: Any, offset: int, data: bytes) -> int:
        raise asyncssh.SFTPFailure("Failure")

    def statvfs(self, path: bytes) -> Any:
        return mock.Mock(spec=os.statvfs_result, **statvfs_of())


def statvfs_of(**different: int) -> dict[str, int]:
    """What os.statvfs tells of a disk on which nothing is left."""
    names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail")
    values = (4096, 4096, 1000, 10, 0, 100, 50, 50)
    more = {"f_fsid": 0, "f_flag": 0, "f_namemax": 255}
    return (
        {f"f_{name}": value for name, value in zip(names, values, strict=True)} | more | different
    )


class EndlessDisk(Plain):
    """It says that it has as much as numbers allow."""

    def statvfs(self, path: bytes) -> Any:
        most = {f"f_{name}": HUGE for name in ("bsize", "frsize", "blocks", "bfree", "bavail")}
        return mock.Mock(spec=os.statvfs_result, **statvfs_of(**most, f_files=HUGE))


class BrokenDisk(Plain):
    """Writes fail, and nothing explains it."""

    def write(self, file_obj: Any, offset: int, data: bytes) -> int:
        raise asyncssh.SFTPFailure("Failure")


class NotRoot(Plain):
    """Opening a read-only file for writing is refused even where the test runs as root."""

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        local = self.map_path(path)
        read_only = os.path.exists(local) and not os.stat(local).st_mode & 0o200
        if pflags & asyncssh.FXF_WRITE and read_only:
            raise asyncssh.SFTPPermissionDenied("Permission denied")
        return super().open(path, pflags, attrs)


class NoLooking(Plain):
    """Directories can't be listed."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        for name in (b"never", b"reached"):
            if name:
                raise asyncssh.SFTPPermissionDenied("Permission denied")
            yield asyncssh.SFTPName(name)


class RenameRefused(Plain):
    """Nothing can be renamed to a name that starts with "bad"."""

    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        if newpath.endswith(b"bad") and b"hpcfs-" not in oldpath:
            raise asyncssh.SFTPFailure("Failure")
        return super().rename(oldpath, newpath)


@dataclass
class Login:
    """How a user gets in: by a password, by a dialogue of (prompt, echo, answer), or freely. A
    dialogue ends once it is `confirmed` on a phone, where there is one."""

    password: str | None = None
    dialogue: Sequence[tuple[str, bool, str]] = ()
    key: asyncssh.SSHKey | None = None
    confirmed: Callable[[], Awaitable[bool]] | None = None
    tries: int = 0
    connections: int = 0


class _Server(asyncssh.SSHServer):
    def __init__(self, login: Login) -> None:
        self._login = login
        login.connections += 1

    def begin_auth(self, username: str) -> bool:
        login = self._login
        return bool(login.password or login.dialogue or login.key or login.confirmed)

    def public_key_auth_supported(self) -> bool:
        return self._login.key is not None

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._login.key is not None and key == self._login.key.convert_to_public()

    def password_auth_supported(self) -> bool:
        return self._login.password is not None

    def validate_password(self, username: str, password: str) -> bool:
        self._login.tries += 1
        return password == self._login.password

    def kbdint_auth_supported(self) -> bool:
        return bool(self._login.dialogue or self._login.confirmed)

    def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
        prompts = [(text, echo) for text, echo, _ in self._login.dialogue]
        return "Second factor", "Have your phone ready", "en", prompts

    async def validate_kbdint_response(self, username: str, responses: Sequence[str]) -> bool:
        self._login.tries += 1
        if self._login.confirmed is not None and not await self._login.confirmed():
            return False
        return list(responses) == [answer for _, _, answer in self._login.dialogue]


@dataclass(frozen=True)
class EvilSite:
    """Where the server is: `start` reaches it, its host key is known unless told otherwise."""

    spec: SiteSpec
    directory: Path
    known_hosts: Path
    host_key: Path
    port: int
    login: Login


@asynccontextmanager
async def evil_site(
    base: Path,
    sftp: type[Plain] = Plain,
    *,
    without: Collection[bytes] = (),
    login: Login | None = None,
    wrap: Callable[[SiteSpec], SiteSpec] = lambda spec: spec,
    version: str | None = None,
) -> AsyncIterator[EvilSite]:
    """A server in this event loop. `without` names extensions that it does not have, `version` is
    what its banner says it is."""
    directory = _served(base)
    login = login or Login()
    host_key = write_key(base / "host_key")
    sessions = Sessions()
    given = {"directory": os.fsencode(directory), "sessions": sessions}
    factory = type(sftp.__name__, (sftp,), given)
    extensions = [pair for pair in SFTPServerHandler._extensions if pair[0] not in without]
    with mock.patch.object(SFTPServerHandler, "_extensions", extensions):
        acceptor = await asyncssh.listen(
            LOOPBACK,
            0,
            server_host_keys=[str(host_key)],
            server_factory=lambda: _Server(login),
            sftp_factory=factory,
            server_version=version or (),
        )
        try:
            yield _site(base, directory, host_key, acceptor.get_port(), login, wrap)
        finally:
            acceptor.close()
            await acceptor.wait_closed()
            await sessions.over()


def _served(base: Path) -> Path:
    directory = base / "served"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _site(
    base: Path,
    directory: Path,
    host_key: Path,
    port: int,
    login: Login,
    wrap: Callable[[SiteSpec], SiteSpec],
) -> EvilSite:
    known_hosts = base / "known_hosts"
    known_hosts.write_text(f"[{LOOPBACK}]:{port} {Path(f'{host_key}.pub').read_text()}")
    config = base / "ssh_config"
    config.write_text(
        f"Host {ALIAS}\n    HostName {LOOPBACK}\n    Port {port}\n    User {USER}\n"
        f"    UserKnownHostsFile {known_hosts}\n"
    )
    spec = SiteSpec(
        site=SshSite(ALIAS, ssh_config=str(config)),
        roots={"ns": SftpRoot("/")},
        state_dir=str(base),
        uid=LOCAL_UID,
        gid=LOCAL_GID,
    )
    return EvilSite(wrap(spec), directory, known_hosts, host_key, port, login)
