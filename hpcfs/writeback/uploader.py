"""Brings what is dirty in a file to the remote, and keeps what the remote refuses.

fsync(2) ends here in both modes, close(2) in `through` mode: they return once the remote confirmed
the bytes. In `back` mode close(2) returns once the journal has them (`persist`).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from hpcfs.content.content import Content
from hpcfs.content.record import Unconfirmed
from hpcfs.content.state import RemoteSide
from hpcfs.model.entries import Entry
from hpcfs.model.errors import (
    CacheFull,
    Conflict,
    NotConnected,
    NotSupported,
    RemoteError,
    Unreachable,
)
from hpcfs.site.namespace import Delivery
from hpcfs.writeback.journal import Journal

log = logging.getLogger(__name__)

AGAIN_SECONDS = 0.1
"""Before an upload whose connection broke is made again; a lost namespace is waited for besides."""


class Uploader:
    """Uploads contents and keeps the journal in step."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    @asynccontextmanager
    async def writing(self, file: Content) -> AsyncIterator[None]:
        """Surround whatever makes bytes dirty: the journal knows of the file before, and until
        then.

        Raises Stale, and CacheFull when the journal can't be written.
        """
        file.check_not_superseded()
        with file.write_under_way():
            file.reader.use_disk()
            is_first = file.state.wants_row
            if is_first:
                await self.note_writing(file)
            yield
            if is_first and file.reader.base.size:
                await self.note_writing(file)

    async def persist(self, file: Content, *, instead_of: str | None = None) -> None:
        """Return once the journal has all that is dirty, and a loss of power does not take it away.

        Raises CacheFull when the journal can't be written.
        """
        if not file.state.needs_row:
            return
        file.reader.use_disk()
        with file.persisting():
            try:
                await file.sum_written()
            except OSError as error:
                raise CacheFull(f"the cache's disk can't be read: {error.strerror}") from None
            await self._note(file, closed=True, instead_of=instead_of)

    async def _note(
        self,
        file: Content,
        row: Unconfirmed | None = None,
        *,
        durable: bool = False,
        closed: bool = False,
        instead_of: str | None = None,
    ) -> None:
        """Write a row, except for what nobody will upload: it would come back with the next
        mount."""
        if not file.state.needs_row:
            return
        removed = file.state.rows_removed
        try:
            row = row or file.unconfirmed()
            await self.journal.note(row, durable=durable, closed=closed, instead_of=instead_of)
        except (sqlite3.Error, OSError) as error:
            raise CacheFull(f"the journal in the cache can't be written: {error}") from None
        if file.state.rows_removed == removed:
            file.note_row()

    async def upload(
        self, file: Content, confirmed: Callable[[Entry], None], *, sync: bool = False
    ) -> None:
        """Return once the remote has it. `confirmed` hears what the entry there is at the moment
        in which the file is dirty no more: nobody may see it clean and as it was.

        Raises RemoteError; the file is then as dirty as before.
        """
        async with file.upload.lock:
            if not file.is_dirty():
                if not file.writers:
                    await self.forget(file)
                return
            file.reader.use_disk()
            with file.upload.pinned():
                confirmed(await self._send_somehow(file, sync=sync))
            if file.is_dirty():
                await self.note_progress(file)  # the row has what just arrived
            elif not file.writers:
                await self.forget(file)

    async def _send_somehow(self, file: Content, *, sync: bool) -> Entry:
        """Send it, in another way where the remote can't do the first, and again after an outage:
        what may have arrived is no longer compared with."""
        namespace = file.namespace
        failing_since: float | None = None
        while True:
            await file.upload.complete()
            try:
                return await self._send(file, sync=sync)
            except NotSupported:
                if not file.upload.falls_back():
                    raise
            except Unreachable as error:
                now = trio.current_time()
                failing_since = max(failing_since or now, file.upload.advanced_at)
                is_over = now - failing_since >= namespace.patience
                if is_over or namespace.is_away or isinstance(error, NotConnected):
                    raise
                log.info("%r is uploaded again: %s", file.place.path, error.message)
                await trio.sleep(AGAIN_SECONDS)

    async def _send(self, file: Content, *, sync: bool) -> Entry:
        snapshot = await file.upload.begin()
        try:
            await self.note_progress(file, durable=file.upload.holds_base)
        except BaseException:
            file.upload.fail(snapshot, begun=False)
            raise
        try:
            entry = await file.upload.send(snapshot, sync=sync)
        except BaseException as error:
            is_unwritten = isinstance(error, Conflict | NotConnected | NotSupported)
            begun = file.upload.may_have_arrived and not is_unwritten
            file.upload.fail(snapshot, begun=begun)
            if not begun and file.state.remote is not RemoteSide.PARTIAL:
                with trio.CancelScope(shield=True):
                    await self.note_progress(file)  # the row must not say that it was sent
            raise
        file.upload.confirm(snapshot, entry)
        return entry

    async def note_writing(self, file: Content) -> None:
        """Note what is known so far of a file that is open and dirty. Raises CacheFull."""
        await self._note(file, file.unconfirmed(writing=True))
        if file.state.has_row:
            file.note_row(writing=True)

    async def note_cut(self, file: Content, size: int) -> None:
        """Note a truncation before it: a row that claims bytes which are gone would make zeros of
        them.

        Raises CacheFull when the journal can't be written.
        """
        row = file.cut_to(size)
        if row is not None:
            await self._note(file, row, durable=True)

    async def note_progress(
        self, file: Content, reason: str = "", *, durable: bool = False
    ) -> None:
        """Write the row as it is now. If that fails it is logged: it is no reason not to upload."""
        await self._note_or_log(file, file.unconfirmed(reason), durable=durable)

    async def _note_or_log(self, file: Content, row: Unconfirmed, *, durable: bool) -> None:
        try:
            await self._note(file, row, durable=durable)
        except CacheFull as error:
            log.error("%s", error.message)  # noqa: TRY400 - no bug: the message says it all

    @asynccontextmanager
    async def removing(self, file: Content, delivery: Delivery) -> AsyncIterator[None]:
        """Surround the request to remove a file that is dirty: whoever is killed or hears no answer
        brings all of it, as the remote may have nothing of it; a refusal changes nothing.

        A row that can't be written is logged: it is no reason not to remove.
        """
        with file.upload.pinned():  # what the row says is here stays
            known = self.journal.find(file.file.name)
            reason = known.reason if known else ""
            row = file.row_without_remote(reason)
            try:
                if row is not None:
                    await self._note_or_log(file, row, durable=file.upload.base_size > 0)
                yield
            except BaseException as error:
                is_answer = isinstance(error, RemoteError) and not isinstance(error, Unreachable)
                if row is not None and delivery.may_have_arrived and not is_answer:
                    file.note_perhaps_removed()
                elif row is not None:
                    with trio.CancelScope(shield=True):
                        await self.note_progress(file, reason)
                raise

    async def forget(self, file: Content) -> None:
        """Delete the row of a file of which nothing is unconfirmed: uploaded, or removed."""
        if not file.state.has_row:
            return
        file.note_no_row()
        try:
            await self.journal.confirm(file.unconfirmed().name)
        except sqlite3.Error as error:
            file.note_row()
            log.error("the journal in the cache can't be written: %s", error)  # noqa: TRY400

    async def strand(self, file: Content, reason: str) -> None:
        """Move the bytes of a file that can't be uploaded to where the user finds them.

        The mount does not show them. Raises OSError or sqlite3.Error when the disk fails; then they
        are where they were.
        """
        row = file.unconfirmed(reason)
        with file.stranding():
            await self.journal.strand(row)
