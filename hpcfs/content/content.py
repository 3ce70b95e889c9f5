"""The content of one open file, which all handles of its node share.

Bytes come from three places: the blocks of the remote's version that are in the cache file, what
was written here (dirty), and zeros (holes, and what lies beyond the remote's old end). A content
has parts for what is asked of it: `state` (content/state.py) says what the file is towards the
remote, the journal and its name; `reader` brings and reads bytes; `upload` sends them. Writing is
here, and so is what others report of the file: they call methods, and assign nothing.

Sections without an await are atomic and marked; there is no lock but the one that keeps uploads of
one file apart.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.ranges import RangeSet
from hpcfs.content import sums
from hpcfs.content.reader import Reader, blocks_of
from hpcfs.content.record import Unconfirmed, flags_of
from hpcfs.content.shared import RemoteFile, Shared
from hpcfs.content.state import Changes, Durability, Name, RemoteSide, State
from hpcfs.content.upload import FIRST_SENT_BYTES, FileUpload
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import BLOCK_BYTES, NO_ATTRIBUTES, Attributes
from hpcfs.model.errors import CacheFull, Stale, TooLarge

APPEND_ATTEMPTS = 20
"""How often an append starts again because others changed the file meanwhile."""
_SUMMED_HERE = 4
"""Blocks whose checksums are computed without a thread: that takes 20 us for each."""
_SUMMED_AT_ONCE = 128
"""Blocks that one thread reads at once: 8 MiB."""


class Content:
    """Sizes and offsets in bytes. Raises RemoteError and FilesystemError."""

    def __init__(self, remote: RemoteFile, file: CacheFile, shared: Shared) -> None:
        self._remote = remote
        self._store = shared.store
        self.place = remote.place
        self.namespace = remote.namespace
        self.file = file
        self.state = State()
        self.reader = Reader(remote, file, self.state, shared)
        self.upload = FileUpload(remote, file, self.state, self.reader, shared)
        self.users = 0
        self.writers = 0
        """Writes that are under way: each may make the file dirty at any moment."""
        self.closing: trio.Event | None = None
        """While the last handle closes; set once it is through."""

    # --- what it is -------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What the remote can do."""
        return self._remote.capabilities

    @property
    def size(self) -> int:
        """Bytes, as the mount shows the file."""
        return self.file.size

    @property
    def version(self) -> bytes:
        """The remote's version that it stands on."""
        return self.file.version

    def is_dirty(self) -> bool:
        """Whether the remote lacks something of the file, or is just being changed."""
        return self.state.is_dirty

    @property
    def is_noted(self) -> bool:
        """Whether the journal knows that it is being written to: more may be written at once."""
        return self.state.durability is Durability.JOURNALED

    @property
    def is_ahead(self) -> bool:
        """Whether the remote's answers must not overwrite what is here: dirty, or removed here."""
        return self.state.is_ahead

    @property
    def is_as_made(self) -> bool:
        """Whether it was made on the remote a moment ago, and nothing else: programs close a second
        descriptor (dup(2), fork(2)) before they write."""
        return self.state.remote is RemoteSide.CREATED and self.state.is_untouched

    @property
    def is_only_here(self) -> bool:
        """Whether the remote has nothing of this name, for certain: no upload broke off."""
        return self.state.remote is RemoteSide.ABSENT

    @property
    def may_be_missing(self) -> bool:
        """Whether the remote may have nothing of this name."""
        return self.state.may_be_missing

    # --- users ------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Count one user more."""
        self.users += 1

    def leave(self) -> bool:
        """Count one user less; whether it was the last one."""
        self.users -= 1
        return not self.users

    def begin_last_close(self) -> None:
        """The last handle closes, until `end_last_close`."""
        self.closing = trio.Event()

    def end_last_close(self) -> None:
        """The last close is through; whoever waited for that goes on."""
        assert self.closing is not None
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

    # --- what becomes of it -----------------------------------------------------------------------

    def note_created(self, handle: int) -> None:
        """The remote made the empty file a moment ago, and holds it open under this handle."""
        self.state.note_created()
        self.upload.note_created(handle)

    def note_absent(self) -> None:
        """The remote has no such file yet: the first upload makes it."""
        self.state.note_absent()

    def resume(self, row: Unconfirmed) -> None:
        """Go on with what an earlier mount left: it is written as far as the row says."""
        self.reader.base.size = row.base_size
        self.file.written_sums = sums.unpack(row)
        self.state.resume(row.remote_side, row.unsent)
        self.reader.use_disk()

    def note_served(self) -> None:
        """A program has read bytes of this version."""
        self.reader.base.served = True

    def renew_version(self, version: bytes) -> None:
        """The same content has another version on the remote: its time was set."""
        self.file.version = version

    def note_renamed_here(self, *, over_another: bool) -> None:
        """The file, which is only here, has another name now; `over_another`: the remote has
        something of that name, which the upload replaces in one step."""
        self.state.note_renamed_here(over_another=over_another)

    @contextmanager
    def in_motion(self) -> Iterator[None]:
        """While the remote renames the file: fetches wait for its end, or try again after it."""
        self.state.begin_motion()
        try:
            yield
        finally:
            self.state.end_motion()

    def unlink(self) -> None:
        """The last name was removed here: what is written from now on goes nowhere."""
        self.state.unlink()
        self.upload.stop_sending()

    def note_perhaps_removed(self) -> None:
        """The remote was told to remove the file, and did not answer: it may have nothing of it.
        All of it is here."""
        self.file.dirty.add(0, self.size)
        self.reader.base.size = 0
        self.state.note_changed(Changes.ANY)
        self.state.note_begun()

    def supersede(self) -> None:
        """Others removed the file on the remote, or put another one in its place."""
        self.state.supersede()

    def discard(self) -> None:
        """Nothing of it will be uploaded any more; who has it open reads on."""
        self.state.discard()
        self.upload.stop_sending()
        self.file.dirty = RangeSet()

    def retire(self) -> bool:
        """It is closed for good; False if it was before."""
        if self.state.name is Name.RETIRED:
            return False
        self.state.retire()
        self.upload.stop_sending()
        return True

    # --- the journal ------------------------------------------------------------------------------

    def unconfirmed(self, reason: str = "", *, writing: bool = False) -> Unconfirmed:
        """The journal's row of it. `writing` says that more will be written."""
        base_size = self.upload.base_size
        ranges = self.upload.unconfirmed_blocks()
        is_at_rest = self.state.is_at_rest and not (writing or self.writers)
        return Unconfirmed(
            self.file.name,
            self.namespace.name,
            self.namespace.origin,
            self.place.path,
            self.size,
            base_size,
            ranges,
            self.file.path,
            self.version,
            self.place.entry,
            self.capabilities,
            writing=writing,
            reason=reason,
            sums=sums.pack(ranges, self.file.written_sums) if is_at_rest else b"",
            **flags_of(self.state, base_size),
        )

    def row_without_remote(self, reason: str) -> Unconfirmed | None:
        """The journal's row for it while the remote removes it: nothing there counts. None where
        not all of the file is here."""
        if self.reader.lacks_bytes:
            return None
        row = self.unconfirmed(reason)
        ranges = [(0, self.size)] if self.size else []
        known = sums.pack(ranges, self.file.written_sums) if row.sums else b""
        return msgspec.structs.replace(
            row, base_size=0, ranges=ranges, sums=known, new=True, attempted=True, appended=False
        )

    async def sum_written(self) -> None:
        """Compute the checksums of what is dirty, for the journal; of a file that is written to
        meanwhile they stay unknown. Raises OSError."""
        file = self.file
        blocks = sums.blocks_in(self.upload.unconfirmed_blocks())
        missing = [block for block in blocks if block not in file.written_sums]
        for first in range(0, len(missing), _SUMMED_AT_ONCE):
            some, changes = missing[first : first + _SUMMED_AT_ONCE], file.changes
            found = file.checksums_now(some) if len(missing) <= _SUMMED_HERE else None
            if found is None:
                found = await trio.to_thread.run_sync(file.compute_checksums, some)
            if file.changes != changes:
                return
            file.written_sums.update(zip(some, found, strict=True))

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

    def note_row(self, *, writing: bool = False) -> None:
        """The journal has a row for it now, of a file that is being written to or not."""
        self.state.note_row(writing=writing)

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

    # --- attributes -------------------------------------------------------------------------------

    def set_with_upload(self, attributes: Attributes) -> None:
        """The next upload sets these."""
        self.state.set_with_upload(attributes)

    def note_stamped(self, mode: int | None) -> None:
        """The file was written to now: a time that was set before is not to come back with the
        upload, and the mode is this one if not None."""
        if mode is not None or self.state.attributes != NO_ATTRIBUTES:
            self.state.note_stamped(mode)

    # --- writing ----------------------------------------------------------------------------------

    def check_not_superseded(self) -> None:
        """Before it is written to. Raises Stale."""
        if self.state.is_superseded:
            raise Stale("the file was replaced on the remote since it was opened; open it again")

    async def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` into the cache file."""
        if not data:
            return
        with self.write_under_way():
            await self.reader.prepare_write(offset, offset + len(data))
            try:
                self._write_now(offset, data, Changes.ANY)
            except CacheFull:
                if not await self._store.make_room(4 * len(data) + BLOCK_BYTES):
                    raise
                await self.reader.prepare_write(offset, offset + len(data))
                self._write_now(offset, data, Changes.ANY)
        self._store.note_added(len(data))

    async def append(self, data: bytes) -> None:
        """Write at the end, wherever that is: the kernel's idea of it may be a second old."""
        with self.write_under_way():
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
        """Prepare to write at the end; a file of which nothing was read nor written here is
        followed if others changed it."""
        offset, attempts = -1, 0
        while offset != self.size:
            offset = self.size
            try:
                await self.reader.prepare_write(offset, offset + length)
            except Stale:
                attempts += 1
                version = self.version
                if attempts > APPEND_ATTEMPTS:
                    raise
                if not await self.reader.base.follow_name() and self.version == version:
                    raise  # else somebody who looked at it meanwhile has followed it

    def _write_now(self, offset: int, data: bytes, change: Changes) -> None:
        """No await: atomic."""
        if self.state.name is not Name.LINKED:
            self.check_not_superseded()
        end = offset + len(data)
        old_size = self.file.size
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
        state = self.state
        if change > state.changes or state.durability is not Durability.JOURNALED:
            state.note_changed(change)
        if self.file.size >= FIRST_SENT_BYTES:
            self.upload.note_written(offset, end)

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
        for block in blocks_of(offset, end):
            start, stop = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            if self.file.dirty.overlaps(start, stop):
                self.file.dirty.add(max(start, offset), min(stop, end))
            else:
                self.file.discard(block)
        self.file.resize(old_size)

    async def truncate(self, size: int) -> bool:
        """Set the size; whether that changed it."""
        await self.reader.fetcher.wait_idle()
        # No await from here: atomic.
        self.check_not_superseded()
        if size == self.size:
            return False
        self._resize(size)
        base = self.reader.base
        base.size = min(base.size, size)
        self.mark_resized()
        self.upload.stop_sending()
        return True

    def mark_resized(self) -> None:
        """A program set the size, perhaps to what it was."""
        self.state.note_changed(Changes.RESIZED)
