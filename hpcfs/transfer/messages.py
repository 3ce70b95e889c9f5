"""What the mount daemon and a transfer process say to each other: the only module both sides share.

One Unix stream socket joins the two. Each frame is a 4-byte big-endian length and a MessagePack
body (msgpack.org spec, encoded by msgspec). Bulk bytes never cross it: a `Fetch` names the cache
file into which the transfer process writes, an `Upload` the one from which it reads.

Paths are bytes, relative to the namespace's root, without leading or trailing slash; b"" is the
root. Sizes and offsets are bytes, times are nanoseconds since the epoch, deadlines are seconds.
"""

from __future__ import annotations

import struct

import msgspec

from hpcfs.transfer.errors import (
    ERRORS as ERRORS,
    AccessRefused as AccessRefused,
    AheadLost as AheadLost,
    AlreadyExists as AlreadyExists,
    CacheDiskFull as CacheDiskFull,
    CacheFileGone as CacheFileGone,
    Changed as Changed,
    Conflict as Conflict,
    CrossDevice as CrossDevice,
    DirectoryNotEmpty as DirectoryNotEmpty,
    Failure as Failure,
    HostKeyRefused as HostKeyRefused,
    InvalidName as InvalidName,
    InvalidRequest as InvalidRequest,
    IsADirectory as IsADirectory,
    NameTooLong as NameTooLong,
    NoService as NoService,
    NoSpace as NoSpace,
    NotADirectory as NotADirectory,
    NotConnected as NotConnected,
    NotFound as NotFound,
    NotOwner as NotOwner,
    NotSupported as NotSupported,
    PermissionDenied as PermissionDenied,
    ProtocolError as ProtocolError,
    ReadOnlyRemote as ReadOnlyRemote,
    RemoteError as RemoteError,
    RemoteFailure as RemoteFailure,
    Throttled as Throttled,
    TimedOut as TimedOut,
    TooLarge as TooLarge,
    Unreachable as Unreachable,
    WrongSettings as WrongSettings,
)
from hpcfs.transfer.measures import (
    Abilities as Abilities,
    DiskUsage as DiskUsage,
    Fetched as Fetched,
    Progress as Progress,
    Traffic as Traffic,
)
from hpcfs.transfer.xattrs import (
    XATTRS_TEXT_BYTES as XATTRS_TEXT_BYTES,
    Xattrs as Xattrs,
    changed_xattrs as changed_xattrs,
    xattrs_of as xattrs_of,
    xattrs_text as xattrs_text,
)

FRAME_HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 16 * 1024 * 1024
LIST_PAGE_ENTRIES = 1000
LIST_MAX_ENTRIES = 1_000_000
"""Of one directory: a server may go on for ever, and each name costs memory where it is shown."""
BLOCK_BYTES = 64 * 1024
"""The unit of presence in the cache and of its checksums. At 1 Gbit/s a block takes half a
millisecond: a random read of a few bytes at 20 ms pays 3% for the rest of its block."""


# --- values -----------------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A name with its attributes.

    `mode` is a full st_mode, type included. `uid` and `gid` are local ids: the remote user has
    already become the local one. `version` identifies a regular file's content on the remote and
    is b"" for everything else. `xattrs` are those of the namespace "user.".
    """

    name: bytes
    mode: int
    size: int
    mtime_ns: int
    atime_ns: int
    uid: int
    gid: int
    version: bytes = b""
    xattrs: Xattrs = ()


class Attributes(msgspec.Struct, frozen=True):
    """Attributes to set; None leaves one as it is. `mode` holds permission bits only (0o7777).
    `xattrs` names those to set, and with None those to remove; the others stay."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    xattrs: dict[bytes, bytes | None] | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field) is not None for field in self.__struct_fields__)


# --- what a transfer process is told when it starts -----------------------------------------------


class Secret(msgspec.Struct, frozen=True):
    """A value that must not appear in a log, a traceback or a status: its repr hides it."""

    value: str

    def __repr__(self) -> str:
        return "Secret(…)"


class SshSite(msgspec.Struct, frozen=True, tag="ssh"):
    """One SSH login. `host` may be an alias of ~/.ssh/config; None leaves a value to that file.
    `transport` is "asyncssh", or "openssh" for the user's own ssh as a child process."""

    host: str
    user: str | None = None
    port: int | None = None
    ssh_config: str | None = None
    identity_file: str | None = None
    connect_timeout: float = 10.0
    transport: str = "asyncssh"


class S3Site(msgspec.Struct, frozen=True, tag="s3"):
    """One S3 endpoint and its credentials. Without `access_key` the AWS chain finds them."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key: Secret | None = None
    secret_key: Secret | None = None
    connect_timeout: float = 10.0
    anonymous: bool = False
    """Ask without credentials even where there are some."""


class TunnelSite(msgspec.Struct, frozen=True, tag="tunnel"):
    """The laptop at the other end of the tunnel of that name. `directory` is where the tunnel left
    its rendezvous file (rendezvous/file.py), an absolute path."""

    name: str
    directory: str
    connect_timeout: float = 10.0


AnySite = SshSite | S3Site | TunnelSite


class SftpRoot(msgspec.Struct, frozen=True, tag="sftp"):
    """The folder that a namespace shows; "~" and relative paths start at the remote home."""

    path: str
    read_only: bool = False
    verify: bool = False
    """Compare a hash that the remote computes of what was uploaded, where it can."""


class S3Root(msgspec.Struct, frozen=True, tag="bucket"):
    """The part of a bucket that a namespace shows. `prefix` has no leading or trailing slash."""

    bucket: str
    prefix: str = ""
    read_only: bool = False
    verify: bool = False


AnyRoot = SftpRoot | S3Root


class Start(msgspec.Struct, frozen=True):
    """The first frame. `roots` are the site's namespaces by name; `cache_dir` holds the cache
    files; `uid` and `gid` are the local user's, shown as owner of what the remote user owns."""

    site: AnySite
    roots: dict[str, AnyRoot]
    cache_dir: str
    uid: int
    gid: int
    log_level: str = "INFO"


