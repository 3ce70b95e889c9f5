"""Times of directories that were set here before all that belongs into them was uploaded.

rsync, tar and cp -a set a directory's times last. In `back` mode files go up afterwards, and the
remote gives the directory the time of that. So the times are set once more when nothing waits in
the directory any more. Only this mount remembers them: after a kill they are what they became.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hpcfs.inodes.tree import Node
from hpcfs.model.entries import Attributes
from hpcfs.model.errors import RemoteError
from hpcfs.protocol import messages as m
from hpcfs.site.tasks import Tasks

log = logging.getLogger(__name__)

MOST = 10_000


class DirectoryTimes:
    """Remembers the times that programs set on directories, and sets them once more.

    `has_pending` says whether something in this directory still waits to be uploaded.
    """

    def __init__(self, has_pending: Callable[[Node], bool], nursery: Tasks) -> None:
        self._has_pending = has_pending
        self._nursery = nursery
        self._wanted: dict[Node, Attributes] = {}
        self._under_way = 0
        self._idle = trio.Event()

    async def finish(self) -> None:
        """Return once nothing is being set."""
        while self._under_way:
            await self._idle.wait()

    def put(self, directory: Node, attributes: Attributes) -> None:
        """Remember times that are about to be set, if uploads will change them.

        An upload that ends meanwhile may have come to the remote before that or after.
        """
        if self._has_pending(directory) and len(self._wanted) < MOST:
            times = Attributes(atime_ns=attributes.atime_ns, mtime_ns=attributes.mtime_ns)
            self._wanted[directory] = times
        else:
            self._wanted.pop(directory, None)

    def has(self, directory: Node) -> bool:
        """Whether times are to be set on this directory once more."""
        return directory in self._wanted

    def forget(self, directory: Node) -> None:
        """Forget the times: something was created or removed in the directory here."""
        self._wanted.pop(directory, None)

    def uploaded(self, directory: Node | None) -> None:
        """Set the times once more if that was the last upload in the directory."""
        if directory in self._wanted and directory and not self._has_pending(directory):
            self._under_way += 1
            self._nursery.start_soon(self._set, directory, self._wanted.pop(directory))

    async def _set(self, directory: Node, times: Attributes) -> None:
        try:
            if directory.is_attached and directory.namespace:
                await directory.namespace.entry(m.SetAttributes(directory.path, times))
        except RemoteError as error:
            log.info("the times of %r could not be set again: %s", directory.path, error.message)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
                self._idle = trio.Event()
