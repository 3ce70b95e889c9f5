"""The tunnel's file on the cluster, ~/.hpcfs/tunnels/NAME.json, written over the login's SFTP.

Whoever can write to that directory could send mounts elsewhere, and whoever can read the file could
open the shares. So both directories must be the user's own, no symbolic links, and writable by
nobody else. A name belongs to one tunnel: before the file of another one is replaced, its endpoints
are probed, and it is replaced only if it does not answer.
"""

from __future__ import annotations

import logging
import re
import secrets
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import asyncssh
from asyncssh.constants import FXF_CREAT, FXF_EXCL, FXF_WRITE
from asyncssh.sftp import SFTPAttrs

from hpcfs.laptop import listening, probing
from hpcfs.model.errors import PermissionDenied, RemoteError, WrongSettings
from hpcfs.remotes.sftp.translate import translated
from hpcfs.remotes.ssh.login import SshLogin
from hpcfs.tunnel.file import DIRECTORY, MAX_FILE_BYTES, Rendezvous, decode, encode, file_name
from hpcfs.tunnel.knock import TunnelHandshake

log = logging.getLogger(__name__)

MAX_SOCKET_BYTES = 100
"""sshd uses up some of sun_path's 108 bytes on some systems."""
PRIVATE_DIRECTORY = 0o700
PRIVATE_FILE = 0o600
OTHERS_WRITE = 0o022


class NameTaken(WrongSettings):
    """Another tunnel of this name is up, or took this one's place."""


@dataclass(frozen=True)
class TunnelDirectory:
    """The directory of tunnels on the cluster. `owner` is the numeric user there, where it is told.
    `host` is the login node's own name, empty where unknown, `shown` the laptop's name for it."""

    sftp: asyncssh.SFTPClient
    path: str
    owner: int | None
    shown: str
    host: str

    def file(self, name: str) -> str:
        """Return the path of the tunnel's file."""
        return f"{self.path}/{file_name(name)}"

    def new_socket(self, name: str) -> str | None:
        """Return a path that was never used before: an sshd session that does not know yet that it
        is dead may hold the last one. None where the path would be too long for a socket."""
        path = f"{self.path}/{name}-{secrets.token_hex(4)}.sock"
        try:
            return path if len(path.encode()) <= MAX_SOCKET_BYTES else None
        except UnicodeEncodeError:  # the file, which is JSON, could not name it
            return None

    # --- looking ----------------------------------------------------------------------------------

    async def read(self, name: str) -> Rendezvous | None:
        """Read the file; None where it is missing or was not written by a tunnel."""
        path = self.file(name)
        try:
            with translated(path.encode(errors="surrogateescape"), self.shown):
                async with self.sftp.open(path, "rb", encoding=None) as file:
                    text: Any = await file.read(MAX_FILE_BYTES, 0)
            return decode(text)
        except ValueError as error:
            log.warning("%s on %s %s: it is replaced", path, self.shown, error)
        except RemoteError as error:
            _raise_if_lost(error)
        return None

    async def check_free(
        self, connection: asyncssh.SSHClientConnection, name: str, tunnel_id: str
    ) -> None:
        """Raise NameTaken where another tunnel of that name is alive."""
        other = await self.read(name)
        if other is None or other.id == tunnel_id:
            return
        for place in other.places:
            with translated(b"", self.shown):
                answer = await probing.look(
                    connection, place, TunnelHandshake(other.id, other.secret)
                )
            if answer == "greets":
                raise NameTaken(
                    f"a tunnel named {name} is up already, from {other.laptop} "
                    f"(through {other.login_host or self.shown}, since {other.since}): "
                    "stop it there, or give this one another name with --name"
                )
        log.info("the tunnel %s of %s does not answer: its file is replaced", name, other.laptop)

    async def is_ours(self, name: str, tunnel_id: str) -> bool:
        """Return whether the file is there. Raises NameTaken where another tunnel has replaced
        it."""
        found = await self.read(name)
        if found is not None and found.id != tunnel_id:
            raise NameTaken(
                f"the tunnel {name} was replaced by one from {found.laptop} (since "
                f"{found.since}): one of the two needs another name, see --name"
            )
        return found is not None

    # --- changing ---------------------------------------------------------------------------------

    async def write(self, rendezvous: Rendezvous) -> None:
        """Write the file atomically."""
        with translated(self.path.encode(errors="surrogateescape"), self.shown):
            async with self._temporary(rendezvous.name, encode(rendezvous)) as temporary:
                await self.sftp.posix_rename(temporary, self.file(rendezvous.name))

    async def try_file(self, name: str) -> None:
        """Check that a file could be written. Raises RemoteError."""
        with translated(self.path.encode(errors="surrogateescape"), self.shown):
            async with self._temporary(name, b"") as temporary:
                await self.sftp.remove(temporary)

    @asynccontextmanager
    async def _temporary(self, name: str, content: bytes) -> AsyncIterator[str]:
        """Make a private file with this content; it is removed where something fails."""
        path = f"{self.path}/.{name}.{secrets.token_hex(4)}.tmp"
        attributes = SFTPAttrs(permissions=PRIVATE_FILE)
        flags = FXF_WRITE | FXF_CREAT | FXF_EXCL
        try:
            async with self.sftp.open(path, flags, attributes, encoding=None) as file:
                await file.setstat(attributes)
                self._check_made(await file.stat())
                await file.write(content, 0)
            yield path
        except BaseException:
            with suppress(asyncssh.Error, OSError):  # the first error says why
                await self.sftp.remove(path)
            raise

    def _check_made(self, made: SFTPAttrs) -> None:
        """Check the owner of a new file, which shows who we are: in a chroot the home directory
        belongs to root."""
        if made.uid != self.owner:
            raise WrongSettings(
                f"{self.path} on {self.shown} belongs to user {self.owner}, not to you "
                f"(user {made.uid}): remove or rename it there"
            )
        if (made.permissions or 0) & 0o077:
            raise WrongSettings(
                f"files in {self.path} on {self.shown} can't be made private: look at its file "
                "system's access control lists (getfacl)"
            )

    async def secure_socket(self, path: str) -> None:
        """Make the socket private: sshd creates it with StreamLocalBindMask, which a site may have
        opened."""
        with translated(path.encode(), self.shown):
            found = await self.sftp.lstat(path)
            if (found.permissions or 0) & 0o177:
                await self.sftp.setstat(path, SFTPAttrs(permissions=PRIVATE_FILE))

    async def remove_socket(self, path: str | None) -> None:
        """Remove the socket of a tunnel that did not come about, whose error was reported."""
        if path is not None:
            with suppress(asyncssh.Error, OSError):
                await self.sftp.remove(path)

    async def remove_remains(self, name: str, keep: str | None) -> None:
        """Remove sockets and half-written files of earlier tunnels of that name."""
        ours = re.compile(
            rf"{re.escape(name)}-[0-9a-f]{{8}}\.sock|\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp"
        )
        with translated(self.path.encode(errors="surrogateescape"), self.shown):
            for found in await self.sftp.listdir(self.path):
                path = f"{self.path}/{found}"
                if ours.fullmatch(str(found)) and path != keep:
                    with suppress(asyncssh.SFTPNoSuchFile):  # sshd was quicker
                        await self.sftp.remove(path)

    async def withdraw(self, name: str, tunnel_id: str) -> None:
        """Remove the file, if it is this tunnel's, and its sockets and temporary files."""
        found = await self.read(name)
        if found is None or found.id == tunnel_id:
            with translated(b"", self.shown), suppress(asyncssh.SFTPNoSuchFile):
                await self.sftp.remove(self.file(name))
            await self.remove_remains(name, None)


