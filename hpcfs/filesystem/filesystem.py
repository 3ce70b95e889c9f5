"""What each operation means. Runs with no mount (kernel/ calls it) and no network (a namespace's
remote is behind site/namespace.py).

Operations take inode numbers and handles, and return nodes, bytes or numbers. They raise
FilesystemError (model/errors.py) or RemoteError (protocol/messages.py) and nothing else that
is expected. Open files are files.py's, open directories directories/directories.py's.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import trio

from hpcfs.cache.store import Store
from hpcfs.content.shared import Shared
from hpcfs.directories.directories import Directories, directory_entry
from hpcfs.filesystem.attributes import AttributeChanges
from hpcfs.filesystem.files import Files
from hpcfs.filesystem.makers import UNKNOWN_PROCESS, Makers
from hpcfs.filesystem.rename import Renamer, check_empty
from hpcfs.filesystem.symlinks import Symlinks
from hpcfs.filesystem.xattrs import ExtendedAttributes
from hpcfs.inodes.permissions import Permissions
from hpcfs.inodes.tree import ROOT_INO, Node, Tree, join
from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import (
    AlreadyExists,
    CrossDevice,
    InvalidRequest,
    NameTooLong,
    NoSuchKind,
    NotADirectory,
    NotConnected,
    NotFound,
    NotSupported,
    ReadOnly,
    RemoteError,
    Unreachable,
)
from hpcfs.model.usage import DiskUsage
from hpcfs.prefetch.file_prefetcher import FilePrefetcher
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace
from hpcfs.writeback.close import Closer
from hpcfs.writeback.queue import DEFAULT_LIMIT
from hpcfs.writeback.uploader import Uploader

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
ROOT_PATIENCE = 1.0
"""Seconds that a look at a namespace's folder in the mount's top waits for the remote."""
USAGE_PATIENCE = 2.0
UNLIMITED = DiskUsage(1 << 50, 1 << 50, 1 << 50, 1 << 32, 1 << 32)
"""What df shows of a remote that knows no limit: 1 PiB free."""


@dataclass(frozen=True)
class MountOptions:
    """What a mount is asked to be.

    `single` makes the only namespace the root of the mount itself, as with sshfs. `mountpoint` is
    its absolute path, where there is one; `uid` and `gid` are the user's; `journal_size` is how
    many bytes may wait to be uploaded; `now` is a monotonic clock in seconds.
    """

    single: bool = False
    mountpoint: bytes | None = None
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    journal_size: int = DEFAULT_LIMIT
    now: Callable[[], float] = time.monotonic


def _make_tree(namespaces: Sequence[Namespace], options: MountOptions) -> Tree:
    """The root, and below it a directory for each namespace unless it is the only one's."""
    entry = directory_entry(b"", 0o755, options.uid, options.gid, time.time_ns())
    top = Node(ROOT_INO, None, b"", namespaces[0] if options.single else None, entry)
    tree = Tree(top, options.now)
    if not options.single:
        for namespace in namespaces:
            name = namespace.name.encode()
            tree.add(top, name, msgspec.structs.replace(entry, name=name), 0.0, namespace)
    return tree


