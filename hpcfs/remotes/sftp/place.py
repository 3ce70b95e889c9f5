"""A path on the server, and finding out there what a vague answer meant.

OpenSSH answers most refusals with "failure". `explain_*` look at what is there and turn such an
answer into the class of error that the request deserves; where looking does not help, the answer
stays what it was. They run after a failure only, so that nothing pays for them otherwise.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import asyncssh
from asyncssh import SFTPAttrs

from hpcfs.model.entries import Entry
from hpcfs.model.errors import (
    AlreadyExists,
    CrossDevice,
    DirectoryNotEmpty,
    InvalidRequest,
    IsADirectory,
    NoSpace,
    NotADirectory,
    NotFound,
    NotOwner,
    NotSupported,
    PermissionDenied,
    ReadOnly,
    RemoteError,
    RemoteFailure,
    TooLarge,
)
from hpcfs.remotes.base import last_name
from hpcfs.remotes.sftp import attrs as sftp_attrs
from hpcfs.remotes.sftp.errors import shown, translated
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.session import SftpSession

ALMOST_NOTHING_BYTES = 1024 * 1024
VAGUE = (RemoteFailure, PermissionDenied, NotFound)


@dataclass(frozen=True)
class Place:
    """`path` is relative to the namespace's root, `full` is what the server is told."""

    session: SftpSession
    path: bytes
    full: bytes

    def __str__(self) -> str:
        return f"{shown(self.full)} on {self.session.shown}"

    def asking(self) -> AbstractContextManager[None]:
        return translated(self.full, self.session.shown)

    def parent(self) -> Place:
        return Place(self.session, self.path.rpartition(b"/")[0], self.full.rpartition(b"/")[0])

    def beside(self, name: bytes) -> Place:
        """Another name in the same directory."""
        return Place(self.session, *(_sibling(path, name) for path in (self.path, self.full)))

    async def attrs(self, channel: Requests | None = None) -> SFTPAttrs:
        """Of the entry itself; the namespace's root may be a link to a directory. They tell its
        type, also where the server does not."""
        channel = channel or self.session.meta
        with self.asking():
            look = channel.lstat if self.path else channel.stat
            attrs = await look(self.full, 0)
            if not sftp_attrs.tells_type(attrs):
                default = await self._type_by_trying(channel)
                attrs.permissions = sftp_attrs.full_mode(attrs, default)
        return attrs

    async def _type_by_trying(self, channel: Requests) -> int:
        """A mode with the type: a link can be read, a directory be listed or is forbidden."""
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
        """Some servers open anything as a directory, and find out when they are to read it."""
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
        """The type bits of its mode, None when nothing is there."""
        try:
            return stat.S_IFMT(sftp_attrs.full_mode(await self.attrs()))
        except NotFound:
            return None

    def entry_of(self, attrs: SFTPAttrs) -> Entry:
        return sftp_attrs.entry(self.path, last_name(self.path), attrs, self.session.owners)

    async def is_empty_directory(self) -> bool:
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


def _sibling(path: bytes, name: bytes) -> bytes:
    parent, slash, _ = path.rpartition(b"/")
    return parent + slash + name


async def learn_user(place: Place, made: SFTPAttrs) -> None:
    """Who the remote user is, where the home directory did not tell (a chroot): the owner of what
    was just made. Its group is the user's unless the directory gave it one."""
    session = place.session
    if session.owners.remote_gid is not None or made.uid is None:
        return
    inherits = sftp_attrs.full_mode(await place.parent().attrs()) & stat.S_ISGID
    gid = None if inherits else made.gid
    session.owners = replace(session.owners, remote_uid=made.uid, remote_gid=gid)


async def explain_new(place: Place, error: RemoteError) -> RemoteError:
    """Why a new name could not be made."""
    if isinstance(error, RemoteFailure) and await place.kind() is not None:
        return AlreadyExists(f"{place} exists already")
    if isinstance(error, NotFound):
        kind = await place.parent().kind()
        if kind is not None and not stat.S_ISDIR(kind) and not stat.S_ISLNK(kind):
            return NotADirectory(f"{place.parent()} is not a directory")
    return await explain_full(place, error)


