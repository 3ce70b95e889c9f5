"""The tables of the cache's index, and checks of what is read from them.

SQLite has no checksums: a damaged page may be read as records that were never written. What would
mislead the cache raises Damaged; for the rest checksums of blocks, and versions, are compared.
"""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from hpcfs.cache.blocks import CHUNK_BLOCKS, SUM_BYTES
from hpcfs.cache.database import Damaged

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

_NAME = re.compile(r"[0-9A-Za-z_-]+")
_KINDS = str, str, bytes, bytes, int, int, float, int, int, int
_MOST_BYTES = 1 << 60


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables of an empty database. Raises sqlite3.Error, and Damaged for one of another
    format."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, _SCHEMA_VERSION):
        raise Damaged(f"its format is {version}, not {_SCHEMA_VERSION}")
    if version == 0:
        db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;")
    db.execute("SELECT name FROM files LIMIT 1").fetchone()


def check_record(name: str, numbers: tuple[int, int, int], row: tuple[Any, ...]) -> None:
    """Raise Damaged for a row of the table of files that was never written. `name` and `numbers`,
    which can't be negative, are among its values."""
    if not all(map(isinstance, row, _KINDS)) or min(numbers) < 0:
        raise Damaged("a record has values of other kinds")
    if not _NAME.fullmatch(name):
        raise Damaged(f"no cache file is named {name!r}")


def checked_total(total: object) -> int:
    """Return the bytes of all files together. Raises Damaged."""
    if not isinstance(total, int) or not 0 <= total < _MOST_BYTES:
        raise Damaged(f"all files together have {total} bytes")
    return total


def checked_chunk(row: tuple[Any, ...]) -> tuple[int, bytes]:
    """Return a row (number, checksums) of the table of chunks. Raises Damaged."""
    number, sums = row
    if not isinstance(number, int) or number < 0 or not isinstance(sums, bytes):
        raise Damaged("a chunk has values of other kinds")
    if len(sums) % SUM_BYTES or len(sums) > SUM_BYTES * CHUNK_BLOCKS:
        raise Damaged(f"a chunk has {len(sums)} bytes of checksums")
    return number, sums
