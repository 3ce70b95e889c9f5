"""Resumes what an earlier mount had not uploaded: the tree shows it again, the queue uploads it.

Directories on the way to a file are placeholders until somebody asks for them: nothing here needs
the remote. What belongs to no namespace of this mount is stranded: left where the user finds it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
from collections.abc import Iterable, Sequence

import msgspec
import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.content import sums
from hpcfs.content.content import Content
from hpcfs.content.record import Unconfirmed
from hpcfs.content.shared import RemoteFile, Shared
from hpcfs.inodes.tree import Node, Tree, directory_entry
from hpcfs.model import paths
from hpcfs.site.namespace import Namespace
from hpcfs.writeback.journal import Journal
from hpcfs.writeback.queue import UploadQueue

log = logging.getLogger(__name__)


class Recovery:
    """Shows what an earlier mount had not uploaded, and queues it."""

    def __init__(
        self,
        tree: Tree,
        shared: Shared,
        queue: UploadQueue,
        journal: Journal,
        namespaces: Sequence[Namespace],
    ) -> None:
        self._tree = tree
        self._shared = shared
        self._store = shared.store
        self._queue = queue
        self._journal = journal
        self._namespaces = namespaces

    async def restore(self, rows: Iterable[Unconfirmed]) -> int:
        """Show these files again; return how many will be uploaded.

        Raises OSError or sqlite3.Error.
        """
        count = 0
        for row in rows:
            if row.is_stranded:
                continue
            namespace = self.namespace_of(row)
            if namespace is None:
                why = "is not in the configuration any more, or read-only now"
                await self._strand(row, f"its namespace {row.namespace} {why}")
            elif await self._is_sound(row) and await self._restore(row, namespace):
                count += not row.reason
        return count

    async def _is_sound(self, row: Unconfirmed) -> bool:
        """Whether the bytes are those that were closed; if not, they are kept and told of."""
        try:
            damaged = await trio.to_thread.run_sync(sums.damaged_blocks, row)
            reason = f"{damaged} of its blocks were damaged on the local disk" if damaged else ""
        except OSError as error:
            reason = f"its bytes can't be read from the local disk: {error.strerror}"
        if reason:
            advice = "'hpcfs retry' uploads it as it is"
            await self._strand(msgspec.structs.replace(row, sums=b""), f"{reason}; {advice}")
        return not reason

    def namespace_of(self, row: Unconfirmed) -> Namespace | None:
        """Return the namespace that a row can be uploaded to, if there is one."""
        fitting = (n for n in self._namespaces if n.origin == row.origin and not n.read_only)
        return next(fitting, None)

    def find(self, namespace: Namespace, path: bytes) -> Node | None:
        """Return the node of this path, if the mount has one."""
        node = self._root_of(namespace)
        for name in paths.names(path):
            child = self._tree.child(node, name)
            if child is None:
                return None
            node = child
        return node

    def _root_of(self, namespace: Namespace) -> Node:
        return next(n for n in self._tree.root.below() if n.namespace is namespace)

    async def _strand(self, row: Unconfirmed, reason: str) -> None:
        await self._journal.strand(msgspec.structs.replace(row, reason=reason))

    async def _restore(self, row: Unconfirmed, namespace: Namespace) -> bool:
        namespace.knows_capabilities(row.capabilities)
        parent = self._directory(namespace, row)
        name = paths.name(row.path)
        if parent is None or self._tree.child(parent, name) is not None:
            await self._strand(row, "another file that was not uploaded has its name")
            return False
        if row.writing and not row.base_size:
            row = _as_far_as_written(row)
        elif os.stat(row.data).st_size > row.size:  # what is beyond must not come back
            os.truncate(row.data, row.size)
        file = await self._store.resume(
            row.name, row.origin, row.path, row.version, row.size, row.ranges
        )
        # A row that was noted in the middle of a write has the size before it in its entry.
        entry = msgspec.structs.replace(row.entry, size=row.size)
        node = self._tree.add(parent, name, entry, self._tree.now())
        self._resume(node, namespace, row, file)
        return True

    def _resume(self, node: Node, namespace: Namespace, row: Unconfirmed, file: CacheFile) -> None:
        """Give the node a content that is written as far as the row says, and queue it."""
        content = Content(RemoteFile(node, namespace, row.capabilities), file, self._shared)
        content.resume(row)
        node.content = content
        self._queue.resume(content, row.reason)

    def _directory(self, namespace: Namespace, row: Unconfirmed) -> Node | None:
        """Return the node of the file's directory, None if one on the way is something else."""
        node = self._root_of(namespace)
        for name in paths.names(row.path)[:-1]:
            child = self._tree.child(node, name)
            if child is None:
                entry = directory_entry(name, 0o755, row.entry.uid, row.entry.gid, 0)
                child = self._tree.add(node, name, entry, -math.inf)
            if not stat.S_ISDIR(child.entry.mode):
                return None
            node = child
        return node


def _as_far_as_written(row: Unconfirmed) -> Unconfirmed:
    """Return the row with all that is in the cache file, for a file that was still being written
    and of whose old content nothing counts: a program wrote it. lseek(2) tells data from holes."""
    fd = os.open(row.data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = max(row.size, os.fstat(fd).st_size)
        written = RangeSet(row.ranges)
        end = 0
        while (start := _seek(fd, end, os.SEEK_DATA)) is not None:
            end = _seek(fd, start, os.SEEK_HOLE) or size
            written.add(start, end)
    finally:
        os.close(fd)
    return msgspec.structs.replace(row, size=size, ranges=list(written))


def _seek(fd: int, offset: int, whence: int) -> int | None:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return None
        raise
