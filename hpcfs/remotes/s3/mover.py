"""Renaming a directory: everything below a prefix is copied on the server, then removed.

Whatever interrupts it, every object is there under one of its names at least. That it was begun is
noted in a file of `SiteSpec.state_dir` before anything is copied. So a process that is asked for
the same rename again, after one that was killed, knows that what is below the target is not
somebody else's, and goes on: what is there as it should be is not copied again. A rename that fails
takes its copies back; if not even that can be done, the note stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from hpcfs.model.errors import NotSupported, RemoteError, TimedOut
from hpcfs.remotes.base import ReportProgress, no_report
from hpcfs.remotes.s3.bucket import DELETED_AT_ONCE, Bucket
from hpcfs.remotes.s3.listing import is_marker
from hpcfs.remotes.s3.multipart import TransferProgress, each, renewed
from hpcfs.remotes.s3.names import checked_key
from hpcfs.remotes.s3.objects import Page, Summary
from hpcfs.remotes.s3.parts import MIB
from hpcfs.remotes.s3.transfer import Transfer

log = logging.getLogger(__name__)
COPIES_IN_FLIGHT = 64
"""A copy takes AWS some 50 to 100 ms: that is about 1000 per second, and 3500 are permitted."""
DELETIONS_IN_FLIGHT = 4
NOTED_BYTES = 64 * MIB
"""The copy of a larger object may have another ETag than the object, and is not made twice."""
KEY_LENGTH = struct.Struct(">H")
FOLDER = "renames"


class Mover:
    """Renames directories of one bucket. `name` tells it from those of other servers in the
    notes."""

    def __init__(self, bucket: Bucket, transfer: Transfer, state_dir: str, name: str) -> None:
        self._bucket, self._transfer = bucket, transfer
        self._state_dir, self._name = state_dir, name
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def is_begun(self, source: str, target: str) -> bool:
        """Return whether a rename of these prefixes was begun and did not end."""
        return self._note(source, target).exists()

    def forget(self, source: str, target: str) -> None:
        """Remove the note of a rename that was begun."""
        _end(self._note(source, target))

    async def move(self, source: str, target: str, report: ReportProgress) -> None:
        """`report` is told how many objects were copied or removed."""
        lock = self._locks.setdefault((source, target), asyncio.Lock())
        progress = TransferProgress(report)
        async with AsyncExitStack() as stack:
            async with renewed(progress):
                await stack.enter_async_context(lock)
            with tempfile.TemporaryFile(dir=self._state_dir) as spool:
                move = _Move(self._bucket, self._transfer, source, target, spool, progress)
                await self._run(move, self._note(source, target))

    async def _run(self, move: _Move, note: Path) -> None:
        again = await asyncio.to_thread(_begin, note, [self._name, move.source, move.target])
        with note.open("a") as made:
            try:
                await _finish(move.copy_all(_noted(note) if again else None, made), move.stop)
            except BaseException as error:
                if not again and await asyncio.shield(move.take_back()):
                    _end(note)
                elif isinstance(error, RemoteError):
                    raise _unfinished(error) from error
                raise
        try:
            await move.delete_all()
        except RemoteError as error:
            raise _unfinished(error) from error
        _end(note)

    def _note(self, source: str, target: str) -> Path:
        key = "\0".join([self._name, source, target]).encode()
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return Path(self._state_dir, FOLDER, name)


async def _finish(work: Coroutine[None, None, None], stop: Callable[[], None]) -> None:
    """Whoever is cancelled meanwhile lets it come to a stop by itself."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        stop()
        await asyncio.gather(task, return_exceptions=True)
        raise


