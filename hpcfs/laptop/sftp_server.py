"""Executes each SFTP request on the shares of a tunnel, and on nothing else.

The root is a directory that nobody can change, and that holds the shares; everything below is done
on entries that laptop/safe_paths.py resolved. Where the protocol leaves a choice, the server does
as OpenSSH does.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import posixpath
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncssh
from asyncssh import SFTPAttrs, SFTPName, SFTPVFSAttrs
from asyncssh.constants import FXF_APPEND, FXF_CREAT, FXF_EXCL, FXF_READ, FXF_TRUNC, FXF_WRITE

from hpcfs.laptop.hardlinks import HardLinks
from hpcfs.laptop.memory import ServerMemory
from hpcfs.laptop.safe_paths import SafeEntry, SharedFolder
from hpcfs.laptop.shares import Share

MAX_READ_BYTES = 1024 * 1024
MAX_OPEN_FILES = 1000
"""Open files of all mounts together, and directories being listed: systems allow a process 1024
descriptors, and some are connections."""
MAX_PATH_BYTES = 4096
"""PATH_MAX of Linux. A packet could hold a path with a million components, each to be opened."""
LISTED_AT_ONCE = 128
"""Names in one answer (as in asyncssh). The names of a large directory are never all held: a mount
may list it hundreds of times at once."""
LISTING_DESCRIPTORS = 2
"""Descriptors of one listing: os.scandir opens its own."""
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

T = TypeVar("T")


class ShareFile:
    """An open file of a share."""

    def __init__(self, descriptor: int, share: Share, *, append: bool) -> None:
        self.descriptor = descriptor
        self.share = share
        self.append = append

    def close(self) -> None:
        """Close the descriptor; further calls do nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass
class ShareTraffic:
    """Bytes of file contents that went to mounts and came from them."""

    sent: int = 0
    received: int = 0


class Shares:
    """The shares of all connections, and the resources that they have in use."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.by_name = {os.fsencode(share.name): share for share in shares}
        self.folders = {share.name: SharedFolder(share.directory) for share in shares}
        self.traffic = ShareTraffic()
        self.memory = ServerMemory()
        self.links = HardLinks(guarded=any(share.read_only for share in shares))
        self.open_files = 0
        self._since = time.time()

    def close(self) -> None:
        """Close the shared folders."""
        for folder in self.folders.values():
            folder.close()

    def take_descriptors(self, count: int = 1) -> None:
        """Count descriptors about to be opened. Raises OSError (EMFILE) where there are too
        many."""
        if self.open_files + count > MAX_OPEN_FILES:
            raise OSError(errno.EMFILE, "too many files are open through the tunnel")
        self.open_files += count

    def give_descriptors_back(self, count: int = 1) -> None:
        """Count closed descriptors."""
        self.open_files -= count

    def top(self) -> SFTPAttrs:
        """Return the attributes of the directory that holds the shares. A mount takes its owner for
        the laptop's user."""
        return SFTPAttrs(
            size=0,
            uid=os.getuid(),
            gid=os.getgid(),
            permissions=stat.S_IFDIR | 0o555,
            atime=int(self._since),
            mtime=int(self._since),
        )


