"""Cache files in memory, for times in which the disk is slower than the remote, or full.

A file that is only read may leave the disk at any moment: it continues, empty, in an anonymous file
in memory (memfd_create(2)) under the same descriptor, and blocks fetched later are stored there.
The index keeps its record of the blocks on the disk. The worker process opens the file through
/proc, with its name, since descriptor numbers are reused. All such files together hold at most
MAX_BYTES. The oldest blocks are evicted first; they lie behind the readers, since less than that is
prefetched ahead of them (fetcher.PREFETCH_BYTES).

The index never learns of such a file. Data that is to be uploaded, kept or pinned must be on the
disk: before any of a file becomes dirty, the file moves back (`to_disk`), empty again. A move loses
nothing: all blocks that it drops were clean.
"""

from __future__ import annotations

import os
import secrets
from collections import deque

from hpcfs.cache.file import CacheFile
from hpcfs.cache.registry import Registry
from hpcfs.cache.slow_disk import SlowDisk
from hpcfs.model.entries import BLOCK_BYTES, IN_MEMORY
from hpcfs.model.errors import CacheFull

MAX_BYTES = 64 * 1024 * 1024
MAX_FILES = 32
"""Files in memory at once; others stay on the disk. The blocks that a reader waits for, and those
prefetched, must still be there when the last of them has arrived."""


class MemoryFiles:
    """The files of one cache that are in memory, and the decision whether more may follow."""

    def __init__(self, registry: Registry, max_bytes: int = MAX_BYTES) -> None:
        self._registry = registry
        self.max_bytes = max_bytes
        self.slow_disk = SlowDisk()
        self.is_usable = True
        """False once the worker process failed to open such a file."""
        self._files: list[CacheFile] = []
        self._arrived: deque[tuple[CacheFile, range]] = deque()
        self._blocks = 0
        """The number of blocks in `_arrived`."""
        self.abandoned: list[str] = []
        """Names of the files on the disk that were left for memory: the index may know them, or
        not."""

    def to_memory(self, file: CacheFile) -> bool:
        """Move a file into memory, if its data is clean; return whether it moved. Does not
        await."""
        must_stay = file.pins or file.pinned or file.dirty or not file.indexed
        if file.in_memory or must_stay or not self.is_usable:
            return False
        self._files = [other for other in self._files if other.in_memory and other.users]
        if len(self._files) >= MAX_FILES:
            return False
        self._files.append(file)
        name = secrets.token_hex(12)
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        self._registry.record_cache.invalidate(file.origin, file.key)
        self.abandoned.append(file.name)
        self._move(file, fd, name, f"{IN_MEMORY}{name}", in_memory=True)
        return True

    def create(self, origin: str, key: bytes, version: bytes, size: int) -> CacheFile:
        """Return a new, empty file in memory, where the disk takes none. Raises CacheFull where
        there are too many."""
        self._files = [other for other in self._files if other.in_memory and other.users]
        if len(self._files) >= MAX_FILES or not self.is_usable:
            raise CacheFull(f"the cache's disk takes no files, and {MAX_FILES} are in memory")
        name = secrets.token_hex(12)
        file = CacheFile(f"{IN_MEMORY}{name}", name, origin, key, version, size)
        self._files.append(file)
        self._registry.files[name] = file
        return file

    def to_disk(self, file: CacheFile) -> None:
        """Move a file back to the disk. Does not await. Raises OSError where that has no room for
        it."""
        name = secrets.token_hex(12)
        path = self._registry.path(name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._move(file, fd, name, path, in_memory=False)

    def _move(self, file: CacheFile, fd: int, name: str, path: str, *, in_memory: bool) -> None:
        del self._registry.files[file.name]
        self._registry.rows.pop(file.name, None)
        file.move(fd, name, path, in_memory=in_memory)
        self._registry.files[name] = file

    def arrived(self, file: CacheFile, offset: int, length: int) -> None:
        """Note that these blocks are about to be present in a file in memory; the oldest blocks
        make room."""
        blocks = range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES))
        self._arrived.append((file, blocks))
        self._blocks += len(blocks)
        while self._blocks * BLOCK_BYTES > self.max_bytes and len(self._arrived) > 1:
            oldest, gone = self._arrived.popleft()
            self._blocks -= len(gone)
            if oldest.in_memory and oldest.fd >= 0:
                oldest.evict(gone)
