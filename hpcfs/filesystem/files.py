"""Open files: what open(2), read(2), write(2), close(2) and truncate(2) mean.

Close-to-open: open(2) asks the remote for the file's version; close(2) and fsync(2) return once
the remote has what was written, or fail with the reason. In `back` mode close(2) returns once the
journal has it, and backlog.py does the rest.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import deque

import msgspec
import trio

from hpcfs.cache.fetcher import Budget
from hpcfs.cache.file import CacheFile
from hpcfs.cache.store import Store
from hpcfs.filesystem import conflict
from hpcfs.filesystem.backlog import Backlog
from hpcfs.filesystem.content import Content
from hpcfs.filesystem.errors import (
    BadHandle,
    CacheFull,
    Exists,
    IsDirectory,
    Stale,
    Unsupported,
)
from hpcfs.filesystem.namespace import Namespace
from hpcfs.filesystem.openfile import OpenFile
from hpcfs.filesystem.permissions import Permissions
from hpcfs.filesystem.reading import Place
from hpcfs.filesystem.snapshot import merge_attributes, mode_without_ids
from hpcfs.filesystem.sweeper import Sweeper
from hpcfs.filesystem.tree import Node, Tree, join
from hpcfs.transfer import messages as m
from hpcfs.writeback.journal import Unconfirmed
from hpcfs.writeback.uploader import Uploader

log = logging.getLogger(__name__)

OPEN_FRESH_SECONDS = 0.1
"""open(2) asks the remote for the file's version, unless the path walk just before it did."""
MOST_NOTICES = 100
KEEP_REMOVED_BYTES = 64 * 1024 * 1024
"""Of a file that is removed while it is open, so much that is missing is fetched first."""


