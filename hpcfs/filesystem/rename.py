"""rename(2) and unlink(2): what they mean for files that the remote does not have yet, or not as
they are here.

What the remote has is renamed there, once what is dirty in it has been uploaded. A file that the
remote never had (`back` mode, and new files on S3) is renamed here alone: it goes up once, under
its last name, and if it replaces another one there, in one step. What follows locally, once the
remote has done it, is done also if the caller is interrupted.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, ExitStack, nullcontext, suppress

import trio

from hpcfs.cache.store import Store
from hpcfs.content.content import Content
from hpcfs.content.state import RemoteSide
from hpcfs.inodes.tree import Node, Tree, join
from hpcfs.model.errors import (
    AlreadyExists,
    CacheFull,
    DirectoryNotEmpty,
    IsADirectory,
    NotFound,
    RemoteError,
    Unreachable,
)
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Delivery, Namespace
from hpcfs.writeback.close import Closer

log = logging.getLogger(__name__)


class Renamer:
    """Renames and removes names, for the files that are open or not uploaded as well."""

    def __init__(self, tree: Tree, store: Store, closer: Closer) -> None:
        self._tree = tree
        self._store = store
        self._closer = closer

    async def rename(
        self,
        namespace: Namespace,
        node: Node,
        old: tuple[Node, bytes],
        parent: Node,
        name: bytes,
        target: Node | None,
        *,
        replace: bool,
    ) -> None:
        """Give `node`, named `old` (directory, name), the name of `target`, if that is not None.

        Raises AlreadyExists without `replace`, other RemoteErrors, and FilesystemError.
        """
        if target and target.content and target.content.may_be_missing and not replace:
            raise AlreadyExists("the name is taken")
        while content := node.content:
            if not self._is_only_here(content):
                break
            async with content.upload.lock:
                if self._is_only_here(content):
                    if target is not None and not replace:
                        raise AlreadyExists("the name is taken")
                    if await self._rename_here(content, node, parent, name, target):
                        return
        await self._rename_there(namespace, node, old, parent, name, target, replace=replace)

    def _is_only_here(self, content: Content) -> bool:
        only_here = content.is_only_here and not content.upload.is_being_sent
        return only_here and content.namespace.writes_back

    # --- what only this mount has -----------------------------------------------------------------

    async def _rename_here(
        self, content: Content, node: Node, parent: Node, name: bytes, target: Node | None
    ) -> bool:
        """Under the content's upload lock; whether it still was only here."""
        if target is not None and target.is_directory:
            raise IsADirectory("a file can't replace a directory")
        lost = None if target is None or target.extra_links else target
        async with AsyncExitStack() as locks:
            if lost is not None:
                if lost.content:
                    await locks.enter_async_context(lost.content.upload.lock)
                await self._closer.keep_readable(lost)
            elif target is not None:  # it goes on under its other names
                await self.flush_below(target)
            # No await from here to the end of the move.
            if not self._is_only_here(content):
                return False
            old_path = node.path
            content.note_renamed_here(over_another=_is_there(target))  # the row has the old name
            doomed = lost.content if lost else None
            if lost is not None:
                self._closer.unlink(lost)
            old_parent = node.parent
            assert old_parent
            self._tree.move(node, (old_parent, node.name), parent, name)
            for directory in {old_parent, parent}:
                self._tree.touch(directory)
            with trio.CancelScope(shield=True):
                await self._note_renamed_here(content, doomed)
        if target is not None:
            self._tree.note_changed(target)
        with trio.CancelScope(shield=True):
            if lost is not None:
                await self._closer.forget_unlinked(lost)
            await self._store.move(content.namespace.origin, old_path, node.path)
        return True

    async def _note_renamed_here(self, content: Content, doomed: Content | None) -> None:
        """Have the journal know the new name, and not what lost it. The rename is done: if the
        journal takes no row, a kill before the upload brings the old name back."""
        row = doomed.file.name if doomed and doomed.state.has_row else None
        try:
            await self._closer.queue.persist(content, instead_of=row)
        except CacheFull as error:
            log.warning("%r has its name in this mount only: %s", content.place.path, error.message)
        else:
            if doomed:
                doomed.note_no_row()

    # --- what the remote has ----------------------------------------------------------------------

    async def _rename_there(
        self,
        namespace: Namespace,
        node: Node,
        old: tuple[Node, bytes],
        parent: Node,
        name: bytes,
        target: Node | None,
        *,
        replace: bool,
    ) -> None:
        path, new_path = join(*old), join(parent, name)
        if target:
            check_empty(target)
        if target and (target.extra_links or namespace.writes_back):
            await self._flush_doomed(target)
        if target and not target.extra_links:
            await self._closer.keep_readable(target)
        await self.flush_below(node)
        async with AsyncExitStack() as locks:
            locked = set[Content]()
            while more := [one for one in _open_below(node, target) if one not in locked]:
                for content in more:  # others may be opened while a lock is waited for
                    await locks.enter_async_context(content.upload.lock)
                locked.update(more)
            # No await from here until all are in motion.
            with ExitStack() as motion:
                linked = target if target and target.extra_links else None
                for content in _open_below(node, linked):
                    motion.enter_context(content.in_motion())
                if target and target.content and target.content.state.remote is RemoteSide.REPLACES:
                    await _make_way(namespace, new_path)
                await namespace.do(m.Rename(path, new_path, replace))
                # No await from here to the end of the move: a lookup must not come in between.
                if target and not target.extra_links:
                    self._closer.unlink(target)
                self._tree.move(node, old, parent, name)
        self._tree.expire(old[0])
        self._tree.expire(parent)
        for changed in (node, target):
            if changed:
                self._tree.note_changed(changed)
        with trio.CancelScope(shield=True):
            if target and not target.is_attached:
                await self._closer.forget_unlinked(target)
            await self._store.move(namespace.origin, path, new_path)

    # --- removal ----------------------------------------------------------------------------------

    async def unlink(
        self, namespace: Namespace, node: Node | None, parent: Node, name: bytes
    ) -> None:
        """Remove a name, which `node` has if the mount knows it.

        Raises FilesystemError and RemoteError.
        """
        if node and node.extra_links:
            await self._unlink_one(namespace, node, parent, name)
            return
        if node:
            await self._closer.keep_readable(node)
        async with AsyncExitStack() as locks:
            if node and node.content:
                await locks.enter_async_context(node.content.upload.lock)
            await self._remove_there(namespace, join(parent, name), node)
            if node:
                self._closer.unlink(node)
            self._tree.note_gone(parent, name)
            self._tree.expire(parent)
        with trio.CancelScope(shield=True):
            if node:
                await self._closer.forget_unlinked(node)
            await self._store.remove(namespace.origin, join(parent, name))

    async def _remove_there(self, namespace: Namespace, path: bytes, node: Node | None) -> None:
        """Remove it on the remote, which after an interrupted upload may have the file or not."""
        content = node.content if node else None
        if content and content.is_only_here:
            return
        delivery = Delivery()
        waits = content if content and content.is_dirty() and namespace.writes_back else None
        noted = self._closer.uploader.removing(waits, delivery) if waits else nullcontext()
        try:
            async with noted:
                await namespace.do(m.Remove(path), delivery)
        except NotFound:
            if not (waits or (content and content.may_be_missing)):
                raise

    async def _unlink_one(
        self, namespace: Namespace, node: Node, parent: Node, name: bytes
    ) -> None:
        """Remove one of several names of a file; what is open or cached of the file stays."""
        path = join(parent, name)
        await self.flush_below(node)
        async with AsyncExitStack() as stack:
            for content in _open_below(node):
                await stack.enter_async_context(content.upload.lock)
                stack.enter_context(content.in_motion())
            await namespace.do(m.Remove(path))
            # No await from here: a lookup must not come in between.
            went_by = node.path == path
            self._tree.note_gone(parent, name)
            if not node.is_attached:  # the others went meanwhile
                self._closer.unlink(node)
        self._tree.expire(parent)
        self._tree.note_changed(node)
        with trio.CancelScope(shield=True):
            if node.is_attached and went_by:
                await self._store.move(namespace.origin, path, node.path)
                return
            if not node.is_attached:
                await self._closer.forget_unlinked(node)
            await self._store.remove(namespace.origin, path)

    async def _flush_doomed(self, target: Node) -> None:
        """Upload what is dirty in a file that is about to be replaced: else its row in the journal
        would outlive a kill, and its bytes would meet another file. Where the remote refuses them,
        or others changed the file, it can be replaced all the same. Raises Unreachable."""
        try:
            await self.flush_below(target)
        except Unreachable:
            raise
        except RemoteError as error:
            log.debug("%r is replaced without its last bytes: %s", target.path, error.message)

    async def flush_below(self, node: Node) -> None:
        """Upload what is dirty in the node, before the remote renames or links it."""
        for below in list(node.below()):
            if below.content and below.content.is_dirty():
                await self._closer.flush(below.content)


async def _make_way(namespace: Namespace, path: bytes) -> None:
    """Remove what the remote has of this name before a rename.

    What waits to replace it may be a link to the file that is renamed over it: rename(2) would
    leave both. What waits is in the journal.
    """
    with suppress(NotFound):
        await namespace.do(m.Remove(path))


def check_empty(directory: Node) -> None:
    """Raise DirectoryNotEmpty for a directory with files that the remote does not know of yet."""
    if directory.is_directory and any(
        below.content and below.content.may_be_missing for below in directory.below()
    ):
        raise DirectoryNotEmpty("a file in it is not uploaded yet")


def _is_there(target: Node | None) -> bool:
    """Whether the remote has something of this name, which an upload would have to replace."""
    if target is None:
        return False
    return target.content is None or not target.content.is_only_here


def _open_below(*nodes: Node | None) -> list[Content]:
    """Return all contents that are open in these, always in the same order."""
    contents = {
        id(below.content): below.content
        for node in nodes
        if node
        for below in node.below()
        if below.content
    }
    return sorted(contents.values(), key=lambda content: content.place.ino)
