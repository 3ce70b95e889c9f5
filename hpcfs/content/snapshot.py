"""What an upload brings to the remote, taken at one moment while writing may go on."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import Attributes, Entry


class Changes(IntEnum):
    """What programs did to a file's bytes since an upload took them last. Of two, the larger holds
    for both."""

    NONE = 0
    APPENDED = 1
    """All of it was written at the end, through O_APPEND: it belongs to the end that the file has
    on the remote, wherever that is by then."""
    ANY = 2
    """It belongs where it was written, in the version that it was written to."""


@dataclass(frozen=True)
class Snapshot:
    """Sizes in bytes. `base_size` is how much of the remote's old content still counts; `resized`
    says that the size changed otherwise than by writing; `sent` is what the remote has already,
    under `handle`; with `append` the ranges go to the remote's end."""

    ranges: RangeSet
    size: int
    base_size: int
    attributes: Attributes
    resized: bool
    sent: RangeSet
    handle: int
    changes: Changes
    append: bool


def mode_without_ids(entry: Entry) -> int | None:
    """The permissions that chown(2) and write(2) leave to a file with set-ID bits; None where they
    change nothing. The kernel leaves clearing these bits to the file system."""
    bits = 0
    if stat.S_ISREG(entry.mode):
        bits = stat.S_ISUID | (stat.S_ISGID if entry.mode & stat.S_IXGRP else 0)
    return stat.S_IMODE(entry.mode) & ~bits if entry.mode & bits else None


def merge_attributes(older: Attributes, newer: Attributes) -> Attributes:
    """The newer values where both have one."""
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
