"""Listings: while names come and go, of any length; and namespaces beside each other."""

from __future__ import annotations

import errno
import os
import stat
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hpcfs.directories import listing as listing_module
from hpcfs.directories.lister import LISTING_SECONDS
from hpcfs.directories.listing import Listing
from hpcfs.kernel.errno import errno_of
from hpcfs.model.entries import BLOCK_BYTES, Attributes, Entry
from hpcfs.model.errors import (
    CacheFull,
    CrossDevice,
    ReadOnly,
    RemoteError,
    TimedOut,
    TooLarge,
)
from hpcfs.protocol import messages as m
from tests.filesystem.world import RW, World, live, until, world
from tests.support.memory_remote import GID, UID, Item, MemoryRemote

TOTAL = 100_000


@live()
async def test_names_removed_and_made_while_a_directory_is_read(w: World) -> None:
    for number in range(20):
        w.remote.put(b"%02d" % number, b"")
    handle = w.fs.directories.open(await w.kernel.walk("ns"))
    found: dict[bytes, Entry] = {}
    position = await w.kernel.readdir(handle, 0, found, room=7)
    assert len(found) == 5
    await w.kernel.unlink("ns/10")
    await w.kernel.unlink("ns/01")
    await w.kernel.rename("ns/11", "ns/99")
    made = await w.kernel.open("ns/made", RW | os.O_CREAT)
    last = -1
    while position != last:
        last = position
        position = await w.kernel.readdir(handle, position, found)
    assert {b"10", b"11"}.isdisjoint(found)
    assert {b"%02d" % number for number in range(20) if number not in (10, 11)} <= found.keys()
    found.clear()
    await w.kernel.readdir(handle, 0, found, room=100)  # rewinddir(3)
    assert {b"made", b"99"} <= found.keys()
    assert {b"01", b"10", b"11"}.isdisjoint(found)
    w.fs.directories.close(handle)
    await w.kernel.close(made)


@live("s3")
async def test_names_that_come_date_a_directory_only_where_the_remote_does(w: World) -> None:
    """Else a copy made at once gets a time that the original has only for a second."""
    await w.kernel.mkdir("ns/d")
    made = (await w.kernel.stat("ns/d")).mtime_ns
    await w.kernel.write_file("ns/d/f", b"x")
    seen = (await w.kernel.stat("ns/d")).mtime_ns
    w.clock.expire_attributes()
    assert made == seen == (await w.kernel.stat("ns/d")).mtime_ns


@live()
async def test_a_name_removed_during_the_listing_is_not_brought_back(w: World) -> None:
    w.remote.put(b"f", b"")
    handle = w.fs.directories.open(await w.kernel.walk("ns"))
    held = w.cues.hold(m.List, stage="middle")
    found: dict[bytes, Entry] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.readdir, handle, 0, found)
        await held.reached.wait()
        await w.kernel.unlink("ns/f")
        held.go.set()
    assert b"f" not in found
    assert not await w.kernel.exists("ns/f")
    w.fs.directories.close(handle)


def test_a_file_that_is_just_being_uploaded_is_listed_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, "s3") as w:
            handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
            await w.kernel.pwrite(handle, 0, b"content")
            held = w.cues.hold(m.Upload, stage="after")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(w.kernel.fsync, handle)
                await held.reached.wait()
                assert b"f" in w.remote.root.children, "the remote has it, and nobody here knows"
                listing = w.fs.directories.open(await w.kernel.walk("ns"))
                found = [name for _, name, _, _ in await w.fs.directories.read(listing, 0)]
                w.fs.directories.close(listing)
                held.go.set()
            await w.kernel.close(handle)
            assert sorted(found) == [b".", b"..", b"f"]

    trio.run(main)


def _pages() -> list[bytes]:
    entry = Entry(b"", stat.S_IFREG | 0o644, 1, 10**18, 10**18, UID, GID, b"1:1")
    names = [b"a name of quite an ordinary length %06d" % number for number in range(TOTAL)]
    return [
        msgspec.msgpack.encode([msgspec.structs.replace(entry, name=n) for n in names[at:][:1000]])
        for at in range(0, TOTAL, 1000)
    ]


