"""Translates the refusals of SFTP servers and the errors of asyncssh to RemoteErrors: the only such
table.

OpenSSH's server has few codes: ENOTDIR arrives as "no such file", ENAMETOOLONG and EINVAL as "bad
message", and most of the rest (EEXIST, ENOTEMPTY, EISDIR, ENOSPC, EDQUOT) as plain "failure". What
was meant is found out by looking (path.py); here only codes are translated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncssh
from asyncssh.constants import (
    FX_BAD_MESSAGE,
    FX_CONNECTION_LOST,
    FX_DIR_NOT_EMPTY,
    FX_FILE_ALREADY_EXISTS,
    FX_FILE_IS_A_DIRECTORY,
    FX_INVALID_FILENAME,
    FX_INVALID_PARAMETER,
    FX_NO_CONNECTION,
    FX_NO_SPACE_ON_FILESYSTEM,
    FX_NO_SUCH_FILE,
    FX_NO_SUCH_PATH,
    FX_NOT_A_DIRECTORY,
    FX_OP_UNSUPPORTED,
    FX_PERMISSION_DENIED,
    FX_QUOTA_EXCEEDED,
    FX_WRITE_PROTECT,
)

from hpcfs.model.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    InvalidName,
    InvalidRequest,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NotADirectory,
    NotFound,
    NotSupported,
    PermissionDenied,
    ProtocolError,
    ReadOnly,
    RemoteError,
    RemoteFailure,
    Unreachable,
)
from hpcfs.remotes.base import MAX_NAME_BYTES

MAX_PATH_BYTES = 4095

_BY_CODE: dict[int, tuple[type[RemoteError], str]] = {
    FX_NO_SUCH_FILE: (NotFound, "does not exist"),
    FX_NO_SUCH_PATH: (NotFound, "does not exist"),
    FX_PERMISSION_DENIED: (PermissionDenied, "may not be accessed this way"),
    FX_WRITE_PROTECT: (ReadOnly, "is on a read-only file system"),
    FX_OP_UNSUPPORTED: (NotSupported, "can't be treated so: the server has no such operation"),
    FX_FILE_ALREADY_EXISTS: (AlreadyExists, "exists already"),
    FX_NO_SPACE_ON_FILESYSTEM: (NoSpace, "does not fit: the remote file system is full"),
    FX_QUOTA_EXCEEDED: (NoSpace, "does not fit: the remote quota is used up"),
    FX_DIR_NOT_EMPTY: (DirectoryNotEmpty, "is not empty"),
    FX_NOT_A_DIRECTORY: (NotADirectory, "is not a directory"),
    FX_FILE_IS_A_DIRECTORY: (IsADirectory, "is a directory"),
    FX_INVALID_FILENAME: (InvalidName, "is no name that the server accepts"),
    FX_INVALID_PARAMETER: (InvalidRequest, "can't be treated so: the server finds no sense in it"),
}


def shown(path: bytes) -> str:
    """Return a remote path for a sentence: any bytes, one line."""
    return repr(path.decode(errors="backslashreplace"))[1:-1] or "/"


@contextmanager
def translated(path: bytes, site: str) -> Iterator[None]:
    """Inside, nothing but RemoteErrors leaves. `path` and `site` are for the sentence."""
    try:
        yield
    except asyncssh.SFTPError as error:
        raise _by_code(error, path, site) from error
    except (asyncssh.Error, OSError, EOFError) as error:
        raise Unreachable(f"the connection to {site} was lost ({_reason(error)})") from error
    except ValueError as error:
        raise ProtocolError(f"{site} sent an answer that makes no sense: {error}") from error


def _by_code(error: asyncssh.SFTPError, path: bytes, site: str) -> RemoteError:
    if error.code in (FX_NO_CONNECTION, FX_CONNECTION_LOST):
        why = "" if error.reason == "Connection closed" else f" ({_reason(error)})"
        return Unreachable(f"the connection to {site} was lost{why}")
    if error.code in (FX_BAD_MESSAGE, FX_INVALID_FILENAME) and is_too_long(path):
        return NameTooLong(f"{shown(path)[:80]}… is too long for {site}")
    if error.code == FX_BAD_MESSAGE:
        # "Bad message" is what OpenSSH calls EINVAL; asyncssh's own findings say something else.
        if error.reason == "Bad message":
            return InvalidRequest(f"{shown(path)} can't be treated so, says {site}")
        return ProtocolError(f"{site} sent an answer that makes no sense: {error.reason}")
    if error.code in _BY_CODE:
        cls, predicate = _BY_CODE[error.code]
        return cls(f"{shown(path)} on {site} {predicate}")
    return RemoteFailure(f"{site} could not do that with {shown(path)}: {_reason(error)}")


def is_too_long(path: bytes) -> bool:
    """Return whether the path, or a name of it, is longer than servers take."""
    return len(path) > MAX_PATH_BYTES or any(
        len(name) > MAX_NAME_BYTES for name in path.split(b"/")
    )


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", "") or error) or type(error).__name__
    return " ".join(text.split())[:200]
