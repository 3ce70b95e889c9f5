"""Taking up what an earlier mount had not uploaded: the tree shows it again, the backlog brings it.

Directories on the way to a file are placeholders until somebody asks for them: nothing here needs
the remote. What belongs to no namespace of this mount is kept where the user finds it.
"""

from __future__ import annotations

import logging
import math
import stat
from collections.abc import Iterable, Sequence

import msgspec

from hpcfs.cache.store import Store
from hpcfs.filesystem.directories import directory_entry
from hpcfs.filesystem.files import Files
from hpcfs.filesystem.namespace import Namespace
from hpcfs.filesystem.tree import Node, Tree
from hpcfs.writeback.journal import Journal, Unconfirmed

log = logging.getLogger(__name__)


class Restoring:
    def __init__(
        self,
        tree: Tree,
        store: Store,
        files: Files,
        journal: Journal,
        namespaces: Sequence[Namespace],
    ) -> None:
        self._tree = tree
        self._store = store
        self._files = files
        self._journal = journal
        self._namespaces = namespaces

    async def restore(self, rows: Iterable[Unconfirmed]) -> int:
        """Returns how many files will be uploaded. Raises OSError or sqlite3.Error."""
        count = 0
        for row in rows:
            if row.is_kept:
                continue
            namespace = self.namespace_of(row)
            if namespace is None:
                why = "is not in the configuration any more, or read-only now"
                await self._keep(row, f"its namespace {row.namespace} {why}")
            elif await self._restore(row, namespace):
                count += not row.reason
        return count

    def namespace_of(self, row: Unconfirmed) -> Namespace | None:
        """Where it can be uploaded to."""
        fitting = (n for n in self._namespaces if n.origin == row.origin and not n.read_only)
        return next(fitting, None)

    def find(self, namespace: Namespace, path: bytes) -> Node | None:
        """The node of this path, if the mount has one."""
        node = self._root_of(namespace)
        for name in path.split(b"/"):
            child = self._tree.child(node, name)
            if child is None:
                return None
            node = child
        return node

    def _root_of(self, namespace: Namespace) -> Node:
        return next(n for n in self._tree.root.below() if n.namespace is namespace)

    async def _keep(self, row: Unconfirmed, reason: str) -> None:
        await self._journal.keep(msgspec.structs.replace(row, reason=reason))

    async def _restore(self, row: Unconfirmed, namespace: Namespace) -> bool:
        namespace.knows_abilities(row.abilities)
        parent = self._directory(namespace, row)
        name = row.path.rpartition(b"/")[2]
        if parent is None or self._tree.child(parent, name) is not None:
            await self._keep(row, "another file that was not uploaded has its name")
            return False
        file = await self._store.take_up(
            row.name, row.origin, row.path, row.version, row.size, row.ranges
        )
        node = self._tree.add(parent, name, row.entry, self._tree.now())
        self._files.take_up(node, namespace, row, file)
        return True

    def _directory(self, namespace: Namespace, row: Unconfirmed) -> Node | None:
        """The node of the file's directory; None where something else has the name of one."""
        node = self._root_of(namespace)
        for name in row.path.split(b"/")[:-1]:
            child = self._tree.child(node, name)
            if child is None:
                entry = directory_entry(name, 0o755, row.entry.uid, row.entry.gid, 0)
                child = self._tree.add(node, name, entry, -math.inf)
            if not stat.S_ISDIR(child.entry.mode):
                return None
            node = child
        return node
