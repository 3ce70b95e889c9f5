"""Makes entries of what a listing or an object's headers say."""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass

from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.xattrs import is_kept_xattr
from hpcfs.remotes.s3.metadata import DIRECTORY_MODE, FILE_MODE, NANOSECONDS, Metadata
from hpcfs.remotes.s3.objects import Info, Summary


@dataclass(frozen=True)
class Entries:
    """`uid` and `gid` are the local user's. Only root sees the owners that objects carry: for
    others the remote user is the local one."""

    uid: int
    gid: int

    def file(self, name: bytes, found: Summary, metadata: Metadata | None = None) -> Entry:
        """Return the entry of a file or a symbolic link. Times without metadata are the object's,
        in whole seconds."""
        metadata = metadata or (found.metadata if isinstance(found, Info) else Metadata())
        mode = metadata.mode if metadata.mode is not None else FILE_MODE
        seconds_ns = found.modified_ns // NANOSECONDS * NANOSECONDS
        mtime_ns = metadata.mtime_ns if metadata.mtime_ns is not None else seconds_ns
        version = found.version if stat.S_ISREG(mode) else b""
        return self._entry(name, mode, found.size, mtime_ns, metadata, version)

    def directory(self, name: bytes, metadata: Metadata | None) -> Entry:
        """Return the entry of a directory. One that others made has no time; every process must
        give the same, so it is 1970."""
        metadata = metadata or Metadata()
        mode = metadata.mode if metadata.mode is not None else DIRECTORY_MODE
        return self._entry(name, mode, 0, metadata.mtime_ns or 0, metadata, b"")

    def _entry(
        self, name: bytes, mode: int, size: int, mtime_ns: int, metadata: Metadata, version: bytes
    ) -> Entry:
        uid, gid = self.uid, self.gid
        if uid == 0:
            uid = metadata.uid if metadata.uid is not None else uid
            gid = metadata.gid if metadata.gid is not None else gid
        atime_ns = metadata.atime_ns if metadata.atime_ns is not None else mtime_ns
        xattrs = metadata.xattrs and tuple(
            xattr for xattr in metadata.xattrs if is_kept_xattr(xattr[0])
        )
        return Entry(name, mode, size, mtime_ns, atime_ns, uid, gid, version, xattrs)

    def fresh(self, mode: int | None = None) -> Metadata:
        """Return the metadata of a new object. `mode` is a full st_mode."""
        return Metadata(mode=mode, uid=self.uid, gid=self.gid, mtime_ns=time.time_ns())


def is_worth_a_copy(attributes: Attributes) -> bool:
    """Return whether the change is worth a copy of the object: a new access time alone is not, and
    is not kept."""
    return attributes != Attributes(atime_ns=attributes.atime_ns)
