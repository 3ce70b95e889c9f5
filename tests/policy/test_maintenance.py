"""Clearing, verifying and pinning: what goes, what stays, and what is found."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from hpcfs.cache import maintenance
from hpcfs.cache.file import CacheFile, checksum
from hpcfs.cache.index import Index, Record
from hpcfs.cache.maintenance import CachedPath
from hpcfs.cache.record_cache import CachedAnswer, RecordCache
from hpcfs.cache.store import Store
from hpcfs.control.control import ControlRequest
from hpcfs.daemon import cache_commands
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import SetupError

BLOCK = b"b" * BLOCK_BYTES


def run(directory: Path, story: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        store = Store.open(directory, 1 << 50, "a test")
        await story(store)
        await store.close()

    trio.run(main)


async def fill(store: Store, key: bytes, blocks: int = 2) -> CacheFile:
    file = await store.acquire("origin", key, b"v", blocks * BLOCK_BYTES)
    for block in range(blocks):
        file.write(block * BLOCK_BYTES, BLOCK)
        file.blocks.put(block, checksum(BLOCK))
    return file


async def idle(store: Store, *keys: bytes) -> None:
    for key in keys:
        store.release(await fill(store, key))
    await store.save()


async def cached(store: Store, key: bytes) -> int:
    file = await store.acquire("origin", key, b"v", 2 * BLOCK_BYTES)
    count = file.blocks.count
    store.release(file)
    return count


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"!")


async def ignore(done: int, total: int) -> None:
    assert done <= total


def test_clear_is_for_what_is_at_and_below_a_place(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await idle(store, b"d/1", b"d/e/2", b"d2", b"d.x")
        open_below, dirty = await fill(store, b"d/3"), await fill(store, b"d/4")
        dirty.mark_written(5, 6)
        files, freed = await maintenance.clear(store, [CachedPath("origin", b"d")], ignore)
        assert (files, freed) == (2, 7 * BLOCK_BYTES)
        assert [await cached(store, key) for key in (b"d/1", b"d/e/2", b"d2", b"d.x")] == [
            0,
            0,
            2,
            2,
        ]
        assert open_below.blocks.count == 0
        assert list(dirty.blocks.present()) == [0]
        await maintenance.clear(store, [CachedPath("another", b"")], ignore)
        assert await cached(store, b"d2") == 2
        await maintenance.clear(store, [CachedPath("origin", b"")], ignore)
        assert await cached(store, b"d2") == 0
        assert list(dirty.blocks.present()) == [0]
        dirty.dirty.remove(5, 6)
        store.release(open_below)
        store.release(dirty)

    run(tmp_path, story)


def test_clear_leaves_what_is_pinned_unless_asked(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await idle(store, b"d/1", b"2")
        await maintenance.pin(store, CachedPath("origin", b"d"))
        file = await fill(store, b"d/open")
        await maintenance.clear(store, None, ignore)
        assert (await cached(store, b"d/1"), await cached(store, b"2")) == (2, 0)
        assert file.blocks.count == 2
        store.release(file)
        await store.save()
        await maintenance.clear(store, None, ignore, pinned=True)
        assert await cached(store, b"d/1") == 0
        assert maintenance.pin_over(store, CachedPath("origin", b"d/1")) == b"d"
        assert await maintenance.unpin(store, CachedPath("origin", b"")) == 1
        assert maintenance.pin_over(store, CachedPath("origin", b"d/1")) is None

    run(tmp_path, story)


@pytest.mark.parametrize("is_open", [True, False])
def test_verify_drops_what_is_damaged(tmp_path: Path, is_open: bool) -> None:
    async def story(store: Store) -> None:
        await idle(store, b"fine", b"gone")
        file = await fill(store, b"bad", 2)
        await store.save()
        path = Path(file.path)
        if not is_open:
            store.release(file)
            await store.save()
        damage(path, BLOCK_BYTES + 7)
        for other in (tmp_path / "data").glob("*/*"):
            if store.registry.index.find("origin", b"gone").name == other.name:  # type: ignore[union-attr]
                other.unlink()
        found = await maintenance.verify(store, ignore)
        assert (found.files, found.damaged_files) == (3, 2)
        assert found.damaged_bytes == 3 * BLOCK_BYTES
        assert store.used_bytes == 3 * BLOCK_BYTES
        if is_open:
            assert list(file.blocks.present()) == [0]
            store.release(file)
        assert await cached(store, b"bad") == 1
        assert await cached(store, b"fine") == 2
        assert await cached(store, b"gone") == 0
        again = await maintenance.verify(store, ignore)
        assert again.damaged_files == 0

    run(tmp_path, story)


def test_a_cache_that_is_in_use_is_not_opened_twice(tmp_path: Path) -> None:
    held = Store.open(tmp_path, 1, "the mount at /a b (pid 7)")
    assert cache_commands.last_mountpoint(tmp_path) == "/a b"
    with pytest.raises(SetupError, match="in use by the mount at /a b"):
        cache_commands.answer_unmounted(tmp_path, ControlRequest("clear"), lambda _: None)
    trio.run(held.close)
    for _ in range(2):
        found = cache_commands.answer_unmounted(
            tmp_path, ControlRequest("cache"), lambda _: None
        ).cache
        assert found
        assert (found.mountpoint, found.mounted, found.used) == ("/a b", False, 0)


# --- record_cache ---------------------------------------------------------------------------------


def record(key: bytes, *, is_complete: bool = True) -> Record:
    return Record("n", "o", key, b"v", 1, 1, 1.0, is_complete=is_complete)


def test_the_second_file_of_a_directory_brings_the_others() -> None:
    seen = RecordCache()
    assert not seen.wants("o", b"d/1")
    assert not seen.wants("o", b"e/1")
    assert not seen.wants("o", b"d/1")
    assert seen.wants("o", b"d/2")
    files = {b"d/1": record(b"d/1"), b"d/big": record(b"d/big", is_complete=False)}
    seen.learn("o", b"d/2", files, seen.stamp)
    assert seen.find("o", b"d/1") == CachedAnswer(files[b"d/1"])
    assert seen.find("o", b"d/2") == CachedAnswer(None)
    assert seen.find("o", b"d/big") is None
    assert seen.find("o", b"d/e/1") is None
    assert seen.find("another", b"d/1") is None
    assert not seen.wants("o", b"d/3")


def test_what_changes_is_not_answered_from_memory() -> None:
    seen = RecordCache()
    stamp = seen.stamp
    seen.invalidate("o", b"d/1")
    seen.learn("o", b"d/1", {}, stamp)
    assert seen.find("o", b"d/1") is None, "it was asked for before the change"
    seen.learn("o", b"d/1", {}, seen.stamp)
    assert seen.find("o", b"d/1") == CachedAnswer(None)
    seen.invalidate("o", b"d/1")
    assert seen.find("o", b"d/1") is None
    assert seen.find("o", b"d/2") == CachedAnswer(None)
    seen.invalidate_all()
    assert seen.find("o", b"d/2") is None


def test_a_directory_with_too_many_files_is_left_alone() -> None:
    seen = RecordCache()
    seen.learn("o", b"d/1", None, seen.stamp)
    assert seen.find("o", b"d/1") is None
    assert not any(seen.wants("o", b"d/%d" % number) for number in range(3))


def test_opening_the_files_of_a_directory_asks_the_index_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def first(store: Store) -> None:
        await idle(store, *(b"d/%d" % number for number in range(5)))

    async def second(store: Store) -> None:
        for number in range(10):
            assert await cached(store, b"d/%d" % number) == (2 if number < 5 else 0)
        assert asked == [b"d/0", b"d"]
        await store.save()
        assert await cached(store, b"d/3") == 2, "asked anew: it was saved"
        assert asked == [b"d/0", b"d", b"d/3"]

    run(tmp_path, first)
    find, directory = Index.find, Index.directory

    def count_find(self: Index, origin: str, key: bytes) -> Record | None:
        asked.append(key)
        return find(self, origin, key)

    def count_directory(
        self: Index, origin: str, key: bytes, limit: int
    ) -> dict[bytes, Record] | None:
        asked.append(key)
        return directory(self, origin, key, limit)

    monkeypatch.setattr(Index, "find", count_find)
    monkeypatch.setattr(Index, "directory", count_directory)
    run(tmp_path, second)
