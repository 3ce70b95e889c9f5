"""StreamingUpload a large file while it is still being written, piece by piece.

Only a file of whose old content nothing counts: a new one, or one that was cut to nothing. A piece
leaves once the writer is a whole piece further on, as what was just written is most likely to be
written again. What was sent stays dirty until the upload at the file's close completes it: that one
brings what was changed since, and whatever fails here only means that it brings all. Nothing here
awaits but the tasks that send.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import NO_HANDLE
from hpcfs.model.errors import RemoteError
from hpcfs.model.uploads import PIECE_BYTES

log = logging.getLogger(__name__)

MOST_PIECES = 4
"""Under way at once, of one file."""

SendPiece = Callable[[int, int], Awaitable[None]]
"""(handle, offset): returns once the remote has the piece. Raises RemoteError."""


class StreamingUpload:
    """Of one file. Offsets in bytes; a piece is PIECE_BYTES long and starts at a multiple of it."""

    def __init__(
        self, send: SendPiece, new_handle: Callable[[], int], nursery: trio.Nursery
    ) -> None:
        self._send = send
        self._new_handle = new_handle
        self._nursery = nursery
        self._failed = False
        self._stopped = False
        self._next = 0
        self._under_way: dict[int, trio.Event] = {}
        self._again: set[int] = set()
        """Pieces under way that were written to meanwhile."""
        self.sent = RangeSet()
        """What the remote has as it is here."""
        self.handle = NO_HANDLE
        """While something was sent, or is about to be."""

    def wrote(self, offset: int, end: int) -> None:
        """The file was changed there."""
        if self.handle == NO_HANDLE:
            return
        self.sent.remove(offset - offset % PIECE_BYTES, -(-end // PIECE_BYTES) * PIECE_BYTES)
        for piece in self._under_way:
            if piece < end and offset < piece + PIECE_BYTES:
                self._again.add(piece)

    def advance(self, dirty: RangeSet, end: int) -> None:
        """The writer is at `end`: send what it left behind."""
        while (
            not (self._failed or self._stopped)
            and len(self._under_way) < MOST_PIECES
            and self._next + 2 * PIECE_BYTES <= end
            and dirty.covers(self._next, self._next + PIECE_BYTES)
        ):
            if self.handle == NO_HANDLE:
                self.handle = self._new_handle()
            self._under_way[self._next] = trio.Event()
            self._nursery.start_soon(self._fly, self._next)
            self._next += PIECE_BYTES

    async def _fly(self, offset: int) -> None:
        try:
            await self._send(self.handle, offset)
            if offset not in self._again and not self._failed:
                self.sent.add(offset, offset + PIECE_BYTES)
        except RemoteError as error:
            log.info("a file is not sent while it is written: %s", error.message)
            self._failed = True
        finally:
            self._again.discard(offset)
            self._under_way.pop(offset).set()

    async def settle(self) -> None:
        """Return once nothing is under way. From then on nothing more is sent until `reset`."""
        self._stopped = True
        while self._under_way:
            await next(iter(self._under_way.values())).wait()

    def reset(self) -> int:
        """What was sent is complete, or of no use; returns the handle that it was sent under."""
        handle, self.handle = self.handle, NO_HANDLE
        self.sent = RangeSet()
        self._next = 0
        self._failed = self._stopped = False
        return handle
