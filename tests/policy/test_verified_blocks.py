"""What a mount stored or verified itself is not verified again while it lasts, and nothing else is
trusted."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings, strategies as st

from hpcfs.cache import maintenance, verified_blocks
from hpcfs.cache.blocks import CHUNK_BLOCKS
from hpcfs.cache.file import CacheFile, checksum
from hpcfs.cache.store import Store
from hpcfs.cache.verified_blocks import VerifiedBlocks
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.protocol import messages as m
from tests.filesystem.world import World, world
from tests.support.memory_remote import MemoryRemote

MANY = 10**9
FILES, BLOCKS = 2, 4
ACTIONS = (
    *("store", "fill", "close", "close", "verify block", "evict", "evict unheard"),
    *("damage", "verify", "clear", "rename", "remount"),
)
Step = tuple[str, int, int]
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=200)
steps = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.integers(0, FILES - 1),
        st.integers(0, BLOCKS - 1),
    ),
    min_size=8,
    max_size=30,
)


class Model:
    """A cache and what may be trusted of it: no more, and as long as nothing went wrong no less."""

    def __init__(self, directory: Path, *, stamps: bool) -> None:
        self.directory = directory
        self.stamps = stamps
        self.store = Store.open(directory, MANY, "a test")
        self.open: dict[int, CacheFile] = {}
        self.checked: set[tuple[int, int]] = set()
        """Blocks that this mount stored or verified, and that nobody touched since."""
        self.keys = [b"%d" % number for number in range(FILES)]

    async def file(self, number: int) -> CacheFile:
        if number not in self.open:
            key, size = self.keys[number], BLOCKS * BLOCK_BYTES
            file = self.open[number] = await self.store.acquire("origin", key, b"v", size)
            self.check(number, file)
        return self.open[number]

    def check(self, number: int, file: CacheFile) -> None:
        for block in range(BLOCKS):
            if file.blocks.is_trusted(block):
                assert file.blocks.is_present(block)
                assert file.compute_checksum(block) == file.blocks.checksum(block)
                assert (number, block) in self.checked
        present = set(file.blocks.present())
        if all((number, block) in self.checked for block in present):
            assert all(file.blocks.is_trusted(block) for block in present)
        self.checked -= {(number, block) for block in range(BLOCKS) if block not in present}

    async def put(self, number: int, block: int) -> None:
        file, data = await self.file(number), os.urandom(BLOCK_BYTES)
        file.write(block * BLOCK_BYTES, data)
        file.blocks.put(block, checksum(data))
        self.checked.add((number, block))

    async def close(self, number: int) -> None:
        file = self.open.pop(number, None)
        if file is not None:
            self.check(number, file)
            self.store.release(file)
            await self.store.save()

    async def step(self, action: str, number: int, block: int) -> None:
        if action == "store":
            await self.put(number, block)
        elif action == "fill":
            for each in range(BLOCKS):
                await self.put(number, each)
        elif action == "close":
            await self.close(number)
        elif action == "verify block":
            file = await self.file(number)
            if file.blocks.is_present(block) and not file.blocks.is_trusted(block):
                if file.compute_checksum(block) == file.blocks.checksum(block):
                    file.blocks.trust(block)
                    self.checked.add((number, block))
                else:
                    file.evict([block])
        elif action == "evict":
            await self.evict((block + 1) * BLOCK_BYTES)
        elif action == "evict unheard":
            await self.evict_unheard((block + 1) * BLOCK_BYTES)
        elif action == "damage":
            await self.close(number)
            self.damage(number, block)
        elif action == "verify":
            await maintenance.verify(self.store, ignore)
        elif action == "clear":
            await maintenance.clear(
                self.store, [maintenance.CachedPath("origin", self.keys[number])], ignore
            )
        elif action == "rename":
            target = self.keys[number] + b"+"
            await self.store.move("origin", self.keys[number], target)
            self.keys[number] = target
        elif action == "remount":
            await self.remount()

    async def evict(self, wanted: int) -> None:
        """An idle file that lost some of its blocks is verified again: its change time tells."""
        before = self.indexed_blocks()
        await self.store.make_room(wanted)
        for number, count in self.indexed_blocks().items():
            if self.stamps and number not in self.open and count < before[number]:
                self.checked -= {(number, block) for block in range(BLOCKS)}

    def indexed_blocks(self) -> dict[int, int]:
        found = {
            n: self.store.registry.index.find("origin", key) for n, key in enumerate(self.keys)
        }
        return {number: record.blocks for number, record in found.items() if record is not None}

    async def evict_unheard(self, wanted: int) -> None:
        """The bytes of idle files go, and the index can't be told: it goes on naming them."""
        for number in list(self.open):
            await self.close(number)
        index = self.store.registry.index
        with pytest.MonkeyPatch.context() as patch:

            def full(*_: object) -> None:
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(index, "change_blocks", full)
            with suppress(sqlite3.OperationalError):
                await self.store.make_room(wanted)
        self.checked.clear()

    def damage(self, number: int, block: int) -> None:
        """Somebody else changes an idle cache file."""
        record = self.store.registry.index.find("origin", self.keys[number])
        if record is None:
            return
        path = Path(self.store.registry.path(record.name))
        before = path.stat().st_ctime_ns
        while path.stat().st_ctime_ns == before:  # before Linux 6.13 it has ticks of 4 ms
            with path.open("r+b") as file:
                file.seek(block * BLOCK_BYTES)
                file.write(b"damaged")
        self.checked -= {(number, block) for block in range(BLOCKS)}

    async def remount(self) -> None:
        for number in list(self.open):
            await self.close(number)
        await self.store.close()
        self.checked.clear()
        self.store = Store.open(self.directory, MANY, "a test")

    async def end(self) -> None:
        for number in range(FILES):
            await self.file(number)
            await self.close(number)
        await self.store.close()


