"""The index of the cache's content, in SQLite, so that the cache survives from mount to mount.

Every call blocks on the disk and runs in a thread (cache/registry.py sees to it), except
`is_pinned`, which is answered from memory. The index may lag behind the cache files: a block that
it doesn't know is fetched again, and a block that it knows is returned only after its checksum was
compared. So nothing here needs to be synced, and a damaged index is thrown away.

Only renaming a directory, or pinning it, costs more in a large cache than in a small one: triggers
keep the totals, and long lists are read in pages.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from hpcfs.model import paths

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE origins (
    id INTEGER PRIMARY KEY,
    origin TEXT NOT NULL UNIQUE,
    files INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    pinned_files INTEGER NOT NULL DEFAULT 0,
    pinned_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    origin INTEGER NOT NULL,
    key BLOB NOT NULL,
    version BLOB NOT NULL,
    size INTEGER NOT NULL,
    blocks INTEGER NOT NULL,
    cached_bytes INTEGER NOT NULL,
    last_used REAL NOT NULL,
    pinned INTEGER NOT NULL
);
CREATE UNIQUE INDEX files_by_key ON files (origin, key);
CREATE INDEX files_by_use ON files (last_used, id) WHERE pinned = 0;
CREATE TABLE chunks (
    file INTEGER NOT NULL,
    number INTEGER NOT NULL,
    checksums BLOB NOT NULL,
    PRIMARY KEY (file, number)
) WITHOUT ROWID;
CREATE TABLE pins (
    origin TEXT NOT NULL,
    key BLOB NOT NULL,
    PRIMARY KEY (origin, key)
) WITHOUT ROWID;
CREATE TRIGGER file_added AFTER INSERT ON files BEGIN
    UPDATE origins SET
        files = files + 1,
        bytes = bytes + NEW.cached_bytes,
        pinned_files = pinned_files + NEW.pinned,
        pinned_bytes = pinned_bytes + NEW.pinned * NEW.cached_bytes
    WHERE id = NEW.origin;
END;
CREATE TRIGGER file_removed AFTER DELETE ON files BEGIN
    UPDATE origins SET
        files = files - 1,
        bytes = bytes - OLD.cached_bytes,
        pinned_files = pinned_files - OLD.pinned,
        pinned_bytes = pinned_bytes - OLD.pinned * OLD.cached_bytes
    WHERE id = OLD.origin;
    DELETE FROM chunks WHERE file = OLD.id;
END;
CREATE TRIGGER file_changed AFTER UPDATE OF cached_bytes, pinned ON files BEGIN
    UPDATE origins SET
        bytes = bytes - OLD.cached_bytes + NEW.cached_bytes,
        pinned_files = pinned_files - OLD.pinned + NEW.pinned,
        pinned_bytes = pinned_bytes - OLD.pinned * OLD.cached_bytes + NEW.pinned * NEW.cached_bytes
    WHERE id = NEW.origin;
END;
"""
_COLUMNS = (
    "name, origins.origin, key, version, size, cached_bytes, last_used, blocks, pinned, files.id"
)
_FILES = f"SELECT {_COLUMNS} FROM files JOIN origins ON origins.id = files.origin"  # noqa: S608
_UNDER = "(key = ? OR (key > ? AND key < ?))"
SMALL_BLOCKS = 64
"""Files of at most this many blocks are loaded from the index together with the others of their
directory."""


class Record(msgspec.Struct, frozen=True):
    """The index's record of a cache file.

    `chunks` are packed BlockMap chunks by number, `blocks` the number of checksums in them.
    `is_complete` is False where `chunks` was not loaded.
    """

    name: str
    origin: str
    key: bytes
    version: bytes
    size: int
    cached_bytes: int
    last_used: float
    blocks: int = 0
    pinned: bool = False
    row: int = 0
    chunks: Mapping[int, bytes] = {}
    is_complete: bool = True


class OriginTotals(msgspec.Struct, frozen=True):
    """The totals of one remote folder in the cache."""

    origin: str
    files: int
    bytes: int
    pinned_files: int
    pinned_bytes: int