class Files:
    """Handles are small numbers, never reused while the mount lives."""

    def __init__(
        self,
        tree: Tree,
        store: Store,
        uploader: Uploader,
        nursery: trio.Nursery,
        permissions: Permissions,
        gid: int,
    ) -> None:
        self._tree = tree
        self._store = store
        self._uploader = uploader
        self._nursery = nursery
        self._permissions = permissions
        self._gid = gid
        self.backlog = Backlog(uploader, self.flush, self._retire_if_done, nursery)
        self.notices: deque[str] = deque(maxlen=MOST_NOTICES)
        """What the user should know, the last ones: conflicts."""
        self._budget = Budget()
        self.sweeper = Sweeper(tree, store, self._make_content, nursery)
        self._open: dict[int, OpenFile] = {}
        self._next = 0

    # --- counts for the status ---------------------------------------------------------------

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def dirty_count(self) -> int:
        return len(self.dirty())

    # --- open and create ---------------------------------------------------------------------

    async def open(self, node: Node, flags: int) -> tuple[int, bool]:
        """-> (handle, whether the kernel may keep the pages it has of the file)."""
        namespace = self._regular(node)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing or flags & os.O_TRUNC:
            namespace.check_writable()
        await self._permissions.check_open(node, flags)
        await self.settled(node)
        if not writing:
            self.sweeper.opened(node)
        await self._revalidate(node, namespace)
        content = await self._content(node, namespace)
        content.users += 1
        handle = self._add(OpenFile(node, content, flags))
        try:
            if flags & os.O_TRUNC:
                await self._cut(node, content, 0, stamp=True)
        except BaseException:
            await self.release(handle)
            raise
        keep = node.pages_version == content.version
        content.served = content.served or keep
        node.pages_version = content.version
        return handle, keep

    def _regular(self, node: Node) -> Namespace:
        if node.is_directory or node.namespace is None:
            raise IsDirectory("a directory can't be opened as a file")
        if not node.is_regular:
            raise Unsupported("only regular files can be opened")
        return node.namespace

    async def _revalidate(self, node: Node, namespace: Namespace) -> None:
        """The node's entry is as the remote has it now. Raises Stale if that is another file."""
        if self._tree.is_fresh(node, OPEN_FRESH_SECONDS) or (
            node.content and node.content.is_dirty()
        ):
            return
        if await self.sweeper.is_current(node):
            return
        await self._check_names(node, namespace)
        asked = self._tree.now()
        entry = await namespace.stat(node.path)
        content = node.content
        if content is None:
            if stat.S_IFMT(entry.mode) != stat.S_IFMT(node.entry.mode):
                self.lose(node)
                raise Stale("the file was replaced on the remote")
            self._tree.update(node, entry, asked)
        elif await self.is_same(content, entry):
            self._tree.update(node, entry, asked)
        elif not content.is_dirty():
            self.lose(node)  # the kernel looks the name up again and opens the new file
            raise Stale("the file was replaced on the remote")

    async def _check_names(self, node: Node, namespace: Namespace) -> None:
        """open(2) does not say which of the file's names was meant: all must lead to it still. A
        name that does not is looked up again by the kernel, upon Stale."""
        for parent, name in list(node.others):
            try:
                entry = await namespace.stat(join(parent, name))
            except m.NotFound:
                self._tree.note_gone(parent, name)
            else:
                if entry.version != node.entry.version and (parent, name) in node.others:
                    self._tree.note_gone(parent, name)
                    raise Stale("the file was replaced on the remote")

    def lose(self, node: Node) -> None:
        """Others removed or replaced the node's file: the name is another file's from now on."""
        if node.content:
            node.content.replaced = True
        self._tree.detach(node)

    async def is_same(self, content: Content, entry: m.Entry) -> bool:
        """Whether the remote's `entry` is the file that is open here, perhaps grown."""
        if entry.version == content.version:
            return True
        if entry.size > content.size and content.abilities.handles:
            await content.revalidate()
        return entry.version == content.version

    async def _content(self, node: Node, namespace: Namespace) -> Content:
        """The node's content, made if this is its first handle."""
        while True:
            if node.content and node.content.closing is not None:
                await self.settled(node)
                await self._revalidate(node, namespace)
                continue
            if node.content:
                return node.content
            abilities = await namespace.abilities()
            entry = node.entry
            file = await self.sweeper.take(node)
            if file is None:
                file = await self._store.acquire(
                    namespace.origin, node.path, entry.version, entry.size
                )
            if node.content or node.entry.version != entry.version:
                self._store.release(file)
                continue
            node.content = self._make_content(node, namespace, abilities, file)
            return node.content

    def _make_content(
        self, place: Place, namespace: Namespace, abilities: m.Abilities, file: CacheFile
    ) -> Content:
        return Content(
            place,
            namespace,
            abilities,
            self._store,
            file,
            self._nursery,
            self._budget,
            self._tree.now,
        )

    async def settled(self, node: Node) -> None:
        """Return once no last close of the node's file is under way."""
        while node.content and node.content.closing is not None:
            await node.content.closing.wait()

    async def create(self, parent: Node, name: bytes, mode: int, flags: int) -> tuple[int, Node]:
        """-> (handle, node) of a new empty file. In `back` mode the remote does not hear of it yet:
        the kernel has just been told that there is no such name."""
        namespace = parent.namespace
        assert namespace
        abilities = await namespace.abilities()
        path = parent.path + b"/" + name if parent.path else name
        asked = self._tree.now()
        handle = m.NO_HANDLE
        if namespace.writes_back:
            await self.backlog.make_room(None, 0)
            entry = self._entry_made_here(parent, name, mode, abilities)
        else:
            handle = namespace.new_handle()
            entry = await namespace.entry(m.Create(path, stat.S_IMODE(mode), handle))
        if (known := self._tree.child(parent, name)) is not None:
            if known.content is not None and known.content.new:
                raise Exists("another program is just creating this file")
            self._tree.detach(known)
        node = self._tree.add(parent, name, entry, asked)
        file = self._store.create(namespace.origin, path, entry.version, 0)
        file.users = 1
        self._store.adopt(file)
        content = self._make_content(node, namespace, abilities, file)
        content.users = 1
        content.new = abilities.creates_on_upload or namespace.writes_back
        if not content.new:
            content.made, content.write_handle = True, handle
        node.content = content
        node.pages_version = content.version
        return self._add(OpenFile(node, content, flags)), node

    def _entry_made_here(
        self, parent: Node, name: bytes, mode: int, abilities: m.Abilities
    ) -> m.Entry:
        self._permissions.check_made_here(parent)
        now = time.time_ns()
        now -= now % abilities.mtime_resolution_ns
        shown = stat.S_IFREG | stat.S_IMODE(mode)
        return m.Entry(name, shown, 0, now, now, self._permissions.uid, self._gid)

    def _add(self, opened: OpenFile) -> int:
        self._next += 1
        self._open[self._next] = opened
        return self._next

    def get(self, handle: int) -> OpenFile:
        if handle not in self._open:
            raise BadHandle("no such open file")
        return self._open[handle]

    # --- read and write -------------------------------------------------------------------------

    async def read(self, handle: int, offset: int, length: int) -> bytes | bytearray:
        return await self.get(handle).read(offset, length)

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        opened = self.get(handle)
        opened.check_writable()
        if opened.content.namespace.writes_back and not opened.content.orphan:
            await self.backlog.make_room(opened.content, len(data))
        async with self._uploader.writing(opened.content):
            await opened.content.write(offset, data)
        self._stamp(opened.node, opened.content)
        return len(data)

    def _stamp(self, node: Node, content: Content) -> None:
        """The file was written to now: its size and mtime as the mount shows them, and its mode:
        for all but root, writing clears the set-ID bits."""
        now = time.time_ns()
        now -= now % content.abilities.mtime_resolution_ns
        mode = mode_without_ids(node.entry) if self._permissions.uid else None
        if content.pending:  # a time that was set before is not to come back with the upload
            content.pending = msgspec.structs.replace(content.pending, mtime_ns=None)
        if mode is not None:
            content.pending = merge_attributes(content.pending, m.Attributes(mode=mode))
        full = node.entry.mode if mode is None else stat.S_IFREG | mode
        self._tree.set_local(
            node, msgspec.structs.replace(node.entry, size=content.size, mtime_ns=now, mode=full)
        )

    async def truncate(self, node: Node, size: int, handle: int | None) -> bool:
        """Without a handle nobody will close the file: the remote is told before this returns.
        Whether ftruncate(2) changed no size: it sets the time nevertheless."""
        namespace = self._regular(node)
        namespace.check_writable()
        if handle is not None:
            return not await self._cut(node, self.get(handle).content, size)
        await self._permissions.check_open(node, os.O_WRONLY)
        await self.settled(node)
        content = node.content
        if content is None:
            entry = await namespace.entry(m.Truncate(node.path, size))
            self._tree.set_local(node, entry)
            node.pages_version = None
            return False
        content.users += 1
        try:
            await self._cut(node, content, size)
            await self.closed(content)
        finally:
            await self._leave(content)
        return False

    async def _cut(self, node: Node, content: Content, size: int, *, stamp: bool = False) -> bool:
        """Whether the size changed. truncate(2): "if the size changed", the times do; O_TRUNC sets
        them in any case."""
        async with self._uploader.writing(content):
            changed = await content.truncate(size)
            if stamp and not changed:
                content.resized, content.secured = True, False
            if changed or stamp:
                await self._uploader.note_writing(content)
        if changed or stamp:
            self._stamp(node, content)
        return changed

    # --- flush and close ------------------------------------------------------------------------

    async def flush(self, content: Content, *, sync: bool = False) -> None:
        """Return once the remote has what was written. Raises RemoteError."""
        try:
            entry = await self._uploader.upload(content, sync=sync)
        except (m.Conflict, m.Changed) as error:
            raise m.Conflict(await self._set_aside(content, error.message)) from None
        if entry is not None:
            self._confirmed(content, entry)

    async def _set_aside(self, content: Content, reason: str) -> str:
        """Others changed the file since it was opened: both versions stay. Returns the user's
        sentence. Raises Unreachable when that can't be done now."""
        node = self._node(content)
        async with content.upload_lock:
            if content.orphan:
                return reason
            told = await conflict.set_aside(content, self._uploader, reason)
            content.give_up()
            self._store.forget(content.file)
        self.backlog.gone(content)
        self.notices.append(f"{content.namespace.name}/{told}")
        log.warning("%s", told)
        self.lose(node)
        if node.parent:
            self._tree.expire(node.parent)
        return told

    def _node(self, content: Content) -> Node:
        """The node that it was made for, whether or not the tree still has it."""
        assert isinstance(content.place, Node)
        return content.place

    def _confirmed(self, content: Content, entry: m.Entry) -> None:
        node = self._node(content)
        if node.pages_version is not None:
            node.pages_version = entry.version
        if content.is_dirty():  # written to meanwhile: the local view stays ahead
            entry = msgspec.structs.replace(node.entry, version=entry.version)
        self._tree.set_local(node, entry)
        if node.parent:
            self._tree.expire(node.parent)

    async def flush_handle(self, handle: int, *, sync: bool = False) -> None:
        """fsync(2), or close(2), which is nothing to who only read: whoever wrote hears of it."""
        opened = self.get(handle)
        if sync:
            await self.flush(opened.content, sync=True)
        elif opened.is_writable:
            await self.closed(opened.content)

    async def closed(self, content: Content) -> None:
        """What close(2) promises in the namespace's mode. Raises RemoteError."""
        if content.namespace.writes_back:
            await self.backlog.closed(content)
        else:
            await self.flush(content)

    async def changed(self, content: Content) -> None:
        """Its attributes were set while it is dirty. Nobody may close it any more."""
        if content in self.backlog.schedule and not content.orphan:
            await self.backlog.closed(content)

    async def note_dirty(self) -> None:
        """So that a kill costs no more of what is still open than was written since the last call;
        nobody was told that it is safe."""
        for content in self.dirty():
            if not content.secured and content.journaled and not content.upload_lock.locked():
                await self._uploader.note_writing(content)

    async def secure(self, content: Content, *, instead_of: str | None = None) -> None:
        """The journal has all of it; `instead_of` is the row of a file that it replaced."""
        await self._uploader.secure(content, instead_of=instead_of)

    def dirty(self) -> list[Content]:
        """All that the remote does not have as it is here."""
        contents = {id(opened.content): opened.content for opened in self._open.values()}
        contents.update((id(content), content) for content in self.backlog.schedule)
        return [content for content in contents.values() if content.is_dirty()]

    async def flush_all(self) -> None:
        """Everything that is open, one after the other; errors are the close's to report."""
        for content in self.dirty():
            if not content.namespace.writes_back:
                try:
                    await self.flush(content)
                except m.RemoteError as error:
                    log.warning("%r is not uploaded yet: %s", content.place.path, error.message)

    async def close_all(self) -> None:
        """The kernel is gone: close what it left open."""
        for handle in list(self._open):
            await self.release(handle)

    async def release(self, handle: int) -> None:
        await self._leave(self._open.pop(handle).content)

    async def _leave(self, content: Content) -> None:
        """A user is done. After the last one, a fetch under way still writes to the cache file:
        until it has ended the content stays the node's, for who opens the file again."""
        content.users -= 1
        if content.users:
            return
        content.stop_prefetch()
        if content.namespace.writes_back and content.is_dirty():
            await self._leave_to_backlog(content)
            return
        content.closing = trio.Event()
        try:
            uploaded = await self._last_close(content)
        finally:
            content.closing.set()
            content.closing = None
        if not uploaded:
            self._retire(content)
        else:
            self._retire_if_done(content)

    async def _leave_to_backlog(self, content: Content) -> None:
        """Nobody hears of an error any more: what the journal did not take stays dirty here."""
        try:
            if not content.secured:
                await self.backlog.secure(content)
        except m.RemoteError as error:
            log.warning("%r: %s", content.place.path, error.message)
        self._retire_if_done(content)

    def _retire_if_done(self, content: Content) -> None:
        """After something that may have been the content's last use."""
        if content.users or content.closing is not None or content.is_dirty():
            return
        if content.is_idle():
            self._retire(content)
        else:
            self._nursery.start_soon(self._retire_when_idle, content)

    async def _last_close(self, content: Content) -> bool:
        """Whether nothing had to be kept. What can be neither uploaded nor kept raises, and stays
        the node's."""
        while content.is_dirty():
            try:
                await self.flush(content)
            except m.Conflict:
                continue  # both versions are safe
            except m.RemoteError as error:
                await self._uploader.keep(content, error.message)
                self._store.forget(content.file)
                node = self._node(content)
                self._tree.expire(node)
                node.pages_version = None
                return False
        await self._uploader.forget(content)
        return True

    async def _retire_when_idle(self, content: Content) -> None:
        await content.settle()
        if not content.users and content.closing is None and not content.is_dirty():
            self._retire(content)

    def _retire(self, content: Content) -> None:
        if content.retired:
            return
        content.retired = True
        content.stop_sending()
        node = self._node(content)
        if node.content is content:
            node.content = None
        self._store.release(content.file)
        self._tree.drop_if_unused(node)
        if content.held:
            self._nursery.start_soon(content.let_go)

    def take_up(self, node: Node, namespace: Namespace, row: Unconfirmed, file: CacheFile) -> None:
        """An earlier mount left this file: it is written as far as the row says."""
        content = self._make_content(node, namespace, row.abilities, file)
        content.base_size = row.base_size
        content.pending, content.resized = row.pending, row.resized
        content.new, content.replace, content.attempted = row.new, row.replace, row.attempted
        content.needs_disk = content.journaled = content.secured = True
        node.content = content
        self.backlog.take_up(content, row.reason)

    # --- names change ---------------------------------------------------------------------------

    async def keep_readable(self, node: Node) -> None:
        """The node is about to lose its file: fetch what its readers may still want."""
        if node.content is None:
            return
        try:
            node.content.use_disk()  # in memory it would not stay
            await node.content.fetch_all(KEEP_REMOVED_BYTES)
        except (m.RemoteError, CacheFull, Stale) as error:
            log.debug("%r is removed without its missing blocks: %s", node.path, error)

    def orphan(self, node: Node) -> None:
        """The node's file was removed: what is written to it from now on goes nowhere."""
        if node.content:
            node.content.orphan = True
            node.content.stop_sending()

    async def forget_orphan(self, node: Node) -> None:
        """Call it after `orphan`, once that is certain."""
        content = node.content
        if content:
            self.backlog.gone(content)
            await self._uploader.forget(content)
            self._retire_if_done(content)
