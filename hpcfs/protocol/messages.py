"""The messages between the mount daemon and a worker process, which both sides share.

One Unix stream socket joins the two. Each frame is a 4-byte big-endian length and a MessagePack
body (msgpack.org spec, encoded by msgspec). Bulk bytes never cross it: a `Fetch` names the cache
file into which the worker process writes, an `Upload` the one from which it reads.

Paths are bytes, relative to the namespace's root, without leading or trailing slash; b"" is the
root. Sizes and offsets are bytes, times are nanoseconds since the epoch, deadlines are seconds.
"""

from __future__ import annotations

import struct

import msgspec

from hpcfs.model.entries import NO_HANDLE, Attributes
from hpcfs.model.errors import ProtocolError, RemoteError, RemoteFailure
from hpcfs.model.sites import Secret, SiteSpec
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest

FRAME_HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 16 * 1024 * 1024


# --- requests ----------------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Connect if need be and look at the root -> Capabilities. With `now`, the pause after an
    attempt that failed is over: somebody waits. With `renew`, a refused login is forgotten and
    credentials are read anew: somebody is there to answer questions."""

    now: bool = False
    renew: bool = False


class Stat(msgspec.Struct, frozen=True, tag=True):
    """-> Entry (its name is the path's last component); symbolic links are not followed."""

    path: bytes


class StatOpen(msgspec.Struct, frozen=True, tag=True):
    """-> Entry of the file that `handle` holds open on the remote, or None if it holds none."""

    handle: int


class List(msgspec.Struct, frozen=True, tag=True):
    """-> pages of list[Entry], each a Reply with `more`, then a last empty page."""

    path: bytes


class ReadLink(msgspec.Struct, frozen=True, tag=True):
    """-> bytes, the link's target."""

    path: bytes


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Bring a range of one version into a cache file, at the same offset -> Fetched.

    `offset` is a multiple of BLOCK_BYTES; the range ends at a block's end or at the file's.
    `handle` identifies the reader's open file until `Release`; with NO_HANDLE the remote keeps
    nothing open afterwards. Raises Changed when the remote no
    longer has that version; but with `growing`, the reader follows a file that others append to,
    and a file that has grown since is still that version as far as its old size. An `urgent` fetch,
    for which a program waits, goes before those that only run ahead. `cache_file` is a path, or
    IN_MEMORY and the name of a file in the daemon's memory, which the daemon lends when it is asked
    (child.py).
    """

    path: bytes
    version: bytes
    offset: int
    length: int
    cache_file: str
    handle: int
    growing: bool = False
    urgent: bool = False


class Upload(msgspec.Struct, frozen=True, tag=True):
    """Bring a file's content to the remote, from a cache file -> Entry as it is then."""

    request: UploadRequest
    cache_file: str


class UploadPiece(msgspec.Struct, frozen=True, tag=True):
    """Send a piece of a file that is still being written, from its cache file -> None."""

    request: UploadPieceRequest
    cache_file: str


class ReadUnsized(msgspec.Struct, frozen=True, tag=True):
    """-> bytes: what the remote gives there now, whatever size and version it tells; b"" at the
    end. For small files whose size says nothing, as in /proc. `handle` is that of `Fetch`."""

    path: bytes
    offset: int
    length: int
    handle: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """The reader closed the file -> None."""

    handle: int


class Create(msgspec.Struct, frozen=True, tag=True):
    """Make an empty regular file that must not exist yet -> Entry. With a `handle` an `Upload` with
    it or a `Release` follows; the entry's version may then be b"", not known yet."""

    path: bytes
    mode: int
    handle: int = NO_HANDLE


class MakeDirectory(msgspec.Struct, frozen=True, tag=True):
    """-> Entry."""

    path: bytes
    mode: int


class MakeSymlink(msgspec.Struct, frozen=True, tag=True):
    """-> Entry."""

    path: bytes
    target: bytes


class MakeLink(msgspec.Struct, frozen=True, tag=True):
    """Give the file at `existing` a second name -> Entry of the new name."""

    existing: bytes
    path: bytes


class Rename(msgspec.Struct, frozen=True, tag=True):
    """Replaces what is at `target` (a file by a file, an empty directory by a directory) unless
    `replace` is false -> None."""

    path: bytes
    target: bytes
    replace: bool = True


class Remove(msgspec.Struct, frozen=True, tag=True):
    """Remove anything but a directory -> None."""

    path: bytes


class RemoveDirectory(msgspec.Struct, frozen=True, tag=True):
    """Remove an empty directory -> None."""

    path: bytes


class SetAttributes(msgspec.Struct, frozen=True, tag=True):
    """-> Entry."""

    path: bytes
    attributes: Attributes


class Truncate(msgspec.Struct, frozen=True, tag=True):
    """Cut or extend (with zeros) a file that nobody has open here -> Entry."""

    path: bytes
    size: int


class CheckWritable(msgspec.Struct, frozen=True, tag=True):
    """Whether the remote user may write to this file -> None, or why not."""

    path: bytes


class GetDiskUsage(msgspec.Struct, frozen=True, tag=True):
    """-> DiskUsage | None (None: this remote knows no limit)."""


class GetTraffic(msgspec.Struct, frozen=True, tag=True):
    """-> Traffic of the site, which is not asked; the namespace does not count."""


class Fetched(msgspec.Struct, frozen=True):
    """`checksums` has one xxh3_64 for each block of the range, in order (see cache/store.py)."""

    length: int
    checksums: list[int]
    fetch_seconds: float = 0.0
    """Until the remote had sent it all,"""
    store_seconds: float = 0.0
    """and what writing it to the cache file took."""


Request = (
    Connect | Stat | StatOpen | List | ReadLink | Fetch | ReadUnsized | Release | Upload
    | UploadPiece | Create | MakeDirectory | MakeSymlink | MakeLink | Rename | Remove
    | RemoveDirectory | SetAttributes | Truncate | CheckWritable | GetDiskUsage | GetTraffic
)  # fmt: skip


# --- frames ------------------------------------------------------------------------------------


def _all_errors(base: type[RemoteError]) -> list[type[RemoteError]]:
    return [base] + [found for child in base.__subclasses__() for found in _all_errors(child)]


ERRORS: dict[str, type[RemoteError]] = {cls.__name__: cls for cls in _all_errors(RemoteError)}
"""The classes that can cross, by name."""


class Failure(msgspec.Struct, frozen=True):
    """A `RemoteError` on its way to the daemon."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: RemoteError) -> Failure:
        """Pack an error."""
        return cls(type(error).__name__, error.message)

    def error(self) -> RemoteError:
        """Unpack it; a class that is not known becomes RemoteFailure."""
        error = ERRORS.get(self.kind, RemoteFailure)(self.message)
        error.is_told = True
        return error


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Daemon -> worker process, its first frame: the site to open, and which level to log at."""

    spec: SiteSpec
    log_level: str = "INFO"


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Daemon -> worker process."""

    id: int
    namespace: str
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Daemon -> worker process: nobody waits for this call any more."""

    id: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Daemon -> worker process: what the user typed at a `Question`, None if nobody can."""

    id: int
    text: Secret | None


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """Worker process -> daemon. `result` is decoded by the type that the request names."""

    id: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")
    failure: Failure | None = None
    more: bool = False


class Advance(msgspec.Struct, frozen=True, tag="advance"):
    """Worker process -> daemon: a long call moves on, which renews its deadline. `done` counts
    the bytes (renames: the objects) that are done so far."""

    id: int
    done: int


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """Worker process -> daemon: so many more bytes went to the site or came from it, for whichever
    calls: a transfer that is under way takes its time."""

    count: int


class Question(msgspec.Struct, frozen=True, tag="question"):
    """Worker process -> daemon: ask the user. `echo` is false for secrets."""

    id: int
    text: str
    echo: bool


ToWorker = Call | Cancel | Answer
FromWorker = Reply | Advance | Moved | Question

_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """Return one message as a frame, ready to be sent.

    Raises ProtocolError when it is larger than MAX_FRAME_BYTES.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is larger than {MAX_FRAME_BYTES}")
    return FRAME_HEADER.pack(len(body)) + body


def pack(value: object) -> msgspec.Raw:
    """A `Reply.result`."""
    return msgspec.Raw(_encoder.encode(value))
