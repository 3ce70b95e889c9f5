"""The last listing of each directory: what is believed while a namespace is away. No I/O, no clock.

Directories go by path, since the kernel may forget them meanwhile. What the mount changes is noted:
a name that it removed is free, and one that it made and the kernel has forgotten is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from hpcfs.directories.listing import Listing
from hpcfs.directories.listing_cache import UNLISTED_NAMES
from hpcfs.inodes.tree import Node
from hpcfs.model import paths
from hpcfs.model.entries import Entry
from hpcfs.site.namespace import Namespace

MAX_BYTES = 16 * 1024 * 1024
"""What is kept takes so much at most: some 100,000 entries in 10,000 directories."""
MAX_CHANGES = 10_000
"""Names that may be changed in a directory before its listing is forgotten."""
MAX_INDEXED = 40_000
"""Entries of listings that were decoded to find names in them, some 500 bytes each."""
_OVERHEAD = 512
"""Bytes of a listing without entries."""
_CHANGE_BYTES = 100
_ENTRY_BYTES = 300
"""Of the name, and of the entry, of something that was changed."""
_entries = msgspec.msgpack.Decoder(list[Entry])

_Key = tuple[Namespace, bytes]


@dataclass(slots=True)
class _Last:
    """A listing, asked for at `asked` (Tree.now). `changed` are names that were changed here since;
    `since` tells what became of those that the tree does not know: None for removed."""

    asked: float
    pages: Sequence[bytes]
    count: int
    changed: set[bytes]
    since: dict[bytes, Entry | None] = field(default_factory=dict)
    index: dict[bytes, Entry] | None = None

    @property
    def size(self) -> int:
        changes = len(self.changed) * _CHANGE_BYTES + len(self.since) * _ENTRY_BYTES
        return _OVERHEAD + sum(map(len, self.pages)) + changes

    def entries(self) -> Iterator[Entry]:
        for page in self.pages:
            yield from _entries.decode(page)


class LastListings:
    """Keeps the last complete listing of each directory; of many, those that came last."""

    def __init__(self) -> None:
        self._listings: OrderedDict[_Key, _Last] = OrderedDict()
        """By namespace and path, in the order in which they came."""
        self._size = 0
        self._indexed: OrderedDict[_Key, int] = OrderedDict()
        """The number of entries of those that have an index."""

    def put(self, node: Node, listing: Listing) -> None:
        """Keep a listing that is complete, unless it is too long for memory or a newer is here."""
        key = _key(node)
        known = self._get(node)
        if key is None or (known is not None and known.asked > listing.asked):
            return
        self._forget(key)
        if listing.is_small:
            changed, children = set(listing.changed), node.children or {}
            last = _Last(listing.asked, tuple(listing.pages), listing.count, changed)
            last.since = dict.fromkeys(changed - children.keys())  # removed while it was listed
            self._add(key, last)
        self._bound()

    def find(self, node: Node, name: bytes) -> tuple[float, Entry | None] | None:
        """Return (when it was asked, the entry or None for no such name), as it was last listed.

        Returns None if no listing can tell.
        """
        last, key = self._get(node), _key(node)
        if last is None or key is None:
            return None
        if name in last.since:
            return last.asked, last.since[name]
        if name in UNLISTED_NAMES:
            return None
        if last.index is None:
            self._make_room(last.count)
            last.index = {entry.name: entry for entry in last.entries()}
            self._indexed[key] = last.count
        return last.asked, last.index.get(name)

    def fill(self, node: Node, listing: Listing) -> bool:
        """Complete an empty listing with the last one and what changed here since; return False if
        there is none. Raises CacheFull and TooLarge."""
        last = self._get(node)
        if last is None:
            return False
        listed = {entry.name: entry for entry in last.entries()} | last.since
        entries = [entry for entry in listed.values() if entry is not None]
        listing.add_page(msgspec.msgpack.encode(entries))
        listing.check_complete()
        listing.asked = last.asked
        listing.changed |= last.changed
        listing.end()
        return True

    # --- what is changed here ---------------------------------------------------------------------

    def changed(self, node: Node, name: bytes) -> None:
        """Note that the mount changes a name in a directory, or the attributes of what has it."""
        key, last = _key(node), self._get(node)
        if key is None or last is None:
            return
        self._size -= last.size
        last.changed.add(name)
        self._size += last.size
        if len(last.changed) > MAX_CHANGES:
            self._forget(key)
        self._bound()

    def removed(self, node: Node, name: bytes) -> None:
        """Note that the mount removed a name, or gave what had it another one."""
        if last := self._get(node):
            self._became(last, name, None)

    def forgotten(self, node: Node, name: bytes, entry: Entry) -> None:
        """Note that the kernel forgets a name that is still there."""
        last = self._get(node)
        if last is not None and name in last.changed:
            self._became(last, name, msgspec.structs.replace(entry, name=name))

    def moved(self, namespace: Namespace, old: bytes, new: bytes) -> None:
        """Note that a directory was renamed, from one path to another."""
        for key in list(self._listings):
            if key[0] is namespace and paths.is_below(key[1], old):
                last = self._listings[key]
                self._forget(key)
                to = namespace, new + key[1][len(old) :]
                self._forget(to)
                self._add(to, last)

    # --- inside -----------------------------------------------------------------------------------

    def _get(self, node: Node) -> _Last | None:
        key = _key(node) if self._listings else None
        return None if key is None else self._listings.get(key)

    def _add(self, key: _Key, last: _Last) -> None:
        self._listings[key] = last
        self._size += last.size

    def _became(self, last: _Last, name: bytes, entry: Entry | None) -> None:
        self._size -= last.size
        last.since[name] = entry
        self._size += last.size
        self._bound()

    def _bound(self) -> None:
        while self._size > MAX_BYTES:
            self._forget(next(iter(self._listings)))

    def _forget(self, key: _Key) -> None:
        if last := self._listings.pop(key, None):
            self._size -= last.size
            self._drop_index(key, last)

    def _drop_index(self, key: _Key, last: _Last) -> None:
        last.index = None
        self._indexed.pop(key, None)

    def _make_room(self, count: int) -> None:
        while self._indexed and sum(self._indexed.values()) + count > MAX_INDEXED:
            key = next(iter(self._indexed))
            self._drop_index(key, self._listings[key])


def _key(node: Node) -> _Key | None:
    """The namespace and path of a directory; None of the mount's top, and of one that is gone."""
    if node.namespace is None or not node.is_attached:
        return None
    return node.namespace, node.path
