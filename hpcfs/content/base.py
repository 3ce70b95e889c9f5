"""The version of the remote's file that a content stands on: asked for, held open, followed.

Two versions are never mixed. A file that only grew on the remote is followed: its longer version
takes the place of the one that was open. After any other change what is not in the cache yet can't
be read any more. No section between two awaits needs a lock.
"""

from __future__ import annotations

import logging
import math
import stat
from collections.abc import Callable

from hpcfs.cache.file import CacheFile
from hpcfs.content.shared import Place, RemoteFile
from hpcfs.content.state import State
from hpcfs.model.entries import NO_HANDLE, Entry
from hpcfs.model.errors import Changed, NotFound, RemoteError, Stale
from hpcfs.protocol import messages as m

log = logging.getLogger(__name__)

FETCH_TIMEOUT = 90.0
"""Seconds without progress. Ranges share a link that may be slow; a dead link is noticed earlier,
by the connection's keepalive."""
VOUCH_SECONDS = 10.0
"""So long a program that reads from the remote need not ask for the file's attributes too."""
UNSIZED_BYTES = 1024 * 1024
"""Read at once of a file whose size says nothing; larger files don't tell a wrong size."""


class BaseVersion:
    """`size` is how many bytes of the version still count: it shrinks with a truncation, so that
    what was cut off never comes back. `now` is the tree's clock, in seconds."""

    def __init__(
        self, remote: RemoteFile, file: CacheFile, state: State, now: Callable[[], float]
    ) -> None:
        self._remote = remote
        self._file = file
        self._state = state
        self._now = now
        self.size = file.size
        self.handle = remote.namespace.new_handle()
        self.held = False
        """The remote has the file open under the handle."""
        self.growing = False
        """Others append to the file while it is open here."""
        self.served = False
        """Somebody may have read bytes of this version here."""
        self._vouched = 0.0
        """Until when a fetch last renewed what is known of the file, by the tree's clock."""
        self._looked = 0.0
        """When the remote was last asked for all attributes."""

    @property
    def place(self) -> Place:
        """Where the file is in the tree."""
        return self._remote.place

    @property
    def version(self) -> bytes:
        """The version's identity, as the remote tells it."""
        return self._file.version

    async def fetch(self, offset: int, length: int, *, urgent: bool = True) -> m.Fetched:
        """Bring a range of bytes into the cache file. Raises Changed where the remote has another
        version by now, and other RemoteErrors."""
        place, namespace = self._remote.place, self._remote.namespace
        request = m.Fetch(
            place.path,
            self.version,
            offset,
            length,
            self._file.path,
            self.handle,
            growing=self.growing,
            urgent=urgent,
        )
        asked, version = self._now(), self.version
        fetched = await namespace.fetch(request, FETCH_TIMEOUT)
        self.held = self.handle != NO_HANDLE
        if self.version == version:
            self._vouch(asked)
        return fetched

    async def is_current(self) -> bool:
        """Whether the remote has this version under the file's name. Raises RemoteError."""
        version, asked = self.version, self._now()
        if (await self._remote.namespace.stat(self._remote.place.path)).version != version:
            return False
        self._vouch(asked)
        return True

    def _vouch(self, asked: float) -> None:
        """The remote had this version when it was asked at `asked`: size and times are as they are
        shown. The rest (its mode, say) is asked for again after VOUCH_SECONDS all the same."""
        place = self._remote.place
        if place.validated_at != self._vouched:
            self._looked = place.validated_at
        is_idle = not self.growing and not self._state.is_dirty
        if is_idle and place.entry.version == self.version and asked - self._looked < VOUCH_SECONDS:
            place.validated_at = self._vouched = max(place.validated_at, asked)

    # --- what others change -----------------------------------------------------------------------

    async def revalidate(self) -> Entry | None:
        """Ask the remote for the very file that is open here, whatever its name is now.

        A file that was appended to goes on with its longer version; only the same remote file
        counts (the remote's own handle tells) and only growth. After any other change what is not
        in the cache yet can't be read any more. None where the remote can't tell: it holds no file
        open, or has none of this version; and where the answer was overtaken by a change here.
        """
        if not self._remote.capabilities.handles or self._state.is_unlinked:
            return None
        if not self.held and (found := await self.hold_open()) is not self._remote.place.entry:
            return found
        version = self.version
        entry = await self._stat_open()
        if entry is None:
            self.held = False
        elif self._state.is_ahead or self.version != version:
            return None  # what was asked is no longer what is here
        elif entry.version != version and entry.size > self._file.size:
            self.adopt(entry)
        return entry

    async def _stat_open(self) -> Entry | None:
        wanted = m.StatOpen(self.handle)
        return await self._remote.namespace.call(wanted, Entry | None)  # type: ignore[arg-type]

    async def follows(self) -> bool:
        """Whether to fetch again after the remote said that the version changed. Another file than
        the one that is held may be longer, and the kernel would cut it at the size it knows."""
        if self._state.is_dirty or not self.held:
            return False
        entry = await self.revalidate()
        return entry is not None and entry.version == self.version

    async def hold_open(self) -> Entry | None:
        """Have the remote hold the file open. Returns the entry of what is held: `place.entry`, or
        another that took its place, as nothing of this version was served yet (a log that never
        rests needs this). None where there is no such file."""
        version, entry = self.version, self._remote.place.entry
        try:
            await self.fetch(0, 0)
        except NotFound:
            return None
        except Changed:
            return await self._adopt_unread(version)
        return entry if self.version == version else None

    async def _adopt_unread(self, version: bytes) -> Entry | None:
        """What is there now may be open on the remote under our handle."""
        self.held = True
        entry = await self._stat_open()
        if entry is not None and self._adopt_if_unread(entry, version):
            return entry
        self.held = False
        await self.let_go()
        return None

    async def follow_name(self) -> bool:
        """Whether it goes on as what has the name now, of which this was nothing but a look."""
        if self.held:
            self.held = False
            await self.let_go()
        version = self.version
        if self._remote.capabilities.handles:
            if await self.hold_open() is not None:
                return True
            if self.version != version:
                return False
        try:  # by its name: the server may have let the open file go
            entry = await self._remote.namespace.stat(self._remote.place.path)
        except NotFound:
            return False
        return self._adopt_if_unread(entry, version)

    def _adopt_if_unread(self, entry: Entry, version: bytes) -> bool:
        """Go on with what is there now, unless what is here is more than a look at `version`."""
        is_taken = self.served or self._state.is_ahead or self.version != version
        if is_taken or not stat.S_ISREG(entry.mode):
            return False
        self.adopt(entry)
        return True

    def adopt(self, entry: Entry) -> None:
        """Go on with this version: what is cached of the other is dropped, not mixed."""
        old, new = self._file.size, entry.size
        log.debug("%r went from %d to %d bytes on the remote", self._remote.place.path, old, new)
        self._file.evict(list(self._file.blocks.present()))
        self._file.version = entry.version
        self._file.size = self.size = new
        self.growing = new > old

    async def let_go(self) -> None:
        """The remote need not keep the file open any more."""
        await self.release(self.handle)

    async def release(self, handle: int) -> None:
        """The remote need not keep this handle any more; errors are logged."""
        try:
            await self._remote.namespace.do(m.Release(handle))
        except RemoteError as error:
            log.debug("releasing %r: %s", self._remote.place.path, error.message)

    # --- files whose size says nothing ------------------------------------------------------------

    async def read_unsized(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes as the remote has them now, which are not cached.

        Raises Stale where the file is gone, and RemoteError.
        """
        namespace = self._remote.namespace
        if self._state.is_dirty or self._state.is_gone:
            return b""
        version = self.version
        request = m.ReadUnsized(
            self._remote.place.path, offset, min(length, UNSIZED_BYTES), self.handle
        )
        try:
            data = await namespace.call(request, bytes)
        except NotFound as error:
            raise Stale(error.message) from None
        except RemoteError as error:
            if not namespace.absence_explains(error):
                raise
            return b""
        self.held = True
        if data:
            await self._look_again()
        elif not offset and self.version == version and not self._file.size:
            namespace.note_empty(self._remote.place.path, version)
        return data

    async def _look_again(self) -> None:
        """A file that was empty had bytes: has it grown? Who reads on must see a size that fits
        them: tail(1) takes a smaller one for a file that was cut, and shows all again."""
        await self.revalidate()
        self._remote.place.validated_at = -math.inf
