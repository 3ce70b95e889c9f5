"""What an upload brings to the remote, taken at one moment while writing may go on."""

from __future__ import annotations

import stat
from dataclasses import dataclass

import msgspec

from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import Attributes, Entry


@dataclass(frozen=True)
class Snapshot:
    """Sizes in bytes. `base_size` is how much of the remote's old content still counts; `sent` is
    what the remote has already, under `handle`; with `append` the ranges go to the remote's end."""

    ranges: RangeSet
    size: int
    base_size: int
    attributes: Attributes
    sent: RangeSet
    handle: int
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
