"""Recognises a file that an earlier attempt of the same upload left, or left half done.

The caller repeats an upload whose answer it never had, with the version that it was made on; what
the server has by then may be all of it, or a part. SFTP has no place for a mark, so it is
recognised by itself, which also works after this process was killed:

- its size and time are those that the upload ends with;
- or it is empty, of an upload that leaves nothing of the old content: there is nothing to lose;
- or samples of its bytes are the upload's. Requests are treated in order, so an attempt is a
  beginning of what it was to write; what is beyond the old content may also be zeros, where a write
  failed and a later one did not. Of ranges within the old content all must be there; or some, where
  this process remembers that it had begun.

A file that is taken for ours is written again, all of it. The limits: content that was changed
between two attempts of which a killed process made the first, and an overwriting of old content
that a killed process left half done, are taken for somebody else's, which costs a Conflict and no
data. A file of somebody else's is taken for ours if it has the same size and second, or is a
beginning of ours. An upload that replaces leaves nothing half done, so only its end is recognised.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import asyncssh
from asyncssh import SFTPAttrs
from asyncssh.constants import FXF_READ

from hpcfs.model.errors import NotFound, PermissionDenied
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.remotes.base import UploadSource
from hpcfs.remotes.sftp.attrs import NANOSECONDS
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.session import SftpSession, all_of

SAMPLES = 32
SAMPLE_BYTES = 256
REMEMBERED = 256
"""Uploads under way or failed: 2 MiB at most."""

Sample = tuple[int, bytes]
"""Offset and bytes."""


@dataclass(frozen=True)
class UploadAttempt:
    """An upload, as much of it as is needed to recognise it. `base_version` is None where any
    version will do; `grown_from` is where the old content ends."""

    base_version: bytes | None
    base_size: int = 0
    grown_from: int = 0
    size: int | None = None
    mtime: int | None = None
    samples: tuple[Sample, ...] = ()
    """In the order of writing."""

    @classmethod
    def of(
        cls, request: UploadRequest, source: UploadSource, *, checked: bool = True
    ) -> UploadAttempt:
        """Describe an upload; where not `checked`, any version may be replaced."""
        wanted = request.attributes.mtime_ns
        return cls(
            request.base_version if checked else None,
            request.base_size,
            _size_of(request.base_version) if request.base_size else 0,
            request.size,
            None if wanted is None else wanted // NANOSECONDS,
            () if request.replace else tuple(_samples(request.ranges, source)),
        )

    @classmethod
    def of_piece(
        cls, request: UploadPieceRequest, source: UploadSource, *, checked: bool = True
    ) -> UploadAttempt:
        """Describe the upload that begins with this piece."""
        return cls(
            request.base_version if checked else None,
            samples=tuple(_samples([(0, source.size)], source)),
        )

    def is_empty(self, attrs: SFTPAttrs) -> bool:
        """Return whether the file is empty and nothing of its old content counts."""
        return not attrs.size and not self.base_size

    def is_final(self, attrs: SFTPAttrs) -> bool:
        """Return whether the file has the size and time that the upload ends with."""
        return (attrs.size, attrs.mtime) == (self.size, self.mtime)

    def may_be(self, attrs: SFTPAttrs) -> bool:
        """Return whether a look at its bytes is worth while."""
        size = attrs.size or 0
        return self.size is None or self.base_size <= size <= max(self.size, self.base_size)

    def is_begun(self, found: Sequence[bytes], *, remembered: bool) -> bool:
        """`found` are the bytes at the samples' places, shorter where the file ends."""
        inside = [
            there == ours
            for (at, ours), there in zip(self.samples, found, strict=True)
            if at < self.grown_from
        ]
        beyond = [
            not there.strip(b"\0") or ours.startswith(there)
            for (at, ours), there in zip(self.samples, found, strict=True)
            if at >= self.grown_from
        ]
        pairs = zip(self.samples, found, strict=True)
        if not all(beyond) or not any(
            there and ours.startswith(there) for (_, ours), there in pairs
        ):
            return False
        return all(inside) or (remembered and inside[0])


def _size_of(version: bytes | None) -> int:
    """Return the size in a version (see attrs.version_of); one that is not known counts as all."""
    size = (version or b"").partition(b":")[0]
    return int(size) if size.isdigit() else 2**63


def _samples(ranges: Sequence[tuple[int, int]], source: UploadSource) -> list[Sample]:
    """The first bytes, the last, and some evenly between, in the order of the ranges."""
    total = sum(length for _, length in ranges)
    count = min(SAMPLES, -(-total // SAMPLE_BYTES))
    last = max(0, total - SAMPLE_BYTES)
    wanted = [last * number // max(1, count - 1) for number in range(count)]
    samples: list[Sample] = []
    passed = 0
    for offset, length in ranges:
        while wanted and wanted[0] < passed + length:
            at = offset + wanted.pop(0) - passed
            samples.append((at, source.read(at, min(SAMPLE_BYTES, offset + length - at))))
        passed += length
    return samples


class UnfinishedUploads:
    """The uploads that this process began and has not seen the end of, by path."""

    def __init__(self) -> None:
        self._begun: OrderedDict[bytes, UploadAttempt] = OrderedDict()

    def begin(self, path: bytes, attempt: UploadAttempt) -> None:
        """Remember an upload whose end was not seen."""
        self._begun[path] = attempt
        self._begun.move_to_end(path)
        while len(self._begun) > REMEMBERED:
            self._begun.popitem(last=False)

    def end(self, path: bytes) -> None:
        """Forget the upload to this path."""
        self._begun.pop(path, None)

    async def has_left(self, place: SftpPath, attrs: SFTPAttrs, attempt: UploadAttempt) -> bool:
        """Whether the regular file at `place`, with these attributes, comes from `attempt` or from
        an earlier one on the same version."""
        earlier = self._begun.get(place.path)
        if earlier is not None and earlier.base_version != attempt.base_version:
            earlier = None
        known = [one for one in (attempt, earlier) if one is not None]
        if any(one.is_empty(attrs) or one.is_final(attrs) for one in known):
            return True
        for one in known:
            if one.samples and one.may_be(attrs):
                found = await _look(place, one.samples)
                if found and one.is_begun(found, remembered=earlier is not None):
                    return True
        return False


async def _look(place: SftpPath, samples: Sequence[Sample]) -> list[bytes] | None:
    """The bytes at these places; None where this user may not read them."""
    bulk = place.session.bulk
    try:
        with place.asking():
            handle = await bulk.kept(bulk.open(place.full, FXF_READ, SFTPAttrs()))
            try:
                reads = [_read(place.session, handle, at, len(ours)) for at, ours in samples]
                return await all_of([asyncio.ensure_future(read) for read in reads])
            finally:
                bulk.close_soon(handle)
    except (NotFound, PermissionDenied):
        return None


async def _read(session: SftpSession, handle: bytes, offset: int, length: int) -> bytes:
    try:
        return b"".join(await session.bulk.read_piece(handle, offset, length))
    except asyncssh.SFTPEOFError:
        return b""
