"""O_APPEND: what programs append lands at the end that the file has, whoever else appends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import Conflict, Unreachable
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import WriteMode
from tests.filesystem.test_back import killed_and_mounted_again
from tests.filesystem.world import KINDS, RW, World, live, world

APPEND = os.O_WRONLY | os.O_APPEND
LOST = Unreachable("the connection was lost")
LINE = b"from here\n"
SHORT, LONG = b"line\n", b"a line of a log\n" * 9000
"""A part of a block, and several."""
in_both_modes = pytest.mark.parametrize("write", ["through", "back"])
of_any_length = pytest.mark.parametrize("old", [b"", SHORT, LONG], ids=["empty", "short", "long"])


async def _synced(w: World) -> None:
    await w.queue.wait_for(w.closer.dirty())


async def _append(w: World, path: str, data: bytes = LINE) -> None:
    handle = await w.kernel.open(path, APPEND)
    await w.kernel.pwrite(handle, 0, data)
    await w.kernel.close(handle)


@live()
async def test_the_end_is_the_mounts_whatever_the_kernel_believes(w: World) -> None:
    """The kernel's size is a second old: it says where O_APPEND is, and is wrong."""
    w.remote.put(b"log", SHORT)
    for flags in (APPEND, RW | os.O_APPEND):
        handle = await w.kernel.open("ns/log", flags)
        before = w.remote.get(b"log")
        await w.kernel.pwrite(handle, 1, LINE)
        await w.kernel.pwrite(handle, 10**6, LINE)
        await w.kernel.close(handle)
        assert w.remote.get(b"log") == before + LINE + LINE


@of_any_length
@in_both_modes
def test_what_others_appended_since_the_open_stays(
    write: WriteMode, old: bytes, tmp_path: Path
) -> None:
    """Also where a program that reads it has it open, and sees all of it."""

    async def story() -> None:
        async with world(tmp_path, "sftp", write=write) as w:
            w.remote.put(b"log", old)
            reader = await w.kernel.open("ns/log", os.O_RDONLY)
            assert await w.kernel.pread(reader, 0, 1 << 20) == old
            handle = await w.kernel.open("ns/log", APPEND)
            held = w.cues.hold(m.Upload)
            await w.kernel.pwrite(handle, 0, LINE)
            w.remote.append(b"log", LONG)
            held.go.set()
            await w.kernel.close(handle)
            await _synced(w)
            assert w.remote.get(b"log") == old + LONG + LINE
            w.clock.expire_attributes()
            assert (await w.kernel.fstat(reader)).size == len(old + LONG + LINE)
            assert await w.kernel.pread(reader, 0, 1 << 20) == old + LONG + LINE
            await w.kernel.close(reader)
            assert await w.kernel.read_file("ns/log") == old + LONG + LINE
            assert w.journal.rows == []

    trio.run(story)


@live("sftp")
async def test_an_end_that_somebody_else_looked_up_meanwhile_will_do(w: World) -> None:
    """A look at the name and the append itself follow the same growth; whoever comes second finds
    it followed."""
    w.remote.put(b"log", SHORT)
    handle = await w.kernel.open("ns/log", APPEND)
    w.remote.append(b"log", SHORT)
    looking = w.cues.hold(m.StatOpen)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.pwrite, handle, 0, LINE)
        await looking.reached.wait()
        w.remote.append(b"log", SHORT)
        w.clock.expire_attributes()
        await w.kernel.stat("ns/log")
        looking.go.set()
    await w.kernel.close(handle)
    assert w.remote.get(b"log") == 3 * SHORT + LINE


