"""The kernel's requests: convert, delegate to the filesystem, convert back. Nothing else.

Each handler ends within the remote's deadlines, or as soon as its caller is interrupted, and no
exception but FUSEError leaves one: pyfuse3 would end the mount.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import pyfuse3

from hpcfs.filesystem.filesystem import Filesystem
from hpcfs.filesystem.lookup import OPEN_FRESH_SECONDS
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, Node
from hpcfs.kernel.errno import errno_of, shortage
from hpcfs.kernel.requests import KernelRequest, KernelRequests
from hpcfs.model.entries import Attributes
from hpcfs.model.errors import InvalidRequest, NotFound, RemoteError
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_BLOCK_SIZE = 1024 * 1024
"""st_blksize: what cp and stdio take as their buffer."""
_RENAME_NOREPLACE = 1  # linux/fs.h


def _answering(
    handler: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Every error becomes an errno; only those that are no error of ours deserve a traceback."""

    @wraps(handler)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            number = errno_of(error)
            if number is None and (number := shortage(error)) is not None:
                if _is_new(sentence := f"{handler.__name__}: {error or 'no memory is left'}"):
                    log.warning("%s", sentence)
            elif number is None:
                log.exception("%s failed in an unexpected way", handler.__name__)
                number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            elif isinstance(error, RemoteError) and _deserves_line(number, error):
                log.warning("%s: %s", handler.__name__, error.message)
            raise pyfuse3.FUSEError(number) from None

    return wrapped


