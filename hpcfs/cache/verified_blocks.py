"""Remembers which blocks of idle files this mount stored or verified itself.

When such a file is opened again, the checksums of these blocks need not be compared once more. The
memory is in RAM only, so that nothing outlives the mount (invariant 2), and counts chunks
(blocks.py): a chunk is remembered if all its present blocks were trusted when the file was closed.
A file that was changed since it was closed, as its change time and length show, is not trusted at
all; that includes a change by an eviction that left a part of it.
"""

from __future__ import annotations

import os
from collections import OrderedDict

from hpcfs.cache.file import CacheFile

MAX_CHUNKS = 32768
"""Chunks of all files together, and no fewer than one per file: up to 300 bytes each. That is
enough for that many small files, or 2 TiB of large ones; beyond it the file that was closed first
is verified again."""


class VerifiedBlocks:
    """Trusted chunks by the names of cache files, which are never reused. Nothing here awaits."""

    def __init__(self, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._files: OrderedDict[str, tuple[_Stamp, tuple[int, ...]]] = OrderedDict()
        """By name: the file's stamp when it was closed, and its trusted chunks."""
        self._chunks = 0

    def remember(self, file: CacheFile) -> None:
        """Remember a file that is about to be closed, and whose state the index has completely."""
        self.forget(file.name)
        self.put_back(file.name, (_stamp(os.fstat(file.fd)), file.blocks.trusted_chunks()))

    def put_back(self, name: str, known: tuple[_Stamp | None, tuple[int, ...]]) -> None:
        """Remember again what `forget` returned, since it is true again."""
        stamp, chunks = known
        if stamp is None or not chunks:
            return
        self._files[name] = stamp, chunks
        self._chunks += len(chunks)
        while self._chunks > self._max_chunks:
            _, (_, oldest) = self._files.popitem(last=False)
            self._chunks -= len(oldest)

    def take(self, name: str, now: os.stat_result) -> tuple[int, ...]:
        """Return the trusted chunks of a file that is being opened and has the status `now`."""
        stamp, chunks = self.forget(name)
        return chunks if stamp == _stamp(now) else ()

    def forget(self, name: str) -> tuple[_Stamp | None, tuple[int, ...]]:
        """Trust nothing of the file any more; return what was remembered."""
        found = self._files.pop(name, None)
        if found is None:
            return None, ()
        self._chunks -= len(found[1])
        return found


_Stamp = tuple[int, int]


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_ctime_ns, found.st_size
