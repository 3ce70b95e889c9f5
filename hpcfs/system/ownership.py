"""Checks the owner and mode of files, directories and sockets, to detect other users' replacements.

On a machine that many people share, anybody may make a directory or a link in /tmp or /scratch
first, under a name that somebody else will use.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import struct
from pathlib import Path
from typing import Protocol

from hpcfs.model.errors import SetupError

_CREDENTIALS = struct.Struct("3i")
"""The layout of struct ucred in unix(7): pid, uid, gid."""
NOBODY = 65534
"""The user id that a user namespace shows for the administrator's files. Nobody logs in with it."""
MAX_CONFIGURATION = 16 * 1024 * 1024
"""The largest configuration file, in bytes."""
MAX_LINKS = 40
"""Symbolic links followed in one path, as in the kernel."""


def is_private(directory: Path) -> bool:
    """Return whether it is a directory of ours, not a link, that nobody else can enter."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) & 0o077 == 0
    return private and found.st_uid == os.getuid()


def is_socket(path: Path) -> bool:
    """Return whether it is a socket of ours, not a link, in a directory that nobody else can
    enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.getuid() and is_private(path.parent)


def connect(path: Path, timeout: float) -> socket.socket:
    """Connect to a process of ours, with `timeout` seconds for each step.

    Raises OSError; ECONNREFUSED or ENOENT where there is no socket of ours.
    """
    if not is_socket(path):
        raise FileNotFoundError(errno.ENOENT, "there is no socket of yours", str(path))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
        _check_peer(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_peer(connection: socket.socket, path: Path) -> None:
    uid = peer_uid(connection)
    if uid != os.getuid():
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"user {uid} listens there", str(path))


class _HasOptions(Protocol):
    """A socket of the standard library or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """Return the option as bytes."""


def peer_uid(connection: _HasOptions) -> int:
    """Return the user id of the process that connected, or that listened."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[1])


def unsafe_reason(directory: Path) -> str | None:
    """Return why other users may change what is in this directory, None where they can't.

    The directory may be missing yet. It is unsafe where somebody else may write to a directory on
    the way to it, or owns a link on the way. A place in a directory like /tmp is safe once it is
    ours: there only the owner of an entry, and of that directory, can rename it.
    """
    here, parent = Path("/"), os.lstat("/")
    ahead = list(reversed(directory.parts[1:]))
    links = 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = here.parent
            parent = here.lstat()
            continue
        place = here / part
        try:
            found = place.lstat()
        except FileNotFoundError:
            return None  # it will be made in a directory that was checked
        except OSError as error:
            return f"{place} can't be looked at ({error.strerror})"
        if _is_open(parent) and found.st_uid not in (0, os.getuid(), NOBODY):
            return f"user {found.st_uid} made {place}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MAX_LINKS:
                return f"{place} is a link without an end"
            target = Path(os.readlink(place))
            if target.is_absolute():
                here, parent = Path("/"), os.lstat("/")
            ahead.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            continue
        if stat.S_ISDIR(found.st_mode) and _is_open(found):
            if not found.st_mode & stat.S_ISVTX:
                return f"others may write to {place}, mode {stat.S_IMODE(found.st_mode):04o}"
            if found.st_uid not in (0, os.getuid(), NOBODY):
                return f"{place} is user {found.st_uid}'s, who may rename what others have there"
        here, parent = place, found
    return None


def untrusted_reason(found: os.stat_result, *, chosen: bool = False) -> str | None:
    """Return why another user may have written this file, None if only the user or the
    administrator can.

    It is ssh's own rule for ~/.ssh/config, of which each line could run a command. A file that was
    `chosen` by its name may be a colleague's, but nobody else may have been able to write to it.
    """
    mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
    if found.st_mode & stat.S_IWOTH and stat.S_ISREG(found.st_mode):
        return f"all users may write to it, {mode}"
    if chosen:
        return None
    if found.st_uid not in (0, os.getuid(), NOBODY):
        return f"it belongs to user {found.st_uid}"
    if stat.S_ISREG(found.st_mode) and _is_open(found):
        return f"its group may write to it, {mode}"
    return None


def read_trusted(file: Path, *, chosen: bool = False) -> bytes:
    """Read a configuration file that can be trusted (see `untrusted_reason`). Raises OSError, and
    SetupError where it can't be trusted."""
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        found = os.fstat(opened.fileno())
        os.set_blocking(opened.fileno(), True)
        if reason := untrusted_reason(found, chosen=chosen):
            raise SetupError(
                f"{file} may be somebody else's word ({reason}): make it yours alone with "
                f"'chmod go-w {file}', or a copy of your own"
            )
        if stat.S_ISREG(found.st_mode) and found.st_size > MAX_CONFIGURATION:
            raise SetupError(f"{file} has {found.st_size} bytes: that is no configuration")
        text = opened.read(MAX_CONFIGURATION + 1)
    if len(text) > MAX_CONFIGURATION:
        raise SetupError(f"{file} does not end: that is no configuration")
    return text


def _is_open(directory: os.stat_result) -> bool:
    """Return whether users other than its owner and the administrator may make entries there."""
    if directory.st_mode & stat.S_IWOTH:
        return True
    return bool(directory.st_mode & stat.S_IWGRP) and not _is_own_group(directory.st_gid)


def _is_own_group(gid: int) -> bool:
    """Return whether the group is root's, or one with this user only: many systems give each user
    one."""
    if gid == 0:
        return True
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    own = user.pw_gid == gid and group.gr_name == user.pw_name
    return own and set(group.gr_mem) <= {user.pw_name}


def make_directories(directory: Path) -> None:
    """Make the directory and all missing parents, for this user alone whatever the umask. Raises
    OSError."""
    if not directory.is_dir():
        make_directories(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