class _Move:
    """One rename. Keys are noted in `spool` before they are copied: a directory may hold more keys
    than memory, and only what was copied may be removed, not what others added meanwhile."""

    def __init__(
        self,
        bucket: Bucket,
        transfer: Transfer,
        source: str,
        target: str,
        spool: IO[bytes],
        progress: TransferProgress,
    ) -> None:
        self.source, self.target = source, target
        self._bucket, self._transfer = bucket, transfer
        self._spool, self._progress = spool, progress
        self._failure: RemoteError | None = None

    async def copy_all(self, made: dict[str, tuple[str, str]] | None, notes: IO[str]) -> None:
        """`made` are the ETags of large objects and their copies that were made before; None where
        nothing was. Those made now are added to `notes`."""
        there = None if made is None else _Sorted(self._bucket.pages(self.target), self.target)

        async for page in self._bucket.pages(self.source):
            copies: dict[str, Summary] = {}
            if there is not None and page.objects:
                copies = await there.up_to(page.objects[-1].key[len(self.source) :])

            async def copy(item: Summary, copies: dict[str, Summary] = copies) -> None:
                if self._failure is not None:
                    return
                rest = item.key[len(self.source) :]
                raw = rest.encode()
                self._spool.write(KEY_LENGTH.pack(len(raw)) + raw)
                if not _is_copy(copies.get(rest), item, (made or {}).get(rest)):
                    await self._copy(item, rest, notes)
                self._progress.add(1)

            await each(page.objects, copy, COPIES_IN_FLIGHT)
            if self._failure is not None:
                raise self._failure

    def stop(self) -> None:
        """No copy is begun any more. Those under way are waited for: one that the server carries
        out after all the others were taken back would stay."""
        self._failure = self._failure or TimedOut("the rename was given up")

    async def _copy(self, item: Summary, rest: str, notes: IO[str]) -> None:
        key = checked_key(self.target + rest)
        try:
            if item.size == 0 and item.key.endswith("/"):
                await self._transfer.copy_marker(item, key)
                return
            etag = await self._transfer.copy_listed(item, key, no_report)
        except RemoteError as error:
            self._failure = self._failure or error
            return
        if item.size > NOTED_BYTES:
            notes.write(json.dumps([rest, item.etag, etag]) + "\n")
            notes.flush()

    async def take_back(self) -> bool:
        """Remove the copies of a rename that failed; the directory was there and empty, or not.
        Returns whether that was possible."""
        try:
            await self._delete(self.target, markers=False)
        except RemoteError as error:  # the failure that led here is the one to report
            log.warning("copies of a rename stay below %s: %s", self.target, error.message)
            return False
        return True

    async def delete_all(self) -> None:
        await self._delete(self.source, markers=True)

    async def _delete(self, directory: str, *, markers: bool) -> None:
        async def delete(keys: list[str]) -> None:
            await self._delete_some(keys)
            self._progress.add(len(keys))

        self._spool.seek(0)
        rests = (rest for rest in _keys_in(self._spool) if markers or not is_marker(rest, 0))
        keys = (directory + rest for rest in rests)
        await each(_batches(keys), delete, DELETIONS_IN_FLIGHT)

    async def _delete_some(self, keys: list[str]) -> None:
        server = self._bucket.server
        if server.deletes_many is not False:
            try:
                await self._bucket.delete_many(keys)
            except NotSupported:
                server.deletes_many = False
            else:
                return
        await each(keys, self._bucket.delete, COPIES_IN_FLIGHT // DELETIONS_IN_FLIGHT)


class _Sorted:
    """A listing that is read as far as another one of the same order has come."""

    def __init__(self, pages: AsyncIterator[Page], prefix: str) -> None:
        self._pages, self._prefix = pages, prefix
        self._waiting: list[Summary] = []
        self._ended = False

    async def up_to(self, last: str) -> dict[str, Summary]:
        """Return the objects up to `last`, which is compared with what follows the prefix."""
        skip, end = len(self._prefix), last.encode()
        while not self._ended and not self._is_past(end):
            page = await anext(self._pages, None)
            self._ended = page is None
            self._waiting += page.objects if page is not None else []
        found = {item.key[skip:]: item for item in self._waiting if item.key[skip:].encode() <= end}
        self._waiting = [item for item in self._waiting if item.key[skip:] not in found]
        return found

    def _is_past(self, end: bytes) -> bool:
        return bool(self._waiting) and self._waiting[-1].key[len(self._prefix) :].encode() > end


def _is_copy(there: Summary | None, item: Summary, made: tuple[str, str] | None) -> bool:
    if there is None or there.size != item.size or not item.etag:
        return False
    return there.etag == item.etag or (item.etag, there.etag) == made


def _begin(note: Path, names: list[str]) -> bool:
    """Whether this rename was begun before. The note is on the disk when this returns."""
    note.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with note.open("x") as file:
            file.write(json.dumps(names) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return True
    folder = os.open(note.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return False


def _end(note: Path) -> None:
    note.unlink(missing_ok=True)


def _noted(note: Path) -> dict[str, tuple[str, str]]:
    """Read the notes. A line that was cut off when its writer was killed says nothing."""
    found: dict[str, tuple[str, str]] = {}
    with note.open() as lines:
        for line in islice(lines, 1, None):
            try:
                rest, etag, copy = json.loads(line)
            except ValueError:
                continue
            found[rest] = etag, copy
    return found


def _unfinished(error: RemoteError) -> RemoteError:
    """Return the same failure, saying where the files are."""
    return type(error)(
        f"{error.message}; the rename is not finished, and some files are under both names: "
        "rename again to finish it"
    )


def _batches(keys: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(keys, DELETED_AT_ONCE)):
        yield batch


def _keys_in(spool: IO[bytes]) -> Iterator[str]:
    while header := spool.read(KEY_LENGTH.size):
        yield spool.read(KEY_LENGTH.unpack(header)[0]).decode()
