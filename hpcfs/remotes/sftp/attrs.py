"""SFTP version 3 attributes from and to ours: types, times, owners, versions. No I/O.

Version 3 has whole seconds in 32 bits, sets both times or neither, both ids or neither, and lets a
server leave out whatever it likes. A file's version is its size and modification second: a file
rewritten to the same size within one second can't be told from the old one.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from asyncssh import SFTPAttrs

from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import ProtocolError
from hpcfs.remotes.base import checked_size

NANOSECONDS = 1_000_000_000
MAX_SECONDS = 2**32 - 1
DEFAULT_FILE_MODE = stat.S_IFREG | 0o644
DEFAULT_DIRECTORY_MODE = stat.S_IFDIR | 0o755
DEFAULT_LINK_MODE = stat.S_IFLNK | 0o777
_TYPES = {
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFBLK,
    stat.S_IFCHR,
    stat.S_IFIFO,
    stat.S_IFSOCK,
}


@dataclass(slots=True)
class ListedAttrs:
    """Attributes as name_reply.py reads them: an SFTPAttrs has room for those of all versions, and
    takes five times as long to make."""

    size: int | None
    uid: int | None
    gid: int | None
    permissions: int | None
    atime: int | None
    mtime: int | None


AnyAttrs = SFTPAttrs | ListedAttrs


@dataclass(frozen=True)
class Owners:
    """The remote user is the local user. The two ids change places, so that another remote user
    who happens to have the local number is not taken for the local user, and what is shown can be
    set again. None: who the remote user is is not known, and numbers stay as they are."""

    local_uid: int
    local_gid: int
    remote_uid: int | None
    remote_gid: int | None

    def uid(self, uid: int | None) -> int:
        """Return the local uid to show for a remote one, or the remote uid to set for a local
        one."""
        return _swapped(uid, self.remote_uid, self.local_uid)

    def gid(self, gid: int | None) -> int:
        """Do the same for a gid."""
        return _swapped(gid, self.remote_gid, self.local_gid)


def _swapped(given: int | None, remote: int | None, local: int) -> int:
    if given is None:
        return local
    if remote is None:
        return given
    return {remote: local, local: remote}.get(given, given)


def full_mode(attrs: AnyAttrs, default: int = DEFAULT_FILE_MODE) -> int:
    """Return st_mode with its type bits; those of `default` where the server leaves them out, or
    has bits there that are no type."""
    mode = attrs.permissions
    if mode is None:
        return default
    return mode if tells_type(attrs) else stat.S_IMODE(mode) | stat.S_IFMT(default)


def tells_type(attrs: AnyAttrs) -> bool:
    """Return whether the mode has the bits of a type."""
    return attrs.permissions is not None and stat.S_IFMT(attrs.permissions) in _TYPES


def version_of(attrs: AnyAttrs, path: bytes) -> bytes:
    """Return the version that the attributes show: size and modification second. Raises
    ProtocolError when the size is impossible."""
    return b"%d:%d" % (checked_size(attrs.size, path), attrs.mtime or 0)


def entry(path: bytes, name: bytes, attrs: AnyAttrs, owners: Owners) -> Entry:
    """Return the entry with these attributes. Raises ProtocolError when a regular file's size is
    impossible."""
    mode = full_mode(attrs, DEFAULT_FILE_MODE if path else DEFAULT_DIRECTORY_MODE)
    regular = stat.S_ISREG(mode)
    size = checked_size(attrs.size if regular else attrs.size or 0, path)
    return Entry(
        name=name,
        mode=mode,
        size=size,
        mtime_ns=(attrs.mtime or 0) * NANOSECONDS,
        atime_ns=(attrs.atime or attrs.mtime or 0) * NANOSECONDS,
        uid=owners.uid(attrs.uid),
        gid=owners.gid(attrs.gid),
        version=version_of(attrs, path) if regular else b"",
    )


def listed_entry(name: bytes, attrs: AnyAttrs, owners: Owners) -> tuple[Entry, bool]:
    """An entry of a listing, and whether its size made sense. It is shown in any case."""
    try:
        return entry(name, name, attrs, owners), True
    except ProtocolError:
        attrs.size = 0
        return entry(name, name, attrs, owners), False


def needs_present(wanted: Attributes) -> bool:
    """Whether what is there must be known to say what to set."""
    only_one_time = (wanted.atime_ns is None) != (wanted.mtime_ns is None)
    return only_one_time or wanted.uid is not None or wanted.gid is not None


def owner_to_set(wanted: Attributes, now: SFTPAttrs, owners: Owners) -> SFTPAttrs | None:
    """The new ids where they differ from what is there. Apart from the other attributes and before
    them, because changing the owner clears the set-user-ID bit."""
    if wanted.uid is None and wanted.gid is None:
        return None
    uid = now.uid if wanted.uid is None else owners.uid(wanted.uid)
    gid = now.gid if wanted.gid is None else owners.gid(wanted.gid)
    if (uid, gid) == (now.uid, now.gid):
        return None
    return SFTPAttrs(uid=uid or 0, gid=gid or 0)


def rest_to_set(wanted: Attributes, now: SFTPAttrs) -> SFTPAttrs | None:
    """Mode and times; a time that is not to change keeps its present value."""
    attrs = SFTPAttrs(permissions=wanted.mode)
    if wanted.atime_ns is not None or wanted.mtime_ns is not None:
        attrs.atime = _seconds(wanted.atime_ns, now.atime)
        attrs.mtime = _seconds(wanted.mtime_ns, now.mtime)
    return None if attrs.permissions is None and attrs.mtime is None else attrs


def narrower(given: SFTPAttrs, asked: int, kind: int) -> SFTPAttrs | None:
    """Return what to set where something new was asked to be the user's alone and the server did
    not heed the mode; else None. Anything else is the server's to decide: no ACL widens what
    open(2) asks for."""
    mode = stat.S_IMODE(full_mode(given, kind | 0o777))
    others = stat.S_IRWXG | stat.S_IRWXO
    return SFTPAttrs(permissions=mode & ~others) if mode & others and not asked & others else None


def _seconds(wanted_ns: int | None, now: int | float | None) -> int:
    if wanted_ns is None:
        return int(now or 0)
    return min(max(wanted_ns // NANOSECONDS, 0), MAX_SECONDS)
