"""One cache file: a sparse local file that holds blocks of one version of a remote file.

Owns the descriptor, the block map and the dirty ranges. Nothing here awaits, so callers can make
sections without an await, which are atomic and need no lock. Reads of bytes in the page cache never
block; other reads are reported (`read_now` returns None), so that the caller can use a thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from itertools import groupby

import xxhash

from hpcfs.cache.blocks import BlockMap
from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import BLOCK_BYTES, IN_MEMORY

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)


_ALWAYS_POSSIBLE_BYTES = 1 << 40
"""Every file system allows files of 1 TiB."""


class CacheFile:
    """A cache file. `origin` and `key` name the remote file, `version` the version of its content.

    `size` is the file's length in bytes as the mount shows it; the local file may be shorter where
    its end was never fetched.
    """

    __slots__ = (
        "blocks",
        "changes",
        "dirty",
        "evictions",
        "fd",
        "in_memory",
        "indexed",
        "key",
        "last_used",
        "name",
        "name_in_doubt",
        "origin",
        "path",
        "pinned",
        "pins",
        "reading_at",
        "replacements",
        "size",
        "users",
        "version",
        "written_sums",
    )

    def __init__(
        self, path: str, name: str, origin: str, key: bytes, version: bytes, size: int
    ) -> None:
        self.path = path
        self.name = name
        self.origin = origin
        self.key = key
        self.version = version
        self.size = size
        self.blocks = BlockMap()
        self.dirty = RangeSet()
        self.changes = 0
        """Counts the writes and resizes: checksums that were computed during one are of no use."""
        self.written_sums: dict[int, int] = {}
        """Checksums of dirty blocks, as far as they were computed since the last write to them."""
        self.users = 0
        self.evictions = 0
        """The number of evictions: a read in a thread during one may have found a hole."""
        self.pins = 0
        """The number of uploads that read the file; while it is not 0, no block may be evicted."""
        self.pinned = False
        """Whether the user pinned it: then it is not evicted either."""
        self.reading_at = 0
        """The last read position in bytes: eviction begins far from there."""
        self.indexed = True
        """Whether the index may remember it: False once it holds data that no remote has."""
        self.in_memory = path.startswith(IN_MEMORY)
        """Whether it is an anonymous file in memory (memory_files.py) and not one on the disk."""
        self.name_in_doubt = False
        """Whether its path may lead to another file, or to none, since something removed its name:
        renewal.py finds out, and mends it."""
        self.replacements = 0
        """The number of copies that took its place: a fetch during one may have stored its bytes in
        the former file."""
        self.last_used = 0.0
        if self.in_memory:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        else:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def cached_bytes(self) -> int:
        """The bytes that it occupies in the cache."""
        return max(self.dirty.total, min(self.blocks.count * BLOCK_BYTES, self.size))

    def close(self) -> None:
        """Close the descriptor; further calls do nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def move(self, fd: int, name: str, path: str, *, in_memory: bool) -> None:
        """Continue in another file, which is empty. The descriptor's number stays: a read in a
        thread finds either file behind it, and `evictions` tells its caller to read again."""
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        self.name, self.path, self.in_memory = name, path, in_memory
        self.name_in_doubt = False
        self.evictions += 1
        self.blocks = BlockMap()
        self.written_sums.clear()

    def doubt_name(self) -> None:
        """Note that the path may lead to no file, or to another: renewal.py finds out."""
        self.name_in_doubt = True

    def replace(self, fd: int) -> None:
        """Continue in another file with the same bytes, to which `path` leads."""
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)
        self.name_in_doubt = False
        self.replacements += 1

    def read_now(self, offset: int, length: int) -> bytes | bytearray | None:
        """Return the bytes, or None where the disk must be waited for. Bytes past the local end are
        zeros."""
        buffer = bytearray(length)
        try:
            count = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # tmpfs before Linux 6.6: memory, never waits
                raise
            return self.read(offset, length)
        if count < length and not self._is_local_end(offset + count):
            return None
        return buffer  # not copied to bytes: every read of the kernel comes here

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes; may wait for the disk."""
        parts = []
        while length > 0:
            part = os.pread(self.fd, length, offset)
            if not part:
                parts.append(bytes(length))
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _is_local_end(self, offset: int) -> bool:
        return offset >= os.fstat(self.fd).st_size

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`, without marking it present or dirty.

        Raises OSError (ENOSPC, EDQUOT, EFBIG) where the cache's disk is full or refuses.
        """
        self._note_change(offset // BLOCK_BYTES, -(-(offset + len(data)) // BLOCK_BYTES))
        view = memoryview(data)
        while view:
            count = os.pwrite(self.fd, view, offset)
            view = view[count:]
            offset += count

    def _note_change(self, first: int, stop: int | None = None) -> None:
        """Forget the checksums of dirty blocks from `first` to `stop`, or to the last one."""
        self.changes += 1
        if self.written_sums:
            end = stop if stop is not None else max(self.written_sums) + 1
            for block in range(first, end):
                self.written_sums.pop(block, None)

    def mark_written(self, offset: int, end: int) -> None:
        """Mark [offset, end) as written by a program: present, dirty, checksums unknown."""
        self.dirty.add(offset, end)
        for block in range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            self.blocks.put(block)

    def resize(self, size: int) -> None:
        """Change the file's length. Bytes cut off are forgotten, bytes added read as zeros.

        Raises OSError (EFBIG) where the cache's file system has no files that large.
        """
        if size > max(self.size, _ALWAYS_POSSIBLE_BYTES):
            os.ftruncate(self.fd, size)
        self._note_change(min(self.size, size) // BLOCK_BYTES)
        old, self.size = self.size, size
        if size < old:
            os.ftruncate(self.fd, size)
            self.dirty.remove(size, old)
            for block in list(self.blocks.present(-(-size // BLOCK_BYTES))):
                self.blocks.drop(block)
        self._forget_checksum_at(min(old, size))

    def _forget_checksum_at(self, end: int) -> None:
        """Handle the block at the file's end, whose length has changed. If its old checksum was not
        compared yet it can't be trusted any more: it is evicted, and fetched again."""
        block = end // BLOCK_BYTES
        if not end % BLOCK_BYTES or not self.blocks.is_present(block):
            return
        if self.blocks.is_trusted(block):
            self.blocks.put(block)
        else:
            self.evict([block])

    def block_length(self, block: int) -> int:
        """Return the block's length in bytes, which is shorter at the end of the file."""
        return max(0, min(BLOCK_BYTES, self.size - block * BLOCK_BYTES))

    def compute_checksums(self, blocks: list[int]) -> list[int]:
        """Read the blocks and return their checksums; may wait for the disk, so call it in a
        thread."""
        return [self.compute_checksum(block) for block in blocks]

    def checksums_now(self, blocks: list[int]) -> list[int] | None:
        """Return the checksums of a few blocks, or None where the disk must be waited for."""
        found = []
        for block in blocks:
            data = self.read_now(block * BLOCK_BYTES, self.block_length(block))
            if data is None:
                return None
            found.append(checksum(data))
        return found

    def compute_checksum(self, block: int) -> int:
        """Read the block and return its checksum; may wait for the disk, so call it in a thread."""
        return checksum(self.read(block * BLOCK_BYTES, self.block_length(block)))

    def evict(self, blocks: Iterable[int]) -> None:
        """Return the blocks' space to the disk. The caller chose clean ones."""
        self.evictions += 1
        present = [block for block in blocks if self.blocks.drop(block)]
        for block in present if self.written_sums else ():
            self.written_sums.pop(block, None)
        for _, run in groupby(enumerate(present), key=lambda pair: pair[1] - pair[0]):
            numbers = [block for _, block in run]
            self._punch(numbers[0] * BLOCK_BYTES, len(numbers) * BLOCK_BYTES)

    def discard(self, block: int) -> None:
        """Evict a clean block whose content is in doubt, whether it counts as present or not."""
        self.blocks.put(block)
        self.evict([block])

    def _punch(self, offset: int, length: int) -> None:
        mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        failed = _libc.fallocate(
            self.fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)
        )
        code = ctypes.get_errno() if failed else 0
        if code and code != errno.EOPNOTSUPP:  # this file system has no holes: the bytes stay
            raise OSError(code, os.strerror(code), self.path)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """Return xxh3_64 of the data (github.com/Cyan4973/xxHash), but never 0, which means "unknown"
    in a BlockMap."""
    return xxhash.xxh3_64_intdigest(data) or 1