def test_a_listing_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    """Invariant 5: a listing's pages go to a file, and one at a time is decoded."""
    pages = _pages()
    tracemalloc.start()
    try:
        listing = Listing(str(tmp_path), 0.0)
        for page in pages:
            listing.add_page(page)
        count = sum(1 for _ in listing.entries_from(0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == listing.count == TOTAL
    assert sum(map(len, pages)) > 5_000_000
    assert peak < 4_500_000
    last = next(listing.entries_from(TOTAL - 1))
    assert last[0] == TOTAL - 1
    assert last[1].name.endswith(b"099999")
    listing.release()


@live("sftp", max_blocks=1024)
async def test_a_directory_of_100000_entries_leaves_no_nodes(w: World) -> None:
    for number in range(TOTAL):
        w.remote.root.children[b"%06d" % number] = Item(stat.S_IFREG | 0o644, 0)
    handle = w.fs.directories.open(await w.kernel.walk("ns"))
    count, start, last = 0, 0, -1
    while start != last:
        last = start
        for following, _, node, counts in await w.fs.directories.read(handle, start):
            start = following
            count += counts
            w.fs.tree.drop_if_unused(node)
    w.fs.directories.close(handle)
    assert w.store.registry.spooled_bytes == 0
    assert count == TOTAL
    assert len(w.fs.tree) == 2


class Endless(MemoryRemote):
    """One directory never ends; it counts the names that it told."""

    told = 0
    ended = 0

    async def list(self, path: bytes) -> AsyncGenerator[Sequence[Entry], None]:
        if path != b"endless":
            async with aclosing(super().list(path)) as pages:
                async for page in pages:
                    yield page
            return
        entry = Entry(b"", stat.S_IFREG | 0o644, 1, 10**18, 10**18, UID, GID, b"1:1")
        try:
            while True:
                names = (b"%09d" % number for number in range(self.told, self.told + 1000))
                yield [msgspec.structs.replace(entry, name=name) for name in names]
                self.told += 1000
                await trio.lowlevel.checkpoint()
        finally:
            self.ended += 1


def on_endless(
    directory: Path, story: Callable[[World, Endless], Awaitable[None]], max_blocks: int = 1024
) -> None:
    async def main() -> None:
        remote = Endless("sftp")
        await remote.make_directory(b"endless", 0o755)
        await remote.make_directory(b"other", 0o755)
        size = max_blocks * BLOCK_BYTES
        async with world(directory, {"ns": remote}, max_bytes=size) as w:
            with trio.fail_after(60):
                await story(w, remote)

    trio.run(main)


async def read_on(
    w: World, handle: int, found: dict[bytes, Entry], waits: list[float] | None = None
) -> None:
    """Until it ends or fails."""
    position, last = 0, -1
    while position != last:
        last, asked = position, trio.current_time()
        position = await w.kernel.readdir(handle, position, found, room=5000)
        if waits is not None:
            waits.append(trio.current_time() - asked)


def test_an_endless_directory_is_read_as_it_comes_and_no_further(tmp_path: Path) -> None:
    """A program that is interrupted closes it; then nothing is asked for any more."""

    async def story(w: World, remote: Endless) -> None:
        handle = w.fs.directories.open(await w.kernel.walk("ns/endless"))
        found: dict[bytes, Entry] = {}
        position = 0
        for _ in range(3):
            position = await w.kernel.readdir(handle, position, found, room=500)
        assert len(found) == 1500 - 2
        assert not remote.ended
        w.fs.directories.close(handle)
        await until(lambda: remote.ended == 1)
        assert remote.told < 200_000
        assert w.store.registry.spooled_bytes == 0
        assert set(await w.kernel.listdir("ns")) == {b"endless", b"other"}

    on_endless(tmp_path, story)


def test_an_endless_directory_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "LIST_MAX_ENTRIES", 50_000)

    async def story(w: World, remote: Endless) -> None:
        handle = w.fs.directories.open(await w.kernel.walk("ns/endless"))
        found: dict[bytes, Entry] = {}
        with pytest.raises(TooLarge, match="50,000"):
            await read_on(w, handle, found)
        assert len(found) == 50_000
        await until(lambda: remote.ended == 1)
        w.fs.directories.close(handle)
        assert w.store.registry.spooled_bytes == 0

    on_endless(tmp_path, story)


def test_a_listing_takes_no_more_of_the_disk_than_the_cache_may(tmp_path: Path) -> None:
    async def story(w: World, remote: Endless) -> None:
        handle = w.fs.directories.open(await w.kernel.walk("ns/endless"))
        found: dict[bytes, Entry] = {}
        with pytest.raises(CacheFull):
            await read_on(w, handle, found)
        assert found
        assert 24 * BLOCK_BYTES < w.store.registry.spooled_bytes <= 48 * BLOCK_BYTES
        assert w.store.used_bytes >= w.store.registry.spooled_bytes
        w.fs.directories.close(handle)
        assert w.store.registry.spooled_bytes == 0

    on_endless(tmp_path, story, max_blocks=48)


def test_a_slow_listing_is_read_as_it_comes_and_ends(tmp_path: Path) -> None:
    """Of a server that tells one page every 20 s."""

    class Slow(Endless):
        async def list(self, path: bytes) -> AsyncGenerator[Sequence[Entry], None]:
            async with aclosing(super().list(path)) as pages:
                async for page in pages:
                    if path == b"endless":
                        await trio.sleep(20)
                    yield page[:3]

    async def main() -> None:
        remote = Slow("sftp")
        await remote.make_directory(b"endless", 0o755)
        async with world(tmp_path, {"ns": remote}) as w:
            handle = w.fs.directories.open(await w.kernel.walk("ns/endless"))
            found: dict[bytes, Entry] = {}
            waits: list[float] = []
            began = trio.current_time()
            with pytest.raises(TimedOut):
                await read_on(w, handle, found, waits)
            assert max(waits) <= 21
            assert 60 < trio.current_time() - began <= LISTING_SECONDS + 1
            assert len(found) == 3 * (int(LISTING_SECONDS - 1) // 20)
            w.fs.directories.close(handle)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_what_is_made_meanwhile_is_in_a_listing_that_is_read_as_it_comes(tmp_path: Path) -> None:
    """Once, and what was removed is not."""

    async def main() -> None:
        async with world(tmp_path, "sftp", max_bytes=64 * 1024 * 1024) as w:
            for number in range(50_000):
                w.remote.root.children[b"%06d" % number] = Item(stat.S_IFREG | 0o644, 0)
            handle = w.fs.directories.open(await w.kernel.walk("ns"))
            names: list[bytes] = []

            async def read(start: int) -> int:
                found: dict[bytes, Entry] = {}
                following = await w.kernel.readdir(handle, start, found, room=20_000)
                names.extend(found)
                return following

            held = w.cues.hold(m.List, stage="middle")
            position, last = await read(0), -1
            assert 0 < len(names) < 50_000
            made = await w.kernel.open("ns/made", RW | os.O_CREAT)
            await w.kernel.unlink("ns/049999")
            await w.kernel.rename("ns/000003", "ns/renamed")
            held.go.set()
            while position != last:
                last, position = position, await read(position)
            assert names.count(b"made") == 1
            assert b"049999" not in names
            assert len(names) == len(set(names))
            await w.kernel.close(made)
            w.fs.directories.close(handle)

    trio.run(main)


@live()
async def test_a_listing_that_the_full_disk_does_not_take_fails_alone(
    w: World,
) -> None:
    """The page arrives in the task that receives for all: an error there would end the mount."""
    listing = Listing(str(w.directory), 0.0)

    class Full:
        def seek(self, *_: int) -> None: ...
        def writelines(self, _: list[bytes]) -> None:
            raise OSError(errno.ENOSPC, "full")

        def close(self) -> None: ...

    listing._file = Full()  # type: ignore[assignment]
    for page in _pages():
        listing.add_page(page)
    with pytest.raises(CacheFull):
        listing.check_complete()


# --- namespaces -----------------------------------------------------------------------------------


async def _refuse_everything(w: World) -> None:
    w.remote.put(b"f", b"content")
    await w.remote.make_directory(b"d", 0o755)
    kernel = w.kernel
    handle = await kernel.open("ns/f", os.O_RDONLY)
    assert await kernel.pread(handle, 0, 10) == b"content"
    before = len(w.cues.calls)
    node = await kernel.walk("ns/f")
    attempts = [
        kernel.open("ns/f", RW),
        kernel.open("ns/f", os.O_RDONLY | os.O_TRUNC),
        kernel.open("ns/new", RW | os.O_CREAT),
        kernel.truncate("ns/f", 0),
        kernel.setattr("ns/f", Attributes(mode=0o600)),
        kernel.unlink("ns/f"),
        kernel.rmdir("ns/d"),
        kernel.mkdir("ns/e"),
        kernel.symlink("ns/l", b"f"),
        kernel.rename("ns/f", "ns/g"),
        w.fs.link(node.ino, (await kernel.walk("ns")).ino, b"l"),
        w.fs.mknod((await kernel.walk("ns")).ino, b"n", stat.S_IFREG),
    ]
    for attempt in attempts:
        with pytest.raises(ReadOnly) as refused:
            await attempt
        assert errno_of(refused.value) == errno.EROFS
    asked = {type(call) for call in w.cues.calls[before:]}
    assert asked <= {m.Stat, m.Connect, m.Fetch, m.StatOpen}, "the remote was asked to change"
    with pytest.raises(ReadOnly):
        await w.fs.access(node.ino, os.W_OK)
    await kernel.close(handle)


@pytest.mark.parametrize("kind", ["sftp", "s3"])
def test_a_read_only_namespace_refuses_every_change_itself(kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, kind, read_only=True) as w:
            await _refuse_everything(w)

    trio.run(run)


def _two() -> dict[str, MemoryRemote]:
    return {"dead": MemoryRemote("sftp"), "good": MemoryRemote("s3")}


def test_nothing_moves_between_namespaces(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, _two()) as w:
            w.remotes["good"].put(b"f", b"content")
            with pytest.raises(CrossDevice) as refused:
                await w.kernel.rename("good/f", "dead/f")
            assert errno_of(refused.value) == errno.EXDEV
            node, folder = await w.kernel.walk("good/f"), await w.kernel.walk("dead")
            with pytest.raises(CrossDevice):
                await w.fs.link(node.ino, folder.ino, b"f")
            for attempt in (w.kernel.mkdir("new"), w.kernel.rename("good", "bad")):
                with pytest.raises(ReadOnly):
                    await attempt

    trio.run(run)


def test_a_dead_namespace_delays_no_other(tmp_path: Path) -> None:
    """In virtual time: whoever waits for the dead one waits for its deadline, nobody else does."""
    clock = MockClock()

    async def run() -> None:
        async with world(tmp_path, _two()) as w:
            w.remotes["good"].put(b"f", b"content")
            for kind in (m.Stat, m.Connect, m.List):
                for _ in range(5):
                    w.sites["dead"].cues.hold(kind)
            outcome: list[Exception] = []

            async def suffer() -> None:
                try:
                    await w.kernel.read_file("dead/f")
                except RemoteError as error:
                    outcome.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(suffer)
                await wait_all_tasks_blocked()
                start = trio.current_time()
                assert await w.kernel.read_file("good/f") == b"content"
                await w.kernel.write_file("good/g", b"more")
                assert (await w.kernel.listdir("")).keys() == {b"dead", b"good"}
                assert trio.current_time() == start
                assert not outcome
                clock.jump(31)
            assert [type(error) for error in outcome] == [TimedOut]

    trio.run(run, clock=clock)


def test_the_top_shows_a_dead_namespace_after_a_second(tmp_path: Path) -> None:
    clock = MockClock()

    async def run() -> None:
        async with world(tmp_path, _two()) as w:
            w.sites["dead"].cues.hold(m.Stat)
            sizes: list[int] = []

            async def look() -> None:
                sizes.append((await w.kernel.stat("dead")).size)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                await wait_all_tasks_blocked()
                assert not sizes
                clock.jump(1.1)
            assert sizes == [0]

    trio.run(run, clock=clock)
