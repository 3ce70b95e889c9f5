"""Pending files for the user: listed, waited for, retried, copied out, discarded.

In `through` mode these are files that are being written or were stranded; in `back` mode also those
that wait in the queue.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import msgspec
import trio

from hpcfs.cache.store import Store
from hpcfs.content.content import Content
from hpcfs.content.record import Unconfirmed
from hpcfs.inodes.tree import Node, Tree
from hpcfs.model import paths
from hpcfs.model.errors import CacheFull, InvalidRequest, NotFound
from hpcfs.writeback.close import Closer
from hpcfs.writeback.journal import Journal, recover
from hpcfs.writeback.queue import OnProgress
from hpcfs.writeback.recovery import Recovery
from hpcfs.writeback.schedule import Item

log = logging.getLogger(__name__)

RowState = Literal["writing", "waiting", "uploading", "failed", "kept"]


@dataclass(frozen=True, slots=True)
class PendingRow:
    """A file that the remote has not confirmed.

    `size`, and `left`, what is still to be sent, are in bytes; `since` is in seconds since the
    epoch. "failed" says that the remote refused it or is out of reach, "kept" that the mount does
    not show it: then `data` is the local file with its bytes. `id` is the journal's name for it.
    """

    id: str
    namespace: str
    path: bytes
    size: int
    left: int
    state: RowState
    reason: str
    since: float
    data: str

    @property
    def is_stuck(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.state in ("failed", "kept")


class Pending:
    """Lists, retries, discards and copies out the pending files of one mount.

    Ids that are not pending any more are ignored.
    """

    def __init__(
        self, tree: Tree, store: Store, closer: Closer, journal: Journal, recovery: Recovery
    ) -> None:
        self._tree = tree
        self._store = store
        self._closer = closer
        self._queue = closer.queue
        self._journal = journal
        self._recovery = recovery

    def pending(self) -> list[PendingRow]:
        """Return a row for each file that the remote has not confirmed."""
        rows = [self._row(content) for content in self._closer.dirty()]
        return rows + [_stranded_row(row) for row in self._journal.stranded]

    def _row(self, content: Content) -> PendingRow:
        noted = self._journal.find(content.file.name)
        item = self._queue.schedule.item(content)
        return PendingRow(
            content.file.name,
            content.namespace.name,
            content.place.path,
            content.size,
            content.upload.bytes_left,
            _state(item),
            item.reason if item else "",
            noted.since if noted else 0.0,
            "",
        )

    async def sync(
        self, namespace: str | None, path: bytes, on_progress: OnProgress, patience: float = 0.0
    ) -> None:
        """Return when the remote has all of it.

        `path` is a file or a directory; None and b"" are all.

        Raises RemoteError, the first, where it was refused or out of reach for `patience` seconds;
        the others go on.
        """
        wanted = [
            content
            for content in self._closer.dirty()
            if namespace is None
            or (content.namespace.name == namespace and paths.is_below(content.place.path, path))
        ]
        for content in wanted:
            if content.closing is not None:  # close(2) has returned, and its bytes may be stranded
                await content.closing.wait()
        await self._queue.wait_for(wanted, on_progress, patience)

    async def retry(self, ids: Sequence[str]) -> None:
        """Try these again now. Raises RemoteError for a stranded one that can't be shown."""
        found = self._contents(ids)
        for name in ids:
            row = self._journal.find(name)
            if name not in found and row is not None and row.is_stranded:
                found[name] = await self._take_back(row)
        for content in found.values():
            self._queue.retry(content)

    async def _take_back(self, row: Unconfirmed) -> Content:
        """Show a stranded file again, as it was written."""
        namespace = self._recovery.namespace_of(row)
        if namespace is None:
            raise InvalidRequest(f"this mount has no namespace {row.namespace} to write to")
        node = self._recovery.find(namespace, row.path)
        if node is not None and node.content is not None:
            raise InvalidRequest(f"{_text(row.path)} is in use: close it first")
        async with self._store.registry.reserving(row.name):
            try:
                taken = await self._journal.take_back(row, self._store.registry.path(row.name))
            except (OSError, sqlite3.Error) as error:
                raise CacheFull(f"the cache's disk failed: {error}") from None
            if node is not None:
                self._closer.supersede(node)
            try:
                await self._recovery.restore([taken])
            except (OSError, sqlite3.Error) as error:
                await self._keep_again(taken, f"the cache's disk failed: {error}")
        content = self._contents([row.name]).get(row.name)
        if content is None:  # told and kept again
            kept = self._journal.find(row.name)
            raise InvalidRequest(f"{_text(row.path)}: {kept.reason if kept else 'it is gone'}")
        return content

    async def _keep_again(self, row: Unconfirmed, reason: str) -> NoReturn:
        """Keep what was taken back and can't be shown. Raises CacheFull."""
        try:
            await self._journal.strand(msgspec.structs.replace(row, reason=reason))
        except (OSError, sqlite3.Error) as error:
            shown = f"{row.namespace}/{_text(row.path)}"
            self._store.troubles.tell(f"{shown} can be neither uploaded nor kept: {error}")
        raise CacheFull(reason)

    async def discard(self, ids: Sequence[str]) -> None:
        """Forget these. The mount shows what the remote has."""
        found = self._contents(ids)
        for name in ids:
            if content := found.get(name):
                await self._give_up(content)
            elif self._journal.find(name) is not None:
                await self._journal.discard(name)

    async def _give_up(self, content: Content) -> None:
        async with content.upload.lock:
            if not content.is_dirty():  # uploaded, or removed, while the lock was waited for
                return
            content.discard()
            self._store.forget(content.file)
            node = content.place
            assert isinstance(node, Node)
            self._closer.supersede(node)
            if node.parent:
                self._tree.expire(node.parent)
        await self._closer.forget_unlinked(node)
        log.warning("%r was discarded", node.path)

    async def recover(self, name: str, target: Path, /) -> int:
        """Write the local version into `target`; return its bytes. It stays pending.

        Raises RemoteError where the remote's part of it can't be had, or OSError.
        """
        content = self._contents([name]).get(name)
        row = self._journal.find(name)
        if content is not None:
            await content.upload.fetch_whole()
            row = content.unconfirmed()
        if row is None:
            raise NotFound("it is not pending any more")
        with content.upload.pinned() if content else trio.CancelScope():
            return await trio.to_thread.run_sync(recover, row, target)

    def _contents(self, ids: Iterable[str]) -> dict[str, Content]:
        wanted = set(ids)
        dirty = {content.file.name: content for content in self._closer.dirty()}
        return {name: dirty[name] for name in wanted & dirty.keys()}


def _state(item: Item | None) -> RowState:
    if item is None:
        return "writing"
    if item.state == "waiting" and item.attempts:
        return "failed"
    return item.state


def _stranded_row(row: Unconfirmed) -> PendingRow:
    return PendingRow(
        row.name,
        row.namespace,
        row.path,
        row.size,
        row.size,
        "kept",
        row.reason,
        row.since,
        row.data,
    )


def _text(path: bytes) -> str:
    return path.decode(errors="replace")
