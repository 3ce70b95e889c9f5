"""What an upload asks of a remote."""

from __future__ import annotations

import msgspec

from hpcfs.model.entries import NO_HANDLE, Attributes

AHEAD_BYTES = 16 * 1024 * 1024
"""What is sent of a file at once while it is still being written."""
PART_COPY_BYTES = 16 * 1024 * 1024
"""Smaller objects are sent whole: that takes less time than the requests that would spare it."""


class Upload(msgspec.Struct, frozen=True, tag=True):
    """Bring a file's content to the remote -> Entry as it is then.

    `ranges` are (offset, length) pairs of what is dirty; where the remote has no partial writes
    the cache file holds all of it. `base_size` is how much of the remote's old content is still
    meant to be there: the remote cuts to it, then writes the ranges, then sets `size`. `sync`
    asks for the remote's fsync.

    `base_version` is the version that this changes: b"" for a file that must not exist yet, None
    for whatever is there. Where the remote has another one, Conflict is raised before anything was
    written (S3: by a conditional request, where the server knows those). With `replace` the content
    arrives whole under another name and then takes the place of what has this one, so that nobody
    sees a part of it (S3: always so). `handle` is that of `Create`, or of `UploadAhead`, whose
    bytes count as sent and are not in `ranges`; AheadLost is raised where they are not there any
    more. Until the answer the cache file must hold them too.

    With `whole` false the cache file may hold nothing but the ranges. What is neither in them nor
    below `base_size` is zeros, and the rest is on the server, as `base_version` (see part_copies
    of Capabilities). NotSupported then asks for the same upload with the whole file; nothing was
    changed. `times_set` tells that a program set the `mtime_ns` among the attributes; otherwise it
    is that of the last write, and where keeping it would cost a copy of the object, the server's
    counts.

    With `append` (only where the remote has partial writes) the ranges are one, from `base_size`
    to `size`: programs appended it. It goes where the file ends by then, without a Conflict, and
    the entry's size tells where that was. `base_version` None then says that an earlier attempt may
    have brought it, or a part of it.
    """

    path: bytes
    cache_file: str
    size: int
    base_size: int
    ranges: list[tuple[int, int]]
    attributes: Attributes
    mode: int
    sync: bool = False
    base_version: bytes | None = None
    replace: bool = False
    handle: int = NO_HANDLE
    whole: bool = True
    times_set: bool = True
    append: bool = False


class UploadAhead(msgspec.Struct, frozen=True, tag=True):
    """Send a part of a file that is still being written, and of whose old content nothing counts
    (base_size 0) -> None, once the remote has it. Raises AheadLost when what was sent earlier under
    this handle is gone, and NotSupported where nothing is to be had from it.

    Ranges of one handle don't overlap; their `offset` is a multiple of AHEAD_BYTES and their
    `length` AHEAD_BYTES. `Upload` with this handle completes the file, `Release` gives it up.
    """

    path: bytes
    cache_file: str
    offset: int
    length: int
    mode: int
    handle: int
    base_version: bytes | None = None
