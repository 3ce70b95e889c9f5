"""Cache files lose their names while a mount uses them: what waits to be uploaded is written to the
disk again, and no upload sees a part of it.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from hpcfs.cache.renewal import renew_if_removed
from hpcfs.content.content import Content
from hpcfs.content.record import Unconfirmed
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import CacheFileGone, CacheFull, NoSpace, NotConnected
from hpcfs.protocol.messages import Fetch, Upload
from hpcfs.site.namespace import WriteMode
from hpcfs.writeback.recovery import Recovery
from tests.filesystem.world import RW, World, world
from tests.support.memory_remote import MemoryRemote

MANY = 10_000
LARGE = random.Random(1).randbytes(3 * 1024 * 1024 + BLOCK_BYTES)
SMALL = {b"f%d" % n: random.Random(n).randbytes(BLOCK_BYTES + n) for n in range(6)}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(cache: Path, story: Callable[[World], Awaitable[None]], mode: WriteMode = "back") -> None:
    remote = MemoryRemote("sftp")
    remote.put(b"clean", b"clean" * BLOCK_BYTES)

    async def main() -> None:
        with trio.fail_after(60):
            async with world(cache, {"ns": remote}, write=mode) as w:
                w.cues.fail(Upload, NotConnected("the link is down"), times=MANY)
                await story(w)

    trio.run(main)


async def write(w: World, files: dict[bytes, bytes]) -> None:
    for path, data in files.items():
        await w.kernel.write_file(f"ns/{path.decode()}", data)


async def all_arrives(w: World, files: dict[bytes, bytes]) -> None:
    w.cues.clear()
    await w.queue.wait_for(w.closer.dirty())
    assert {path: w.remote.get(path) for path in files} == files
    assert w.journal.rows == []


def on_disk(content: Content) -> bytes:
    return Path(content.file.path).read_bytes()


def is_named(content: Content) -> bool:
    return Path(content.file.path).exists()


def names(cache: Path) -> set[str]:
    return {place.name for place in (cache / "data").glob("*/*")}


def remove(w: World, name: str) -> None:
    Path(w.store.registry.path(name)).unlink()


class CopyingDisk:
    """Stands for os.pwrite: `act` is called for each write in a thread, which copies make, with its
    number; others are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes = 0
        self.act: Callable[[int], None] = lambda number: None
        self.write: Callable[[int, bytes | memoryview, int], int] = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        is_lock = len(data) < BLOCK_BYTES // 2
        if is_lock or threading.current_thread() is threading.main_thread():
            return self.write(fd, data, offset)
        self.writes += 1
        self.act(self.writes)
        return self.write(fd, data, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> CopyingDisk:
    return CopyingDisk(monkeypatch)


def test_an_upload_finds_no_file_until_all_of_it_is_copied(cache: Path, disk: CopyingDisk) -> None:
    async def story(w: World) -> None:
        await write(w, {b"large": LARGE})
        (content,) = w.closer.dirty()
        w.cues.clear()

        async def upload() -> None:
            with pytest.raises(CacheFileGone):
                await w.closer.flush(content)

        disk.act = lambda number: trio.from_thread.run(upload)
        shutil.rmtree(cache)
        await renew_if_removed(w.store)
        assert disk.writes == 4
        await all_arrives(w, {b"large": LARGE})

    run(cache, story)


@pytest.mark.parametrize("takes_a_part", [False, True])
def test_a_disk_that_gets_full_meanwhile(
    cache: Path, disk: CopyingDisk, takes_a_part: bool
) -> None:
    """What was not copied has no name, is told of, and is copied once there is room."""
    files = {**SMALL, b"large": LARGE}

    async def story(w: World) -> None:
        await write(w, files)
        contents = w.closer.dirty()
        shutil.rmtree(cache)
        usual = disk.write

        def part(fd: int, data: bytes | memoryview, offset: int) -> int:
            return usual(fd, memoryview(data)[:100], offset)

        def get_full(number: int) -> None:
            if takes_a_part and number == 3:
                disk.write = part
            elif number >= 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        disk.act = get_full
        await renew_if_removed(w.store)
        disk.write = usual
        assert any("No space left on device" in one for one in w.store.troubles.sentences)
        named = [content for content in contents if is_named(content)]
        assert len(named) == 2
        assert all(on_disk(content) == files[content.place.path] for content in named)
        assert names(cache) == {content.file.name for content in named}
        await w.store.remove_strays()
        await renew_if_removed(w.store)  # still full
        disk.act = lambda number: None
        await renew_if_removed(w.store)
        assert all(on_disk(content) == files[content.place.path] for content in contents)
        await all_arrives(w, files)

    run(cache, story)


def test_a_clean_file_that_can_not_be_made_keeps_no_other_from_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(w: World) -> None:
        handle = await w.kernel.open("ns/clean", os.O_RDONLY)
        assert await w.kernel.pread(handle, 0, 5) == b"clean"
        await write(w, SMALL)
        contents = w.closer.dirty()
        shutil.rmtree(cache)

        def full(file: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(w.store.memory, "to_disk", full)
            await renew_if_removed(w.store)
        assert all(on_disk(content) == SMALL[content.place.path] for content in contents)
        assert await w.kernel.pread(handle, 0, 5) == b"clean"
        await renew_if_removed(w.store)
        clean = w.kernel.node_of(handle).content
        assert clean is not None
        assert is_named(clean)
        assert await w.kernel.pread(handle, 0, 5) == b"clean"
        await w.kernel.close(handle)
        await all_arrives(w, SMALL)

    run(cache, story)


def test_what_is_written_during_the_copy_is_in_the_next_one(cache: Path, disk: CopyingDisk) -> None:
    changed = b"changed" + LARGE[7:]

    async def story(w: World) -> None:
        await write(w, {b"large": LARGE})
        handle = await w.kernel.open("ns/large", RW)
        await w.kernel.pwrite(handle, 0, LARGE[:7])
        (content,) = w.closer.dirty()

        def change(number: int) -> None:
            if number == 2:
                trio.from_thread.run(w.kernel.pwrite, handle, 0, b"changed")

        disk.act = change
        shutil.rmtree(cache)
        await renew_if_removed(w.store)
        assert names(cache) == set()
        await renew_if_removed(w.store)
        assert on_disk(content) == changed
        await w.journal.renew_if_removed()
        await w.kernel.close(handle)
        await all_arrives(w, {b"large": changed})

    run(cache, story)


def test_a_copy_is_no_stray(cache: Path, disk: CopyingDisk) -> None:
    """The index that is made anew knows nothing, and so has strays looked for."""

    async def story(w: World) -> None:
        await write(w, {b"large": LARGE})
        (content,) = w.closer.dirty()
        disk.act = lambda number: trio.from_thread.run(w.store.remove_strays)
        shutil.rmtree(cache)
        await renew_if_removed(w.store)
        assert on_disk(content) == LARGE
        await all_arrives(w, {b"large": LARGE})

    run(cache, story)


def test_a_lock_that_is_removed_alone_costs_nothing(cache: Path, disk: CopyingDisk) -> None:
    async def story(w: World) -> None:
        await write(w, SMALL)
        (cache / "lock").unlink()
        await renew_if_removed(w.store)
        assert disk.writes == 0
        assert all(on_disk(content) == SMALL[content.place.path] for content in w.closer.dirty())
        await all_arrives(w, SMALL)

    run(cache, story)


def test_a_single_file_that_is_removed_is_written_again(cache: Path) -> None:
    """By what cleans up old files, say: the upload finds out."""

    async def story(w: World) -> None:
        await write(w, SMALL)
        content = w.closer.dirty()[3]
        remove(w, content.file.name)
        w.cues.clear()
        with pytest.raises(CacheFileGone):
            await w.closer.flush(content)
        await renew_if_removed(w.store)
        assert on_disk(content) == SMALL[content.place.path]
        await all_arrives(w, SMALL)

    run(cache, story)


def test_what_may_have_been_stored_in_the_former_file_is_fetched_again(cache: Path) -> None:
    async def story(w: World) -> None:
        handle = await w.kernel.open("ns/clean")
        await w.kernel.pwrite(handle, 0, b"dirty")
        w.cues.clear()
        before = w.cues.count(Fetch)
        held = w.cues.hold(Fetch, stage="after")
        read = b""

        async def read_on() -> None:
            nonlocal read
            read = await w.kernel.pread(handle, BLOCK_BYTES, BLOCK_BYTES)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_on)
            await held.reached.wait()
            shutil.rmtree(cache)
            await renew_if_removed(w.store)
            held.go.set()
        assert read == (b"clean" * BLOCK_BYTES)[BLOCK_BYTES : 2 * BLOCK_BYTES]
        assert w.cues.count(Fetch) == before + 2
        await w.journal.renew_if_removed()
        await w.kernel.close(handle)

    run(cache, story)


# --- what was kept is taken back ------------------------------------------------------------------


async def keep_one(w: World) -> Unconfirmed:
    """A file of which the remote wanted nothing; its row."""
    w.cues.clear()
    handle = await w.kernel.open("ns/f0", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, SMALL[b"f0"])
    w.cues.fail(Upload, NoSpace("the quota is used up"), times=2)
    with pytest.raises(NoSpace):
        await w.kernel.close(handle)
    await w.closer.wait_ended()
    (row,) = w.journal.stranded
    return row


class BeforeRestore:
    """Does something in the moment in which the bytes are in data/, and nobody has them open."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Awaitable[object]]
    ) -> None:
        self._act = act
        self._restore = Recovery.restore
        monkeypatch.setattr(Recovery, "restore", lambda *args: self(*args))

    async def __call__(self, recovery: Recovery, rows: list[Unconfirmed]) -> int:
        await self._act()
        return await self._restore(recovery, rows)


def test_what_is_taken_back_is_no_stray(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(w: World) -> None:
        row = await keep_one(w)
        await w.store.save()
        BeforeRestore(monkeypatch, w.store.remove_strays)
        await w.pending.retry([row.name])
        await all_arrives(w, {b"f0": SMALL[b"f0"]})

    run(cache, story, "through")


def test_what_is_taken_back_is_not_deleted_as_what_was_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache closes the file that was kept, and deletes it, only after a while."""

    async def story(w: World) -> None:
        row = await keep_one(w)
        assert row.name in w.store.registry.files
        BeforeRestore(monkeypatch, w.store.save)
        await w.pending.retry([row.name])
        await all_arrives(w, {b"f0": SMALL[b"f0"]})

    run(cache, story, "through")


def test_what_can_not_be_taken_back_stays_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(w: World) -> None:
        row = await keep_one(w)

        async def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            BeforeRestore(patch, fail)
            with pytest.raises(CacheFull, match="Input/output error"):
                await w.pending.retry([row.name])
        assert w.kept_bytes() == [SMALL[b"f0"]]
        assert [one.state for one in w.pending.pending()] == ["kept"]
        await w.pending.retry([row.name])
        await all_arrives(w, {b"f0": SMALL[b"f0"]})

    run(cache, story, "through")


def test_bytes_that_are_gone_are_not_uploaded_as_zeros(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(w: World) -> None:
        row = await keep_one(w)

        async def lose() -> None:
            remove(w, row.name)

        BeforeRestore(monkeypatch, lose)
        with pytest.raises(CacheFull, match="No such file"):
            await w.pending.retry([row.name])
        assert any("neither uploaded nor kept" in one for one in w.store.troubles.sentences)
        assert names(cache) == set()
        assert w.remote.get(b"f0") == b""  # as it was created

    run(cache, story, "through")


def test_a_file_without_bytes_is_not_resumed(cache: Path) -> None:
    async def story(w: World) -> None:
        name = w.store.create("origin", b"k", b"v", 10).name
        del w.store.registry.files[name]
        remove(w, name)
        with pytest.raises(FileNotFoundError):
            await w.store.resume(name, "origin", b"k", b"v", 10, [(0, 10)])
        assert names(cache) == set()

    run(cache, story)
