"""Checksums of the bytes that a row of the journal stands for: one for each dirty block.

They are xxh3_64 (cache/file.py, `checksum`), 8 bytes each, little-endian, for the blocks of a row's
ranges in order; 0 stands for one that is not known, and none at all for a row without any.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping

from hpcfs.cache.file import checksum
from hpcfs.content.record import Unconfirmed
from hpcfs.model.entries import BLOCK_BYTES


def blocks_in(ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Yield the numbers of the blocks in these (start, end) ranges of whole blocks."""
    for start, end in ranges:
        yield from range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))


def pack(ranges: Iterable[tuple[int, int]], known: Mapping[int, int]) -> bytes:
    """Pack the checksums of the blocks in these ranges; b"" where none is known."""
    if not known:
        return b""
    sums = array("Q", (known.get(block, 0) for block in blocks_in(ranges)))
    if not any(sums):
        return b""
    if sys.byteorder == "big":
        sums.byteswap()
    return sums.tobytes()


def unpack(row: Unconfirmed) -> dict[int, int]:
    """Return the known checksums of a row by block."""
    if len(row.sums) % 8:
        return {}
    sums = array("Q", row.sums)
    if sys.byteorder == "big":
        sums.byteswap()
    pairs = zip(blocks_in(row.ranges), sums, strict=False)
    return {block: one for block, one in pairs if one}


def damaged_blocks(row: Unconfirmed) -> int:
    """Read the row's bytes and return how many blocks are not what was written. May take long, so
    call it in a thread. Raises OSError."""
    known = unpack(row)
    if not known:
        return 0
    fd = os.open(row.data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sum(_sum(fd, block, row.size) != one for block, one in known.items())
    finally:
        os.close(fd)


def _sum(fd: int, block: int, size: int) -> int:
    """Bytes that the local file does not have are zeros, as when they are read."""
    length = max(0, min(BLOCK_BYTES, size - block * BLOCK_BYTES))
    return checksum(os.pread(fd, length, block * BLOCK_BYTES).ljust(length, b"\0"))
