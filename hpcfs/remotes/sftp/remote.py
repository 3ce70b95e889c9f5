"""SSH sites and their namespaces: the Remote protocol over SFTP 3 with OpenSSH's extensions.

This module says what each operation is made of; how a connection is had, how bytes move and what
vague refusals mean is beside it (../ssh/shared_session.py, session.py, read.py, write.py, path.py).
Extensions are used where the server has them and done without where it does not:
posix-rename (emulated), fsync (left out), statvfs (no numbers), limits (32 KiB pieces), hardlink
and lsetstat (NotSupported). Symbolic links are never followed below the root: the kernel resolves
links, and a link that replaced a file must not redirect a change to something else.
"""

from __future__ import annotations

import dataclasses
import logging
import stat
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import asyncssh
import msgspec
from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_WRITE

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import (
    InvalidName,
    InvalidRequest,
    NameTooLong,
    NotFound,
    NotOwner,
    NotSupported,
    PermissionDenied,
    ProtocolError,
    RemoteError,
    RemoteFailure,
    WrongSettings,
)
from hpcfs.model.sites import SftpRoot, SiteSpec
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.model.usage import DiskUsage, Traffic
from hpcfs.remotes.base import (
    MAX_FILE_BYTES,
    MAX_NAME_BYTES,
    ReportProgress,
    UploadSource,
    no_report,
)
from hpcfs.remotes.sftp import links, listing, read, rename as renaming
from hpcfs.remotes.sftp.attrs import full_mode, narrower, needs_present, owner_to_set, rest_to_set
from hpcfs.remotes.sftp.explain import (
    explain_device,
    explain_directory,
    explain_file,
    explain_new,
    explain_read_only,
    explain_rmdir,
    explain_size,
    explain_sticky,
    is_read_only,
)
from hpcfs.remotes.sftp.long_paths import LongPaths
from hpcfs.remotes.sftp.path import SftpPath, below, learn_user
from hpcfs.remotes.sftp.root import find_root
from hpcfs.remotes.sftp.session import SftpSession, together, traffic_of
from hpcfs.remotes.sftp.translate import MAX_PATH_BYTES, shown
from hpcfs.remotes.sftp.uploads import SftpUploads
from hpcfs.remotes.sftp.working import working
from hpcfs.remotes.ssh.shared_session import SharedSession

log = logging.getLogger(__name__)

ABILITIES = Capabilities(
    partial_writes=True,
    creates_on_upload=False,
    handles=True,
    mtime_resolution_ns=1_000_000_000,
)


class SftpSite:
    """All namespaces that one shared session reaches: a base.Site."""

    def __init__(
        self, spec: SiteSpec, kept: SharedSession[SftpSession], *, is_virtual: bool = False
    ):
        """`is_virtual`: the paths that it serves are not those of the machine that serves them."""
        self._shared = kept
        self._remotes = {
            name: SftpRemote(self._shared, root, is_virtual=is_virtual)
            for name, root in spec.roots.items()
            if isinstance(root, SftpRoot)
        }

    def remote(self, namespace: str) -> SftpRemote:
        """Return the remote of a namespace (see `Site.remote`)."""
        try:
            return self._remotes[namespace]
        except KeyError:
            raise WrongSettings(f"no namespace {namespace!r} lives on this site") from None

    def traffic(self) -> Traffic:
        """Return what is open now (see `Site.traffic`)."""
        return traffic_of(self._shared)

    def try_now(self) -> None:
        """End the pause after a failure (see `Site.try_now`)."""
        self._shared.try_now()

    def network_changed(self) -> None:
        """End the pause after a failure (see `Site.network_changed`)."""
        self._shared.try_now()

    async def renew(self) -> None:
        """Forget a refused login (see `Site.renew`)."""
        await self._shared.renew()

    async def close(self) -> None:
        """Give up what is under way and close all connections."""
        await self._shared.close()


