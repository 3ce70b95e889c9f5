"""The index of the cache's content, in SQLite, so that the cache survives from mount to mount.

Every call blocks on the disk and runs in a thread (cache/registry.py sees to it), except
`is_pinned`, which is answered from memory. The index may lag behind the cache files: a block that
it doesn't know is fetched again, and a block that it knows is returned only after its checksum was
compared. So nothing here needs to be synced. Where anything is wrong with it, when it is opened or
at any later call, it is put aside as `index.db.damaged`, and an empty one takes its place; in
memory, if the disk has no room for one. The pins stay. Callers see one error: that the disk
has no room for a change that can wait.

Only renaming a directory, or pinning it, costs more in a large cache than in a small one: triggers
keep the totals, and long lists are read in pages.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from hpcfs.cache import database
from hpcfs.cache.index_format import check_record, checked_chunk, checked_total, prepare
from hpcfs.model import paths
from hpcfs.model.troubles import Troubles

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

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


_MUST_SUCCEED = ("move", "remove", "forget", "renew_version")
"""What the remote has done already. An index that can't note it is worse than none."""


def _mended(
    method: Callable[Concatenate[Index, P], T],
) -> Callable[Concatenate[Index, P], T]:
    """Call a method of Index once more on an empty index, where it fails for another reason than a
    full disk."""

    @wraps(method)
    def mended(self: Index, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except sqlite3.Error as error:
            is_lasting = method.__name__ not in _MUST_SUCCEED
            if (is_lasting and database.is_full(error)) or database.is_misuse(error):
                raise
            self.begin_anew(str(error))
            return method(self, *args, **kwargs)

    return mended


class Index:
    """One SQLite database. Not thread-safe: one call at a time.

    `generation` counts how often an empty index took the place of another one: then nothing counts
    that it was told before. `troubles` hears of that.
    """

    def __init__(self, path: Path, troubles: Troubles | None = None) -> None:
        self._path = path
        self._troubles = troubles or Troubles()
        self._pins: set[tuple[str, bytes]] = set()
        self.generation = 0
        try:
            self._db = self._open(path)
            self._pins = set(self._read_pins())
        except (sqlite3.Error, OSError) as error:
            self.begin_anew(str(error))

    def begin_anew(self, reason: str) -> None:
        """Put the index aside, if there is one, and continue with an empty one that has the same
        pins."""
        if hasattr(self, "_db"):
            self._db.close()
        self.generation += 1
        sentence = f"the cache's index was unusable ({reason}): the cache begins anew"
        try:
            database.move(self._path, self._path.with_name(self._path.name + ".damaged"))
            self._db = self._open(self._path)
        except (sqlite3.Error, OSError) as error:
            sentence += f", and forgets all with this mount ({error})"
            self._db = self._open(":memory:")
        self._troubles.tell(sentence)
        pins, self._pins = self._pins, set()
        try:
            self._write_pins(pins)
        except sqlite3.Error as error:
            self._pins = pins
            log.warning("the pins are not saved: %s", error)

    def _open(self, path: Path | str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")  # see the module's docstring
            prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    # --- looking --------------------------------------------------------------------------------

    @_mended
    def find(self, origin: str, key: bytes) -> Record | None:
        """Return the record of a file, or None."""
        row = self._db.execute(
            f"{_FILES} WHERE origins.origin = ? AND key = ?", (origin, key)
        ).fetchone()
        return None if row is None else self._record(row, self._chunks(row[-1]))

    def _chunks(self, row: int) -> dict[int, bytes]:
        found = self._db.execute("SELECT number, checksums FROM chunks WHERE file = ?", (row,))
        return dict(map(checked_chunk, found.fetchall()))

    def _record(self, row: tuple[Any, ...], chunks: Mapping[int, bytes] | None) -> Record:
        name, origin, key, version, size, cached, used, blocks, pinned, number = row
        check_record(name, (size, cached, blocks), row)
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

    @_mended
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
            records[row[2]] = self._record(row, self._chunks(row[-1]) if small else None)
        return records

    @_mended
    def oldest(self, after: tuple[float, int], limit: int) -> list[Record]:
        """Return a page of files that are not pinned, without chunks, least recently used first.
        `after` is the (last_used, row) of the last one of the page before."""
        rows = self._db.execute(
            f"{_FILES} WHERE pinned = 0 AND (last_used, files.id) > (?, ?)"
            " ORDER BY last_used, files.id LIMIT ?",
            (*after, limit),
        )
        return [self._record(row, None) for row in rows.fetchall()]

    @_mended
    def page(self, after: int, limit: int) -> list[Record]:
        """Return a page of all files, without chunks: those whose row is greater than `after`."""
        rows = self._db.execute(
            f"{_FILES} WHERE files.id > ? ORDER BY files.id LIMIT ?", (after, limit)
        )
        return [self._record(row, None) for row in rows.fetchall()]

    @_mended
    def page_under(self, origin: str, key: bytes, after: bytes, limit: int) -> list[Record]:
        """Return a page of `key` and all files below it; `after` is the last key of the page
        before."""
        rows = self._db.execute(
            f"{_FILES} WHERE origins.origin = ? AND {_UNDER} AND key > ? ORDER BY key LIMIT ?",
            (origin, *_under(key), after, limit),
        )
        return [self._record(row, None) for row in rows.fetchall()]

    @_mended
    def last_chunks(self, row: int, limit: int) -> list[tuple[int, bytes]]:
        """Return (number, checksums) of a file's last chunks, the last one first."""
        found = self._db.execute(
            "SELECT number, checksums FROM chunks WHERE file = ? ORDER BY number DESC LIMIT ?",
            (row, limit),
        )
        return list(map(checked_chunk, found.fetchall()))

    @_mended
    def chunk_after(self, row: int, after: int) -> tuple[int, bytes] | None:
        """Return (number, checksums) of the file's first chunk with a greater number, or None."""
        found = self._db.execute(
            "SELECT number, checksums FROM chunks WHERE file = ? AND number > ?"
            " ORDER BY number LIMIT 1",
            (row, after),
        ).fetchone()
        return None if found is None else checked_chunk(found)

    @_mended
    def totals(self) -> list[OriginTotals]:
        """Return the totals of all remote folders."""
        rows = self._db.execute(
            "SELECT origin, files, bytes, pinned_files, pinned_bytes FROM origins ORDER BY origin"
        )
        return [OriginTotals(*row) for row in rows.fetchall()]

    @_mended
    def total_bytes(self) -> int:
        """Return the cached bytes of all files."""
        total = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM origins").fetchone()[0]
        return checked_total(total)

    @_mended
    def known(self, names: Iterable[str]) -> set[str]:
        """Return those of these cache files that the index has."""
        found = set()
        for name in names:
            if self._db.execute("SELECT 1 FROM files WHERE name = ?", (name,)).fetchone():
                found.add(name)
        return found

    # --- changing -------------------------------------------------------------------------------

    @_mended
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

    @_mended
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

    @_mended
    def delete(self, names: Sequence[str]) -> None:
        """Delete the records of these cache files."""
        with self._transaction():
            for name in names:
                self._delete(name)

    def _delete(self, name: str) -> None:
        self._db.execute("DELETE FROM files WHERE name = ?", (name,))

    @_mended
    def forget(self, name: str) -> None:
        """Delete the record of a cache file whose content the remote does not have any more."""
        with self._transaction():
            self._delete(name)

    @_mended
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

    @_mended
    def renew_version(self, origin: str, key: bytes, old: bytes, new: bytes) -> None:
        """Replace the version `old` of a file by `new`."""
        self._db.execute(
            "UPDATE files SET version = ? WHERE version = ? AND key = ?"
            " AND origin = (SELECT id FROM origins WHERE origin = ?)",
            (new, old, key, origin),
        )

    @_mended
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

    @_mended
    def pins(self) -> list[tuple[str, bytes]]:
        """Return all pins as (origin, key)."""
        return self._read_pins()

    def _read_pins(self) -> list[tuple[str, bytes]]:
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

    @_mended
    def pin(self, origin: str, key: bytes) -> None:
        """Pin a path, with all files that are or will be below it."""
        with self._transaction():
            self._write_pins(self._pins | {(origin, key)})
            self._mark_pinned(origin, key)

    @_mended
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
