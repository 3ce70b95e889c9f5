"""A remote in memory with the rules of a real one, and a site that runs it under trio.

`MemoryRemote` is either sftp-like (ranges are written in place, open files keep their identity) or
s3-like (whole files replace whole files). `MemorySite` stands in for a transfer process: it stores
what is fetched in the cache file and reads from there what is uploaded. `Cues` make the site fail
or wait at a chosen call, so that a test can put two things in a chosen order.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import trio

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import LIST_PAGE_ENTRIES, NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import (
    AlreadyExists,
    CacheFileGone,
    Changed,
    Conflict,
    DirectoryNotEmpty,
    InvalidRequest,
    IsADirectory,
    NotADirectory,
    NotFound,
    NotOwner,
    NotSupported,
    PermissionDenied,
    ReadOnly,
    RemoteError,
    TimedOut,
)
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.model.usage import DiskUsage
from hpcfs.model.xattrs import Xattrs, changed_xattrs
from hpcfs.protocol import messages as m
from hpcfs.remotes.base import MAX_FILE_BYTES, ReportProgress, UploadSource, no_report
from hpcfs.site.namespace import Delivery
from hpcfs.worker.cache_io import CacheDisk, CacheSource
from hpcfs.worker.main import perform

T = TypeVar("T")
SECOND = 10**9
UID, GID = 1000, 1000


@dataclass(eq=False)
class Item:
    """A file, directory or link of the remote."""

    mode: int
    mtime_ns: int
    content: bytearray = field(default_factory=bytearray)
    children: dict[bytes, Item] = field(default_factory=dict)
    atime_ns: int = 0
    changes: int = 0
    xattrs: Xattrs = ()
    uid: int = UID
    gid: int = GID

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


class MemoryRemote:
    """`distinct` makes every change a new version, which size and whole seconds alone don't."""

    def __init__(self, kind: str, *, distinct: bool = True) -> None:
        assert kind in ("sftp", "s3")
        self.is_sftp = kind == "sftp"
        self.distinct = distinct
        self._clock_ns = 1_700_000_000 * SECOND
        self.root = Item(stat.S_IFDIR | 0o755, self._clock_ns)
        self.read_only = False
        """As a server is for which nothing can be changed: no more than its capabilities and
        `create` know of it."""
        self.umask = 0
        """SFTP: what new entries don't get, whatever they are asked for with."""
        self.groups = {GID}
        """SFTP: those that the user is in."""
        self.copies_parts = False
        """S3: whether an upload may bring nothing but what changed."""
        self.roots: tuple[bytes, ...] = ()
        """What absolute links may call its root."""
        self.handles: dict[int, Item] = {}
        self.ahead: dict[int, dict[int, bytes]] = {}
        """What was sent ahead of uploads: pieces by handle and offset."""

    # --- for tests: what others do to the remote ----------------------------------------------

    def put(self, path: bytes, content: bytes, mode: int = 0o644) -> None:
        """Another program replaces the file by a new one."""
        item = Item(stat.S_IFREG | mode, self._now(), bytearray(content))
        item.changes = self._clock_ns
        parent, name = self._parent(path)
        parent.children[name] = item

    def append(self, path: bytes, more: bytes) -> None:
        """Another program appends (on S3: uploads it anew)."""
        item = self._file(path)
        item.content += more
        self._touch(item)

    def overwrite(self, path: bytes, content: bytes) -> None:
        """Another program writes into the very same file."""
        item = self._file(path)
        item.content[:] = content
        self._touch(item)

    def get(self, path: bytes) -> bytes:
        return bytes(self._file(path).content)

    def paths(self) -> dict[bytes, Item]:
        found: dict[bytes, Item] = {}

        def walk(item: Item, path: bytes) -> None:
            for name, child in item.children.items():
                below = path + b"/" + name if path else name
                found[below] = child
                walk(child, below)

        walk(self.root, b"")
        return found

    # --- inside -------------------------------------------------------------------------------

    def _now(self) -> int:
        self._clock_ns += SECOND // 100
        return self._clock_ns - self._clock_ns % SECOND if self.is_sftp else self._clock_ns

    def _touch(self, item: Item) -> None:
        item.mtime_ns = self._now()
        item.changes = self._clock_ns

    def _find(self, path: bytes) -> Item:
        item = self.root
        for name in path.split(b"/") if path else []:
            if not item.is_directory:
                raise NotADirectory(f"{path!r}: not a directory")
            if name not in item.children:
                raise NotFound(f"{path!r} is not there")
            item = item.children[name]
        return item

    def _parent(self, path: bytes) -> tuple[Item, bytes]:
        folder, _, name = path.rpartition(b"/")
        parent = self._find(folder)
        if not parent.is_directory:
            raise NotADirectory(f"{folder!r}: not a directory")
        return parent, name

    def _file(self, path: bytes) -> Item:
        item = self._find(path)
        if item.is_directory:
            raise IsADirectory(f"{path!r} is a directory")
        return item

    def _free_place(self, path: bytes) -> tuple[Item, bytes]:
        parent, name = self._parent(path)
        if name in parent.children:
            raise AlreadyExists(f"{path!r} is there already")
        return parent, name

    def _version(self, item: Item) -> bytes:
        if not item.is_file:
            return b""
        if self.is_sftp:
            version = b"%d:%d" % (len(item.content), item.mtime_ns // SECOND)
        else:
            version = hashlib.blake2b(item.content, digest_size=8).hexdigest().encode()
        return version + b":%d" % item.changes if self.distinct else version

    def _entry(self, path: bytes, item: Item) -> Entry:
        name = path.rpartition(b"/")[2]
        size = 0 if item.is_directory else len(item.content)
        times = (item.mtime_ns, item.atime_ns)
        rest = item.uid, item.gid, self._version(item), item.xattrs
        return Entry(name, item.mode, size, *times, *rest)

    def _made(self, parent: Item, mode: int, content: bytearray | None = None) -> Item:
        """New in that directory, as the server has it."""
        mode &= ~self.umask if self.is_sftp else -1
        item = Item(mode, self._now(), content or bytearray())
        if self.is_sftp and parent.mode & stat.S_ISGID:
            item.gid = parent.gid
            item.mode |= stat.S_ISGID if item.is_directory else 0
        return item

    def _check_owner(self, item: Item, attributes: Attributes) -> None:
        others = attributes.uid not in (None, item.uid)
        foreign = attributes.gid not in (None, item.gid, *self.groups)
        if self.is_sftp and (item.uid != UID or others or foreign):
            raise NotOwner("the file is somebody else's, or would be")

    def _set(self, item: Item, attributes: Attributes) -> None:
        resolution = SECOND if self.is_sftp else 1
        if attributes.mode is not None or attributes.uid is not None or attributes.gid is not None:
            self._check_owner(item, attributes)
        item.uid = item.uid if attributes.uid is None else attributes.uid
        item.gid = item.gid if attributes.gid is None else attributes.gid
        if attributes.mode is not None:
            item.mode = stat.S_IFMT(item.mode) | attributes.mode
        if attributes.mtime_ns is not None:
            item.mtime_ns = attributes.mtime_ns - attributes.mtime_ns % resolution
        if attributes.atime_ns is not None:
            item.atime_ns = attributes.atime_ns - attributes.atime_ns % resolution
        if attributes.xattrs is not None:
            assert not self.is_sftp, "SFTP has no extended attributes"
            item.xattrs = changed_xattrs(item.xattrs, attributes.xattrs)

    # --- Remote (remotes/base.py) ---------------------------------------------------------------

    async def connect(self) -> Capabilities:
        return Capabilities(
            partial_writes=self.is_sftp,
            creates_on_upload=not self.is_sftp,
            handles=self.is_sftp,
            mtime_resolution_ns=SECOND if self.is_sftp else 1,
            part_copies=self.copies_parts,
            checks_permissions=self.is_sftp,
            read_only=self.read_only,
            dates_directories=self.is_sftp,
            roots=self.roots,
        )

    async def stat(self, path: bytes) -> Entry:
        return self._entry(path, self._find(path))

    async def stat_open(self, handle: int) -> Entry | None:
        item = self.handles.get(handle)
        return None if item is None else self._entry(b"", item)

    async def list(self, path: bytes) -> AsyncGenerator[Sequence[Entry], None]:
        item = self._find(path)
        if not item.is_directory:
            raise NotADirectory(f"{path!r}: not a directory")
        entries = [self._entry(name, child) for name, child in item.children.items()]
        for start in range(0, len(entries), LIST_PAGE_ENTRIES):
            yield entries[start : start + LIST_PAGE_ENTRIES]

    async def read_link(self, path: bytes) -> bytes:
        item = self._find(path)
        if not stat.S_ISLNK(item.mode):
            raise InvalidRequest(f"{path!r} is no link")
        return bytes(item.content)

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
    ) -> list[bytes]:
        item = self.handles.get(handle) if self.is_sftp else None
        if item is None:
            item = self._file(path)
            if self.is_sftp and handle != NO_HANDLE:
                self.handles[handle] = item
        old_size = int(version.partition(b":")[0]) if self.is_sftp else 0
        grew = self.is_sftp and growing and len(item.content) > old_size
        if self._version(item) != version and not grew:
            raise Changed(f"{path!r} was changed")
        if offset + length > len(item.content):
            raise Changed(f"{path!r} is shorter than it was")
        assert length >= 0, "a fetch of a negative length"
        return [bytes(item.content[offset : offset + length])]

    async def read_unsized(self, path: bytes, offset: int, length: int, handle: int) -> bytes:
        return bytes(self._find(path).content[offset : offset + length])

    async def release(self, handle: int) -> None:
        self.handles.pop(handle, None)
        self.ahead.pop(handle, None)

    async def upload(
        self, request: UploadRequest, source: UploadSource, report: Callable[[int], None]
    ) -> Entry:
        parent, name = self._parent(request.path)
        item = parent.children.get(name)
        if item is not None and not (item.is_file or (request.replace and not item.is_directory)):
            raise IsADirectory(f"{request.path!r} is no file")
        ahead = self.ahead.pop(request.handle, {})
        if request.append:
            return self._appended(item, request, source)
        self._check_base(item, request, source, ahead)
        if request.replace:
            item = None
        if self.is_sftp:
            item = item or self._made(parent, stat.S_IFREG | request.mode)
            self._write_in_place(item, request, source, ahead)
        else:
            content = self._content_of(item, request, source)
            for offset, piece in ahead.items():
                if not any(start <= offset < start + length for start, length in request.ranges):
                    content[offset : offset + len(piece)] = piece
            xattrs = item.xattrs if item is not None else ()
            item = Item(stat.S_IFREG | request.mode, 0, content, xattrs=xattrs)
        parent.children[name] = item
        self._touch(item)
        self._set(item, request.attributes)
        report(request.size)
        return self._entry(request.path, item)

    def _appended(self, item: Item | None, request: UploadRequest, source: UploadSource) -> Entry:
        assert self.is_sftp
        assert request.ranges == [(request.base_size, request.size - request.base_size)]
        if item is None:
            raise Conflict(f"{request.path!r} was removed")
        ours = source.read(*request.ranges[0])
        added = bytes(item.content[request.base_size :])
        if request.base_version is not None or ours not in added:
            item.content += ours
        self._touch(item)
        self._set(item, request.attributes)
        return self._entry(request.path, item)

    def _check_base(
        self,
        item: Item | None,
        request: UploadRequest | UploadPieceRequest,
        source: UploadSource,
        ahead: dict[int, bytes],
    ) -> None:
        version = self._version(item) if item is not None else b""
        begun = self.is_sftp and bool(ahead)
        if isinstance(request, UploadRequest) and item is not None and not self.is_sftp:
            begun = len(item.content) == request.size and self._is_same(item, request, source)
        if request.base_version is not None and request.base_version != version and not begun:
            raise Conflict(f"{request.path!r} was changed by others")

    def _content_of(
        self, item: Item | None, request: UploadRequest, source: UploadSource
    ) -> bytearray:
        if request.whole:
            return bytearray(source.read(0, request.size))
        assert item is not None
        assert request.base_version is not None
        content = bytearray(item.content[: request.base_size])
        content.extend(bytes(max(0, request.size - len(content))))
        for start, length in request.ranges:
            content[start : start + length] = source.read(start, length)
        return content[: request.size]

    def _is_same(self, item: Item, request: UploadRequest, source: UploadSource) -> bool:
        """Whether an earlier attempt of this upload did its work, though its answer was lost."""
        return source.read(0, request.size) == item.content

    async def upload_piece(self, request: UploadPieceRequest, source: UploadSource) -> None:
        parent, name = self._parent(request.path)
        item = parent.children.get(name)
        ahead = self.ahead.setdefault(request.handle, {})
        self._check_base(item, request, source, ahead)
        piece = source.read(request.offset, request.length)
        if self.is_sftp:
            if item is None or not ahead:
                item = item or self._made(parent, stat.S_IFREG | request.mode)
                parent.children[name] = item
                del item.content[:]
            item.content.extend(bytes(max(0, request.offset - len(item.content))))
            item.content[request.offset : request.offset + len(piece)] = piece
            self._touch(item)
        ahead[request.offset] = piece

    def _write_in_place(
        self, item: Item, request: UploadRequest, source: UploadSource, ahead: dict[int, bytes]
    ) -> None:
        covered = len(item.content)
        for start, length in sorted(request.ranges):
            covered = max(covered, start + length) if start <= covered else covered
        if covered < min(request.base_size, request.size):
            raise Changed(f"{request.path!r} was cut meanwhile")
        sent = max([0, *(offset + len(piece) for offset, piece in ahead.items())])
        del item.content[max(sent, request.base_size) :]
        for start, length in request.ranges:
            item.content.extend(bytes(max(0, start - len(item.content))))
            item.content[start : start + length] = source.read(start, length)
        del item.content[request.size :]
        item.content.extend(bytes(request.size - len(item.content)))

    async def create(self, path: bytes, mode: int, handle: int = NO_HANDLE) -> Entry:
        parent, name = self._free_place(path)
        if self.read_only:
            raise ReadOnly("it is read-only")
        item = self._made(parent, stat.S_IFREG | mode)
        item.changes = self._clock_ns
        if self.is_sftp:
            parent.children[name] = item
            if handle != NO_HANDLE:
                self.ahead[handle] = {0: b""}  # its own, whatever its version is
                return msgspec.structs.replace(self._entry(path, item), version=b"")
            return self._entry(path, item)
        return msgspec.structs.replace(self._entry(path, item), version=b"")

    async def make_directory(self, path: bytes, mode: int) -> Entry:
        parent, name = self._free_place(path)
        parent.children[name] = self._made(parent, stat.S_IFDIR | mode)
        return self._entry(path, parent.children[name])

    async def make_symlink(self, path: bytes, target: bytes) -> Entry:
        parent, name = self._free_place(path)
        parent.children[name] = Item(stat.S_IFLNK | 0o777, self._now(), bytearray(target))
        return self._entry(path, parent.children[name])

    async def make_link(self, existing: bytes, path: bytes) -> Entry:
        if not self.is_sftp:
            raise NotSupported("S3 has no hard links")
        parent, name = self._free_place(path)
        parent.children[name] = self._file(existing)
        return self._entry(path, parent.children[name])

    async def rename(
        self, path: bytes, target: bytes, *, replace: bool, report: ReportProgress = no_report
    ) -> None:
        item = self._find(path)
        if target.startswith(path + b"/"):
            raise InvalidRequest("a directory can't be moved into itself")
        parent, name = self._parent(target)
        there = parent.children.get(name)
        if there is not None:
            self._check_replaceable(item, there, replace=replace)
        old_parent, old_name = self._parent(path)
        del old_parent.children[old_name]
        parent.children[name] = item

    def _check_replaceable(self, item: Item, there: Item, *, replace: bool) -> None:
        if not replace:
            raise AlreadyExists("the name is taken")
        if there.is_directory and not item.is_directory:
            raise IsADirectory("a directory is there")
        if item.is_directory and not there.is_directory:
            raise NotADirectory("something else than a directory is there")
        if there.children:
            raise DirectoryNotEmpty("the directory there is not empty")

    async def remove(self, path: bytes) -> None:
        self._file(path)
        parent, name = self._parent(path)
        del parent.children[name]

    async def remove_directory(self, path: bytes) -> None:
        item = self._find(path)
        if not item.is_directory:
            raise NotADirectory(f"{path!r}: not a directory")
        if item.children:
            raise DirectoryNotEmpty(f"{path!r} is not empty")
        parent, name = self._parent(path)
        del parent.children[name]

    async def set_attributes(self, path: bytes, attributes: Attributes) -> Entry:
        item = self._find(path)
        self._check_owner(item, attributes)
        self._set(item, attributes)
        return self._entry(path, item)

    async def truncate(self, path: bytes, size: int) -> Entry:
        item = self._file(path)
        del item.content[size:]
        item.content.extend(bytes(size - len(item.content)))
        self._touch(item)
        return self._entry(path, item)

    async def check_writable(self, path: bytes) -> None:
        item = self._file(path)
        if self.is_sftp and item.uid != UID and not item.mode & 0o022:
            raise PermissionDenied(f"{path!r} is somebody else's")

    async def disk_usage(self) -> DiskUsage | None:
        return DiskUsage(10**12, 10**11, 10**11, 10**6, 10**5) if self.is_sftp else None


