"""Others change files on the remote: what is seen when, and that versions are never mixed."""

from __future__ import annotations

import os

import pytest
import trio

from hpcfs.filesystem.errors import Stale
from hpcfs.transfer import messages as m
from hpcfs.transfer.messages import BLOCK_BYTES
from tests.filesystem.world import RW, World, live

OLD, NEW = b"o" * BLOCK_BYTES, b"n" * BLOCK_BYTES


@live()
async def test_a_change_is_seen_at_the_next_open(w: World) -> None:
    w.remote.put(b"f", b"old")
    assert await w.kernel.read_file("ns/f") == b"old"
    w.remote.put(b"f", b"newer")
    w.clock.expire_attributes()
    assert (await w.kernel.stat("ns/f")).size == 5
    assert await w.kernel.read_file("ns/f") == b"newer"


async def _replaced_while_open(w: World, length: int) -> None:
    w.remote.put(b"f", OLD * 2)
    old = await w.kernel.open("ns/f")
    assert await w.kernel.pread(old, 0, BLOCK_BYTES) == OLD
    w.remote.put(b"f", NEW * length)
    w.clock.expire_attributes()
    assert (await w.kernel.stat("ns/f")).size == length * BLOCK_BYTES
    new = await w.kernel.open("ns/f")
    assert w.kernel.node_of(new).ino != w.kernel.node_of(old).ino
    assert await w.kernel.pread(new, 0, 1) == b"n"
    assert await w.kernel.pread(old, 0, BLOCK_BYTES) == OLD
    with pytest.raises(Stale):
        await w.kernel.pwrite(old, 0, b"meant for the old file")
    with pytest.raises(Stale):
        await w.kernel.ftruncate(old, 0)
    await w.kernel.close(old)
    await w.kernel.close(new)
    assert w.remote.get(b"f") == NEW * length


@live()
async def test_a_file_replaced_by_a_larger_one_is_another_node(w: World) -> None:
    await _replaced_while_open(w, 5)


@live()
async def test_a_file_replaced_by_a_smaller_one_is_another_node(w: World) -> None:
    await _replaced_while_open(w, 1)


@live("sftp")
async def test_growth_is_followed_by_who_has_the_file_open(w: World) -> None:
    """tail -f: the size by fstat(2), then the new bytes; never a block of two versions."""
    w.remote.put(b"log", b"line 0\n")
    handle = await w.kernel.open("ns/log", os.O_RDONLY)
    seen = b""
    for number in range(1, 200):
        seen += await w.kernel.pread(handle, len(seen), 1 << 20)
        assert seen == w.remote.get(b"log")
        w.remote.append(b"log", b"line %d\n" % number * 3000)
        w.clock.expire_attributes()
        if number % 2:
            size = (await w.kernel.fstat(handle)).size
        else:
            size = (await w.kernel.stat("ns/log")).size
        assert size == len(w.remote.get(b"log"))
    assert w.kernel.node_of(handle).is_attached
    await w.kernel.close(handle)


@live("sftp")
async def test_growth_during_a_fetch_is_not_mixed_in(w: World) -> None:
    w.remote.put(b"log", OLD)
    handle = await w.kernel.open("ns/log", os.O_RDONLY)
    w.remote.append(b"log", NEW)
    found = await w.kernel.pread(handle, 0, 2 * BLOCK_BYTES)
    assert found in (OLD, OLD + NEW)
    w.clock.expire_attributes()
    assert (await w.kernel.fstat(handle)).size == 2 * BLOCK_BYTES
    assert await w.kernel.pread(handle, 0, 2 * BLOCK_BYTES) == OLD + NEW
    await w.kernel.close(handle)


@live()
async def test_what_is_missing_of_a_cut_file_is_stale(w: World) -> None:
    w.remote.put(b"f", OLD * 3)
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    assert await w.kernel.pread(handle, 0, 10) == OLD[:10]
    w.remote.overwrite(b"f", OLD[:10])
    with pytest.raises(Stale):
        await w.kernel.pread(handle, 2 * BLOCK_BYTES, 10)
    await w.kernel.close(handle)
    w.clock.expire_attributes()
    assert await w.kernel.read_file("ns/f") == OLD[:10]


@live("s3")
async def test_what_is_missing_of_a_removed_object_is_stale(w: World) -> None:
    w.remote.put(b"f", OLD * 3)
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    assert await w.kernel.pread(handle, 0, 10) == OLD[:10]
    await w.remote.remove(b"f")
    with pytest.raises(Stale):
        await w.kernel.pread(handle, 2 * BLOCK_BYTES, 10)
    await w.kernel.close(handle)


@live("sftp")
async def test_an_answer_overtaken_by_an_upload_changes_nothing(w: World) -> None:
    """fstat(2) asked the remote before the file was cut and uploaded here; it said: larger."""
    w.remote.put(b"f", OLD)
    handle = await w.kernel.open("ns/f")
    assert await w.kernel.pread(handle, 0, 1) == b"o"
    content = w.kernel.node_of(handle).content
    assert content
    await w.kernel.pwrite(handle, len(OLD), NEW)
    await w.kernel.fsync(handle)
    held = w.cues.hold(m.StatOpen, stage="after")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(content.revalidate)
        await held.reached.wait()
        await w.kernel.ftruncate(handle, 1)
        await w.kernel.fsync(handle)
        held.go.set()
    assert (content.size, w.remote.get(b"f")) == (1, b"o")
    assert await w.kernel.pread(handle, 0, 10) == b"o"
    await w.kernel.close(handle)


@live()
async def test_attributes_set_here_keep_the_cache(w: World) -> None:
    """rsync sets the mtime after writing: what is cached of the file is not fetched again."""
    await w.kernel.write_file("ns/f", OLD)
    await w.kernel.setattr("ns/f", m.Attributes(mtime_ns=10**18))
    await w.store.save()
    fetches = w.cues.count(m.Fetch)
    assert await w.kernel.read_file("ns/f") == OLD
    assert w.cues.count(m.Fetch) == fetches
    assert (await w.kernel.stat("ns/f")).mtime_ns == 10**18


@live()
async def test_a_file_that_became_a_directory_is_one(w: World) -> None:
    w.remote.put(b"f", b"file")
    handle = await w.kernel.open("ns/f", RW)
    await w.remote.remove(b"f")
    await w.remote.make_directory(b"f", 0o755)
    w.clock.expire_attributes()
    assert await w.kernel.listdir("ns/f") == {}
    await w.kernel.close(handle)
