"""A whole filesystem over remotes in memory, and a kernel that asks it as Linux does.

`Kernel` walks paths by lookups that it counts and forgets, tries an open that failed with ESTALE
once more, and locks a directory while names in it change: what the filesystem may rely on.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.lowlevel

from hpcfs.cache.slow_disk import SlowDisk
from hpcfs.cache.store import Store
from hpcfs.filesystem.filesystem import Filesystem, MountOptions
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, ROOT_INO, Node
from hpcfs.model.entries import BLOCK_BYTES, Attributes, Entry
from hpcfs.model.errors import AlreadyExists, NotFound, Stale
from hpcfs.site.namespace import Namespace, NamespacePolicy, SymlinkMode, WriteMode
from hpcfs.writeback.close import Closer
from hpcfs.writeback.journal import Journal
from hpcfs.writeback.pending import Pending
from hpcfs.writeback.queue import UploadQueue
from hpcfs.writeback.recovery import Recovery
from hpcfs.writeback.uploader import Uploader
from tests.support.memory_remote import GID, UID, Cues, MemoryRemote, MemorySite

T = TypeVar("T")
KINDS = ("sftp", "s3")
RW = os.O_RDWR


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let other tasks and threads run until it holds."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.lowlevel.checkpoint()


class ToldPace(SlowDisk):
    """The cache's disk is as slow as the test says."""

    told_slow = False

    @property
    def is_slow(self) -> bool:
        return self.told_slow


