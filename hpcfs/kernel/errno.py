"""Which errno a program sees for which error: the only such table.

An error class without an entry takes its base's; a test checks that every class is meant. What is
no error of ours is EIO, with a traceback in the log.
"""

from __future__ import annotations

import errno

from hpcfs.model import errors

ERRNO: dict[type[Exception], int] = {
    errors.FilesystemError: errno.EIO,
    errors.LeadsOut: errno.EPERM,  # as sshfs
    errors.NoSuchKind: errno.EPERM,  # mknod(2) and link(2) have this one for it
    errors.Stale: errno.ESTALE,
    errors.JournalFull: errno.ENOSPC,
    errors.NoAttribute: errno.ENODATA,
    errors.AttributesFull: errno.ENOSPC,
    errors.BadHandle: errno.EBADF,
    errors.TooManyOpen: errno.EMFILE,
    errors.RemoteError: errno.EIO,
    errors.NotFound: errno.ENOENT,
    errors.AlreadyExists: errno.EEXIST,
    errors.PermissionDenied: errno.EACCES,
    errors.NotOwner: errno.EPERM,
    errors.ReadOnly: errno.EROFS,
    errors.NotADirectory: errno.ENOTDIR,
    errors.IsADirectory: errno.EISDIR,
    errors.DirectoryNotEmpty: errno.ENOTEMPTY,
    errors.CrossDevice: errno.EXDEV,
    errors.InvalidName: errno.EILSEQ,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.InvalidRequest: errno.EINVAL,
    errors.NotSupported: errno.ENOTSUP,
    errors.NoSpace: errno.ENOSPC,
    errors.TooLarge: errno.EFBIG,
    errors.Changed: errno.ESTALE,
    errors.Conflict: errno.ESTALE,
    errors.PiecesLost: errno.EIO,
    errors.Unreachable: errno.EHOSTUNREACH,
    errors.NotConnected: errno.EHOSTUNREACH,
    errors.TimedOut: errno.ETIMEDOUT,
    errors.Throttled: errno.EBUSY,
    errors.AccessRefused: errno.EACCES,
    errors.LoginNeeded: errno.EACCES,
    errors.HostKeyRefused: errno.EACCES,
    errors.WrongSettings: errno.ENXIO,  # readdir(3) takes ENOENT for the end of an empty folder
    errors.NoService: errno.ENXIO,
    errors.LoginEnded: errno.ENXIO,
    errors.ProtocolError: errno.EPROTO,
    errors.CacheFull: errno.ENOSPC,
    errors.CacheFileGone: errno.EIO,
    errors.RemoteFailure: errno.EIO,
}


_SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
)
"""What the machine, or its disk with the cache, may lack at any moment."""


def shortage(error: Exception) -> int | None:
    """Return the errno for an error that the daemon's own machine is to blame for, else None."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        return error.errno
    return None


def errno_of(error: Exception) -> int | None:
    """Return the errno for an error of ours, None for any other."""
    for kind in type(error).__mro__:
        if kind in ERRNO:
            return ERRNO[kind]
    return None
