"""The journal's database: its format, and what can be read of one that is damaged.

`journal.db` is SQLite in WAL mode, with one table of packed rows (content/record.py). Format 1 had
no checksums; its rows get them when it is taken up. `user_version` is the format, and
`application_id` repeats it, so that a flipped bit is not taken for a newer hpcfs.

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

from hpcfs.cache import database
from hpcfs.content import record
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
        row, is_sound = record.unpack(packed) if isinstance(packed, bytes) else (None, False)
        if row is not None and is_sound and row.name == name:
            self.rows[name] = row
        elif isinstance(name, str):
            self.damaged[name] = row


def open_database(path: Path) -> tuple[sqlite3.Connection, Contents]:
    """Open a journal, make one where there is none, put a damaged one aside: then the rows are yet
    to be written to the new one.

    Raises NewerFormat, and sqlite3.Error or OSError where the disk fails.
    """
    try:
        return _open(path)
    except sqlite3.Error as error:
        if isinstance(error, NewerFormat) or not database.is_damage(error):
            raise
        log.warning("the journal %s is damaged: %s", path, error)
    contents = _salvage(path)
    contents.aside = database.put_aside(path)
    db, _ = _open(path)
    return db, contents


def _open(path: Path) -> tuple[sqlite3.Connection, Contents]:
    try:
        return _open_in_mode(path, "NORMAL")
    except sqlite3.OperationalError as error:
        if database.is_damage(error):
            raise
        log.info("the journal is opened without shared memory, for want of room: %s", error)
        return _open_in_mode(path, "EXCLUSIVE")


def _open_in_mode(path: Path, locking: str) -> tuple[sqlite3.Connection, Contents]:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute(f"PRAGMA locking_mode = {locking}")
        db.execute("PRAGMA journal_mode = WAL")
        _prepare(db)
        _check(db)
        contents = Contents()
        for name, packed in db.execute("SELECT name, row FROM unconfirmed"):
            contents.add(name, packed)
    except BaseException:
        db.close()
        raise
    return db, contents


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block in a transaction: COMMIT at its end, ROLLBACK where it raises."""
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
    """Give checksums to its rows; one that can't be decoded stays as it is, and so gets none."""
    with transaction(db):
        found = db.execute("SELECT name, row FROM unconfirmed").fetchall()
        packed = [
            (record.pack(decoded), name)
            for name, row in found
            if isinstance(row, bytes) and (decoded := record.decode(row))
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
                        contents.damaged[str(name)] = record.decode(packed)
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
