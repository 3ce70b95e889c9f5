"""Uploads that broke off: the remote may have the file, a part of it, or nothing. What programs do
to such a file next is done to what the remote has, too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from hpcfs.model.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    NoSpace,
    NotConnected,
    Unreachable,
)
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import WriteMode
from tests.filesystem.test_back import killed_and_mounted_again
from tests.filesystem.world import KINDS, RW, World, world

MODES: tuple[WriteMode, ...] = ("through", "back")
STAGES = ("before", "after", "half-way")
"""The answer was lost before the remote did anything, or after it did all; or it refused the rest
of what it had begun to write."""
every_world = pytest.mark.parametrize(
    ("kind", "write", "stage"),
    [(kind, write, stage) for kind in KINDS for write in MODES for stage in STAGES],
)
"""Remote, mode, and how far the upload came."""


async def _broken(w: World, path: str, stage: str, data: bytes = b"content") -> int:
    """A new file whose upload broke off, still open. Without another attempt by itself."""
    handle = await w.kernel.open(path, RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, data)
    if stage == "half-way":
        w.cues.fail(m.Upload, NoSpace("the disk is full"))
        if w.remote.is_sftp:  # which writes in place
            w.remote.put(path.removeprefix("ns/").encode(), data[: len(data) // 2])
    else:
        w.cues.fail(m.Upload, Unreachable("the connection was lost"), stage=stage)
    with pytest.raises((Unreachable, NoSpace)):
        await w.kernel.fsync(handle)
    return handle


async def _settled(w: World) -> None:
    await w.queue.wait_for(w.closer.dirty())


@every_world
def test_a_removed_file_does_not_come_back(
    kind: str, write: WriteMode, stage: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with world(tmp_path, kind, write=write) as w:
            handle = await _broken(w, "ns/f", stage)
            await w.kernel.unlink("ns/f")
            assert w.remote.paths() == {}
            await w.kernel.close(handle)
            await _settled(w)
            assert w.remote.paths() == {}
            assert not await w.kernel.exists("ns/f")
            assert w.journal.rows == []

    trio.run(story)


@every_world
def test_a_renamed_file_has_one_name(
    kind: str, write: WriteMode, stage: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with world(tmp_path, kind, write=write) as w:
            handle = await _broken(w, "ns/f", stage)
            await w.kernel.rename("ns/f", "ns/g")
            await w.kernel.close(handle)
            await _settled(w)
            assert set(w.remote.paths()) == {b"g"}
            assert w.remote.get(b"g") == b"content"
            assert set(await w.kernel.listdir("ns")) == {b"g"}

    trio.run(story)


@every_world
def test_a_file_that_is_renamed_over_goes(
    kind: str, write: WriteMode, stage: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with world(tmp_path, kind, write=write) as w:
            handle = await _broken(w, "ns/f", stage)
            await w.kernel.write_file("ns/new", b"another")
            with pytest.raises(AlreadyExists):
                await w.kernel.rename("ns/new", "ns/f", replace=False)
            await w.kernel.rename("ns/new", "ns/f")
            await w.kernel.close(handle)
            await _settled(w)
            assert set(w.remote.paths()) == {b"f"}
            assert w.remote.get(b"f") == await w.kernel.read_file("ns/f") == b"another"

    trio.run(story)


@every_world
def test_its_directory_counts_as_full_until_it_is_removed(
    kind: str, write: WriteMode, stage: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with world(tmp_path, kind, write=write) as w:
            await w.kernel.mkdir("ns/d")
            handle = await _broken(w, "ns/d/f", stage)
            with pytest.raises(DirectoryNotEmpty):
                await w.kernel.rmdir("ns/d")
            await w.kernel.unlink("ns/d/f")
            await w.kernel.close(handle)
            await w.kernel.rmdir("ns/d")
            await _settled(w)
            assert w.remote.paths() == {}

    trio.run(story)


@every_world
def test_it_is_truncated_and_linked_as_any_other(
    kind: str, write: WriteMode, stage: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with world(tmp_path, kind, write=write) as w:
            handle = await _broken(w, "ns/f", stage)
            await w.kernel.truncate("ns/f", 3)
            if w.remote.is_sftp:
                await w.fs.link((await w.kernel.walk("ns/f")).ino, *await w.kernel.parent("ns/g"))
                assert w.remote.get(b"g") == b"con"
            await w.kernel.unlink("ns/f")
            await w.kernel.close(handle)
            await _settled(w)
            assert set(w.remote.paths()) == ({b"g"} if w.remote.is_sftp else set())

    trio.run(story)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_removes_it_from_the_remote_too(kind: str, tmp_path: Path) -> None:
    async def left(w: World) -> None:
        w.cues.clear()
        await _broken(w, "ns/f", "after")
        w.cues.fail(m.Upload, NotConnected("the link is down"), times=1000)
        (row,) = w.journal.rows
        assert (row.new, row.attempted) == (True, True)
        assert w.remote.get(b"f") == b"content"

    async def then(w: World) -> None:
        held = w.cues.hold(m.Upload)
        await w.kernel.unlink("ns/f")
        assert w.remote.paths() == {}
        held.go.set()
        await _settled(w)
        assert w.remote.paths() == {}

    killed_and_mounted_again(tmp_path, kind, left, then)
