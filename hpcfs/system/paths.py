"""Where hpcfs keeps its files: the XDG base directories, and the names of one mount's files.

Everything is made for the user alone (0700). A directory in /tmp, whose name anybody can guess, is
used only if it is ours and no symbolic link; otherwise the next place is used. Two mounts share no
file: each file's name contains its `mount_id`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from hpcfs.model.errors import SetupError
from hpcfs.system import ownership

SHARED_TMP = Path("/tmp")  # noqa: S108 - other users' entries there are not used
RUN_USER = Path("/run/user")
"""The runtime directories of logind, for shells without XDG_RUNTIME_DIR: of cron, sudo or a job."""
MAX_SOCKET_PATH_BYTES = 107
"""sun_path has 108 bytes, the last one NUL (unix(7))."""


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the user's configuration file."""
    return _base("XDG_CONFIG_HOME", ".config", environ) / "hpcfs" / "config.toml"


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the logs."""
    return _base("XDG_STATE_HOME", ".local/state", environ) / "hpcfs"


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the caches, unless the configuration names another."""
    return _base("XDG_CACHE_HOME", ".cache", environ) / "hpcfs"


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the home directory: $HOME, or that of the user database."""
    return Path(environ.get("HOME") or os.path.expanduser("~"))


def shared_tmp_dir() -> Path:
    """Return the directory in /tmp for users without a runtime directory or a usable home."""
    return SHARED_TMP / f"hpcfs-{os.getuid()}"


def runtime_dirs(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the directories where sockets may be, the preferred one first; none that another user
    has taken.

    All are searched, since the shell that asks need not be the one that mounted: cron and sudo set
    no XDG_RUNTIME_DIR, or another user's. The last one, in the home directory, is for machines on
    which somebody else made the one in /tmp; homes are shared, so its name contains the machine's.
    """
    bases = [Path(environ.get("XDG_RUNTIME_DIR") or ""), RUN_USER / str(os.getuid())]
    places = [base / "hpcfs" for base in bases if _is_runtime_base(base)]
    machine = os.uname().nodename.partition(".")[0]
    places += [shared_tmp_dir(), home(environ) / ".hpcfs" / f"run-{machine}"]
    return [place for place in dict.fromkeys(places) if _is_free_or_ours(place)]


def _is_runtime_base(place: Path) -> bool:
    try:
        found = place.stat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return place.is_absolute() and is_ours and not found.st_mode & 0o022


def _is_free_or_ours(place: Path) -> bool:
    try:
        found = place.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def mount_id(mountpoint: Path) -> str:
    """Return a readable and unique file name for a mount: the mount point's name and a hash of its
    path."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", mountpoint.name)[:32].strip(".") or "root"
    return f"{readable}-{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:10]}"


def socket_path(mountpoint: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path at which a new daemon listens. Raises SetupError where there is no place."""
    return socket_paths(mount_id(mountpoint), environ)[0]


def find_socket(mountpoint: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path at which the daemon of this mount listens, or would listen."""
    places = socket_paths(mount_id(mountpoint), environ)
    return next((path for path in places if ownership.is_socket(path)), places[0])


def socket_paths(name: str, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the possible paths of a socket with this name, the preferred one first. Raises
    SetupError where there is none."""
    places = [place / f"{name}.sock" for place in runtime_dirs(environ)]
    short = [path for path in places if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES]
    if not short:
        raise SetupError(
            f"there is no place for a socket: {shared_tmp_dir()} is not yours, and other places "
            "have names that are too long: set XDG_RUNTIME_DIR to a directory of your own"
        )
    return short


def log_file(mountpoint: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the mount's log."""
    return state_dir(environ) / f"{mount_id(mountpoint)}.log"


def absolute_mountpoint(text: str | Path) -> Path:
    """Return `text` as an absolute path whose parent has no symbolic links.

    The last component is not looked at, since that could block on a hung mount.
    """
    path = Path(os.path.abspath(os.path.expanduser(text)))
    return Path(os.path.realpath(path.parent)) / path.name


def make_private(directory: Path) -> Path:
    """Make a directory that only this user can enter, or restrict the existing one to that.

    Raises SetupError where it is a symbolic link, belongs to another user, or can't be made.
    """
    try:
        ownership.make_directories(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except FileExistsError:
        raise SetupError(f"{directory} is in the way: it must be a directory") from None
    except OSError as error:
        raise SetupError(f"cannot make the directory {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise SetupError(
            f"{directory} must be a directory of yours, not a symbolic link: remove it"
        )
    if found.st_uid != os.getuid():
        raise SetupError(
            f"{directory} belongs to user {found.st_uid}, so it can't be trusted: remove it, "
            "or set XDG_RUNTIME_DIR and XDG_CACHE_HOME to places of your own"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)
    return directory


def _base(variable: str, fallback: str, environ: Mapping[str, str]) -> Path:
    """Return an XDG base directory. The specification says that relative paths are invalid and to
    be ignored."""
    given = Path(environ.get(variable) or "")
    return given if given.is_absolute() else home(environ) / fallback
