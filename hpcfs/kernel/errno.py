"""Which errno a program sees for which error: the only such table.

An error class without an entry takes its base's; a test checks that every class is meant. What is
no error of ours is EIO, with a traceback in the log.
"""

from __future__ import annotations

import errno

from hpcfs.filesystem import errors as f
from hpcfs.transfer import messages as m

ERRNO: dict[type[Exception], int] = {
    f.FilesystemError: errno.EIO,
    f.NoEntry: errno.ENOENT,
    f.Exists: errno.EEXIST,
    f.NotDirectory: errno.ENOTDIR,
    f.IsDirectory: errno.EISDIR,
    f.NotPermitted: errno.EACCES,
    f.ReadOnly: errno.EROFS,
    f.CrossNamespace: errno.EXDEV,
    f.Unsupported: errno.ENOTSUP,
    f.LeadsOut: errno.EPERM,  # as sshfs
    f.NoSuchKind: errno.EPERM,  # mknod(2) and link(2) have this one for it
    f.Invalid: errno.EINVAL,
    f.NameLong: errno.ENAMETOOLONG,
    f.Stale: errno.ESTALE,
    f.CacheFull: errno.ENOSPC,
    f.JournalFull: errno.ENOSPC,
    f.BadHandle: errno.EBADF,
    f.NoAttribute: errno.ENODATA,
    f.AttributesFull: errno.ENOSPC,
    m.RemoteError: errno.EIO,
    m.NotFound: errno.ENOENT,
    m.AlreadyExists: errno.EEXIST,
    m.PermissionDenied: errno.EACCES,
    m.NotOwner: errno.EPERM,
    m.ReadOnlyRemote: errno.EROFS,
    m.NotADirectory: errno.ENOTDIR,
    m.IsADirectory: errno.EISDIR,
    m.DirectoryNotEmpty: errno.ENOTEMPTY,
    m.CrossDevice: errno.EXDEV,
    m.InvalidName: errno.EILSEQ,
    m.NameTooLong: errno.ENAMETOOLONG,
    m.InvalidRequest: errno.EINVAL,
    m.NotSupported: errno.ENOTSUP,
    m.NoSpace: errno.ENOSPC,
    m.TooLarge: errno.EFBIG,
    m.Changed: errno.ESTALE,
    m.Conflict: errno.ESTALE,
    m.AheadLost: errno.EIO,
    m.Unreachable: errno.EHOSTUNREACH,
    m.NotConnected: errno.EHOSTUNREACH,
    m.TimedOut: errno.ETIMEDOUT,
    m.Throttled: errno.EBUSY,
    m.AccessRefused: errno.EACCES,
    m.HostKeyRefused: errno.EACCES,
    m.WrongSettings: errno.ENXIO,  # readdir(3) takes ENOENT for the end of an empty folder
    m.NoService: errno.ENXIO,
    m.ProtocolError: errno.EPROTO,
    m.CacheDiskFull: errno.ENOSPC,
    m.CacheFileGone: errno.EIO,
    m.RemoteFailure: errno.EIO,
}


def errno_of(error: Exception) -> int | None:
    """None for an error that is not ours."""
    for kind in type(error).__mro__:
        if kind in ERRNO:
            return ERRNO[kind]
    return None