@live("sftp")
async def test_the_kernel_drops_what_others_moved(w: World) -> None:
    """Pages that it has of a file whose end was elsewhere on the remote are not its content."""
    w.remote.put(b"log", SHORT)
    handle = await w.kernel.open("ns/log", APPEND)
    node = w.kernel.node_of(handle)
    for theirs in (b"", b"theirs\n"):
        await w.kernel.pwrite(handle, 0, LINE)
        w.remote.append(b"log", theirs)
        node.kernel_is_behind = False
        await w.kernel.fsync(handle)
        opened = await w.fs.files.open(node, os.O_RDONLY)
        assert opened.keep_pages == opened.keep_attributes == (not theirs)
        await w.kernel.release(opened.handle)
    await w.kernel.close(handle)


@in_both_modes
def test_a_log_that_was_cut_gets_no_zeros(write: WriteMode, tmp_path: Path) -> None:
    """logrotate's copytruncate, between the write and its upload."""

    async def story() -> None:
        async with world(tmp_path, "sftp", write=write) as w:
            w.remote.put(b"log", LONG)
            handle = await w.kernel.open("ns/log", APPEND)
            held = w.cues.hold(m.Upload)
            await w.kernel.pwrite(handle, 0, LINE)
            w.remote.overwrite(b"log", SHORT)
            held.go.set()
            await w.kernel.close(handle)
            await _synced(w)
            assert w.remote.get(b"log") == SHORT + LINE
            assert await w.kernel.read_file("ns/log") == SHORT + LINE

    trio.run(story)


@live()
async def test_a_descriptor_that_stays_open_appends_to_what_is_there(w: World) -> None:
    """The file was changed after open(2), before the first write(2)."""
    for changed in (LONG + SHORT, SHORT):
        w.remote.put(b"log", LONG)
        w.clock.expire_attributes()
        handle = await w.kernel.open("ns/log", APPEND)
        w.remote.overwrite(b"log", changed)
        await w.kernel.pwrite(handle, 0, LINE)
        await w.kernel.close(handle)
        assert w.remote.get(b"log") == changed + LINE


@in_both_modes
def test_what_is_appended_during_an_upload_follows_it(write: WriteMode, tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path, "sftp", write=write) as w:
            w.remote.put(b"log", LONG)
            handle = await w.kernel.open("ns/log", APPEND)
            await w.kernel.pwrite(handle, 0, b"first\n")
            held = w.cues.hold(m.Upload)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(w.kernel.fsync, handle)
                await held.reached.wait()
                w.remote.append(b"log", b"theirs\n")
                await w.kernel.pwrite(handle, 0, b"second\n")
                held.go.set()
            w.remote.append(b"log", b"theirs again\n")
            await w.kernel.fsync(handle)
            await w.kernel.pwrite(handle, 0, b"third\n")
            await w.kernel.close(handle)
            await _synced(w)
            wanted = LONG + b"theirs\nfirst\ntheirs again\nsecond\nthird\n"
            assert w.remote.get(b"log") == wanted
            assert await w.kernel.read_file("ns/log") == wanted

    trio.run(story)


