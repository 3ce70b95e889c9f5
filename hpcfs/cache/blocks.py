"""Which blocks of one file are in its cache file, and their checksums.

They are kept in chunks of CHUNK_BLOCKS, so that a large file costs memory only where it was
touched: 9 KiB for each 64 MiB. Chunks of an earlier mount stay packed (8 bytes per block) until one
is looked at, so that opening a huge file takes no time. Nothing here awaits or does I/O.

A block is *present* when its bytes are in the cache file, *trusted* when this process stored or
verified them (cache/verified_blocks.py remembers that while the file is closed), and *summed* when
its checksum is known. A block of an earlier mount is present and summed, but not trusted until its
checksum was compared (invariant 2).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping

CHUNK_BLOCKS = 1024
SUM_BYTES = 8

_PRESENT = 1
_TRUSTED = 2
_RUN = re.compile(rb"[^\0]+")


class BlockMap:
    """The blocks of one file. Block numbers count from 0; checksums are xxh3_64 values, where 0
    means "unknown"."""

    __slots__ = (
        "_changed",
        "_flags",
        "_packed",
        "_packed_trust",
        "_sums",
        "_unsummed",
        "count",
        "summed",
    )

    def __init__(self) -> None:
        self._flags: dict[int, bytearray] = {}
        self._sums: dict[int, array[int]] = {}
        self._packed: dict[int, bytes] = {}
        """Loaded chunks that were not looked at yet, still packed."""
        self._packed_trust: frozenset[int] = frozenset()
        """Loaded chunks that are trusted."""
        self._changed: set[int] = set()
        self._unsummed: set[int] = set()
        """Chunks that may have present blocks without a checksum."""
        self.count = 0
        """The number of present blocks."""
        self.summed = 0
        """The number of present blocks with a checksum, which the index can remember."""

    def _find(self, number: int) -> bytearray | None:
        """Return the flags of a chunk, or None if it has none."""
        flags = self._flags.get(number)
        if flags is None and number in self._packed:
            return self._unpack(number)
        return flags

    def _unpack(self, number: int) -> bytearray:
        sums = self._sums[number] = unpack_sums(self._packed.pop(number))
        flags = bytearray(map(bool, sums))
        if number in self._packed_trust:
            flags = flags.replace(bytes([_PRESENT]), bytes([_PRESENT | _TRUSTED]))
        self._flags[number] = flags
        return flags

    def _chunk(self, number: int) -> tuple[bytearray, array[int]]:
        flags = self._find(number)
        if flags is None:
            flags = self._flags[number] = bytearray(CHUNK_BLOCKS)
            self._sums[number] = array("Q", bytes(SUM_BYTES * CHUNK_BLOCKS))
        return flags, self._sums[number]

    def is_present(self, block: int) -> bool:
        """Return whether the block's bytes are in the cache file."""
        flags = self._find(block // CHUNK_BLOCKS)
        return flags is not None and flags[block % CHUNK_BLOCKS] != 0

    def is_trusted(self, block: int) -> bool:
        """Return whether the block was stored or verified by this process."""
        flags = self._find(block // CHUNK_BLOCKS)
        return flags is not None and flags[block % CHUNK_BLOCKS] & _TRUSTED != 0

    def are_trusted(self, blocks: range) -> bool:
        """Return whether all of these consecutive blocks are present and trusted."""
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
        """Return the block's checksum, 0 if unknown."""
        if self._find(block // CHUNK_BLOCKS) is None:
            return 0
        return self._sums[block // CHUNK_BLOCKS][block % CHUNK_BLOCKS]

    def put(self, block: int, checksum: int = 0) -> bool:
        """Mark the block present and trusted. Returns whether it was absent before."""
        flags, _ = self._chunk(block // CHUNK_BLOCKS)
        index = block % CHUNK_BLOCKS
        new = flags[index] == 0
        flags[index] = _PRESENT | _TRUSTED
        self.count += new
        self.set_checksum(block, checksum)
        return new

    def trust(self, block: int) -> None:
        """Mark the block trusted, since its checksum was compared."""
        self._chunk(block // CHUNK_BLOCKS)[0][block % CHUNK_BLOCKS] |= _TRUSTED

    def set_checksum(self, block: int, checksum: int) -> None:
        """Set the block's checksum; 0 means unknown."""
        number = block // CHUNK_BLOCKS
        sums = self._chunk(number)[1]
        self.summed += (checksum != 0) - (sums[block % CHUNK_BLOCKS] != 0)
        sums[block % CHUNK_BLOCKS] = checksum
        self._changed.add(number)
        if not checksum:
            self._unsummed.add(number)

    def drop(self, block: int) -> bool:
        """Mark the block absent. Returns whether it was present before."""
        if not self.is_present(block):
            return False
        flags, sums = self._chunk(block // CHUNK_BLOCKS)
        index = block % CHUNK_BLOCKS
        self.summed -= sums[index] != 0
        flags[index] = 0
        sums[index] = 0
        self._changed.add(block // CHUNK_BLOCKS)
        self.count -= 1
        return True

    def present(self, first: int = 0) -> Iterator[int]:
        """Yield the present blocks from `first` on, in order."""
        for run in self.runs(first):
            yield from run

    def runs(
        self, first: int = 0, stop: int | None = None, *, downward: bool = False
    ) -> Iterator[range]:
        """Yield runs of present blocks in [first, stop), none across chunks. Only the chunks on the
        way are unpacked, so that a caller who needs a few blocks of a huge file does not wait for
        all."""
        last = None if stop is None else (stop - 1) // CHUNK_BLOCKS
        numbers = [
            number
            for number in sorted(self._flags.keys() | self._packed.keys(), reverse=downward)
            if number >= first // CHUNK_BLOCKS and (last is None or number <= last)
        ]
        for number in numbers:
            flags = self._find(number)
            if flags is None:
                continue
            base = number * CHUNK_BLOCKS
            end = CHUNK_BLOCKS if stop is None else min(CHUNK_BLOCKS, stop - base)
            found = _RUN.finditer(flags, max(0, first - base), end)
            runs = [range(base + match.start(), base + match.end()) for match in found]
            yield from reversed(runs) if downward else runs

    def unsummed(self) -> list[int]:
        """Return the present blocks without a checksum; a restart would forget them."""
        found: list[int] = []
        for number in sorted(self._unsummed):
            base = number * CHUNK_BLOCKS
            flags, sums = self._chunk(number)
            here = [base + i for i in range(CHUNK_BLOCKS) if flags[i] and not sums[i]]
            if not here:
                self._unsummed.discard(number)
            found += here
        return found

    @property
    def has_changed(self) -> bool:
        """Whether `take_changed` would return anything."""
        return bool(self._changed)

    def take_changed(self) -> dict[int, bytes]:
        """Return the packed checksums of the chunks that changed since the last call; b"" for a
        chunk without blocks."""
        taken = {}
        for number in self._changed:
            if number in self._packed:
                taken[number] = self._packed[number]
                continue
            sums = self._sums.get(number)
            taken[number] = b"" if sums is None else pack_sums(sums)
            if not taken[number] and not any(self._flags.get(number, b"")):
                self._flags.pop(number, None)
                self._sums.pop(number, None)
        self._changed.clear()
        return taken

    def load(self, chunks: Mapping[int, bytes], count: int, trusted: Iterable[int] = ()) -> None:
        """Fill an empty map with chunks from `take_changed` that hold `count` checksums. The blocks
        are present, and those in the chunks of `trusted` are trusted."""
        self._packed.update(chunks)
        self._packed_trust = frozenset(trusted)
        self.count = self.summed = count

    def trusted_chunks(self) -> tuple[int, ...]:
        """Return the chunks whose present blocks are all trusted."""
        looked_at = (number for number, flags in self._flags.items() if _PRESENT not in flags)
        return *looked_at, *(self._packed_trust & self._packed.keys())

    def touch_all(self) -> None:
        """Mark all chunks changed, because the index that had them is gone."""
        self._changed.update(self._flags.keys() | self._packed.keys())

    def touch(self, numbers: Iterable[int]) -> None:
        """Mark these chunks changed again, because what `take_changed` returned was not saved."""
        self._changed.update(numbers)


def pack_sums(sums: array[int]) -> bytes:
    """Pack checksums into 8 bytes each, in native byte order, without the zeros at the end: most
    files are small."""
    packed = sums.tobytes().rstrip(b"\0")
    return packed.ljust(-(-len(packed) // SUM_BYTES) * SUM_BYTES, b"\0")


def unpack_sums(packed: bytes) -> array[int]:
    """Return the checksums of a whole chunk."""
    return array("Q", packed[: SUM_BYTES * CHUNK_BLOCKS].ljust(SUM_BYTES * CHUNK_BLOCKS, b"\0"))
