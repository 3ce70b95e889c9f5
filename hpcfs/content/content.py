"""The content of one open file: what is here, what is dirty, which remote version it stands on.

All handles of a node share one Content. Bytes come from three places: the blocks of the remote
version that are in the cache file, what was written here (dirty), and zeros (holes, and what lies
beyond the remote's old end). `base_size` says how much of the remote's content still counts: it
shrinks with a truncation, so that what was cut off never comes back.

This is the writing half, content/reader.py the other. Sections without an await are atomic and
marked; there is no lock but the one that keeps uploads of one file apart.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.cache.store import Store
from hpcfs.content.fetcher import Budget
from hpcfs.content.reader import Place, RemoteContent
from hpcfs.content.record import Unconfirmed
from hpcfs.content.snapshot import Changes, Snapshot, merge_attributes
from hpcfs.content.streaming_upload import StreamingUpload
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import BLOCK_BYTES, NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import CacheFull, PiecesLost, RemoteError, Stale, TooLarge
from hpcfs.model.uploads import PART_COPY_BYTES, PIECE_BYTES, UploadPieceRequest, UploadRequest
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)

UPLOAD_TIMEOUT = 120.0
"""Seconds without progress."""
APPEND_ATTEMPTS = 20
"""While others change the file all the time."""
PIECE_TIMEOUT = 600.0
"""Seconds for what is sent ahead, which reports no progress: 28 kB/s."""


class Content(RemoteContent):
    """Sizes and offsets in bytes. Raises RemoteError and FilesystemError."""

    def __init__(
        self,
        place: Place,
        namespace: Namespace,
        capabilities: Capabilities,
        store: Store,
        file: CacheFile,
        nursery: trio.Nursery,
        budget: Budget,
        now: Callable[[], float],
    ) -> None:
        super().__init__(place, namespace, capabilities, store, file, nursery, budget, now)
        self.users = 0
        self.closing: trio.Event | None = None
        """While the last handle closes; set once it is through."""
        self.retired = False
        """Closed for good."""
        self.new = False
        """The remote has no such file yet."""
        self.made = False
        """Made on the remote by this handle, empty, and not confirmed: its version is not known."""
        self.replace = False
        """New, and renamed over what has the name on the remote."""
        self.attempted = False
        """An upload may have begun to write: the remote's version is neither known nor others'."""
        self.resized = False
        self.changes = Changes.NONE
        """Since the upload that is under way took what was dirty."""
        self.pending = Attributes()
        self.journaled = False
        self.secured = False
        """The journal has all that is dirty."""
        self.failure: RemoteError | None = None
        """Of an upload that no program waited for; told once."""
        self.uploaded_bytes = 0
        """Of the upload under way."""
        self.writers = 0
        self.upload_lock = trio.Lock()
        self._in_upload = RangeSet()
        self._copies_parts = False
        """The upload brings what is dirty, and the server copies the rest."""
        self._is_whole = False
        """For the upload under way all of the old content was brought here."""
        self._base_sizes: list[int] = []
        """Of the upload under way, until the remote confirmed it; so is the next."""
        self._uploading = Changes.NONE
        self.write_handle = NO_HANDLE
        """The remote holds the file open under it since it was made."""
        self._sending = StreamingUpload(self._send_piece, self._handle_for_sending, nursery)

    # --- what becomes of it: others call these and assign nothing ---------------------------------

    def enter(self) -> None:
        """Count one user more."""
        self.users += 1

    def leave(self) -> bool:
        """Count one user less; whether it was the last one."""
        self.users -= 1
        return not self.users

    @contextmanager
    def last_close(self) -> Iterator[None]:
        """While the last handle closes; `closing` is set once it is through."""
        self.closing = trio.Event()
        try:
            yield
        finally:
            self.closing.set()
            self.closing = None

    @contextmanager
    def write_under_way(self) -> Iterator[None]:
        """Around a write: it may make the file dirty at any moment."""
        self.writers += 1
        try:
            yield
        finally:
            self.writers -= 1

    def note_created(self, handle: int) -> None:
        """The remote made the empty file a moment ago, and holds it open under this handle."""
        self.made, self.write_handle = True, handle

    def note_absent(self) -> None:
        """The remote has no such file yet: the first upload makes it."""
        self.new = True

    def take_up(self, row: Unconfirmed) -> None:
        """Go on with what an earlier mount left: it is written as far as the row says."""
        self.base_size = row.base_size
        self.pending, self.resized = row.pending, row.resized
        self.new, self.replace, self.attempted = row.new, row.replace, row.attempted
        self.changes = Changes.APPENDED if row.appended else Changes.ANY
        self.needs_disk = self.journaled = self.secured = True

    def unlink(self) -> None:
        """The last name was removed here: what is written from now on goes nowhere."""
        self.orphan = True
        self.stop_sending()

    def supersede(self) -> None:
        """Others removed the file on the remote, or put another one in its place."""
        self.replaced = True

    def retire(self) -> bool:
        """It is closed for good; False if it was before."""
        if self.retired:
            return False
        self.retired = True
        self.stop_sending()
        return True

    def note_renamed(self, *, over_another: bool) -> None:
        """The file, which is only here, has another name now; `over_another`: the remote has
        something of that name, which the upload replaces in one step."""
        self.replace = self.replace or over_another
        self.secured = False

    def set_with_upload(self, attributes: Attributes) -> None:
        """The next upload sets these."""
        self.pending = merge_attributes(self.pending, attributes)
        self.secured = False

    def note_stamped(self, mode: int | None) -> None:
        """The file was written to now: a time that was set before is not to come back with the
        upload, and the mode is this one if not None."""
        if self.pending:
            self.pending = msgspec.structs.replace(self.pending, mtime_ns=None)
        if mode is not None:
            self.pending = merge_attributes(self.pending, Attributes(mode=mode))

    def renew_version(self, version: bytes) -> None:
        """The same content has another version on the remote: its time was set."""
        self.file.version = version

    def note_served(self) -> None:
        """A program has read bytes of this version."""
        self.served = True

    def note_attempted(self) -> None:
        """An upload may have begun to write: what the remote has is ours to overwrite."""
        self.attempted = True

    def note_row(self) -> None:
        """The journal has a row for it now."""
        self.journaled = True

    def note_no_row(self) -> None:
        """The journal has no row for it any more, or one that is another's."""
        self.journaled = False

    def begin_to_persist(self) -> None:
        """The row that is about to be written has all; what is written meanwhile takes it back."""
        self.secured = True

    def note_not_persisted(self) -> None:
        """The journal does not have all that is dirty."""
        self.secured = False

    def note_failure(self, error: RemoteError | None) -> None:
        """An upload failed of which no program heard: the next close tells."""
        self.failure = error

    def take_failure(self) -> RemoteError | None:
        """The failure that no program was told yet; it counts as told."""
        failure, self.failure = self.failure, None
        return failure

    # --- what it is -----------------------------------------------------------------------------

    def is_dirty(self) -> bool:
        if self.orphan:
            return False
        in_motion = self._in_motion is not None
        waits = self.new or self.made or self.resized or self.pending
        return bool(in_motion or self.file.dirty or waits)

    @property
    def is_as_made(self) -> bool:
        """Made on the remote a moment ago, and nothing else: programs close a second descriptor
        (dup(2), fork(2)) before they write."""
        changed = self.file.dirty or self.resized or self.pending or self._in_motion is not None
        return self.made and not changed

    @property
    def is_only_here(self) -> bool:
        """The remote has nothing of this name, for certain: no upload broke off on its way."""
        return self.new and not self.replace and not self.attempted

    @property
    def may_be_missing(self) -> bool:
        """The remote may have nothing of this name."""
        return self.new or self.attempted

    @property
    def is_being_sent(self) -> bool:
        """Under the name that it has."""
        return self._sending.handle != NO_HANDLE

    @property
    def bytes_left(self) -> int:
        """That the remote does not have yet, as far as is known."""
        dirty = self.file.dirty.total - self._sending.sent.total
        return max(0, dirty + max(0, self._in_upload.total - self.uploaded_bytes))

    @property
    def dirty_bytes(self) -> int:
        return self.file.dirty.total + self._in_upload.total

    # --- writing --------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes) -> None:
        if not data:
            return
        await self._prepare(offset, offset + len(data))
        try:
            self._write_now(offset, data, Changes.ANY)
        except CacheFull:
            if not await self._store.make_room(4 * len(data) + BLOCK_BYTES):
                raise
            await self._prepare(offset, offset + len(data))
            self._write_now(offset, data, Changes.ANY)
        self._store.note_added(len(data))

    async def append(self, data: bytes) -> None:
        """At the end, wherever that is: the kernel's idea of it may be a second old."""
        for has_room in (False, True):
            await self._prepare_end(len(data))
            try:
                self._write_now(self.size, data, Changes.APPENDED)
                break
            except CacheFull:
                if has_room or not await self._store.make_room(4 * len(data) + BLOCK_BYTES):
                    raise
        self._store.note_added(len(data))

    async def _prepare_end(self, length: int) -> None:
        """The same as _prepare; a file of which nothing was read nor written here is followed if
        others changed it."""
        offset, attempts = -1, 0
        while offset != self.size:
            offset = self.size
            try:
                await self._prepare(offset, offset + length)
            except Stale:
                attempts += 1
                version = self.version
                if attempts > APPEND_ATTEMPTS:
                    raise
                if not await self.follow_name() and self.version == version:
                    raise  # else somebody who looked at it meanwhile has followed it

    async def _prepare(self, offset: int, end: int) -> None:
        """Make it safe to write [offset, end): what remains of partly covered blocks is here, and
        no fetch under way will overwrite the new bytes. Nothing is awaited after the last check."""
        covered = self._blocks(offset, end)
        ends = {covered[0], covered[-1]}
        while True:
            if missing := [block for block in ends if self._is_edge(block, offset, end)]:
                for block in missing:
                    await self._ensure(range(block, block + 1))
            elif untrusted := [block for block in ends if self._is_untrusted(block)]:
                await self._verify(untrusted)
            elif not self._fetcher.is_idle(covered):
                await self._fetcher.settle(covered)
            else:
                return

    def _is_edge(self, block: int, offset: int, end: int) -> bool:
        """Whether bytes of the remote's in this block stay beside the new ones, and are missing."""
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.base_size)
        return self._is_needed(block) and (start < offset or end < stop)

    def _write_now(self, offset: int, data: bytes, change: Changes) -> None:
        """No await: atomic."""
        self._check_not_replaced()
        end = offset + len(data)
        old_size = self.size
        if end > old_size:
            self._resize(end)
        try:
            self.file.write(offset, data)
        except OSError as error:
            self._undo_write(offset, end, old_size)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull("the local disk with the cache is full") from None
            raise
        self.file.mark_written(offset, end)
        self.changes = max(self.changes, change)
        self.secured = False
        self._sending.wrote(offset, end)
        if self._may_send_ahead():
            self._sending.advance(self.file.dirty, end)

    def _may_send_ahead(self) -> bool:
        """Not of what was appended to a file that others may append to as well."""
        if self.base_size or self.replace or self._in_motion is not None or self.orphan:
            return False
        return self.new or self.made or self.changes is Changes.ANY

    def _resize(self, size: int) -> None:
        try:
            self.file.resize(size)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise TooLarge("the disk with the cache can't hold a file that large") from None
            raise

    def _undo_write(self, offset: int, end: int, old_size: int) -> None:
        """A part may be in the file. In a clean block it goes, and the remote's bytes are fetched
        anew; in a dirty one it stays as if the program had written no more."""
        for block in self._blocks(offset, end):
            start, stop = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            if self.file.dirty.overlaps(start, stop):
                self.file.dirty.add(max(start, offset), min(stop, end))
            else:
                self.file.discard(block)
        self.file.resize(old_size)

    def _check_not_replaced(self) -> None:
        if self.replaced:
            raise Stale("the file was replaced on the remote since it was opened; open it again")

    async def truncate(self, size: int) -> bool:
        """Whether that changed the size."""
        await self._fetcher.settle()
        # No await from here: atomic.
        self._check_not_replaced()
        if size == self.size:
            return False
        self._resize(size)
        self.base_size = min(self.base_size, size)
        self.mark_resized()
        self.stop_sending()
        return True

    def mark_resized(self) -> None:
        """A program set the size, perhaps to what it was."""
        self.resized = True
        self.changes = Changes.ANY
        self.secured = False

    @property
    def _goes_to_the_end(self) -> bool:
        """Whether what is dirty, and not on its way, was appended to what the remote has."""
        if self.new or self.made or self.replace or self.resized:
            return False
        return self.changes is Changes.APPENDED and self.capabilities.partial_writes

    # --- sending while it is written --------------------------------------------------------------

    def _handle_for_sending(self) -> int:
        return self.write_handle or self.namespace.new_handle()

    async def _send_piece(self, handle: int, offset: int) -> None:
        """Where the remote writes in place, the file is there from now on, whatever follows."""
        base_version = self._base_version()
        if self.capabilities.partial_writes:
            self.new, self.attempted, self.changes = False, True, Changes.ANY
        request = UploadPieceRequest(
            self.place.path,
            offset,
            PIECE_BYTES,
            stat.S_IMODE(self.place.entry.mode),
            handle,
            base_version,
        )
        with self.pinned():
            await self.namespace.call(
                m.UploadPiece(request, self.file.path), type(None), PIECE_TIMEOUT
            )

    def stop_sending(self) -> None:
        """What was sent is of no use any more."""
        handle = self._sending.reset() or self.write_handle
        self.write_handle = NO_HANDLE
        self._abandon(handle)

    def _abandon(self, handle: int) -> None:
        if handle != NO_HANDLE:
            self._nursery.start_soon(self._release, handle)

    async def _release(self, handle: int) -> None:
        try:
            await self.namespace.do(m.Release(handle))
        except RemoteError as error:
            log.debug("releasing %r: %s", self.place.path, error.message)

    # --- uploading (writeback/uploader.py calls these) --------------------------------------------

    async def complete(self, *, whole: bool = False) -> None:
        """Where the remote takes only whole files, or with `whole`, all of it must be here, and
        undamaged."""
        if self.capabilities.partial_writes and not whole:
            return
        self._copies_parts = not whole and self._may_copy_parts()
        if self._copies_parts:
            return
        blocks = self._blocks(0, self.base_size)
        while True:
            await self.fetch_all()
            untrusted = [block for block in blocks if self._is_untrusted(block)]
            if not untrusted:
                self._is_whole = not whole
                return
            await self._verify(untrusted)

    @property
    def holds_base(self) -> bool:
        """The upload under way replaces the remote's old content, which from then on may be here
        only."""
        return self._is_whole and min(self._base_sizes, default=0) > 0

    def _may_copy_parts(self) -> bool:
        """Whether the server can make the new object of the old one and what is dirty."""
        is_large = self.base_size >= PART_COPY_BYTES
        return self.capabilities.part_copies and is_large and not (self.new or self.replace)

    def falls_back(self) -> bool:
        """The remote could not do it that way: whether there is another."""
        if self._copies_parts:
            self.capabilities = msgspec.structs.replace(self.capabilities, part_copies=False)
            self.namespace.knows_better(self.capabilities)
        return self._copies_parts

    def cut_to(self, size: int) -> Unconfirmed | None:
        """The journal's row for it once it is cut. None where the row that it has stays true if
        the bytes beyond are gone."""
        row = self.unconfirmed(writing=True)
        if all(end <= size for _, end in row.ranges):
            return None
        return msgspec.structs.replace(
            row,
            size=size,
            base_size=min(row.base_size, size),
            ranges=[(start, min(end, size)) for start, end in row.ranges if start < size],
            resized=True,
            appended=False,
        )

    def unconfirmed(self, reason: str = "", *, writing: bool = False) -> Unconfirmed:
        return Unconfirmed(
            self.file.name,
            self.namespace.name,
            self.namespace.origin,
            self.place.path,
            self.size,
            min([self.base_size, *self._base_sizes]),
            self._blocks_written(),
            self.file.path,
            self.version,
            self.place.entry,
            self.capabilities,
            self.pending,
            new=self.new,
            replace=self.replace,
            resized=self.resized,
            attempted=self.attempted or self.made or bool(self._base_sizes),
            appended=max(self.changes, self._uploading) is Changes.APPENDED,
            writing=writing,
            reason=reason,
        )

    def _blocks_written(self) -> list[tuple[int, int]]:
        """The dirty ranges, extended to their blocks: all of a block is in the cache file once a
        part of it was written, and what is not in the journal counts as not there."""
        whole = RangeSet()
        if self._is_whole:
            whole.add(0, self.size)
        for start, end in [*self.file.dirty, *self._in_upload]:
            first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
            whole.add(first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.size))
        return list(whole)

    def _base_version(self) -> bytes | None:
        """What an upload may change (see UploadRequest)."""
        if self.made or self.replace or (self.attempted and not self._copies_parts):
            return None
        return b"" if self.new else self.version

    async def send(self, snapshot: Snapshot, *, sync: bool) -> Entry:
        request = self._request(snapshot, sync=sync)
        try:
            return await self._upload(request)
        except PiecesLost as lost:
            log.info("%r is sent again: %s", self.place.path, lost.message)
        base_version = None if self.capabilities.partial_writes else request.base_version
        again = msgspec.structs.replace(
            request,
            ranges=_lengths(snapshot.ranges),
            handle=NO_HANDLE,
            base_version=base_version,
        )
        return await self._upload(again)

    def _request(self, snapshot: Snapshot, *, sync: bool) -> UploadRequest:
        entry = self.place.entry
        times = Attributes(atime_ns=entry.atime_ns, mtime_ns=entry.mtime_ns)
        ranges = snapshot.ranges.without(snapshot.sent)
        if snapshot.append:  # the journal may have told of whole blocks
            ranges = ranges.without(RangeSet([(0, snapshot.base_size)]))
        return UploadRequest(
            self.place.path,
            snapshot.size,
            snapshot.base_size,
            _lengths(ranges),
            merge_attributes(times, snapshot.attributes),
            stat.S_IMODE(entry.mode),
            sync,
            self._base_version(),
            self.replace,
            snapshot.handle,
            whole=not self._copies_parts,
            times_set=snapshot.attributes.mtime_ns is not None,
            append=snapshot.append,
        )

    async def _upload(self, request: UploadRequest) -> Entry:
        return await self.namespace.upload(
            request, self.file.path, UPLOAD_TIMEOUT, self._progressed
        )

    def _progressed(self, done: int) -> None:
        """Bytes are on their way: where they are written in place, the remote's version may be any
        from now on."""
        self.uploaded_bytes = done
        self.attempted = self.attempted or self.capabilities.partial_writes

    def give_up(self) -> None:
        """Nothing of it will be uploaded any more; who has it open reads on."""
        self.stop_sending()
        self.file.dirty = RangeSet()
        self.pending = Attributes()
        self.new = self.made = self.resized = False
        self.orphan = self.replaced = True

    @contextmanager
    def in_motion(self) -> Iterator[None]:
        """While the remote renames the file: fetches wait for its end, or try again after it."""
        self._in_motion = trio.Event()
        try:
            yield
        finally:
            self._in_motion.set()
            self._in_motion = None

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While the upload reads the cache file, nothing in it is evicted."""
        self.file.pins += 1
        try:
            yield
        finally:
            self.file.pins -= 1

    async def begin_upload(self) -> Snapshot:
        """What is dirty now is on its way; what is written from now on is dirty anew."""
        await self._sending.settle()
        await self._fetcher.settle()
        # No await from here: atomic.
        sent, sent_under = self._sending.sent, self._sending.handle
        snapshot = Snapshot(
            self.file.dirty,
            self.size,
            self.base_size,
            self.pending,
            self.resized,
            sent,
            sent_under if sent else self.write_handle,
            self.changes,
            self._goes_to_the_end and not sent,
        )
        if sent_under not in (NO_HANDLE, snapshot.handle):
            self._abandon(sent_under)
        self._sending.reset()
        self.write_handle = NO_HANDLE
        self.file.dirty = RangeSet()
        self._in_upload = snapshot.ranges
        self._base_sizes = [snapshot.base_size]
        self._uploading, self.changes = self.changes, Changes.NONE
        self.uploaded_bytes = sent.total
        self.pending = Attributes()
        self.resized = False
        self.base_size = self.size
        self._in_motion = trio.Event()
        return snapshot

    def end_upload(self, snapshot: Snapshot, entry: Entry | None) -> None:
        """`entry` is the file on the remote now, or None if the upload failed."""
        assert self._in_motion is not None
        if entry is None:
            for start, end in snapshot.ranges:
                self.file.dirty.add(start, min(end, self.size))
            if not self.capabilities.partial_writes and not self._copies_parts:
                # Perhaps it replaced the old version: all of this one is here only.
                self.file.dirty.add(0, min(snapshot.size, self.size))
            self.pending = merge_attributes(snapshot.attributes, self.pending)
            self.resized = self.resized or snapshot.resized
            self.base_size = min(self.base_size, snapshot.base_size)
            self.changes = max(self.changes, snapshot.changes)
            self._abandon(snapshot.handle)
        else:
            self._arrived(snapshot, entry)
        self._uploading = Changes.NONE
        self._in_upload = RangeSet()
        self._is_whole = False
        self._base_sizes = []
        self.uploaded_bytes = 0
        self._in_motion.set()
        self._in_motion = None
        self._store.check_bound()

    def _arrived(self, snapshot: Snapshot, entry: Entry) -> None:
        """What was appended may stand elsewhere on the remote, after what others appended. Then
        what was written here meanwhile keeps its place after it, in the version that was here; the
        remote's is followed once nothing is dirty."""
        self.new = self.made = self.replace = self.attempted = self.growing = False
        self.failure = None
        if not snapshot.append or entry.size == snapshot.size:
            self.file.version = entry.version
        elif not self.file.dirty and not self.resized:
            self._adopt(entry)
            self.growing = False


def _lengths(ranges: RangeSet) -> list[tuple[int, int]]:
    return [(start, end - start) for start, end in ranges]
