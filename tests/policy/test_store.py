"""The cache on disk: its lock, its bound, and what survives a restart or a kill -9."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from hpcfs.cache.directory import CacheUnusable
from hpcfs.cache.file import CacheFile, checksum
from hpcfs.cache.index import Record
from hpcfs.cache.store import Store
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import CacheFull
from hpcfs.protocol import messages as m
from tests.filesystem.world import RW, World, live, world
from tests.support.memory_remote import MemoryRemote

MANY = 10**9
BLOCK = b"b" * BLOCK_BYTES


def run(directory: Path, story: Callable[[Store], Awaitable[None]], max_bytes: int = MANY) -> None:
    async def main() -> None:
        store = Store.open(directory, max_bytes, "a test")
        await story(store)
        await store.close()

    trio.run(main)


async def fill(store: Store, key: bytes, blocks: int = 1, version: bytes = b"v") -> CacheFile:
    """A file of the cache, whole and clean; still in use."""
    file = await store.acquire("origin", key, version, blocks * BLOCK_BYTES)
    for block in range(blocks):
        file.write(block * BLOCK_BYTES, BLOCK)
        file.blocks.put(block, checksum(BLOCK))
    return file


def data_files(directory: Path) -> set[str]:
    return {path.name for path in (directory / "data").glob("*/*")}


# --- the directory ------------------------------------------------------------------------------


def test_a_cache_in_use_says_who_has_it(tmp_path: Path) -> None:
    first = Store.open(tmp_path, MANY, "the mount at /m (pid 7)")
    with pytest.raises(CacheUnusable, match=r"in use by the mount at /m \(pid 7\)"):
        Store.open(tmp_path, MANY, "another")
    trio.run(first.close)
    trio.run(Store.open(tmp_path, MANY, "another").close)


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheUnusable, match="can't be used: Not a directory"):
        Store.open(tmp_path / "file" / "cache", MANY, "a test")


# --- from mount to mount ------------------------------------------------------------------------


def test_what_was_cached_is_there_after_a_restart_but_not_trusted(tmp_path: Path) -> None:
    async def first(store: Store) -> None:
        store.release(await fill(store, b"k", 2))

    async def second(store: Store) -> None:
        assert store.used_bytes == 2 * BLOCK_BYTES
        file = await store.acquire("origin", b"k", b"v", 2 * BLOCK_BYTES)
        assert list(file.blocks.present()) == [0, 1]
        assert not file.blocks.is_trusted(0)
        assert file.compute_checksum(1) == file.blocks.checksum(1)
        assert store.used_bytes == 2 * BLOCK_BYTES
        store.release(file)

    run(tmp_path, first)
    run(tmp_path, second)


@pytest.mark.parametrize(("version", "blocks"), [(b"other", 1), (b"v", 2)])
def test_another_version_or_size_starts_empty_and_replaces(
    tmp_path: Path, version: bytes, blocks: int
) -> None:
    async def first(store: Store) -> None:
        store.release(await fill(store, b"k"))

    async def second(store: Store) -> None:
        file = await store.acquire("origin", b"k", version, blocks * BLOCK_BYTES)
        assert list(file.blocks.present()) == []
        store.release(file)
        await store.save()
        assert data_files(tmp_path) == {file.name}

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_row_without_its_file_starts_empty(tmp_path: Path) -> None:
    async def first(store: Store) -> None:
        store.release(await fill(store, b"k"))

    async def second(store: Store) -> None:
        file = await store.acquire("origin", b"k", b"v", BLOCK_BYTES)
        assert list(file.blocks.present()) == []
        store.release(file)

    run(tmp_path, first)
    shutil.rmtree(tmp_path / "data")
    run(tmp_path, second)


def test_a_kill_loses_only_what_the_index_was_not_told(tmp_path: Path) -> None:
    async def first(store: Store) -> None:
        saved = await fill(store, b"saved")
        await store.save()
        unsaved = await fill(store, b"unsaved")
        shutil.copytree(
            tmp_path / "live", tmp_path / "crash", ignore=shutil.ignore_patterns("*-shm")
        )
        store.release(saved)
        store.release(unsaved)

    async def second(store: Store) -> None:
        assert len(data_files(tmp_path / "crash")) == 2
        await store.remove_strays()
        assert len(data_files(tmp_path / "crash")) == 1
        file = await store.acquire("origin", b"saved", b"v", BLOCK_BYTES)
        assert file.blocks.is_present(0)
        assert file.read(0, BLOCK_BYTES) == BLOCK
        store.release(file)

    (tmp_path / "live").mkdir()
    run(tmp_path / "live", first)
    run(tmp_path / "crash", second)


def test_strays_go_but_not_what_is_in_use_or_just_being_saved(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        in_use = store.create("origin", b"k", b"v", 0)
        in_use.users = 1
        stray = tmp_path / "data" / "st" / "stray"
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.save)
            nursery.start_soon(store.remove_strays)
        assert data_files(tmp_path) == {in_use.name}
        store.release(in_use)

    run(tmp_path, story)


def test_a_save_that_fails_forgets_nothing(tmp_path: Path) -> None:
    async def first(store: Store) -> None:
        file = await fill(store, b"k")
        store.release(file)
        working = store._index.save
        attempts = []

        def full(*_: object) -> list[str]:
            attempts.append(1)
            raise sqlite3.OperationalError("database or disk is full")

        store._index.save = full  # type: ignore[assignment,method-assign]
        with pytest.raises(sqlite3.OperationalError):
            await store.save()
        store._index.save = working  # type: ignore[method-assign]
        assert attempts
        again = await store.acquire("origin", b"k", b"v", BLOCK_BYTES)
        assert again is file
        store.release(again)

    async def second(store: Store) -> None:
        file = await store.acquire("origin", b"k", b"v", BLOCK_BYTES)
        assert file.blocks.is_present(0)
        store.release(file)

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_file_has_one_user_at_a_time(tmp_path: Path) -> None:
    """Two namespaces that show one folder: what one fetches must not meet what the other writes."""

    async def story(store: Store) -> None:
        one = await store.acquire("origin", b"k", b"v", BLOCK_BYTES)
        two = await store.acquire("origin", b"k", b"v", BLOCK_BYTES)
        assert one.path != two.path
        two.write(0, BLOCK)
        two.blocks.put(0, checksum(BLOCK))
        store.release(two)
        await store.save()
        assert data_files(tmp_path) == {one.name}
        assert await store.acquire("origin", b"k", b"v", 2 * BLOCK_BYTES) is not one
        store.release(one)

    run(tmp_path, story)


def test_what_is_being_uploaded_gets_no_checksum(tmp_path: Path) -> None:
    """The index would give it to the version that the remote still has."""

    async def story(store: Store) -> None:
        file = await store.acquire("origin", b"k", b"v", BLOCK_BYTES)
        file.write(0, BLOCK)
        file.mark_written(0, BLOCK_BYTES)
        file.dirty.remove(0, BLOCK_BYTES)
        file.pins = 1
        await store.save()
        assert file.blocks.unsummed() == [0]
        file.pins = 0
        await store.save()
        assert file.blocks.checksum(0) == checksum(BLOCK)
        store.release(file)

    run(tmp_path, story)


# --- names --------------------------------------------------------------------------------------


def test_the_cache_follows_renames_and_removals(tmp_path: Path) -> None:
    async def first(store: Store) -> None:
        for key in (b"d/a", b"d/b", b"t/b", b"gone"):
            store.release(await fill(store, key))
        await store.save()
        open_one = await fill(store, b"d/open")
        await store.move("origin", b"d", b"t")
        await store.remove("origin", b"gone")
        assert open_one.key == b"t/open"
        store.release(open_one)

    async def second(store: Store) -> None:
        for key, present in ((b"t/a", 1), (b"t/b", 1), (b"t/open", 1), (b"d/a", 0), (b"gone", 0)):
            file = await store.acquire("origin", key, b"v", BLOCK_BYTES)
            assert file.blocks.count == present, key
            store.release(file)

    run(tmp_path, first)
    assert len(data_files(tmp_path)) == 3
    run(tmp_path, second)


# --- the bound ----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        files = {}
        for key in (b"1", b"2", b"3"):
            files[key] = await fill(store, key)
            store.release(files[key])
        files[b"1"].last_used += 100
        await store.save()
        assert await store.make_room(1) == BLOCK_BYTES
        assert data_files(tmp_path) == {files[b"1"].name, files[b"3"].name}
        assert store.used_bytes == 2 * BLOCK_BYTES

    run(tmp_path, story)


def test_dirty_and_pinned_blocks_are_never_evicted(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        file, pinned = await fill(store, b"k", 3), await fill(store, b"pinned")
        pinned.pins = 1
        file.write(BLOCK_BYTES + 5, b"dirty")
        file.mark_written(BLOCK_BYTES + 5, BLOCK_BYTES + 10)
        assert await store.make_room(MANY) == 2 * BLOCK_BYTES
        assert list(file.blocks.present()) == [1]
        assert file.read(BLOCK_BYTES + 5, 5) == b"dirty"
        assert file.read(0, 1) == b"\0"
        assert os.fstat(file.fd).st_blocks * 512 < 2 * BLOCK_BYTES
        assert pinned.blocks.count == 1
        store.release(file)
        store.release(pinned)

    run(tmp_path, story)


def test_eviction_outlives_a_failing_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs where the disk is full, and its end would end the mount."""

    async def story(store: Store) -> None:
        working = store._index.oldest

        def broken(*_: object) -> list[Record]:
            store._index.oldest = working  # type: ignore[method-assign]
            raise sqlite3.OperationalError("disk I/O error")

        store._index.oldest = broken  # type: ignore[assignment,method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.evict_forever)
            file = await fill(store, b"k", 4)
            store.note_added(4 * BLOCK_BYTES)
            with trio.fail_after(10):
                while "disk I/O error" not in caplog.text:
                    await trio.lowlevel.checkpoint()
                store.note_added(4 * BLOCK_BYTES)
                while store.used_bytes > BLOCK_BYTES:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        store.release(file)

    run(tmp_path, story, max_bytes=BLOCK_BYTES)


