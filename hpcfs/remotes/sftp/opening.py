"""Opening a file for an upload, which may only change the version that it was made on.

The file is looked at in the same flight in which it is opened, so that the version costs
no round trip of its own. Nothing is cut or written here. Between the look and the first byte there
is one round trip in which somebody else may write too: SFTP has no way to exclude that.
"""

from __future__ import annotations

import asyncio
import logging
import stat

import asyncssh
from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_CREAT, FXF_EXCL, FXF_WRITE

from hpcfs.model.errors import (
    AlreadyExists,
    Conflict,
    InvalidRequest,
    IsADirectory,
    NotFound,
    PermissionDenied,
    RemoteError,
)
from hpcfs.remotes.base import checked_size
from hpcfs.remotes.sftp.attrs import full_mode, narrower, version_of
from hpcfs.remotes.sftp.explain import explain_file, explain_new
from hpcfs.remotes.sftp.path import SftpPath, learn_user
from hpcfs.remotes.sftp.upload_resume import UnfinishedUploads, UploadAttempt
from hpcfs.remotes.sftp.write import Sent, WritableFile, answers, close_quietly, send

log = logging.getLogger(__name__)

NEW = FXF_WRITE | FXF_CREAT | FXF_EXCL


async def open_new(place: SftpPath, mode: int) -> WritableFile:
    """Make an empty file that did not exist. The server's umask, access lists and set-group-ID
    directories decide what becomes of `mode`: `now` of the result, asked for in the same flight.

    Raises AlreadyExists.
    """
    looking = send(_look_next(place))
    try:
        handle = await _open(place, NEW, mode)
    finally:
        await asyncio.wait([looking])
    target = WritableFile(place, handle)
    try:
        target.now = await _given(target, looking)
        await learn_user(place, target.now)
    except BaseException:
        await close_quietly(place, handle)
        raise
    narrowed = narrower(target.now, mode, stat.S_IFREG)
    if narrowed is not None:
        target.earlier.append(send(place.session.bulk.fsetstat(handle, narrowed)))
        target.now.permissions = stat.S_IFREG | (narrowed.permissions or 0)
    return target


async def _look_next(place: SftpPath) -> SFTPAttrs:
    """Sent after what is sent in this turn of the event loop."""
    await asyncio.sleep(0)
    return await place.attrs(place.session.bulk)


async def _given(target: WritableFile, looking: Sent) -> SFTPAttrs:
    """Return the attributes of the new file. A server that answers out of order may not have had it
    yet."""
    try:
        attrs = looking.result()
    except RemoteError:
        with target.place.asking():
            attrs = await target.session.bulk.fstat(target.handle, 0)
    assert isinstance(attrs, SFTPAttrs)
    return attrs


async def open_target(
    place: SftpPath, attempt: UploadAttempt, mode: int, unfinished: UnfinishedUploads
) -> WritableFile:
    """Open the file that the attempt is to write to, made if it has to be.

    Raises Conflict when the server has another version than the attempt's, which none of our own
    earlier attempts left.
    """
    if attempt.base_version == b"":
        try:
            return await open_new(place, mode)
        except AlreadyExists:
            return await open_existing(place, attempt, unfinished)
    try:
        return await open_existing(place, attempt, unfinished)
    except NotFound:
        if attempt.base_version is not None:
            raise Conflict(f"{place} was removed meanwhile") from None
    return await open_new(place, mode)


async def open_existing(
    place: SftpPath, attempt: UploadAttempt, unfinished: UnfinishedUploads, flags: int = FXF_WRITE
) -> WritableFile:
    """Open a file that is there. Refusals to open it count only once it is known to be the right
    file."""
    handle: bytes | None = None
    refusal: RemoteError | None = None
    looking = send(place.attrs(place.session.bulk))
    try:
        handle = await _open(place, flags)
    except RemoteError as error:
        refusal = error
    finally:
        await asyncio.wait([looking])  # sent before the open, on the same channel
    earlier = []
    try:
        attrs = looking.result()
        await check_version(place, attrs, attempt, unfinished)
        if handle is None:
            assert refusal is not None
            handle, restored = await _open_read_only(place, attrs, refusal, flags)
            earlier.append(restored)
        return WritableFile(place, handle, checked_size(attrs.size, place.full), attrs, earlier)
    except BaseException:
        if handle is not None:
            await close_quietly(place, handle)
        raise


async def check_version(
    place: SftpPath, attrs: SFTPAttrs, attempt: UploadAttempt, unfinished: UnfinishedUploads
) -> None:
    """Raise Conflict where the file has another version; or an error for what is no regular
    file."""
    kind = stat.S_IFMT(full_mode(attrs))
    if kind == stat.S_IFDIR:
        raise IsADirectory(f"{place} is a directory")
    if kind != stat.S_IFREG:
        if attempt.base_version is None:
            raise InvalidRequest(f"{place} is no regular file")
        raise Conflict(f"{place} was replaced by something that is no regular file")
    if attempt.base_version is None or version_of(attrs, place.full) == attempt.base_version:
        return
    if not await unfinished.has_left(place, attrs, attempt):
        what = "made" if attempt.base_version == b"" else "changed"
        raise Conflict(f"{place} was {what} by somebody else meanwhile")


async def _open(place: SftpPath, flags: int, mode: int | None = None) -> bytes:
    attrs = SFTPAttrs() if mode is None else SFTPAttrs(permissions=mode & 0o7777)
    bulk = place.session.bulk
    try:
        with place.asking():
            return await bulk.kept(bulk.open(place.full, flags, attrs))
    except RemoteError as error:
        explain = explain_new if flags & FXF_EXCL else explain_file
        raise await explain(place, error) from error


async def _open_read_only(
    place: SftpPath, attrs: SFTPAttrs, refusal: RemoteError, flags: int
) -> tuple[bytes, Sent]:
    """`cp -a` of a read-only file and git's objects write through a descriptor that is older than
    the mode. Here the descriptor is younger, so the owner may write for as long as opening takes.

    -> the handle, and the request that makes the file read-only again.
    """
    mode = full_mode(attrs)
    if mode & stat.S_IWUSR or not isinstance(refusal, PermissionDenied):
        raise refusal
    bulk = place.session.bulk
    read_only = SFTPAttrs(permissions=stat.S_IMODE(mode))
    writable = SFTPAttrs(permissions=stat.S_IMODE(mode) | stat.S_IWUSR)
    send(bulk.setstat(place.full, writable))  # where that is refused, so is the open
    try:
        handle = await _open(place, flags)
    except BaseException as error:
        await _restore_quietly(place, read_only)
        if isinstance(error, PermissionDenied):
            raise refusal from None
        raise
    return handle, send(bulk.setstat(place.full, read_only))


async def _restore_quietly(place: SftpPath, mode: SFTPAttrs) -> None:
    """Restore a mode after a failure, which is reported already."""
    try:
        await answers([send(place.session.bulk.setstat(place.full, mode))])
    except (asyncssh.Error, OSError) as error:
        log.debug("the mode of %s was not changed: %s", place, error)
