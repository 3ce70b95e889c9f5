"""Random operations, compared with a dict of bytes after each: what reading returns, what the
remote has once files are closed, and that nothing is lost with a cache of a few blocks.

CI runs a fixed selection. HPCFS_MODEL_EXAMPLES=20000 makes a long run with new random ones.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from hpcfs.model.entries import BLOCK_BYTES, Attributes
from hpcfs.model.errors import FilesystemError, NoSpace, RemoteError, Stale
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import WriteMode
from tests.filesystem.world import KINDS, World, until, world

EXAMPLES = int(os.environ.get("HPCFS_MODEL_EXAMPLES", "0"))
CACHE_BLOCKS = 3
MEMORY_BLOCKS = 64
"""More than one read asks for: as it is for the kernel's."""
STEPS = 40
NAMES = ["ns/a", "ns/b", "ns/d/a", "ns/e/a", "ns/d", "ns/e"]

profile = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a failure prints its steps; shrinking would take minutes
)


@dataclass(eq=False)
class Ref:
    """What a file must contain. `lost` files were replaced on the remote by others."""

    content: bytearray = field(default_factory=bytearray)
    seen: bool = False
    """Bytes of it were read since it was opened: until then an open file may still follow the
    remote to another version."""
    lost: bool = False
    removed: bool = False
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


positions = st.builds(
    lambda block, delta: max(0, block * BLOCK_BYTES + delta),
    st.integers(0, 4),
    st.sampled_from([-5000, -1, 0, 1, 77]),
)
lengths = st.sampled_from([1, 10, 5000, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 3])


