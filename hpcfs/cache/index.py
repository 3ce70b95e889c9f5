"""What the cache holds, in SQLite, so that it is kept from mount to mount.

Every call blocks on the disk and runs in a thread (cache/store.py sees to it). The index may lag
behind the cache files: a block it doesn't know is fetched again, and a block it knows is served
only after its checksum was compared. So nothing here needs to be synced, and a damaged index is
thrown away.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE files (
    name TEXT PRIMARY KEY,
    origin TEXT NOT NULL,
    key BLOB NOT NULL,
    version BLOB NOT NULL,
    size INTEGER NOT NULL,
    cached_bytes INTEGER NOT NULL,
    last_used REAL NOT NULL
);
CREATE UNIQUE INDEX files_by_key ON files (origin, key);
CREATE INDEX files_by_use ON files (last_used);
CREATE TABLE chunks (
    name TEXT NOT NULL,
    number INTEGER NOT NULL,
    checksums BLOB NOT NULL,
    PRIMARY KEY (name, number)
) WITHOUT ROWID;
"""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A cache file as the index knows it; `chunks` are BlockMap chunks by number."""

    name: str
    origin: str
    key: bytes
    version: bytes
    size: int
    cached_bytes: int
    last_used: float
    chunks: dict[int, bytes]


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
        self._db.close()

    def find(self, origin: str, key: bytes) -> Record | None:
        row = self._db.execute(
            "SELECT name, origin, key, version, size, cached_bytes, last_used FROM files"
            " WHERE origin = ? AND key = ?",
            (origin, key),
        ).fetchone()
        if row is None:
            return None
        chunks = self._db.execute("SELECT number, checksums FROM chunks WHERE name = ?", (row[0],))
        return msgspec.convert([*row, dict(chunks.fetchall())], Record)

    def save(self, records: Iterable[Record]) -> list[str]:
        """Remember these; returns the names of cache files that they replace."""
        replaced: list[str] = []
        with self._transaction():
            for record in records:
                other = self._db.execute(
                    "SELECT name FROM files WHERE origin = ? AND key = ? AND name != ?",
                    (record.origin, record.key, record.name),
                ).fetchone()
                if other:
                    replaced.append(other[0])
                    self._delete(other[0])
                self._save(record)
        return replaced

    def _save(self, record: Record) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                record.name,
                record.origin,
                record.key,
                record.version,
                record.size,
                record.cached_bytes,
                record.last_used,
            ),
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)",
            [(record.name, number, sums) for number, sums in record.chunks.items()],
        )

    def delete(self, names: Sequence[str]) -> None:
        with self._transaction():
            for name in names:
                self._delete(name)

    def _delete(self, name: str) -> None:
        self._db.execute("DELETE FROM files WHERE name = ?", (name,))
        self._db.execute("DELETE FROM chunks WHERE name = ?", (name,))

    def move(self, origin: str, key: bytes, target: bytes) -> list[str]:
        """`key` and all below it were renamed; returns the names of cache files replaced."""
        with self._transaction():
            replaced = self._under(origin, target)
            for name in replaced:
                self._delete(name)
            self._db.execute(
                "UPDATE files SET key = CAST(? || substr(key, ?) AS BLOB)"
                " WHERE origin = ? AND (key = ? OR (key > ? AND key < ?))",
                (target, len(key) + 1, origin, key, key + b"/", key + b"0"),
            )
        return replaced

    def renew_version(self, origin: str, key: bytes, old: bytes, new: bytes) -> None:
        self._db.execute(
            "UPDATE files SET version = ? WHERE origin = ? AND key = ? AND version = ?",
            (new, origin, key, old),
        )

    def remove(self, origin: str, key: bytes) -> list[str]:
        """`key` and all below it are gone; returns the names of their cache files."""
        with self._transaction():
            names = self._under(origin, key)
            for name in names:
                self._delete(name)
        return names

    def _under(self, origin: str, key: bytes) -> list[str]:
        rows = self._db.execute(
            "SELECT name FROM files WHERE origin = ? AND (key = ? OR (key > ? AND key < ?))",
            (origin, key, key + b"/", key + b"0"),  # "0" follows "/" in ASCII
        )
        return [row[0] for row in rows.fetchall()]

    def oldest(self, after: float, limit: int) -> list[tuple[str, int, float]]:
        """(name, cached_bytes, last_used) of files last used after `after`, oldest first."""
        rows = self._db.execute(
            "SELECT name, cached_bytes, last_used FROM files WHERE last_used > ?"
            " ORDER BY last_used LIMIT ?",
            (after, limit),
        )
        return rows.fetchall()

    def total_bytes(self) -> int:
        total: int = self._db.execute(
            "SELECT coalesce(sum(cached_bytes), 0) FROM files"
        ).fetchone()[0]
        return total

    def names(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT name FROM files").fetchall()}

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN … COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._db.execute("ROLLBACK" if kind else "COMMIT")
