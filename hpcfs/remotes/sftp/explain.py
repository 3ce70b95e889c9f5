"""Finds out why the server refused a request.

OpenSSH answers most refusals with "failure". The functions `explain_*` look at what is there and
turn such an answer into the class of error that the request deserves; where looking does not help,
they return the error that they were given. They run after a failure only, so that nothing pays for
them otherwise.
"""

from __future__ import annotations

import os
import stat

import asyncssh

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
from hpcfs.remotes.sftp import attrs as sftp_attrs
from hpcfs.remotes.sftp.path import SftpPath

ALMOST_NOTHING_BYTES = 1024 * 1024
"""A file system with less room than this counts as full."""
VAGUE = (RemoteFailure, PermissionDenied, NotFound)
"""Errors that may stand for another one."""


async def explain_new(place: SftpPath, error: RemoteError) -> RemoteError:
    """Why a new name could not be made."""
    if isinstance(error, RemoteFailure) and await place.kind() is not None:
        return AlreadyExists(f"{place} exists already")
    if isinstance(error, NotFound):
        kind = await place.parent().kind()
        if kind is not None and not stat.S_ISDIR(kind) and not stat.S_ISLNK(kind):
            return NotADirectory(f"{place.parent()} is not a directory")
    return await explain_full(place, error)


async def _usage(place: SftpPath) -> asyncssh.SFTPVFSAttrs | None:
    """Return the usage of the file system that the path is in; None where the server does not
    tell."""
    try:
        with place.asking():
            directory = place.parent() if place.path else place
            return await place.session.meta.statvfs(directory.full or b"/")
    except (NotSupported, RemoteFailure):
        return None


async def is_read_only(place: SftpPath) -> bool:
    """Whether nothing can be changed in what has this root."""
    usage = await _usage(place)
    return place.session.is_read_only or (usage is not None and bool(usage.flags & os.ST_RDONLY))


async def explain_read_only(place: SftpPath, error: RemoteError) -> RemoteError:
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


def _on_read_only_disk(place: SftpPath) -> ReadOnly:
    return ReadOnly(f"{place} is on a file system that is mounted read-only there")


async def explain_device(place: SftpPath, target: SftpPath, error: RemoteError) -> RemoteError:
    """Whether a rename or a hard link failed because it would lead to another file system (EXDEV;
    SFTP has no code for it)."""
    if not isinstance(error, RemoteFailure):
        return error
    one, other = await _usage(place), await _usage(target)
    if one is None or other is None or one.fsid == other.fsid:
        return error
    return CrossDevice(f"{place} and {target} are in different file systems there")


async def explain_full(place: SftpPath, error: RemoteError) -> RemoteError:
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


async def explain_size(place: SftpPath, error: RemoteError, size: int) -> RemoteError:
    """Why a file could not be given `size` bytes: a sparse file may be larger than its file system,
    so the server's word counts, and this only tells what it most likely meant."""
    is_vague = isinstance(error, (RemoteFailure, InvalidRequest))
    usage = await _usage(place) if is_vague else None
    if usage is None:
        return error
    if size <= usage.blocks * usage.frsize:
        return error
    return TooLarge(f"{place} can't have {size} bytes: that is more than its file system")


async def explain_sticky(place: SftpPath, error: RemoteError) -> RemoteError:
    """Whether a name may not be removed only because the directory is sticky (EPERM; SFTP has one
    code for that and EACCES)."""
    if not isinstance(error, PermissionDenied):
        return error
    try:
        mode = sftp_attrs.full_mode(await place.parent().attrs())
    except RemoteError:
        return error
    return NotOwner(error.message) if mode & stat.S_ISVTX else error


async def explain_file(place: SftpPath, error: RemoteError) -> RemoteError:
    """Why something that only works on files failed."""
    if isinstance(error, VAGUE) and await place.kind() == stat.S_IFDIR:
        return IsADirectory(f"{place} is a directory")
    return error


async def explain_directory(place: SftpPath, error: RemoteError) -> RemoteError:
    """Why something that only works on directories failed."""
    if isinstance(error, VAGUE):
        kind = await place.kind()
        if kind is not None and kind != stat.S_IFDIR:
            return NotADirectory(f"{place} is not a directory")
    return error


async def explain_rmdir(place: SftpPath, error: RemoteError) -> RemoteError:
    """Return why a directory could not be removed."""
    explained = await explain_directory(place, error)
    if isinstance(explained, RemoteFailure) and not await place.is_empty_directory():
        return DirectoryNotEmpty(f"{place} is not empty")
    return explained
