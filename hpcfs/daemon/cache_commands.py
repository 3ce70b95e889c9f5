"""Handlers for `hpcfs cache`, in the mount daemon or on a cache that is not mounted.

Owns how a path of the mount becomes a remote folder and a key in the cache; what is done there is
cache/maintenance.py's. In the daemon the requests come over the control socket; a cache that nobody
mounts is opened by the command line itself, with the same lock.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hpcfs.cache import maintenance
from hpcfs.cache.directory import CacheUnusable
from hpcfs.cache.maintenance import CachedPath, ReportBytes
from hpcfs.cache.store import Store
from hpcfs.config.config import Settings
from hpcfs.control.control import (
    CacheFolder,
    CacheStatus,
    ControlReply,
    ControlRequest,
    Outcome,
    WorkProgress,
)
from hpcfs.daemon import warm
from hpcfs.filesystem.filesystem import Filesystem
from hpcfs.model.errors import FilesystemError, RemoteError, SetupError
from hpcfs.system import disk
from hpcfs.writeback.journal import Journal

_UNLIMITED = 1 << 62


class CacheCommands:
    """Answers `hpcfs cache` for one mount. `origins` are the remote folders by namespace."""

    def __init__(
        self, settings: Settings, store: Store, fs: Filesystem, origins: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._store = store
        self._fs = fs
        self._origins = origins

    async def answer(self, request: ControlRequest, tell: ReportBytes) -> ControlReply:
        """Do what the request says and return the answer. Raises SetupError."""
        try:
            if request.command == "cache":
                return ControlReply(cache=await self._status())
            return ControlReply(outcome=await self._work(request, tell))
        except (RemoteError, FilesystemError) as error:
            raise SetupError(error.message) from None
        except (OSError, sqlite3.Error) as error:
            raise SetupError(f"the cache's disk failed: {error}") from None

    async def _status(self) -> CacheStatus:
        await self._store.save()
        settings = self._settings
        space = disk.space(settings.cache_dir)
        names = {origin: name for name, origin in self._origins.items()}
        found = await status(self._store, str(settings.mountpoint), names)
        return CacheStatus(
            found.directory,
            found.mountpoint,
            True,
            found.used,
            space.free,
            found.folders,
            found.pins,
            settings.cache_size,
            settings.cache_min_free.of(space.total),
        )

    async def _work(self, request: ControlRequest, tell: ReportBytes) -> Outcome:
        store = self._store
        if request.command == "verify":
            return await verify(store, tell)
        if request.command == "warm":
            if not request.path:
                raise SetupError("this is not a file")
            size = await warm.warm(self._fs, store, request.path, tell)
            return Outcome(1, size)
        if request.command == "clear":
            places = self._places(request.path) if request.path else None
            return Outcome(*await maintenance.clear(store, places, tell, pinned=request.pinned))
        return await self._change_pin(request)

    async def _change_pin(self, request: ControlRequest) -> Outcome:
        places = self._places(request.path)
        if request.command == "pin":
            for place in places:
                await maintenance.pin(self._store, place)
            return Outcome(len(places))
        removed = 0
        for place in places:
            removed += await maintenance.unpin(self._store, place)
        over = next(
            (at for one in places if (at := maintenance.pin_over(self._store, one)) is not None),
            None,
        )
        if over is not None:
            raise SetupError(
                f"it stays pinned, because {self._shown(places[0].origin, over)} is: unpin that"
            )
        if not removed:
            raise SetupError("it was not pinned: 'hpcfs cache' lists what is")
        return Outcome(removed)

    def _shown(self, origin: str, key: bytes) -> str:
        name = next((name for name, its in self._origins.items() if its == origin), origin)
        own = [] if self._settings.root_namespace else [name]
        return "/".join([str(self._settings.mountpoint), *own, *filter(None, [_text(key)])])

    def _places(self, path: bytes) -> list[CachedPath]:
        """Return what this path of the mount stands for; the mount point for all namespaces."""
        if self._settings.root_namespace is not None:
            return [CachedPath(self._origins[self._settings.root_namespace], path)]
        if not path:
            return [CachedPath(origin, b"") for origin in self._origins.values()]
        name, _, key = path.partition(b"/")
        origin = self._origins.get(os.fsdecode(name))
        if origin is None:
            raise SetupError(f"the mount has no namespace {_text(name)}")
        return [CachedPath(origin, key)]


def _text(path: bytes) -> str:
    return path.decode(errors="replace")


async def status(store: Store, mountpoint: str, names: Mapping[str, str]) -> CacheStatus:
    """Return the status of any cache; `names` are namespaces by origin."""
    folders = [
        CacheFolder(
            names.get(one.origin, ""),
            one.origin,
            one.files,
            one.bytes,
            one.pinned_files,
            one.pinned_bytes,
        )
        for one in await maintenance.totals(store)
    ]
    pins = [
        f"{names.get(origin, origin)}/{_text(key)}"
        for origin, key in await store.in_thread(store.registry.index.pins)
    ]
    free = disk.space(store.directory).free
    return CacheStatus(
        str(store.directory), mountpoint, False, store.used_bytes, free, folders, pins
    )


async def verify(store: Store, tell: ReportBytes) -> Outcome:
    """Compare every cached block with its checksum; return what was found and dropped."""
    found = await maintenance.verify(store, tell)
    return Outcome(found.files, found.bytes, found.damaged_files, found.damaged_bytes)


# --- not mounted --------------------------------------------------------------------------------

_MOUNT = re.compile(r"the mount at (.*) \(pid \d+\)", re.DOTALL)


def last_mountpoint(directory: Path) -> str:
    """Return where the cache in this directory was mounted last; "" if nobody knows."""
    try:
        match = _MOUNT.fullmatch((directory / "lock").read_text(errors="replace"))
    except OSError:
        return ""
    return match[1] if match else ""


def answer_unmounted(
    directory: Path, request: ControlRequest, on_step: Callable[[WorkProgress], None]
) -> ControlReply:
    """Return what the daemon would answer, for the cache in this directory.

    Raises SetupError, also where the cache is in use.
    """
    return trio.run(_answer_unmounted, directory, request, on_step)


async def _answer_unmounted(
    directory: Path, request: ControlRequest, on_step: Callable[[WorkProgress], None]
) -> ControlReply:
    async def tell(done: int, total: int) -> None:
        on_step(WorkProgress(done, total))

    mountpoint = last_mountpoint(directory)
    async with unmounted(directory, "hpcfs cache") as store:
        if request.command == "cache":
            return ControlReply(cache=await status(store, mountpoint, {}))
        if request.command == "verify":
            return ControlReply(outcome=await verify(store, tell))
        assert request.command == "clear"
        return ControlReply(
            outcome=Outcome(*await maintenance.clear(store, None, tell, pinned=request.pinned))
        )


@asynccontextmanager
async def unmounted(directory: Path, command: str) -> AsyncIterator[Store]:
    """Open the cache, locked by this command.

    What the last mount had not uploaded is in use, and so is not touched. The lock's file tells
    afterwards what it told before. Raises SetupError, also where the cache is in use.
    """
    lock = directory / "lock"
    told = lock.read_text(errors="replace") if last_mountpoint(directory) else ""
    try:
        store = Store.open(directory, _UNLIMITED, f"'{command}' (pid {os.getpid()})")
    except CacheUnusable as error:
        raise SetupError(str(error)) from None
    try:
        journal = Journal.open(directory, store.troubles)
        for row in journal.rows:
            if not row.is_stranded:
                await store.resume(
                    row.name, row.origin, row.path, row.version, row.size, row.ranges
                )
        await journal.close()
        yield store
        if told:
            lock.write_text(told)
    except (OSError, sqlite3.Error) as error:
        raise SetupError(f"the cache {directory} can't be used: {error}") from None
    finally:
        await store.close()