class ShareServer(asyncssh.SFTPServer):
    """The request handlers that asyncssh calls. They raise OSError, which laptop/channel.py maps to
    SFTP's errors."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._links = shares.links

    # --- finding --------------------------------------------------------------------------------

    def _split(self, path: bytes) -> tuple[Share | None, list[bytes]]:
        """Return the share (None for the root) and the path in it. Raises OSError where there is
        none."""
        if b"\0" in path:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if len(path) >= MAX_PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        while parts and parts[0] == b"..":
            parts.pop(0)
        if not parts:
            return None, []
        share = self._shares.by_name.get(parts[0])
        if share is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return share, parts[1:]

    @contextmanager
    def _entry(
        self, path: bytes, *, follow: bool = False, changes: bool = False
    ) -> Iterator[tuple[Share, SafeEntry]]:
        """Resolve a path below a share, for a request that the root can't answer. With `changes` a
        new name in the root is refused, not reported missing."""
        try:
            share, parts = self._split(path)
        except FileNotFoundError:
            if not changes:
                raise
            share = None
        if share is None:
            raise PermissionError(
                errno.EACCES, "only shares are here, and the laptop decides which"
            )
        with self._shares.folders[share.name].entry(parts, follow=follow) as entry:
            if changes:
                _check_writable(share)
            yield share, entry

    @contextmanager
    def _replacing(self, path: bytes) -> Iterator[tuple[Share, SafeEntry]]:
        """Resolve a name that is to be made, removed or replaced; that of a share itself is
        refused."""
        with self._entry(path, changes=True) as (share, entry):
            if entry.name == b".":
                raise PermissionError(errno.EACCES, "a share can't be removed or replaced")
            yield share, entry

    # --- files ----------------------------------------------------------------------------------

    def open(self, path: bytes, pflags: int, attrs: SFTPAttrs) -> ShareFile:
        """Open or make a file. Raises OSError."""
        flags = _access(pflags)
        changes = bool(pflags & (FXF_WRITE | FXF_CREAT | FXF_TRUNC | FXF_APPEND))
        with self._entry(path, follow=not pflags & FXF_EXCL, changes=changes) as (share, entry):
            mode = 0o666 if attrs.permissions is None else _file_mode(attrs.permissions)
            if changes:
                self._links.check_entry(entry)
            self._shares.take_descriptors()
            try:
                opened = entry.open(flags, mode)
            except BaseException:
                self._shares.give_descriptors_back()
                raise
        return ShareFile(opened, share, append=bool(pflags & FXF_APPEND))

    def close(self, file_obj: object) -> None:
        """Close a file."""
        _file(file_obj).close()
        self._shares.give_descriptors_back()

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        """Read up to `size` bytes: from the page cache at once, otherwise in a thread."""
        descriptor, size = _file(file_obj).descriptor, min(size, MAX_READ_BYTES)
        data = _read_now(descriptor, offset, size)
        if data is None:
            data = await _apart(descriptor, lambda ours: os.pread(ours, size, offset))
        self._shares.traffic.sent += len(data)
        return data

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        """Write all of the data, or raise OSError."""
        file = _file(file_obj)
        view, written = memoryview(data), 0
        while written < len(data):
            if file.append:
                written += os.write(file.descriptor, view[written:])
            else:
                written += os.pwrite(file.descriptor, view[written:], offset + written)
        self._shares.traffic.received += written
        return written

    def fstat(self, file_obj: object) -> SFTPAttrs:
        """Return an open file's attributes."""
        return _attrs(os.fstat(_file(file_obj).descriptor))

    def fsetstat(self, file_obj: object, attrs: SFTPAttrs) -> None:
        """Change an open file's attributes. Raises OSError."""
        file = _file(file_obj)
        _check_writable(file.share)
        self._links.check(os.fstat(file.descriptor))
        if attrs.size is not None:
            os.ftruncate(file.descriptor, attrs.size)
        if attrs.permissions is not None:
            os.fchmod(file.descriptor, _file_mode(attrs.permissions))
        if attrs.uid is not None and attrs.gid is not None:
            os.fchown(file.descriptor, attrs.uid, attrs.gid)
        if attrs.atime is not None and attrs.mtime is not None:
            os.utime(file.descriptor, (attrs.atime, attrs.mtime))

    async def fsync(self, file_obj: object) -> None:
        """Flush a file to the disk, in a thread."""
        await _apart(_file(file_obj).descriptor, os.fsync)

    def fstatvfs(self, file_obj: object) -> SFTPVFSAttrs:
        """Return the usage of the file system that holds an open file."""
        file = _file(file_obj)
        return self._usage(file.share, file.descriptor)

    # --- looking --------------------------------------------------------------------------------

    def lstat(self, path: bytes) -> SFTPAttrs:
        """Return the attributes of a path, or of the link itself."""
        return self._look(path, follow=False)

    def stat(self, path: bytes) -> SFTPAttrs:
        """Return the attributes of a path, or of a link's target."""
        return self._look(path, follow=True)

    def _look(self, path: bytes, *, follow: bool) -> SFTPAttrs:
        share, parts = self._split(path)
        if share is None:
            return self._shares.top()
        with self._shares.folders[share.name].entry(parts, follow=follow) as entry:
            return _attrs(entry.stat())

    def readlink(self, path: bytes) -> bytes:
        """Return a symlink's target."""
        with self._entry(path) as (_, entry):
            return os.readlink(entry.name, dir_fd=entry.parent)

    def realpath(self, path: bytes) -> bytes:
        """Normalize a path without access to the disk, since nothing here depends on where links
        lead. Raises OSError."""
        if len(path) >= MAX_PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return posixpath.normpath(b"/" + path.lstrip(b"/"))

    def statvfs(self, path: bytes) -> SFTPVFSAttrs:
        """Return the usage of the file system that holds a path; that of the root is the first
        share's."""
        share, parts = self._split(path)
        if share is None:
            share = next(iter(self._shares.by_name.values()))
        with self._shares.folders[share.name].directory(parts) as descriptor:
            return self._usage(share, descriptor)

    def _usage(self, share: Share, descriptor: int) -> SFTPVFSAttrs:
        """Report each share as a file system of its own, since nothing can be renamed from one to
        another."""
        usage = SFTPVFSAttrs.from_local(os.fstatvfs(descriptor))
        usage.fsid = 1 + list(self._shares.by_name.values()).index(share)
        if share.read_only:
            usage.flags |= os.ST_RDONLY
        return usage

    def check_directory(self, path: bytes) -> None:
        """Raise OSError where the path is no directory that can be listed."""
        share, parts = self._split(path)
        if share is not None:
            with self._shares.folders[share.name].directory(parts):
                return

    async def scandir(self, path: bytes) -> AsyncIterator[SFTPName]:
        """List a directory."""
        share, parts = self._split(path)
        if share is None:
            for top_name in self._shares.by_name:
                yield SFTPName(top_name, b"", self.stat(top_name))
            return
        self._shares.take_descriptors(LISTING_DESCRIPTORS)
        try:
            with (
                self._shares.folders[share.name].directory(parts) as descriptor,
                os.scandir(descriptor) as entries,
            ):
                over = False
                while not over:
                    page, over = await asyncio.to_thread(_page, descriptor, entries)
                    for name in page:
                        yield name
        finally:
            self._shares.give_descriptors_back(LISTING_DESCRIPTORS)

    def format_longname(self, name: SFTPName) -> None:
        """Build the line for `ls -l` of sftp(1). It has no user names, which would cost lookups."""
        mode = stat.filemode(name.attrs.permissions or 0)
        assert isinstance(name.filename, bytes)
        name.longname = f"{mode} {name.attrs.size} ".encode() + name.filename

    # --- changing -------------------------------------------------------------------------------

    def setstat(self, path: bytes, attrs: SFTPAttrs) -> None:
        """Change the attributes of a path, or of a link's target."""
        self._set(path, attrs, follow=True)

    def lsetstat(self, path: bytes, attrs: SFTPAttrs) -> None:
        """Change the attributes of a path, or of the link itself."""
        self._set(path, attrs, follow=False)

    def _set(self, path: bytes, attrs: SFTPAttrs, *, follow: bool) -> None:
        with self._entry(path, follow=follow, changes=True) as (_, entry):
            self._links.check_entry(entry)
            place: Any = {"dir_fd": entry.parent, "follow_symlinks": False}
            if attrs.size is not None:
                opened = entry.open(os.O_WRONLY)
                try:
                    os.ftruncate(opened, attrs.size)
                finally:
                    os.close(opened)
            if attrs.permissions is not None:
                is_directory = stat.S_ISDIR(entry.stat().st_mode)
                mode = attrs.permissions & 0o7777
                entry.chmod(mode if is_directory else _file_mode(mode))
            if attrs.uid is not None and attrs.gid is not None:
                os.chown(entry.name, attrs.uid, attrs.gid, **place)
            if attrs.atime is not None and attrs.mtime is not None:
                os.utime(entry.name, (attrs.atime, attrs.mtime), **place)

    def remove(self, path: bytes) -> None:
        """Remove a file."""
        with self._replacing(path) as (_, entry):
            self._links.unlink(entry)

    def mkdir(self, path: bytes, attrs: SFTPAttrs) -> None:
        """Make a directory."""
        mode = 0o777 if attrs.permissions is None else attrs.permissions & 0o777
        with self._replacing(path) as (_, entry):
            os.mkdir(entry.name, mode, dir_fd=entry.parent)

    def rmdir(self, path: bytes) -> None:
        """Remove an empty directory."""
        with self._replacing(path) as (_, entry):
            os.rmdir(entry.name, dir_fd=entry.parent)

    def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        """Make a symlink `newpath` whose target is `oldpath`."""
        with self._replacing(newpath) as (_, entry):
            os.symlink(oldpath, entry.name, dir_fd=entry.parent)

    def link(self, oldpath: bytes, newpath: bytes) -> None:
        """Make `newpath` a hard link to `oldpath`."""
        with self._two(oldpath, newpath) as (old, new):
            self._links.link(old, new)

    def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
        """Rename, and replace the target, as rename(2) does."""
        with self._two(oldpath, newpath) as (old, new):
            self._links.losing(new)
            os.rename(old.name, new.name, src_dir_fd=old.parent, dst_dir_fd=new.parent)

    def rename(self, oldpath: bytes, newpath: bytes) -> None:
        """Rename to a name that does not exist. As in OpenSSH's server a file is renamed by link
        and unlink, which fails where the target exists."""
        with self._two(oldpath, newpath) as (old, new):
            if stat.S_ISREG(old.stat().st_mode):
                self._links.link(old, new)
                self._links.unlink(old)
                return
            with suppress(FileNotFoundError):
                new.stat()
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(old.name, new.name, src_dir_fd=old.parent, dst_dir_fd=new.parent)

    @contextmanager
    def _two(self, oldpath: bytes, newpath: bytes) -> Iterator[tuple[SafeEntry, SafeEntry]]:
        with self._replacing(oldpath) as (one, old), self._replacing(newpath) as (other, new):
            if one is not other:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            yield old, new


