"""Making files and bringing them to the server: for `Remote.create`, `upload` and `upload_piece`.

One object per namespace, which knows the streaming uploads
(remotes/sftp/streaming_upload.py) and the attempts that were not seen to end
(remotes/sftp/upload_resume.py). All of that may be lost with this process: an upload then opens its
file again, and the pieces are sent again (PiecesLost).

Round trips of a small file: create 1 and upload 1 where its file is open already; otherwise upload
2 (the open, then everything else). With `replace` 3: the temporary file, its content, the rename.
"""

from __future__ import annotations

import asyncio
import logging
import stat
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from asyncssh import SFTPAttrs

from hpcfs.model import paths
from hpcfs.model.entries import NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import (
    AlreadyExists,
    Changed,
    Conflict,
    InvalidRequest,
    NotFound,
    NotSupported,
    PiecesLost,
    RemoteError,
    RemoteFailure,
    Unreachable,
)
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.remotes.base import ReportProgress, UploadSource
from hpcfs.remotes.sftp import rename as renaming
from hpcfs.remotes.sftp.appending import append
from hpcfs.remotes.sftp.attrs import NANOSECONDS, full_mode, version_of
from hpcfs.remotes.sftp.explain import explain_full
from hpcfs.remotes.sftp.opening import check_version, open_new, open_target
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.streaming_upload import SftpStreamingUpload, SftpStreamingUploads
from hpcfs.remotes.sftp.upload_resume import UnfinishedUploads, UploadAttempt
from hpcfs.remotes.sftp.write import (
    Ranges,
    Sent,
    WritableFile,
    answers,
    bring,
    close_quietly,
    is_small,
    send,
    touch,
    wait_quietly,
    write_ranges,
)

log = logging.getLogger(__name__)

LEFTOVERS = 256
NOTED = 1024


