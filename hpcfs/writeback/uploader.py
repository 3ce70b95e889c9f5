"""Uploads what is dirty in a file, and keeps the journal in step with that.

fsync(2) ends here in both modes, close(2) in `through` mode: they return once the remote confirmed
the bytes. In `back` mode close(2) returns once the journal has them (`persist`).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from hpcfs.content.content import Content
from hpcfs.content.record import Unconfirmed
from hpcfs.content.state import RemoteSide
from hpcfs.model.entries import Entry
from hpcfs.model.errors import CacheFull, Conflict, NotConnected, NotSupported
from hpcfs.writeback.journal import Journal

log = logging.getLogger(__name__)


class Uploader:
    """Uploads contents one at a time each, and notes in the journal what is not uploaded yet."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    @asynccontextmanager
    async def writing(self, content: Content) -> AsyncIterator[None]:
        """Surround whatever makes bytes dirty: the journal has a row for the file before.

        Raises CacheFull when the journal can't be written, and Stale when the file was replaced.
        """
        content.check_not_superseded()
        with content.write_under_way():
            content.reader.use_disk()
            is_first = content.state.wants_row
            if is_first:
                await self.note_writing(content)
            yield
            if is_first and content.reader.base.size:
                await self.note_writing(content)

    async def persist(self, content: Content, *, instead_of: str | None = None) -> None:
        """Have all that is dirty, and its row, on the disk when this returns: a loss of power does
        not take it away. `instead_of` is the row of a file that it replaces in the same step.

        Raises CacheFull when the journal can't be written.
        """
        if not content.state.needs_row:
            return
        content.reader.use_disk()
        with content.persisting():
            await self._note(content, durable=True, instead_of=instead_of)

    async def _note(
        self,
        content: Content,
        row: Unconfirmed | None = None,
        *,
        durable: bool = False,
        instead_of: str | None = None,
    ) -> None:
        """Write the row, but none for what nobody will upload: the next mount would bring it."""
        if not content.state.needs_row:
            return
        try:
            row = row or content.unconfirmed()
            await self.journal.note(row, durable=durable, instead_of=instead_of)
        except (sqlite3.Error, OSError) as error:
            raise CacheFull(f"the journal in the cache can't be written: {error}") from None
        content.note_row()

    async def upload(
        self, content: Content, confirmed: Callable[[Entry], None], *, sync: bool = False
    ) -> None:
        """Return once the remote has it. `confirmed` is called with its entry there in the same
        moment in which the content becomes clean: nobody may see it clean and as it was.

        Raises RemoteError; the content is then as dirty as before.
        """
        async with content.upload.lock:
            if not content.is_dirty():
                if not content.writers:
                    await self.forget(content)
                return
            content.reader.use_disk()
            with content.upload.pinned():
                confirmed(await self._send_somehow(content, sync=sync))
            if content.is_dirty():
                await self.note_progress(content)  # the row has what just arrived
            elif not content.writers:
                await self.forget(content)

    async def _send_somehow(self, content: Content, *, sync: bool) -> Entry:
        while True:
            await content.upload.complete()
            try:
                return await self._send(content, sync=sync)
            except NotSupported:
                if not content.upload.falls_back():
                    raise

    async def _send(self, content: Content, *, sync: bool) -> Entry:
        snapshot = await content.upload.begin()
        try:
            await self.note_progress(content, durable=content.upload.holds_base)
        except BaseException:
            content.upload.fail(snapshot, begun=False)
            raise
        try:
            entry = await content.upload.send(snapshot, sync=sync)
        except (Conflict, NotConnected, NotSupported):  # nothing was written
            content.upload.fail(snapshot, begun=False)
            if content.state.remote is not RemoteSide.PARTIAL:
                await self.note_progress(content)  # nor does the row say so
            raise
        except BaseException:
            content.upload.fail(snapshot, begun=True)
            raise
        content.upload.confirm(snapshot, entry)
        return entry

    async def note_writing(self, content: Content) -> None:
        """Note what is known so far of a file that is still being written. Raises CacheFull."""
        await self._note(content, content.unconfirmed(writing=True))
        if content.state.has_row:
            content.note_row(writing=True)

    async def note_cut(self, content: Content, size: int) -> None:
        """Note that the file is about to be cut to `size` bytes: a row that claims bytes which are
        gone would make zeros of them.

        Raises CacheFull when the journal can't be written.
        """
        row = content.cut_to(size)
        if row is not None:
            await self._note(content, row, durable=True)

    async def note_progress(
        self, content: Content, reason: str = "", *, durable: bool = False
    ) -> None:
        """Note what an upload takes or leaves, and why it failed. A journal that can't be written
        is only logged: that is no reason not to bring the bytes to the remote."""
        try:
            await self._note(content, content.unconfirmed(reason), durable=durable)
        except CacheFull as error:
            log.error("%s", error.message)  # noqa: TRY400 - no bug: the message says it all

    async def forget(self, content: Content) -> None:
        """Remove the row: the file was uploaded, or removed. Errors are logged."""
        if not content.state.has_row:
            return
        content.note_no_row()
        try:
            await self.journal.confirm(content.unconfirmed().name)
        except sqlite3.Error as error:
            content.note_row()
            log.error("the journal in the cache can't be written: %s", error)  # noqa: TRY400

    async def strand(self, content: Content, reason: str) -> None:
        """Move the bytes of a file that can't be uploaded to where the user finds them (kept/); the
        mount does not show them any more.

        Raises OSError or sqlite3.Error when the disk fails; then they are where they were.
        """
        row = content.unconfirmed(reason)
        with content.stranding():
            await self.journal.keep(row)
