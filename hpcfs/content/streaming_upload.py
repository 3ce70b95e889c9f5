"""Sends a large file in pieces while it is still being written.

This is for files whose old content does not count: new ones, and those that were cut to nothing. A
piece is sent once the writer is a whole piece further on, as the bytes just written are the most
likely ones to be written again. The pieces stay dirty until the upload at the file's close
completes them. That one brings the bytes changed since; if a piece fails, it brings all. Only the
tasks that send await anything.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import NO_HANDLE
from hpcfs.model.errors import RemoteError
from hpcfs.model.uploads import PIECE_BYTES
from hpcfs.site.tasks import Tasks

log = logging.getLogger(__name__)

MOST_PIECES = 4
"""Pieces of one file that are under way at once."""

SendPiece = Callable[[int, int], Awaitable[None]]
"""(handle, offset): returns once the remote has the piece. Raises RemoteError."""


@dataclass(eq=False)
class _PieceUnderWay:
    """`counts` is false once the file was changed where the piece is, or cut."""

    offset: int
    handle: int
    ended: trio.Event = field(default_factory=trio.Event)
    counts: bool = True


class StreamingUpload:
    """Sends the pieces of one file. Offsets are bytes; a piece is PIECE_BYTES long and starts at a
    multiple of that."""

    def __init__(self, send: SendPiece, new_handle: Callable[[], int], nursery: Tasks) -> None:
        self._send = send
        self._new_handle = new_handle
        self._nursery = nursery
        self._failed = False
        self._stopped = False
        self._next = 0
        self.under_way: set[_PieceUnderWay] = set()
        """Also those that are of no use any more: they still write to the remote."""
        self.sent = RangeSet()
        """The bytes that the remote has as they are here."""
        self.handle = NO_HANDLE
        """The pieces are sent under it; NO_HANDLE while none was sent."""

    def wrote(self, offset: int, end: int) -> None:
        """The file was changed there."""
        if self.handle == NO_HANDLE:
            return
        self.sent.remove(offset - offset % PIECE_BYTES, -(-end // PIECE_BYTES) * PIECE_BYTES)
        for piece in self.under_way:
            if piece.offset < end and offset < piece.offset + PIECE_BYTES:
                piece.counts = False

    def advance(self, dirty: RangeSet, end: int) -> None:
        """The writer is at `end`: send what it left behind. A piece that was sent before a cut may
        write to the remote still, or cut the file there: it ends first."""
        while (
            not (self._failed or self._stopped)
            and len(self.under_way) < MOST_PIECES
            and self._next + 2 * PIECE_BYTES <= end
            and dirty.covers(self._next, self._next + PIECE_BYTES)
            and all(piece.handle == self.handle for piece in self.under_way)
        ):
            if self.handle == NO_HANDLE:
                self.handle = self._new_handle()
            piece = _PieceUnderWay(self._next, self.handle)
            self.under_way.add(piece)
            self._nursery.start_soon(self._fly, piece)
            self._next += PIECE_BYTES

    async def _fly(self, piece: _PieceUnderWay) -> None:
        try:
            await self._send(piece.handle, piece.offset)
            if piece.counts and not self._failed:
                self.sent.add(piece.offset, piece.offset + PIECE_BYTES)
        except RemoteError as error:
            log.info("a file is not sent while it is written: %s", error.message)
            if piece.handle == self.handle:  # the remote may have begun anew, without the others
                self._failed, self.sent = True, RangeSet()
        finally:
            self.under_way.discard(piece)
            piece.ended.set()

    async def wait_idle(self) -> None:
        """Return once nothing is under way. From then on nothing more is sent until `reset`."""
        self._stopped = True
        while self.under_way:
            await next(iter(self.under_way)).ended.wait()

    def reset(self) -> int:
        """What was sent is complete, or of no use; returns the handle that it was sent under."""
        handle, self.handle = self.handle, NO_HANDLE
        for piece in self.under_way:
            piece.counts = False
        self.sent = RangeSet()
        self._next = 0
        self._failed = self._stopped = False
        return handle
