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
from enum import Enum, auto

import msgspec
import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.cache.store import Store
from hpcfs.content.fetcher import Budget
from hpcfs.content.reader import Place, RemoteContent
from hpcfs.content.record import Unconfirmed, flags_of
from hpcfs.content.snapshot import Snapshot, merge_attributes
from hpcfs.content.state import Changes, Name, RemoteSide, State
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


class _Way(Enum):
    """How an upload brings what is dirty."""

    RANGES = auto()
    """The remote writes the dirty ranges in place."""
    WHOLE = auto()
    """All of the old content was brought here, and all of the file is sent."""
    PARTS = auto()
    """The dirty ranges are sent, and the server copies the rest."""


_NOTHING = RangeSet()


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
        self.failure: RemoteError | None = None
        """Of an upload that no program waited for; told once."""
        self.uploaded_bytes = 0
        """Of the upload under way."""
        self.writers = 0
        self.upload_lock = trio.Lock()
        self._way = _Way.RANGES
        """How the last upload that was prepared goes."""
        self._under_way: Snapshot | None = None
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
        self.state.note_created()
        self.write_handle = handle

    def note_absent(self) -> None:
        """The remote has no such file yet: the first upload makes it."""
        self.state.note_absent()

    def resume(self, row: Unconfirmed) -> None:
        """Go on with what an earlier mount left: it is written as far as the row says."""
        self.base_size = row.base_size
        self.state = State.resumed(row.remote_side, row.unsent)
        self.needs_disk = True

    def unlink(self) -> None:
        """The last name was removed here: what is written from now on goes nowhere."""
        self.state.unlink()
        self.stop_sending()

    def supersede(self) -> None:
        """Others removed the file on the remote, or put another one in its place."""
        self.state.supersede()

    def discard(self) -> None:
        """Nothing of it will be uploaded any more; who has it open reads on."""
        self.state.discard()
        self.stop_sending()
        self.file.dirty = RangeSet()

    def retire(self) -> bool:
        """It is closed for good; False if it was before."""
        if self.state.name is Name.RETIRED:
            return False
        self.state.retire()
        self.stop_sending()
        return True

    def note_renamed_here(self, *, over_another: bool) -> None:
        """The file, which is only here, has another name now; `over_another`: the remote has
        something of that name, which the upload replaces in one step."""
        self.state.note_renamed_here(over_another=over_another)

    def set_with_upload(self, attributes: Attributes) -> None:
        """The next upload sets these."""
        self.state.set_with_upload(attributes)

    def note_stamped(self, mode: int | None) -> None:
        """The file was written to now: a time that was set before is not to come back with the
        upload, and the mode is this one if not None."""
        if mode is not None or self.state.attributes:
            self.state.note_stamped(mode)

    def renew_version(self, version: bytes) -> None:
        """The same content has another version on the remote: its time was set."""
        self.file.version = version

    def note_served(self) -> None:
        """A program has read bytes of this version."""
        self.served = True

    def note_row(self) -> None:
        """The journal has a row for it now."""
        self.state.note_row()

    def note_no_row(self) -> None:
        """The journal has no row for it any more, or one that is another's."""
        self.state.note_no_row()

    @contextmanager
    def persisting(self) -> Iterator[None]:
        """While a row that has everything is written to the disk."""
        had_row = self.state.has_row
        self.state.begin_to_persist()
        try:
            yield
        except BaseException:
            self.state.note_not_persisted(had_row=had_row)
            raise
        self.state.note_persisted()

    @contextmanager
    def stranding(self) -> Iterator[None]:
        """While the bytes are moved to where the user finds them."""
        had_row = self.state.has_row
        self.state.strand()
        try:
            yield
        except BaseException:
            self.state.note_not_stranded(had_row=had_row)
            raise

    def note_failure(self, error: RemoteError | None) -> None:
        """An upload failed of which no program heard: the next close tells."""
        self.failure = error

    def take_failure(self) -> RemoteError | None:
        """The failure that no program was told yet; it counts as told."""
        failure, self.failure = self.failure, None
        return failure

    # --- what it is -----------------------------------------------------------------------------

    def is_dirty(self) -> bool:
        """Whether the remote lacks something of the file, or is just being changed."""
        return self.state.is_dirty

    @property
    def is_ahead(self) -> bool:
        """Of what the remote has, whose answers must not overwrite it: dirty, or removed here."""
        return self.state.is_dirty or self.state.is_unlinked

    @property
    def is_as_made(self) -> bool:
        """Made on the remote a moment ago, and nothing else: programs close a second descriptor
        (dup(2), fork(2)) before they write."""
        return self.state.remote is RemoteSide.CREATED and self.state.is_untouched

    @property
    def is_only_here(self) -> bool:
        """The remote has nothing of this name, for certain: no upload broke off on its way."""
        return self.state.remote is RemoteSide.ABSENT

    @property
    def may_be_missing(self) -> bool:
        """The remote may have nothing of this name."""
        return self.state.may_be_missing

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
    def _in_upload(self) -> RangeSet:
        """What the upload under way brings, sent ahead or not."""
        return self._under_way.ranges if self._under_way else _NOTHING

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
        self.check_not_superseded()
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
        self.state.note_changed(change)
        self._sending.wrote(offset, end)
        if self._may_send_ahead():
            self._sending.advance(self.file.dirty, end)

    def _may_send_ahead(self) -> bool:
        """Not of what was appended to a file that others may append to as well."""
        state = self.state
        if self.base_size or state.motion is not None or state.is_unlinked:
            return False
        if state.remote in (RemoteSide.ABSENT, RemoteSide.CREATED):
            return True
        return state.remote is not RemoteSide.REPLACES and state.changes >= Changes.ANY

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

    def check_not_superseded(self) -> None:
        """Before it is written to. Raises Stale."""
        if self.state.is_superseded:
            raise Stale("the file was replaced on the remote since it was opened; open it again")

    async def truncate(self, size: int) -> bool:
        """Whether that changed the size."""
        await self._fetcher.settle()
        # No await from here: atomic.
        self.check_not_superseded()
        if size == self.size:
            return False
        self._resize(size)
        self.base_size = min(self.base_size, size)
        self.mark_resized()
        self.stop_sending()
        return True

    def mark_resized(self) -> None:
        """A program set the size, perhaps to what it was."""
        self.state.note_changed(Changes.RESIZED)

    # --- sending while it is written --------------------------------------------------------------

    def _handle_for_sending(self) -> int:
        return self.write_handle or self.namespace.new_handle()

    async def _send_piece(self, handle: int, offset: int) -> None:
        """Where the remote writes in place, the file is there from now on, whatever follows."""
        base_version = self._base_version(_Way.RANGES)
        if self.capabilities.partial_writes:
            self.state.note_begun()
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
            self._way = _Way.RANGES
            return
        if not whole and self._may_copy_parts():
            self._way = _Way.PARTS
            return
        blocks = self._blocks(0, self.base_size)
        while True:
            await self.fetch_all()
            untrusted = [block for block in blocks if self._is_untrusted(block)]
            if not untrusted:
                break
            await self._verify(untrusted)
        if not whole:
            self._way = _Way.WHOLE

    @property
    def holds_base(self) -> bool:
        """The upload under way replaces the remote's old content, which from then on may be here
        only."""
        snapshot = self._under_way
        return self._way is _Way.WHOLE and snapshot is not None and snapshot.base_size > 0

    def _may_copy_parts(self) -> bool:
        """Whether the server can make the new object of the old one and what is dirty."""
        is_large = self.base_size >= PART_COPY_BYTES
        return self.capabilities.part_copies and is_large

    def falls_back(self) -> bool:
        """The remote could not do it that way: whether there is another."""
        if self._way is _Way.PARTS:
            self.capabilities = msgspec.structs.replace(self.capabilities, part_copies=False)
            self.namespace.knows_better(self.capabilities)
        return self._way is _Way.PARTS

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
        """The journal's row of it. `writing` says that more will be written."""
        snapshot = self._under_way
        base_size = min(self.base_size, snapshot.base_size) if snapshot else self.base_size
        return Unconfirmed(
            self.file.name,
            self.namespace.name,
            self.namespace.origin,
            self.place.path,
            self.size,
            base_size,
            self._blocks_written(),
            self.file.path,
            self.version,
            self.place.entry,
            self.capabilities,
            writing=writing,
            reason=reason,
            **flags_of(self.state, base_size),
        )

    def _blocks_written(self) -> list[tuple[int, int]]:
        """The dirty ranges, extended to their blocks: all of a block is in the cache file once a
        part of it was written, and what is not in the journal counts as not there."""
        whole = RangeSet()
        if self._under_way and self._way is _Way.WHOLE:
            whole.add(0, self.size)
        for start, end in [*self.file.dirty, *self._in_upload]:
            first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
            whole.add(first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.size))
        return list(whole)

    def _base_version(self, way: _Way) -> bytes | None:
        """What an upload may change (see UploadRequest). The server copies parts of the one version
        only."""
        remote = self.state.remote
        if remote is RemoteSide.ABSENT:
            return b""
        is_known = remote is RemoteSide.PRESENT
        return self.version if is_known or way is _Way.PARTS else None

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
            self._base_version(self._way),
            self.state.remote is RemoteSide.REPLACES,
            snapshot.handle,
            whole=self._way is not _Way.PARTS,
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
        if self.capabilities.partial_writes:
            self.state.note_begun()

    @contextmanager
    def in_motion(self) -> Iterator[None]:
        """While the remote renames the file: fetches wait for its end, or try again after it."""
        self.state.begin_motion()
        try:
            yield
        finally:
            self.state.end_motion()

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
        append = self.capabilities.partial_writes and self.state.goes_to_the_end and not sent
        unsent = self.state.begin_upload()
        snapshot = Snapshot(
            self.file.dirty,
            self.size,
            self.base_size,
            unsent.attributes,
            sent,
            sent_under if sent else self.write_handle,
            append,
        )
        if sent_under not in (NO_HANDLE, snapshot.handle):
            self._abandon(sent_under)
        self._sending.reset()
        self.write_handle = NO_HANDLE
        self.file.dirty = RangeSet()
        self.uploaded_bytes = sent.total
        self.base_size = self.size
        self._under_way = snapshot
        return snapshot

    def confirm_upload(self, snapshot: Snapshot, entry: Entry) -> None:
        """`entry` is the file on the remote now."""
        self.failure = None
        self._arrived(snapshot, entry)
        self.state.confirm_upload()
        self._end_upload()

    def fail_upload(self, snapshot: Snapshot, *, begun: bool) -> None:
        """All is dirty as before. `begun`: the remote may have begun to write."""
        for start, end in snapshot.ranges:
            self.file.dirty.add(start, min(end, self.size))
        if self._way is _Way.WHOLE:  # perhaps it replaced the old version: all is here only
            self.file.dirty.add(0, min(snapshot.size, self.size))
        self.base_size = min(self.base_size, snapshot.base_size)
        self._abandon(snapshot.handle)
        self.state.fail_upload(begun=begun)
        self._end_upload()

    def _end_upload(self) -> None:
        self._under_way = None
        self.uploaded_bytes = 0
        self._store.note_cleaned()

    def _arrived(self, snapshot: Snapshot, entry: Entry) -> None:
        """What was appended may stand elsewhere on the remote, after what others appended. Then
        what was written here meanwhile keeps its place after it, in the version that was here; the
        remote's is followed once nothing is dirty."""
        self.growing = False
        if not snapshot.append or entry.size == snapshot.size:
            self.file.version = entry.version
        elif not self.state.changes:
            self._adopt(entry)
            self.growing = False


def _lengths(ranges: RangeSet) -> list[tuple[int, int]]:
    return [(start, end - start) for start, end in ranges]
