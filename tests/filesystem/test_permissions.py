"""Modes where the remote is no judge: cached files, and S3. The mount is an ordinary user's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from hpcfs.filesystem.errors import NotPermitted
from hpcfs.transfer import messages as m
from tests.filesystem.world import KINDS, World, world


def run(kind: str, directory: Path, body: object) -> None:
    async def main() -> None:
        async with world(directory, kind) as w:
            await body(w)  # type: ignore[operator]

    trio.run(main)


async def mode_of(w: World, path: str) -> int:
    return stat.S_IMODE((await w.kernel.stat(path)).mode)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_own_files_are_heeded(kind: str, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        kernel = w.kernel
        await kernel.write_file("ns/f", b"content")
        await kernel.setattr("ns/f", m.Attributes(mode=0o200))
        with pytest.raises(NotPermitted):
            await kernel.open("ns/f", os.O_RDONLY)
        with pytest.raises(NotPermitted):
            await w.fs.access((await kernel.walk("ns/f")).ino, os.R_OK)
        await kernel.close(await kernel.open("ns/f", os.O_WRONLY))
        await kernel.setattr("ns/f", m.Attributes(mode=0o400))
        with pytest.raises(NotPermitted):
            await kernel.open("ns/f", os.O_RDWR)
        with pytest.raises(NotPermitted):
            await kernel.truncate("ns/f", 3)
        assert await kernel.read_file("ns/f") == b"content"

    run(kind, tmp_path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_directories_are_heeded_where_the_remote_does_not(
    kind: str, tmp_path: Path
) -> None:
    async def body(w: World) -> None:
        kernel = w.kernel
        await kernel.mkdir("ns/d")
        await kernel.write_file("ns/d/f", b"content")
        await kernel.setattr("ns/d", m.Attributes(mode=0o500))
        if kind == "sftp":  # the server would say it, which the one in memory does not
            await kernel.unlink("ns/d/f")
            return
        with pytest.raises(NotPermitted):
            await kernel.unlink("ns/d/f")
        with pytest.raises(NotPermitted):
            await kernel.rename("ns/d/f", "ns/f")
        with pytest.raises(NotPermitted):
            await kernel.write_file("ns/d/new", b"")
        assert await kernel.read_file("ns/d/f") == b"content"
        await kernel.setattr("ns/d", m.Attributes(mode=0o600))
        with pytest.raises(NotPermitted):
            await kernel.stat("ns/d/f")

    run(kind, tmp_path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_clears_the_set_user_id_bit(kind: str, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        kernel = w.kernel
        await kernel.write_file("ns/f", b"content")
        for mode, left in ((0o6755, 0o755), (0o2745, 0o2745), (0o1755, 0o1755)):
            await kernel.setattr("ns/f", m.Attributes(mode=mode))
            handle = await kernel.open("ns/f", os.O_RDWR)
            assert await mode_of(w, "ns/f") == mode
            await kernel.pwrite(handle, 0, b"CON")
            assert await mode_of(w, "ns/f") == left
            await kernel.close(handle)
            assert await mode_of(w, "ns/f") == left
            assert stat.S_IMODE((await w.remotes["ns"].stat(b"f")).mode) == left

    run(kind, tmp_path, body)