class Filesystem:
    """The operations of one mount on inode numbers, names and handles."""

    def __init__(
        self,
        namespaces: Iterable[Namespace],
        store: Store,
        uploader: Uploader,
        nursery: trio.Nursery,
        options: MountOptions | None = None,
    ) -> None:
        options = options or MountOptions()
        self._namespaces = list(namespaces)
        self.tree = _make_tree(self._namespaces, options)
        self.permissions = Permissions(options.uid, options.gid)
        self.shared = Shared(store, nursery, options.now)
        self.closer = Closer(self.tree, store, uploader, nursery, options.journal_size)
        self.file_prefetcher = FilePrefetcher(self.tree, self.shared)
        self.files = Files(
            self.tree, self.shared, self.closer, uploader, self.file_prefetcher, self.permissions
        )
        self._links = Symlinks(self.tree, self.lookup, options.mountpoint)
        self.makers = Makers()
        self._renaming = Renamer(self.tree, store, self.closer)
        self._attributes = AttributeChanges(self.tree, store, self.closer, options.uid)
        keeping = any(namespace.keeps_xattrs for namespace in self._namespaces)
        self.xattrs = ExtendedAttributes(
            self.getattr, self._attributes, self.permissions, any_keeps=keeping
        )
        self.directories = Directories(
            self.tree,
            self._adopt,
            self.file_prefetcher,
            str(store.directory),
            store.spool,
            nursery,
        )

    # --- looking --------------------------------------------------------------------------------

    async def lookup(self, parent_ino: int, name: bytes, process: int = UNKNOWN_PROCESS) -> Node:
        """For this process. Raises NotFound where there is no such name."""
        parent = self._directory(parent_ino)
        if len(name) > MAX_NAME_BYTES:
            raise NameTooLong("names have at most 255 bytes")
        if name == b".":
            return parent
        if name == b"..":
            return parent.parent or parent
        await self.permissions.check_directory(parent, os.X_OK)
        child = self.tree.child(parent, name)
        if child and (
            child.is_namespace_root or self.tree.is_named(child) or self._is_ahead(child)
        ):
            return child
        if parent.namespace is None:
            raise NotFound("the mount's top has only namespaces")
        try:
            if listed := self._listed(parent, name, child, process):
                return listed
            node = await self._look_up(parent, name, child)
        except NotFound:
            self.makers.missed(process, (parent, name))
            raise
        if child is None:
            self.makers.does_else(process)
        return node

    def _listed(self, parent: Node, name: bytes, child: Node | None, process: int) -> Node | None:
        """What a listing of a moment ago tells; None if the remote must be asked. No await. Raises
        NotFound if it has no such name, and the process would make it."""
        found = self.directories.find(parent, name)
        if found is None:
            return None
        asked, entry = found
        if entry is not None:
            node = self._adopt(parent, name, entry, asked)
            return node if self.tree.is_named(node) else None
        if not self.makers.is_making(process):
            return None
        if child is not None and (child.content is not None or child.named > asked):
            return None
        if child is not None:
            self._lose(parent, name, child)
        raise NotFound("a listing of a moment ago does not have this name")

    async def _look_up(self, parent: Node, name: bytes, child: Node | None) -> Node:
        asked = self.tree.now()
        assert parent.namespace
        try:
            entry = await parent.namespace.stat(join(parent, name))
        except NotConnected:
            if parent.namespace.sleeps and child:
                return child
            if parent.namespace.sleeps and self.directories.was_missing(parent, name):
                raise NotFound("this name was not there when the laptop was") from None
            raise
        except NotFound:
            child = self.tree.child(parent, name)
            if child and not self._is_ahead(child) and child.named <= asked:
                self._lose(parent, name, child)
            elif child:
                return child
            raise
        if child and child.content and not child.others and not self._is_ahead(child):
            if await self.files.is_same(child.content, entry):
                self.tree.update(child, entry, asked)
            elif not self._is_ahead(child) and child.named <= asked:
                self.closer.lose(child)
        return self._adopt(parent, name, entry, asked)

    def _lose(self, parent: Node, name: bytes, child: Node) -> None:
        """Others removed this name; its file may have more."""
        if child.others:
            self.tree.note_gone(parent, name)
        else:
            self.closer.lose(child)

    def _is_ahead(self, node: Node) -> bool:
        """Whether the mount knows better than the remote: the file is being written, or was
        removed here while it is open."""
        return node.content is not None and node.content.is_ahead

    def _adopt(self, parent: Node, name: bytes, entry: Entry, asked: float) -> Node:
        """The node for what the remote listed or answered under this name. No await."""
        child = self.tree.child(parent, name)
        if child is None:
            return self.tree.add(parent, name, entry, asked)
        if asked < child.named or self._is_ahead(child) or child.is_namespace_root:
            return child
        if stat.S_IFMT(entry.mode) != stat.S_IFMT(child.entry.mode):
            self.closer.lose(child)
            return self.tree.add(parent, name, entry, asked)
        if child.others and entry.version != child.entry.version:
            self.tree.note_gone(parent, name)  # its names may be those of several files now
            return self.tree.add(parent, name, entry, asked)
        content = child.content
        if content is None or entry.version == content.version:
            self.tree.update(child, entry, asked)
            return child
        if content.capabilities.handles and entry.size > content.size:
            return child  # perhaps it grew: a lookup or getattr of its own will ask
        self.closer.lose(child)
        return self.tree.add(parent, name, entry, asked)

    async def getattr(self, ino: int) -> Node:
        node = self.tree.get(ino)
        if node.namespace is None or self._is_ahead(node) or self.tree.is_fresh(node):
            return node
        if node.is_namespace_root and ino != ROOT_INO:
            await self._look_at_namespace(node)
        elif not self._update_from_listing(node):
            await self._refresh_or_keep(node)
        return node

    def _update_from_listing(self, node: Node) -> bool:
        """Whether that made the attributes fresh. What an open file has become is asked of the
        remote: it may be followed there."""
        if node.content is not None or node.parent is None or not node.is_attached:
            return False
        found = self.directories.find(node.parent, node.name)
        asked, entry = found or (0.0, None)
        if entry is None:
            return False
        if stat.S_IFMT(entry.mode) == stat.S_IFMT(node.entry.mode):
            self.tree.update(node, entry, asked)
        return self.tree.is_fresh(node)

    async def _refresh_or_keep(self, node: Node) -> None:
        """An open file keeps its last attributes while the remote is out of reach: what is cached
        of it stays readable, and `tail -f` outlives a cut link. All that was seen of a laptop does
        once it is away."""
        try:
            await self._refresh(node)
        except Unreachable as error:
            assert node.namespace
            is_away = node.namespace.sleeps and isinstance(error, NotConnected)
            if node.content is None and not is_away:
                raise
            log.debug("attributes of %r are old: %s", node.path, error.message)

    async def _look_at_namespace(self, node: Node) -> None:
        """A namespace out of reach still has its folder, and delays nobody for long."""
        assert node.namespace
        asked = self.tree.now()
        with trio.move_on_after(ROOT_PATIENCE):
            try:
                entry = await node.namespace.stat(b"")
            except RemoteError as error:
                log.debug("namespace %s: %s", node.namespace.name, error.message)
            else:
                self.tree.update(node, entry, asked)
                return
        node.validated_at = node.named = self.tree.now()

    async def _refresh(self, node: Node) -> None:
        assert node.namespace
        asked = self.tree.now()
        if node.content:
            entry = await node.content.reader.base.revalidate()
            if entry is not None:
                self.tree.update_open(node, entry, asked)
                return
        if not node.is_attached:
            return  # removed, and known by an open handle or as a working directory
        try:
            entry = await node.namespace.stat(node.path)
        except NotFound:
            if node.content:
                return  # it is open: it still is what it was
            if node.others and node.parent:
                self.tree.note_gone(node.parent, node.name)
                await self._refresh(node)
                return
            self.tree.detach(node)
            raise
        if node.content is None or entry.version == node.content.version:
            self.tree.update(node, entry, asked)

    async def readlink(self, ino: int) -> bytes:
        node = self.tree.get(ino)
        if node.namespace is None or not node.is_link:
            raise InvalidRequest("only a symbolic link has a target")
        return await self._links.target(node)

    async def access(self, ino: int, mask: int) -> None:
        """Raises ReadOnly or NotPermitted where the mount can tell; else the remote decides."""
        node = self.tree.get(ino)
        if mask & os.W_OK:
            self._writable(node)
        await self.permissions.check_access(node, mask)

    async def disk_usage(self) -> DiskUsage:
        """FUSE's statfs names no file: the roomiest namespace answers for all."""
        found: list[DiskUsage] = []

        async def ask(namespace: Namespace) -> None:
            try:
                usage = await namespace.call(m.GetDiskUsage(), DiskUsage | None)  # type: ignore[arg-type]
            except RemoteError as error:
                log.debug("disk usage of %s: %s", namespace.name, error.message)
            else:
                found.append(usage or UNLIMITED)

        with trio.move_on_after(USAGE_PATIENCE):
            async with trio.open_nursery() as nursery:
                for namespace in self._namespaces:
                    nursery.start_soon(ask, namespace)
        return max(found, key=lambda usage: usage.available, default=UNLIMITED)

    # --- names ----------------------------------------------------------------------------------

    def _directory(self, ino: int) -> Node:
        node = self.tree.get(ino)
        if not node.is_directory:
            raise NotADirectory("a directory was needed")
        return node

    def _writable(self, node: Node) -> Namespace:
        """The node's namespace, which may be written to."""
        if node.namespace is None:
            raise ReadOnly("the mount's top only holds the namespaces of the configuration")
        node.namespace.check_writable()
        return node.namespace

    async def _parent(self, ino: int, name: bytes) -> tuple[Node, Namespace]:
        """The directory in which `name` is to be made or removed."""
        parent = self._directory(ino)
        if len(name) > MAX_NAME_BYTES:
            raise NameTooLong("names have at most 255 bytes")
        namespace = self._writable(parent)
        await self.permissions.check_directory(parent, os.W_OK | os.X_OK)
        self.closer.queue.directory_times.forget(parent)
        return parent, namespace

    async def _about_to_change(self, ino: int, name: bytes) -> tuple[Node, Namespace]:
        """The same; whatever comes of it, older listings don't tell of this name any more."""
        parent, namespace = await self._parent(ino, name)
        self.tree.note_made(parent, name)
        return parent, namespace

    def _made(self, parent: Node, name: bytes, entry: Entry, asked: float, process: int) -> Node:
        self.makers.made(process, (parent, name))
        if known := self.tree.child(parent, name):
            self.tree.detach(known)
        self.tree.note_made(parent, name)
        self.tree.expire(parent)
        return self.tree.add(parent, name, entry, asked)

    def _refuse_pending(self, parent: Node, name: bytes) -> None:
        """The remote does not know of a file that is to be made there."""
        known = self.tree.child(parent, name)
        if known and known.content and known.content.may_be_missing:
            raise AlreadyExists("the name is taken")

    async def mkdir(
        self, parent_ino: int, name: bytes, mode: int, process: int = UNKNOWN_PROCESS
    ) -> Node:
        parent, namespace = await self._about_to_change(parent_ino, name)
        asked = self.tree.now()
        self._refuse_pending(parent, name)
        request = m.MakeDirectory(join(parent, name), stat.S_IMODE(mode))
        node = self._made(parent, name, await namespace.entry(request), asked, process)
        self.directories.made(node)
        return node

    async def symlink(
        self, parent_ino: int, name: bytes, target: bytes, process: int = UNKNOWN_PROCESS
    ) -> Node:
        parent, namespace = await self._about_to_change(parent_ino, name)
        if namespace.symlinks == "hide":
            raise NoSuchKind(f"{namespace.name} does not show symbolic links, so none are made")
        self._refuse_pending(parent, name)
        asked = self.tree.now()
        request = m.MakeSymlink(join(parent, name), target)
        node = self._made(parent, name, await namespace.entry(request), asked, process)
        self._links.made(node, target)
        return node

    async def link(self, ino: int, parent_ino: int, name: bytes) -> Node:
        parent, namespace = await self._about_to_change(parent_ino, name)
        node = self.tree.get(ino)
        if node.namespace is not namespace:
            raise CrossDevice("a hard link can't lead to another namespace")
        self._refuse_pending(parent, name)
        await self._renaming.flush_below(node)
        asked = self.tree.now()
        try:
            entry = await namespace.entry(m.MakeLink(node.path, join(parent, name)))
        except NotSupported as error:
            raise NoSuchKind(error.message) from None
        if not node.is_attached or self._is_ahead(node):
            return self._made(parent, name, entry, asked, UNKNOWN_PROCESS)
        self.tree.note_gone(parent, name)
        self.tree.expire(parent)
        self.tree.update(node, entry, asked)
        self.tree.add_name(node, parent, name)
        self.tree.note_changed(node)
        return node

    async def create(
        self, parent_ino: int, name: bytes, mode: int, flags: int, process: int = UNKNOWN_PROCESS
    ) -> tuple[int, Node]:
        """-> (handle, node). Without O_EXCL, a file that has just come into being is opened."""
        parent, _ = await self._about_to_change(parent_ino, name)
        if known := self.tree.child(parent, name):
            if flags & os.O_EXCL:
                raise AlreadyExists("the file exists")
            return (await self.files.open(known, flags))[0], known
        try:
            handle, node = await self.files.create(parent, name, mode, flags)
            self.tree.note_made(parent, name)
            self.makers.made(process, (parent, name))
        except AlreadyExists:
            self.makers.does_else(process)
            self.tree.note_made(parent, name)
            if flags & os.O_EXCL:
                raise
            node = await self.lookup(parent_ino, name)
            return (await self.files.open(node, flags))[0], node
        if node.content and node.content.is_only_here:
            self.tree.touch(parent)
        else:
            self.tree.expire(parent)
        return handle, node

    async def mknod(self, parent_ino: int, name: bytes, mode: int) -> Node:
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise NoSuchKind("only files, directories and symbolic links can be made")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        handle, node = await self.create(parent_ino, name, mode, flags)
        self.tree.count_lookup(node)  # the release must not drop the node: the kernel gets it
        try:
            await self.files.flush_handle(handle)
        finally:
            await self.files.release(handle)
            node.lookups -= 1
        return node

    async def unlink(self, parent_ino: int, name: bytes) -> None:
        parent, namespace = await self._about_to_change(parent_ino, name)
        node = self.tree.child(parent, name)
        await self._renaming.unlink(namespace, node, parent, name)

    async def rmdir(self, parent_ino: int, name: bytes) -> None:
        parent, namespace = await self._about_to_change(parent_ino, name)
        node = self.tree.child(parent, name)
        if node:
            check_empty(node)
        await namespace.do(m.RemoveDirectory(join(parent, name)))
        self.tree.note_gone(parent, name)
        self.tree.expire(parent)

    # --- rename -----------------------------------------------------------------------------------

    async def rename(
        self,
        parent_ino: int,
        name: bytes,
        new_parent_ino: int,
        new_name: bytes,
        *,
        replace: bool,
        process: int = UNKNOWN_PROCESS,
    ) -> None:
        parent, namespace = await self._parent(parent_ino, name)
        new_parent, new_namespace = await self._parent(new_parent_ino, new_name)
        if namespace is not new_namespace:
            raise CrossDevice("a rename can't lead to another namespace")
        if (parent, name) == (new_parent, new_name):
            return
        node = await self.lookup(parent_ino, name)
        target = await self._target_of(new_parent, new_name, node, process)
        if target is node:
            return  # two links of one file: rename(2) leaves both
        self.tree.note_made(parent, name)
        self.tree.note_made(new_parent, new_name)
        await self._renaming.rename(
            namespace, node, (parent, name), new_parent, new_name, target, replace=replace
        )
        self._links.moved(namespace, join(parent, name), join(new_parent, new_name))
        self.makers.made(process, (new_parent, new_name))

    async def _target_of(self, parent: Node, name: bytes, node: Node, process: int) -> Node | None:
        """What will be replaced. Only where the remote is not asked to rename must it be known."""
        child = self.tree.child(parent, name)
        if child is None and node.content is not None and node.content.is_only_here:
            try:
                return await self.lookup(parent.ino, name, process)
            except NotFound:
                return None
        return child

    # --- attributes -------------------------------------------------------------------------------

    async def setattr(
        self, ino: int, attributes: Attributes, size: int | None, handle: int | None
    ) -> Node:
        node = self.tree.get(ino)
        namespace = self._writable(node)
        if (
            size is not None
            and await self.files.truncate(node, size, handle)
            and attributes.mtime_ns is None
        ):
            attributes = msgspec.structs.replace(attributes, mtime_ns=time.time_ns())
        await self._attributes.change(namespace, node, attributes)
        return node
