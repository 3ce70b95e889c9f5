"""Entries: names with their attributes, as every kind of remote tells them.

Paths are bytes, relative to the namespace's root, without leading or trailing slash; b"" is the
root. Sizes and offsets are bytes, times are nanoseconds since the epoch.
"""

from __future__ import annotations

import stat
from typing import Annotated

import msgspec

from hpcfs.model.xattrs import Xattrs

LIST_PAGE_ENTRIES = 1000
LIST_MAX_ENTRIES = 1_000_000
"""The most entries of one directory: a server may go on for ever, and each costs memory."""
BLOCK_BYTES = 64 * 1024
"""The unit in which files are fetched and their checksums are computed. At 1 Gbit/s a block takes
half a millisecond: a random read of a few bytes at 20 ms pays 3% for the rest of its block."""

IN_MEMORY = "memory:"
"""Before the name of a local file that is in another process's memory, where others have a path."""
NO_HANDLE = 0
"""No file is kept open on the remote."""


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Time = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A name with its attributes. What does not fit into a struct stat is not decoded.

    `mode` is a full st_mode, type included. `uid` and `gid` are local ids: the remote user has
    already become the local one. `version` identifies a regular file's content on the remote and
    is b"" for everything else. `xattrs` are those of Linux's namespace "user.", or of none.
    """

    name: bytes
    mode: _Number
    size: _Size
    mtime_ns: _Time
    atime_ns: _Time
    uid: _Number
    gid: _Number
    version: bytes = b""
    xattrs: Xattrs = ()


class Attributes(msgspec.Struct, frozen=True):
    """Attributes to set; None leaves one as it is. `mode` holds permission bits only (0o7777).
    `xattrs` names those to set, and with None those to remove; the others stay."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    xattrs: dict[bytes, bytes | None] | None = None

    def __bool__(self) -> bool:
        return self != NO_ATTRIBUTES


NO_ATTRIBUTES = Attributes()


def mode_without_ids(entry: Entry) -> int | None:
    """Return the permissions that chown(2) and write(2) leave to a file with set-ID bits.

    None where they change nothing. The kernel leaves clearing these bits to the file system.
    """
    bits = 0
    if stat.S_ISREG(entry.mode):
        bits = stat.S_ISUID | (stat.S_ISGID if entry.mode & stat.S_IXGRP else 0)
    return stat.S_IMODE(entry.mode) & ~bits if entry.mode & bits else None


def merge_attributes(older: Attributes, newer: Attributes) -> Attributes:
    """Return the values of both, the newer ones where both have one."""
    if newer == NO_ATTRIBUTES:
        return older
    merged = Attributes(
        **{
            field: getattr(older, field) if value is None else value
            for field in Attributes.__struct_fields__
            for value in [getattr(newer, field)]
        }
    )
    if older.xattrs and newer.xattrs:
        merged = msgspec.structs.replace(merged, xattrs={**older.xattrs, **newer.xattrs})
    return merged
