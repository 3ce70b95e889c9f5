"""Which blocks of one file are in its cache file, and their checksums.

Kept in chunks of CHUNK_BLOCKS, so that a large file costs memory only where it was touched: 9 KiB
for each 256 MiB. Nothing here awaits or does I/O.

A block is *present* when its bytes are in the cache file, *trusted* when they were put there or
verified by this process, and *summed* when its checksum is known. What survives a restart is
present and summed but not trusted until its checksum was compared (invariant 2).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

CHUNK_BLOCKS = 1024

_PRESENT = 1
_TRUSTED = 2


class BlockMap:
    """Block numbers count from 0; checksums are xxh3_64 values, 0 meaning "not known"."""

    __slots__ = ("_changed", "_flags", "_sums", "count")

    def __init__(self) -> None:
        self._flags: dict[int, bytearray] = {}
        self._sums: dict[int, array[int]] = {}
        self._changed: set[int] = set()
        self.count = 0
        """Present blocks."""

    def _chunk(self, number: int) -> tuple[bytearray, array[int]]:
        flags = self._flags.get(number)
        if flags is None:
            flags = self._flags[number] = bytearray(CHUNK_BLOCKS)
            self._sums[number] = array("Q", bytes(8 * CHUNK_BLOCKS))
        return flags, self._sums[number]

    def is_present(self, block: int) -> bool:
        flags = self._flags.get(block // CHUNK_BLOCKS)
        return flags is not None and flags[block % CHUNK_BLOCKS] != 0

    def is_trusted(self, block: int) -> bool:
        flags = self._flags.get(block // CHUNK_BLOCKS)
        return flags is not None and flags[block % CHUNK_BLOCKS] & _TRUSTED != 0

    def are_trusted(self, blocks: range) -> bool:
        """Whether all of these (consecutive) are present and trusted."""
        start, stop = blocks.start, blocks.stop
        while start < stop:
            number, first = divmod(start, CHUNK_BLOCKS)
            last = min(CHUNK_BLOCKS, first + stop - start)
            flags = self._flags.get(number)
            if flags is None or flags.count(_PRESENT | _TRUSTED, first, last) != last - first:
                return False
            start += last - first
        return True

    def checksum(self, block: int) -> int:
        sums = self._sums.get(block // CHUNK_BLOCKS)
        return 0 if sums is None else sums[block % CHUNK_BLOCKS]

    def put(self, block: int, checksum: int = 0) -> bool:
        """The block's bytes are in the cache file now. True if they were not before."""
        flags, sums = self._chunk(block // CHUNK_BLOCKS)
        index = block % CHUNK_BLOCKS
        new = flags[index] == 0
        flags[index] = _PRESENT | _TRUSTED
        sums[index] = checksum
        self._changed.add(block // CHUNK_BLOCKS)
        self.count += new
        return new

    def trust(self, block: int) -> None:
        """The block's checksum was compared."""
        self._chunk(block // CHUNK_BLOCKS)[0][block % CHUNK_BLOCKS] |= _TRUSTED

    def set_checksum(self, block: int, checksum: int) -> None:
        self._chunk(block // CHUNK_BLOCKS)[1][block % CHUNK_BLOCKS] = checksum
        self._changed.add(block // CHUNK_BLOCKS)

    def drop(self, block: int) -> bool:
        """The block's bytes are gone. True if they were there."""
        if not self.is_present(block):
            return False
        flags, sums = self._chunk(block // CHUNK_BLOCKS)
        flags[block % CHUNK_BLOCKS] = 0
        sums[block % CHUNK_BLOCKS] = 0
        self._changed.add(block // CHUNK_BLOCKS)
        self.count -= 1
        return True

    def present(self, first: int = 0) -> Iterator[int]:
        """Present blocks from `first` on, in order."""
        for number in sorted(self._flags):
            flags = self._flags[number]
            base = number * CHUNK_BLOCKS
            for index in range(max(0, first - base), CHUNK_BLOCKS):
                if flags[index]:
                    yield base + index

    def unsummed(self) -> list[int]:
        """Present blocks without a checksum; a restart would forget them."""
        return [block for block in self.present() if not self.checksum(block)]

    def take_changed(self) -> dict[int, bytes]:
        """Checksums (8 bytes each, native order) of the chunks changed since the last call."""
        taken = {number: self._sums[number].tobytes() for number in self._changed}
        self._changed.clear()
        return taken

    def load(self, number: int, checksums: bytes) -> None:
        """What `take_changed` once gave: present, not trusted."""
        flags, _ = self._chunk(number)
        sums = array("Q", checksums)
        self._sums[number] = sums
        for index, checksum in enumerate(sums):
            if checksum:
                flags[index] = _PRESENT
                self.count += 1

    def touch_all(self) -> None:
        """Every chunk counts as changed: the index row they belonged to is gone."""
        self._changed.update(self._flags)
