"""Handlers for `hpcfs pending`, `sync`, `retry`, `recover` and `discard`.

Owns which files a path of the mount stands for, and where copies of them go. The work itself is
done by writeback/pending.py. In the daemon the requests come over the control socket; the journal
of a mount that is not mounted is read by the command line itself, under the cache's lock.
"""

from __future__ import annotations

import heapq
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import trio

from hpcfs.config.config import Settings
from hpcfs.content.record import Unconfirmed
from hpcfs.control.control import (
    MAX_PENDING,
    ControlReply,
    ControlRequest,
    Outcome,
    PendingFile,
    PendingList,
    PendingState,
    WorkProgress,
)
from hpcfs.control.server import ReportProgress
from hpcfs.daemon import cache_commands
from hpcfs.model import paths
from hpcfs.model.errors import RemoteError, SetupError
from hpcfs.system import ownership
from hpcfs.writeback.journal import Journal
from hpcfs.writeback.pending import PendingRow
from hpcfs.writeback.queue import SyncProgress

PARTIAL = ".hpcfs-partial"
"""Ends the name of a copy that has only what was changed here: the rest is on the remote."""
_MAX_NAME_BYTES = 255 - len(PARTIAL) - 8
_MAX_TEXT = 2 * 1024 * 1024
"""Characters of all that is named in one answer: JSON makes up to 6 bytes of one, which still is
less than MAX_REPLY_BYTES."""
_ORDER: dict[PendingState, int] = {
    "failed": 0,
    "kept": 1,
    "uploading": 2,
    "waiting": 3,
    "writing": 4,
}


class PendingFiles(Protocol):
    """The files that the remotes have not confirmed; ids that are not pending are ignored."""

    def pending(self) -> Iterable[PendingRow]:
        """Return a row for each file."""
        ...

    async def sync(
        self,
        namespace: str | None,
        path: bytes,
        tell: Callable[[SyncProgress], Awaitable[None]],
        patience: float = ...,
    ) -> None:
        """Return when nothing of it is on its way any more. `path` is a file or a directory; None
        and b"" are all. A site may be out of reach for `patience` seconds. Cancelling it cancels no
        upload.

        Raises RemoteError, the first, when all is done that can be.
        """
        ...

    async def retry(self, ids: Sequence[str]) -> None:
        """Return when they wait for their turn."""
        ...

    async def discard(self, ids: Sequence[str]) -> None:
        """Forget them. Raises RemoteError."""
        ...

    async def recover(self, name: str, target: Path, /) -> int:
        """Write the whole of the local version into `target`, which is an empty file, and return
        its bytes. It stays pending. Raises RemoteError or OSError."""
        ...


def summary(rows: Iterable[PendingRow]) -> PendingList:
    """Count all rows, and name the first ones, those that need the user most."""
    found = list(rows)
    first = heapq.nsmallest(MAX_PENDING, found, lambda row: (_ORDER[row.state], row.since))
    return PendingList(
        list(_told_within(first, _MAX_TEXT)),
        len(found),
        sum(row.size for row in found),
        sum(row.left for row in found),
        dict(Counter(row.state for row in found)),
        time.time(),
    )


def _told_within(rows: Sequence[PendingRow], length: int) -> Iterator[PendingFile]:
    for row in rows:
        told = _told(row)
        length -= sum(len(text) for text in (told.path, told.reason, told.data, told.id))
        if length < 0:
            return
        yield told


def _told(row: PendingRow) -> PendingFile:
    """Return the row as it is sent. JSON is UTF-8: bytes that are not are shown as missing."""
    return PendingFile(
        namespace=row.namespace,
        path=_text(row.path),
        size=row.size,
        left=row.left,
        state=row.state,
        since=row.since,
        id=row.id,
        reason=row.reason,
        data=row.data,
    )


def _text(path: bytes) -> str:
    return path.decode(errors="replace")


