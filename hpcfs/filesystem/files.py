"""Open files: what open(2), read(2), write(2), close(2) and truncate(2) mean.

Close-to-open: open(2) asks the remote for the file's version; what close(2) and fsync(2) promise is
writeback/close.py's.
"""

from __future__ import annotations

import logging
import os
import stat
import time

import msgspec
import trio

from hpcfs.content.content import Content
from hpcfs.content.shared import RemoteFile, Shared
from hpcfs.filesystem.lookup import Lookup
from hpcfs.filesystem.openfile import OpenFile, OpenReply
from hpcfs.inodes.permissions import Permissions
from hpcfs.inodes.tree import Node, Tree
from hpcfs.model import paths
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import NO_HANDLE, Entry, mode_without_ids
from hpcfs.model.errors import (
    AlreadyExists,
    BadHandle,
    IsADirectory,
    NotSupported,
    RemoteError,
    Stale,
    Unreachable,
)
from hpcfs.prefetch.file_prefetcher import FilePrefetcher
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace
from hpcfs.writeback.close import Closer

log = logging.getLogger(__name__)

_SET_ID_BITS = stat.S_ISUID | stat.S_ISGID
_CURRENT_ATTEMPTS = 8
"""A file may be replaced again and again."""


class Files:
    """The open files by handle: small numbers, never reused while the mount lives."""

    def __init__(
        self,
        tree: Tree,
        shared: Shared,
        closer: Closer,
        lookup: Lookup,
        file_prefetcher: FilePrefetcher,
        permissions: Permissions,
    ) -> None:
        self._tree = tree
        self._shared = shared
        self._store = shared.store
        self._closer = closer
        self._uploader = closer.uploader
        self._queue = closer.queue
        self._lookup = lookup
        self._file_prefetcher = file_prefetcher
        self._permissions = permissions
        self._open: dict[int, OpenFile] = {}
        self._next = 0

    # --- counts for the status ---------------------------------------------------------------

    @property
    def open_count(self) -> int:
        """How many handles are open."""
        return len(self._open)

    # --- open and create ---------------------------------------------------------------------

    async def open(self, node: Node, flags: int) -> OpenReply:
        """Open the node's file as open(2) does with these flags.

        Raises Stale if another file has its name by now, other RemoteErrors, and FilesystemError.
        """
        namespace = self._regular(node)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        changes = writing or bool(flags & os.O_TRUNC)
        if changes:
            namespace.check_writable()
        await self._permissions.check_open(node, flags)
        await self._closer.wait_closed(node)
        if changes and namespace.is_away and not namespace.writes_back and not node.is_ahead:
            await self._lookup.compare(node)  # raises why: close(2) could not bring it there
        if not writing:
            self._file_prefetcher.opened(node)
        content = await self._current(node, namespace, flags)
        handle = self._add(OpenFile(node, content, flags))
        try:
            if flags & os.O_TRUNC:
                await self._cut(node, content, 0, stamp=True)
        except BaseException:
            self.release(handle)
            raise
        keep = node.pages_version == content.version
        if keep and flags & os.O_ACCMODE != os.O_WRONLY:
            content.note_served()  # the kernel has pages of this version for it
        node.pages_version = content.version
        return OpenReply(handle, keep, not node.kernel_is_behind)

    async def _current(self, node: Node, namespace: Namespace, flags: int) -> Content:
        """Return the content that the remote has now, with one user more.

        What a program will read is held from here on, so that replacing the file does not cut it
        short.
        """
        mode = flags & os.O_ACCMODE
        reads = mode != os.O_WRONLY and not flags & os.O_TRUNC
        for _ in range(_CURRENT_ATTEMPTS):
            self._lookup.check_name(node)
            if not reads or not node.entry.version or await self._file_prefetcher.is_current(node):
                await self._lookup.revalidate(node)
                reads = False
            content = await self._content(node, namespace)
            is_new = not content.users and not content.reader.base.served
            self._closer.use(content)
            try:
                if not reads:
                    return content
                if content.reader.can_hold(read_only=mode == os.O_RDONLY):
                    is_current = await self._hold(content, node, namespace)
                else:
                    await self._lookup.revalidate(node, content if is_new else None)
                    is_current = not is_new or content.version == node.entry.version
                if is_current:
                    return content
            except BaseException:
                self._closer.leave(content)
                raise
            self._closer.leave(content)
            await self._lookup.compare(node)
        raise Stale("the file is replaced on the remote again and again")

    async def _hold(self, content: Content, node: Node, namespace: Namespace) -> bool:
        """Whether it is held. A file with several names is looked up by each (lookup.py)."""
        asked = self._tree.now()
        if node.extra_links:
            await self._lookup.revalidate(node)
        try:
            entry = await content.reader.hold()
        except RemoteError as error:
            if not namespace.absence_explains(error):
                raise
            log.debug("%r is opened as it was last seen: %s", node.path, error.message)
            return True
        if entry is None:
            return False
        if entry is not node.entry and node.content is content:
            self._tree.update(node, entry, asked)
        return True

    def _regular(self, node: Node) -> Namespace:
        if node.is_directory or node.namespace is None:
            raise IsADirectory("a directory can't be opened as a file")
        if not node.is_regular:
            raise NotSupported("only regular files can be opened")
        return node.namespace

    async def _content(self, node: Node, namespace: Namespace) -> Content:
        """The node's content, made if this is its first handle."""
        while True:
            if node.content and node.content.closing is not None:
                await self._closer.wait_closed(node)
                await self._lookup.revalidate(node)
                continue
            if node.content:
                return node.content
            capabilities = await namespace.capabilities()
            entry = node.entry
            file = await self._file_prefetcher.take(node)
            if file is None:
                file = await self._store.acquire(
                    namespace.origin, node.path, entry.version, entry.size
                )
            if node.content or node.entry.version != entry.version:
                self._store.release(file)
                continue
            node.content = Content(RemoteFile(node, namespace, capabilities), file, self._shared)
            return node.content

    async def create(self, parent: Node, name: bytes, mode: int, flags: int) -> tuple[int, Node]:
        """Create an empty file and return (handle, node).

        In `back` mode the remote does not hear of it yet: the kernel was just told that there is no
        such name. Raises AlreadyExists, PermissionDenied, JournalFull and RemoteError.
        """
        namespace = parent.namespace
        assert namespace
        capabilities = await namespace.capabilities()
        path = paths.join(parent.path, name)
        asked = self._tree.now()
        handle = NO_HANDLE
        await self._store.make_descriptor()
        # First of all: else a full disk here would leave an empty file there.
        file = self._store.create(namespace.origin, path, b"", 0)
        file.indexed, file.users = False, 1
        try:
            if namespace.writes_back:
                await namespace.check_takes_writes()
                await self._queue.make_room(None, 0)
                await self._look_once(parent, namespace)
                entry = self._entry_made_here(parent, name, mode, capabilities)
            else:
                handle = namespace.new_handle()
                entry = await self._create_there(namespace, path, mode, handle)
            self._check_free(parent, name)
        except BaseException:
            file.users = 0
            raise
        if (known := self._tree.child(parent, name)) is not None:
            self._tree.detach(known)
        node = self._tree.add(parent, name, entry, asked)
        file.indexed, file.version = True, entry.version
        self._store.adopt(file)
        content = Content(RemoteFile(node, namespace, capabilities), file, self._shared)
        self._closer.use(content)
        if capabilities.creates_on_upload or namespace.writes_back:
            content.note_absent()
        else:
            content.note_created(handle)
        node.content = content
        node.pages_version = content.version
        return self._add(OpenFile(node, content, flags)), node

    def _check_free(self, parent: Node, name: bytes) -> None:
        """Raise AlreadyExists where a file of this name was made here meanwhile."""
        known = self._tree.child(parent, name)
        if known is not None and known.content is not None and known.content.may_be_missing:
            raise AlreadyExists("another program is just creating this file")

    async def _create_there(
        self, namespace: Namespace, path: bytes, mode: int, handle: int
    ) -> Entry:
        """Make an empty file on the remote, which holds it open under this handle."""
        try:
            return await namespace.entry(m.Create(path, stat.S_IMODE(mode), handle))
        except (trio.Cancelled, Unreachable):
            self._shared.nursery.start_soon(self._release_there, namespace, handle)
            raise

    async def _release_there(self, namespace: Namespace, handle: int) -> None:
        """The remote may have opened a file under this handle, of which nobody heard."""
        try:
            await namespace.do(m.Release(handle))
        except RemoteError as error:
            log.debug("a new file of %s stays open: %s", namespace.name, error.message)

    async def _look_once(self, directory: Node, namespace: Namespace) -> None:
        """Its group is that of what is made in it, if it has the set-group-ID bit."""
        if directory.validated_at:
            return
        asked = self._tree.now()
        try:
            self._tree.update(directory, await namespace.stat(directory.path), asked)
        except Unreachable as error:
            log.debug("%r is not known: %s", directory.path, error.message)

    def _entry_made_here(
        self, parent: Node, name: bytes, mode: int, capabilities: Capabilities
    ) -> Entry:
        self._permissions.check_made_here(parent)
        now = time.time_ns()
        now -= now % capabilities.mtime_resolution_ns
        shown = stat.S_IFREG | stat.S_IMODE(mode)
        gid = parent.entry.gid if parent.entry.mode & stat.S_ISGID else self._permissions.gid
        return Entry(name, shown, 0, now, now, self._permissions.uid, gid)

    def _add(self, opened: OpenFile) -> int:
        self._next += 1
        self._open[self._next] = opened
        return self._next

    def get(self, handle: int) -> OpenFile:
        """Return the open file of a handle. Raises BadHandle."""
        if handle not in self._open:
            raise BadHandle("no such open file")
        return self._open[handle]

    # --- read and write -------------------------------------------------------------------------

    def has(self, handle: int, offset: int, length: int) -> bool:
        """Return whether these bytes are here, so that reading them asks no remote."""
        return self.get(handle).content.reader.has(offset, length)

    async def read(self, handle: int, offset: int, length: int) -> bytes | bytearray:
        """Return up to `length` bytes from `offset` on, fewer only at the end of the file.

        Raises BadHandle, Stale and RemoteError.
        """
        return await self.get(handle).read(offset, length)

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """Write at `offset`, or at the end if the handle appends; return the number of bytes.

        Raises BadHandle, Stale, CacheFull, JournalFull and RemoteError.
        """
        opened = self.get(handle)
        if not opened.is_writable:
            raise BadHandle("the file was opened for reading only")
        if opened.content.namespace.writes_back and not opened.content.state.is_unlinked:
            await self._queue.make_room(opened.content, len(data))
        if opened.content.is_noted:
            await self._write(opened, offset, data)
        else:
            async with self._uploader.writing(opened.content):
                await self._write(opened, offset, data)
        self._stamp(opened.node, opened.content)
        return len(data)

    async def _write(self, opened: OpenFile, offset: int, data: bytes) -> None:
        if opened.appends:
            await opened.content.append(data)
        else:
            await opened.content.write(offset, data)

    def _stamp(self, node: Node, content: Content) -> None:
        """Show that the file was written to now, with what that makes of its size, mtime and mode:
        for all but root, writing clears the set-ID bits (of others' files where it is written)."""
        now = time.time_ns()
        now -= now % content.capabilities.mtime_resolution_ns
        mode, uid = None, self._permissions.uid
        if node.entry.mode & _SET_ID_BITS and uid and node.entry.uid == uid:
            mode = mode_without_ids(node.entry)
        content.note_stamped(mode)
        full = node.entry.mode if mode is None else stat.S_IFREG | mode
        self._tree.set_local(
            node, msgspec.structs.replace(node.entry, size=content.size, mtime_ns=now, mode=full)
        )

    async def truncate(self, node: Node, size: int, handle: int | None) -> bool:
        """Set the file's size in bytes; return whether it had that size already, so that its time
        is still to be set.

        Without a handle nobody will close the file: the remote is told before this returns.
        """
        namespace = self._regular(node)
        namespace.check_writable()
        if handle is not None:
            return not await self._cut(node, self.get(handle).content, size)
        await self._permissions.check_open(node, os.O_WRONLY)
        await self._closer.wait_closed(node)
        content = node.content
        if content is None:
            try:
                entry = await namespace.entry(m.Truncate(node.path, size))
            finally:
                node.pages_version = None
                self._tree.expire(node)
                with trio.CancelScope(shield=True):
                    await self._store.invalidate(namespace.origin, node.path)
            self._tree.set_local(node, entry)
            return False
        self._closer.use(content)
        try:
            changed = await self._cut(node, content, size)
            await self._closer.closed(content)
        finally:
            self._closer.leave(content)
        return not changed

    async def _cut(self, node: Node, content: Content, size: int, *, stamp: bool = False) -> bool:
        """Whether the size changed."""
        async with self._uploader.writing(content):
            if size < content.size:
                await self._uploader.note_cut(content, size)
            changed = await content.truncate(size)
            if stamp and not changed:
                content.mark_resized()
            if changed or stamp:
                await self._uploader.note_writing(content)
        if changed or stamp:
            self._stamp(node, content)
        return changed

    # --- flush and close ------------------------------------------------------------------------

    async def flush_handle(self, handle: int, *, sync: bool = False) -> None:
        """Flush on fsync(2) (`sync`), or on close(2) if the handle can write.

        Raises BadHandle, and the errors of the upload.
        """
        opened = self.get(handle)
        if sync:
            await self._closer.flush(opened.content, sync=True)
        elif opened.is_writable and not opened.content.is_as_made:
            await self._closer.closed(opened.content)

    async def close_all(self) -> None:
        """Close what the kernel left open when it unmounted."""
        for handle in list(self._open):
            self.release(handle)
        await self._closer.wait_ended()

    def release(self, handle: int) -> None:
        """Close the handle. What the last one leaves to do goes on by itself; upload errors nobody
        heard of are logged, and the bytes kept. Raises BadHandle."""
        content = self.get(handle).content
        del self._open[handle]
        self._closer.leave(content)