# --- the site -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Held:
    """A call that waits: `reached` is set when it does, and `go` lets it go on."""

    reached: trio.Event = field(default_factory=trio.Event)
    go: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False)
class _Cue:
    kind: type[object]
    skip: int
    times: int
    stage: str
    error: RemoteError | None = None
    held: Held | None = None


class Cues:
    """What is to go wrong, or to wait, at which call.

    A call has three stages: "before" the remote did anything, "middle" (of a fetch: the bytes left
    the remote but are not in the cache file yet), and "after" (done, but not answered).
    """

    def __init__(self) -> None:
        self._cues: list[_Cue] = []
        self.calls: list[m.Request] = []

    def fail(
        self,
        kind: type[object],
        error: RemoteError,
        *,
        nth: int = 1,
        times: int = 1,
        stage: str = "before",
    ) -> None:
        self._cues.append(_Cue(kind, nth - 1, times, stage, error=error))

    def hold(self, kind: type[object], *, nth: int = 1, stage: str = "before") -> Held:
        held = Held()
        self._cues.append(_Cue(kind, nth - 1, 1, stage, held=held))
        return held

    def clear(self) -> None:
        self._cues.clear()

    def count(self, kind: type[object]) -> int:
        return sum(isinstance(call, kind) for call in self.calls)

    async def reach(self, request: m.Request, stage: str) -> None:
        for cue in list(self._cues):
            if not isinstance(request, cue.kind) or cue.stage != stage:
                continue
            if cue.skip:
                cue.skip -= 1
                continue
            cue.times -= 1
            if not cue.times:
                self._cues.remove(cue)
            if cue.held:
                cue.held.reached.set()
                await cue.held.go.wait()
            if cue.error:
                raise cue.error