class SftpRemote:
    """One namespace over SFTP: a base.Remote."""

    def __init__(
        self, kept: SharedSession[SftpSession], root: SftpRoot, *, is_virtual: bool = False
    ):
        self._shared = kept
        self._is_virtual = is_virtual
        self._root = root
        self._rooted: tuple[SftpSession, bytes] | None = None
        self._roots: tuple[bytes, ...] = ()
        """Paths by which links on the server may call the root: as it was named, and without
        links."""
        self._files = read.ReadHandles()
        self._uploads = SftpUploads(root.verify)
        self._long_paths = LongPaths()

    # --- where ----------------------------------------------------------------------------------

    async def _place(self, path: bytes, *, room: int = 0) -> SftpPath:
        """The path on the server, with a connection; the root is looked at once per connection.
        `room` is how many bytes longer paths will be that the server makes of this one, or we."""
        if b"\0" in path:
            raise InvalidName(f"{shown(path)} has a NUL byte")
        session = await self._shared.get()
        if self._rooted is None or self._rooted[0] is not session:
            self._rooted = (session, await self._find_root(session))
        root = self._rooted[1]
        full = below(root, path) if path else root
        if len(full) + room > MAX_PATH_BYTES:
            try:
                return await self._long_paths.place(session, path, full)
            except NameTooLong:
                if len(full) > MAX_PATH_BYTES:
                    raise
        return SftpPath(session, path, full)

    async def _both(self, path: bytes, other: bytes) -> tuple[SftpPath, SftpPath]:
        """Return the paths of a request that names two: on the channel of that with a long path, if
        there is one."""
        one, two = await self._place(path), await self._place(other)
        main = await self._shared.get()
        session = two.session if one.session is main else one.session
        one, two = (dataclasses.replace(place, session=session) for place in (one, two))
        return one, two

    @asynccontextmanager
    async def _changing(self, path: bytes, *, room: int = 0) -> AsyncIterator[SftpPath]:
        """Yield the path for a change: refusals tell a remote that is read-only."""
        place = await self._place(path, room=room)
        try:
            yield place
        except RemoteError as error:
            explained = await explain_read_only(place, error)
            if explained is error:
                raise
            raise explained from error

    async def _find_root(self, session: SftpSession) -> bytes:
        found = await find_root(session, self._root.path)
        if not self._is_virtual:
            self._roots = found.paths
        return found.full

    async def connect(self) -> Capabilities:
        """Log in if need be, and look at the namespace's root."""
        place = await self._place(b"")
        is_root = place.session.owners.remote_uid == 0
        return msgspec.structs.replace(
            ABILITIES,
            privileged=is_root,
            read_only=await is_read_only(place),
            roots=self._roots,
        )

    # --- looking --------------------------------------------------------------------------------

    async def stat(self, path: bytes) -> Entry:
        """Ask for the attributes of the name itself (LSTAT)."""
        place = await self._place(path)
        await self._uploads.settled(path)
        return place.entry_of(await place.attrs())

    async def stat_open(self, handle: int) -> Entry | None:
        """Ask for the attributes of the open file (FSTAT)."""
        root = await self._place(b"")
        with root.asking():
            async with self._files.if_open(root.session, handle) as held:
                if held is None:
                    return None
                place, remote = held
                return place.entry_of(await root.session.bulk.fstat(remote, 0))

    async def list(self, path: bytes) -> AsyncIterator[Sequence[Entry]]:
        """Read the directory, several requests at once."""
        place = await self._place(path, room=1 + MAX_NAME_BYTES)
        meta = place.session.meta
        try:
            with place.asking():
                handle = await meta.kept(meta.opendir(place.full))
        except RemoteError as error:
            raise await explain_directory(place, error) from error
        try:
            async with aclosing(listing.pages(place, handle)) as pages:
                async for page in pages:
                    yield page
        finally:
            meta.close_soon(handle)

    async def read_link(self, path: bytes) -> bytes:
        """Ask where a link leads (READLINK)."""
        place = await self._place(path)
        with place.asking():
            names, _ = await place.session.meta.readlink(place.full)
        target = names[0].filename if names else b""
        if (
            not isinstance(target, bytes)
            or not 0 < len(target) <= MAX_PATH_BYTES
            or b"\0" in target
        ):
            raise ProtocolError(f"{place} is a link to something that can't be a path")
        return target

    async def disk_usage(self) -> DiskUsage | None:
        """Ask by statvfs@openssh.com; None where the server does not have it."""
        place = await self._place(b"")
        try:
            with place.asking():
                usage = await place.session.meta.statvfs(place.full)
        except NotSupported:
            return None
        unit = usage.frsize or usage.bsize
        bytes_and_files = (
            *(count * unit for count in (usage.blocks, usage.bfree, usage.bavail)),
            *(usage.files, usage.ffree),
        )
        return DiskUsage(*(min(number, MAX_FILE_BYTES) for number in bytes_and_files))

    # --- bytes ----------------------------------------------------------------------------------

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
    ) -> Sequence[bytes]:
        """Read a range through the handle, then check that the version is still there."""
        place = await self._place(path)
        with place.asking():
            async with self._files.using(place, handle) as remote:
                return await read.read_range(
                    place, remote, version, offset, length, growing=growing, urgent=urgent
                )

    async def read_unsized(self, path: bytes, offset: int, length: int, handle: int) -> bytes:
        """Read a range through the handle, whatever the attributes say."""
        place = await self._place(path)
        length = min(length, place.session.read_bytes)
        with place.asking():
            async with self._files.using(place, handle) as remote:
                try:
                    with working(place.session.answers):
                        chunks = await place.session.bulk.read_piece(remote, offset, length)
                    return b"".join(chunks)
                except asyncssh.SFTPEOFError:
                    return b""

    async def release(self, handle: int) -> None:
        """Close the handle once it is not in use."""
        self._files.release(handle)
        self._uploads.release(handle)

    async def upload(
        self, request: UploadRequest, source: UploadSource, report: ReportProgress
    ) -> Entry:
        """Write the ranges in place, or a whole file beside it that then takes its place."""
        async with self._changing(request.path, room=MAX_NAME_BYTES) as place:
            return await self._uploads.upload(place, request, source, report)

    async def upload_piece(self, request: UploadPieceRequest, source: UploadSource) -> None:
        """Write a piece into the file, which stays open."""
        async with self._changing(request.path) as place:
            await self._uploads.upload_piece(place, request, source)

    async def truncate(self, path: bytes, size: int) -> Entry:
        """Set the size of a regular file."""
        if size < 0:
            raise InvalidRequest("a size can't be negative")
        async with self._changing(path) as place:
            await self._uploads.settled(path)
            await self._refuse_link(place)
            try:
                return await self._changed(place, SFTPAttrs(size=size))
            except RemoteError as error:
                raise await explain_size(place, await explain_file(place, error), size) from error

    async def check_writable(self, path: bytes) -> None:
        """Open the file for writing and close it again."""
        async with self._changing(path) as place:
            bulk = place.session.bulk
            try:
                with place.asking():
                    bulk.close_soon(await bulk.kept(bulk.open(place.full, FXF_WRITE, SFTPAttrs())))
            except RemoteError as error:
                raise await explain_file(place, error) from error

    # --- names ----------------------------------------------------------------------------------

    async def create(self, path: bytes, mode: int, handle: int = NO_HANDLE) -> Entry:
        """Make an empty file; with a handle it stays open for the upload."""
        async with self._changing(path) as place:
            return await self._uploads.create(place, mode, handle)

    async def make_directory(self, path: bytes, mode: int) -> Entry:
        """The server's umask, access lists and set-group-ID directories decide, as for files."""
        async with self._changing(path) as place:
            wanted = SFTPAttrs(permissions=mode & 0o7777)
            attrs = await self._made(place, place.session.meta.mkdir(place.full, wanted))
            narrowed = narrower(attrs, mode, stat.S_IFDIR)
            return await self._changed(place, narrowed) if narrowed else place.entry_of(attrs)

    async def _made(self, place: SftpPath, making: Coroutine[Any, Any, None]) -> SFTPAttrs:
        """Make something, and return its attributes, asked for in the same flight."""
        try:
            with place.asking():
                _, attrs = await together(making, place.attrs())
        except RemoteError as error:
            raise await explain_new(place, error) from error
        assert isinstance(attrs, SFTPAttrs)
        await learn_user(place, attrs)
        return attrs

    async def make_symlink(self, path: bytes, target: bytes) -> Entry:
        """Make a link, in the order of paths that this server wants."""
        if not target or b"\0" in target:
            raise InvalidRequest("a link needs a target without NUL bytes")
        async with self._changing(path) as place:
            try:
                target_first = await links.reads_target_first(place)
            except RemoteError as error:
                raise await explain_new(place, error) from error
            making = links.make(place, target, target_first=target_first)
            return place.entry_of(await self._made(place, making))

    async def make_link(self, existing: bytes, path: bytes) -> Entry:
        """Make a hard link (hardlink@openssh.com)."""
        async with self._changing(path):
            old, place = await self._both(existing, path)
            try:
                attrs = await self._made(place, place.session.meta.link(old.full, place.full))
            except NotFound:
                if await old.kind() is None:
                    raise NotFound(f"{old} does not exist") from None
                raise
            except RemoteError as error:
                raise await explain_device(old, place, error) from error
            return place.entry_of(attrs)

    async def rename(
        self, path: bytes, target: bytes, *, replace: bool, report: ReportProgress = no_report
    ) -> None:
        """Rename, over what is there if `replace`."""
        async with self._changing(path):
            await self._uploads.settled(path)
            source, place = await self._both(path, target)
            await renaming.rename(source, place, replace=replace)

    async def remove(self, path: bytes) -> None:
        """Remove anything but a directory."""
        async with self._changing(path) as place:
            try:
                with place.asking():
                    await place.session.meta.remove(place.full)
            except RemoteError as error:
                raise await explain_sticky(place, await explain_file(place, error)) from error

    async def remove_directory(self, path: bytes) -> None:
        """Remove an empty directory."""
        if not path:
            raise InvalidRequest("the root of a namespace can't be removed")
        async with self._changing(path) as place:
            try:
                with place.asking():
                    await place.session.meta.rmdir(place.full)
            except RemoteError as error:
                raise await explain_sticky(place, await explain_rmdir(place, error)) from error

    # --- attributes -----------------------------------------------------------------------------

    async def set_attributes(self, path: bytes, attributes: Attributes) -> Entry:
        """Set what the attributes name, and return the entry as it is then."""
        async with self._changing(path) as place:
            await self._uploads.settled(path)
            return await self._set(place, attributes)

    async def _set(self, place: SftpPath, attributes: Attributes) -> Entry:
        session = place.session
        if not (place.path and session.sets_without_following) or needs_present(attributes):
            return await self._look_and_set(place, attributes)
        wanted = rest_to_set(attributes, SFTPAttrs())
        try:
            return await self._changed(place, *[wanted] if wanted else [], follow=False)
        except PermissionDenied:  # the entry, or the way to it? looking tells
            return await self._look_and_set(place, attributes)
        except (NotSupported, RemoteFailure):
            entry = await self._look_and_set(place, attributes)
        if not stat.S_ISLNK(entry.mode):
            log.debug("%s can't set attributes without following links", session.shown)
            session.sets_without_following = False
        return entry

    async def _look_and_set(self, place: SftpPath, attributes: Attributes) -> Entry:
        now = await place.attrs()
        is_link = stat.S_ISLNK(full_mode(now))
        if is_link and attributes.mode is not None:
            raise NotSupported(f"{place} is a symbolic link, and links have no mode of their own")
        owner = owner_to_set(attributes, now, place.session.owners)
        rest = rest_to_set(attributes, now)
        wanted = [attrs for attrs in (owner, rest) if attrs is not None]
        try:
            if len(wanted) > 1:  # one that is refused must not change the other
                await self._changed(place, wanted.pop(0), follow=not is_link)
            return await self._changed(place, *wanted, follow=not is_link)
        except PermissionDenied as error:
            raise NotOwner(error.message) from error

    async def _changed(self, place: SftpPath, *wanted: SFTPAttrs, follow: bool = True) -> Entry:
        """The entry after the changes, asked for in the same flight."""
        meta = place.session.meta
        with place.asking():
            changes = [meta.setstat(place.full, attrs, follow_symlinks=follow) for attrs in wanted]
            *_, attrs = await together(*changes, place.attrs())
        return place.entry_of(attrs)

    async def _refuse_link(self, place: SftpPath) -> None:
        if stat.S_ISLNK(full_mode(await place.attrs())):
            raise InvalidRequest(f"{place} is a symbolic link")