async def _usage(place: Place) -> asyncssh.SFTPVFSAttrs | None:
    """Of the file system that it is in; None where the server does not tell."""
    try:
        with place.asking():
            directory = place.parent() if place.path else place
            return await place.session.meta.statvfs(directory.full or b"/")
    except (NotSupported, RemoteFailure):
        return None


async def is_read_only(place: Place) -> bool:
    """Whether nothing can be changed in what has this root."""
    usage = await _usage(place)
    return place.session.is_read_only or (usage is not None and bool(usage.flags & os.ST_RDONLY))


async def explain_read_only(place: Place, error: RemoteError) -> RemoteError:
    """Whether nothing can be changed there at all. OpenSSH calls EROFS a "failure", and its
    sftp-server -R says "permission denied"."""
    if not isinstance(error, (RemoteFailure, PermissionDenied)):
        return error
    usage = await _usage(place)
    if usage is not None and usage.flags & os.ST_RDONLY:
        return _on_read_only_disk(place)
    if isinstance(error, PermissionDenied) and place.session.is_read_only:
        return ReadOnly(f"{place} can't be changed: the SFTP server only lets read")
    return error


def _on_read_only_disk(place: Place) -> ReadOnly:
    return ReadOnly(f"{place} is on a file system that is mounted read-only there")


async def explain_device(place: Place, target: Place, error: RemoteError) -> RemoteError:
    """Whether a rename or a hard link failed because it would lead to another file system (EXDEV;
    SFTP has no code for it)."""
    if not isinstance(error, RemoteFailure):
        return error
    one, other = await _usage(place), await _usage(target)
    if one is None or other is None or one.fsid == other.fsid:
        return error
    return CrossDevice(f"{place} and {target} are in different file systems there")


async def explain_full(place: Place, error: RemoteError) -> RemoteError:
    """Whether a write, or making a file, failed for want of space. A used-up quota can't be told
    from the outside."""
    usage = await _usage(place) if isinstance(error, RemoteFailure) else None
    if usage is None:
        return error
    if usage.flags & os.ST_RDONLY:  # it may be full, too: nothing can be added to some
        return _on_read_only_disk(place)
    if usage.bavail * usage.frsize < ALMOST_NOTHING_BYTES:
        return NoSpace(f"{place} does not fit: the remote file system is full")
    if usage.files and not usage.favail:
        return NoSpace(f"{place} does not fit: the remote file system can't hold more files")
    return RemoteFailure(f"{error.message}; the disk or your quota there may be full")


async def explain_size(place: Place, error: RemoteError, size: int) -> RemoteError:
    """Why a file could not be given `size` bytes: a sparse file may be larger than its file system,
    so the server's word counts, and this only tells what it most likely meant."""
    is_vague = isinstance(error, (RemoteFailure, InvalidRequest))
    usage = await _usage(place) if is_vague else None
    if usage is None:
        return error
    if size <= usage.blocks * usage.frsize:
        return error
    return TooLarge(f"{place} can't have {size} bytes: that is more than its file system")


async def explain_sticky(place: Place, error: RemoteError) -> RemoteError:
    """Whether a name may not be removed only because the directory is sticky (EPERM; SFTP has one
    code for that and EACCES)."""
    if not isinstance(error, PermissionDenied):
        return error
    try:
        mode = sftp_attrs.full_mode(await place.parent().attrs())
    except RemoteError:
        return error
    return NotOwner(error.message) if mode & stat.S_ISVTX else error


async def explain_file(place: Place, error: RemoteError) -> RemoteError:
    """Why something that only works on files failed."""
    if isinstance(error, VAGUE) and await place.kind() == stat.S_IFDIR:
        return IsADirectory(f"{place} is a directory")
    return error


async def explain_directory(place: Place, error: RemoteError) -> RemoteError:
    """Why something that only works on directories failed."""
    if isinstance(error, VAGUE):
        kind = await place.kind()
        if kind is not None and kind != stat.S_IFDIR:
            return NotADirectory(f"{place} is not a directory")
    return error


async def explain_rmdir(place: Place, error: RemoteError) -> RemoteError:
    explained = await explain_directory(place, error)
    if isinstance(explained, RemoteFailure) and not await place.is_empty_directory():
        return DirectoryNotEmpty(f"{place} is not empty")
    return explained