def _interruptible(
    handler: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Of (self, inode, ..., ctx): the thread that called may be interrupted while it waits."""

    @wraps(handler)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        self, inode, ctx = cast("tuple[KernelOperations, int, Any]", (*args[:2], args[-1]))
        request = self.requests.begin(self.namespace_of(inode), ctx.pid, by_handle=False)
        return await _until_given_up(self.requests, request, handler(*args, **kwargs))

    return wrapped


def _interruptible_by_opener(
    handler: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Of (self, handle, ...): pyfuse3 does not tell who calls, which is mostly who opened it."""

    @wraps(handler)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        self, handle = cast("tuple[KernelOperations, int]", args[:2])
        opener = self.opener_of(handler.__name__, handle)
        request = self.requests.begin(opener.namespace, opener.thread, by_handle=True)
        return await _until_given_up(self.requests, request, handler(*args, **kwargs))

    return wrapped


async def _until_given_up(
    requests: KernelRequests, request: KernelRequest, answer: Coroutine[Any, Any, R]
) -> R:
    try:
        with request.scope:
            return await answer
    finally:
        requests.end(request)
    raise pyfuse3.FUSEError(request.errno)


class _Opener(NamedTuple):
    """Who opened a handle, and of which namespace it is."""

    thread: int
    namespace: Namespace | None


_NOBODY = _Opener(0, None)
_REPEAT_SECONDS = 10.0
_MESSAGES_KNOWN = 100
_logged: dict[str, float] = {}


def _deserves_line(number: int, error: RemoteError) -> bool:
    """Programs that poll a dead namespace must not fill the log with one sentence."""
    if number in _EVERYDAY or (number in _PLAIN and not error.is_told):
        return False
    return _is_new(error.message)


def _is_new(message: str) -> bool:
    """Whether the message was not logged a short while ago; it counts as logged then."""
    now = time.monotonic()
    if now - _logged.get(message, -_REPEAT_SECONDS) < _REPEAT_SECONDS:
        return False
    if len(_logged) >= _MESSAGES_KNOWN:
        _logged.clear()
    _logged[message] = now
    return True


_EVERYDAY = frozenset({errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTSUP, errno.EXDEV})
"""Answers that programs provoke all the time, whoever gave them; the log is for the others."""
_PLAIN = frozenset(
    {errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG}
)
"""Answers that need no words where the mount gives them: its modes and settings can be seen. Where
the remote does, its reason is in the log."""


def _attributes(node: Node, ino: int | None = None) -> pyfuse3.EntryAttributes:
    entry = node.entry
    shown = pyfuse3.EntryAttributes()
    shown.st_ino = node.ino if ino is None else ino
    shown.st_mode = entry.mode
    shown.st_nlink = node.links  # for directories 1 means "unknown" to find(1)
    shown.st_uid = entry.uid
    shown.st_gid = entry.gid
    shown.st_size = entry.size
    shown.st_blksize = _BLOCK_SIZE
    shown.st_blocks = -(-entry.size // 512)
    shown.st_atime_ns = entry.atime_ns
    shown.st_mtime_ns = entry.mtime_ns
    shown.st_ctime_ns = max(entry.mtime_ns, node.changed_ns)  # no remote tells it
    shown.attr_timeout = ATTRIBUTE_SECONDS
    shown.entry_timeout = ATTRIBUTE_SECONDS
    return shown


def _told(node: Node) -> pyfuse3.EntryAttributes:
    """The attributes, about to be given to the kernel."""
    node.kernel_is_behind = False
    return _attributes(node)


def _drop_attributes(node: Node) -> None:
    """The kernel asks for them before it uses them again. Without pages this waits for nothing, so
    a handler may call it."""
    try:
        pyfuse3.invalidate_inode(node.ino, attr_only=True)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the kernel has just forgotten it
            raise
    node.kernel_is_behind = False


class KernelOperations(pyfuse3.Operations):
    """Implements the requests of pyfuse3. Names and targets are bytes."""

    supports_dot_lookup = True
    enable_writeback_cache = False  # it hides the remote's size changes: tail -f would break

    def __init__(self, filesystem: Filesystem, requests: KernelRequests) -> None:
        super().__init__()
        self._fs = filesystem
        self.requests = requests
        self._file_openers: dict[int, _Opener] = {}
        self._directory_openers: dict[int, _Opener] = {}

    # --- who waits ------------------------------------------------------------------------------

    def namespace_of(self, inode: int) -> Namespace | None:
        """Return the namespace of an inode; None for the mount's top, and for what is gone."""
        node = self._fs.tree.find(inode)
        return None if node is None else node.namespace

    def opener_of(self, handler: str, handle: int) -> _Opener:
        """Return who opened the handle that this handler got."""
        is_directory = handler == "readdir"
        return (self._directory_openers if is_directory else self._file_openers).get(
            handle, _NOBODY
        )

    # --- looking --------------------------------------------------------------------------------

    @_answering
    @_interruptible
    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Find a name in a directory; the kernel counts the answer as a lookup."""
        try:
            return self._counted(await self._fs.lookup.find(parent, name, ctx.pid))
        except NotFound:
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = 0  # lets the kernel remember for a while that there is no such name
            missing.entry_timeout = OPEN_FRESH_SECONDS
            return missing

    def _counted(self, node: Node) -> pyfuse3.EntryAttributes:
        self._fs.tree.count_lookup(node)
        return _told(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take back lookups: pairs of (inode, count)."""
        for ino, lookups in inode_list:
            self._fs.tree.forget(ino, lookups)

    @_answering
    @_interruptible
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """stat(2): the attributes of an inode."""
        return _told(await self._fs.lookup.getattr(inode))

    @_answering
    @_interruptible
    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """chmod(2), chown(2), utimensat(2), truncate(2): the fields that were asked for."""
        wanted = Attributes(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        size = attr.st_size if fields.update_size else None
        return _told(await self._fs.setattr(inode, wanted, size, fh))

    @_answering
    @_interruptible
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """readlink(2): the target of a symbolic link."""
        return await self._fs.readlink(inode)

    @_answering
    @_interruptible
    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        """access(2); True, or an error."""
        await self._fs.access(inode, mode)
        return True

    @_answering
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """statfs(2): what df shows, in blocks of 4 KiB."""
        usage = await self._fs.disk_usage()
        shown = pyfuse3.StatvfsData()
        shown.f_bsize = shown.f_frsize = 4096
        shown.f_blocks = usage.total // 4096
        shown.f_bfree = usage.free // 4096
        shown.f_bavail = usage.available // 4096
        shown.f_files = usage.files
        shown.f_ffree = shown.f_favail = usage.files_free
        shown.f_namemax = 255
        return shown

    # --- extended attributes --------------------------------------------------------------------

    def _check_xattrs(self) -> None:
        """ENOSYS makes the kernel answer by itself from then on. Otherwise it asks before every
        write(2) whether the file has capabilities: writes of 4 KiB take 1.6 times as long."""
        if not self._fs.xattrs.any_keeps:
            raise pyfuse3.FUSEError(errno.ENOSYS)

    @_answering
    @_interruptible
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """getxattr(2)."""
        self._check_xattrs()
        return await self._fs.xattrs.get(inode, name)

    @_answering
    @_interruptible
    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        """listxattr(2)."""
        self._check_xattrs()
        return await self._fs.xattrs.list(inode)

    @_answering
    @_interruptible
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        """setxattr(2)."""
        self._check_xattrs()
        await self._fs.xattrs.set(inode, name, value)

    @_answering
    @_interruptible
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """removexattr(2)."""
        self._check_xattrs()
        await self._fs.xattrs.remove(inode, name)

    # --- names ----------------------------------------------------------------------------------

    @_answering
    @_interruptible
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        """mkdir(2)."""
        return self._counted(await self._fs.mkdir(parent, name, mode & ~ctx.umask, ctx.pid))

    @_answering
    @_interruptible
    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        """mknod(2), for regular files only."""
        return self._counted(await self._fs.mknod(parent, name, mode & ~ctx.umask))

    @_answering
    @_interruptible
    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
        """symlink(2)."""
        return self._counted(await self._fs.symlink(parent, name, target, ctx.pid))

    @_answering
    @_interruptible
    async def link(self, inode: int, new_parent: int, new_name: bytes, ctx: Any) -> Any:
        """link(2)."""
        return self._counted(await self._fs.link(inode, new_parent, new_name))

    @_answering
    @_interruptible
    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        """unlink(2)."""
        self._fs.create_predictor.does_else(ctx.pid)
        await self._fs.unlink(parent, name)

    @_answering
    @_interruptible
    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        """rmdir(2)."""
        self._fs.create_predictor.does_else(ctx.pid)
        await self._fs.rmdir(parent, name)

    @_answering
    @_interruptible
    async def rename(
        self,
        parent_old: int,
        name_old: bytes,
        parent_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        """renameat2(2), with RENAME_NOREPLACE at most."""
        if flags & ~_RENAME_NOREPLACE:
            raise InvalidRequest("two names can't be exchanged")
        replace = not flags & _RENAME_NOREPLACE
        await self._fs.rename(
            parent_old, name_old, parent_new, name_new, replace=replace, process=ctx.pid
        )

    # --- files ----------------------------------------------------------------------------------

    @_answering
    @_interruptible
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """open(2) of a file that exists."""
        node = self._fs.tree.get(inode)
        self._fs.create_predictor.does_else(ctx.pid)
        opened = await self._fs.files.open(node, flags)
        self._file_openers[opened.handle] = _Opener(ctx.pid, node.namespace)
        if not opened.keep_attributes:
            _drop_attributes(node)
        return pyfuse3.FileInfo(
            fh=opened.handle,
            keep_cache=opened.keep_pages,
            direct_io=self._fs.files.get(opened.handle).is_unsized,
        )

    @_answering
    @_interruptible
    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """open(2) with O_CREAT: a handle and the attributes."""
        handle, node = await self._fs.create(parent, name, mode & ~ctx.umask, flags, ctx.pid)
        self._file_openers[handle] = _Opener(ctx.pid, node.namespace)
        return pyfuse3.FileInfo(fh=handle), self._counted(node)

    @_answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """read(2), in bytes."""
        if self._fs.files.has(fh, off, size):  # nobody can be stuck in this one
            data = await self._fs.files.read(fh, off, size)
        else:
            data = await self._read_remote(fh, off, size)
        return cast(bytes, data)  # any buffer will do, whatever pyfuse3's types say

    @_interruptible_by_opener
    async def _read_remote(self, fh: int, off: int, size: int) -> bytes | bytearray:
        return await self._fs.files.read(fh, off, size)

    @_answering
    @_interruptible_by_opener
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """write(2): the number of bytes written."""
        return await self._fs.files.write(fh, off, buf)

    @_answering
    @_interruptible_by_opener
    async def flush(self, fh: int) -> None:
        """close(2) of one descriptor: what was written is uploaded, or journaled."""
        await self._fs.files.flush_handle(fh)

    @_answering
    @_interruptible_by_opener
    async def fsync(self, fh: int, datasync: bool) -> None:
        """fsync(2): what was written is on the remote."""
        await self._fs.files.flush_handle(fh, sync=True)

    @_answering
    async def release(self, fh: int) -> None:
        """The last descriptor of the handle was closed; nobody hears of errors."""
        self._file_openers.pop(fh, None)
        self._fs.files.release(fh)

    # --- directories ----------------------------------------------------------------------------

    @_answering
    @_interruptible
    async def opendir(self, inode: int, ctx: Any) -> int:
        """opendir(3)."""
        node = self._fs.tree.get(inode)
        self._fs.create_predictor.does_else(ctx.pid)
        await self._fs.permissions.check_directory(node, os.R_OK)
        handle = self._fs.directories.open(node)
        self._directory_openers[handle] = _Opener(ctx.pid, node.namespace)
        return handle

    @_answering
    @_interruptible_by_opener
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """readdir(3) from this entry on: names with attributes, as many as fit."""
        for following, name, node, counts in await self._fs.directories.read(fh, start_id):
            sent = pyfuse3.readdir_reply(token, name, _attributes(node), following)
            if sent and counts:
                node.kernel_is_behind = False
                self._fs.tree.count_lookup(node)
            elif not sent:
                self._fs.tree.drop_if_unused(node)
                break

    @_answering
    async def releasedir(self, fh: int) -> None:
        """closedir(3)."""
        self._directory_openers.pop(fh, None)
        self._fs.directories.close(fh)

    @_answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Do nothing: names are on the remote when the call that made them returns."""
