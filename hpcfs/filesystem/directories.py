"""Open directories: opendir(3), readdir(3), rewinddir(3)."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator

import msgspec

from hpcfs.filesystem.errors import BadHandle, NotDirectory
from hpcfs.filesystem.listing import DirectoryListing, OpenDirectory
from hpcfs.filesystem.tree import Node, Tree
from hpcfs.transfer.messages import Entry

Adopt = Callable[[Node, bytes, Entry, float], Node]
_DOTS = 2
"""Numbers 0 and 1 of a directory are "." and ".."."""


class Directories:
    """`spool_directory` takes listings too long for memory; `adopt` makes nodes of entries."""

    def __init__(self, tree: Tree, adopt: Adopt, spool_directory: str) -> None:
        self._tree = tree
        self._adopt = adopt
        self._spool_directory = spool_directory
        self._open: dict[int, OpenDirectory] = {}
        self._next = 0

    def open(self, node: Node) -> int:
        if not node.is_directory:
            raise NotDirectory("only a directory can be listed")
        self._next += 1
        self._open[self._next] = OpenDirectory(node)
        if node.removals is None:
            node.removals = {}
        return self._next

    def close(self, handle: int) -> None:
        opened = self._open.pop(handle)
        opened.close_listing()
        if not any(other.node is opened.node for other in self._open.values()):
            opened.node.removals = None

    def _get(self, handle: int) -> OpenDirectory:
        if handle not in self._open:
            raise BadHandle("no such open directory")
        return self._open[handle]

    async def read(self, handle: int, start: int) -> Iterator[tuple[int, bytes, Node, bool]]:
        """(number of the next entry, name, node, whether the kernel counts a lookup), from number
        `start` on. 0 lists anew, as rewinddir(3) demands."""
        opened = self._get(handle)
        if opened.listing is None or start == 0:
            await self._list(opened)
        return self._entries(opened, start)

    async def _list(self, opened: OpenDirectory) -> None:
        opened.close_listing()
        opened.asked = self._tree.now()
        opened.clock = self._tree.clock
        listing = DirectoryListing(self._spool_directory)
        node = opened.node
        try:
            if node.namespace is None:
                entries = [
                    msgspec.structs.replace(child.entry, name=name)
                    for name, child in (node.children or {}).items()
                ]
                listing.add_page(msgspec.msgpack.encode(entries))
            else:
                await node.namespace.list_pages(node.path, listing.add_page)
            listing.check_complete()
        except BaseException:
            listing.close()
            raise
        opened.listing = listing

    def _entries(
        self, opened: OpenDirectory, start: int
    ) -> Iterator[tuple[int, bytes, Node, bool]]:
        node, listing = opened.node, opened.listing
        assert listing
        for number, (name, dot) in enumerate([(b".", node), (b"..", node.parent or node)]):
            if start <= number:
                yield number + 1, name, dot, False
        last = _DOTS - 1
        for number, entry in listing.entries_from(max(0, start - _DOTS)):
            last = number + _DOTS
            if self._was_removed(opened, entry.name):
                continue
            child = self._adopt(node, entry.name, entry, opened.asked)
            yield last + 1, entry.name, child, True
        yield from self._local(opened, max(start, listing.count + _DOTS))

    def _was_removed(self, opened: OpenDirectory, name: bytes) -> bool:
        removals = opened.node.removals
        return bool(removals) and removals is not None and removals.get(name, 0) > opened.clock

    def _local(self, opened: OpenDirectory, start: int) -> Iterator[tuple[int, bytes, Node, bool]]:
        """Files that the remote does not have yet, numbered after what it listed."""
        listing = opened.listing
        assert listing
        first = listing.count + _DOTS
        if opened.local is None:
            children = (opened.node.children or {}).values()
            opened.local = [child for child in children if child.content and child.content.new]
        for number, child in enumerate(opened.local, first):
            if number >= start and child.is_attached and child.parent is opened.node:
                yield number + 1, child.name, child, True


def directory_entry(name: bytes, mode: int, uid: int, gid: int, mtime_ns: int) -> Entry:
    """A directory that no remote described."""
    return Entry(name, stat.S_IFDIR | mode, 0, mtime_ns, mtime_ns, uid, gid)
