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
        """Drop what is not believed any more at `now`."""
        while self._listings:
            node, listing = next(iter(self._listings.items()))
            if now - listing.asked <= _lifetime(listing):
                return
            self._remove(node)

    def changed(self, node: Node, name: bytes) -> None:
        """Note that the directory's listing does not speak for that name any more."""
        if listing := self._listings.get(node):
            listing.changed.add(name)

    def find(self, node: Node, name: bytes, now: float) -> tuple[float, Entry | None] | None:
        """Return (when it was asked, the entry or None for no such name).

        Returns None if no listing can tell.
        """
        listing = self._listings.get(node)
        if listing is None or name in listing.changed or name in UNLISTED_NAMES:
            return None
        if now - listing.asked > _lifetime(listing):
            self._remove(node)
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