# --- requests ----------------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Connect if need be and look at the root -> Abilities. With `now`, the pause after an attempt
    that failed is over: somebody waits."""

    now: bool = False


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


NO_HANDLE = 0
AHEAD_BYTES = 16 * 1024 * 1024
"""What is sent of a file at once while it is still being written."""
PART_COPY_BYTES = 16 * 1024 * 1024
"""Smaller objects are sent whole: that takes less time than the requests that would spare it."""


IN_MEMORY = "memory:"


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


class Upload(msgspec.Struct, frozen=True, tag=True):
    """Bring a file's content to the remote -> Entry as it is then.

    `ranges` are (offset, length) pairs of what is dirty; where the remote has no partial writes
    the cache file holds all of it. `base_size` is how much of the remote's old content is still
    meant to be there: the remote cuts to it, then writes the ranges, then sets `size`. `sync`
    asks for the remote's fsync.

    `base_version` is the version that this changes: b"" for a file that must not exist yet, None
    for whatever is there. Where the remote has another one, Conflict is raised before anything was
    written (S3: by a conditional request, where the server knows those). With `replace` the content
    arrives whole under another name and then takes the place of what has this one, so that nobody
    sees a part of it (S3: always so). `handle` is that of `Create`, or of `UploadAhead`, whose
    bytes count as sent and are not in `ranges`; AheadLost is raised where they are not there any
    more. Until the answer the cache file must hold them too.

    With `whole` false the cache file may hold nothing but the ranges. What is neither in them nor
    below `base_size` is zeros, and the rest is on the server, as `base_version` (see part_copies
    of Abilities). NotSupported then asks for the same upload with the whole file; nothing was
    changed. `times_set` tells that a program set the `mtime_ns` among the attributes; otherwise it
    is that of the last write, and where keeping it would cost a copy of the object, the server's
    counts.

    With `append` (only where the remote has partial writes) the ranges are one, from `base_size`
    to `size`: programs appended it. It goes where the file ends by then, without a Conflict, and
    the entry's size tells where that was. `base_version` None then says that an earlier attempt may
    have brought it, or a part of it.
    """

    path: bytes
    cache_file: str
    size: int
    base_size: int
    ranges: list[tuple[int, int]]
    attributes: Attributes
    mode: int
    sync: bool = False
    base_version: bytes | None = None
    replace: bool = False
    handle: int = NO_HANDLE
    whole: bool = True
    times_set: bool = True
    append: bool = False


class UploadAhead(msgspec.Struct, frozen=True, tag=True):
    """Send a part of a file that is still being written, and of whose old content nothing counts
    (base_size 0) -> None, once the remote has it. Raises AheadLost when what was sent earlier under
    this handle is gone, and NotSupported where nothing is to be had from it.

    Ranges of one handle don't overlap; their `offset` is a multiple of AHEAD_BYTES and their
    `length` AHEAD_BYTES. `Upload` with this handle completes the file, `Release` gives it up.
    """

    path: bytes
    cache_file: str
    offset: int
    length: int
    mode: int
    handle: int
    base_version: bytes | None = None


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


Request = (
    Connect | Stat | StatOpen | List | ReadLink | Fetch | ReadUnsized | Release | Upload
    | UploadAhead | Create | MakeDirectory | MakeSymlink | MakeLink | Rename | Remove
    | RemoveDirectory | SetAttributes | Truncate | CheckWritable | GetDiskUsage | GetTraffic
)  # fmt: skip


# --- frames ------------------------------------------------------------------------------------


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Daemon -> transfer process."""

    id: int
    namespace: str
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Daemon -> transfer process: nobody waits for this call any more."""

    id: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Daemon -> transfer process: what the user typed at a `Question`, None if nobody can."""

    id: int
    text: Secret | None


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """Transfer process -> daemon. `result` is decoded by the type that the request names."""

    id: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")
    failure: Failure | None = None
    more: bool = False


class Advance(msgspec.Struct, frozen=True, tag="advance"):
    """Transfer process -> daemon: a long call moves on."""

    id: int
    progress: Progress


class Question(msgspec.Struct, frozen=True, tag="question"):
    """Transfer process -> daemon: ask the user. `echo` is false for secrets."""

    id: int
    text: str
    echo: bool


ToTransfer = Call | Cancel | Answer
FromTransfer = Reply | Advance | Question

_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """One message, ready to be sent.

    Raises ProtocolError when it is larger than MAX_FRAME_BYTES.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is larger than {MAX_FRAME_BYTES}")
    return FRAME_HEADER.pack(len(body)) + body


def pack(value: object) -> msgspec.Raw:
    """A `Reply.result`."""
    return msgspec.Raw(_encoder.encode(value))
