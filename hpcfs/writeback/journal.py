"""What is not on the remote yet, so that nothing written here is ever forgotten (invariant 3).

A row stands for a file with dirty bytes: it is made before the first byte of a file is dirty,
brought up to date when an upload begins, and removed when the remote confirmed it. The bytes
themselves are in the cache file that the row names. A row that an earlier mount left, or whose
upload failed when its last handle closed, is *kept*: its file moves to `kept/` and `hpcfs status`
lists it with the reason.

SQLite without syncs: a row survives the daemon's death at any moment, though not a loss of power;
in `through` mode no program was told that its bytes are safe before the remote had them.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    name TEXT PRIMARY KEY,
    namespace TEXT NOT NULL,
    path BLOB NOT NULL,
    size INTEGER NOT NULL,
    base_size INTEGER NOT NULL,
    ranges BLOB NOT NULL,
    data TEXT NOT NULL,
    reason TEXT NOT NULL,
    since REAL NOT NULL
);
"""


_RANGES = 5
"""The column that holds MessagePack."""


class Unconfirmed(msgspec.Struct, frozen=True, array_like=True):
    """A file that the remote has not confirmed.

    `name` is its cache file's, `data` the path of its bytes, `ranges` the dirty (start, end) pairs
    in bytes: outside of them, and below `base_size`, the remote's own bytes count. `reason` is
    empty while the file is still open.
    """

    name: str
    namespace: str
    path: bytes
    size: int
    base_size: int
    ranges: list[tuple[int, int]]
    data: str
    reason: str = ""
    since: float = 0.0


class Journal:
    """Opened by `Journal.open`; every method but `kept` runs SQLite in a thread."""

    def __init__(self, directory: Path, db: sqlite3.Connection) -> None:
        self._directory = directory
        self._db = db
        self._limiter = trio.CapacityLimiter(1)
        self._kept: dict[str, Unconfirmed] = {}

    @classmethod
    def open(cls, directory: Path) -> Journal:
        """`directory` is the cache's, whose lock is held. Raises sqlite3.Error or OSError."""
        (directory / "kept").mkdir(mode=0o700, exist_ok=True)
        db = sqlite3.connect(
            directory / "journal.db", isolation_level=None, check_same_thread=False
        )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")
        db.execute(_SCHEMA)
        journal = cls(directory, db)
        journal._take_over()
        return journal

    def _take_over(self) -> None:
        """What an earlier mount left is kept, with a reason."""
        rows = self._db.execute(
            "SELECT name, namespace, path, size, base_size, ranges, data, reason, since FROM files"
        )
        for row_values in rows.fetchall():
            row = msgspec.convert(
                [
                    msgspec.msgpack.decode(value) if at == _RANGES else value
                    for at, value in enumerate(row_values)
                ],
                Unconfirmed,
            )
            if not Path(row.data).exists():
                log.error("the bytes of %r are gone: %s", row.path, row.data)
                self._db.execute("DELETE FROM files WHERE name = ?", (row.name,))
                continue
            reason = row.reason or "hpcfs ended before the remote confirmed the upload"
            self._keep_now(msgspec.structs.replace(row, reason=reason))

    @property
    def kept(self) -> list[Unconfirmed]:
        return list(self._kept.values())

    async def note(self, row: Unconfirmed) -> None:
        """The file is dirty; called again when more is known."""
        await self._run(self._write, row)

    async def confirm(self, name: str) -> None:
        """The remote has it all."""
        await self._run(self._delete, name)

    async def keep(self, row: Unconfirmed) -> None:
        """The upload failed for good: move the bytes to where the user finds them."""
        await self._run(self._keep_now, row)
        log.error("kept %r of %s: %s", row.path, row.namespace, row.reason)

    async def close(self) -> None:
        await self._run(self._db.close)

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)

    def _write(self, row: Unconfirmed) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.name,
                row.namespace,
                row.path,
                row.size,
                row.base_size,
                msgspec.msgpack.encode(row.ranges),
                row.data,
                row.reason,
                row.since or time.time(),
            ),
        )

    def _delete(self, name: str) -> None:
        self._db.execute("DELETE FROM files WHERE name = ?", (name,))

    def _keep_now(self, row: Unconfirmed) -> None:
        """At every moment the row names a place where the bytes are."""
        place = self._directory / "kept" / row.name
        kept = msgspec.structs.replace(row, data=str(place), since=row.since or time.time())
        if Path(row.data) != place:
            if not place.exists():
                place.hardlink_to(row.data)
            self._write(kept)
            Path(row.data).unlink()
        else:
            self._write(kept)
        self._kept[row.name] = kept
