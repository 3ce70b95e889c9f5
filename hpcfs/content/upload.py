"""The uploads of one open file: what is dirty goes to the remote while programs write on.

An upload is prepared (`complete`), takes a snapshot of what is dirty (`begin`), is sent (`send`),
and is confirmed or fails. writeback/uploader.py calls these, and keeps the journal in step. A large
file is sent in pieces while it is still being written (content/streaming_upload.py); its upload
completes them.
"""

from __future__ import annotations

import logging
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

import msgspec
import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.content.reader import Reader
from hpcfs.content.shared import RemoteFile, Shared
from hpcfs.content.snapshot import SentPieces, Snapshot
from hpcfs.content.state import Changes, RemoteSide, State
from hpcfs.content.streaming_upload import StreamingUpload
from hpcfs.model.entries import BLOCK_BYTES, NO_HANDLE, Attributes, Entry, merge_attributes
from hpcfs.model.errors import PiecesLost, RemoteError
from hpcfs.model.uploads import PART_COPY_BYTES, PIECE_BYTES, UploadPieceRequest, UploadRequest
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Delivery

log = logging.getLogger(__name__)

UPLOAD_TIMEOUT = 120.0
"""Seconds without progress."""
PIECE_TIMEOUT = 600.0
"""Seconds for a piece, which reports no progress: 28 kB/s."""
FIRST_SENT_BYTES = 2 * PIECE_BYTES
"""No piece of a smaller file is sent: the writer must be a whole piece further on."""
_NOTHING = RangeSet()


class _Way(Enum):
    """How an upload brings what is dirty."""

    RANGES = auto()
    """The remote writes the dirty ranges in place."""
    WHOLE = auto()
    """All of the old content was brought here, and all of the file is sent."""
    PARTS = auto()
    """The dirty ranges are sent, and the server copies the rest."""