class Walk:
    """One random walk. `names` are files by path; None is a directory, bytes a link's target."""

    def __init__(self, live: World, data: st.DataObject) -> None:
        self.w = live
        self.k = live.kernel
        self.draw = data.draw
        self.names: dict[str, Ref | bytes | None] = {}
        self.handles: dict[int, Ref] = {}
        self.reading: set[int] = set()
        self.appending: set[int] = set()
        self._fill = 0

    # --- tools ----------------------------------------------------------------------------------

    def bytes(self, length: int) -> bytes:
        self._fill = self._fill % 251 + 1
        return bytes([self._fill]) * length

    def files(self) -> list[str]:
        return [path for path, ref in self.names.items() if isinstance(ref, Ref)]

    def ref(self, path: str) -> Ref:
        ref = self.names[path]
        assert isinstance(ref, Ref)
        return ref

    def is_open(self, ref: Ref) -> bool:
        return any(other is ref for other in self.handles.values())

    def folders_exist(self, path: str) -> bool:
        folder = path.rpartition("/")[0]
        return folder == "ns" or self.names.get(folder, b"") is None

    def pick_handle(self) -> int | None:
        return self.draw(st.sampled_from(sorted(self.handles))) if self.handles else None

    def pick_file(self) -> str | None:
        return self.draw(st.sampled_from(sorted(self.files()))) if self.files() else None

    async def refused(self, act: Awaitable[object]) -> None:
        with pytest.raises((FilesystemError, RemoteError)):
            await act

    # --- operations on open files -----------------------------------------------------------------

    async def open(self) -> None:
        path = self.draw(st.sampled_from(NAMES))
        flags = self.draw(st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND]))
        flags |= self.draw(st.sampled_from([0, os.O_CREAT, os.O_CREAT, os.O_TRUNC]))
        if len(self.handles) >= 4:
            return None
        there = self.names.get(path, "missing")
        if not isinstance(there, Ref) and not (there == "missing" and flags & os.O_CREAT):
            return await self.refused(self.k.open(path, flags))
        if not self.folders_exist(path):
            return await self.refused(self.k.open(path, flags))
        handle = await self.k.open(path, flags)
        if not isinstance(there, Ref):
            there = self.names[path] = Ref()
        if flags & os.O_TRUNC:
            there.content.clear()
        there.seen = there.seen and self.is_open(there)
        self.handles[handle] = there
        if flags & os.O_ACCMODE == os.O_RDONLY:
            self.reading.add(handle)
        if flags & os.O_APPEND:
            self.appending.add(handle)
        return None

    async def read(self) -> None:
        if (handle := self.pick_handle()) is None:
            return
        offset, length = self.draw(positions), self.draw(lengths)
        ref = self.handles[handle]
        try:
            found = await self.k.pread(handle, offset, length)
        except Stale:
            assert ref.lost or ref.removed, "stale, though nobody else changed it"
            return
        if ref.seen or not ref.lost:
            assert found == ref.content[offset : offset + length]
        ref.seen = ref.seen or (bool(found) and not ref.lost)

    async def write(self) -> None:
        if (handle := self.pick_handle()) is None:
            return None
        ref = self.handles[handle]
        offset, data = self.draw(positions), self.bytes(self.draw(lengths))
        if self.draw(st.booleans()):
            offset = self.k.node_of(handle).entry.size
            if not ref.lost:
                assert offset == len(ref.content)
        if handle in self.reading:
            return await self.refused(self.k.pwrite(handle, offset, data))
        if ref.lost:
            return None
        try:
            await self.k.pwrite(handle, offset, data)
        except Stale:
            assert ref.removed, "stale, though nobody else changed it"
            return None
        if handle in self.appending:  # whatever offset the kernel says
            offset = len(ref.content)
        if offset > len(ref.content):
            ref.content.extend(bytes(offset - len(ref.content)))
        ref.content[offset : offset + len(data)] = data
        return None

    async def truncate(self) -> None:
        size = self.draw(positions)
        handle = self.pick_handle()
        if handle is not None and self.draw(st.booleans()):
            ref = self.handles[handle]
            if ref.lost or handle in self.reading:
                return
            await self.k.ftruncate(handle, size)
        elif path := self.pick_file():
            ref = self.ref(path)
            await self.k.truncate(path, size)
        else:
            return
        ref.content.extend(bytes(max(0, size - len(ref.content))))
        del ref.content[size:]

    async def flush(self) -> None:
        if (handle := self.pick_handle()) is not None:
            await self.k.fsync(handle)

    async def failing_flush(self) -> None:
        """The remote refuses: the error is seen, and the bytes stay."""
        if (handle := self.pick_handle()) is None:
            return
        dirty = self.k.node_of(handle).content
        is_dirty = dirty is not None and dirty.is_dirty()
        stage = self.draw(st.sampled_from(["before", "after"]))
        self.w.cues.fail(m.Upload, NoSpace("the quota is used up"), stage=stage)
        if is_dirty:
            with pytest.raises(NoSpace):
                await self.k.fsync(handle)
        self.w.cues.clear()
        if is_dirty and stage == "after":  # the remote took it, though it said otherwise
            await self.k.fsync(handle)

    async def close(self) -> None:
        if (handle := self.pick_handle()) is None:
            return
        ref = self.handles.pop(handle)
        self.reading.discard(handle)
        self.appending.discard(handle)
        if self.draw(st.booleans()) and not ref.lost:
            await self.k.close(handle)
        else:
            await self.w.kernel.release(handle)

    # --- names ----------------------------------------------------------------------------------

    async def unlink(self) -> None:
        path = self.draw(st.sampled_from(NAMES))
        there = self.names.get(path, "missing")
        if there is None or there == "missing":
            return await self.refused(self.k.unlink(path))
        await self.k.unlink(path)
        if isinstance(there, Ref):
            there.removed = True
        del self.names[path]
        return None

    async def mkdir(self) -> None:
        path = self.draw(st.sampled_from(["ns/d", "ns/e"]))
        if path in self.names:
            return await self.refused(self.k.mkdir(path))
        await self.k.mkdir(path)
        self.names[path] = None
        return None

    async def rmdir(self) -> None:
        path = self.draw(st.sampled_from(["ns/d", "ns/e"]))
        below = any(name.startswith(path + "/") for name in self.names)
        if self.names.get(path, b"") is not None or below:
            return await self.refused(self.k.rmdir(path))
        await self.k.rmdir(path)
        del self.names[path]
        return None

    async def symlink(self) -> None:
        path = self.draw(st.sampled_from(NAMES))
        if path in self.names or not self.folders_exist(path):
            return await self.refused(self.k.symlink(path, b"target"))
        await self.k.symlink(path, b"target")
        self.names[path] = b"target"
        return None

    async def rename(self) -> None:
        """Of files; directories move by `rename_directory`."""
        path = self.pick_file()
        target = self.draw(st.sampled_from(NAMES))
        if path is None or path == target:
            return None
        there = self.names.get(target, "missing")
        if there is None or not self.folders_exist(target):
            return await self.refused(self.k.rename(path, target))
        await self.k.rename(path, target)
        if isinstance(there, Ref):
            there.removed = True
        self.names[target] = self.names.pop(path)
        return None

    async def rename_directory(self) -> None:
        if self.names.get("ns/d", b"") is not None or "ns/e" in self.names:
            return
        await self.k.rename("ns/d", "ns/e")
        await self.k.rename("ns/e", "ns/d")

    async def set_attributes(self) -> None:
        if (path := self.pick_file()) is None:
            return
        seconds = self.draw(st.integers(1, 2_000_000_000))
        mode = self.draw(st.sampled_from([0o600, 0o755]))
        await self.k.setattr(path, Attributes(mode=mode, mtime_ns=seconds * 10**9))
        entry = await self.k.stat(path)
        assert (stat.S_IMODE(entry.mode), entry.mtime_ns) == (mode, seconds * 10**9)

    async def set_xattr(self) -> None:
        if (path := self.pick_file()) is None:
            return None
        name, value = b"user." + self.draw(st.sampled_from([b"a", b"b"])), self.bytes(3)
        node, xattrs = await self.k.walk(path), self.ref(path).xattrs
        if not self.w.fs.xattrs.any_keeps:
            return await self.refused(self.w.fs.xattrs.set(node.ino, name, value))
        if name in xattrs and self.draw(st.booleans()):
            await self.w.fs.xattrs.remove(node.ino, name)
            del xattrs[name]
        else:
            await self.w.fs.xattrs.set(node.ino, name, value)
            xattrs[name] = value
        return None

    # --- others, time, the cache ------------------------------------------------------------------

    async def replace_on_remote(self) -> None:
        """Another program replaces or makes a file."""
        path = self.draw(st.sampled_from(NAMES[:4]))
        there = self.names.get(path)
        if (there is None and path in self.names) or not self.folders_exist(path):
            return
        if self.is_behind(path) or any(self.is_behind(name) for name in self.names):
            return
        if isinstance(there, Ref):
            if self.is_open(there) and self.is_dirty(there):
                return
            there.lost = True
        content = self.bytes(self.draw(lengths))
        self.w.remote.put(path.removeprefix("ns/").encode(), content)
        self.names[path] = Ref(bytearray(content))
        self.w.clock.expire_attributes()

    async def append_on_remote(self) -> None:
        path = self.pick_file()
        if path is None or self.is_open(self.ref(path)) or self.is_behind(path):
            return
        more = self.bytes(self.draw(lengths))
        self.w.remote.append(path.removeprefix("ns/").encode(), more)
        self.ref(path).content.extend(more)
        self.w.clock.expire_attributes()

    def is_dirty(self, ref: Ref) -> bool:
        contents = [self.k.node_of(h).content for h, other in self.handles.items() if other is ref]
        return any(content is None or content.is_dirty() for content in contents)

    def is_behind(self, path: str) -> bool:
        """In `back` mode: whether the file still waits to be uploaded."""
        waiting = [content.place.path for content in self.w.queue.schedule]
        return path.removeprefix("ns/").encode() in waiting

    async def sync(self) -> None:
        """`hpcfs sync`: the remote has everything that was closed."""
        await self.w.queue.wait_for(self.w.queue.schedule)
        assert not self.w.queue.schedule

    async def wait(self) -> None:
        self.w.clock.expire_attributes()

    async def save(self) -> None:
        await self.w.store.save()

    async def evict(self) -> None:
        await self.w.store.make_room(10**9)

    async def disk_changes(self) -> None:
        """It is slow from now on, or well again."""
        self.w.set_slow_disk(self.draw(st.booleans()))

    async def list(self) -> None:
        await self._list("ns")

    async def walk(self) -> None:
        """As find does it, perhaps not to the end: what comes next was listed ahead then, and what
        is changed before the walk goes on must be seen nevertheless."""
        await self._list("ns")
        folders = [path for path, ref in self.names.items() if ref is None]
        for path in folders[: self.draw(st.integers(0, 2))]:
            await self._list(path)
        for _ in range(self.draw(st.sampled_from([0, 20]))):
            await trio.lowlevel.checkpoint()

    async def walk_on(self) -> None:
        folders = sorted(path for path, ref in self.names.items() if ref is None)
        if folders:
            await self._list(self.draw(st.sampled_from(folders)))

    async def _list(self, path: str) -> None:
        found = await self.k.listdir(path)
        inside = [name for name in self.names if name.rpartition("/")[0] == path]
        assert found.keys() == {name.rpartition("/")[2].encode() for name in inside}
        for name in inside:
            ref, entry = self.names[name], found[name.rpartition("/")[2].encode()]
            if isinstance(ref, Ref) and not self.is_open(ref):
                assert entry.size == len(ref.content), name

    async def ask_for_names(self) -> None:
        """As compilers and git do: many, most of them missing, one after the other."""
        for path in [*NAMES, "ns/c", "ns/f", "ns/d/c"]:
            if self.folders_exist(path):
                assert await self.k.exists(path) == (path in self.names), path

    async def forget(self) -> None:
        """The kernel forgets what no program has open."""
        if not self.handles:
            self.k.forget_all()
            if not self.w.queue.schedule:
                assert len(self.w.fs.tree) == 2, "nodes that the kernel forgot are still known"

    # --- checks -----------------------------------------------------------------------------------

    async def check(self) -> None:
        for path, ref in self.names.items():
            if isinstance(ref, Ref):
                entry = await self.k.stat(path)
                assert entry.size == len(ref.content), path
                assert dict(entry.xattrs) == ref.xattrs, path
                if not self.is_open(ref) and not self.is_behind(path):
                    there = self.w.remote.paths()[path.removeprefix("ns/").encode()]
                    assert there.content == ref.content
                    assert dict(there.xattrs) == ref.xattrs
        assert not self.w.journal.stranded
        assert not self.w.closer.notices
        await self.check_bound()

    async def check_bound(self) -> None:
        """What is not dirty is evicted soon; of what was removed while open, a little stays."""
        store = self.w.store
        files = [file for file in store.registry.files.values() if not file.in_memory]
        dirty = sum(file.dirty.total + BLOCK_BYTES * file.pins for file in files)
        dirty += sum(file.cached_bytes for file in files if not file.indexed and file.users)
        step = store.max_bytes // 20
        slack = len(self.names) * 2 * BLOCK_BYTES if dirty else 0
        limit = store.max_bytes + dirty + slack + step
        await until(lambda: store.used_bytes <= limit)

    async def finish(self) -> None:
        for handle in list(self.handles):
            await self.w.kernel.release(handle)
        self.handles.clear()
        await self.sync()
        await self.check()
        for path in self.files():
            assert await self.k.read_file(path) == self.ref(path).content
        assert set(self.names) == {"ns/" + path.decode() for path in self.w.remote.paths()}
        self.k.forget_all()
        await until(lambda: len(self.w.fs.tree) == 2)
        await self.w.store.save()
        await self.check_bound()


