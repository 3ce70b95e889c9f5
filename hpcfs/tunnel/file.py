"""The rendezvous file of a tunnel, ~/.hpcfs/tunnels/NAME.json on the cluster: format and checks.

The laptop writes it when its forwards are open and removes it when it ends; a mount reads it to
learn where to connect and with which keys. It holds the key that opens the laptop's shares.
Therefore it must be the user's alone (mode 0600, in directories of 0700); any other owner or mode
is refused. The keys are made for one run of `hpcfs tunnel` and end with it, so a copy is worthless
afterwards.

No time in the file decides anything, because the clocks of a laptop and a cluster differ. `since`
is for people.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import msgspec

from hpcfs.model.errors import RemoteError, Unreachable, WrongSettings

DIRECTORY = ".hpcfs/tunnels"
"""The directory of rendezvous files, below the home directory."""
MAX_FILE_BYTES = 64 * 1024
VERSION = 2
SECRET_BYTES = 32
MAX_SOCKET_PATH_BYTES = 107
"""sun_path of unix(7), without the NUL at its end."""
_ID = re.compile(r"[0-9a-f]{32}")
_SECRET = re.compile(rf"[0-9a-f]{{{2 * SECRET_BYTES}}}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class UnixEndpoint(msgspec.Struct, frozen=True, tag="unix"):
    """A Unix socket on the login node; `path` is absolute."""

    path: str


class TcpEndpoint(msgspec.Struct, frozen=True, tag="tcp"):
    """A TCP port; `host` is a name or address that the mount's machine can reach."""

    host: str
    port: int


Endpoint = UnixEndpoint | TcpEndpoint
Stamp = tuple[int, int, int]
"""Identifies one state of the file: inode number, mtime in nanoseconds, size in bytes."""


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file.

    `id` is 32 hex digits, new for each run of `hpcfs tunnel`. `places` are in the order in which
    to try them. `secret` (in hex) authenticates mounts in the handshake (tunnel/knock.py).
    `host_key` is a line as in authorized_keys, `client_key` a private key as in ~/.ssh (both
    Ed25519). `user` is the laptop's user who shares. `laptop`, `login_host`, `since` and `shares`
    are for people.
    """

    version: int = VERSION
    id: str
    secret: str
    name: str
    laptop: str
    user: str
    login_host: str
    since: str
    places: list[Endpoint]
    host_key: str
    client_key: str
    shares: list[str] = []

    def __repr__(self) -> str:
        """Leave out the secret and the keys, since the result may end in a log."""
        return f"Rendezvous(name={self.name!r}, id={self.id!r}, places={self.places!r})"


class _Version(msgspec.Struct):
    """The field that every version of the file has."""

    version: int


def is_valid_name(name: str) -> bool:
    """Return whether a tunnel may have this name: a file name without quoting, and not hidden."""
    return _NAME.fullmatch(name) is not None


def file_name(name: str) -> str:
    """Return the name of the tunnel's file in its directory."""
    return f"{name}.json"


def encode(rendezvous: Rendezvous) -> bytes:
    """Return the file's content: indented JSON and a newline."""
    return msgspec.json.format(msgspec.json.encode(rendezvous), indent=2) + b"\n"


def decode(text: bytes) -> Rendezvous:
    """Parse and check the file's content.

    Raises ValueError, whose message is the end of a sentence that begins with the file's name.
    """
    try:
        _check_version(msgspec.json.decode(text, type=_Version).version)
        found = msgspec.json.decode(text, type=Rendezvous)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is damaged or was not written by hpcfs ({error})") from None
    if not _ID.fullmatch(found.id) or not is_valid_name(found.name):
        raise ValueError("is damaged or was not written by hpcfs (its id or name)")
    if not _SECRET.fullmatch(found.secret):
        raise ValueError("is damaged or was not written by hpcfs (its secret)")
    for place in found.places:
        _check_place(place)
    return found


def _check_version(version: int) -> None:
    if version < VERSION:
        raise ValueError(f"is of an older hpcfs (version {version}): update hpcfs on the laptop")
    if version > VERSION:
        raise ValueError(f"is of a newer hpcfs (version {version}): update hpcfs here")


def _check_place(place: Endpoint) -> None:
    if isinstance(place, TcpEndpoint):
        if not 0 < place.port < 65536 or not place.host or place.host.startswith("-"):
            raise ValueError(f"names a place that can't be: {place.host!r} port {place.port}")
    elif not place.path.startswith("/") or "\0" in place.path:
        raise ValueError(f"names a socket that can't be: {place.path!r}")


def read(directory: Path, name: str) -> Rendezvous:
    """Read the rendezvous file of the tunnel with that name.

    Raises Unreachable when there is none, and WrongSettings when the file or its directory can't be
    trusted, which only the user can mend.
    """
    file = directory / file_name(name)
    _check_directory(directory)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise no_tunnel(name) from None
    except OSError as error:
        raise WrongSettings(f"{file} can't be read ({error.strerror}): remove it") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WrongSettings(f"{file} is no regular file: remove it")
        _check_owner(file, status, 0o077)
        text = stream.read(MAX_FILE_BYTES + 1)
    try:
        found = decode(text[:MAX_FILE_BYTES])
    except ValueError as error:
        raise Unreachable(f"{file} {error}; 'hpcfs tunnel' on the laptop writes it anew") from None
    if found.name != name:
        raise Unreachable(f"{file} is of another tunnel, {found.name}: remove it")
    return found


def no_tunnel(name: str) -> RemoteError:
    """Return the error for a tunnel without a file, which tells how to start it."""
    return Unreachable(
        f"no tunnel named {name} is up: run 'hpcfs tunnel HOST --name {name}' on the laptop"
    )


def names(directory: Path) -> list[str]:
    """Return the sorted names of the tunnels that have a file in the directory."""
    try:
        found = sorted(file.stem for file in directory.glob("*.json"))
    except OSError:
        return []
    return [name for name in found if is_valid_name(name)]


def stamp(directory: Path, name: str) -> Stamp | None:
    """Return the file's stamp, which changes when the file does; None where there is no file."""
    try:
        status = os.stat(directory / file_name(name), follow_symlinks=False)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _check_directory(directory: Path) -> None:
    """Raise WrongSettings where other users could replace the file by one of theirs."""
    for place in (directory.parent, directory):
        try:
            status = os.stat(place, follow_symlinks=False)
        except OSError:
            return  # the file in it will be missing too
        if not stat.S_ISDIR(status.st_mode):
            raise WrongSettings(f"{place} is no directory: remove it")
        _check_owner(place, status, 0o022)


def _check_owner(place: Path, status: os.stat_result, forbidden: int) -> None:
    if status.st_uid != os.getuid():
        raise WrongSettings(f"{place} belongs to another user: it is not used")
    if status.st_mode & forbidden:
        what = "read or changed" if forbidden & 0o044 else "changed"
        raise WrongSettings(
            f"{place} could be {what} by other users: "
            f"run 'chmod go-rwx {place}', and start the tunnel again"
        )