@live(max_blocks=4)
async def test_written_bytes_count_for_the_bound(w: World) -> None:
    for number in range(12):
        await w.kernel.write_file(f"ns/{number}", BLOCK)
    await w.store.save()
    while w.store.used_bytes > w.store.max_bytes:
        await trio.lowlevel.checkpoint()
    assert await w.kernel.read_file("ns/0") == BLOCK


# --- damage -------------------------------------------------------------------------------------


def _flip_a_byte(directory: Path, offset: int) -> None:
    (path,) = (directory / "data").glob("*/*")
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


async def _read_ok(w: World) -> None:
    fetched = w.cues.count(m.Fetch)
    assert await w.kernel.read_file("ns/f") == BLOCK * 2
    assert w.cues.count(m.Fetch) == fetched + 1, "only the damaged block is fetched anew"


async def _append_ok(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW)
    await w.kernel.pwrite(handle, 2 * BLOCK_BYTES, b"more")
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == BLOCK * 2 + b"more"


async def _cut_ok(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW)
    await w.kernel.ftruncate(handle, BLOCK_BYTES + 100)
    assert await w.kernel.pread(handle, 0, MANY) == BLOCK + BLOCK[:100]
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == BLOCK + BLOCK[:100]


async def _write_beside_ok(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW)
    await w.kernel.pwrite(handle, BLOCK_BYTES + 100, b"x")
    await w.kernel.close(handle)
    expected = BLOCK + BLOCK[:100] + b"x" + BLOCK[101:]
    assert await w.kernel.read_file("ns/f") == w.remote.get(b"f") == expected


