"""A path on the server of one session, with the requests about it that everything needs."""

from __future__ import annotations

import asyncio
import stat
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import asyncssh
from asyncssh import SFTPAttrs

from hpcfs.model import paths
from hpcfs.model.entries import Entry
from hpcfs.model.errors import (
    NotFound,
)
from hpcfs.remotes.sftp import attrs as sftp_attrs
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.sftp.translate import shown, translated


@dataclass(frozen=True)
class SftpPath:
    """`path` is relative to the namespace's root, `full` is what the server is told."""

    session: SftpSession
    path: bytes
    full: bytes

    def __str__(self) -> str:
        return f"{shown(self.full)} on {self.session.shown}"

    def asking(self) -> AbstractContextManager[None]:
        """Return a context in which asyncssh's errors become RemoteErrors about this path."""
        return translated(self.full, self.session.shown)

    def parent(self) -> SftpPath:
        """Return the path of its directory."""
        return SftpPath(self.session, paths.parent(self.path), paths.parent(self.full))

    def beside(self, name: bytes) -> SftpPath:
        """Return the path of another name in the same directory."""
        return SftpPath(self.session, paths.beside(self.path, name), paths.beside(self.full, name))

    async def attrs(self, channel: Requests | None = None) -> SFTPAttrs:
        """Return the attributes of the entry itself; the namespace's root may be a link to a
        directory. They tell its type, also where the server does not."""
        channel = channel or self.session.meta
        with self.asking():
            look = channel.lstat if self.path else channel.stat
            attrs = await look(self.full, 0)
            if not sftp_attrs.tells_type(attrs):
                default = await self._type_by_trying(channel)
                attrs.permissions = sftp_attrs.full_mode(attrs, default)
        return attrs

    async def _type_by_trying(self, channel: Requests) -> int:
        """Return a mode with the type: a link can be read, a directory be listed or is
        forbidden."""
        target, is_directory = await asyncio.gather(
            channel.readlink(self.full), self._can_be_listed(channel), return_exceptions=True
        )
        for answer in (target, is_directory):
            if isinstance(answer, BaseException) and not isinstance(answer, asyncssh.SFTPError):
                raise answer
        if self.path and not isinstance(target, BaseException):
            return sftp_attrs.DEFAULT_LINK_MODE
        if is_directory is True:
            return sftp_attrs.DEFAULT_DIRECTORY_MODE
        return sftp_attrs.DEFAULT_FILE_MODE

    async def _can_be_listed(self, channel: Requests) -> bool:
        """Return whether it is a directory. Some servers open anything as one, and find out when
        they are to read it."""
        try:
            handle = await channel.kept(channel.opendir(self.full))
            try:
                await channel.names(handle)
            finally:
                channel.close_soon(handle)
        except (asyncssh.SFTPEOFError, asyncssh.SFTPPermissionDenied):
            pass
        return True

    async def kind(self) -> int | None:
        """Return the type bits of its mode, None when nothing is there."""
        try:
            return stat.S_IFMT(sftp_attrs.full_mode(await self.attrs()))
        except NotFound:
            return None

    def entry_of(self, attrs: SFTPAttrs) -> Entry:
        """Return the entry with these attributes."""
        return sftp_attrs.entry(self.path, paths.name(self.path), attrs, self.session.owners)

    async def is_empty_directory(self) -> bool:
        """Return whether it lists no names. Raises RemoteError."""
        with self.asking():
            handle = await self.session.meta.kept(self.session.meta.opendir(self.full))
            try:
                while True:
                    names, _ = await self.session.meta.readdir(handle)
                    if not names:
                        return True
                    if any(name.filename not in (b".", b"..") for name in names):
                        return False
            except asyncssh.SFTPEOFError:
                return True
            finally:
                self.session.meta.close_soon(handle)


def below(directory: bytes, path: bytes) -> bytes:
    """Return the absolute path of `path` below an absolute `directory`, which may be "/"."""
    return directory.rstrip(b"/") + b"/" + path


async def learn_user(place: SftpPath, made: SFTPAttrs) -> None:
    """Learn who the remote user is, where the home directory did not tell (a chroot): the owner of
    what was just made. Its group is the user's unless the directory gave it one."""
    session = place.session
    if session.owners.remote_gid is not None or made.uid is None:
        return
    inherits = sftp_attrs.full_mode(await place.parent().attrs()) & stat.S_ISGID
    gid = None if inherits else made.gid
    session.owners = replace(session.owners, remote_uid=made.uid, remote_gid=gid)
