"""What the cache is thought to hold while several tasks change it: never less than what is there,
or eviction believes that there is room, and the cache stays too large."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from hpcfs.cache.file import CacheFile, checksum
from hpcfs.cache.store import Store
from hpcfs.model.entries import BLOCK_BYTES
from tests.policy.test_eviction import MANY, fill, idle, run


async def sums_during(store: Store, act: Awaitable[object]) -> set[int]:
    """What the cache is thought to hold, in blocks, at every moment of `act` that a task sees."""
    sums = set()

    async def watch() -> None:
        while True:
            sums.add(store.used_bytes // BLOCK_BYTES)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await act
        nursery.cancel_scope.cancel()
    return sums | {store.used_bytes // BLOCK_BYTES}


async def replaced(store: Store, files: int, blocks: int) -> list[CacheFile]:
    """Files "0", "1", … that the index knows, and that gave way to another version: they are to
    go, with the next save at the latest."""
    for number in range(files):
        await idle(store, b"%d" % number, blocks)
    found = []
    for number in range(files):
        key = b"%d" % number
        old = await store.acquire("origin", key, b"v", blocks * BLOCK_BYTES)
        store.release(await store.acquire("origin", key, b"v2", 0))
        store.release(old)
        assert not old.indexed
        found.append(old)
    return found


def test_saving_hides_nothing_from_the_sum(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await idle(store, b"idle", 4)
        store.release(await fill(store, b"new", 3))
        assert await sums_during(store, store.save()) == {7}

    run(tmp_path, story)


def test_a_replaced_row_hides_nothing_from_the_sum(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await idle(store, b"idle", 4)
        await idle(store, b"k", 2)
        await replaced(store, 1, 1)
        old = await store.acquire("origin", b"k", b"v", 2 * BLOCK_BYTES)
        new = await store.acquire("origin", b"k", b"v2", BLOCK_BYTES)
        assert min(await sums_during(store, store.save())) == 6
        store.release(old)
        store.release(new)
        await store.save()
        assert store.used_bytes == 4 * BLOCK_BYTES

    run(tmp_path, story)


def test_names_that_go_hide_nothing_from_the_sum(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        for key in (b"d/a", b"d/b", b"e/a", b"other"):
            await idle(store, key, 4)
        file = await store.acquire("origin", b"d/a", b"v", 4 * BLOCK_BYTES)
        assert min(await sums_during(store, store.move("origin", b"d", b"e"))) == 12
        assert min(await sums_during(store, store.remove("origin", b"e"))) == 8
        store.release(file)
        await store.make_room(1)
        assert store.used_bytes == 4 * BLOCK_BYTES

    run(tmp_path, story)


def test_what_went_is_not_counted_any_more(tmp_path: Path) -> None:
    """Without waiting for the next save."""

    async def story(store: Store) -> None:
        await idle(store, b"idle", 4)
        await replaced(store, 1, 3)
        assert await store.make_room(1) == 3 * BLOCK_BYTES
        assert store.used_bytes == 4 * BLOCK_BYTES

    run(tmp_path, story)


def test_two_tasks_make_room_at_once(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        await replaced(store, 6, 2)
        freed = []

        async def make_room() -> None:
            freed.append(await store.make_room(MANY))

        async with trio.open_nursery() as nursery:
            for act in (make_room, make_room, store.save, make_room):
                nursery.start_soon(act)
        assert sum(freed) <= 12 * BLOCK_BYTES
        assert store.used_bytes == 0
        assert not list((tmp_path / "data").glob("*/*"))

    run(tmp_path, story)


def test_what_is_about_to_go_is_not_opened_again(tmp_path: Path) -> None:
    """The index still knows the old version, and its bytes are perhaps not the old ones."""

    async def story(store: Store) -> None:
        going = await replaced(store, 2, 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.make_room, 1)
            while going[0].fd >= 0:
                await trio.lowlevel.checkpoint()
            file = await store.acquire("origin", b"1", b"v", 2 * BLOCK_BYTES)
        assert file.name != going[1].name
        assert await trio.Path(file.path).exists()
        store.release(file)

    run(tmp_path, story)


def test_a_change_that_fails_is_counted_as_far_as_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(store: Store) -> None:
        for key in (b"a", b"b"):
            await idle(store, key, 4)
        unlink = store.registry.unlink
        gone: list[str] = []

        def fails_at_last(name: str) -> None:
            if gone:
                raise OSError(5, "the disk fails here")
            gone.append(name)
            unlink(name)
            store.registry.index.delete([name])

        monkeypatch.setattr(store.registry, "unlink", fails_at_last)
        with pytest.raises(OSError, match="fails here"):
            await store.make_room(MANY)
        assert store.used_bytes == 4 * BLOCK_BYTES

    run(tmp_path, story)


def test_cancelled_while_files_go_they_go_nevertheless(tmp_path: Path) -> None:
    """Nobody would know of them any more, until the next mount."""

    async def story(store: Store) -> None:
        going = await replaced(store, 4, 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.make_room, 1)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert store.used_bytes == 0
        assert not [file for file in going if await trio.Path(file.path).exists()]

    run(tmp_path, story)


def test_a_save_finds_what_grew_without_a_word(tmp_path: Path) -> None:
    """A byte in a block counts as the block once the file is truncated to more."""

    async def story(store: Store) -> None:
        for number in range(5):
            file = await store.acquire("origin", b"%d" % number, b"v", 1)
            file.write(0, b"b")
            file.blocks.put(0, checksum(b"b"))
            file.resize(BLOCK_BYTES)
            store.release(file)
        assert store.used_bytes == 5 * BLOCK_BYTES
        await store.save()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.evict_forever)
            with trio.fail_after(10):
                while store.used_bytes > store.max_bytes:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    run(tmp_path, story, max_bytes=3 * BLOCK_BYTES)


def test_a_short_last_block_is_a_block_too_much(tmp_path: Path) -> None:
    """A file that is not all here is counted by blocks, its last one as if it were a whole one."""

    async def story(store: Store) -> None:
        size = 5 * BLOCK_BYTES + 20
        file = await store.acquire("origin", b"k", b"v", size)
        for block in range(3):
            file.blocks.put(block, 1)
            store.note_added(BLOCK_BYTES)
        file.blocks.put(5, 1)
        store.note_added(20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.evict_forever)
            with trio.fail_after(10):
                while store.used_bytes > store.max_bytes:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        store.release(file)

    run(tmp_path, story, max_bytes=3 * BLOCK_BYTES)