class WriteCommands:
    """Answers `hpcfs pending`, `sync`, `retry`, `recover` and `discard` for one mount."""

    def __init__(self, settings: Settings, pending: PendingFiles) -> None:
        self._settings = settings
        self._pending = pending

    def summary(self) -> PendingList:
        """Return all that is pending, for the status."""
        return summary(self._pending.pending())

    async def answer(self, request: ControlRequest, tell: ReportProgress) -> ControlReply:
        """Do what one of WRITE_COMMANDS says and return the answer. Raises SetupError."""
        try:
            if request.command == "pending":
                return ControlReply(pending=summary(self._below(request.path)))
            return ControlReply(outcome=await self._work(request, tell))
        except RemoteError as error:
            raise SetupError(error.message) from None
        except (OSError, sqlite3.Error) as error:
            raise SetupError(f"the local disk failed: {error}") from None

    async def _work(self, request: ControlRequest, tell: ReportProgress) -> Outcome:
        if request.command == "sync":
            return await self._sync(request.path, tell, request.patience)
        if request.command == "retry":
            stuck = [row for row in self._below(request.path) if row.is_stuck]
            await self._pending.retry([row.id for row in stuck])
            return _outcome(stuck)
        if request.command == "discard":
            return await self._discard(request)
        assert request.command == "recover"
        return await _recover(self._below(request.path), request.to, self._pending.recover, tell)

    async def _sync(self, path: bytes, tell: ReportProgress, patience: float) -> Outcome:
        namespace, key = self._place(path)
        last = SyncProgress(0, 0, 0, 0)

        async def pass_on(found: SyncProgress) -> None:
            nonlocal last
            last = found
            files = found.files_done, found.files_total
            await tell(found.bytes_done, found.bytes_total, *files, found.reason)

        try:
            await self._pending.sync(namespace, key, pass_on, patience)
        except RemoteError as error:
            raise SetupError(self._what_failed(path) or error.message) from None
        if failure := self._what_failed(path):
            raise SetupError(failure)
        return Outcome(last.files_done, last.bytes_done)

    def _what_failed(self, path: bytes) -> str:
        """Return a sentence on what failed, empty if nothing did.

        What failed before counts too, as the remote does not have it.
        """
        stuck = sorted(
            (row for row in self._below(path) if row.is_stuck), key=lambda row: row.since
        )
        if not stuck:
            return ""
        first = stuck[-1]
        more = f"; {len(stuck)} files in all, which 'hpcfs status' lists" if len(stuck) > 1 else ""
        return f"{_text(self._shown(first))} is not uploaded: {first.reason}{more}"

    async def _discard(self, request: ControlRequest) -> Outcome:
        """Discard only what the user was shown: what was written since then stays."""
        rows = [row for row in self._below(request.path) if row.since <= request.before]
        if any(row.state == "writing" for row in rows):
            raise SetupError("a program still has it open for writing: end that first")
        if not rows:
            raise SetupError("nothing of it is pending any more: 'hpcfs status' lists what is")
        await self._pending.discard([row.id for row in rows])
        return _outcome(rows)

    # --- paths ------------------------------------------------------------------------------------

    def _below(self, path: bytes) -> list[PendingRow]:
        """Return the rows of the file, or of all below the directory, at this path of the mount."""
        return [row for row in self._pending.pending() if paths.is_below(self._shown(row), path)]

    def _shown(self, row: PendingRow) -> bytes:
        """Return the row's path in the mount.

        What an earlier mount left may be of a namespace that this one does not have; it is shown as
        if it had.
        """
        if row.namespace == self._settings.root_namespace:
            return row.path
        return paths.join(os.fsencode(row.namespace), row.path)

    def _place(self, path: bytes) -> tuple[str | None, bytes]:
        if not path:
            return None, b""
        if self._settings.root_namespace is not None:
            return self._settings.root_namespace, path
        name, _, key = path.partition(b"/")
        namespace = os.fsdecode(name)
        if namespace not in self._settings.namespaces:
            raise SetupError(f"the mount has no namespace {_text(name)}")
        return namespace, key


def _outcome(rows: Sequence[PendingRow]) -> Outcome:
    return Outcome(len(rows), sum(row.size for row in rows))


# --- copies -------------------------------------------------------------------------------------


async def _recover(
    rows: Sequence[PendingRow],
    to: bytes,
    copy: Callable[[str, Path], Awaitable[int]],
    tell: ReportProgress,
) -> Outcome:
    """Copy to `to`/NAMESPACE/PATH. Raises SetupError or OSError; what is copied by then stays."""
    total, done = sum(row.size for row in rows), 0
    for number, row in enumerate(rows):
        await tell(done, total, number, len(rows))
        target = await trio.to_thread.run_sync(
            make_target, Path(os.fsdecode(to)), row.namespace, row.path
        )
        try:
            done += await copy(row.id, target)
        except BaseException:
            target.unlink(missing_ok=True)  # it would pass for the whole file
            raise
    return Outcome(len(rows), done)


