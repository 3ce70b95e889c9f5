"""The journal's database: its format, and what can be read of one that is damaged.

`journal.db` is SQLite in WAL mode, with one table. A row is 8 bytes, the xxh3_64 of what follows
(little-endian), and the `Unconfirmed` as MessagePack. Format 1 had no checksums; its rows get them
when it is taken up. `user_version` is the format, and `application_id` repeats it, so that a
flipped bit is not taken for a newer hpcfs.

A database that SQLite can't read, or that fails its integrity check, is put aside, and the rows
that still can be read move to a new one.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import xxhash

from hpcfs.cache import database
from hpcfs.content.record import Unconfirmed

log = logging.getLogger(__name__)

FORMAT = 2
_MARK = 0x68706600  # "hpf", and a byte for the format
_SCHEMA = """
CREATE TABLE unconfirmed (
    name TEXT PRIMARY KEY,
    row BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE synced (times INTEGER NOT NULL);
INSERT INTO synced VALUES (0);
"""
_STAMP = "PRAGMA user_version = {0}; PRAGMA application_id = {1};"
_SUM_BYTES = 8


class NewerFormat(sqlite3.DatabaseError):
    """A newer version of hpcfs wrote the journal."""


@dataclass
class Contents:
    """The rows of a journal: sound ones, and the names of those whose checksum is wrong, with the
    row as far as it could be decoded. `aside` is where a damaged database was put."""

    rows: dict[str, Unconfirmed] = field(default_factory=dict)
    damaged: dict[str, Unconfirmed | None] = field(default_factory=dict)
    aside: Path | None = None

    def add(self, name: str, packed: bytes) -> None:
        """Sort a row of the table into one of the two."""
        row = _decoded(packed[_SUM_BYTES:]) if isinstance(packed, bytes) else None
        is_sound = row is not None and packed[:_SUM_BYTES] == _sum(packed[_SUM_BYTES:])
        if row is not None and is_sound and row.name == name:
            self.rows[name] = row
        elif isinstance(name, str):
            self.damaged[name] = row


class JournalFile:
    """The rows of one `journal.db`. Not thread-safe: one call at a time."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    @classmethod
    def open(cls, path: Path) -> tuple[JournalFile, Contents]:
        """Open the database, make one where there is none, put a damaged one aside. Raises
        NewerFormat, and sqlite3.Error or OSError where the disk fails."""
        try:
            return cls._open(path)
        except sqlite3.Error as error:
            if isinstance(error, NewerFormat) or not database.is_damage(error):
                raise
            log.warning("the journal %s is damaged: %s", path, error)
        contents = _salvage(path)
        contents.aside = database.put_aside(path)
        made, _ = cls._open(path)
        for row in contents.rows.values():
            made.write(row, durable=True)
        return made, contents

    @classmethod
    def _open(cls, path: Path) -> tuple[JournalFile, Contents]:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            _prepare(db)
            _check(db)
            contents = Contents()
            for name, packed in db.execute("SELECT name, row FROM unconfirmed"):
                contents.add(name, packed)
        except BaseException:
            db.close()
            raise
        return cls(db), contents

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def write(
        self, row: Unconfirmed, instead_of: str | None = None, *, durable: bool = False
    ) -> None:
        """Write a row, and delete the one named `instead_of` in the same step. Raises
        sqlite3.Error."""
        # In WAL mode FULL syncs at each commit, OFF never (sqlite.org/pragma.html).
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        with _transaction(self._db):
            if instead_of is not None:
                self._delete(instead_of)
            self._db.execute(
                "INSERT OR REPLACE INTO unconfirmed VALUES (?, ?)", (row.name, _packed(row))
            )

    def delete(self, name: str) -> None:
        """Delete a row. Raises sqlite3.Error."""
        self._db.execute("PRAGMA synchronous = OFF")
        self._delete(name)

    def _delete(self, name: str) -> None:
        self._db.execute("DELETE FROM unconfirmed WHERE name = ?", (name,))

    def sync(self) -> None:
        """Make all changes survive a loss of power. Raises sqlite3.Error."""
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("UPDATE synced SET times = times + 1")


def _packed(row: Unconfirmed) -> bytes:
    payload = msgspec.msgpack.encode(row)
    return _sum(payload) + payload


def _sum(payload: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(payload).to_bytes(_SUM_BYTES, "little")


def _decoded(payload: bytes) -> Unconfirmed | None:
    try:
        return msgspec.msgpack.decode(payload, type=Unconfirmed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.info("a row of the journal can't be decoded: %s", error)
        return None


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _stamp(db: sqlite3.Connection) -> tuple[int, int]:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (mark,) = db.execute("PRAGMA application_id").fetchone()
    return version, mark


def _prepare(db: sqlite3.Connection) -> None:
    version, mark = _stamp(db)
    stamp = _STAMP.format(FORMAT, _MARK | FORMAT)
    if (version, mark) == (0, 0):
        db.executescript(f"BEGIN;{_SCHEMA}{stamp}COMMIT;")
    elif (version, mark) == (1, 0):
        _take_up_format_1(db, stamp)
    elif FORMAT < version < 256 and mark == _MARK | version:
        raise NewerFormat(f"the journal's format is {version}: use a newer hpcfs")
    elif (version, mark) != (FORMAT, _MARK | FORMAT):
        raise database.Damaged(f"its format is {version}, and its mark {mark:#x}")


def _check(db: sqlite3.Connection) -> None:
    (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise database.Damaged(found)


def _take_up_format_1(db: sqlite3.Connection, stamp: str) -> None:
    """Give checksums to its rows; one that can't be decoded gets none that is right."""
    with _transaction(db):
        found = db.execute("SELECT name, row FROM unconfirmed").fetchall()
        packed = [
            ((_sum(row) if _decoded(row) else bytes(_SUM_BYTES)) + row, name)
            for name, row in found
            if isinstance(row, bytes)
        ]
        db.executemany("UPDATE unconfirmed SET row = ? WHERE name = ?", packed)
        for pragma in stamp.split(";"):
            db.execute(pragma)


def _salvage(path: Path) -> Contents:
    """Return the rows of a damaged database that can be read, from either end."""
    contents = Contents()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        try:
            is_format_1 = _stamp(db) == (1, 0)
            for order in ("ASC", "DESC"):
                for name, packed in _readable(db, order):
                    if is_format_1 and isinstance(packed, bytes):
                        contents.damaged[str(name)] = _decoded(packed)
                    else:
                        contents.add(name, packed)
        except sqlite3.Error as error:
            log.info("nothing can be read of %s: %s", path, error)
    for name in contents.rows:
        contents.damaged.pop(name, None)
    return contents


def _readable(db: sqlite3.Connection, order: str) -> Iterator[tuple[str, bytes]]:
    try:
        yield from db.execute(f"SELECT name, row FROM unconfirmed ORDER BY name {order}")  # noqa: S608
    except sqlite3.Error as error:
        log.info("no more rows of the journal can be read: %s", error)