class SftpUploads:
    """Makes files and uploads of one namespace. With `verify` the server hashes what arrived."""

    def __init__(self, verify: bool = False) -> None:
        self._verify = verify
        self._streams = SftpStreamingUploads()
        self._unfinished = UnfinishedUploads()
        self._begin_anew: OrderedDict[bytes, bool] = OrderedDict()
        """Paths of which all will be sent once more."""
        self._leftovers: list[SftpPath] = []
        """Temporary files that could not be removed, as the connection was lost."""
        self._temporaries: set[bytes] = set()
        """Those that are there now."""

    def release(self, handle: int) -> None:
        """Give up what was sent with this handle."""
        self._streams.release(handle)

    async def settled(self, path: bytes) -> None:
        """Wait until the making of a file at this path is through."""
        await self._streams.settled(path)

    # --- making ---------------------------------------------------------------------------------

    async def create(self, place: SftpPath, mode: int, handle: int) -> Entry:
        """Make an empty file. Its permissions and group are what the server gave it."""
        target = await open_new(place, mode)
        if handle == NO_HANDLE:
            request = _nothing(place.path, mode)
            return place.entry_of(await bring(target, request, _Empty(), _ignore, keep=0))
        try:
            self._streams.begin(handle, place, _already(target))
            self._streams.rest(handle)
        except NotSupported:
            place.session.bulk.close_soon(target.handle)
        self._streams.note_complete(handle)
        assert target.now
        now = int(time.time()) * NANOSECONDS
        made = place.entry_of(target.now)
        return msgspec.structs.replace(made, size=0, mtime_ns=now, atime_ns=now, version=b"")

    # --- pieces ----------------------------------------------------------------------------------

    async def upload_piece(
        self, place: SftpPath, request: UploadPieceRequest, source: UploadSource
    ) -> None:
        """Send a piece of a file that is still being written. Raises PiecesLost, NotSupported."""
        self._streams.note_piece(request.handle)
        file = self._streams.get(request.handle)
        if file is not None and not file.is_usable:
            self._streams.release(request.handle)
            if file.sent or file.writers:
                raise self._pieces_lost(place)
            file = None
        if file is None:
            opening = self._open_for_pieces(place, request, source)
            file = self._streams.begin(request.handle, place, opening)
        file.writers += 1
        place.session.handles.wake(file)
        try:
            await _send_piece(file, request, source)
        finally:
            file.leave()
            if not file.opening.done() or file.opening.cancelled() or file.opening.exception():
                self._streams.forget(request.handle, file)
            self._streams.rest(request.handle)

    async def _open_for_pieces(
        self, place: SftpPath, request: UploadPieceRequest, source: UploadSource
    ) -> WritableFile:
        """Open the file for pieces. Another process may have sent some under a handle that is not
        known here: then the file has another version than its base, and bytes of ours, which would
        count as sent."""
        anew = self._begin_anew.pop(place.path, None)
        attempt = UploadAttempt.of_piece(request, source, checked=not anew)
        target = await open_target(place, attempt, request.mode, self._unfinished)
        if target.size:
            if not anew and not _is_base(target, request):
                await close_quietly(place, target.handle)
                raise self._pieces_lost(place)
            cut = place.session.bulk.fsetstat(target.handle, SFTPAttrs(size=0))
            target.earlier.append(send(cut))
            target.size = 0
        return target

    def _pieces_lost(self, place: SftpPath) -> PiecesLost:
        self._begin_anew[place.path] = True
        while len(self._begin_anew) > NOTED:
            self._begin_anew.popitem(last=False)
        return PiecesLost(f"the connection was lost while {place} was sent: it is sent again")

    # --- uploads --------------------------------------------------------------------------------

    async def upload(
        self, place: SftpPath, request: UploadRequest, source: UploadSource, report: ReportProgress
    ) -> Entry:
        """Carry an upload out. Raises Changed when the remote lost bytes that are still meant to be
        there."""
        if request.size < 0 or request.base_size < 0:
            raise InvalidRequest("a size can't be negative")
        if request.append:
            return await self._append(place, request, source, report)
        file = self._taken(place, request)
        try:
            async with place.session.uploading:
                attrs = await self._bring(place, request, source, report, file)
        except Conflict:
            raise
        except BaseException:
            self._remember(place, request, source)
            raise
        self._unfinished.end(place.path)
        self._streams.note_complete(request.handle)
        return place.entry_of(attrs)

    async def _append(
        self, place: SftpPath, request: UploadRequest, source: UploadSource, report: ReportProgress
    ) -> Entry:
        self._streams.release(request.handle)
        async with place.session.uploading:
            appended = await append(place, request, source, report, self._unfinished)
            if self._verify and appended.is_alone:
                await _compare(place, appended.request, appended.source, report)
        return place.entry_of(appended.attrs)

    def _remember(self, place: SftpPath, request: UploadRequest, source: UploadSource) -> None:
        """Remember an upload after a failure, which is reported already."""
        try:
            self._unfinished.begin(place.path, UploadAttempt.of(request, source))
        except (OSError, RemoteError) as error:
            log.warning("what is uploaded to %s can't be read here: %s", place, error)

    def _taken(self, place: SftpPath, request: UploadRequest) -> SftpStreamingUpload | None:
        """Return the streaming upload that this one completes, or None. Raises PiecesLost when
        pieces of it may be lost."""
        file = self._streams.take(request.handle)
        if file is not None and file.is_usable:
            return file
        if file is not None:
            lost = bool(file.sent)
        else:
            lost = not self._streams.is_complete(request.handle) and not _is_whole(request)
        if lost:
            self._streams.note_complete(request.handle)  # what comes next is all of it
            raise self._pieces_lost(place)
        return None

    async def _bring(
        self,
        place: SftpPath,
        request: UploadRequest,
        source: UploadSource,
        report: ReportProgress,
        file: SftpStreamingUpload | None,
    ) -> SFTPAttrs:
        if request.replace and not (file and file.sent):
            if file is not None:
                file.drop()
            return await self._replace(place, request, source, report, ours=file is not None)
        keep = request.base_size
        if file is not None:
            target = await asyncio.shield(file.opening)
            target.size = file.end
            keep = max(keep, file.end)
        else:
            attempt = UploadAttempt.of(request, source)
            target = await open_target(place, attempt, request.mode, self._unfinished)
        return await self._bring_all(target, request, source, report, keep)

    async def _bring_all(
        self,
        target: WritableFile,
        request: UploadRequest,
        source: UploadSource,
        report: ReportProgress,
        keep: int,
    ) -> SFTPAttrs:
        place = target.place
        if not _covered(target.size, min(keep, request.size), request.ranges):
            await close_quietly(place, target.handle)
            raise Changed(
                f"{place} was cut to {target.size} bytes meanwhile, and what it had is not here"
            )
        attrs = await bring(target, request, source, report, keep=keep)
        if attrs.size != request.size:
            raise RemoteFailure(
                f"{place} has {attrs.size} bytes after the upload instead of {request.size}: "
                "something else writes to it"
            )
        if self._verify and request.size:
            await _compare(place, request, source, report)
        return attrs

    async def _replace(
        self,
        place: SftpPath,
        request: UploadRequest,
        source: UploadSource,
        report: ReportProgress,
        *,
        ours: bool,
    ) -> SFTPAttrs:
        """`ours`: whatever has the name, it is a file that we made."""
        if request.base_size:
            raise InvalidRequest("a file is only replaced by a whole one")
        await self._remove_leftovers(place)
        attempt = UploadAttempt.of(request, source, checked=not ours)
        with self._temporary_for(place, source) as temporary:
            return await self._replace_by(temporary, place, request, source, report, attempt)

    @contextmanager
    def _temporary_for(self, place: SftpPath, source: UploadSource) -> Iterator[SftpPath]:
        """Yield a name that no other upload takes: it is made of the source's
        (`UploadSource.name`). Only one that is still being given up here makes another name
        necessary."""
        name = renaming.name_beside(paths.name(place.path), source.name)
        temporary = place.beside(name)
        if temporary.path in self._temporaries:
            temporary = place.beside(renaming.name_beside(paths.name(place.path)))
        self._temporaries.add(temporary.path)
        try:
            yield temporary
        finally:
            self._temporaries.discard(temporary.path)

    async def _replace_by(
        self,
        temporary: SftpPath,
        place: SftpPath,
        request: UploadRequest,
        source: UploadSource,
        report: ReportProgress,
        attempt: UploadAttempt,
    ) -> SFTPAttrs:
        looking = send(place.attrs(place.session.bulk))
        try:
            target = await _open_temporary(temporary, request.mode)
        finally:
            await asyncio.wait([looking])
        try:
            exists = await self._may_replace(place, attempt, looking)
        except BaseException:
            await close_quietly(temporary, target.handle)
            await self._remove_temporary(temporary)
            raise
        try:
            attrs = await self._bring_all(target, request, source, report, 0)
            if not is_small(request.ranges):
                looking = send(place.attrs())
                await asyncio.wait([looking])
                exists = await self._may_replace(place, attempt, looking)
            await _take_place(temporary, place, attempt, exists=exists)
        except BaseException:
            await self._remove_temporary(temporary)
            raise
        return attrs

    async def _may_replace(self, place: SftpPath, attempt: UploadAttempt, looking: Sent) -> bool:
        """Whether there is something to be replaced. Raises Conflict when it is the wrong thing."""
        try:
            attrs = looking.result()
        except NotFound:
            if attempt.base_version:
                raise Conflict(f"{place} was removed by somebody else meanwhile") from None
            return False
        is_special = stat.S_IFMT(full_mode(attrs)) not in (stat.S_IFREG, stat.S_IFDIR)
        if not (is_special and attempt.base_version is None):  # rename(2) replaces a link, too
            await check_version(place, attrs, attempt, self._unfinished)
        return True

    async def _remove_temporary(self, temporary: SftpPath) -> None:
        """Remove the temporary file after a failure, which is reported already."""
        try:
            with temporary.asking():
                await answers([send(temporary.session.meta.remove(temporary.full))])
        except Unreachable:
            self._leftovers = [*self._leftovers, temporary][-LEFTOVERS:]
        except RemoteError as error:
            log.warning("the temporary file %s could not be removed: %s", temporary, error.message)

    async def _remove_leftovers(self, place: SftpPath) -> None:
        """Remove what an earlier connection could not remove."""
        leftovers, self._leftovers = self._leftovers, []
        for leftover in leftovers:
            here = SftpPath(place.session, leftover.path, leftover.full)
            try:
                with here.asking():
                    await here.session.meta.remove(here.full)
            except NotFound:
                pass
            except RemoteError as error:
                log.warning("the temporary file %s is still there: %s", here, error.message)


