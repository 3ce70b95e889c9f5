"""A backlog without journal and remotes: rows in memory, which upload as a test lets them."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from hpcfs.content.record import Unconfirmed
from hpcfs.control.control import PendingState
from hpcfs.daemon.write_commands import PendingRow, SyncProgress
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.model.errors import RemoteError
from hpcfs.writeback.journal import Journal

STEP_SECONDS = 0.05


def row(
    path: str | bytes,
    state: PendingState = "waiting",
    *,
    size: int = 10,
    namespace: str = "home",
    reason: str = "",
    since: float = 1.0,
    data: str = "",
) -> PendingRow:
    raw = path if isinstance(path, bytes) else path.encode()
    name = f"{namespace}:{os.fsdecode(raw)}"
    left = 0 if state == "writing" else size
    return PendingRow(name, namespace, raw, size, left, state, reason, since, data)


class FakeBacklog:
    """Implements write_commands.PendingFiles. `rate` is in bytes a second: with 0 nothing ever goes
    up, and with `waits` nothing before somebody syncs. What is to fail has its reason in `refuses`,
    by id."""

    def __init__(self, rows: Sequence[PendingRow], rate: float = 0.0) -> None:
        self.rows = {one.id: one for one in rows}
        self.rate = rate
        self.waits = False
        self.refuses: dict[str, str] = {}
        self.uploaded = 0
        self.synced: list[tuple[str | None, bytes]] = []

    def pending(self) -> list[PendingRow]:
        return list(self.rows.values())

    async def upload_forever(self) -> None:
        """One after the other."""
        while True:
            await trio.sleep(STEP_SECONDS)
            if self.synced or not self.waits:
                self.step(int(self.rate * STEP_SECONDS))

    def step(self, length: int) -> None:
        ways = (one for one in self.rows.values() if one.state in ("waiting", "uploading"))
        one = next(ways, None)
        if one is None or not length:
            return
        sent = min(length, one.left)
        self.uploaded += sent
        if reason := self.refuses.get(one.id):
            self.rows[one.id] = replace(one, state="failed", reason=reason)
        elif sent == one.left:
            del self.rows[one.id]
        else:
            self.rows[one.id] = replace(one, state="uploading", left=one.left - sent)

    async def sync(
        self,
        namespace: str | None,
        path: bytes,
        tell: Callable[[SyncProgress], Awaitable[None]],
        patience: float = 0.0,
    ) -> None:
        self.synced.append((namespace, path))
        mine = {one.id: one for one in self.rows.values() if _is_of(one, namespace, path)}
        files, length = len(mine), sum(one.left for one in mine.values() if not one.is_stuck)
        while True:
            now = [self.rows[name] for name in mine if name in self.rows]
            left = sum(one.left for one in now if not one.is_stuck)
            await tell(SyncProgress(files - len(now), files, length - left, length))
            if all(one.is_stuck for one in now):
                break
            await trio.sleep(STEP_SECONDS)
        if now:
            raise RemoteError(now[0].reason)

    async def retry(self, ids: Sequence[str]) -> None:
        for name in ids:
            self.rows[name] = replace(self.rows[name], state="waiting", reason="")

    async def discard(self, ids: Sequence[str]) -> None:
        for name in ids:
            del self.rows[name]

    async def recover(self, name: str, target: Path, /) -> int:
        data = content(self.rows[name])
        if reason := self.refuses.get(name):
            _fill(target, data[:3])
            raise RemoteError(reason)
        return _fill(target, data)


def content(one: PendingRow) -> bytes:
    """The local version of the file."""
    return (one.path * one.size)[: one.size]


def _fill(target: Path, data: bytes) -> int:
    assert target.read_bytes() == b"", "the service must have made it"
    return target.write_bytes(data)


def _is_of(one: PendingRow, namespace: str | None, path: bytes) -> bool:
    if namespace is None:
        return True
    below = not path or one.path == path or one.path.startswith(path + b"/")
    return one.namespace == namespace and below


# --- a journal that nobody mounts ---------------------------------------------------------------


def make_journal(home: Path, *rows: Unconfirmed) -> Path:
    """A cache directory as a killed daemon leaves it."""
    directory = home / "mnt-0"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "lock").write_text("the mount at /m (pid 1)")

    async def fill() -> None:
        journal = Journal.open(directory)
        for one in rows:
            await journal.note(one)
        await journal.close()

    trio.run(fill)
    return directory


def unconfirmed(
    home: Path,
    path: bytes,
    data: bytes,
    *,
    namespace: str = "home",
    base_size: int = 0,
    ranges: list[tuple[int, int]] | None = None,
) -> Unconfirmed:
    name = f"{namespace}-{path.hex()}"
    file = home / "mnt-0" / "data" / name[:2] / name
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_bytes(data)
    dirty = [(0, len(data))] if ranges is None else ranges
    entry = Entry(path.rpartition(b"/")[2], stat.S_IFREG | 0o644, len(data), 10**18, 10**18, 1, 1)
    capabilities = Capabilities(
        partial_writes=True, creates_on_upload=False, handles=True, mtime_resolution_ns=10**9
    )
    return Unconfirmed(
        name,
        namespace,
        f"ssh:{namespace}",
        path,
        len(data),
        base_size,
        dirty,
        str(file),
        b"v",
        entry,
        capabilities,
    )