OPERATIONS: list[Callable[[Walk], Awaitable[None]]] = [
    *[Walk.open, Walk.read, Walk.write] * 4,
    *[Walk.truncate, Walk.flush, Walk.close] * 2,
    Walk.sync,
    *[Walk.failing_flush, Walk.unlink, Walk.mkdir, Walk.rmdir, Walk.symlink, Walk.rename],
    *[
        Walk.rename_directory,
        Walk.set_attributes,
        Walk.set_xattr,
        Walk.replace_on_remote,
        Walk.append_on_remote,
    ],
    *[Walk.wait, Walk.disk_changes, Walk.save, Walk.evict, Walk.list, Walk.forget],
    *[Walk.walk, Walk.walk_on, Walk.ask_for_names] * 2,
]


async def walk(kind: str, write: WriteMode, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        size = CACHE_BLOCKS * BLOCK_BYTES
        async with world(Path(directory), kind, max_bytes=size, write=write) as live:
            live.store.memory.max_bytes = MEMORY_BLOCKS * BLOCK_BYTES
            one = Walk(live, data)
            for _ in range(STEPS):
                operation = data.draw(st.sampled_from(OPERATIONS), label="operation")
                with trio.fail_after(30):
                    await operation(one)
                    await one.check()
            await one.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", ["through", "back"])
@profile
@given(data=st.data())
def test_random_operations_do_what_a_dict_of_bytes_does(
    write: WriteMode, kind: str, data: st.DataObject
) -> None:
    trio.run(walk, kind, write, data)
