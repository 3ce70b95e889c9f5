"""What is not on the remote yet, so that nothing written here is ever forgotten (invariant 3).

A row stands for a file with dirty bytes: it is made before the first byte of a file is dirty,
brought up to date when the file is closed and when an upload begins, and removed when the remote
confirmed it. The bytes themselves are in the cache file that the row names. What an earlier mount
left is taken up by the next one (writeback/recovery.py). A file that can be neither uploaded nor
shown is *kept*: its bytes move to `kept/`, and `hpcfs status` lists it with the reason.

SQLite in WAL mode. A row survives the daemon's death at any moment. Loss of power survives what was
noted as `durable`: its bytes, then its row, are on the disk before the call returns. That is what
close(2) promises in `back` mode; in `through` mode no program was told that its bytes are safe
before the remote had them.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from hpcfs.content.record import Unconfirmed

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE unconfirmed (
    name TEXT PRIMARY KEY,
    row BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE synced (times INTEGER NOT NULL);
INSERT INTO synced VALUES (0);
"""
_COPY_BYTES = 1024 * 1024


class Journal:
    """The rows of one cache directory; opened by `Journal.open`.

    SQLite runs one call at a time: in a thread where the disk must be waited for.
    """

    def __init__(self, directory: Path, db: sqlite3.Connection) -> None:
        self._directory = directory
        self._db = db
        self._limiter = trio.CapacityLimiter(1)
        self._rows: dict[str, Unconfirmed] = {}
        self._has_unsynced = False
        """Since the last commit that was synced, something was confirmed."""

    @classmethod
    def open(cls, directory: Path) -> Journal:
        """`directory` is the cache's, whose lock is held. Raises sqlite3.Error or OSError."""
        (directory / "kept").mkdir(mode=0o700, exist_ok=True)
        db = sqlite3.connect(
            directory / "journal.db", isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("PRAGMA journal_mode = WAL")
            _prepare(db)
            journal = cls(directory, db)
            journal._load()
        except BaseException:
            db.close()
            raise
        return journal

    def _load(self) -> None:
        found = self._db.execute("SELECT name, row FROM unconfirmed").fetchall()
        for name, packed in found:
            row = self._mended(msgspec.msgpack.decode(packed, type=Unconfirmed))
            if Path(row.data).exists():
                self._rows[name] = row
            else:
                log.error("the bytes of %r are gone: %s", row.path, row.data)
                self._delete([name])
        self._remove_second_names()

    def _remove_second_names(self) -> None:
        """A kill between the steps of keeping left bytes in kept/ that a row names elsewhere."""
        known = {row.data for row in self.stranded}
        for place in (self._directory / "kept").iterdir():
            if str(place) not in known and place.stat().st_nlink > 1:
                place.unlink()

    def _mended(self, row: Unconfirmed) -> Unconfirmed:
        """The cache directory may have been moved since."""
        data = Path(row.data)
        inside = data.parts[-2:] if row.is_stranded else data.parts[-3:]
        return msgspec.structs.replace(row, data=str(self._directory.joinpath(*inside)))

    @property
    def rows(self) -> list[Unconfirmed]:
        """All rows, as far as this process knows."""
        return list(self._rows.values())

    @property
    def stranded(self) -> list[Unconfirmed]:
        """The rows whose bytes are in kept/: the mount does not show them."""
        return [row for row in self._rows.values() if row.is_stranded]

    def find(self, name: str) -> Unconfirmed | None:
        """Return the row of this cache file, None if there is none."""
        return self._rows.get(name)

    # --- changing ---------------------------------------------------------------------------------

    async def note(
        self, row: Unconfirmed, *, durable: bool = False, instead_of: str | None = None
    ) -> None:
        """The file is dirty; called again when more is known. `durable`: it survives a loss of
        power. `instead_of` is a row that this one replaces in the same step."""
        row = msgspec.structs.replace(row, since=row.since or self._since(row.name))
        if durable:
            await self._run(self._note_durably, row, instead_of)
        else:
            await self._run_quick(self._write, row, instead_of)

    def _since(self, name: str) -> float:
        known = self._rows.get(name)
        return known.since if known else time.time()

    async def confirm(self, name: str) -> None:
        """Delete a row: the remote has it all, or nobody wants it any more."""
        await self._run_quick(self._forget, [name])

    async def strand(self, row: Unconfirmed) -> Unconfirmed:
        """Move the bytes of what can be neither uploaded nor shown to kept/; return the new row."""
        stranded = await self._run(self._strand_now, row)
        log.error("kept %r of %s: %s", row.path, row.namespace, row.reason)
        return stranded

    async def take_back(self, row: Unconfirmed, data: str) -> Unconfirmed:
        """Move stranded bytes to the cache file `data`, to be uploaded after all; return the
        row."""
        return await self._run(self._take_back, row, data)

    async def discard(self, name: str) -> None:
        """Delete a row that the user gave up, and its bytes if they are stranded."""
        await self._run(self._discard, name)

    async def sync(self) -> None:
        """Make what was confirmed stay so after a loss of power; does nothing if nothing was."""
        if self._has_unsynced:
            await self._run(self._sync)

    async def close(self) -> None:
        """Close the database."""
        await self._run(self._db.close)

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)

    async def _run_quick(self, work: Callable[..., T], *args: object) -> T:
        """Run what waits for no disk here: SQLite takes 0.015 ms, a thread as much six times."""
        if self._limiter.borrowed_tokens:
            return await self._run(work, *args)
        return work(*args)

    # --- in a thread ------------------------------------------------------------------------------

    def _note_durably(self, row: Unconfirmed, instead_of: str | None) -> None:
        _sync_file(row.data)
        self._write(row, instead_of, durable=True)

    def _sync(self) -> None:
        self._has_unsynced = False
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("UPDATE synced SET times = times + 1")

    def _write(
        self, row: Unconfirmed, instead_of: str | None = None, *, durable: bool = False
    ) -> None:
        # In WAL mode FULL syncs at each commit, OFF never (sqlite.org/pragma.html).
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if instead_of is not None:
                self._delete([instead_of])
            packed = msgspec.msgpack.encode(row)
            self._db.execute("INSERT OR REPLACE INTO unconfirmed VALUES (?, ?)", (row.name, packed))
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        if instead_of is not None:
            self._rows.pop(instead_of, None)
        self._rows[row.name] = row

    def _delete(self, names: list[str]) -> None:
        self._db.executemany("DELETE FROM unconfirmed WHERE name = ?", [(name,) for name in names])

    def _forget(self, names: list[str]) -> None:
        self._db.execute("PRAGMA synchronous = OFF")
        self._delete(names)
        self._has_unsynced = True
        for name in names:
            self._rows.pop(name, None)

    def _strand_now(self, row: Unconfirmed) -> Unconfirmed:
        """At every moment the row names a place where the bytes are."""
        place = self._directory / "kept" / row.name
        since = row.since or self._since(row.name)
        stranded = msgspec.structs.replace(row, data=str(place), since=since)
        if Path(row.data) != place:
            with suppress(FileExistsError):
                place.hardlink_to(row.data)
            self._write(stranded, durable=True)
            Path(row.data).unlink()
        else:
            self._write(stranded, durable=True)
        return stranded

    def _take_back(self, row: Unconfirmed, data: str) -> Unconfirmed:
        taken = msgspec.structs.replace(row, data=data, reason="")
        os.makedirs(os.path.dirname(data), 0o700, exist_ok=True)
        with suppress(FileExistsError):
            os.link(row.data, data)
        self._write(taken, durable=True)
        os.unlink(row.data)
        return taken

    def _discard(self, name: str) -> None:
        row = self._rows.get(name)
        self._forget([name])
        if row is not None and row.is_stranded:
            Path(row.data).unlink(missing_ok=True)


def _prepare(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;")
    elif version != _SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"the journal's format is {version}: use a newer hpcfs")


def _sync_file(path: str) -> None:
    """The bytes, and the name under which they are found."""
    for place, flags in ((path, os.O_RDONLY), (os.path.dirname(path), os.O_RDONLY)):
        fd = os.open(place, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def recover(row: Unconfirmed, target: Path) -> int:
    """Copy the local version of a file; returns the bytes. What was never fetched of the remote's
    version is zeros in it. Raises OSError."""
    left = row.size
    with Path(row.data).open("rb") as source, target.open("wb") as copy:
        while left > 0 and (piece := source.read(min(_COPY_BYTES, left))):
            copy.write(piece)
            left -= len(piece)
        copy.truncate(row.size)
    os.utime(target, ns=(row.entry.atime_ns, row.entry.mtime_ns))
    return row.size
