"""The meaning of each operation, without a mount (kernel/ calls it) and without a network (a
namespace's remote is behind site/namespace.py).

Operations take inode numbers and handles, and return nodes, bytes or numbers. They raise
FilesystemError or RemoteError (model/errors.py) and nothing else that is expected. Open files are
files.py's, open directories directories/directories.py's.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio

from hpcfs.cache.store import Store
from hpcfs.content.shared import Shared
from hpcfs.directories.directories import Directories
from hpcfs.directories.lister import DirectoryLister
from hpcfs.filesystem.attributes import AttributeChanges
from hpcfs.filesystem.create_predictor import UNKNOWN_PROCESS, CreatePredictor
from hpcfs.filesystem.doubt import doubting
from hpcfs.filesystem.files import Files
from hpcfs.filesystem.glances import Glances
from hpcfs.filesystem.lookup import MAX_NAME_BYTES, Lookup
from hpcfs.filesystem.rename import Renamer, check_empty
from hpcfs.filesystem.symlinks import Symlinks
from hpcfs.filesystem.xattrs import ExtendedAttributes
from hpcfs.inodes.permissions import Permissions
from hpcfs.inodes.tree import ROOT_INO, Node, Tree, directory_entry, join
from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import (
    AlreadyExists,
    CrossDevice,
    InvalidRequest,
    NameTooLong,
    NoSuchKind,
    NotFound,
    NotSupported,
    ReadOnly,
    RemoteError,
)
from hpcfs.model.usage import DiskUsage
from hpcfs.prefetch.file_prefetcher import FilePrefetcher
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace
from hpcfs.site.tasks import Tasks
from hpcfs.writeback.close import Closer
from hpcfs.writeback.queue import DEFAULT_LIMIT
from hpcfs.writeback.uploader import Uploader

log = logging.getLogger(__name__)

USAGE_PATIENCE = 1.0
"""Seconds that df(1) waits for a remote."""
UNLIMITED = DiskUsage(1 << 50, 1 << 50, 1 << 50, 1 << 32, 1 << 32)
"""Shown by df for a remote that knows no limit: 1 PiB free."""


@dataclass(frozen=True)
class MountOptions:
    """How a mount is made.

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
        nursery: Tasks,
        options: MountOptions | None = None,
    ) -> None:
        options = options or MountOptions()
        self._namespaces = list(namespaces)
        self._usages: dict[Namespace, DiskUsage] = {}
        self._usage_glances = Glances(USAGE_PATIENCE, options.now)
        self.tree = _make_tree(self._namespaces, options)
        self.permissions = Permissions(options.uid, options.gid)
        self.shared = Shared(store, nursery, options.now)
        self.closer = Closer(self.tree, store, uploader, nursery, options.journal_size)
        self.file_prefetcher = FilePrefetcher(self.tree, self.shared)
        self.lister = DirectoryLister(
            self.tree, self.file_prefetcher, str(store.directory), store.spool, nursery
        )
        self.create_predictor = CreatePredictor()
        self.lookup = Lookup(
            self.tree,
            self.lister,
            self.closer,
            self.file_prefetcher,
            self.create_predictor,
            self.permissions,
        )
        self.directories = Directories(
            self.tree, self.lister, self.lookup.adopt, self.file_prefetcher
        )
        self.files = Files(
            self.tree,
            self.shared,
            self.closer,
            self.lookup,
            self.file_prefetcher,
            self.permissions,
        )
        self._symlinks = Symlinks(self.tree, self.lookup, options.mountpoint)
        self._renamer = Renamer(self.tree, store, self.closer)
        self._attributes = AttributeChanges(self.tree, store, self.closer, options.uid)
        keeping = any(namespace.keeps_xattrs for namespace in self._namespaces)
        self.xattrs = ExtendedAttributes(
            self.lookup, self._attributes, self.permissions, any_keeps=keeping
        )

    # --- what leads elsewhere, and what there is room for ----------------------------------------

    async def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link. Raises InvalidRequest, LeadsOut and RemoteError."""
        node = self.tree.get(ino)
        if node.namespace is None or not node.is_link:
            raise InvalidRequest("only a symbolic link has a target")
        return await self._symlinks.target(node)

    async def access(self, ino: int, mask: int) -> None:
        """Raise ReadOnly or PermissionDenied where the mount can tell; else the remote decides."""
        node = self.tree.get(ino)
        if mask & os.W_OK:
            self._writable(node)
        await self.permissions.check_access(node, mask)

    async def disk_usage(self) -> DiskUsage:
        """Return the roomiest namespace's usage, as last told: the statfs of FUSE names no file."""
        async with trio.open_nursery() as nursery:
            for namespace in self._namespaces:
                ask = partial(self._ask_usage, namespace)
                nursery.start_soon(self._usage_glances.take, namespace, ask)
        known = self._usages.values()
        return max(known, key=lambda usage: usage.available, default=UNLIMITED)

    async def _ask_usage(self, namespace: Namespace) -> None:
        try:
            usage = await namespace.call(m.GetDiskUsage(), DiskUsage | None)  # type: ignore[arg-type]
        except RemoteError as error:
            log.debug("disk usage of %s: %s", namespace.name, error.message)
        else:
            self._usages[namespace] = usage or UNLIMITED

    # --- names ----------------------------------------------------------------------------------

    def _writable(self, node: Node) -> Namespace:
        """The node's namespace, which may be written to."""
        if node.namespace is None:
            raise ReadOnly("the mount's top only holds the namespaces of the configuration")
        node.namespace.check_writable()
        return node.namespace

    async def _parent(self, ino: int, name: bytes) -> tuple[Node, Namespace]:
        """The directory in which `name` is to be made or removed."""
        parent = self.tree.directory(ino)
        if len(name) > MAX_NAME_BYTES:
            raise NameTooLong("names have at most 255 bytes")
        namespace = self._writable(parent)
        await self.permissions.check_directory(parent, os.W_OK | os.X_OK)
        self.closer.queue.directory_times.forget(parent)
        return parent, namespace

    async def _about_to_change(self, ino: int, name: bytes) -> tuple[Node, Namespace]:
        """Do the same; from now on older listings do not tell of this name."""
        parent, namespace = await self._parent(ino, name)
        self.tree.note_made(parent, name)
        return parent, namespace

    def _made(self, parent: Node, name: bytes, entry: Entry, asked: float, process: int) -> Node:
        self.create_predictor.created(process, (parent, name))
        if known := self.tree.child(parent, name):
            self.tree.detach(known)
        self.tree.note_made(parent, name)
        self.tree.expire(parent)
        return self.tree.add(parent, name, entry, asked)

    def _refuse_pending(self, parent: Node, name: bytes) -> None:
        """Raise AlreadyExists for a name that the remote does not know of yet."""
        known = self.tree.child(parent, name)
        if known and known.content and known.content.may_be_missing:
            raise AlreadyExists("the name is taken")

    async def mkdir(
        self, parent_ino: int, name: bytes, mode: int, process: int = UNKNOWN_PROCESS
    ) -> Node:
        """Make a directory on the remote and return its node. Raises AlreadyExists and others."""
        parent, namespace = await self._about_to_change(parent_ino, name)
        asked = self.tree.now()
        self._refuse_pending(parent, name)
        request = m.MakeDirectory(join(parent, name), stat.S_IMODE(mode))
        with doubting(self.tree, (parent, name)):
            entry = await namespace.entry(request)
        node = self._made(parent, name, entry, asked, process)
        self.lister.made(node)
        return node

    async def symlink(
        self, parent_ino: int, name: bytes, target: bytes, process: int = UNKNOWN_PROCESS
    ) -> Node:
        """Make a symbolic link on the remote and return its node."""
        parent, namespace = await self._about_to_change(parent_ino, name)
        if namespace.symlinks == "hide":
            raise NoSuchKind(f"{namespace.name} does not show symbolic links, so none are made")
        self._refuse_pending(parent, name)
        asked = self.tree.now()
        request = m.MakeSymlink(join(parent, name), target)
        with doubting(self.tree, (parent, name)):
            entry = await namespace.entry(request)
        node = self._made(parent, name, entry, asked, process)
        self._symlinks.made(node, target)
        return node

    async def link(self, ino: int, parent_ino: int, name: bytes) -> Node:
        """Give the file a further name on the remote; return the node of that name."""
        parent, namespace = await self._about_to_change(parent_ino, name)
        node = self.tree.get(ino)
        if node.namespace is not namespace:
            raise CrossDevice("a hard link can't lead to another namespace")
        self._refuse_pending(parent, name)
        await self._renamer.flush_below(node)
        asked = self.tree.now()
        try:
            with doubting(self.tree, (parent, name)):
                entry = await namespace.entry(m.MakeLink(node.path, join(parent, name)))
        except NotSupported as error:
            raise NoSuchKind(error.message) from None
        if not node.is_attached or node.is_ahead:
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
        """Create a file, or without O_EXCL open one that has just come into being; return (handle,
        node).

        Raises AlreadyExists with O_EXCL, and others.
        """
        parent, _ = await self._about_to_change(parent_ino, name)
        if known := self.tree.child(parent, name):
            if flags & os.O_EXCL:
                raise AlreadyExists("the file exists")
            return (await self.files.open(known, flags))[0], known
        try:
            with doubting(self.tree, (parent, name)):
                handle, node = await self.files.create(parent, name, mode, flags)
            self.tree.note_made(parent, name)
            self.create_predictor.created(process, (parent, name))
        except AlreadyExists:
            self.create_predictor.does_else(process)
            self.tree.note_made(parent, name)
            if flags & os.O_EXCL:
                raise
            node = await self.lookup.find(parent_ino, name)
            return (await self.files.open(node, flags))[0], node
        if node.content and node.content.is_only_here:
            self.tree.touch(parent)
        else:
            self.tree.expire(parent)
        return handle, node

    async def mknod(self, parent_ino: int, name: bytes, mode: int) -> Node:
        """Make an empty file. Raises NoSuchKind for any other kind."""
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise NoSuchKind("only files, directories and symbolic links can be made")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        handle, node = await self.create(parent_ino, name, mode, flags)
        self.tree.count_lookup(node)  # the release must not drop the node: the kernel gets it
        try:
            await self.files.flush_handle(handle)
        finally:
            self.files.release(handle)
            node.lookups -= 1
        return node

    async def unlink(self, parent_ino: int, name: bytes) -> None:
        """Remove a name that is no directory; the file stays readable where it is open."""
        parent, namespace = await self._about_to_change(parent_ino, name)
        node = self.tree.child(parent, name)
        with doubting(self.tree, (parent, name)):
            await self._renamer.unlink(namespace, node, parent, name)
        self.lister.removed(parent, name)

    async def rmdir(self, parent_ino: int, name: bytes) -> None:
        """Remove an empty directory. Raises DirectoryNotEmpty."""
        parent, namespace = await self._about_to_change(parent_ino, name)
        node = self.tree.child(parent, name)
        if node:
            check_empty(node)
        with doubting(self.tree, (parent, name)):
            await namespace.do(m.RemoveDirectory(join(parent, name)))
        self.tree.note_gone(parent, name)
        self.lister.removed(parent, name)
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
        """Give what is named `name` another name; with `replace` it may take another file's place.

        Raises CrossDevice for another namespace, AlreadyExists without `replace`, and others.
        """
        parent, namespace = await self._parent(parent_ino, name)
        new_parent, new_namespace = await self._parent(new_parent_ino, new_name)
        if namespace is not new_namespace:
            raise CrossDevice("a rename can't lead to another namespace")
        if (parent, name) == (new_parent, new_name):
            return
        node = await self.lookup.find(parent_ino, name)
        target = await self._target_of(new_parent, new_name, node, process)
        if target is node:
            return  # two links of one file: rename(2) leaves both
        self.tree.note_made(parent, name)
        self.tree.note_made(new_parent, new_name)
        with doubting(self.tree, (parent, name), (new_parent, new_name)):
            await self._renamer.rename(
                namespace, node, (parent, name), new_parent, new_name, target, replace=replace
            )
        self.lister.removed(parent, name)
        old, new = join(parent, name), join(new_parent, new_name)
        if node.is_directory:
            self.lister.moved(namespace, old, new)
        self._symlinks.moved(namespace, old, new)
        self.create_predictor.created(process, (new_parent, new_name))

    async def _target_of(self, parent: Node, name: bytes, node: Node, process: int) -> Node | None:
        """Return what will be replaced.

        Only where the remote is not asked to rename must it be known.
        """
        child = self.tree.child(parent, name)
        if child is None and node.content is not None and node.content.is_only_here:
            try:
                return await self.lookup.find(parent.ino, name, process)
            except NotFound:
                return None
        return child

    # --- attributes -------------------------------------------------------------------------------

    async def setattr(
        self, ino: int, attributes: Attributes, size: int | None, handle: int | None
    ) -> Node:
        """Change attributes, and the file's size in bytes if `size` is not None; return the node.

        With `handle` the size is that of an open file, and reaches the remote with its close.
        """
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
