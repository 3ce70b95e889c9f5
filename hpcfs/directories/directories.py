"""Open directories: opendir(3), readdir(3), rewinddir(3); and what their listings tell of names.

A listing is asked for when a program reads a directory from its beginning, unless it was listed
ahead (ahead.py). For a second it also answers lookups (known.py), and where names in a directory
are asked for one after another it is listed for that, in the background.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

from hpcfs.directories.listing import Listing, OpenDirectory
from hpcfs.directories.listing_cache import ListingCache
from hpcfs.directories.listing_prefetcher import Flight, ListingPrefetcher
from hpcfs.directories.lookup_rate import SLOW_SECONDS, LookupRate
from hpcfs.directories.walk_predictor import WalkPredictor
from hpcfs.inodes.tree import Node, Tree, number_of
from hpcfs.model.entries import Entry
from hpcfs.model.errors import BadHandle, FilesystemError, NotADirectory, RemoteError, TimedOut
from hpcfs.prefetch.file_prefetcher import FilePrefetcher
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)

Adopt = Callable[[Node, bytes, Entry, float], Node]
_DOTS = 2
"""Numbers 0 and 1 of a directory are "." and ".."."""
AS_IT_COMES_SECONDS = 2.0
"""A listing that takes longer is read as it comes: a program that waits for the kernel's answer
can't be interrupted."""
LISTING_SECONDS = 600.0
"""For all of one."""
_MAX_RENEWALS = 4
"""Background listings under way at once, beside those of walks."""