async def _open_temporary(temporary: SftpPath, mode: int) -> WritableFile:
    """Open the temporary file, which a process that was killed may have left."""
    try:
        return await open_new(temporary, mode)
    except AlreadyExists:
        with temporary.asking():
            await answers([send(temporary.session.meta.remove(temporary.full))])
    return await open_new(temporary, mode)


async def _send_piece(
    file: SftpStreamingUpload, request: UploadPieceRequest, source: UploadSource
) -> None:
    target = await asyncio.shield(file.opening)
    piece = request.offset, request.length
    try:
        with target.place.asking():
            await write_ranges(target, [piece], source, _ignore, wide=True)
    except BaseException as error:
        await target.channels.give_up()
        await wait_quietly(target)
        if isinstance(error, RemoteError):
            raise await explain_full(target.place, error) from error
        raise
    file.sent.append(piece)


async def _compare(
    place: SftpPath, request: UploadRequest, source: UploadSource, report: ReportProgress
) -> None:
    """Compare hashes. Where nothing of the old content counts, all of the file is here."""
    ranges = request.ranges if request.base_size else [(0, request.size)]
    same = await place.session.hasher.is_same(place.full, ranges, source, report)
    if same is None and place.session.lost:
        raise Unreachable(f"the connection to {place.session.shown} was lost")
    if same is False:
        failure = RemoteFailure(
            f"{place} has other bytes after the upload than were sent (their SHA-256 differs): "
            "the local copy is kept; have the server's disk checked, or see who else writes there"
        )
        await touch(place, failure)
        raise failure


