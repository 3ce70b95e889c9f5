"""The Remote of one bucket: what each operation means there.

S3 has neither directories nor renames nor partial writes: a directory is a marker object or any
key below it, a rename is a copy and a removal, an upload is the whole file, new attributes are a
copy of an object onto itself. Two requests are not one transaction: another client that writes to
the same names at the same time can come between a check and what follows it. Uploads are closed to
that where the server honours conditions (transfer.py finds out).
"""

from __future__ import annotations

import asyncio
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace as with_changes
from typing import IO, Any
from weakref import WeakValueDictionary

import msgspec

from hpcfs.model import paths
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import (
    AccessRefused,
    AlreadyExists,
    Changed,
    DirectoryNotEmpty,
    InvalidRequest,
    IsADirectory,
    NotADirectory,
    NotFound,
    NotOwner,
    NotSupported,
    PermissionDenied,
    ProtocolError,
    RemoteFailure,
    WrongSettings,
)
from hpcfs.model.sites import S3Root, SiteSpec
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.model.usage import DiskUsage
from hpcfs.remotes.base import ReportProgress, UploadSource, no_report
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.directory import Lister, Parents
from hpcfs.remotes.s3.entries import Entries, is_worth_a_copy
from hpcfs.remotes.s3.markers import HEADERS, Markers
from hpcfs.remotes.s3.metadata import DIRECTORY_MODE, FILE_MODE, PERMISSIONS, SYMLINK_MODE, Metadata
from hpcfs.remotes.s3.mover import Mover
from hpcfs.remotes.s3.multipart import NewObject, stands_on
from hpcfs.remotes.s3.objects import Info, Summary
from hpcfs.remotes.s3.parts import Limits
from hpcfs.remotes.s3.paths import (
    PathResolver,
    S3Lookup,
    S3Path,
    check_replaceable,
    file_of,
    refuse_existing,
    text,
)
from hpcfs.remotes.s3.sent_writes import traced
from hpcfs.remotes.s3.transfer import FileSource, Transfer
from hpcfs.remotes.s3.translate import is_refusal, not_public
from hpcfs.remotes.s3.uploads import S3Uploads, info_of_stored

ABILITIES = Capabilities(
    partial_writes=False,
    creates_on_upload=True,
    handles=False,
    mtime_resolution_ns=1,
    checks_permissions=False,
    dates_directories=False,
)
MAX_LINK_BYTES = 4095
FRESH_SECONDS = 0.2
"""A version that was seen so short a time ago need not be asked for before it is replaced: the
request that replaces it takes as long."""
DOWNLOAD_BYTES = 8 * 1024 * 1024