class FileUpload:
    """Sizes and offsets in bytes. `lock` keeps uploads and renames of the file apart."""

    def __init__(
        self, remote: RemoteFile, file: CacheFile, state: State, reader: Reader, shared: Shared
    ) -> None:
        self._remote = remote
        self._file = file
        self._state = state
        self._reader = reader
        self._store = shared.store
        self._nursery = shared.nursery
        self.lock = trio.Lock()
        self.failure: RemoteError | None = None
        """Of an upload that no program waited for; told once."""
        self._way = _Way.RANGES
        """How the last upload that was prepared goes."""
        self._under_way: Snapshot | None = None
        self._done_bytes = 0
        """Sent by the upload under way."""
        self._delivery = Delivery()
        """Of the upload under way, or the last one."""
        self._most_done = 0
        """By any attempt since the last upload that was confirmed."""
        self.advanced_at = -math.inf
        """When an attempt came further than those before, by trio's clock."""
        self._write_handle = NO_HANDLE
        """The remote holds the file open under it since it was made."""
        self._sending = StreamingUpload(self._send_piece, self._handle_for_sending, shared.nursery)

    # --- what it is -------------------------------------------------------------------------------

    @property
    def is_being_sent(self) -> bool:
        """Whether pieces are being sent, under the name that the file has."""
        return self._sending.handle != NO_HANDLE

    @property
    def may_have_arrived(self) -> bool:
        """Whether the upload that began last was sent: not while it waited for the namespace."""
        return self._delivery.may_have_arrived

    @property
    def dirty_bytes(self) -> int:
        """All bytes that the remote has not confirmed."""
        return self._file.dirty.total + self._in_upload.total

    @property
    def bytes_left(self) -> int:
        """The bytes that are still to be sent, as far as is known."""
        dirty = self._file.dirty.total - self._sending.sent.total
        return max(0, dirty + max(0, self._in_upload.total - self._done_bytes))

    @property
    def base_size(self) -> int:
        """How many bytes of the remote's old content count until all is confirmed."""
        now = self._reader.base.size
        return min(now, self._under_way.base_size) if self._under_way else now

    @property
    def _in_upload(self) -> RangeSet:
        """What the upload under way brings, sent in pieces or not."""
        return self._under_way.ranges if self._under_way else _NOTHING

    @property
    def holds_base(self) -> bool:
        """Whether the upload under way replaces old content, which may soon be here only."""
        snapshot = self._under_way
        return self._way is _Way.WHOLE and snapshot is not None and snapshot.base_size > 0

    def unconfirmed_blocks(self) -> list[tuple[int, int]]:
        """The (start, end) ranges that the remote has not confirmed, extended to their blocks: all
        of a block is in the cache file once a part of it was written, and what the journal does
        not tell of counts as not there."""
        size, whole = self._file.size, RangeSet()
        if self._under_way and self._way is _Way.WHOLE:
            whole.add(0, size)
        for start, end in [*self._file.dirty, *self._in_upload]:
            first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
            whole.add(first * BLOCK_BYTES, min(last * BLOCK_BYTES, size))
        return list(whole)

    def note_failure(self, error: RemoteError | None) -> None:
        """An upload failed of which no program heard: the next close(2) tells."""
        self.failure = error

    def take_failure(self) -> RemoteError | None:
        """The failure that no program was told yet; it counts as told."""
        failure, self.failure = self.failure, None
        return failure

    # --- sending while it is written --------------------------------------------------------------

    def note_written(self, offset: int, end: int) -> None:
        """[offset, end) of a file of at least FIRST_SENT_BYTES was written: send what the writer
        left behind. No await."""
        self._sending.wrote(offset, end)
        if self._may_send():
            self._sending.advance(self._file.dirty, end)

    def _may_send(self) -> bool:
        """Not of what was appended to a file that others may append to as well."""
        state = self._state
        if self._reader.base.size or state.motion is not None or state.is_unlinked:
            return False
        if state.remote in (RemoteSide.ABSENT, RemoteSide.CREATED):
            return True
        return state.remote is not RemoteSide.REPLACES and state.changes >= Changes.ANY

    def note_created(self, handle: int) -> None:
        """The remote holds the file, which it has just made, open under this handle."""
        self._write_handle = handle

    def _handle_for_sending(self) -> int:
        return self._write_handle or self._remote.namespace.new_handle()

    async def _send_piece(self, handle: int, offset: int) -> None:
        """Where the remote writes in place, the file is there from now on, whatever follows."""
        base_version = self._base_version(_Way.RANGES)
        if self._remote.capabilities.partial_writes:
            self._state.note_begun()
        request = UploadPieceRequest(
            self._remote.place.path,
            offset,
            PIECE_BYTES,
            stat.S_IMODE(self._remote.place.entry.mode),
            handle,
            base_version,
        )
        with self.pinned():
            await self._remote.namespace.call(
                m.UploadPiece(request, self._file.path), type(None), PIECE_TIMEOUT
            )

    def stop_sending(self) -> None:
        """What was sent is of no use any more."""
        handle = self._sending.reset() or self._write_handle
        self._write_handle = NO_HANDLE
        self._abandon(handle)

    def _abandon(self, handle: int) -> None:
        if handle != NO_HANDLE:
            self._nursery.start_soon(self._reader.base.release, handle)

    # --- uploading --------------------------------------------------------------------------------

    async def complete(self) -> None:
        """Bring into the cache what the remote must be sent besides the dirty ranges."""
        if self._remote.capabilities.partial_writes:
            self._way = _Way.RANGES
        elif self._may_copy_parts():
            self._way = _Way.PARTS
        else:
            await self.fetch_whole()
            self._way = _Way.WHOLE

    async def fetch_whole(self) -> None:
        """Have all of the file here, and undamaged."""
        while True:
            await self._reader.fetch_all()
            if await self._reader.verify_all():
                return

    def _may_copy_parts(self) -> bool:
        """Whether the server can make the new object of the old one and what is dirty."""
        is_large = self._reader.base.size >= PART_COPY_BYTES
        return self._remote.capabilities.part_copies and is_large

    def falls_back(self) -> bool:
        """The remote could not do it that way: whether there is another."""
        if self._way is not _Way.PARTS:
            return False
        known = msgspec.structs.replace(self._remote.capabilities, part_copies=False)
        self._remote.capabilities = known
        self._remote.namespace.knows_better(known)
        return True

    async def begin(self) -> Snapshot:
        """What is dirty now is on its way; what is written from now on is dirty anew."""
        fetcher, has_stopped = self._reader.fetcher, False
        while True:
            if self._sending.handle != NO_HANDLE or self._sending.under_way:
                await self._sending.wait_idle()
                has_stopped = True
            if not fetcher.flights:
                break
            await fetcher.wait_idle()
        # No await from here: atomic.
        sent, sent_under = self._sending.sent, self._sending.handle
        in_place = self._remote.capabilities.partial_writes
        append = in_place and self._state.goes_to_the_end and not sent
        unsent = self._state.begin_upload()
        snapshot = Snapshot(
            self._file.dirty,
            self._file.size,
            self._reader.base.size,
            unsent.attributes,
            SentPieces(sent, sent_under if sent else self._write_handle),
            append,
        )
        if has_stopped:
            self._sending.reset()
            if sent_under not in (NO_HANDLE, snapshot.pieces.handle):
                self._abandon(sent_under)
        self._write_handle = NO_HANDLE
        self._file.dirty = RangeSet()
        self._done_bytes = sent.total
        self._delivery = Delivery()
        self._reader.base.size = self._file.size
        self._under_way = snapshot
        return snapshot

    async def send(self, snapshot: Snapshot, *, sync: bool) -> Entry:
        """Bring the snapshot to the remote; returns the file's entry there. Raises RemoteError."""
        request = self._request(snapshot, sync=sync)
        try:
            return await self._upload(request)
        except PiecesLost as lost:
            log.info("%r is sent again: %s", self._remote.place.path, lost.message)
        in_place = self._remote.capabilities.partial_writes
        again = msgspec.structs.replace(
            request,
            ranges=_lengths(snapshot.ranges),
            handle=NO_HANDLE,
            base_version=None if in_place else request.base_version,
        )
        return await self._upload(again)

    def _request(self, snapshot: Snapshot, *, sync: bool) -> UploadRequest:
        entry = self._remote.place.entry
        times = Attributes(atime_ns=entry.atime_ns, mtime_ns=entry.mtime_ns)
        ranges = snapshot.ranges.without(snapshot.pieces.ranges)
        if snapshot.append:  # the journal may have told of whole blocks
            ranges = ranges.without(RangeSet([(0, snapshot.base_size)]))
        return UploadRequest(
            self._remote.place.path,
            snapshot.size,
            snapshot.base_size,
            _lengths(ranges),
            merge_attributes(times, snapshot.attributes),
            stat.S_IMODE(entry.mode),
            sync,
            self._base_version(self._way),
            self._state.remote is RemoteSide.REPLACES,
            snapshot.pieces.handle,
            whole=self._way is not _Way.PARTS,
            times_set=snapshot.attributes.mtime_ns is not None,
            append=snapshot.append,
        )

    def _base_version(self, way: _Way) -> bytes | None:
        """What an upload may change (see UploadRequest). The server copies parts of the one version
        only."""
        remote = self._state.remote
        if remote is RemoteSide.ABSENT:
            return b""
        is_known = remote is RemoteSide.PRESENT or way is _Way.PARTS
        return self._file.version if is_known else None

    async def _upload(self, request: UploadRequest) -> Entry:
        return await self._remote.namespace.upload(
            request, self._file.path, UPLOAD_TIMEOUT, self._progressed, self._delivery
        )

    def _progressed(self, done: int) -> None:
        """Bytes are on their way: where they are written in place, the remote's version may be any
        from now on. With none done, only others' bytes move."""
        self._done_bytes = done
        if done > self._most_done:
            self._most_done, self.advanced_at = done, trio.current_time()
        if done and self._remote.capabilities.partial_writes:
            self._state.note_begun()

    def confirm(self, snapshot: Snapshot, entry: Entry) -> None:
        """`entry` is the file on the remote now."""
        self.failure = None
        self._most_done = 0
        self._arrived(snapshot, entry)
        self._state.confirm_upload()
        if not self._file.dirty:
            self._file.written_sums.clear()
        self._end()

    def _arrived(self, snapshot: Snapshot, entry: Entry) -> None:
        """What was appended may stand elsewhere on the remote, after what others appended. Then
        what was written here meanwhile keeps its place after it, in the version that was here; the
        remote's is followed once nothing is dirty."""
        base = self._reader.base
        if not snapshot.append or entry.size == snapshot.size:
            self._file.version = entry.version
        elif not self._state.changes:
            base.adopt(entry)
        base.growing = False

    def fail(self, snapshot: Snapshot, *, begun: bool) -> None:
        """All is dirty as before. `begun`: the remote may have begun to write."""
        file, base = self._file, self._reader.base
        for start, end in snapshot.ranges:
            file.dirty.add(start, min(end, file.size))
        if self._way is _Way.WHOLE:  # perhaps it replaced the old version: all is here only
            file.dirty.add(0, min(snapshot.size, file.size))
        base.size = min(base.size, snapshot.base_size)
        self._abandon(snapshot.pieces.handle)
        self._state.fail_upload(begun=begun)
        self._end()

    def _end(self) -> None:
        self._under_way = None
        self._done_bytes = 0
        self._store.note_cleaned()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While the cache file is read to be sent, nothing in it is evicted."""
        self._file.pins += 1
        try:
            yield
        finally:
            self._file.pins -= 1


def _lengths(ranges: RangeSet) -> list[tuple[int, int]]:
    return [(start, end - start) for start, end in ranges]