async def _take_place(
    temporary: SftpPath, place: SftpPath, attempt: UploadAttempt, *, exists: bool
) -> None:
    if not exists:
        try:
            await renaming.rename_regular_to_new(temporary, place)
        except AlreadyExists:
            if attempt.base_version is not None:
                raise Conflict(f"{place} was made by somebody else meanwhile") from None
        else:
            return
    await renaming.rename(temporary, place, replace=True)


def _is_base(target: WritableFile, request: UploadPieceRequest) -> bool:
    if request.base_version is None or target.now is None:
        return request.offset == 0
    return version_of(target.now, target.place.full) == request.base_version


def _is_whole(request: UploadRequest) -> bool:
    """Whether no piece of the file can have been sent."""
    return request.handle == NO_HANDLE or _covered(request.base_size, request.size, request.ranges)


def _covered(start: int, end: int, ranges: Ranges) -> bool:
    """Whether the ranges bring every byte from `start` to `end`."""
    for offset, length in sorted(ranges):
        if offset <= start:
            start = max(start, offset + length)
    return start >= end


# --- an empty file --------------------------------------------------------------------------------


class _Empty:
    """The source of an empty file."""

    size = 0
    name = ""

    def read(self, offset: int, length: int) -> bytes:
        raise InvalidRequest("an empty file has no bytes")


def _nothing(path: bytes, mode: int) -> UploadRequest:
    return UploadRequest(path, size=0, base_size=0, ranges=[], attributes=Attributes(), mode=mode)


def _ignore(done: int) -> None:
    """Nobody asked how far it is."""


async def _already(target: WritableFile) -> WritableFile:
    return target
