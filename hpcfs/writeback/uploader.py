"""Brings what is dirty in a file to the remote, and keeps what the remote refuses.

`through` mode: close(2) and fsync(2) end here and return once the remote confirmed the bytes.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Protocol

import trio

from hpcfs.transfer.messages import CacheDiskFull, Entry
from hpcfs.writeback.journal import Journal, Unconfirmed

log = logging.getLogger(__name__)


class Uploadable(Protocol):
    """What the uploader needs of an open file (filesystem/content.py)."""

    upload_lock: trio.Lock
    journaled: bool
    writers: int
    """Writes that are under way: each may make the file dirty at any moment."""

    def is_dirty(self) -> bool: ...

    def use_disk(self) -> None:
        """Its cache file is on the disk from now on: what is dirty must outlive the daemon."""
        ...

    def pinned(self) -> AbstractContextManager[None]:
        """Nothing of its cache file is evicted meanwhile."""
        ...

    async def complete(self) -> None:
        """Bring into the cache what the remote must be sent besides the dirty ranges."""
        ...

    async def begin_upload(self) -> Any:
        """Take a snapshot of what is dirty."""
        ...

    async def send(self, snapshot: Any, *, sync: bool) -> Entry:
        """Bring the snapshot to the remote."""
        ...

    def end_upload(self, snapshot: Any, entry: Entry | None) -> None:
        """`entry` is the file on the remote now; None: it failed, all is dirty as before."""
        ...

    def unconfirmed(self, reason: str = "") -> Unconfirmed:
        """The journal's row for it."""
        ...


class Uploader:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    @asynccontextmanager
    async def writing(self, file: Uploadable) -> AsyncIterator[None]:
        """Around whatever makes bytes dirty: the journal knows of the file before, and until then.

        Raises CacheDiskFull when the journal can't be written.
        """
        file.writers += 1
        try:
            file.use_disk()
            if not file.journaled:
                await self._note(file)
            yield
        finally:
            file.writers -= 1

    async def _note(self, file: Uploadable) -> None:
        try:
            await self._journal.note(file.unconfirmed())
        except sqlite3.Error as error:
            raise CacheDiskFull(f"the journal in the cache can't be written: {error}") from None
        file.journaled = True

    async def upload(self, file: Uploadable, *, sync: bool = False) -> Entry | None:
        """Return once the remote has it, with the entry there, or None if nothing was dirty.

        Raises RemoteError; the file is then as dirty as before.
        """
        async with file.upload_lock:
            if not file.is_dirty():
                return None
            file.use_disk()
            with file.pinned():
                await file.complete()
                snapshot = await file.begin_upload()
                entry = None
                try:
                    await self._note_progress(file)
                    entry = await file.send(snapshot, sync=sync)
                finally:
                    file.end_upload(snapshot, entry)
            if not file.is_dirty() and not file.writers:
                await self.forget(file)
            return entry

    async def _note_progress(self, file: Uploadable) -> None:
        """A journal that can't be written is no reason not to bring the bytes to the remote."""
        try:
            await self._note(file)
        except CacheDiskFull as error:
            log.error("%s", error.message)  # noqa: TRY400 - no bug: the message says it all

    async def forget(self, file: Uploadable) -> None:
        """Nothing of it is unconfirmed: it was uploaded, or removed."""
        if not file.journaled:
            return
        file.journaled = False
        try:
            await self._journal.confirm(file.unconfirmed().name)
        except sqlite3.Error as error:
            file.journaled = True
            log.error("the journal in the cache can't be written: %s", error)  # noqa: TRY400

    async def keep(self, file: Uploadable, reason: str) -> None:
        """The last handle closed and the remote refuses: the bytes go where the user finds them.

        Raises OSError or sqlite3.Error when the disk fails; then they are where they were.
        """
        await self._journal.keep(file.unconfirmed(reason))
