"""A directory as it was listed once, and the handles that opendir(3) gave out.

A listing has bounds: entries, and what its file takes of the cache's size. A long one can be read
before it is complete, so that a program that reads it can be interrupted.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO

import msgspec
import trio

from hpcfs.inodes.tree import Node
from hpcfs.model.entries import LIST_MAX_ENTRIES, Entry
from hpcfs.model.errors import CacheFull, FilesystemError, RemoteError, TooLarge

log = logging.getLogger(__name__)

MEMORY_BYTES = 2 * 1024 * 1024
"""Some 20,000 entries: what is longer goes to a file, and is not remembered after it was read."""
MAX_SUBDIRECTORIES = 10_000
"""A directory with more is walked without looking ahead."""
_entries = msgspec.msgpack.Decoder(list[Entry])


class Listing:
    """The entries of a directory, numbered from 0, asked for at `asked` (Tree.now).

    Pages stay encoded, beyond MEMORY_BYTES in a temporary file in the cache directory: memory does
    not grow with the directory (invariant 5). `spool` is told how many bytes go to that file, or
    leave it, and says whether there is room (cache/store.py).
    """

    def __init__(
        self, directory: str, asked: float, spool: Callable[[int], bool] = lambda length: True
    ) -> None:
        self.asked = asked
        self.scope: trio.CancelScope | None = None
        """Cancels what fills it, if that was begun for a reader of the directory."""
        self.is_complete = False
        self.error: RemoteError | FilesystemError | None = None
        """Why it ended before it was complete."""
        self._spool_bytes = spool
        self._spooled = 0
        self._progress = trio.Event()
        self.count = 0
        """Entries listed so far."""
        self.changed: set[bytes] = set()
        """Names that were changed here since it was asked for: it does not speak for these."""
        self.is_guess = False
        """The remote was not asked: the directory was just made here."""
        self.shown = False
        """A program has read it; the next one wants a newer one."""
        self._subdirectories: list[bytes] = []
        self._directory = directory
        self._size = 0
        self._pages: list[tuple[int, int, int]] = []
        """(number of the first entry, offset, length)"""
        self._memory: list[bytes] = []
        """The pages, until there is a file."""
        self._file: IO[bytes] | None = None
        self._failure: RemoteError | FilesystemError | None = None
        self._decoded = -1
        self._entries: list[Entry] = []
        self._index: dict[bytes, Entry] | None = None

    # --- filling ----------------------------------------------------------------------------------

    def add_page(self, page: bytes) -> None:
        """Add a MessagePack list[Entry].

        The task that receives for all calls it: it raises nothing, and `check_complete` tells what
        the disk did not take.
        """
        if self._failure is not None or self.is_over:
            return
        try:
            self._add(page)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("a listing could not be stored: %s", error)
            text = "the directory's listing could not be stored in the cache directory"
            self._failure = CacheFull(text)
        except (CacheFull, TooLarge) as error:
            self._failure = error
        if self._failure is not None and self.scope is not None:
            self.scope.cancel()
        self._note_progress()

    def check_complete(self) -> None:
        """Raise CacheFull or TooLarge if a page is missing. Call it after the last page."""
        if self._failure is not None:
            raise self._failure

    def _add(self, page: bytes) -> None:
        entries = _entries.decode(page)
        if not entries:
            return
        if self.count + len(entries) > LIST_MAX_ENTRIES:
            raise TooLarge(f"the directory has more than {LIST_MAX_ENTRIES:,} names")
        if self._size + len(page) > MEMORY_BYTES:
            self._spill([*self._memory, page])
        else:
            self._memory.append(page)
        self._pages.append((self.count, self._size, len(page)))
        self._size += len(page)
        if not self.count:  # most directories are one page, which is read next
            self._decoded, self._entries = 0, entries
        self.count += len(entries)
        if len(self._subdirectories) <= MAX_SUBDIRECTORIES:
            self._subdirectories += [e.name for e in entries if stat.S_ISDIR(e.mode)]

    def _spill(self, pages: list[bytes]) -> None:
        """Write the pages in memory and one more to the file.

        Where that fails nothing has changed but a file's end that no page is in.
        """
        length = sum(map(len, pages))
        if not self._spool_bytes(length):
            raise CacheFull("the cache has no room for so long a listing: raise cache_size")
        self._spooled += length
        file = self._file or TemporaryFile(dir=self._directory)  # noqa: SIM115 - for `release`
        try:
            file.seek(self._size - sum(map(len, self._memory)))
            file.writelines(pages)
        except OSError:
            if self._file is None:
                file.close()
            raise
        self._file = file
        self._memory.clear()

    # --- while it is filled -----------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self.is_complete or self.error is not None

    def end(self, error: RemoteError | FilesystemError | None = None) -> None:
        """Nothing more comes: it is complete, or `error` ended it before."""
        self.is_complete, self.error = error is None, error
        self._note_progress()

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def over_or_long(self, seconds: float) -> None:
        """Return once it is over, or so long (in bytes or seconds) that it is to be read as it
        comes."""
        with trio.move_on_after(seconds):
            while not self.is_over and self.is_small:
                await self._progress.wait()

    async def reaches(self, number: int) -> None:
        """Return once this entry is there, or there is none. Raises what ended it before."""
        while self.count <= number and not self.is_over:
            await self._progress.wait()
        if self.count <= number and self.error is not None:
            raise self.error

    @property
    def walkable(self) -> list[bytes]:
        """Subdirectories in the order listed; none if they are too many."""
        names = self._subdirectories
        return names if len(names) <= MAX_SUBDIRECTORIES else []

    @property
    def size(self) -> int:
        """Bytes of the pages, as they came."""
        return self._size

    @property
    def is_small(self) -> bool:
        """Whether it is in memory."""
        return self._size <= MEMORY_BYTES

    # --- reading ----------------------------------------------------------------------------------

    def entries_from(self, number: int) -> Iterator[tuple[int, Entry]]:
        """Yield (number, entry) from this number on, as far as they have come."""
        for index, (first, _, _) in enumerate(self._pages):
            following = self._pages[index + 1][0] if index + 1 < len(self._pages) else self.count
            if number >= following:
                continue
            entries = self._page(index)
            for position in range(max(0, number - first), len(entries)):
                yield first + position, entries[position]

    def _page(self, index: int) -> list[Entry]:
        if self._decoded != index:
            self._entries = _entries.decode(self._encoded(index))
            self._decoded = index
        return self._entries

    def _encoded(self, index: int) -> bytes:
        if self._file is None:
            return self._memory[index]
        _, offset, length = self._pages[index]
        self._file.seek(offset)
        return self._file.read(length)

    @property
    def pages(self) -> Sequence[bytes]:
        """The pages of a small listing, each a MessagePack list[Entry]."""
        return self._memory

    def find(self, name: bytes) -> Entry | None:
        """Return the entry of a name. The first call decodes all of a small listing."""
        if self._index is None:
            self._index = {entry.name: entry for _, entry in self.entries_from(0)}
            self.release()
        return self._index.get(name)

    @property
    def has_index(self) -> bool:
        """Whether `find` has decoded it."""
        return self._index is not None

    def drop_index(self) -> None:
        """Give up the memory that `find` took; it decodes again."""
        self._index = None

    def release(self) -> None:
        """Free the file and the decoded page; a small listing can be read again."""
        self._decoded, self._entries = -1, []
        if self._file:
            self._file.close()
        if self._spooled:
            self._spool_bytes(-self._spooled)
            self._spooled = 0

    def give_up(self) -> None:
        """Cancel what fills it, and release it."""
        if not self.is_over:
            self.end(CacheFull("the listing was given up"))
            if self.scope is not None:
                self.scope.cancel()
        self.release()


@dataclass(eq=False)
class OpenDirectory:
    """A directory handle; the listing is taken at the first read and again after a rewind."""

    node: Node
    listing: Listing | None = None
    clock: int = 0
    """Tree.clock when the listing was taken: later removals are not shown."""

    local: list[Node] | None = None
    """When the listing was complete: files that the remote lacked, and what was changed here since
    it was asked, as it may have come too late for that. Shown after what was listed, once."""

    shown: set[Node] = field(default_factory=set)
    """Those of them that were listed."""

    def release_listing(self) -> None:
        """Give the listing up, if there is one."""
        self.local = None
        self.shown.clear()
        if self.listing:
            self.listing.give_up()
            self.listing = None