def _raise_if_lost(error: RemoteError) -> None:
    if not isinstance(error.__cause__, asyncssh.SFTPError) or isinstance(
        error.__cause__, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection
    ):
        raise error


async def start_sftp(login: SshLogin) -> asyncssh.SFTPClient:
    """Open the session that writes and watches the file. It stays open, since only with a session
    does sshd send without delay (TCP_NODELAY)."""
    try:
        with translated(b"", login.shown):
            return await login.connection.start_sftp_client(path_errors="surrogateescape")
    except RemoteError as error:
        if isinstance(error.__cause__, asyncssh.ChannelOpenError):
            raise WrongSettings(
                f"{login.shown} lets us in but has no SFTP service ({error.__cause__.reason}), "
                "and the tunnel's file is written over it: ask the site to enable it"
            ) from error
        raise


async def open_directory(sftp: asyncssh.SFTPClient, shown: str) -> TunnelDirectory:
    """Open the directory, and make it where it is missing. Raises WrongSettings where it is not
    safe for secrets."""
    with translated(DIRECTORY.encode(), shown):
        home = (await sftp.realpath(".")).rstrip("/")
        owners: list[int | None] = []
        path = home
        for name in DIRECTORY.split("/"):
            path = f"{path}/{name}"
            await _make(sftp, path)
            found = await sftp.lstat(path)
            _check(path, found, shown)
            owners.append(found.uid)
        if owners[0] != owners[-1]:
            raise WrongSettings(
                f"{path} on {shown} belongs to user {owners[-1]}, and its parent to user "
                f"{owners[0]}: remove it there"
            )
        if (found.permissions or 0) & 0o777 != PRIVATE_DIRECTORY:
            await _close_to_others(sftp, path, shown)
    return TunnelDirectory(sftp, path, owners[-1], shown, await listening.host_name(sftp))


async def _make(sftp: asyncssh.SFTPClient, path: str) -> None:
    """Make a directory unless it is there: OpenSSH reports one that exists as a plain "failure"
    only."""
    try:
        await sftp.lstat(path)
    except asyncssh.SFTPNoSuchFile:
        with suppress(asyncssh.SFTPFailure):  # another tunnel was quicker
            await sftp.mkdir(path, SFTPAttrs(permissions=PRIVATE_DIRECTORY))


def _check(path: str, found: SFTPAttrs, shown: str) -> None:
    mode = found.permissions or 0
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no directory"
        raise WrongSettings(
            f"{path} on {shown} is {kind}, so the tunnel's key is not safe in it: remove it there"
        )
    if mode & OTHERS_WRITE:
        raise WrongSettings(
            f"{path} on {shown} can be changed by other users: look at what is in it, and run "
            f"'chmod go-w {path}' there"
        )


async def _close_to_others(sftp: asyncssh.SFTPClient, path: str, shown: str) -> None:
    try:
        await sftp.setstat(path, SFTPAttrs(permissions=PRIVATE_DIRECTORY))
    except asyncssh.SFTPPermissionDenied as error:
        raise PermissionDenied(
            f"{path} on {shown} does not belong to you: remove or rename it there"
        ) from error
