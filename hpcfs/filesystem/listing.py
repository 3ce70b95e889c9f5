"""A directory as it was listed, and the handles that opendir(3) gave out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile

import msgspec

from hpcfs.filesystem.errors import CacheFull
from hpcfs.filesystem.tree import Node
from hpcfs.transfer.messages import Entry

log = logging.getLogger(__name__)

_SPOOL_BYTES = 1024 * 1024
_entries = msgspec.msgpack.Decoder(list[Entry])


class DirectoryListing:
    """A directory as it was listed once, in pages as they came.

    Pages stay encoded, beyond a megabyte in a temporary file in the cache directory: memory does
    not grow with the directory (invariant 5). Entries are numbered from 0.
    """

    def __init__(self, directory: str) -> None:
        self._spool = SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=directory)  # noqa: SIM115
        self._pages: list[tuple[int, int, int]] = []
        """(number of the first entry, offset, length)"""
        self.count = 0
        """Entries listed so far."""
        self._failed = False
        self._decoded = -1
        self._entries: list[Entry] = []

    def add_page(self, page: bytes) -> None:
        """A MessagePack list[Entry]. Called by the task that receives for all: raises nothing, and
        what the disk did not take is for `check_complete` to tell."""
        try:
            self._add(page)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("a listing could not be stored: %s", error)
            self._failed = True

    def check_complete(self) -> None:
        """Call after the last page."""
        if self._failed:
            raise CacheFull("the directory's listing could not be stored in the cache directory")

    def _add(self, page: bytes) -> None:
        count = len(_entries.decode(page))
        if count:
            self._spool.seek(0, os.SEEK_END)
            self._pages.append((self.count, self._spool.tell(), len(page)))
            self._spool.write(page)
            self.count += count

    def entries_from(self, number: int) -> Iterator[tuple[int, Entry]]:
        for index, (first, _, _) in enumerate(self._pages):
            following = self._pages[index + 1][0] if index + 1 < len(self._pages) else self.count
            if number >= following:
                continue
            entries = self._page(index)
            for position in range(max(0, number - first), len(entries)):
                yield first + position, entries[position]

    def _page(self, index: int) -> list[Entry]:
        if self._decoded != index:
            _, offset, length = self._pages[index]
            self._spool.seek(offset)
            self._entries = _entries.decode(self._spool.read(length))
            self._decoded = index
        return self._entries

    def close(self) -> None:
        self._spool.close()


@dataclass(eq=False)
class OpenDirectory:
    """A directory handle; the listing is taken at the first read and again after a rewind."""

    node: Node
    listing: DirectoryListing | None = None
    asked: float = 0.0
    clock: int = 0
    """Tree.clock when the listing was asked for: later removals are not shown."""

    local: list[Node] | None = None
    """Files that the remote lacks, to be shown after what it listed."""

    def close_listing(self) -> None:
        self.local = None
        if self.listing:
            self.listing.close()
            self.listing = None