async def ignore(done: int, total: int) -> None:
    assert done <= total


@pytest.mark.slow
@pytest.mark.parametrize("stamps", [True, False])
@repeatable
@given(steps)
def test_trust_is_what_this_mount_checked_and_nobody_touched(
    stamps: bool, steps: list[Step]
) -> None:
    """Without stamps what others do goes unseen, and what the cache itself does is known still."""

    async def main(directory: str) -> None:
        model = Model(Path(directory), stamps=stamps)
        for action, number, block in steps:
            if stamps or action != "damage":
                await model.step(action, number, block)
        await model.end()

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        if not stamps:
            patch.setattr(verified_blocks, "_stamp", lambda _: (0, 0))
        trio.run(main, directory)


def run(directory: Path, story: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        store = Store.open(directory, MANY, "a test")
        await story(store)
        await store.close()

    trio.run(main)


async def fill(store: Store, key: bytes, blocks: Sequence[int], size: int) -> CacheFile:
    file = await store.acquire("origin", key, b"v", size * BLOCK_BYTES)
    for block in blocks:
        file.write(block * BLOCK_BYTES, key.ljust(BLOCK_BYTES))
        file.blocks.put(block, checksum(key.ljust(BLOCK_BYTES)))
    return file


def test_of_a_half_verified_file_the_verified_chunks_are_trusted(tmp_path: Path) -> None:
    blocks = [0, 1, CHUNK_BLOCKS, CHUNK_BLOCKS + 1, 2 * CHUNK_BLOCKS]

    async def first(store: Store) -> None:
        store.release(await fill(store, b"k", blocks, 3 * CHUNK_BLOCKS))

    async def second(store: Store) -> None:
        file = await store.acquire("origin", b"k", b"v", 3 * CHUNK_BLOCKS * BLOCK_BYTES)
        assert not any(file.blocks.is_trusted(block) for block in blocks)
        for block in (0, 1, CHUNK_BLOCKS):
            file.blocks.trust(block)
        for _ in range(2):  # the second time not even looked at
            store.release(file)
            await store.save()
            assert file.fd == -1
            file = await store.acquire("origin", b"k", b"v", 3 * CHUNK_BLOCKS * BLOCK_BYTES)
        assert [block for block in blocks if file.blocks.is_trusted(block)] == [0, 1]
        store.release(file)

    run(tmp_path, first)
    run(tmp_path, second)


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    async def story(store: Store) -> None:
        store.registry.verified_blocks = VerifiedBlocks(max_chunks=4)
        large = range(0, 3 * CHUNK_BLOCKS, CHUNK_BLOCKS)
        for key, blocks in ((b"a", range(1)), (b"large", large), (b"b", range(1))):
            store.release(await fill(store, key, blocks, 3 * CHUNK_BLOCKS))
            await store.save()
        trusted = []
        for key in (b"a", b"large", b"b"):
            file = await store.acquire("origin", key, b"v", 3 * CHUNK_BLOCKS * BLOCK_BYTES)
            assert file.blocks.is_present(0)
            trusted.append(file.blocks.is_trusted(0))
            store.release(file)
        assert trusted == [False, True, True], "what was closed first is verified again"

    run(tmp_path, story)


def test_a_file_that_was_read_before_is_not_verified_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = MemoryRemote("sftp")
    remote.put(b"f", bytes(3 * BLOCK_BYTES) + b"end")
    verified = list[int]()
    compute = CacheFile.compute_checksums

    def counted(file: CacheFile, blocks: list[int]) -> list[int]:
        verified.extend(blocks)
        return compute(file, blocks)

    monkeypatch.setattr(CacheFile, "compute_checksums", counted)

    async def mount(times: int) -> None:
        async with world(tmp_path, {"ns": remote}) as w:
            for _ in range(times):
                await read(w)
            assert sum(isinstance(call, m.Fetch) and call.length > 0 for call in w.cues.calls) <= 1

    async def read(w: World) -> None:
        assert await w.kernel.read_file("ns/f") == remote.get(b"f")
        await w.store.save()
        assert not w.store.registry.files

    trio.run(mount, 2)
    assert verified == []
    trio.run(mount, 2)
    assert sorted(verified) == [0, 1, 2, 3], "once in each mount"