class Directories:
    """`spool_directory` takes listings too long for memory, as far as `spool` has room for them
    (listing.py); `adopt` makes nodes of entries; `file_prefetcher` hears of what programs have
    listed, and of what they will come to."""

    def __init__(
        self,
        tree: Tree,
        adopt: Adopt,
        file_prefetcher: FilePrefetcher,
        spool_directory: str,
        spool: Callable[[int], bool],
        nursery: trio.Nursery,
    ) -> None:
        self._tree = tree
        self._adopt = adopt
        self._on_read = file_prefetcher.listed
        self._spool_directory = spool_directory
        self._spool = spool
        self._nursery = nursery
        self._open: dict[int, OpenDirectory] = {}
        self._next = 0
        self._ahead = ListingPrefetcher(
            self._new_listing, number_of, lambda: tree.now(), file_prefetcher.listed_ahead, nursery
        )
        self._known = ListingCache()
        self._uses = LookupRate()
        self._under_way: dict[Node, list[Listing]] = {}
        """Listings that have a node and are not complete: changes made here are noted in them."""
        self._renewals = 0
        tree.on_change = self._changed

    def _new_listing(self) -> Listing:
        return Listing(self._spool_directory, self._tree.now(), self._spool)

    # --- handles ----------------------------------------------------------------------------------

    def open(self, node: Node) -> int:
        if not node.is_directory:
            raise NotADirectory("only a directory can be listed")
        self._next += 1
        self._open[self._next] = OpenDirectory(node)
        if node.removals is None:
            node.removals = {}
        return self._next

    def close(self, handle: int) -> None:
        opened = self._open.pop(handle)
        opened.release_listing()
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
            opened.listing = await self._list_remote(node, node.namespace)
            if opened.listing.is_complete and self._has_missed(opened):
                opened.listing.release()
                opened.clock = self._tree.clock
                opened.listing = await self._list_remote(node, node.namespace)
            opened.listing.shown = True
        if opened.listing.is_complete:
            opened.local = self._unlisted(opened)

    def _unlisted(self, opened: OpenDirectory) -> list[Node]:
        """What the listing may lack; see OpenDirectory.local."""
        assert opened.listing
        changed = opened.listing.changed
        return [
            child
            for child in (opened.node.children or {}).values()
            if (child.content and child.content.may_be_missing) or child.name in changed
        ]

    def _unlisted_at_the_end(self, opened: OpenDirectory) -> list[Node]:
        """The same of a listing that was read as it came: without what it showed already."""
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
        """The mount's top: the namespaces."""
        listing = self._new_listing()
        entries = [
            msgspec.structs.replace(child.entry, name=name)
            for name, child in (node.children or {}).items()
        ]
        listing.add_page(msgspec.msgpack.encode(entries))
        listing.end()
        return listing

    # --- listings ---------------------------------------------------------------------------------

    async def _list_remote(self, node: Node, namespace: Namespace) -> Listing:
        """The one that was made ahead, or a new one; a long one is still being filled."""
        if node.parent is not None:
            self._note_use(node.parent)  # a walk will look up the next one there
        if unshown := self._known.unshown(node, self._tree.now()):
            return unshown
        walk, flight = self._ahead.opened(namespace, node.path)
        listing = flight.listing if flight else self._new_listing()
        listing.scope = flight.scope if flight else trio.CancelScope()
        self._nursery.start_soon(self._fill, node, namespace, listing, walk, flight)
        try:
            await listing.over_or_long(AS_IT_COMES_SECONDS)
        except BaseException:
            listing.give_up()
            raise
        if listing.error is not None:
            listing.release()
            raise listing.error
        return listing

    async def _fill(
        self,
        node: Node,
        namespace: Namespace,
        listing: Listing,
        walk: WalkPredictor,
        flight: Flight | None,
    ) -> None:
        """Until it is complete, or the program that reads it has closed the directory."""
        path, moves = node.path, self._tree.moves
        assert listing.scope
        try:
            with self._noting_changes(node, listing), trio.move_on_after(LISTING_SECONDS):
                if flight:
                    await flight.result()
                else:
                    with listing.scope:
                        await namespace.list_pages(path, listing.add_page)
                listing.check_complete()
                if not listing.scope.cancel_called:
                    listing.end()
        except (RemoteError, FilesystemError) as error:
            listing.end(error)
        finally:
            self._ahead.closed(walk)
            if not listing.is_over:
                listing.scope.cancel()
                listing.end(TimedOut(f"a listing took more than {LISTING_SECONDS:g} s"))
        if listing.is_complete and self._tree.moves == moves:
            self._ahead.listed(namespace, path, walk, listing)
            self._is_complete(node, listing)

    def made(self, node: Node) -> None:
        """The directory was just made here: nothing is in it but what is made here too."""
        listing = self._new_listing()
        listing.is_guess = True
        listing.end()
        self._known.put(node, listing, self._tree.now())

    def _is_complete(self, node: Node, listing: Listing) -> None:
        listing.end()
        now = self._tree.now()
        self._known.put(node, listing, now)
        self._uses.listed(node, listing, now)

    @contextmanager
    def _noting_changes(self, node: Node, listing: Listing) -> Iterator[None]:
        under_way = self._under_way.setdefault(node, [])
        under_way.append(listing)
        try:
            yield
        finally:
            under_way.remove(listing)
            if not under_way:
                self._under_way.pop(node, None)

    def _changed(self, parent: Node, name: bytes, below: bool) -> None:
        """The mount changed this name, or the attributes of what has it; with `below`, also what is
        below it may be another."""
        self._known.changed(parent, name)
        for listing in self._under_way.get(parent, ()):
            listing.changed.add(name)
        if self._ahead and parent.namespace:
            self._ahead.changed(parent.namespace, parent.path, name, below=below)

    # --- what listings tell of names --------------------------------------------------------------

    def find(self, parent: Node, name: bytes) -> tuple[float, Entry | None] | None:
        """What the remote said of this name a moment ago: (when it was asked, the entry or None if
        there is no such name). None where no listing can tell: then ask the remote.

        Call it when a name is wanted for which its node can't answer: names that are asked for one
        after another make the directory be listed in the background, for those that follow.
        """
        now = self._tree.now()
        found = self._known.find(parent, name, now)
        if found is None and self._take_ahead(parent):
            found = self._known.find(parent, name, now)
        self._note_use(parent)
        return found

    def was_missing(self, parent: Node, name: bytes) -> bool:
        """Whether the last listing of this directory, however old, did not have the name; kept for
        remotes that sleep only."""
        return self._known.was_missing(parent, name)

    def _take_ahead(self, node: Node) -> bool:
        """A program that asks for names in one directory after the other walks too: whether this
        one was listed ahead of it."""
        namespace, path = node.namespace, node.path
        if namespace is None or not self._ahead.is_ready(namespace, path):
            return False
        walk, flight = self._ahead.opened(namespace, path)
        self._ahead.closed(walk)
        assert flight
        self._ahead.listed(namespace, path, walk, flight.listing)
        self._is_complete(node, flight.listing)
        return True

    def _note_use(self, directory: Node) -> None:
        namespace = directory.namespace
        if namespace is None or self._renewals >= _MAX_RENEWALS:
            return
        now = self._tree.now()
        if self._uses.note(directory, now):
            is_step = self._uses.begin(directory, now)
            self._renewals += 1
            self._nursery.start_soon(self._renew, directory, namespace, is_step)

    async def _renew(self, node: Node, namespace: Namespace, is_step: bool) -> None:
        """List a directory because names in it are asked for. A first time, this is a step of a
        walk."""
        path, moves = node.path, self._tree.moves
        walk, flight = self._ahead.opened(namespace, path) if is_step else (None, None)
        listing = flight.listing if flight else self._new_listing()
        is_complete = False

        def add_page(page: bytes) -> None:
            if not scope.cancel_called:
                listing.add_page(page)
            if not listing.is_small:
                scope.cancel()

        try:
            with self._noting_changes(node, listing), trio.move_on_after(SLOW_SECONDS) as scope:
                if flight:
                    await flight.result()
                else:
                    await namespace.list_pages(path, add_page)
                    listing.check_complete()
                is_complete = self._tree.moves == moves
        except (RemoteError, FilesystemError) as error:
            log.debug("listing %r in the background: %s", path, error)
        finally:
            self._renewals -= 1
            if walk:
                self._ahead.closed(walk)
        if is_complete:
            self._is_complete(node, listing)
            if walk:
                self._ahead.listed(namespace, path, walk, listing)
        else:
            self._uses.failed(node, self._tree.now())
            if flight:
                flight.give_up()
        listing.release()

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
        """What the remote did not have yet when it was asked, numbered after what it listed."""
        assert opened.listing
        for number, child in enumerate(opened.local or [], opened.listing.count + _DOTS):
            is_there = child.is_attached and child.parent is opened.node
            if number >= start and is_there and child not in opened.shown:
                yield number + 1, child.name, child, True


def directory_entry(name: bytes, mode: int, uid: int, gid: int, mtime_ns: int) -> Entry:
    """A directory that no remote described."""
    return Entry(name, stat.S_IFDIR | mode, 0, mtime_ns, mtime_ns, uid, gid)
