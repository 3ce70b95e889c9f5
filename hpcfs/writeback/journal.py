"""What is not on the remote yet, so that nothing written here is ever forgotten (invariant 3).

A row stands for a file with dirty bytes: it is made before the first byte of a file is dirty,
brought up to date when the file is closed and when an upload begins, and removed when the remote
confirmed it. The bytes themselves are in the cache file that the row names. What an earlier mount
left is taken up by the next one (writeback/recovery.py). A file that can be neither uploaded nor
shown is *kept*: its bytes move to `kept/`, and `hpcfs status` lists it with the reason.

A row survives the daemon's death at any moment. Loss of power survives what was noted as `durable`:
its bytes, then its row, are on the disk before the call returns. That is what close(2) promises in
`back` mode; in `through` mode no program was told that its bytes are safe before the remote had
them.

Nothing of what is on the disk is believed without a check: rows have checksums
(writeback/journal_file.py), those of closed files have checksums of the bytes (content/sums.py),
and closed files have second names that outlive their row (writeback/acknowledged.py). What fails a
check is kept, told, and never uploaded by itself.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import trio

from hpcfs.cache import database
from hpcfs.content.record import Unconfirmed, pack
from hpcfs.model import paths
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.model.troubles import Troubles
from hpcfs.writeback.acknowledged import Acknowledged, Identity
from hpcfs.writeback.journal_file import Contents, open_database

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_COPY_BYTES = 1024 * 1024
_REVERTED = "the journal is damaged, and has an older state of it than was noted last"
_NOTHING_KNOWN = Capabilities(
    partial_writes=False, creates_on_upload=True, handles=False, mtime_resolution_ns=10**9
)
_LOST = "its row in the journal is damaged or lost: what was not written anew of it is zeros"


class Journal:
    """The rows of one cache directory; opened by `Journal.open`.

    SQLite runs one call at a time: in a thread where the disk must be waited for.
    """

    def __init__(
        self,
        directory: Path,
        db: sqlite3.Connection | None,
        links: Acknowledged,
        troubles: Troubles,
    ) -> None:
        self._directory = directory
        self._db = db
        """None where the disk has no room for one yet: then there are no rows."""
        self._links = links
        self._troubles = troubles
        self._limiter = trio.CapacityLimiter(1)
        self._rows: dict[str, Unconfirmed] = {}
        self._has_unsynced = False
        """Since the last commit that was synced, something was confirmed."""

    @classmethod
    def open(cls, directory: Path, troubles: Troubles | None = None) -> Journal:
        """`directory` is the cache's, whose lock is held. `troubles` hears of what is damaged.

        Raises sqlite3.Error or OSError.
        """
        troubles = troubles or Troubles()
        links = Acknowledged.open(directory / "pending")
        db, contents = _open_or_wait(directory / "journal.db", troubles)
        journal = cls(directory, db, links, troubles)
        try:
            journal._load(contents)
        except BaseException:
            journal._close()
            raise
        return journal

    # --- opening ----------------------------------------------------------------------------------

    def _load(self, contents: Contents) -> None:
        if contents.aside is not None:
            self._troubles.tell(
                f"the journal was damaged: {len(contents.rows)} of its rows could be read, and it"
                f" was put aside as {contents.aside}"
            )
            for row in contents.rows.values():
                self._insert(row, durable=True)
        for name, row in contents.rows.items():
            if self._find_data(row):
                self._rows[name] = self._mended(row)
            else:
                self._troubles.tell(f"the bytes of {_shown(row)} are gone: {row.data}")
                self._change(self._delete_unsynced, name)
        for name, decoded in contents.damaged.items():
            self._keep_damaged(name, decoded)
        for name in self._links.links.keys() - self._rows.keys():
            self._keep_lost(name)
        for row in list(self._rows.values()):
            self._check_link(row, is_certain=contents.aside is None)
        self._remove_second_names()

    def _find_data(self, row: Unconfirmed) -> bool:
        """Whether the row's bytes are there, perhaps under their second name only."""
        data = Path(self._mended(row).data)
        if not data.exists() and row.name in self._links.links:
            data.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            data.hardlink_to(self._links.path(row.name))
        return data.exists()

    def _mended(self, row: Unconfirmed) -> Unconfirmed:
        """The cache directory may have been moved since."""
        data = Path(row.data)
        inside = data.parts[-2:] if row.is_stranded else data.parts[-3:]
        return msgspec.structs.replace(row, data=str(self._directory.joinpath(*inside)))

    def _check_link(self, row: Unconfirmed, *, is_certain: bool) -> None:
        """Keep a file whose row is older than its link. Where the database was damaged (not
        `is_certain`), a row without a link may stand for what was uploaded since."""
        if row.is_stranded:
            if row.name in self._links.links:
                self._links.remove(row.name)
            return
        is_old = self._links.is_closed(row.name) and row.writing
        is_old = is_old or not (is_certain or row.writing or row.name in self._links.links)
        if is_old:
            self._keep(msgspec.structs.replace(row, reason=_REVERTED))

    def _keep_damaged(self, name: str, row: Unconfirmed | None) -> None:
        """Keep the bytes of a row whose checksum is wrong, if there are any. The row says at most
        which file it is."""
        self._change(self._delete_unsynced, name)
        if name in self._links.links:
            return  # told when the links are looked at
        place = self._directory / "data" / name[:2] / name
        kept = self._directory / "kept" / name
        if name != os.path.basename(name) or not (place.is_file() or kept.is_file()):
            self._troubles.tell(f"a row of the journal is damaged, its bytes are gone: {name!r}")
            return
        identity = Identity(row.namespace, row.origin, row.path) if row else None
        self._keep(_lost_row(name, kept if kept.is_file() else place, identity))

    def _keep_lost(self, name: str) -> None:
        """Keep bytes that were acknowledged, and that no row tells of any more."""
        link = self._links.path(name)
        self._keep(_lost_row(name, link, self._links.identity(name)))
        (self._directory / "data" / name[:2] / name).unlink(missing_ok=True)

    def _keep(self, row: Unconfirmed) -> None:
        kept = self._strand_now(msgspec.structs.replace(row, sums=b""))
        self._troubles.tell(f"{_shown(row)} is not uploaded but kept as {kept.data}: {row.reason}")

    def _remove_second_names(self) -> None:
        """A kill between the steps of keeping left bytes in kept/ that a row names elsewhere."""
        known = {row.data for row in self.stranded}
        kept = self._directory / "kept"
        for place in kept.iterdir() if kept.exists() else ():
            if str(place) not in known and place.stat().st_nlink > 1:
                place.unlink()

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
        self,
        row: Unconfirmed,
        *,
        durable: bool = False,
        closed: bool = False,
        instead_of: str | None = None,
    ) -> None:
        """The file is dirty; called again when more is known. `durable`: it survives a loss of
        power. `closed`: so it does, and a program will be told that. `instead_of` is a row that
        this one replaces in the same step."""
        row = msgspec.structs.replace(row, since=row.since or self._since(row.name))
        if closed:
            await self._run(self._note_closed, row, instead_of)
        elif durable:
            await self._run(self._note_durably, row, instead_of)
        else:
            await self._run_quick(self._write, row, instead_of)

    def _since(self, name: str) -> float:
        known = self._rows.get(name)
        return known.since if known else time.time()

    async def confirm(self, name: str) -> None:
        """Delete a row: the remote has it all, or nobody wants it any more."""
        await self._run_quick(self._forget, name)

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
        await self._run(self._close)

    async def renew_if_removed(self) -> None:
        """Write all rows anew if the database was removed, as far as their bytes are there.

        Raises sqlite3.Error and OSError.
        """
        if self._db is not None:
            await self._run(self._renew_if_removed)

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        """Run it to its end, also if the caller is interrupted: row and state must agree."""
        with trio.CancelScope(shield=True):
            done = await trio.to_thread.run_sync(work, *args, limiter=self._limiter)
        return done  # noqa: RET504 - mypy takes the block for one that may end early

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
        self._links.sync()
        self._change(self._count_sync)

    def _change(self, change: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Change the database; if that turns out to be damaged, a new one gets all rows first."""
        if self._db is None:
            self._db, _ = open_database(self._directory / "journal.db")
        try:
            change(*args, **kwargs)
        except sqlite3.Error as error:
            if not database.is_damage(error) or database.is_misuse(error):
                raise
            self._write_anew(str(error))
            change(*args, **kwargs)

    def _insert(self, row: Unconfirmed, instead_of: str | None = None, *, durable: bool) -> None:
        # In WAL mode FULL syncs at each commit, OFF never (sqlite.org/pragma.html).
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._database.execute("BEGIN IMMEDIATE")
        try:
            if instead_of is not None:
                self._delete(instead_of)
            self._database.execute(
                "INSERT OR REPLACE INTO unconfirmed VALUES (?, ?)", (row.name, pack(row))
            )
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _delete(self, name: str) -> None:
        self._database.execute("DELETE FROM unconfirmed WHERE name = ?", (name,))

    def _delete_unsynced(self, name: str) -> None:
        self._database.execute("PRAGMA synchronous = OFF")
        self._delete(name)

    def _count_sync(self) -> None:
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("UPDATE synced SET times = times + 1")

    @property
    def _database(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _renew_if_removed(self) -> None:
        if (self._directory / "journal.db").exists() or not self._directory.exists():
            return
        for row in self.stranded:
            if not Path(row.data).exists():
                self._troubles.tell(f"the bytes of {_shown(row)} are gone: {row.data}")
                del self._rows[row.name]
        self._write_anew("it was removed")

    def _write_anew(self, reason: str) -> None:
        path = self._directory / "journal.db"
        self._close()
        aside = database.put_aside(path)
        self._db, _ = open_database(path)
        closed = [row for row in self._rows.values() if self._links.is_closed(row.name)]
        self._links = Acknowledged.open(self._directory / "pending")
        for row in self._rows.values():
            self._insert(row, durable=True)
        for row in closed:
            self._links.add(row)
        self._troubles.tell(f"the journal was damaged ({reason}): it was written anew, see {aside}")

    def _note_closed(self, row: Unconfirmed, instead_of: str | None) -> None:
        known = self._rows.get(row.name)
        if row.name not in self._links.links or known is None or known.path != row.path:
            self._links.identify(row)
        self._note_durably(row, instead_of)
        self._links.add(row)

    def _write(
        self, row: Unconfirmed, instead_of: str | None = None, *, durable: bool = False
    ) -> None:
        if row.writing and row.name in self._links.links:
            self._links.reopen(row.name)
        if instead_of in self._links.links:
            self._links.remove(instead_of)
        self._change(self._insert, row, instead_of, durable=durable)
        if instead_of is not None:
            self._rows.pop(instead_of, None)
        self._rows[row.name] = row

    def _forget(self, name: str) -> None:
        if name in self._links.links:
            self._links.remove(name)
        self._change(self._delete_unsynced, name)
        self._has_unsynced = True
        self._rows.pop(name, None)

    def _strand_now(self, row: Unconfirmed) -> Unconfirmed:
        """At every moment the row names a place where the bytes are."""
        place = self._directory / "kept" / row.name
        place.parent.mkdir(mode=0o700, exist_ok=True)
        since = row.since or self._since(row.name)
        stranded = msgspec.structs.replace(row, data=str(place), since=since)
        if Path(row.data) != place:
            with suppress(FileExistsError):
                place.hardlink_to(row.data)
            self._write(stranded, durable=True)
            Path(row.data).unlink()
        else:
            self._write(stranded, durable=True)
        if row.name in self._links.links:
            self._links.remove(row.name)
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
        self._forget(name)
        if row is not None and row.is_stranded:
            Path(row.data).unlink(missing_ok=True)


def _open_or_wait(path: Path, troubles: Troubles) -> tuple[sqlite3.Connection | None, Contents]:
    """Open the database. Where there was none, and the disk has no room for one, files can be read
    all the same."""
    try:
        return open_database(path)
    except sqlite3.OperationalError as error:
        if database.is_damage(error) or (path.exists() and path.stat().st_size):
            raise
        troubles.tell(f"nothing can be written as long as the cache takes no journal: {error}")
        return None, Contents()


def _shown(row: Unconfirmed) -> str:
    return f"{row.namespace or '?'}/{row.path.decode(errors='replace')}"


def _lost_row(name: str, place: Path, identity: Identity | None) -> Unconfirmed:
    """Return a row for bytes of which the journal has none that can be believed."""
    found = place.stat()
    identity = identity or Identity("", "", name.encode())
    entry = Entry(
        paths.name(identity.path),
        found.st_mode,
        found.st_size,
        found.st_mtime_ns,
        found.st_atime_ns,
        found.st_uid,
        found.st_gid,
        b"",
    )
    return Unconfirmed(
        name,
        identity.namespace,
        identity.origin,
        identity.path,
        found.st_size,
        0,
        [(0, found.st_size)] if found.st_size else [],
        str(place),
        b"",
        entry,
        _NOTHING_KNOWN,
        new=True,
        resized=True,
        reason=_LOST,
    )


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