def _access(pflags: int) -> int:
    """Translate the open flags as OpenSSH's flags_from_portable does."""
    flags = os.O_RDONLY
    if pflags & FXF_READ and pflags & FXF_WRITE:
        flags = os.O_RDWR
    elif pflags & FXF_WRITE:
        flags = os.O_WRONLY
    for bit, flag in (
        (FXF_APPEND, os.O_APPEND),
        (FXF_CREAT, os.O_CREAT),
        (FXF_TRUNC, os.O_TRUNC),
        (FXF_EXCL, os.O_EXCL),
    ):
        flags |= flag if pflags & bit else 0
    return flags


def _file_mode(permissions: int) -> int:
    """Drop the set-user-ID and set-group-ID bits, so that nobody on the cluster can make a program
    that other users of the laptop run as its owner. Linux likewise drops the second bit for groups
    that the caller is not in (chmod(2))."""
    return permissions & 0o7777 & ~(stat.S_ISUID | stat.S_ISGID)


def _check_writable(share: Share) -> None:
    if share.read_only:
        raise OSError(errno.EROFS, f"{share.name} is shared read-only")


def _file(file_obj: object) -> ShareFile:
    assert isinstance(file_obj, ShareFile)
    if file_obj.descriptor < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return file_obj


async def _apart(descriptor: int, work: Callable[[int], T]) -> T:
    """Run the work in a thread, with a descriptor of its own: another channel may close the file
    meanwhile, and its number be reused."""
    ours = os.dup(descriptor)

    def run() -> T:
        try:
            return work(ours)
        finally:
            os.close(ours)

    return await asyncio.to_thread(run)