@pytest.mark.parametrize("kind", ["sftp", "s3"])
@pytest.mark.parametrize("story", [_read_ok, _append_ok, _cut_ok, _write_beside_ok])
def test_a_block_damaged_between_mounts_is_never_served_nor_uploaded(
    tmp_path: Path, kind: str, story: Callable[[World], Awaitable[None]]
) -> None:
    remote = MemoryRemote(kind)
    remote.put(b"f", BLOCK * 2)

    async def mount(act: Callable[[World], Awaitable[None]]) -> None:
        async with world(tmp_path, {"ns": remote}) as w:
            await act(w)

    async def read(w: World) -> None:
        assert await w.kernel.read_file("ns/f") == BLOCK * 2

    trio.run(mount, read)
    _flip_a_byte(tmp_path, BLOCK_BYTES + 7)
    trio.run(mount, story)


# --- a full disk --------------------------------------------------------------------------------


def _full_disk(file: CacheFile, after: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """This file takes `after` bytes more; returns the errors given."""
    left, refused = [after], list[int]()
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if fd != file.fd:
            return real(fd, data, offset)
        if not left[0]:
            refused.append(offset)
            raise OSError(errno.ENOSPC, "full")
        count = min(left[0], len(data))
        left[0] -= count
        return real(fd, data[:count], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return refused


@live()
async def test_a_write_that_the_full_disk_cuts_short_changes_nothing(w: World) -> None:
    w.remote.put(b"f", BLOCK * 2)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 10, b"dirty")
    content = w.kernel.node_of(handle).content
    assert content
    before = BLOCK[:10] + b"dirty" + BLOCK[15:] + BLOCK
    with pytest.MonkeyPatch.context() as patch:
        refused = _full_disk(content.file, BLOCK_BYTES + 50, patch)
        with pytest.raises(CacheFull):
            await w.kernel.pwrite(handle, BLOCK_BYTES, b"x" * 3 * BLOCK_BYTES)
        assert refused
    assert (await w.kernel.fstat(handle)).size == 2 * BLOCK_BYTES
    assert await w.kernel.pread(handle, 0, MANY) == before
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == before


@live()
async def test_a_full_disk_evicts_and_tries_once_more(w: World) -> None:
    w.remote.put(b"old", BLOCK * 4)
    assert await w.kernel.read_file("ns/old") == BLOCK * 4
    w.remote.put(b"f", BLOCK)
    nth = 2 if w.remote.is_sftp else 1  # before that the server is to hold the file
    w.cues.fail(m.Fetch, CacheFull("the local disk with the cache is full"), nth=nth)
    assert await w.kernel.read_file("ns/f") == BLOCK
    w.remote.put(b"g", BLOCK)
    full = CacheFull("the local disk with the cache is full")
    w.cues.fail(m.Fetch, full, nth=nth, times=9)
    with pytest.raises(CacheFull):
        await w.kernel.read_file("ns/g")


@live()
async def test_a_journal_that_cannot_be_written_refuses_writes_but_uploads(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"journaled")

    async def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    working = w.journal.note
    w.journal.note = full  # type: ignore[assignment]
    await w.kernel.pwrite(handle, 9, b" before")
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == b"journaled before"
    other = await w.kernel.open("ns/f")
    with pytest.raises(CacheFull):
        await w.kernel.pwrite(other, 0, b"x")
    w.journal.note = working  # type: ignore[method-assign]
    await w.kernel.pwrite(other, 0, b"J")
    await w.kernel.close(other)
    assert w.remote.get(b"f") == b"Journaled before"