class S3Remote:
    """One namespace in a bucket: a base.Remote."""

    def __init__(self, bucket: Bucket, root: S3Root, spec: SiteSpec, limits: Limits) -> None:
        self._bucket = bucket
        self._read_only = root.read_only
        self._base = f"{root.prefix}/" if root.prefix else ""
        self._state_dir = spec.state_dir
        self._entries = Entries(spec.uid, spec.gid)
        self._paths = PathResolver(bucket, self._base, read_only=root.read_only)
        self._markers = Markers(bucket, self._base)
        self._lister = Lister(bucket, self._markers, self._entries)
        self._parents = Parents(bucket, self._markers, self._base)
        self._transfer = Transfer(bucket, limits, verify=root.verify)
        self._uploads = S3Uploads(bucket, self._transfer, self._entries, limits)
        endpoint = getattr(spec.site, "endpoint_url", None) or ""
        self._mover = Mover(bucket, self._transfer, spec.state_dir, f"{endpoint}/{bucket.name}")
        self._root_metadata = Metadata()
        self._changing: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        """A change of attributes reads the others and writes all: one at a time for each path."""

    # --- looking ----------------------------------------------------------------------------

    async def connect(self) -> Capabilities:
        """List the root once, to find out whether the bucket is there and readable."""
        try:
            self._markers.saw(await self._bucket.first(self._base, 1))
        except (PermissionDenied, RemoteFailure) as error:
            if self._bucket.login.anonymous and is_refusal(error):
                if await self._bucket.login.renew():  # the file was being written, or is now there
                    return await self.connect()
                refused = AccessRefused(not_public(self._bucket.name))
            elif isinstance(error, PermissionDenied):
                refused = AccessRefused(f"{error.message} to list it, then run 'hpcfs login'")
            else:
                raise
            raise self._bucket.remember(refused) from error
        except NotFound as error:
            raise self._bucket.remember(WrongSettings(error.message)) from error
        can_copy_parts = self._bucket.server.copies_parts is not False
        remark = self._bucket.login.remark
        return msgspec.structs.replace(ABILITIES, part_copies=can_copy_parts, remark=remark)

    def forget_failures(self) -> None:
        """Forget what was remembered of the bucket: the user has mended it."""
        self._bucket.forget()

    async def stat(self, path: bytes) -> Entry:
        """Look at the object, its markers and what is below its prefix, at once."""
        look = await self._paths.look(await self._paths.place(path))
        name = paths.name(path)
        if look.is_directory:
            metadata = await self._directory_metadata(look.place, look.markers)
            return self._entries.directory(name, metadata)
        return self._entries.file(name, file_of(look))

    async def stat_open(self, handle: int) -> Entry | None:
        """Return None: S3 keeps no files open."""
        return None

    async def list(self, path: bytes) -> AsyncIterator[Sequence[Entry]]:
        """List with a delimiter; attributes come from the headers of each object."""
        place = await self._paths.place(path)
        if place.beside:
            raise NotADirectory(f"{text(path)} is not a directory")
        async for page in self._lister.pages(place, read_only=self._read_only):
            yield page

    async def read_link(self, path: bytes) -> bytes:
        """Read the content of a link's object."""
        place = await self._paths.place(path)
        found = await self._bucket.head(place.key) if place.key else None
        if found is None and not place.is_root:
            raise NotFound(f"{text(path)}: there is no such file")
        if found is None or self._read_only or not found.is_link:
            raise InvalidRequest(f"{text(path)} is not a symbolic link")
        if not 0 < found.size <= MAX_LINK_BYTES:
            raise ProtocolError(f"{text(path)} is a link with a target of {found.size} bytes")
        target = bytes(await self._bucket.get(place.key, found.version, 0, found.size))
        if b"\0" in target:
            raise ProtocolError(f"{text(path)} is a link whose target contains a NUL")
        return target

    async def fetch(
        self,
        path: bytes,
        version: bytes,
        offset: int,
        length: int,
        handle: int,
        *,
        growing: bool = False,
        urgent: bool = False,
    ) -> Sequence[bytes | bytearray]:
        """Get a range of the object, on the condition that its ETag is the version's."""
        place = await self._paths.place(path)
        if length > 0:
            data = await self._bucket.get(place.key, version, offset, length, urgent=urgent)
            return [data]
        found = await self._bucket.head(place.key)
        if found is None or not found.has_version(version):
            raise Changed(f"{text(path)} has changed on the server: open it again")
        return []

    async def read_unsized(self, path: bytes, offset: int, length: int, handle: int) -> bytes:
        """Read a range of the object as it is now."""
        raise InvalidRequest("objects have the size that S3 tells")

    async def release(self, handle: int) -> None:
        """Give up the multipart upload of the handle, if there is one."""
        await self._uploads.streams.give_up(handle)

    async def close(self) -> None:
        """Abort the streaming uploads that nobody completes any more."""
        await self._uploads.streams.close()

    async def check_writable(self, path: bytes) -> None:
        """Nothing forbids it before it is tried."""

    async def disk_usage(self) -> DiskUsage | None:
        """Return None: S3 tells no limits."""
        return None

    # --- making -----------------------------------------------------------------------------

    @traced
    async def upload(
        self, request: UploadRequest, source: UploadSource, report: ReportProgress
    ) -> Entry:
        """Replace the object, on a condition where the server honours those."""
        look = await self._look_for_new(request.path)
        base = request.base_version
        if base is not None and not self._bucket.server.honours(base):
            look = await self._paths.recall(look.place, FRESH_SECONDS)
        if base is not None and not stands_on(look.file, base):
            look = await self._paths.look(look.place)
        if look.is_directory:
            raise IsADirectory(f"{text(request.path)} is a directory")
        self._check_owner(request.attributes)
        self._lister.cache.drop(look.place.key)
        self._paths.changed(look.place)
        stored, info = await self._uploads.upload(request, look, source, report)
        self._paths.saw_file(look.place, info)
        return self._entries.file(paths.name(request.path), stored, info.metadata)

    @traced
    async def upload_piece(self, request: UploadPieceRequest, source: UploadSource) -> None:
        """Send a piece as a part of a multipart upload, or hold it back for a larger part."""

        async def look() -> S3Lookup:
            found = await self._look_for_new(request.path)
            if found.is_directory:
                raise IsADirectory(f"{text(request.path)} is a directory")
            return found

        self._check_writable()
        await self._uploads.upload_piece(request, look, source)

    async def create(self, path: bytes, mode: int, handle: int = NO_HANDLE) -> Entry:
        """Check that the name is free: an object exists only once its content was uploaded."""
        look = await self._look_for_new(path)
        refuse_existing(look)
        if handle != NO_HANDLE:
            self._uploads.streams.expect(handle, path)
        metadata = self._entries.fresh(stat.S_IFREG | (mode & PERMISSIONS))
        entry = self._entries.file(paths.name(path), Summary(look.place.key, 0, "", 0), metadata)
        return msgspec.structs.replace(entry, version=b"")

    @traced
    async def make_directory(self, path: bytes, mode: int) -> Entry:
        """Write a marker object."""
        look = await self._look_for_new(path)
        refuse_existing(look)
        metadata = self._entries.fresh(stat.S_IFDIR | (mode & PERMISSIONS))
        self._paths.changed(look.place)
        await self._markers.write(look.place.directory, metadata)
        self._parents.made(look.place.directory)
        return self._entries.directory(paths.name(path), metadata)

    @traced
    async def make_symlink(self, path: bytes, target: bytes) -> Entry:
        """Write a link as s3fs does: the target is the content, and the mode says that it is
        one."""
        if not 0 < len(target) <= MAX_LINK_BYTES or b"\0" in target:
            raise InvalidRequest(f"{text(path)}: this can't be the target of a link")
        look = await self._look_for_new(path)
        refuse_existing(look)
        metadata = self._entries.fresh(SYMLINK_MODE)
        self._paths.changed(look.place)
        etag = await self._bucket.put(look.place.key, target, metadata, {})
        summary = Summary(look.place.key, len(target), etag, 0)
        return self._entries.file(paths.name(path), summary, metadata)

    async def make_link(self, existing: bytes, path: bytes) -> Entry:
        """Raise NotSupported: S3 has no hard links."""
        raise NotSupported("S3 has no hard links: use a symbolic link or a copy")

    # --- changing ---------------------------------------------------------------------------

    @traced
    async def set_attributes(self, path: bytes, attributes: Attributes) -> Entry:
        """Copy the object onto itself with other metadata."""
        self._check_writable()
        self._check_owner(attributes)
        async with self._changing.setdefault(path, asyncio.Lock()):
            look = await self._paths.recall(await self._paths.place(path))
            if look.is_directory:
                await self._renew_marker(look)
                return await self._set_directory_attributes(look.place, attributes)
            found = file_of(look)
            if not is_worth_a_copy(attributes):
                return self._entries.file(paths.name(path), found)
            return await self._rewrite(look.place, found, attributes)

    @traced
    async def truncate(self, path: bytes, size: int) -> Entry:
        """Upload the beginning of the object, with zeros behind it, as a new object."""
        self._check_writable()
        if size < 0:
            raise InvalidRequest(f"{text(path)}: a file can't have {size} bytes")
        self._transfer.check_size(text(path), size)
        look = await self._paths.look(await self._paths.place(path))
        if look.is_directory:
            raise IsADirectory(f"{text(path)} is a directory")
        found = file_of(look)
        if size == found.size:
            return await self._rewrite(look.place, found, Attributes(mtime_ns=time.time_ns()))
        metadata = with_changes(found.metadata, mtime_ns=time.time_ns())
        with tempfile.TemporaryFile(dir=self._state_dir) as file:
            await self._download(found, file, min(size, found.size))
            await asyncio.to_thread(file.truncate, size)
            source = FileSource(file, size)
            headers = await self._transfer.tags_and_acls.of(found)
            return await self._store(look.place, source, metadata, headers)

    @traced
    async def rename(
        self, path: bytes, target: bytes, *, replace: bool, report: ReportProgress = no_report
    ) -> None:
        """Copy on the server, then remove; of a directory, everything below its prefix."""
        self._check_writable()
        if not path or not target or target.startswith(path + b"/"):
            raise InvalidRequest(f"{text(path)} can't be moved to {text(target)}")
        source, goal = await asyncio.gather(
            self._paths.recall(await self._paths.place(path)), self._look_for_new(target)
        )
        if goal.is_directory:  # whether it is empty decides: no memory is good enough
            goal = await self._paths.look(goal.place)
        is_begun = self._mover.is_begun(source.place.directory, goal.place.directory)
        if is_begun and goal.is_directory and not source.exists:
            self._mover.forget(source.place.directory, goal.place.directory)
            return
        if not source.exists:
            raise NotFound(f"{text(path)}: there is no such file or directory")
        if path == target:
            return
        if not (is_begun and source.is_directory and goal.is_directory):
            if goal.exists and not replace:
                raise AlreadyExists(f"{text(target)} is there already")
            check_replaceable(source, goal)
        if source.is_directory:
            await self._renew_marker(source)
            await self._rename_directory(source.place, goal.place, report)
            if goal.old_marker is not None:
                await self._bucket.delete(goal.old_marker)
        else:
            await self._rename_file(source.place, file_of(source), goal)

    @traced
    async def remove(self, path: bytes) -> None:
        """Remove the object, and keep its directory by a marker."""
        self._check_writable()
        look = await self._paths.recall(await self._paths.place(path))
        if look.is_directory:
            raise IsADirectory(f"{text(path)} is a directory")
        await self._delete_file(look.place, file_of(look))

    @traced
    async def remove_directory(self, path: bytes) -> None:
        """Remove the markers of an empty directory."""
        self._check_writable()
        if not path:
            raise InvalidRequest("the root of a namespace can't be removed")
        look = await self._paths.look(await self._paths.place(path))
        if not look.is_directory:
            file_of(look)
            raise NotADirectory(f"{text(path)} is not a directory")
        if look.children:
            raise DirectoryNotEmpty(f"{text(path)} is not empty")
        async with self._parents.kept(look.place):
            self._paths.changed(look.place)
        await self._markers.remove(look.place.directory, look.markers)
        self._parents.forget()

    # --- steps ------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._read_only:
            raise PermissionDenied("this namespace is read-only: see `read_only` in the config")

    def _check_owner(self, attributes: Attributes) -> None:
        """Only root sees the owners that objects carry, so only root may change them."""
        uid, gid = self._entries.uid, self._entries.gid
        if uid != 0 and (attributes.uid not in (None, uid) or attributes.gid not in (None, gid)):
            raise NotOwner("only root can give files on S3 to other users or groups")

    async def _look_for_new(self, path: bytes) -> S3Lookup:
        """Look at a path that may be made, in a directory that is there."""
        self._check_writable()
        place = await self._paths.new_place(path)
        look, _ = await asyncio.gather(self._paths.recall(place), self._parents.require(place))
        return look

    async def _store(
        self, place: S3Path, source: UploadSource, metadata: Metadata, headers: Mapping[str, Any]
    ) -> Entry:
        self._lister.cache.drop(place.key)
        self._paths.changed(place)
        target = NewObject(place.key, metadata, headers)
        stored = await self._transfer.upload(target, source, no_report)
        self._paths.saw_file(place, info_of_stored(stored, metadata, headers))
        return self._entries.file(paths.name(place.path), stored, metadata)

    async def _rewrite(self, place: S3Path, found: Info, attributes: Attributes) -> Entry:
        """New attributes: the object is copied onto itself. Its time must not become now."""
        old = found.metadata
        if old.mtime_ns is None:
            shown = self._entries.file(b"", found)
            old = with_changes(old, mtime_ns=shown.mtime_ns)
        metadata = old.changed(attributes, old.mode if old.mode is not None else FILE_MODE)
        self._lister.cache.drop(place.key)
        self._paths.changed(place)
        stored = await self._transfer.copy(found, place.key, metadata)
        self._paths.saw_file(
            place,
            with_changes(
                info_of_stored(stored, metadata, found.headers), tag_count=found.tag_count
            ),
        )
        return self._entries.file(paths.name(place.path), stored, metadata)

    async def _directory_metadata(
        self, place: S3Path, listed: Sequence[str] | None = None
    ) -> Metadata | None:
        if self._read_only:
            return None
        if not place.directory:
            return self._root_metadata
        marker = await self._markers.read(place.directory, listed=listed)
        return marker.metadata if marker else None

    async def _set_directory_attributes(self, place: S3Path, attributes: Attributes) -> Entry:
        """The root of a whole bucket has no key: its attributes last as long as the process."""
        old = await self._directory_metadata(place) or Metadata()
        metadata = old.changed(attributes, old.mode if old.mode is not None else DIRECTORY_MODE)
        if not place.directory:
            self._root_metadata = metadata
        elif metadata != old:
            self._paths.changed(place)
            marker = await self._markers.read(place.directory)
            kept = await self._transfer.tags_and_acls.of(marker) if marker is not None else HEADERS
            await self._markers.write(place.directory, metadata, kept)
            self._parents.made(place.directory)
        return self._entries.directory(paths.name(place.path), metadata)

    async def _renew_marker(self, look: S3Lookup) -> None:
        """Replace a marker that s3fs wrote once by one of the form that all understand."""
        if look.old_marker is None:
            return
        directory = look.place.directory
        old = await self._bucket.head(look.old_marker)
        if old is not None and directory not in look.markers:
            headers = await self._transfer.tags_and_acls.of(old)
            await self._markers.write(directory, old.metadata, headers)
        self._paths.changed(look.place)
        self._lister.cache.drop(look.old_marker)
        await self._bucket.delete(look.old_marker)
        self._parents.made(directory)

    async def _download(self, found: Info, file: IO[bytes], size: int) -> None:
        for offset in range(0, size, DOWNLOAD_BYTES):
            length = min(DOWNLOAD_BYTES, size - offset)
            data = await self._bucket.get(found.key, found.version, offset, length)
            await asyncio.to_thread(file.write, data)

    async def _delete_file(self, place: S3Path, found: Info) -> None:
        self._lister.cache.drop(found.key)
        self._paths.changed(place)
        async with self._parents.kept(place):
            await self._bucket.delete(found.key)
        self._paths.changed(place)

    async def _rename_file(self, source: S3Path, found: Info, goal: S3Lookup) -> None:
        """Editors and rsync write beside a file, and rename over it: the tags, by which lifecycle
        rules go, stay with the name."""
        target = goal.place
        self._lister.cache.drop(target.key)
        self._paths.changed(target)
        tags: dict[str, Any] = {}
        if goal.file is not None and not found.is_tagged:
            tags = await self._transfer.tags_and_acls.tags(goal.file)
        stored = await self._transfer.copy(found, target.key, tags=tags)
        headers = {**found.headers, **tags}
        self._paths.saw_file(
            target, with_changes(found, key=target.key, etag=stored.etag, headers=headers)
        )
        await self._delete_file(source, found)

    async def _rename_directory(
        self, source: S3Path, target: S3Path, report: ReportProgress
    ) -> None:
        try:
            async with self._parents.kept(source):
                await self._mover.move(source.directory, target.directory, report)
        finally:
            self._parents.forget()
            self._paths.forget()
            self._markers.forget()
            self._lister.cache.clear()