def _read_now(descriptor: int, offset: int, size: int) -> bytes | None:
    """Return bytes from the page cache; None where the disk must be waited for."""
    if not _NOWAIT:
        return None
    buffer = bytearray(size)
    try:
        count = os.preadv(descriptor, [buffer], offset, _NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return None
        raise
    if 0 < count < size and os.fstat(descriptor).st_size > offset + count:
        return None
    del buffer[count:]
    return bytes(buffer)


def _attrs(found: os.stat_result) -> SFTPAttrs:
    return SFTPAttrs(
        size=found.st_size,
        uid=found.st_uid,
        gid=found.st_gid,
        permissions=found.st_mode,
        atime=_seconds(found.st_atime_ns),
        mtime=_seconds(found.st_mtime_ns),
    )


def _seconds(nanoseconds: int) -> int:
    """Clamp to 32 bits, which is all that version 3 of the protocol has."""
    return min(max(nanoseconds // 1_000_000_000, 0), 2**32 - 1)


def _page(descriptor: int, entries: Iterator[os.DirEntry[str]]) -> tuple[list[SFTPName], bool]:
    """Return the next names that still exist, and whether they were the last."""
    names = [entry.name for entry in itertools.islice(entries, LISTED_AT_ONCE)]
    found = []
    for name in names:
        with suppress(FileNotFoundError):
            attrs = _attrs(os.stat(name, dir_fd=descriptor, follow_symlinks=False))
            found.append(SFTPName(os.fsencode(name), b"", attrs))
    return found, len(names) < LISTED_AT_ONCE
