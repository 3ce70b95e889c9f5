"""Reading: what is asked of the remote, in which order, and what is not asked at all."""

from __future__ import annotations

import os

import trio

from hpcfs.content.base import VOUCH_SECONDS
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.prefetch.readahead import FIRST_WINDOW_BYTES
from hpcfs.protocol import messages as m
from tests.filesystem.world import World, live, until

READ = 2 * BLOCK_BYTES
DATA = os.urandom(256) * (256 * BLOCK_BYTES // 256)


def _fetches(w: World) -> list[m.Fetch]:
    return [call for call in w.cues.calls if isinstance(call, m.Fetch) and call.length]


async def _open(w: World) -> int:
    w.remote.put(b"f", DATA)
    return await w.kernel.open("ns/f", os.O_RDONLY)


@live(max_blocks=2000)
async def test_a_random_read_fetches_its_blocks_and_nothing_else(w: World) -> None:
    handle = await _open(w)
    for block in (200, 17, 101, 60, 239):
        offset = block * BLOCK_BYTES + 4096
        assert await w.kernel.pread(handle, offset, 4096) == DATA[offset : offset + 4096]
    assert [(call.offset, call.length) for call in _fetches(w)] == [
        (block * BLOCK_BYTES, BLOCK_BYTES) for block in (200, 17, 101, 60, 239)
    ]
    assert all(call.urgent for call in _fetches(w))
    await w.kernel.close(handle)


@live(max_blocks=2000)
async def test_what_a_reader_waits_for_is_asked_for_first_and_as_urgent(w: World) -> None:
    handle = await _open(w)
    await w.kernel.pread(handle, 0, READ)
    w.cues.calls.clear()
    assert await w.kernel.pread(handle, READ, READ) == DATA[READ : 2 * READ]
    await until(lambda: len(_fetches(w)) > 1)
    waited, *ahead = _fetches(w)
    assert (waited.offset, waited.urgent) == (READ, True)
    assert not any(call.urgent for call in ahead)
    assert sum(call.length for call in ahead) == FIRST_WINDOW_BYTES
    await w.kernel.close(handle)


@live(max_blocks=2000)
async def test_a_sequential_reader_gets_the_whole_file_in_order(w: World) -> None:
    handle = await _open(w)
    for offset in range(0, len(DATA), READ):
        assert await w.kernel.pread(handle, offset, READ) == DATA[offset : offset + READ]
    offsets = [call.offset for call in _fetches(w)]
    assert offsets == sorted(offsets)
    assert sum(call.length for call in _fetches(w)) == len(DATA), "each byte once"
    assert len(offsets) < 0.7 * len(DATA) / READ, "in larger pieces than were read"
    await w.kernel.close(handle)


@live(max_blocks=2000)
async def test_what_runs_ahead_of_a_reader_who_closed_is_cancelled(w: World) -> None:
    handle = await _open(w)
    await w.kernel.pread(handle, 0, READ)
    held = w.cues.hold(m.Fetch, nth=2)
    await w.kernel.pread(handle, READ, READ)
    await held.reached.wait()
    content = w.kernel.node_of(handle).content
    assert content
    assert content.reader.fetcher.flights
    await w.kernel.close(handle)
    await until(lambda: not content.reader.fetcher.flights)
    assert not held.go.is_set()


@live(max_blocks=2000)
async def test_a_writer_does_not_wait_for_what_only_runs_ahead(w: World) -> None:
    w.remote.put(b"f", DATA)
    handle = await w.kernel.open("ns/f", os.O_RDWR)
    held = w.cues.hold(m.Fetch)
    content = w.kernel.node_of(handle).content
    assert content
    content.reader.prefetch(0, 4 * BLOCK_BYTES)
    await held.reached.wait()
    with trio.fail_after(5):
        await w.kernel.pwrite(handle, 0, b"n" * 4 * BLOCK_BYTES)
        await w.kernel.fsync(handle)
    assert await w.kernel.pread(handle, 0, 8) == b"n" * 8
    await w.kernel.close(handle)


@live(max_blocks=2000)
async def test_two_readers_of_one_file_fetch_each_byte_once(w: World) -> None:
    one = await _open(w)
    other = await w.kernel.open("ns/f", os.O_RDONLY)

    async def read(handle: int) -> None:
        for offset in range(0, len(DATA), READ):
            assert await w.kernel.pread(handle, offset, READ) == DATA[offset : offset + READ]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, one)
        nursery.start_soon(read, other)
    assert sum(call.length for call in _fetches(w)) == len(DATA)
    await w.kernel.close(one)
    await w.kernel.close(other)


@live(max_blocks=2000)
async def test_reading_from_the_remote_vouches_for_size_and_times(w: World) -> None:
    """Reading on asks for no attributes: a fetch already says that the version is the same."""
    handle = await _open(w)
    w.cues.calls.clear()
    began, block = w.clock.seconds, 0
    while w.clock.seconds - began < VOUCH_SECONDS - ATTRIBUTE_SECONDS:
        await w.kernel.pread(handle, block * BLOCK_BYTES, 4096)
        w.clock.seconds += 0.9 * ATTRIBUTE_SECONDS
        await w.kernel.fstat(handle)
        block = (block * 5 + 7) % 256
    assert not any(isinstance(call, m.Stat | m.StatOpen) for call in w.cues.calls)
    w.clock.seconds += VOUCH_SECONDS
    await w.kernel.pread(handle, block * BLOCK_BYTES, 4096)
    await w.kernel.fstat(handle)
    assert any(isinstance(call, m.Stat | m.StatOpen) for call in w.cues.calls)
    await w.kernel.close(handle)
