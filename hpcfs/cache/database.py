"""Tells a damaged SQLite database from a disk that has no room, and puts damaged ones aside.

Both databases of a cache directory (index.db, journal.db) are used by one process at a time, in WAL
mode. The codes are those of sqlite.org/rescode.html; the low byte is the primary one.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

_SUFFIXES = ("", "-wal", "-shm")
_OF_THE_DISK = frozenset(
    (
        *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_CANTOPEN),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY),
        *(sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_INTERRUPT),
    )
)
"""Primary codes that say nothing of the file's content."""


class Damaged(sqlite3.DatabaseError):
    """The database has what hpcfs never wrote into it."""


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether the error tells of a damaged file, and not of the disk below it."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    if code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return True
    return (code & 0xFF) not in _OF_THE_DISK


def is_full(error: sqlite3.Error) -> bool:
    """Return whether the disk has no room for a change."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def is_misuse(error: sqlite3.Error) -> bool:
    """Return whether the caller is to blame: a bug."""
    return isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError))


def put_aside(path: Path) -> Path:
    """Rename a database, with the files that belong to it, to NAME.damaged-DATE-TIME (UTC); return
    the new path. Raises OSError."""
    date = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    stem = f"{path.name}.damaged-{date}"
    number = 0
    while (place := path.with_name(stem + (f"-{number}" if number else ""))).exists():
        number += 1
    move(path, place)
    return place


def move(path: Path, place: Path) -> None:
    """Rename a database, with the files that belong to it; what has the new name is replaced.
    Raises OSError."""
    for suffix in _SUFFIXES:
        old, new = path.with_name(path.name + suffix), place.with_name(place.name + suffix)
        if old.exists():
            old.rename(new)
        else:
            new.unlink(missing_ok=True)
