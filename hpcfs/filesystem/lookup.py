"""Coherence: which names, attributes and versions of files programs are shown, and on whose word.

========================  ==========================  ======================  =====================
 asked for                 believed unasked            otherwise asked         overridden by
========================  ==========================  ======================  =====================
 a name (lookup)           1 s since the remote        a listing at most 1 s   a change made here
                           last had it                 old, then the remote    after the question
 a missing name            0.1 s, by the kernel        the remote; a listing   a file created here
                                                       for a program that
                                                       creates what it misses
 attributes (getattr)      1 s                         of an open file the     a change made here
                                                       remote's open handle;   after the question
                                                       a listing; the remote
 the version (open)        0.1 s since a lookup, 1 s   the remote, under each  nothing: another file
                           since a fetch ahead         of the file's names     is another node
 what is dirty, or was     always                      nobody                  nothing
 unlinked while open
 a namespace's own folder  1 s                         the remote, for 1 s     nothing: the last
                                                       at most                 answer stays
 a remote out of reach     an open file's attributes; once it is away, all that was seen of it
========================  ==========================  ======================  =====================

An answer counts from when the question was asked (`asked`, in the tree's seconds): what the mount
did or heard later overrides it. A file whose version changed on the remote while it is open here
becomes another node at the next lookup, so two versions never share a cache file or pages; one that
the remote's own handle shows to have only grown is followed.
"""

from __future__ import annotations

import logging
import os
import stat

from hpcfs.content.content import Content
from hpcfs.directories.lister import DirectoryLister
from hpcfs.filesystem.create_predictor import UNKNOWN_PROCESS, CreatePredictor
from hpcfs.filesystem.glances import Glances
from hpcfs.inodes.permissions import Permissions
from hpcfs.inodes.tree import ROOT_INO, Node, Tree, join
from hpcfs.model.entries import Entry
from hpcfs.model.errors import (
    NameTooLong,
    NotFound,
    RemoteError,
    Stale,
    Unreachable,
)
from hpcfs.prefetch.file_prefetcher import FilePrefetcher
from hpcfs.site.namespace import Namespace
from hpcfs.writeback.close import Closer

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
ROOT_PATIENCE = 1.0
"""Seconds that a look at a namespace's folder in the mount's top waits for the remote."""
OPEN_FRESH_SECONDS = 0.1
"""open(2) asks the remote for the file's version, unless the path walk just before it did. So
long the kernel remembers, too, that a name is missing: cp asks for it and makes it."""


