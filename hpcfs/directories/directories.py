"""Open directories: opendir(3), readdir(3) and rewinddir(3).

What a program is shown is a listing of the remote (lister.py) without the names removed here since,
and after it what the remote did not have yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from hpcfs.directories.lister import DirectoryLister
from hpcfs.directories.listing import Listing, OpenDirectory
from hpcfs.inodes.tree import Node, Tree
from hpcfs.model.entries import Entry
from hpcfs.model.errors import BadHandle, NotADirectory
from hpcfs.prefetch.file_prefetcher import FilePrefetcher

Adopt = Callable[[Node, bytes, Entry, float], Node]
_DOTS = 2
"""Numbers 0 and 1 of a directory are "." and ".."."""


class Directories:
    """The open directories by handle.

    `adopt` returns the node for (directory, name, entry, when the remote was asked);
    `file_prefetcher` hears which directories programs have read.
    """

    def __init__(
        self, tree: Tree, lister: DirectoryLister, adopt: Adopt, file_prefetcher: FilePrefetcher
    ) -> None:
        self._tree = tree
        self._lister = lister
        self._adopt = adopt
        self._on_read = file_prefetcher.listed
        self._open: dict[int, OpenDirectory] = {}
        self._next = 0

    # --- handles ----------------------------------------------------------------------------------

    def open(self, node: Node) -> int:
        """Return a handle for opendir(3); nothing is listed yet. Raises NotADirectory."""
        if not node.is_directory:
            raise NotADirectory("only a directory can be listed")
        self._next += 1
        self._open[self._next] = OpenDirectory(node)
        if node.removals is None:
            node.removals = {}
        return self._next

    def close(self, handle: int) -> None:
        """Give the handle up, and the listing that it reads."""
        opened = self._open.pop(handle)
        opened.release_listing()
        if not any(other.node is opened.node for other in self._open.values()):
            opened.node.removals = None

    def _get(self, handle: int) -> OpenDirectory:
        if handle not in self._open:
            raise BadHandle("no such open directory")
        return self._open[handle]

    async def read(self, handle: int, start: int) -> Iterator[tuple[int, bytes, Node, bool]]:
        """Return an iterator over the entries from number `start` on; 0 lists anew, as rewinddir(3)
        demands: (number of the next entry, name, node, whether the kernel counts a lookup).

        Raises BadHandle, FilesystemError and RemoteError.
        """
        opened = self._get(handle)
        if opened.listing is None or start == 0:
            await self._list(opened)
        assert opened.listing
        if start >= _DOTS:
            await opened.listing.reaches(start - _DOTS)
        return self._entries(opened, start)

    async def _list(self, opened: OpenDirectory) -> None:
        opened.release_listing()
        opened.clock = self._tree.clock
        node = opened.node
        if node.namespace is None:
            opened.listing = self._top(node)
        else:
            opened.listing = await self._lister.list_directory(node, node.namespace)
            if opened.listing.is_complete and self._has_missed(opened):
                opened.listing.release()
                opened.clock = self._tree.clock
                opened.listing = await self._lister.list_directory(node, node.namespace)
            opened.listing.shown = True
        if opened.listing.is_complete:
            opened.local = self._unlisted(opened)

    def _unlisted(self, opened: OpenDirectory) -> list[Node]:
        """Return what the listing may lack; see OpenDirectory.local."""
        assert opened.listing
        changed = opened.listing.changed
        return [
            child
            for child in (opened.node.children or {}).values()
            if (child.content and child.content.may_be_missing) or child.name in changed
        ]

    def _unlisted_at_the_end(self, opened: OpenDirectory) -> list[Node]:
        """Return the same for a listing that was read as it came: without what it showed."""
        assert opened.listing
        found = {child.name: child for child in self._unlisted(opened)}
        if found:
            for _, entry in opened.listing.entries_from(0):
                found.pop(entry.name, None)
        return list(found.values())

    def _has_missed(self, opened: OpenDirectory) -> bool:
        """Whether something came to the remote while it was listed, of which nothing is known here
        any more: the upload of what an earlier mount left, that nobody had asked for."""
        children = opened.node.children or {}
        assert opened.listing
        changed = opened.listing.changed
        return any(name not in children and not self._was_removed(opened, name) for name in changed)

    def _top(self, node: Node) -> Listing:
        """Return a listing of the mount's top: the namespaces."""
        listing = self._lister.new_listing()
        entries = [
            msgspec.structs.replace(child.entry, name=name)
            for name, child in (node.children or {}).items()
        ]
        listing.add_page(msgspec.msgpack.encode(entries))
        listing.end()
        return listing

    # --- entries ----------------------------------------------------------------------------------

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
            child = self._adopt(node, entry.name, entry, listing.asked)
            if opened.local and child in opened.local:  # it is just being uploaded
                opened.shown.add(child)
            yield last + 1, entry.name, child, True
        if not listing.is_complete:
            return
        if opened.local is None:
            opened.local = self._unlisted_at_the_end(opened)
        yield from self._local(opened, max(start, listing.count + _DOTS))
        self._on_read(node)

    def _was_removed(self, opened: OpenDirectory, name: bytes) -> bool:
        removals = opened.node.removals
        return bool(removals) and removals is not None and removals.get(name, 0) > opened.clock

    def _local(self, opened: OpenDirectory, start: int) -> Iterator[tuple[int, bytes, Node, bool]]:
        """Yield what the remote did not have yet when it was asked, numbered after what it
        listed."""
        assert opened.listing
        for number, child in enumerate(opened.local or [], opened.listing.count + _DOTS):
            is_there = child.is_attached and child.parent is opened.node
            if number >= start and is_there and child not in opened.shown:
                yield number + 1, child.name, child, True
