"""A cache whose disk is slow or full: files that are only read are cached in memory meanwhile."""

from __future__ import annotations

import os
import random

import pytest
import trio

from hpcfs.cache.file import CacheFile
from hpcfs.cache.memory_files import MAX_FILES
from hpcfs.content.content import Content
from hpcfs.daemon import warm
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import CacheFileGone, CacheFull, PermissionDenied, Stale
from hpcfs.protocol import messages as m
from tests.filesystem.world import RW, World, live

DATA = random.Random(5).randbytes(40 * BLOCK_BYTES + 1000)
FULL = CacheFull("the local disk with the cache is full")


def _content(w: World, handle: int) -> Content:
    content = w.kernel.node_of(handle).content
    assert content
    return content


def _file(w: World, handle: int) -> CacheFile:
    return _content(w, handle).file


def _disk_bytes(w: World) -> int:
    return sum(path.stat().st_blocks * 512 for path in (w.directory / "data").glob("*/*"))


async def _read(w: World, handle: int, step: int = 2 * BLOCK_BYTES) -> bytes:
    return b"".join(
        [bytes(await w.kernel.pread(handle, at, step)) for at in range(0, len(DATA), step)]
    )


@live(max_blocks=200)
async def test_a_file_that_is_read_stays_off_a_slow_disk(w: World) -> None:
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    assert await _read(w, handle) == DATA
    assert _file(w, handle).in_memory
    assert w.store.used_bytes == _disk_bytes(w) == 0
    await w.kernel.close(handle)
    fetched = len(w.cues.calls)
    assert await w.kernel.read_file("ns/f") == DATA
    assert not [call for call in w.cues.calls[fetched:] if isinstance(call, m.Fetch)]
    await w.store.save()
    assert not w.store.registry.files, "it goes as soon as nobody uses it"
    assert not list((w.directory / "data").glob("*/*")), "and leaves nothing behind"


@live(max_blocks=200)
async def test_an_open_file_leaves_the_disk_when_that_becomes_slow(w: World) -> None:
    """Also while fetches are under way; what the index knew of it stays on the disk."""
    w.remote.put(b"f", DATA)
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    await w.kernel.pread(handle, 0, 4 * BLOCK_BYTES)
    await _content(w, handle).reader.fetcher.wait_idle()
    await w.store.save()
    known = w.store.used_bytes
    held = w.cues.hold(m.Fetch, stage="middle")
    start = 30 * BLOCK_BYTES
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await w.kernel.pread(handle, start, 5000) == DATA[start : start + 5000]

        nursery.start_soon(read)
        await held.reached.wait()
        w.set_slow_disk()
        assert await w.kernel.pread(handle, 20 * BLOCK_BYTES, 9) == DATA[20 * BLOCK_BYTES :][:9]
        assert _file(w, handle).in_memory
        held.go.set()
    assert await _read(w, handle) == DATA
    await w.kernel.close(handle)
    await w.store.save()
    assert w.store.used_bytes == known > 0
    w.set_slow_disk(False)
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    assert _file(w, handle).cached_bytes == known, "and is used again"
    assert await _read(w, handle) == DATA
    await w.kernel.close(handle)


@live(max_blocks=200)
async def test_what_is_written_is_on_the_disk(w: World) -> None:
    """Though the file was in memory before, with a reader and fetches under way."""
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    reader = await w.kernel.open("ns/f", os.O_RDONLY)
    await w.kernel.pread(reader, 0, 4 * BLOCK_BYTES)
    assert _file(w, reader).in_memory
    writer = await w.kernel.open("ns/f", RW)
    await w.kernel.pwrite(writer, BLOCK_BYTES + 7, b"written")
    file = _file(w, writer)
    assert not file.in_memory
    assert os.path.samestat(os.stat(file.path), os.fstat(file.fd))
    expected = bytearray(DATA)
    expected[BLOCK_BYTES + 7 : BLOCK_BYTES + 14] = b"written"
    assert await _read(w, reader) == expected
    assert not file.in_memory, "nor does it leave the disk again"
    w.cues.fail(m.Upload, PermissionDenied("no"), times=9)
    with pytest.raises(PermissionDenied):
        await w.kernel.close(writer)
    await w.kernel.release(reader)
    (kept,) = w.kept_bytes()
    assert kept[BLOCK_BYTES + 7 : BLOCK_BYTES + 14] == b"written"