class Clock:
    """The tree's clock: time passes only where the test says so, and a little at every look."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        self.seconds += 1e-6
        return self.seconds

    def expire_attributes(self) -> None:
        self.seconds += ATTRIBUTE_SECONDS + 0.1


@dataclass
class World:
    directory: Path
    store: Store
    journal: Journal
    fs: Filesystem
    remotes: dict[str, MemoryRemote]
    sites: dict[str, MemorySite]
    nursery: trio.Nursery
    clock: Clock
    pending: Pending
    namespaces: list[Namespace]
    kernel: Kernel = field(init=False)

    def __post_init__(self) -> None:
        self.kernel = Kernel(self)

    @property
    def closer(self) -> Closer:
        return self.fs.closer

    @property
    def queue(self) -> UploadQueue:
        return self.fs.closer.queue

    @property
    def remote(self) -> MemoryRemote:
        return self.remotes["ns"]

    @property
    def cues(self) -> Cues:
        return self.sites["ns"].cues

    def set_slow_disk(self, slow: bool = True) -> None:
        pace = self.store.memory.slow_disk = ToldPace()
        pace.told_slow = slow

    def kept_bytes(self) -> list[bytes]:
        return [Path(row.data).read_bytes() for row in self.journal.stranded]


@asynccontextmanager
async def world(
    directory: Path,
    kind: str | dict[str, MemoryRemote],
    *,
    max_bytes: int = 64 * BLOCK_BYTES,
    read_only: bool = False,
    write: WriteMode = "through",
    symlinks: SymlinkMode = "contain",
    mountpoint: bytes | None = None,
    sites: dict[str, MemorySite] | None = None,
) -> AsyncIterator[World]:
    """One namespace "ns" of this kind, or those given. Everything is closed properly at the end."""
    remotes = {"ns": MemoryRemote(kind)} if isinstance(kind, str) else kind
    sites = sites or {name: MemorySite({name: remote}) for name, remote in remotes.items()}
    store = Store.open(directory, max_bytes, "a test")
    for site in sites.values():
        site.lend = store.in_memory
    journal = Journal.open(directory, store.troubles)
    clock = Clock()
    async with trio.open_nursery() as nursery:
        namespaces = [
            Namespace(
                name,
                f"memory:{name}",
                sites[name],
                NamespacePolicy(
                    read_only=read_only,
                    write=write,
                    keeps_xattrs=not remotes[name].is_sftp,
                    symlinks=symlinks,
                ),
            )
            for name in remotes
        ]
        fs = Filesystem(
            namespaces,
            store,
            Uploader(journal),
            nursery,
            MountOptions(mountpoint=mountpoint, uid=UID, gid=GID, now=clock),
        )
        recovery = Recovery(fs.tree, fs.shared, fs.closer.queue, journal, namespaces)
        pending = Pending(fs.tree, store, fs.closer, journal, recovery)
        await recovery.restore(journal.rows)
        nursery.start_soon(store.evict_forever)
        nursery.start_soon(fs.closer.queue.run)
        yield World(
            directory, store, journal, fs, remotes, sites, nursery, clock, pending, namespaces
        )
        for site in sites.values():
            site.cues.clear()
        await fs.files.close_all()
        await fs.closer.queue.drain()
        nursery.cancel_scope.cancel()
    await store.close()
    await journal.close()


Story = Callable[["World"], Awaitable[None]]


def live(
    *kinds: str, max_blocks: int = 64, write: WriteMode = "through"
) -> Callable[[Story], Callable[[str, Path], None]]:
    """Turns a story about a world into a test, once for each kind of remote."""

    def decorate(story: Story) -> Callable[[str, Path], None]:
        async def run(kind: str, directory: Path) -> None:
            size = max_blocks * BLOCK_BYTES
            async with world(directory, kind, max_bytes=size, write=write) as w:
                with trio.fail_after(20):
                    await story(w)

        @pytest.mark.parametrize("kind", kinds or KINDS)
        def test(kind: str, tmp_path: Path) -> None:
            trio.run(run, kind, tmp_path)

        test.__name__ = story.__name__
        test.__doc__ = story.__doc__
        return test

    return decorate


class Kernel:
    def __init__(self, world: World) -> None:
        self._world = world
        self._fs = world.fs
        self.lookups: dict[int, int] = {}
        self.process = 0
        """Whose calls these are; 0 is one of which nothing is known."""

    def _count(self, node: Node) -> Node:
        self._fs.tree.count_lookup(node)
        self.lookups[node.ino] = self.lookups.get(node.ino, 0) + 1
        return node

    def forget_all(self) -> None:
        for ino, count in self.lookups.items():
            self._fs.tree.forget(ino, count)
        self.lookups.clear()

    async def walk(self, path: str) -> Node:
        """`path` starts with the namespace; "" is the mount's top."""
        node = self._fs.tree.get(ROOT_INO)
        for name in os.fsencode(path).split(b"/") if path else []:
            node = self._count(await self._fs.lookup.find(node.ino, name, self.process))
        return node

    async def parent(self, path: str) -> tuple[int, bytes]:
        folder, _, name = path.rpartition("/")
        return (await self.walk(folder)).ino, os.fsencode(name)

    async def twice_if_stale(self, act: Callable[[], Awaitable[T]]) -> T:
        """As open(2) and stat(2) do in Linux."""
        try:
            return await act()
        except Stale:
            return await act()

    async def exists(self, path: str) -> bool:
        try:
            await self.walk(path)
        except NotFound:
            return False
        return True

    async def stat(self, path: str) -> Entry:
        async def act() -> Entry:
            node = await self.walk(path)
            return (await self._fs.lookup.getattr(node.ino)).entry

        return await self.twice_if_stale(act)

    async def open(self, path: str, flags: int = RW) -> int:
        """open(2): O_CREAT makes the file if the lookup found none."""

        async def act() -> int:
            if not flags & os.O_CREAT or await self.exists(path):
                node = await self.walk(path)
                return (await self._fs.files.open(node, flags))[0]
            parent, name = await self.parent(path)
            handle, node = await self._fs.create(parent, name, 0o644, flags, self.process)
            self._count(node)
            return handle

        return await self.twice_if_stale(act)

    def node_of(self, handle: int) -> Node:
        return self._fs.files.get(handle).node

    async def fstat(self, handle: int) -> Entry:
        return (await self._fs.lookup.getattr(self.node_of(handle).ino)).entry

    async def pread(self, handle: int, offset: int, length: int) -> bytes:
        return await self._fs.files.read(handle, offset, length)

    async def pwrite(self, handle: int, offset: int, data: bytes) -> None:
        assert await self._fs.files.write(handle, offset, data) == len(data)

    async def ftruncate(self, handle: int, size: int) -> None:
        node = self.node_of(handle)
        await self._fs.setattr(node.ino, Attributes(), size, handle)

    async def truncate(self, path: str, size: int) -> None:
        node = await self.walk(path)
        await self._fs.setattr(node.ino, Attributes(), size, None)

    async def setattr(self, path: str, attributes: Attributes) -> None:
        node = await self.walk(path)
        await self._fs.setattr(node.ino, attributes, None, None)

    async def fsync(self, handle: int) -> None:
        await self._fs.files.flush_handle(handle, sync=True)

    async def close(self, handle: int) -> None:
        """close(2) of the only descriptor: flush, whose error the program sees, then release."""
        try:
            await self._fs.files.flush_handle(handle)
        finally:
            await self.release(handle)

    async def release(self, handle: int) -> None:
        """What follows the last close(2), and all that it leaves to do."""
        content = self._fs.files.get(handle).content
        self._fs.files.release(handle)
        await self._fs.closer.wait_ended(content)

    async def write_file(self, path: str, data: bytes) -> None:
        handle = await self.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            if data:
                await self.pwrite(handle, 0, data)
        finally:
            await self.close(handle)

    async def read_file(self, path: str) -> bytes:
        handle = await self.open(path, os.O_RDONLY)
        try:
            return await self.pread(handle, 0, 1 << 40)
        finally:
            await self.close(handle)

    async def unlink(self, path: str) -> None:
        await self.walk(path)
        await self._fs.unlink(*await self.parent(path))

    async def mkdir(self, path: str) -> None:
        await self._must_be_free(path)
        self._count(await self._fs.mkdir(*await self.parent(path), 0o755, self.process))

    async def rmdir(self, path: str) -> None:
        await self._fs.rmdir(*await self.parent(path))

    async def _must_be_free(self, path: str) -> None:
        """Linux looks before it asks for something new."""
        if await self.exists(path):
            raise AlreadyExists(path)

    async def symlink(self, path: str, target: bytes) -> None:
        await self._must_be_free(path)
        self._count(await self._fs.symlink(*await self.parent(path), target, self.process))

    async def rename(self, path: str, target: str, *, replace: bool = True) -> None:
        await self.walk(path)
        await self.exists(target)
        old, new = await self.parent(path), await self.parent(target)
        await self._fs.rename(*old, *new, replace=replace, process=self.process)

    async def listdir(self, path: str) -> dict[bytes, Entry]:
        """opendir, readdirplus in small replies, closedir."""
        node = await self.walk(path)
        handle = self._fs.directories.open(node)
        found: dict[bytes, Entry] = {}
        try:
            start, last = 0, -1
            while start != last:
                last = start
                start = await self.readdir(handle, start, found)
        finally:
            self._fs.directories.close(handle)
        return found

    async def readdir(
        self, handle: int, start: int, found: dict[bytes, Entry], room: int = 5
    ) -> int:
        """One getdents(2) with room for so many entries; returns where the next one starts."""
        for following, name, node, counts in await self._fs.directories.read(handle, start):
            if not room:
                self._fs.tree.drop_if_unused(node)
                break
            room -= 1
            start = following
            if counts:
                assert name not in found, f"{name!r} is listed twice"
                found[name] = self._count(node).entry
        return start
