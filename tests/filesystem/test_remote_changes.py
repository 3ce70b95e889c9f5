"""Others change files on the remote: what is seen when, and that versions are never mixed."""

from __future__ import annotations

import os

import pytest
import trio

from hpcfs.model.entries import BLOCK_BYTES, Attributes
from hpcfs.model.errors import Stale
from hpcfs.protocol import messages as m
from tests.filesystem.test_uploads import MANY
from tests.filesystem.world import RW, World, live, until

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
    w.remote.put(b"f", OLD * MANY)
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
    w.remote.put(b"f", OLD * MANY)
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
        nursery.start_soon(content.reader.base.revalidate)
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
    await w.kernel.setattr("ns/f", Attributes(mtime_ns=10**18))
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


# --- between a look, an open and a read -----------------------------------------------------------


@live()
async def test_what_is_replaced_after_open_is_read_as_it_was(w: World) -> None:
    """A file of settings that a job replaces all the time: old or new, never cut and no error."""
    for old, new in [(OLD, NEW * 3), (OLD * 3, NEW), (OLD, NEW)]:
        w.remote.put(b"f", old)
        w.clock.expire_attributes()
        handle = await w.kernel.open("ns/f", os.O_RDONLY)
        size = (await w.kernel.fstat(handle)).size
        w.remote.put(b"f", new)
        assert (size, await w.kernel.pread(handle, 0, size)) == (len(old), old)
        w.clock.expire_attributes()
        assert (await w.kernel.fstat(handle)).size == len(old)
        await w.kernel.close(handle)
        assert await w.kernel.read_file("ns/f") == new


@live()
async def test_what_is_removed_after_open_is_read_as_it_was(w: World) -> None:
    w.remote.put(b"f", OLD * 2)
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    await w.remote.remove(b"f")
    assert await w.kernel.pread(handle, 0, 3 * BLOCK_BYTES) == OLD * 2
    await w.kernel.close(handle)


@live()
async def test_open_tells_that_the_kernels_attributes_are_old(w: World) -> None:
    """The kernel would cut what is read at the size it was told a moment before."""
    for old, new in [(b"old", b"new and longer"), (b"old and longer", b"new")]:
        w.remote.put(b"f", old)
        w.clock.expire_attributes()
        node = await w.kernel.walk("ns/f")
        node.kernel_is_behind = False  # as after each answer to the kernel
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_APPEND):
            opened = await w.fs.files.open(node, flags)
            assert opened.keep_attributes
            await w.kernel.release(opened.handle)
        w.remote.put(b"f", new)
        w.clock.seconds += 0.3
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_APPEND):
            opened = await w.fs.files.open(node, flags)
            assert not opened.keep_attributes
            assert node.entry.size == w.fs.files.get(opened.handle).content.size == len(new)
            await w.kernel.release(opened.handle)


@live("sftp")
async def test_a_file_that_is_open_elsewhere_is_opened_as_it_is_now(w: World) -> None:
    w.remote.put(b"log", b"line\n")
    follower = await w.kernel.open("ns/log", os.O_RDONLY)
    assert await w.kernel.pread(follower, 0, 100) == b"line\n"
    w.kernel.node_of(follower).kernel_is_behind = False
    w.remote.append(b"log", b"another\n")
    w.clock.seconds += 0.3
    node = await w.kernel.walk("ns/log")
    opened = await w.fs.files.open(node, os.O_RDONLY)
    assert not opened.keep_attributes
    assert await w.kernel.pread(opened.handle, 0, 100) == b"line\nanother\n"
    for handle in (opened.handle, follower):
        await w.kernel.close(handle)


@live()
async def test_a_file_replaced_while_it_is_opened_is_one_or_the_other(w: World) -> None:
    """Between any two steps of open(2)."""
    for step in range(1, 5):
        w.remote.put(b"f", OLD)
        w.clock.expire_attributes()
        await w.kernel.stat("ns/f")
        w.remote.put(b"f", NEW * 2)
        w.clock.seconds += 0.3
        handles: list[int] = []
        calls = len(w.cues.calls)

        async def open_it(handles: list[int] = handles) -> None:
            handles.append(await w.kernel.open("ns/f", os.O_RDONLY))

        held = w.cues.hold(m.Request.__args__, nth=step, stage="after")  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await until(lambda held=held, handles=handles: held.reached.is_set() or bool(handles))
            w.remote.put(b"f", b"last")
            held.go.set()
        w.cues.clear()
        assert len(w.cues.calls) > calls
        (handle,) = handles
        found = await w.kernel.pread(handle, 0, 1 << 20)
        assert found in (OLD, NEW * 2, b"last")
        assert len(found) == (await w.kernel.fstat(handle)).size
        await w.kernel.close(handle)