@in_both_modes
@pytest.mark.parametrize("stage", ["before", "after"])
def test_an_answer_that_was_lost_appends_nothing_twice(
    write: WriteMode, stage: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with world(tmp_path, "sftp", write=write) as w:
            w.remote.put(b"log", SHORT)
            handle = await w.kernel.open("ns/log", APPEND)
            await w.kernel.pwrite(handle, 0, LINE)
            w.cues.fail(m.Upload, LOST, stage=stage)
            with pytest.raises(Unreachable):
                await w.kernel.fsync(handle)
            w.remote.append(b"log", b"theirs\n")
            await w.kernel.close(handle)
            await _synced(w)
            found = w.remote.get(b"log")
            order = [LINE, b"theirs\n"] if stage == "after" else [b"theirs\n", LINE]
            assert found == SHORT + b"".join(order)
            assert await w.kernel.read_file("ns/log") == found

    trio.run(story)


def test_the_next_mount_appends_to_what_is_there_then(tmp_path: Path) -> None:
    async def left(w: World) -> None:
        w.remote.put(b"log", LONG)
        await _append(w, "ns/log")
        (row,) = w.journal.rows
        assert (row.appended, row.attempted, row.base_size) == (True, False, len(LONG))
        w.remote.append(b"log", b"theirs\n")

    async def then(w: World) -> None:
        await _append(w, "ns/log", b"and here\n")
        await _synced(w)
        wanted = LONG + b"theirs\n" + LINE + b"and here\n"
        assert w.remote.get(b"log") == wanted
        assert await w.kernel.read_file("ns/log") == wanted

    killed_and_mounted_again(tmp_path, "sftp", left, then)


def test_the_next_mount_appends_nothing_twice(tmp_path: Path) -> None:
    """The daemon was killed while it waited for the answer."""

    async def left(w: World) -> None:
        w.cues.clear()
        w.remote.put(b"log", LONG)
        w.cues.hold(m.Upload, stage="after")
        await _append(w, "ns/log")
        with trio.fail_after(10):
            while w.remote.get(b"log") != LONG + LINE:
                await trio.lowlevel.checkpoint()
        (row,) = w.journal.rows
        assert (row.appended, row.attempted) == (True, True)
        w.remote.append(b"log", b"theirs\n")

    async def then(w: World) -> None:
        await _synced(w)
        assert w.remote.get(b"log") == LONG + LINE + b"theirs\n"

    killed_and_mounted_again(tmp_path, "sftp", left, then)


@in_both_modes
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_only_appended_is_a_conflict(
    kind: str, write: WriteMode, tmp_path: Path
) -> None:
    """On S3 an object is replaced whole: there appending is, too."""

    async def story() -> None:
        async with world(tmp_path, kind, write=write) as w:
            w.remote.put(b"log", LONG)
            writer = await w.kernel.open("ns/log", RW)
            appender = await w.kernel.open("ns/log", APPEND)
            assert await w.kernel.pread(writer, 0, 1 << 20) == LONG
            await w.kernel.pwrite(appender, 0, LINE)
            if w.remote.is_sftp:
                await w.kernel.pwrite(writer, 0, b"A")
            w.remote.append(b"log", b"theirs\n")
            with pytest.raises(Conflict):
                await w.kernel.fsync(appender)
            for handle in (writer, appender):
                await w.kernel.release(handle)
            assert w.remote.get(b"log") == LONG + b"theirs\n"
            (beside,) = w.remote.paths().keys() - {b"log"}
            changed = b"A" + LONG[1:] if w.remote.is_sftp else LONG
            assert w.remote.get(beside) == changed + LINE

    trio.run(story)


@live("sftp")
async def test_a_file_that_was_removed_is_not_made_again(w: World) -> None:
    w.remote.put(b"log", b"x" * BLOCK_BYTES)
    handle = await w.kernel.open("ns/log", APPEND)
    await w.kernel.pwrite(handle, 0, LINE)
    await w.remote.remove(b"log")
    with pytest.raises(Conflict):
        await w.kernel.close(handle)
    assert b"log" not in w.remote.paths()


@in_both_modes
def test_writers_of_one_file_follow_it_together(write: WriteMode, tmp_path: Path) -> None:
    """A descriptor that stays open, and one for each line, in turns with others: what only writes
    has read nothing, so that nothing keeps it from following the file."""

    async def story() -> None:
        async with world(tmp_path, "sftp", write=write) as w:
            w.remote.put(b"log", b"")
            kept = await w.kernel.open("ns/log", APPEND)
            for _ in range(2):  # nobody else appends meanwhile
                await _append(w, "ns/log")
                await _synced(w)
            held = w.cues.hold(m.Upload)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_append, w, "ns/log")
                await held.reached.wait()
                w.remote.append(b"log", SHORT)
                held.go.set()
            await _synced(w)
            w.remote.append(b"log", SHORT)
            await w.kernel.pwrite(kept, 0, LINE)
            await w.kernel.close(kept)
            await _synced(w)
            assert w.remote.get(b"log") == LINE * 2 + SHORT + LINE + SHORT + LINE

    trio.run(story)
