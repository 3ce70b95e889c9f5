"""The Remote protocol: what a namespace's remote can be asked, whatever serves it.

A remote runs in a transfer process, on asyncio. It knows nothing of inodes, FUSE or the cache's
index. Its methods raise `RemoteError`s (protocol/messages.py) and nothing else: each remote
translates its library's errors once, at its own edge. What comes from the server (names, sizes,
links) is checked here before it travels on: nothing from a remote is trusted.

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
    """Asks the user; the daemon answers from its terminal while it still has one."""

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        """What the user typed, or None where nobody can be asked. `text` is shown as it is."""
        ...


class _Unattended:
    """Asks nobody."""

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        return None


NO_PROMPTER: Prompter = _Unattended()
"""For programs that nobody watches."""


class Source(Protocol):
    """The local bytes of an upload."""

    size: int
    name: str
    """Tells it from every other source, other programs' too; when an upload is repeated, perhaps
    by another process, its source has the same name. Temporary files on the remote are named after
    it, so that a repeated upload takes over what the first one left."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; holes read as zeros. Short reads raise RemoteFailure."""
        ...


ReportProgress = Callable[[int], None]
"""Called with the bytes done so far (renames: objects). It renews the request's deadline."""


def no_report(done: int) -> None:
    """For those whom nobody waits for."""


class Remote(Protocol):
    """One namespace. Paths are bytes relative to its root (see protocol/messages.py)."""

    async def connect(self) -> Capabilities: ...

    async def stat(self, path: bytes) -> Entry: ...

    async def stat_open(self, handle: int) -> Entry | None: ...

    def list(self, path: bytes) -> AsyncIterator[Sequence[Entry]]:
        """Pages of entries, without "." and "..", each name once."""
        ...

    async def read_link(self, path: bytes) -> bytes: ...

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
        """Exactly `length` bytes of that version, in consecutive pieces as they came.

        Raises Changed when the remote holds another version, before or after the bytes were read,
        or when it ends before `offset + length`. With `growing` a file that is larger than the
        version says still counts as that version, and an `urgent` one overtakes those that are not
        (see messages.Fetch).
        """
        ...

    async def read_unsized(self, path: bytes, offset: int, length: int, handle: int) -> bytes:
        """At most `length` bytes, perhaps fewer than there are (see messages.ReadUnsized)."""
        ...

    async def release(self, handle: int) -> None: ...

    async def upload(
        self, request: UploadRequest, source: Source, report: ReportProgress
    ) -> Entry: ...

    async def upload_piece(self, request: UploadPieceRequest, source: Source) -> None: ...

    async def create(self, path: bytes, mode: int, handle: int = NO_HANDLE) -> Entry: ...

    async def make_directory(self, path: bytes, mode: int) -> Entry: ...

    async def make_symlink(self, path: bytes, target: bytes) -> Entry: ...

    async def make_link(self, existing: bytes, path: bytes) -> Entry: ...

    async def rename(
        self, path: bytes, target: bytes, *, replace: bool, report: ReportProgress = no_report
    ) -> None:
        """A rename that was cut off may be asked for again, and is then finished."""
        ...

    async def remove(self, path: bytes) -> None: ...

    async def remove_directory(self, path: bytes) -> None: ...

    async def set_attributes(self, path: bytes, attributes: Attributes) -> Entry: ...

    async def truncate(self, path: bytes, size: int) -> Entry: ...

    async def check_writable(self, path: bytes) -> None: ...

    async def disk_usage(self) -> DiskUsage | None: ...


class Site(Protocol):
    """What one login reaches: owns the connections of all its remotes."""

    def remote(self, namespace: str) -> Remote: ...

    def traffic(self) -> Traffic: ...

    def try_now(self) -> None:
        """Where requests fail at once for a while after a failed connection, the next one tries."""
        ...

    async def close(self) -> None: ...


def is_valid_name(name: bytes) -> bool:
    """Whether the kernel can show this as one name of a directory."""
    return (
        0 < len(name) <= MAX_NAME_BYTES
        and name not in (b".", b"..")
        and b"/" not in name
        and b"\0" not in name
    )


def checked_size(size: int | None, path: bytes) -> int:
    """A size that a server gave, in bytes.

    Raises ProtocolError when it is missing, negative or larger than off_t.
    """
    if size is None or not 0 <= size <= MAX_FILE_BYTES:
        shown = path.decode(errors="backslashreplace")
        raise ProtocolError(f"the server gave {shown!r} an impossible size ({size})")
    return size