class MemorySite:
    """Satisfies SiteCalls (site/namespace.py). It has no patience: what fails, fails."""

    is_away = False
    failing = ""
    patience = 0.0

    def __init__(self, remotes: dict[str, MemoryRemote]) -> None:
        self.remotes = remotes
        self.cues = Cues()
        self.lend: Callable[[str], int | None] = lambda name: None
        """Of the store's files in memory."""
        self._disk = CacheDisk(borrow=self._borrow)

    async def give_up_if_silent(self, seconds: float) -> bool:
        return False

    def _borrow(self, name: str) -> int:
        lent = self.lend(name)
        if lent is None:
            raise CacheFileGone("the cache file in memory is another one by now")
        return os.dup(lent)

    async def call(
        self,
        namespace: str,
        request: m.Request,
        kind: type[T],
        timeout: float = 30.0,
        on_progress: Callable[[int], None] | None = None,
        delivery: Delivery | None = None,
    ) -> T:
        self.cues.calls.append(request)
        with trio.move_on_after(timeout), (delivery or Delivery()).attempt():
            await self.cues.reach(request, "before")
            result = await self._perform(self.remotes[namespace], request, on_progress)
            await self.cues.reach(request, "after")
            return msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=kind)
        raise TimedOut(f"no answer to {type(request).__name__} within {timeout:g} s")

    async def _perform(
        self,
        remote: MemoryRemote,
        request: m.Request,
        on_progress: Callable[[int], None] | None,
    ) -> object:
        match request:
            case m.Fetch(path, version, offset, length, cache_file, handle, growing, urgent):
                pieces = await remote.fetch(
                    path, version, offset, length, handle, growing=growing, urgent=urgent
                )
                await self.cues.reach(request, "middle")
                stored = self._disk.store(cache_file, offset, pieces)
                return m.Fetched(length, stored.checksums)
            case m.Upload():
                source = CacheSource(request.cache_file, request.request.size)
                try:
                    return await remote.upload(
                        request.request, source, on_progress or (lambda done: None)
                    )
                finally:
                    source.close()
            case m.UploadPiece():
                source = CacheSource(request.cache_file, MAX_FILE_BYTES)
                try:
                    return await remote.upload_piece(request.request, source)
                finally:
                    source.close()
            case _:
                return await perform(remote, request)

    async def call_pages(
        self,
        namespace: str,
        request: m.List,
        on_page: Callable[[bytes], None],
        timeout: float = 30.0,
    ) -> None:
        self.cues.calls.append(request)
        with trio.move_on_after(timeout) as scope:
            await self.cues.reach(request, "before")
            async with aclosing(self.remotes[namespace].list(request.path)) as pages:
                async for page in pages:
                    scope.deadline = trio.current_time() + timeout
                    on_page(msgspec.msgpack.encode(page))
                    await self.cues.reach(request, "middle")
            await self.cues.reach(request, "after")
            return
        raise TimedOut(f"no answer to List within {timeout:g} s")
