"""Which blocks of idle files this mount itself stored or verified: whoever opens such a file again
need not compare their checksums once more.

Kept in memory only, so that nothing outlives the mount (invariant 2), and by chunk (blocks.py): one
counts if all that is present of it was trusted when the file was closed. A file that was touched
since it was closed, as its change time and length tell, is not trusted at all: also if it was
touched by an eviction that left a part of it.
"""

from __future__ import annotations

import os
from collections import OrderedDict

from hpcfs.cache.file import CacheFile

MAX_CHUNKS = 32768
"""Of all files together, and no fewer than there are files: up to 300 bytes each. That many small
files, or 2 TiB of large ones; what was closed first is verified again."""


class VerifiedBlocks:
    """By the names of cache files, which are never used again. Nothing here awaits."""

    def __init__(self, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._files: OrderedDict[str, tuple[_Stamp, tuple[int, ...]]] = OrderedDict()
        """When the file was changed last, and its trusted chunks."""
        self._chunks = 0

    def remember(self, file: CacheFile) -> None:
        """The file is about to be closed, and the index has been told all of it."""
        self.forget(file.name)
        self.put_back(file.name, (_stamp(os.fstat(file.fd)), file.blocks.trusted_chunks()))

    def put_back(self, name: str, known: tuple[_Stamp | None, tuple[int, ...]]) -> None:
        """`known` is what `forget` returned, and it is true again."""
        stamp, chunks = known
        if stamp is None or not chunks:
            return
        self._files[name] = stamp, chunks
        self._chunks += len(chunks)
        while self._chunks > self._max_chunks:
            _, (_, oldest) = self._files.popitem(last=False)
            self._chunks -= len(oldest)

    def take(self, name: str, now: os.stat_result) -> tuple[int, ...]:
        """The trusted chunks of a file that is opened, and is as `now` says."""
        stamp, chunks = self.forget(name)
        return chunks if stamp == _stamp(now) else ()

    def forget(self, name: str) -> tuple[_Stamp | None, tuple[int, ...]]:
        """Nothing of the file is trusted any more; returns what was known of it."""
        found = self._files.pop(name, None)
        if found is None:
            return None, ()
        self._chunks -= len(found[1])
        return found


_Stamp = tuple[int, int]


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_ctime_ns, found.st_size
