"""The protocols of a remote: what can be asked of it, whatever serves it, and what it needs.

A remote runs on asyncio, in any program: it knows nothing of inodes, FUSE, caches or other
processes. Its methods raise `RemoteError`s (model/errors.py) and nothing else: each kind translates
its library's errors once, at its own edge. Whatever comes from the server (names, sizes, links) is
checked before it travels on: nothing from a remote is trusted.

Alternatives considered: fsspec's AbstractFileSystem, whose interface has no versions, no deadlines
and str paths; paramiko, which is slower and blocking. Both would need as much code around them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import ProtocolError
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.model.usage import DiskUsage, Traffic

MAX_NAME_BYTES = 255
"""NAME_MAX on Linux: longer names can't be shown through the kernel."""

MAX_FILE_BYTES = 2**63 - 1
"""off_t is signed 64 bit."""


class Prompter(Protocol):
    """Asks the user for passwords, second factors and decisions about host keys."""

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        """Show `text` as it is and return what the user typed, or None where nobody can be asked.
        `echo` is false for secrets."""
        ...


class _Unattended:
    """Asks nobody."""

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        return None


NO_PROMPTER: Prompter = _Unattended()
"""For programs that nobody watches."""


class UploadSource(Protocol):
    """The local bytes of an upload."""

    size: int
    name: str
    """Tells it from every other source, other programs' too; when an upload is repeated, perhaps
    by another process, its source has the same name. Temporary files on the remote are named after
    it, so that a repeated upload takes over what the first one left."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; holes read as zeros. Raises RemoteFailure where there are
        fewer."""
        ...


ReportProgress = Callable[[int], None]
"""Called with the bytes (renames: objects) that are done so far, also while only the server works:
a caller with a deadline renews it."""


def no_report(done: int) -> None:
    """Ignore the progress."""


