"""The contents in use: what becomes of what was written, and of a content after its last user.

In `through` mode close(2) returns once the remote has the bytes, or fails with the reason; in
`back` mode once the journal has them, and writeback/queue.py does the rest. fsync(2) waits for the
remote in both.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import trio

from hpcfs.cache.store import Store
from hpcfs.content.content import Content
from hpcfs.content.state import Durability
from hpcfs.inodes.tree import Node, Tree
from hpcfs.model.entries import Entry
from hpcfs.model.errors import CacheFileGone, CacheFull, Changed, Conflict, RemoteError, Stale
from hpcfs.site.tasks import Tasks
from hpcfs.writeback import conflict
from hpcfs.writeback.queue import DEFAULT_LIMIT, UploadQueue
from hpcfs.writeback.uploader import Uploader

log = logging.getLogger(__name__)

MOST_NOTICES = 100
KEEP_REMOVED_BYTES = 64 * 1024 * 1024
"""Bytes fetched, at most, of a file that is removed while it is open."""


class Closer:
    """Counts the users of each content, uploads what they wrote, and retires it after the last.

    `limit` is how many bytes may wait to be uploaded in `back` mode.
    """

    def __init__(
        self,
        tree: Tree,
        store: Store,
        uploader: Uploader,
        nursery: Tasks,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        self._tree = tree
        self._store = store
        self.uploader = uploader
        self._nursery = nursery
        self._in_use: dict[Content, None] = {}
        self._endings: dict[Content, trio.Event] = {}
        """What is under way after the last close of a content; set once it is through."""
        self.queue = UploadQueue(uploader, self.flush, self._retire_if_done, nursery, limit)
        self.notices: deque[str] = deque(maxlen=MOST_NOTICES)
        """The last conflicts, as sentences for the user."""

    def use(self, content: Content) -> None:
        """Count one user more; `leave` is to follow."""
        content.enter()
        self._in_use[content] = None

    def dirty(self) -> list[Content]:
        """Return all contents that the remote does not have as they are here."""
        contents = {**self._in_use, **dict.fromkeys(self.queue.schedule)}
        return [content for content in contents if content.is_dirty()]

    # --- upload -----------------------------------------------------------------------------------

    async def flush(self, content: Content, *, sync: bool = False) -> None:
        """Return once the remote has what was written. Raises RemoteError, also Conflict."""
        try:
            await self._flush(content, sync=sync)
        except CacheFileGone:
            content.file.doubt_name()
            raise

    async def _flush(self, content: Content, *, sync: bool) -> None:
        confirmed = partial(self._confirmed, content, content.may_be_missing)
        try:
            await self.uploader.upload(content, confirmed, sync=sync)
        except (Conflict, Changed) as error:
            raise Conflict(await self._set_aside(content, error.message)) from None

    async def _set_aside(self, content: Content, reason: str) -> str:
        """Keep both versions of a file that others changed too; return the sentence for the user.

        Raises Unreachable when that can't be done now.
        """
        node = self._node(content)
        async with content.upload.lock:
            if content.state.is_unlinked:
                return reason
            told = await conflict.set_aside(content, self.uploader, reason)
            content.discard()
            self._store.forget(content.file)
        self.queue.gone(content)
        self.notices.append(f"{content.namespace.name}/{told}")
        log.warning("%s", told)
        self.supersede(node)
        if node.parent:
            self._tree.expire(node.parent)
        return told

    def supersede(self, node: Node) -> None:
        """Give the name to another file: others removed or replaced the node's."""
        if node.content:
            node.content.supersede()
        self._tree.detach(node)

    def _node(self, content: Content) -> Node:
        """Return the node that it was made for, whether or not the tree still has it."""
        assert isinstance(content.place, Node)
        return content.place

    def _confirmed(self, content: Content, has_come: bool, entry: Entry) -> None:
        """Show what the remote has now. A file that has come into being there changes what older
        listings say of its name, and the times of its directory."""
        node = self._node(content)
        if content.is_dirty():  # written to meanwhile: the local view stays ahead
            entry = msgspec.structs.replace(node.entry, version=content.version)
        if entry.size != node.entry.size:  # others appended, too
            node.kernel_is_behind, node.pages_version = True, None
        elif node.pages_version is not None:
            node.pages_version = content.version
        self._tree.set_local(node, entry)
        if has_come:
            self._tree.note_attributes(node)
            if node.parent:
                self._tree.note_attributes(node.parent)

    async def closed(self, content: Content) -> None:
        """Do what close(2) promises in the namespace's mode. Raises RemoteError."""
        if content.namespace.writes_back:
            await self.queue.closed(content)
        else:
            await self.flush(content)

    async def changed(self, content: Content) -> None:
        """Queue a dirty file whose attributes were set: perhaps nobody will close it any more."""
        if content in self.queue.schedule and not content.state.is_unlinked:
            await self.queue.closed(content)

    async def note_dirty(self) -> None:
        """Bring the journal up to date with what is still open.

        A kill then costs only what was written since; no program was told that it is safe.
        """
        for content in self.dirty():
            is_stale = content.state.durability is Durability.JOURNALED
            if is_stale and not content.upload.lock.locked():
                await self.uploader.note_writing(content)

    async def flush_all(self) -> None:
        """Upload everything open, one file after the other; errors are left for the closes to
        report."""
        for content in self.dirty():
            if not content.namespace.writes_back:
                try:
                    await self.flush(content)
                except RemoteError as error:
                    log.warning("%r is not uploaded yet: %s", content.place.path, error.message)

    # --- the last user is gone --------------------------------------------------------------------

    async def wait_closed(self, node: Node) -> None:
        """Return once no last close of the node's file is under way."""
        while node.content and node.content.closing is not None:
            await node.content.closing.wait()

    def leave(self, content: Content) -> None:
        """Count one user less. After the last one, what is dirty is uploaded or stored elsewhere in
        a task of its own: nobody waits for that, and who leaves may have been interrupted.

        A fetch under way still writes to the cache file: until it has ended the content stays the
        node's, for the next open(2).
        """
        if not content.leave():
            return
        content.reader.fetcher.cancel_all()
        if content.namespace.writes_back and content.is_dirty():
            self._end_with(self._leave_to_queue, content)
        elif content.is_dirty() or content.state.has_row:
            content.begin_last_close()
            self._end_with(self._last_close, content)
        else:
            self._ended(content)

    def _end_with(self, work: Callable[[Content], Awaitable[bool]], content: Content) -> None:
        """Do in a task what the last close leaves to do; it says whether the content is done for,
        whatever is dirty in it."""
        through = self._endings[content] = trio.Event()

        async def end() -> None:
            is_over = False
            try:
                is_over = await work(content)
            except (OSError, sqlite3.Error) as error:
                log.error(  # noqa: TRY400 - no bug: the message says it all
                    "%r can be neither uploaded nor kept: %s", content.place.path, error
                )
            finally:
                if self._endings.get(content) is through:
                    del self._endings[content]
                if content.closing is not None:
                    content.end_last_close()
                through.set()
            if is_over:
                self._in_use.pop(content, None)
                self._retire(content)
            else:
                self._ended(content)

        self._nursery.start_soon(end)

    def _ended(self, content: Content) -> None:
        if not content.users:
            self._in_use.pop(content, None)
        self._retire_if_done(content)

    async def wait_ended(self, content: Content | None = None) -> None:
        """Return once what the last close of this content (of any, if None) left to do is done."""
        while self._endings and (content is None or content in self._endings):
            await self._endings[content or next(iter(self._endings))].wait()

    async def _leave_to_queue(self, content: Content) -> bool:
        """Leave the upload to the queue.

        An error of the journal is nobody's: the file is queued all the same.
        """
        try:
            if not content.state.is_persisted:
                await self.queue.persist(content)
        except RemoteError as error:
            log.warning("%r: %s", content.place.path, error.message)
        return False

    def _retire_if_done(self, content: Content) -> None:
        """Retire the content if that was its last use. One that is still dirty goes to the queue,
        however its last close ended: nobody else would upload it."""
        if content.users or content.closing is not None:
            return
        if content.is_dirty():
            self.queue.take_up(content)
        elif not content.reader.fetcher.flights:
            self._retire(content)
        else:
            self._nursery.start_soon(self._retire_when_idle, content)

    async def _last_close(self, content: Content) -> bool:
        """Upload until nothing is dirty, or strand it; return whether it was stranded.

        What can be neither uploaded nor stranded raises OSError or sqlite3.Error; it stays the
        node's, and the queue's.
        """
        while content.is_dirty():
            try:
                await self.flush(content)
            except Conflict:
                continue  # both versions are safe
            except RemoteError as error:
                await self.uploader.strand(content, error.message)
                self._store.forget(content.file)
                node = self._node(content)
                node.entry = msgspec.structs.replace(node.entry, version=b"")  # it was this mount's
                self._tree.expire(node)
                node.pages_version = None
                return True
        await self.uploader.forget(content)
        return False

    async def _retire_when_idle(self, content: Content) -> None:
        await content.reader.fetcher.wait_idle()
        if not content.users and content.closing is None and not content.is_dirty():
            self._retire(content)

    def _retire(self, content: Content) -> None:
        if not content.retire():
            return
        self.queue.gone(content)
        node = self._node(content)
        if node.content is content:
            node.content = None
        self._store.release(content.file)
        self._tree.drop_if_unused(node)
        if content.reader.base.held:
            self._nursery.start_soon(content.reader.base.let_go)

    # --- names change -----------------------------------------------------------------------------

    async def keep_readable(self, node: Node) -> None:
        """Fetch what readers of the node may still want before it loses its file."""
        if node.content is None:
            return
        try:
            node.content.reader.use_disk()  # in memory it would not stay
            await node.content.reader.fetch_all(KEEP_REMOVED_BYTES)
        except (RemoteError, CacheFull, Stale) as error:
            log.debug("%r is removed without its missing blocks: %s", node.path, error)

    def unlink(self, node: Node) -> None:
        """Note that the file was removed here: what is written from now on goes nowhere."""
        if node.content:
            node.content.unlink()

    async def forget_unlinked(self, node: Node) -> None:
        """Forget what was to be uploaded, once `unlink` is certain."""
        content = node.content
        if content:
            self.queue.gone(content)
            await self.uploader.forget(content)
            self._retire_if_done(content)
