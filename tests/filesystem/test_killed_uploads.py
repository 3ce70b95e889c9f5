"""Killed while an upload is under way, or while a file without a name is written: the next mount
brings what was under way, and nothing that a program removed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpcfs.model.entries import BLOCK_BYTES, Attributes
from hpcfs.model.errors import Conflict, NotConnected, Stale
from hpcfs.protocol.messages import Upload
from hpcfs.site.namespace import WriteMode
from tests.filesystem.test_back import killed_and_mounted_again
from tests.filesystem.world import KINDS, World, live

OLD, NEW = b"o" * BLOCK_BYTES, b"n" * 100
MODES: tuple[WriteMode, ...] = ("through", "back")


async def _settled(w: World) -> None:
    await w.queue.wait_for(w.closer.dirty())
    assert w.journal.rows == []


async def _under_way(w: World) -> None:
    """The next upload has begun, and goes no further."""
    w.cues.clear()
    held = w.cues.hold(Upload)
    w.queue.retry(*w.closer.dirty())
    await held.reached.wait()
    w.cues.clear()
    w.cues.fail(Upload, NotConnected("the link is down"), times=1000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_sets_the_attributes_that_were_under_way(kind: str, tmp_path: Path) -> None:
    async def left(w: World) -> None:
        w.remote.put(b"f", b"old")
        await w.kernel.write_file("ns/f", b"content")
        await w.kernel.setattr("ns/f", Attributes(mode=0o600, mtime_ns=10**18))
        await _under_way(w)

    async def then(w: World) -> None:
        await _settled(w)
        item = w.remote.paths()[b"f"]
        assert (stat.S_IMODE(item.mode), item.mtime_ns) == (0o600, 10**18)
        assert bytes(item.content) == b"content"

    killed_and_mounted_again(tmp_path, kind, left, then)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_cuts_what_was_being_cut(kind: str, tmp_path: Path) -> None:
    async def left(w: World) -> None:
        w.remote.put(b"f", b"old content")
        handle = await w.kernel.open("ns/f")
        await w.kernel.ftruncate(handle, 3)
        await w.kernel.close(handle)
        await _under_way(w)

    async def then(w: World) -> None:
        await _settled(w)
        assert w.remote.get(b"f") == b"old"

    killed_and_mounted_again(tmp_path, kind, left, then)


@pytest.mark.parametrize("write", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_written_after_it_was_removed_does_not_come_back(
    kind: str, write: WriteMode, tmp_path: Path
) -> None:
    async def left(w: World) -> None:
        handle = await w.kernel.open("ns/f", os.O_RDWR | os.O_CREAT)
        await w.kernel.unlink("ns/f")
        await w.kernel.pwrite(handle, 0, b"a temporary file")
        assert await w.kernel.pread(handle, 0, 100) == b"a temporary file"
        assert w.journal.rows == []

    async def then(w: World) -> None:
        await _settled(w)
        assert w.remote.paths() == {}

    killed_and_mounted_again(tmp_path, kind, left, then, write=write)


@live()
async def test_what_was_kept_stays_when_a_program_writes_on(w: World) -> None:
    """Others replaced the file, and of the older version only a part was ever fetched here."""
    w.remote.put(b"f", OLD * 2)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, NEW)
    w.remote.overwrite(b"f", b"theirs")
    with pytest.raises(Conflict, match="is kept"):
        await w.kernel.fsync(handle)
    with pytest.raises(Stale):
        await w.kernel.pwrite(handle, 0, b"again")
    await w.kernel.close(handle)
    (kept,) = w.kept_bytes()
    assert kept.startswith(NEW)