class Remote(Protocol):
    """One namespace: a folder of a site.

    Paths are bytes, relative to the folder, without leading or trailing slash; b"" is the folder
    itself. Sizes and offsets are bytes, times nanoseconds since the epoch. Symbolic links are never
    followed. Every method may raise any RemoteError; those named are the ones to expect.

    A `handle` is a number of the caller's choice for one open file of its own; NO_HANDLE stands for
    none. What the remote keeps open for a handle stays so until `release`.
    """

    async def connect(self) -> Capabilities:
        """Connect if need be, look at the folder, and return what the remote can do.

        Raises Unreachable, and AccessRefused, HostKeyRefused or WrongSettings, which only the user
        can mend.
        """
        ...

    async def stat(self, path: bytes) -> Entry:
        """Return the entry at `path`; its name is the path's last one. Raises NotFound."""
        ...

    async def stat_open(self, handle: int) -> Entry | None:
        """Return the entry of the file that is open for `handle`, wherever its name is by now; None
        where the remote holds none open."""
        ...

    def list(self, path: bytes) -> AsyncIterator[Sequence[Entry]]:
        """Yield pages of entries, without "." and "..", each name once.

        Raises NotFound or NotADirectory, and TooLarge beyond LIST_MAX_ENTRIES.
        """
        ...

    async def read_link(self, path: bytes) -> bytes:
        """Return the target of a symbolic link, as it is written there."""
        ...

    async def fetch(
        self,
        path: bytes,
        version: bytes,
        offset: int,
        length: int,
        handle: int,
        *,
        growing: bool = False,
        urgent: bool = False,
    ) -> Sequence[bytes | bytearray]:
        """Return exactly `length` bytes of that version, in consecutive pieces as they came.

        Raises Changed when the remote holds another version, before or after the bytes were read,
        or when it ends before `offset + length`. With `growing` the reader follows a file that
        others append to: one that has grown since still counts as that version, as far as its old
        size. An `urgent` fetch, for which a program waits, overtakes those that only run ahead.
        """
        ...

    async def read_unsized(self, path: bytes, offset: int, length: int, handle: int) -> bytes:
        """Return what the remote gives there now, whatever size and version it tells: at most
        `length` bytes, perhaps fewer than there are, b"" at the end.

        For small files whose size says nothing, as in /proc.
        """
        ...

    async def release(self, handle: int) -> None:
        """Give up what is open for `handle`, a file that was not uploaded included."""
        ...

    async def upload(
        self, request: UploadRequest, source: UploadSource, report: ReportProgress
    ) -> Entry:
        """Change or make a file as `request` says, and return its entry as it is then.

        `report` hears how many bytes are done. Raises Conflict where the remote has another version
        than the request's, PiecesLost where pieces that it builds on are gone, and NotSupported
        where it needs the whole file. The request can be repeated after any other error.
        """
        ...

    async def upload_piece(self, request: UploadPieceRequest, source: UploadSource) -> None:
        """Send a piece of a file that is still being written; return once the remote has it.

        `source` holds the file as far as it is written. Raises PiecesLost when what was sent
        earlier under this handle is gone, and NotSupported where nothing is to be had from it.
        """
        ...

    async def create(self, path: bytes, mode: int, handle: int = NO_HANDLE) -> Entry:
        """Make an empty regular file. With a `handle`, an upload with it or a `release` follows;
        the entry's version may then be b"", not known yet. Raises AlreadyExists."""
        ...

    async def make_directory(self, path: bytes, mode: int) -> Entry:
        """Make a directory with these permission bits. Raises AlreadyExists."""
        ...

    async def make_symlink(self, path: bytes, target: bytes) -> Entry:
        """Make a symbolic link at `path` that leads to `target`. Raises AlreadyExists."""
        ...

    async def make_link(self, existing: bytes, path: bytes) -> Entry:
        """Give the file at `existing` a second name, and return the entry of that. Raises
        AlreadyExists, CrossDevice, NotSupported."""
        ...

    async def rename(
        self, path: bytes, target: bytes, *, replace: bool, report: ReportProgress = no_report
    ) -> None:
        """Rename. With `replace` a file takes the place of a file, a directory that of an empty
        directory; without, AlreadyExists is raised where the target is taken.

        `report` hears how many objects are done, where there are many. A rename that was cut off
        may be asked for again, and is then finished.
        """
        ...

    async def remove(self, path: bytes) -> None:
        """Remove anything but a directory. Raises NotFound, IsADirectory."""
        ...

    async def remove_directory(self, path: bytes) -> None:
        """Remove an empty directory. Raises NotFound, NotADirectory, DirectoryNotEmpty."""
        ...

    async def set_attributes(self, path: bytes, attributes: Attributes) -> Entry:
        """Set those attributes that are not None, and return the entry as it is then."""
        ...

    async def truncate(self, path: bytes, size: int) -> Entry:
        """Cut or extend (with zeros) a file that the caller does not have open."""
        ...

    async def check_writable(self, path: bytes) -> None:
        """Raise PermissionDenied or ReadOnly where the remote user may not write to this file."""
        ...

    async def disk_usage(self) -> DiskUsage | None:
        """Return the space of the folder's file system; None where the remote knows no limit."""
        ...


class Site(Protocol):
    """Everything that one login reaches: it owns the connections of all its remotes."""

    def remote(self, namespace: str) -> Remote:
        """Return the remote of one of the spec's roots. Raises WrongSettings for another name."""
        ...

    def traffic(self) -> Traffic:
        """Return what is open to the site now; nothing is asked or connected."""
        ...

    def try_now(self) -> None:
        """End the pause in which requests fail at once after a failed connection."""
        ...

    def network_changed(self) -> None:
        """Check the connections at once and end pauses: the machine woke up, or its network is
        another one."""
        ...

    async def renew(self) -> None:
        """Forget refused credentials and read them anew, since the user is there to answer: the
        next request logs in. A connection that gives no sign of life is given up."""
        ...

    async def close(self) -> None:
        """Give up what is under way and close all connections."""
        ...


def is_valid_name(name: bytes) -> bool:
    """Return whether the kernel can show this as one name of a directory."""
    return (
        0 < len(name) <= MAX_NAME_BYTES
        and name not in (b".", b"..")
        and b"/" not in name
        and b"\0" not in name
    )


def checked_size(size: int | None, path: bytes) -> int:
    """Return a size that a server gave, in bytes.

    Raises ProtocolError when it is missing, negative or larger than off_t.
    """
    if size is None or not 0 <= size <= MAX_FILE_BYTES:
        shown = path.decode(errors="backslashreplace")
        raise ProtocolError(f"the server gave {shown!r} an impossible size ({size})")
    return size
