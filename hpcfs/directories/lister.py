"""Lists directories: for programs, ahead of tree walks, and for names asked for in turn.

A listing is asked for when a program reads a directory from its beginning, unless it was listed
ahead (listing_prefetcher.py). For a second it also answers lookups (listing_cache.py), and where
names in a directory are asked for one after another (lookup_rate.py) it is listed for that, in the
background. Names that the mount changes are noted in the listings that were asked for before.
While a namespace is away, the last listing of a directory stands in (last_listings.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from hpcfs.directories.last_listings import LastListings
from hpcfs.directories.listing import Listing
from hpcfs.directories.listing_cache import ListingCache
from hpcfs.directories.listing_prefetcher import Flight, ListingPrefetcher
from hpcfs.directories.lookup_rate import SLOW_SECONDS, LookupRate
from hpcfs.directories.walk_predictor import WalkPredictor
from hpcfs.inodes.tree import Node, Tree, number_of
from hpcfs.model.entries import Entry
from hpcfs.model.errors import FilesystemError, RemoteError, TimedOut
from hpcfs.prefetch.file_prefetcher import FilePrefetcher
from hpcfs.site.namespace import Namespace
from hpcfs.site.tasks import Tasks

log = logging.getLogger(__name__)

AS_IT_COMES_SECONDS = 2.0
"""A listing that takes longer is read as it comes: a program that waits for the kernel's answer
can't be interrupted."""
LISTING_SECONDS = 600.0
"""For all of one."""
_MAX_RENEWALS = 4
"""Background listings under way at once, beside those of walks."""


class DirectoryLister:
    """Owns the listings of one mount, complete or under way.

    `spool_directory` takes listings too long for memory, as far as `spool` has room for that many
    bytes (listing.py); `file_prefetcher` is told the files of directories that are listed ahead.
    """

    def __init__(
        self,
        tree: Tree,
        file_prefetcher: FilePrefetcher,
        spool_directory: str,
        spool: Callable[[int], bool],
        nursery: Tasks,
    ) -> None:
        self._tree = tree
        self._spool_directory = spool_directory
        self._spool = spool
        self._nursery = nursery
        self._ahead = ListingPrefetcher(
            self.new_listing, number_of, tree.now, file_prefetcher.listed_ahead, nursery
        )
        self._cache = ListingCache()
        self._last = LastListings()
        self._rate = LookupRate()
        self._under_way: dict[Node, list[Listing]] = {}
        """Listings that have a node and are not complete: changes made here are noted in them."""
        self._renewals = 0
        tree.watch_names(self._changed)
        tree.watch_forgotten(self._last.forgotten)

    def new_listing(self) -> Listing:
        """Return an empty listing, asked for now."""
        return Listing(self._spool_directory, self._tree.now(), self._spool)

    # --- for programs that read a directory -------------------------------------------------------

    async def list_directory(self, node: Node, namespace: Namespace) -> Listing:
        """Return the listing that was made ahead, or a new one; a long one is still being filled.
        While the namespace is away, it is the last one.

        Raises RemoteError and FilesystemError.
        """
        if node.parent is not None:
            self._note_use(node.parent)  # a walk will look up the next one there
        if unshown := self._cache.unshown(node, self._tree.now()):
            return unshown
        walk, flight = self._ahead.opened(namespace, node.path)
        listing = flight.listing if flight else self.new_listing()
        listing.scope = flight.scope if flight else trio.CancelScope()
        self._nursery.start_soon(self._fill, node, namespace, listing, walk, flight)
        try:
            await listing.over_or_long(AS_IT_COMES_SECONDS)
        except BaseException:
            listing.give_up()
            raise
        if listing.error is not None:
            listing.release()
            return self._last_or_raise(node, namespace, listing.error)
        return listing

    def _last_or_raise(
        self, node: Node, namespace: Namespace, error: RemoteError | FilesystemError
    ) -> Listing:
        listing = self.new_listing()
        if not namespace.absence_explains(error) or not self._last.fill(node, listing):
            raise error
        log.debug("%r is shown as it was: %s", node.path, error.message)
        return listing

    async def _fill(
        self,
        node: Node,
        namespace: Namespace,
        listing: Listing,
        walk: WalkPredictor,
        flight: Flight | None,
    ) -> None:
        """Fill a listing until it is complete, or the program that reads it has closed the
        directory."""
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
        """Note that a directory was made here: only what is made here, too, is in it."""
        listing = self.new_listing()
        listing.is_guess = True
        listing.end()
        self._cache.put(node, listing, self._tree.now())
        self._last.put(node, listing)

    def removed(self, parent: Node, name: bytes) -> None:
        """Note that the mount removed a name, or gave what had it another one."""
        self._last.removed(parent, name)

    def moved(self, namespace: Namespace, old: bytes, new: bytes) -> None:
        """Note that the mount renamed a directory, from one path to another."""
        self._last.moved(namespace, old, new)

    def _is_complete(self, node: Node, listing: Listing) -> None:
        listing.end()
        now = self._tree.now()
        self._cache.put(node, listing, now)
        self._last.put(node, listing)
        self._rate.listed(node, listing, now)

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
        """Note a change of this name, or of the attributes of what has it; with `below`, of what is
        below it, too."""
        self._cache.changed(parent, name)
        self._last.changed(parent, name)
        for listing in self._under_way.get(parent, ()):
            listing.changed.add(name)
        if self._ahead.flights and parent.namespace:
            self._ahead.changed(parent.namespace, parent.path, name, below=below)

    # --- what listings tell of names --------------------------------------------------------------

    def find(self, parent: Node, name: bytes) -> tuple[float, Entry | None] | None:
        """Return what the remote said of this name a moment ago: (when it was asked, the entry or
        None if there is no such name). None where no listing can tell: then ask the remote.

        Call it when a name is wanted for which its node can't answer: names that are asked for one
        after another make the directory be listed in the background, for those that follow.
        """
        now = self._tree.now()
        found = self._cache.find(parent, name, now)
        if found is None and self._take_ahead(parent):
            found = self._cache.find(parent, name, now)
        self._note_use(parent)
        return found

    def last_seen(self, parent: Node, name: bytes) -> tuple[float, Entry | None] | None:
        """Return what the last listing told of this name, however old it is: see `find`."""
        return self._last.find(parent, name)

    def _take_ahead(self, node: Node) -> bool:
        """Take the listing that was made ahead of a program that asks for names in one directory
        after the other; return whether there was one."""
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
        if self._rate.note(directory, now):
            is_step = self._rate.begin(directory, now)
            self._renewals += 1
            self._nursery.start_soon(self._renew, directory, namespace, is_step)

    async def _renew(self, node: Node, namespace: Namespace, is_step: bool) -> None:
        """List a directory because names in it are asked for.

        A first time, this is a step of a walk.
        """
        path, moves = node.path, self._tree.moves
        walk, flight = self._ahead.opened(namespace, path) if is_step else (None, None)
        listing = flight.listing if flight else self.new_listing()
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
            self._rate.failed(node, self._tree.now())
            if flight:
                flight.give_up()
        listing.release()
