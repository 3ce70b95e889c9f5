"""The two requests that bring a file's content to a remote, without the bytes themselves.

`Remote.upload` and `Remote.upload_piece` take one of these and a `UploadSource` with the bytes
(remotes/base.py). Offsets, lengths and sizes are bytes.
"""

from __future__ import annotations

import msgspec

from hpcfs.model.entries import NO_HANDLE, Attributes

PIECE_BYTES = 16 * 1024 * 1024
"""Length of the pieces in which a file is sent while it is still being written."""
PART_COPY_BYTES = 16 * 1024 * 1024
"""Smaller objects are sent whole: that takes less time than the requests that would spare it."""


class UploadRequest(msgspec.Struct, frozen=True):
    """Describes how a remote file is to change.

    `ranges` are (offset, length) pairs of what the source has anew; where the remote has no partial
    writes the source holds the whole file. `base_size` is how much of the remote's old content is
    still meant to be there: the remote cuts to it, then writes the ranges, then sets `size`. `sync`
    asks for the remote's fsync.

    `base_version` is the version that this changes: b"" for a file that must not exist yet, None
    for whatever is there. Where the remote has another one, Conflict is raised before anything was
    written (S3: by a conditional request, where the server honours those). With `replace` the
    content arrives whole under a temporary name and then takes the place of what has this one, so
    that nobody sees a part of it (S3: always so). `handle` is that of `Remote.create`, or of
    `UploadPieceRequest`, whose bytes count as sent and are not in `ranges`; PiecesLost is raised
    where they are not there any more. Until the upload has returned, the source must hold them too.

    With `whole` false the source may hold nothing but the ranges. Bytes that are neither in them
    nor below `base_size` are zeros, and the rest is on the server, as `base_version` (see
    `Capabilities.part_copies`). NotSupported then asks for the same upload with the whole file;
    nothing was changed. `times_set` tells that a program set the `mtime_ns` among the attributes;
    otherwise it is that of the last write, and where keeping it would cost a copy of the object,
    the server's counts.

    With `append` (only where the remote has partial writes) there is one range, from `base_size`
    to `size`, which programs appended. It goes where the file ends by then, without a Conflict, and
    the entry's size tells where that was. `base_version` None then says that an earlier attempt may
    have brought it, or a part of it.
    """

    path: bytes
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


class UploadPieceRequest(msgspec.Struct, frozen=True):
    """Describes a piece of a file that is still being written, and of whose old content nothing
    counts (`base_size` 0).

    Pieces of one handle don't overlap; their `offset` is a multiple of PIECE_BYTES and their
    `length` PIECE_BYTES. An `UploadRequest` with this handle completes the file, `Remote.release`
    gives it up.
    """

    path: bytes
    offset: int
    length: int
    mode: int
    handle: int
    base_version: bytes | None = None
