"""What is found out of a remote, of its site and of its work, as it crosses the socket; messages.py
shows it to both sides."""

from __future__ import annotations

import msgspec


class Abilities(msgspec.Struct, frozen=True):
    """What the daemon must know of a remote to use it well; the answer to `Connect`."""

    partial_writes: bool
    """Ranges of an existing file can be written; otherwise every upload is the whole file."""
    creates_on_upload: bool
    """A new file exists on the remote only once its content was uploaded (S3)."""
    handles: bool
    """An open file keeps its identity through renames, and its growth can be followed (SFTP)."""
    mtime_resolution_ns: int
    part_copies: bool = False
    """Of an object of at least PART_COPY_BYTES, an `Upload` with its version as `base_version` may
    be given the dirty ranges only, and says so (`whole` false): the server copies the rest."""
    privileged: bool = False
    """The remote user is root: the modes of its files don't bind it."""
    checks_permissions: bool = True
    """The remote refuses what modes and owners forbid."""
    read_only: bool = False
    """Nothing could be changed there when it was connected to."""
    dates_directories: bool = True
    """A name that comes or goes changes its directory's mtime."""
    remark: str = ""
    """For the status: how it is reached, where that is out of the ordinary."""
    roots: tuple[bytes, ...] = ()
    """Absolute paths of the namespace's root, as symbolic links on the remote may name it."""


class Fetched(msgspec.Struct, frozen=True):
    """`checksums` has one xxh3_64 for each block of the range, in order (see cache/store.py)."""

    length: int
    checksums: list[int]
    fetch_seconds: float = 0.0
    """Until the remote had sent it all,"""
    store_seconds: float = 0.0
    """and what writing it to the cache file took."""


class Progress(msgspec.Struct, frozen=True):
    """Bytes of an upload or a fetch that are done; each one also renews the request's deadline."""

    done: int


class DiskUsage(msgspec.Struct, frozen=True):
    """Sizes in bytes and counts, as statvfs(3) means them: `available` is what a user may use."""

    total: int
    free: int
    available: int
    files: int
    files_free: int


class Traffic(msgspec.Struct, frozen=True):
    """What is open to a site now: `connections` (jump hosts' too; of S3 those that were not left to
    botocore), SFTP `channels` on them, and `requests` under way. Where a connection is kept up
    whether anybody asks for something or not (tunnels), `away` says why there is none."""

    connections: int = 0
    channels: int = 0
    requests: int = 0
    away: str = ""
