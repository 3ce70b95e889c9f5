"""chmod(2), chown(2), utimensat(2), setxattr(2): at once on the remote, or with the next upload."""

from __future__ import annotations

import stat

import msgspec
import trio

from hpcfs.cache.store import Store
from hpcfs.inodes.tree import Node, Tree
from hpcfs.model.entries import Attributes, mode_without_ids
from hpcfs.model.errors import NotOwner, RemoteError, Stale
from hpcfs.model.xattrs import changed_xattrs
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace
from hpcfs.writeback.close import Closer


class AttributeChanges:
    """Changes attributes for `uid`, the user whose mount it is: at once, or with the next
    upload."""

    def __init__(self, tree: Tree, store: Store, closer: Closer, uid: int) -> None:
        self._tree = tree
        self._store = store
        self._closer = closer
        self._uid = uid
        self._groups: dict[Namespace, set[int]] = {}
        """That the remote was seen to let the user give files to."""

    async def change(self, namespace: Namespace, node: Node, attributes: Attributes) -> None:
        """Set the attributes that are not None.

        Raises NotOwner, Stale, other RemoteErrors, and FilesystemError.
        """
        if not attributes:
            return
        changes_ids = (attributes.uid, attributes.gid) != (None, None)
        if changes_ids and attributes.mode is None:
            attributes = msgspec.structs.replace(attributes, mode=mode_without_ids(node.entry))
        attributes = self._without_same_owner(node, attributes)
        if attributes:
            await self._change(namespace, node, attributes)
        self._tree.note_changed(node)

    async def _change(self, namespace: Namespace, node: Node, attributes: Attributes) -> None:
        await self._closer.wait_closed(node)
        if node.is_ahead:
            if await self._must_ask(namespace, node, attributes):
                await self._ask(namespace, node, attributes)
            else:
                self._set_later(node, attributes)
            assert node.content
            await self._closer.changed(node.content)
        elif node.content is None and not node.is_attached:
            self._show(node, attributes, 1)  # a removed directory that is open
        else:
            if node.is_directory and attributes.mode is not None:
                await self._bring_before(node, attributes.mode)
            await self._set_now(namespace, node, attributes)

    async def _must_ask(self, namespace: Namespace, node: Node, attributes: Attributes) -> bool:
        """Whether the remote may refuse it: the program must hear that now, not with the upload.

        Raises NotOwner where it is sure to: only root gives files away.
        """
        content = node.content
        capabilities = await namespace.capabilities()
        if content is None or content.state.is_unlinked or capabilities.privileged:
            return False
        if not capabilities.checks_permissions:
            return False
        if node.entry.uid != self._uid:
            return True
        if attributes.uid is not None:
            raise NotOwner("only root may give a file to somebody else")
        return attributes.gid is not None and attributes.gid not in self._groups.get(namespace, ())

    async def _ask(self, namespace: Namespace, node: Node, attributes: Attributes) -> None:
        """Set them on the remote while the file is dirty; one that is only here is uploaded
        first."""
        content = node.content
        assert content
        if content.may_be_missing and not content.reader.base.size:
            await self._closer.flush(content)
        entry = await namespace.entry(m.SetAttributes(node.path, attributes))
        if attributes.gid is not None:
            self._groups.setdefault(namespace, set()).add(attributes.gid)
        if content.is_dirty():
            self._show(node, attributes, content.capabilities.mtime_resolution_ns)
        else:
            self._tree.set_local(node, entry)

    async def _bring_before(self, directory: Node, mode: int) -> None:
        """Upload what waits in a directory that becomes read-only, as it could not be created there
        later: cp -a and tar change the mode once a directory is filled."""
        if mode & stat.S_IWUSR and mode & stat.S_IXUSR:
            return
        for below in list(directory.below()):
            content = below.content
            if content and content.namespace.writes_back and content.is_dirty():
                await self._closer.flush(content)

    def _without_same_owner(self, node: Node, attributes: Attributes) -> Attributes:
        """chown to the owner that is shown changes nothing: cp -a and rsync do that."""
        entry = node.entry
        return msgspec.structs.replace(
            attributes,
            uid=None if attributes.uid == entry.uid else attributes.uid,
            gid=None if attributes.gid == entry.gid else attributes.gid,
        )

    def _set_later(self, node: Node, attributes: Attributes) -> None:
        """The next upload of the file brings them along."""
        content = node.content
        assert content
        content.set_with_upload(attributes)
        self._show(node, attributes, content.capabilities.mtime_resolution_ns)

    def _show(self, node: Node, attributes: Attributes, resolution: int) -> None:
        """Show these, with times of this resolution in nanoseconds."""
        entry = node.entry
        changed = {
            field: value
            for field, value in msgspec.structs.asdict(attributes).items()
            if value is not None
        }
        if attributes.mode is not None:
            changed["mode"] = stat.S_IFMT(entry.mode) | attributes.mode
        for field in ("atime_ns", "mtime_ns"):
            if field in changed:
                changed[field] -= changed[field] % resolution
        if attributes.xattrs is not None:
            changed["xattrs"] = changed_xattrs(entry.xattrs, attributes.xattrs)
        self._tree.set_local(node, msgspec.structs.replace(entry, **changed))

    async def _set_now(self, namespace: Namespace, node: Node, attributes: Attributes) -> None:
        """A new mtime makes a new version of the same content: what is cached of it is carried
        over, if the remote was seen to have that version a moment ago."""
        if node.content and node.content.state.is_superseded:
            raise Stale("the file was replaced on the remote since it was opened")
        fresh, before = self._tree.is_fresh(node), node.entry.version
        times = self._closer.queue.directory_times
        if node.is_directory and namespace.writes_back and attributes.mtime_ns is not None:
            times.put(node, attributes)
        try:
            entry = await namespace.entry(m.SetAttributes(node.path, attributes))
        except RemoteError as error:
            if times.has(node) and _is_only_times(attributes) and namespace.absence_explains(error):
                capabilities = await namespace.capabilities()
                self._show(node, attributes, capabilities.mtime_resolution_ns)
                return  # the uploads that wait in the directory bring them along
            times.forget(node)
            raise
        except trio.Cancelled:  # the remote may have done it
            times.forget(node)
            self._tree.expire(node)
            raise
        self._tree.set_local(node, entry)
        if entry.version == before or not fresh:
            return
        if node.pages_version == before:
            node.pages_version = entry.version
        if node.content and node.content.version == before:
            node.content.renew_version(entry.version)
        elif not node.content:
            with trio.CancelScope(shield=True):
                await self._store.renew_version(namespace.origin, node.path, before, entry.version)


def _is_only_times(attributes: Attributes) -> bool:
    """Whether nothing but times is to be set."""
    times = Attributes(atime_ns=attributes.atime_ns, mtime_ns=attributes.mtime_ns)
    return attributes == times
