"""Files of which the journal takes no row: all stay in sight, and all are uploaded."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from hpcfs.content.content import Content
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import CacheFull, NoSpace, RemoteError
from hpcfs.protocol import messages as m
from tests.filesystem.world import RW, World, live, until

OLD, NEW = b"o" * BLOCK_BYTES, b"n" * BLOCK_BYTES


@contextmanager
def full(w: World, *methods: str) -> Iterator[None]:
    """Meanwhile these of the journal fail."""

    async def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.MonkeyPatch.context() as patch:
        for method in methods:
            patch.setattr(w.journal, method, fail)
        yield


def listed(w: World) -> list[bytes]:
    return [row.path for row in w.pending.pending()]


async def check_all_is_there(w: World, data: bytes) -> None:
    """So the remote has the one file, and nothing of it stays behind here."""
    await w.queue.drain()
    assert {path: w.remote.get(path) for path in w.remote.paths()} == {b"f": data}
    assert (listed(w), w.journal.rows) == ([], [])
    await until(lambda: not any(file.users for file in w.store.registry.files.values()))


@live(write="back")
async def test_a_file_whose_close_finds_no_room_is_listed_and_uploaded(w: World) -> None:
    held = w.cues.hold(m.Upload)
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, NEW)
    with full(w, "note"):
        with pytest.raises(CacheFull, match="the journal"):
            await w.kernel.close(handle)
        assert listed(w) == [b"f"]
    held.go.set()
    await check_all_is_there(w, NEW)


@live(write="back")
async def test_what_was_refused_and_is_changed_without_room_is_tried_again(w: World) -> None:
    await w.kernel.write_file("ns/f", OLD)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    with pytest.raises(RemoteError):
        await w.queue.wait_for(w.closer.dirty())
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, NEW)
    with full(w, "note"), pytest.raises(CacheFull):
        await w.kernel.close(handle)
    await check_all_is_there(w, NEW)


@live(write="through")
async def test_what_can_be_neither_uploaded_nor_kept_is_listed_and_tried_again(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, NEW)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"), times=2)
    with full(w, "strand"), pytest.raises(NoSpace):
        await w.kernel.close(handle)
    assert listed(w) == [b"f"]
    await check_all_is_there(w, NEW)


@live(write="back")
async def test_a_rename_without_room_in_the_journal_is_done(w: World) -> None:
    """It has begun here: to fail would be a lie, and nothing of the replaced file may go up."""
    await w.kernel.write_file("ns/f", OLD)
    await w.kernel.write_file("ns/tmp", NEW)
    with full(w, "note"):
        await w.kernel.rename("ns/tmp", "ns/f")
    assert await w.kernel.read_file("ns/f") == NEW
    assert not await w.kernel.exists("ns/tmp")
    assert listed(w) == [b"f"]
    await check_all_is_there(w, NEW)


@live(write="back")
async def test_a_rename_that_is_interrupted_once_it_has_begun_is_done(w: World) -> None:
    """While the checksums for the journal are computed."""
    await w.kernel.write_file("ns/f", OLD)
    await w.kernel.write_file("ns/tmp", NEW)
    handle = await w.kernel.open("ns/tmp")
    await w.kernel.pwrite(handle, 0, 2 * NEW)
    sum_written = Content.sum_written
    with pytest.MonkeyPatch.context() as patch, trio.CancelScope() as scope:

        async def interrupted(content: Content) -> None:
            scope.cancel()
            await trio.lowlevel.checkpoint()
            await sum_written(content)

        patch.setattr(Content, "sum_written", interrupted)
        await w.kernel.rename("ns/tmp", "ns/f")
    assert scope.cancel_called
    assert [(row.path, row.size) for row in w.journal.rows] == [(b"f", 2 * BLOCK_BYTES)]
    assert listed(w) == [b"f"]
    await w.kernel.close(handle)
    await check_all_is_there(w, 2 * NEW)
