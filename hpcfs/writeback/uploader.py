"""Brings what is dirty in a file to the remote, and keeps what the remote refuses.

`through` mode: close(2) and fsync(2) end here and return once the remote confirmed the bytes.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Protocol

import trio

from hpcfs.transfer.messages import Entry, RemoteError
from hpcfs.writeback.journal import Journal, Unconfirmed

log = logging.getLogger(__name__)


class Uploadable(Protocol):
    """What the uploader needs of an open file (filesystem/content.py)."""

    upload_lock: trio.Lock
    journaled: bool

    def is_dirty(self) -> bool: ...

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

    async def before_write(self, file: Uploadable) -> None:
        """Call before the first byte is dirty."""
        if not file.journaled:
            file.journaled = True
            await self._journal.note(file.unconfirmed())

    async def upload(self, file: Uploadable, *, sync: bool = False) -> Entry | None:
        """Return once the remote has it, with the entry there, or None if nothing was dirty.

        Raises RemoteError; the file is then as dirty as before.
        """
        async with file.upload_lock:
            if not file.is_dirty():
                return None
            with file.pinned():
                await file.complete()
                snapshot = await file.begin_upload()
                entry = None
                try:
                    file.journaled = True
                    await self._journal.note(file.unconfirmed())
                    entry = await file.send(snapshot, sync=sync)
                finally:
                    file.end_upload(snapshot, entry)
            if not file.is_dirty():
                await self.forget(file)
            return entry

    async def forget(self, file: Uploadable) -> None:
        """Nothing of it is unconfirmed: it was uploaded, or removed."""
        if file.journaled:
            file.journaled = False
            await self._journal.confirm(file.unconfirmed().name)

    async def close(self, file: Uploadable) -> bool:
        """The last handle closes: try once more, then keep what the remote refuses.

        True if the remote has everything.
        """
        try:
            await self.upload(file)
        except RemoteError as error:
            await self._journal.keep(file.unconfirmed(error.message))
            return False
        return True