class Index:
    """One SQLite database. Not thread-safe: one call at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            log.warning("the cache index %s is unusable (%s); starting an empty one", path, error)
            self._remove_files()
            self._db = self._open()
        self._pins = set(self.pins())

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")  # see the module's docstring
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"its format is {version}, not {_SCHEMA_VERSION}")
        if version == 0:
            db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;")
        db.execute("SELECT name FROM files LIMIT 1").fetchone()

    def _remove_files(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    # --- looking --------------------------------------------------------------------------------

    def find(self, origin: str, key: bytes) -> Record | None:
        """Return the record of a file, or None."""
        row = self._db.execute(
            f"{_FILES} WHERE origins.origin = ? AND key = ?", (origin, key)
        ).fetchone()
        return None if row is None else self._record(row, self.chunks(row[-1]))

    def chunks(self, row: int) -> dict[int, bytes]:
        """Return the packed chunks of a file by number."""
        found = self._db.execute("SELECT number, checksums FROM chunks WHERE file = ?", (row,))
        return dict(found.fetchall())

    def _record(self, row: tuple[Any, ...], chunks: Mapping[int, bytes] | None) -> Record:
        name, origin, key, version, size, cached, used, blocks, pinned, number = row
        return Record(
            name,
            origin,
            key,
            version,
            size,
            cached,
            used,
            blocks,
            bool(pinned),
            number,
            chunks or {},
            chunks is not None,
        )

    def directory(self, origin: str, directory: bytes, limit: int) -> dict[bytes, Record] | None:
        """Return all files below this directory by key, those of more than SMALL_BLOCKS without
        chunks; None if there are more than `limit`."""
        start, end = (directory + b"/", directory + b"0") if directory else (b"", b"\xff" * 300)
        rows = self._db.execute(
            f"{_FILES} WHERE origins.origin = ? AND key > ? AND key < ? LIMIT ?",
            (origin, start, end, limit + 1),
        ).fetchall()
        if len(rows) > limit:
            return None
        records = {}
        for row in rows:
            small = row[-3] <= SMALL_BLOCKS
            records[row[2]] = self._record(row, self.chunks(row[-1]) if small else None)
        return records

    def oldest(self, after: tuple[float, int], limit: int) -> list[Record]:
        """Return a page of files that are not pinned, without chunks, least recently used first.
        `after` is the (last_used, row) of the last one of the page before."""
        rows = self._db.execute(
            f"{_FILES} WHERE pinned = 0 AND (last_used, files.id) > (?, ?)"
            " ORDER BY last_used, files.id LIMIT ?",
            (*after, limit),
        )
        return [self._record(row, None) for row in rows.fetchall()]

    def page(self, after: int, limit: int) -> list[Record]:
        """Return a page of all files, without chunks: those whose row is greater than `after`."""
        rows = self._db.execute(
            f"{_FILES} WHERE files.id > ? ORDER BY files.id LIMIT ?", (after, limit)
        )
        return [self._record(row, None) for row in rows.fetchall()]

    def page_under(self, origin: str, key: bytes, after: bytes, limit: int) -> list[Record]:
        """Return a page of `key` and all files below it; `after` is the last key of the page
        before."""
        rows = self._db.execute(
            f"{_FILES} WHERE origins.origin = ? AND {_UNDER} AND key > ? ORDER BY key LIMIT ?",
            (origin, *_under(key), after, limit),
        )
        return [self._record(row, None) for row in rows.fetchall()]

    def last_chunks(self, row: int, limit: int) -> list[tuple[int, bytes]]:
        """Return (number, checksums) of a file's last chunks, the last one first."""
        found = self._db.execute(
            "SELECT number, checksums FROM chunks WHERE file = ? ORDER BY number DESC LIMIT ?",
            (row, limit),
        )
        return found.fetchall()

    def chunk_after(self, row: int, after: int) -> tuple[int, bytes] | None:
        """Return (number, checksums) of the file's first chunk with a greater number, or None."""
        found: tuple[int, bytes] | None = self._db.execute(
            "SELECT number, checksums FROM chunks WHERE file = ? AND number > ?"
            " ORDER BY number LIMIT 1",
            (row, after),
        ).fetchone()
        return found

    def totals(self) -> list[OriginTotals]:
        """Return the totals of all remote folders."""
        rows = self._db.execute(
            "SELECT origin, files, bytes, pinned_files, pinned_bytes FROM origins ORDER BY origin"
        )
        return [OriginTotals(*row) for row in rows.fetchall()]

    def total_bytes(self) -> int:
        """Return the cached bytes of all files."""
        total: int = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM origins").fetchone()[0]
        return total

    def known(self, names: Iterable[str]) -> set[str]:
        """Return those of these cache files that the index has."""
        found = set()
        for name in names:
            if self._db.execute("SELECT 1 FROM files WHERE name = ?", (name,)).fetchone():
                found.add(name)
        return found

    # --- changing -------------------------------------------------------------------------------

    def save(self, records: Iterable[Record]) -> list[str]:
        """Save these records; return the names of the cache files that they replace."""
        replaced: list[str] = []
        with self._transaction():
            for record in records:
                origin = self._origin(record.origin)
                other = self._db.execute(
                    "SELECT name FROM files WHERE origin = ? AND key = ? AND name != ?",
                    (origin, record.key, record.name),
                ).fetchone()
                if other:
                    replaced.append(other[0])
                    self._delete(other[0])
                self._save(record, origin)
        return replaced

    def _origin(self, origin: str) -> int:
        self._db.execute("INSERT OR IGNORE INTO origins (origin) VALUES (?)", (origin,))
        row = self._db.execute("SELECT id FROM origins WHERE origin = ?", (origin,)).fetchone()
        number: int = row[0]
        return number

    def _save(self, record: Record, origin: int) -> None:
        self._db.execute(
            "INSERT INTO files"
            " (name, origin, key, version, size, blocks, cached_bytes, last_used, pinned)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
            " key = excluded.key, version = excluded.version, size = excluded.size,"
            " blocks = excluded.blocks, cached_bytes = excluded.cached_bytes,"
            " last_used = excluded.last_used, pinned = excluded.pinned",
            (
                record.name,
                origin,
                record.key,
                record.version,
                record.size,
                record.blocks,
                record.cached_bytes,
                record.last_used,
                record.pinned,
            ),
        )
        row = self._db.execute("SELECT id FROM files WHERE name = ?", (record.name,)).fetchone()
        self._save_chunks(row[0], record.chunks)

    def _save_chunks(self, row: int, chunks: Mapping[int, bytes]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)",
            [(row, number, sums) for number, sums in chunks.items() if sums],
        )
        self._db.executemany(
            "DELETE FROM chunks WHERE file = ? AND number = ?",
            [(row, number) for number, sums in chunks.items() if not sums],
        )

    def change_blocks(
        self, row: int, chunks: Mapping[int, bytes], blocks: int, cached_bytes: int
    ) -> None:
        """Record that blocks of an idle file were evicted; b"" stands for a chunk without
        blocks."""
        with self._transaction():
            self._save_chunks(row, chunks)
            self._db.execute(
                "UPDATE files SET blocks = ?, cached_bytes = ? WHERE id = ?",
                (blocks, cached_bytes, row),
            )

    def delete(self, names: Sequence[str]) -> None:
        """Delete the records of these cache files."""
        with self._transaction():
            for name in names:
                self._delete(name)

    def _delete(self, name: str) -> None:
        self._db.execute("DELETE FROM files WHERE name = ?", (name,))

    def move(self, origin: str, key: bytes, target: bytes) -> list[str]:
        """Record that `key` and everything below it was renamed; return the names of cache files
        replaced. Pinned files stay pinned under their new names, and the target's own pin stays
        too."""
        moved = {(origin, target + at[len(key) :]) for of, at in self._pins_under(origin, key)}
        with self._transaction():
            replaced = self._under(origin, target)
            for name in replaced:
                self._delete(name)
            self._db.execute(
                "UPDATE files SET key = CAST(? || substr(key, ?) AS BLOB)"  # noqa: S608 - constants
                f" WHERE origin = (SELECT id FROM origins WHERE origin = ?) AND {_UNDER}",
                (target, len(key) + 1, origin, *_under(key)),
            )
            self._write_pins(self._pins - self._pins_under(origin, key) | moved)
            self._mark_pinned(origin, target)
        return replaced

    def renew_version(self, origin: str, key: bytes, old: bytes, new: bytes) -> None:
        """Replace the version `old` of a file by `new`."""
        self._db.execute(
            "UPDATE files SET version = ? WHERE version = ? AND key = ?"
            " AND origin = (SELECT id FROM origins WHERE origin = ?)",
            (new, old, key, origin),
        )

    def remove(self, origin: str, key: bytes) -> list[str]:
        """Delete the records of `key` and everything below it; return the names of their cache
        files."""
        with self._transaction():
            names = self._under(origin, key)
            for name in names:
                self._delete(name)
            self._write_pins(self._pins - self._pins_under(origin, key))
        return names

    def _under(self, origin: str, key: bytes) -> list[str]:
        rows = self._db.execute(
            "SELECT name FROM files"  # noqa: S608 - constants
            f" WHERE origin = (SELECT id FROM origins WHERE origin = ?) AND {_UNDER}",
            (origin, *_under(key)),
        )
        return [row[0] for row in rows.fetchall()]

    # --- pins -----------------------------------------------------------------------------------

    def pins(self) -> list[tuple[str, bytes]]:
        """Return all pins as (origin, key)."""
        rows = self._db.execute("SELECT origin, key FROM pins ORDER BY origin, key")
        return [(origin, bytes(key)) for origin, key in rows.fetchall()]

    def is_pinned(self, origin: str, key: bytes) -> bool:
        """Return whether the file, or a directory that contains it, is pinned. Answers from
        memory."""
        return bool(self._pins) and self.pin_over(origin, key) is not None

    def pin_over(self, origin: str, key: bytes) -> bytes | None:
        """Return the pin that covers a path: the path itself, or the nearest directory above.
        Answers from memory."""
        while (origin, key) not in self._pins:
            if not key:
                return None
            key = paths.parent(key)
        return key

    def pin(self, origin: str, key: bytes) -> None:
        """Pin a path, with all files that are or will be below it."""
        with self._transaction():
            self._write_pins(self._pins | {(origin, key)})
            self._mark_pinned(origin, key)

    def unpin(self, origin: str, key: bytes) -> int:
        """Remove the pins at and below a path; return how many there were."""
        found = self._pins_under(origin, key)
        with self._transaction():
            self._write_pins(self._pins - found)
            self._mark_pinned(origin, key)
        return len(found)

    def _pins_under(self, origin: str, key: bytes) -> set[tuple[str, bytes]]:
        below = key + b"/" if key else b""
        return {
            (of, at)
            for of, at in self._pins
            if of == origin and (at == key or at.startswith(below))
        }

    def _write_pins(self, pins: set[tuple[str, bytes]]) -> None:
        self._db.executemany("DELETE FROM pins WHERE origin = ? AND key = ?", self._pins - pins)
        self._db.executemany("INSERT INTO pins VALUES (?, ?)", pins - self._pins)
        self._pins = pins

    def _mark_pinned(self, origin: str, key: bytes) -> None:
        """Update the pinned flags of the files at and below `key`."""
        self._mark(origin, key, int(self.is_pinned(origin, key)))
        for _, pinned in self._pins_under(origin, key):
            self._mark(origin, pinned, 1)

    def _mark(self, origin: str, key: bytes, pinned: int) -> None:
        self._db.execute(
            "UPDATE files SET pinned = ? WHERE pinned != ?"  # noqa: S608 - constants
            f" AND origin = (SELECT id FROM origins WHERE origin = ?) AND {_UNDER}",
            (pinned, pinned, origin, *_under(key)),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run the block in a transaction: COMMIT at its end, ROLLBACK where it raises."""
        pins = self._pins
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._pins = pins
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _under(key: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the parameters of _UNDER. In ASCII "0" follows "/"; all names are below the root,
    b""."""
    return (key, key + b"/", key + b"0") if key else (b"", b"", b"\xff" * 300)
