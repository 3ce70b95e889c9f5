"""Streaming uploads: files that stay open on the server from a program's open(2) to the upload that
completes them.

`Remote.create` and `upload_piece` bring them here under the caller's handle, `upload` takes them,
and `release` closes them. They are few: the one that was made first is closed for want of room, as
its upload can open the file again. One that pieces were sent into can't be given up so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hpcfs.model.errors import NotSupported
from hpcfs.remotes.sftp.path import SftpPath
from hpcfs.remotes.sftp.write import WritableFile, send

MAX_STREAMS = 64
"""Per namespace."""
NOTED = 1024


@dataclass(eq=False)
class SftpStreamingUpload:
    """The streaming upload of one file. `sent` are the ranges that the server confirmed; `writers`
    count those on their way."""

    place: SftpPath
    opening: asyncio.Task[WritableFile]
    sent: list[tuple[int, int]] = field(default_factory=list)
    writers: int = 0
    dropped: bool = False

    @property
    def end(self) -> int:
        """The offset behind the last byte that was sent."""
        return max([0, *(offset + length for offset, length in self.sent)])

    @property
    def is_usable(self) -> bool:
        """Whether the connection of its handle is still there."""
        return not self.place.session.lost

    def drop(self) -> None:
        """Close it once nobody writes to it."""
        self.dropped = True
        if not self.writers:
            self.opening.add_done_callback(_close)

    def leave(self) -> None:
        """Note that a writer is through."""
        self.writers -= 1
        if self.dropped and not self.writers:
            self.opening.add_done_callback(_close)


def _close(opening: asyncio.Task[WritableFile]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        target = opening.result()
        target.channels.close_soon()
        target.session.bulk.close_soon(target.handle)


class SftpStreamingUploads:
    """The streaming uploads of one namespace, by the caller's handle."""

    def __init__(self, limit: int = MAX_STREAMS) -> None:
        self._limit = limit
        self._files: OrderedDict[int, SftpStreamingUpload] = OrderedDict()
        self._completed: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, handle: int) -> SftpStreamingUpload | None:
        """Return the upload of a handle, or None."""
        return self._files.get(handle)

    def begin(
        self, handle: int, place: SftpPath, opening: Coroutine[Any, Any, WritableFile]
    ) -> SftpStreamingUpload:
        """Begin an upload with a file that is being opened. Raises NotSupported where there is no
        room."""
        self.release(handle)
        granted = place.session.handles.limit
        limit = self._limit if granted is None else min(self._limit, granted // 2)
        try:
            if len(self._files) >= limit:
                self._make_room()
        except NotSupported:
            opening.close()
            raise
        file = self._files[handle] = SftpStreamingUpload(place, send(opening))
        return file

    def rest(self, handle: int) -> None:
        """Note that nobody uses the handle now. If it is closed, its pieces are sent again."""
        file = self._files.get(handle)
        if file is not None and not file.writers:
            give_up = partial(self.release, handle)
            place = file.place
            place.session.handles.rest(file, place.full, give_up, last=bool(file.sent))

    def _make_room(self) -> None:
        for handle, file in self._files.items():
            if not file.sent and not file.writers:
                self.release(handle)
                return
        raise NotSupported("too many files are being sent while they are written")

    def take(self, handle: int) -> SftpStreamingUpload | None:
        """Return the upload of a handle, or None; it belongs to the caller from now on."""
        file = self._files.pop(handle, None)
        if file is not None:
            file.place.session.handles.wake(file)
        return file

    def release(self, handle: int) -> None:
        """Give an upload up and close its file."""
        self._completed.pop(handle, None)
        file = self.take(handle)
        if file is not None:
            file.drop()

    async def settled(self, path: bytes) -> None:
        """Wait until what was sent with the making of this file is done: other requests about it go
        another way, and must not be overtaken."""
        for file in list(self._files.values()):
            if file.place.path == path:
                await asyncio.wait([file.opening])
                if not file.opening.exception() and file.opening.result().earlier:
                    await asyncio.wait(file.opening.result().earlier)

    def forget(self, handle: int, file: SftpStreamingUpload) -> None:
        """Forget an upload whose file could not be opened."""
        if self._files.get(handle) is file:
            del self._files[handle]

    # --- which handles can't have sent pieces -----------------------------------------------------

    def note_complete(self, handle: int) -> None:
        """Note that all of the file was, or is about to be, in an upload's ranges."""
        self._completed[handle] = None
        while len(self._completed) > NOTED:
            self._completed.popitem(last=False)

    def note_piece(self, handle: int) -> None:
        """Note that a piece was sent with this handle."""
        self._completed.pop(handle, None)

    def is_complete(self, handle: int) -> bool:
        """Return whether no piece can have been sent with this handle."""
        return handle in self._completed