@live(max_blocks=200)
async def test_memory_is_bounded_and_what_came_first_goes_first(w: World) -> None:
    w.store.memory.max_bytes = 16 * BLOCK_BYTES
    w.set_slow_disk()
    handles = []
    for name in (b"a", b"b"):
        w.remote.put(name, DATA)
        handles.append(await w.kernel.open(f"ns/{name.decode()}", os.O_RDONLY))
    for at in range(0, len(DATA), BLOCK_BYTES):
        for handle in handles:
            w.fs.files.get(handle).content.reader.fetcher.cancel_all()
            assert await w.kernel.pread(handle, at, 100) == DATA[at : at + 100]
            held = sum(os.fstat(_file(w, handle).fd).st_blocks * 512 for handle in handles)
            assert held <= 16 * BLOCK_BYTES
    for handle in handles:
        assert _file(w, handle).blocks.is_present(40)
        await w.kernel.close(handle)


@live(max_blocks=200)
async def test_reading_goes_on_where_the_disk_has_no_room_at_all(w: World) -> None:
    w.remote.put(b"f", DATA)
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    w.cues.fail(m.Fetch, FULL)
    assert await _read(w, handle) == DATA
    assert _file(w, handle).in_memory
    await w.kernel.close(handle)


@live(max_blocks=200)
async def test_a_disk_that_fails_fails_the_writer_and_not_the_reader(w: World) -> None:
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    handle = await w.kernel.open("ns/f", RW)
    assert await w.kernel.pread(handle, 0, 9) == DATA[:9]
    assert _file(w, handle).in_memory
    data = w.directory / "data"
    data.rename(w.directory / "elsewhere")
    data.write_bytes(b"")
    with pytest.raises(OSError, match="Not a directory"):
        await w.kernel.pwrite(handle, 0, b"x")
    assert await w.kernel.pread(handle, 0, 9) == DATA[:9]
    data.unlink()
    (w.directory / "elsewhere").rename(data)
    await w.kernel.pwrite(handle, 0, b"x")
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == b"x" + DATA[1:]


@live(max_blocks=200)
async def test_what_was_replaced_by_others_is_read_on_but_not_written(w: World) -> None:
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    handle = await w.kernel.open("ns/f", RW)
    assert await w.kernel.pread(handle, 0, 9) == DATA[:9]
    w.remote.put(b"f", b"another")
    w.clock.expire_attributes()
    assert (await w.kernel.stat("ns/f")).size == 7
    with pytest.raises(Stale):
        await w.kernel.pwrite(handle, 0, b"x")
    assert await w.kernel.pread(handle, 0, 9) == DATA[:9]
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == b"another"


@live(max_blocks=200)
async def test_a_file_that_is_removed_while_it_is_read_stays_readable(w: World) -> None:
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    await w.kernel.pread(handle, 0, 9)
    await w.kernel.unlink("ns/f")
    assert not w.remote.paths()
    assert await _read(w, handle) == DATA
    await w.kernel.close(handle)


@live(max_blocks=200)
async def test_what_the_user_wants_cached_goes_to_the_slow_disk(w: World) -> None:
    async def tell(done: int, total: int) -> None:
        pass

    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    await warm.warm(w.fs, w.store, b"ns/f", tell)
    await w.store.save()
    assert w.store.used_bytes == len(DATA)


@live(max_blocks=200)
async def test_a_renamed_file_in_memory_goes_by_its_new_name(w: World) -> None:
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    await w.kernel.pread(handle, 0, 9)
    await w.kernel.rename("ns/f", "ns/g")
    assert await _read(w, handle) == DATA
    assert _file(w, handle).in_memory
    assert _file(w, handle).key == b"g"
    await w.kernel.close(handle)


@live(max_blocks=200)
async def test_where_memory_cannot_be_used_the_slow_disk_is(w: World) -> None:
    w.remote.put(b"f", DATA)
    w.set_slow_disk()
    handle = await w.kernel.open("ns/f", os.O_RDONLY)
    w.cues.fail(m.Fetch, CacheFileGone("the cache file can't be opened: Permission denied"))
    assert await _read(w, handle) == DATA
    assert not _file(w, handle).in_memory
    await w.kernel.close(handle)


@live(max_blocks=200)
async def test_more_readers_than_memory_serves_use_the_disk(w: World) -> None:
    w.set_slow_disk()
    w.remote.put(b"g", DATA)
    for number in range(MAX_FILES + 2):
        w.remote.put(b"f%d" % number, DATA[:100])
    handles = []
    for number in range(MAX_FILES + 2):
        handles.append(await w.kernel.open(f"ns/f{number}", os.O_RDONLY))
        assert await w.kernel.pread(handles[-1], 0, 200) == DATA[:100]
    assert sum(_file(w, handle).in_memory for handle in handles) == MAX_FILES
    for handle in handles:
        await w.kernel.close(handle)
    handle = await w.kernel.open("ns/g", os.O_RDONLY)
    assert await _read(w, handle) == DATA
    assert _file(w, handle).in_memory
    await w.kernel.close(handle)