class Lookup:
    """Finds nodes by name, and keeps what they show as the remote has it."""

    def __init__(
        self,
        tree: Tree,
        lister: DirectoryLister,
        closer: Closer,
        file_prefetcher: FilePrefetcher,
        create_predictor: CreatePredictor,
        permissions: Permissions,
    ) -> None:
        self._tree = tree
        self._lister = lister
        self._closer = closer
        self._file_prefetcher = file_prefetcher
        self._create_predictor = create_predictor
        self._permissions = permissions
        self._glances = Glances(ROOT_PATIENCE, tree.now)

    # --- names ----------------------------------------------------------------------------------

    async def find(self, parent_ino: int, name: bytes, process: int = UNKNOWN_PROCESS) -> Node:
        """Return the node of this name in a directory, for this process.

        Raises NotFound where there is no such name, other RemoteErrors, and FilesystemError.
        """
        parent = self._tree.directory(parent_ino)
        if len(name) > MAX_NAME_BYTES:
            raise NameTooLong("names have at most 255 bytes")
        if name == b".":
            return parent
        if name == b"..":
            return parent.parent or parent
        await self._permissions.check_directory(parent, os.X_OK)
        child = self._tree.child(parent, name)
        if child and (child.is_namespace_root or self._tree.is_named(child) or child.is_ahead):
            return child
        if parent.namespace is None:
            raise NotFound("the mount's top has only namespaces")
        try:
            if listed := self._listed(parent, name, child, process):
                return listed
            node = await self._ask(parent, name, child)
        except NotFound:
            self._create_predictor.missed(process, (parent, name))
            raise
        if child is None:
            self._create_predictor.does_else(process)
        return node

    def _listed(self, parent: Node, name: bytes, child: Node | None, process: int) -> Node | None:
        """Return the node that a recent listing has; None if the remote must be asked. No await.

        Raises NotFound if it has no such name, and the process would create it.
        """
        found = self._lister.find(parent, name)
        if found is None:
            return None
        asked, entry = found
        if entry is not None:
            node = self.adopt(parent, name, entry, asked)
            return node if self._tree.is_named(node) else None
        if not self._create_predictor.is_creating(process):
            return None
        if child is not None and (child.content is not None or child.named > asked):
            return None
        if child is not None:
            self._lose(parent, name, child)
        raise NotFound("a listing of a moment ago does not have this name")

    async def _ask(self, parent: Node, name: bytes, child: Node | None) -> Node:
        asked = self._tree.now()
        assert parent.namespace
        try:
            entry = await parent.namespace.stat(join(parent, name))
        except NotFound:
            child = self._tree.child(parent, name)
            if child and not child.is_ahead and child.named <= asked:
                self._lose(parent, name, child)
            elif child:
                return child
            raise
        except RemoteError as error:
            if not parent.namespace.absence_explains(error):
                raise
            return self._as_last_seen(parent, name, error)
        if child and child.content and not child.extra_links and not child.is_ahead:
            if await self._is_same(child.content, entry):
                self._tree.update(child, entry, asked)
            elif not child.is_ahead and child.named <= asked:
                self._closer.supersede(child)
        return self.adopt(parent, name, entry, asked)

    def _as_last_seen(self, parent: Node, name: bytes, error: RemoteError) -> Node:
        """Return the node of a name in a namespace that is away, which `error` says. No await.

        Raises NotFound where the last listing did not have it, and `error` where none can tell.
        """
        if (child := self._tree.child(parent, name)) is not None:
            return child
        seen = self._lister.last_seen(parent, name)
        if seen is None:
            raise error
        asked, entry = seen
        if entry is None:
            raise NotFound("this name was not there when the directory was last listed")
        return self.adopt(parent, name, entry, asked)

    def _lose(self, parent: Node, name: bytes, child: Node) -> None:
        """Others removed this name; its file may have more."""
        if child.extra_links:
            self._tree.note_gone(parent, name)
        else:
            self._closer.supersede(child)

    def adopt(self, parent: Node, name: bytes, entry: Entry, asked: float) -> Node:
        """Return the node for what the remote listed or answered under this name. No await."""
        child = self._tree.child(parent, name)
        if child is None:
            return self._tree.add(parent, name, entry, asked)
        if asked < child.named or child.is_ahead or child.is_namespace_root:
            return child
        if stat.S_IFMT(entry.mode) != stat.S_IFMT(child.entry.mode):
            self._closer.supersede(child)
            return self._tree.add(parent, name, entry, asked)
        if child.extra_links and entry.version != child.entry.version:
            self._tree.note_gone(parent, name)  # its names may be those of several files now
            return self._tree.add(parent, name, entry, asked)
        content = child.content
        if content is None or entry.version == content.version:
            self._tree.update(child, entry, asked)
            return child
        if content.capabilities.handles and entry.size > content.size:
            return child  # perhaps it grew: a lookup or getattr of its own will ask
        self._closer.supersede(child)
        return self._tree.add(parent, name, entry, asked)

    # --- attributes -----------------------------------------------------------------------------

    async def getattr(self, ino: int) -> Node:
        """Return the node with its attributes as they are now.

        Raises NotFound where the file is gone, other RemoteErrors, and FilesystemError.
        """
        node = self._tree.get(ino)
        if node.namespace is None or node.is_ahead or self._tree.is_fresh(node):
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
        found = self._lister.find(node.parent, node.name)
        asked, entry = found or (0.0, None)
        if entry is None:
            return False
        if stat.S_IFMT(entry.mode) == stat.S_IFMT(node.entry.mode):
            self._tree.update(node, entry, asked)
        return self._tree.is_fresh(node)

    async def _refresh_or_keep(self, node: Node) -> None:
        """An open file keeps its last attributes while the remote is out of reach: what is cached
        of it stays readable, and `tail -f` outlives a cut link. All that was seen of a namespace
        does once it is away."""
        assert node.namespace
        try:
            await self._refresh(node)
        except RemoteError as error:
            is_open = node.content is not None and isinstance(error, Unreachable)
            if not is_open and not node.namespace.absence_explains(error):
                raise
            log.debug("attributes of %r are old: %s", node.path, error.message)

    async def _look_at_namespace(self, node: Node) -> None:
        """A namespace out of reach still has its folder, and delays nobody for long."""
        namespace = node.namespace
        assert namespace
        asked = self._tree.now()

        async def look() -> None:
            try:
                self._tree.update(node, await namespace.stat(b""), asked)
            except RemoteError as error:
                log.debug("namespace %s: %s", namespace.name, error.message)

        await self._glances.take(namespace, look)
        if not self._tree.is_fresh(node):
            node.validated_at = node.named = self._tree.now()

    async def _refresh(self, node: Node) -> None:
        assert node.namespace
        asked = self._tree.now()
        if node.content:
            entry = await node.content.reader.base.revalidate()
            if entry is not None:
                self._tree.update_open(node, entry, asked)
                return
        if not node.is_attached:
            return  # removed, and known by an open handle or as a working directory
        try:
            entry = await node.namespace.stat(node.path)
        except NotFound:
            if node.content:
                return  # it is open: it still is what it was
            if node.extra_links and node.parent:
                self._tree.note_gone(node.parent, node.name)
                await self._refresh(node)
                return
            self._tree.detach(node)
            raise
        if node.content is None or entry.version == node.content.version:
            self._tree.update(node, entry, asked)

    # --- versions -------------------------------------------------------------------------------

    def check_name(self, node: Node) -> None:
        """Raise Stale if another file has the node's name on the remote."""
        if node.content.state.is_superseded if node.content else not node.is_attached:
            raise Stale("another file has this name now")

    async def revalidate(self, node: Node, own: Content | None = None) -> None:
        """Make the node's entry what the remote has now, unless that was asked a moment ago.

        Raises Stale if the remote has another file: the kernel then looks the name up again, and
        opens that one. `own` is a content that the caller made, and judges by the entry itself.
        """
        self.check_name(node)
        if self._tree.is_named(node, OPEN_FRESH_SECONDS) or (
            node.content and node.content.is_dirty()
        ):
            return
        if await self._file_prefetcher.is_current(node):
            return
        try:
            await self.compare(node, own)
        except RemoteError as error:
            if node.namespace is None or not node.namespace.absence_explains(error):
                raise
            log.debug("%r is opened as it was last seen: %s", node.path, error.message)

    async def compare(self, node: Node, own: Content | None = None) -> None:
        """Ask the remote for the node's entry; Stale if that is another file (see revalidate)."""
        namespace = node.namespace
        assert namespace
        await self._check_names(node, namespace)
        asked = self._tree.now()
        entry = await namespace.stat(node.path)
        content = node.content
        if content is None or content is own:
            if stat.S_IFMT(entry.mode) != stat.S_IFMT(node.entry.mode):
                self._closer.supersede(node)
                raise Stale("the file was replaced on the remote")
            self._tree.update(node, entry, asked)
        elif await self._is_same(content, entry):
            self._tree.update(node, entry, asked)
        elif not content.is_dirty():
            self._closer.supersede(node)
            raise Stale("the file was replaced on the remote")

    async def _check_names(self, node: Node, namespace: Namespace) -> None:
        """open(2) does not say which of the file's names was meant: all must lead to it still. A
        name that does not is looked up again by the kernel, upon Stale."""
        for parent, name in list(node.extra_links):
            try:
                entry = await namespace.stat(join(parent, name))
            except NotFound:
                self._tree.note_gone(parent, name)
            else:
                if entry.version != node.entry.version and (parent, name) in node.extra_links:
                    self._tree.note_gone(parent, name)
                    raise Stale("the file was replaced on the remote")

    async def _is_same(self, content: Content, entry: Entry) -> bool:
        """Whether the remote's `entry` is the file that is open here, perhaps grown."""
        if entry.version == content.version:
            return True
        if entry.size > content.size and content.capabilities.handles:
            await content.reader.base.revalidate()
        return entry.version == content.version
