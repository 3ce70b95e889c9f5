"""Capabilities of a remote, found out when it is connected to."""

from __future__ import annotations

import msgspec


class Capabilities(msgspec.Struct, frozen=True):
    """Tells a caller how to use a remote well: `Remote.connect` returns it."""

    partial_writes: bool
    """Ranges of an existing file can be written; otherwise every upload is the whole file."""
    creates_on_upload: bool
    """A new file exists on the remote only once its content was uploaded (S3)."""
    handles: bool
    """An open file keeps its identity through renames, and its growth can be followed (SFTP)."""
    mtime_resolution_ns: int
    part_copies: bool = False
    """Of an object of at least PART_COPY_BYTES, an `UploadRequest` with its version as
    `base_version` may be given the dirty ranges only, and says so (`whole` false): the server
    copies the rest."""
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
