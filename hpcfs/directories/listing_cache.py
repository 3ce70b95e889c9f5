"""Names and attributes as recent listings tell them. No I/O, no clock.

A complete listing that is at most a second old says which names there are, with their attributes.
Which there are not it tells only to programs that are about to create them (create_predictor.py):
others may have made one since.
"""

from __future__ import annotations

from collections import OrderedDict

from hpcfs.directories.listing import Listing
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, Node
from hpcfs.model.entries import Entry

MAX_BYTES = 16 * 1024 * 1024
"""Encoded listings that are kept: some 200,000 entries."""
MAX_INDEXED = 40_000
"""Entries of listings that were decoded to find names in them, some 500 bytes each."""
MAX_OLD_BYTES = 4 * 1024 * 1024
"""Encoded listings of laptops, kept for when the laptop is away."""
GUESS_SECONDS = 5.0
"""For so long a directory that was made here counts as empty while a program fills it: rsync makes
directories some time before. A program that creates a file there which others have just created is
told so: the remote creates only new files."""
UNLISTED_NAMES = frozenset({b".snapshot", b".snapshots", b".zfs", b".ckpt"})
"""Directories that file servers have and do not list."""


class ListingCache:
    """Keeps the last listings of directories for as long as they are believed."""

    def __init__(self) -> None:
        self._listings: OrderedDict[Node, Listing] = OrderedDict()
        """In the order in which they came."""
        self._size = 0
        self._old: OrderedDict[Node, Listing] = OrderedDict()
        self._old_size = 0

    def __len__(self) -> int:
        return len(self._listings)

    def put(self, node: Node, listing: Listing, now: float) -> None:
        """Keep a listing that is complete."""
        known = self._listings.get(node)
        if known is not None and known.asked > listing.asked:
            return
        self._remove(node)
        self.expire(now)
        if not listing.is_small:
            return
        self._listings[node] = listing
        self._size += listing.size
        while self._size > MAX_BYTES:
            self._remove(next(iter(self._listings)))

    def expire(self, now: float) -> None:
        """Drop what is not believed any more at `now`, or keep it as an old listing of a laptop."""
        while self._listings:
            node, listing = next(iter(self._listings.items()))
            if now - listing.asked <= _lifetime(listing):
                return
            self._grow_old(node)

    def _grow_old(self, node: Node) -> None:
        listing = self._listings[node]
        self._remove(node)
        if node.namespace is None or not node.namespace.sleeps or listing.is_guess:
            return
        self._forget_old(node)
        self._old[node] = listing
        self._old_size += listing.size
        while self._old_size > MAX_OLD_BYTES:
            self._forget_old(next(iter(self._old)))

    def _forget_old(self, node: Node) -> None:
        if listing := self._old.pop(node, None):
            self._old_size -= listing.size
            listing.drop_index()

    def was_missing(self, node: Node, name: bytes) -> bool:
        """Whether the last listing, however old, did not have the name."""
        listing = self._listings.get(node) or self._old.get(node)
        if listing is None or name in listing.changed or name in UNLISTED_NAMES:
            return False
        if listing.is_guess:
            return False
        if not listing.has_index:
            self._make_room(listing.count)
        return listing.find(name) is None

    def changed(self, node: Node, name: bytes) -> None:
        """Note that the directory's listing does not speak for that name any more."""
        for listing in (self._listings.get(node), self._old.get(node)):
            if listing is not None:
                listing.changed.add(name)

    def find(self, node: Node, name: bytes, now: float) -> tuple[float, Entry | None] | None:
        """Return (when it was asked, the entry or None for no such name).

        Returns None if no listing can tell.
        """
        listing = self._listings.get(node)
        if listing is None or name in listing.changed or name in UNLISTED_NAMES:
            return None
        if now - listing.asked > _lifetime(listing):
            self._grow_old(node)
            return None
        if not listing.has_index:
            self._make_room(listing.count)
        return listing.asked, listing.find(name)

    def unshown(self, node: Node, now: float) -> Listing | None:
        """Return a listing that no program has read yet, if it still says how the directory is."""
        listing = self._listings.get(node)
        if listing is None or listing.shown or listing.changed or listing.is_guess:
            return None
        return listing if now - listing.asked <= ATTRIBUTE_SECONDS else None

    def _make_room(self, count: int) -> None:
        indexed = [one for one in self._listings.values() if one.has_index]
        total = sum(one.count for one in indexed)
        for listing in indexed:
            if total + count <= MAX_INDEXED:
                return
            listing.drop_index()
            total -= listing.count

    def _remove(self, node: Node) -> None:
        if listing := self._listings.pop(node, None):
            self._size -= listing.size
            listing.drop_index()


def _lifetime(listing: Listing) -> float:
    return GUESS_SECONDS if listing.is_guess else ATTRIBUTE_SECONDS