def make_target(to: Path, namespace: str, path: bytes, ending: str = "") -> Path:
    """Create an empty file at `to`/`namespace`/`path`, with a number in its name where there is
    one.

    Raises SetupError for a path that would lead out of `to`, or to where others may write; or
    OSError.
    """
    parts = [os.fsdecode(part) for part in path.split(b"/")]
    if any(part in ("", ".", "..") or "\0" in part for part in [namespace, *parts]):
        raise SetupError(f"{_text(path)!r} is no path that can be copied")
    directory = to
    ownership.make_directories(directory)
    for part in [namespace, *parts[:-1]]:
        directory = _first_free(directory, part, "", _as_directory)
    if reason := ownership.unsafe_reason(directory):  # they could put a link in the copy's place
        raise SetupError(
            f"{directory} is not safe from others ({reason}): name a directory that only you can "
            "change"
        )
    return _first_free(directory, parts[-1], ending, _as_new_file)


def _first_free(directory: Path, name: str, ending: str, take: Callable[[Path], bool]) -> Path:
    for number in range(1, 1_000_000):
        path = directory / _numbered(name, number, ending)
        if take(path):
            return path
    raise SetupError(f"{directory} has too many copies of {name!r}")


def _numbered(name: str, number: int, ending: str) -> str:
    """Shortened where the number or the ending would make it too long for a local disk."""
    if number == 1 and not ending:
        return name
    short = os.fsdecode(os.fsencode(name)[:_MAX_NAME_BYTES])
    return f"{short}{f'.{number}' if number > 1 else ''}{ending}"


def _as_directory(path: Path) -> bool:
    """Whether it is one now, and no link to elsewhere."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return path.is_dir() and not path.is_symlink()
    return True


def _as_new_file(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


# --- not mounted --------------------------------------------------------------------------------


def recover_unmounted(
    directory: Path, path: bytes, to: bytes, on_step: Callable[[WorkProgress], None]
) -> tuple[Outcome, list[Path]]:
    """Copy what the journal in this cache's directory has at or below `path`.

    `path` is as in the mount, or below its root namespace. Also returns the copies that are
    partial: without the remote there is only what was changed here. Raises SetupError, also where
    the cache is in use.
    """
    return trio.run(_recover_unmounted, directory, path, to, on_step)


async def _recover_unmounted(
    directory: Path, path: bytes, to: bytes, on_step: Callable[[WorkProgress], None]
) -> tuple[Outcome, list[Path]]:
    async with cache_commands.unmounted(directory, "hpcfs recover"):
        rows = [row for row in await _journal_rows(directory) if _may_be_below(row, path)]
        done, total, partial = 0, sum(row.size for row in rows), list[Path]()
        for number, row in enumerate(rows):
            on_step(WorkProgress(done, total, number, len(rows)))
            target = await trio.to_thread.run_sync(_copy_out, row, Path(os.fsdecode(to)))
            if not _is_whole(row):
                partial.append(target)
            done += row.size
        return Outcome(len(rows), done), partial


async def _journal_rows(directory: Path) -> list[Unconfirmed]:
    """Return the journal's rows. The cache's lock is held."""
    journal = Journal.open(directory)
    rows = journal.rows
    await journal.close()
    return rows


def _may_be_below(row: Unconfirmed, path: bytes) -> bool:
    """The journal does not say whether its namespace was the root of the mount itself."""
    return paths.is_below(row.path, path) or paths.is_below(
        paths.join(os.fsencode(row.namespace), row.path), path
    )


def _is_whole(row: Unconfirmed) -> bool:
    """Whether no byte of it is the remote's.

    Above `base_size` nothing is: what is not dirty there is a hole.
    """
    at = 0
    for start, end in sorted(row.ranges):
        if start > at:
            break
        at = max(at, end)
    return at >= min(row.size, row.base_size)


def _copy_out(row: Unconfirmed, to: Path) -> Path:
    target = make_target(to, row.namespace, row.path, "" if _is_whole(row) else PARTIAL)
    try:
        shutil.copyfile(row.data, target)
        os.truncate(target, row.size)
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return target
