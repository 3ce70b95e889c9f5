"""Modes where the remote is no judge: cached files, and S3. The mount is an ordinary user's."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import Conflict, NotOwner, PermissionDenied, ReadOnly
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import WriteMode
from tests.filesystem.world import KINDS, World, world
from tests.support.memory_remote import GID, UID, Item
from tests.support.mounts import WRITE_MODES

COLLEAGUE, PROJECT, FOREIGN = 2000, 3000, 4000
NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY


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
        await kernel.setattr("ns/f", Attributes(mode=0o200))
        with pytest.raises(PermissionDenied):
            await kernel.open("ns/f", os.O_RDONLY)
        with pytest.raises(PermissionDenied):
            await w.fs.access((await kernel.walk("ns/f")).ino, os.R_OK)
        await kernel.close(await kernel.open("ns/f", os.O_WRONLY))
        await kernel.setattr("ns/f", Attributes(mode=0o400))
        with pytest.raises(PermissionDenied):
            await kernel.open("ns/f", os.O_RDWR)
        with pytest.raises(PermissionDenied):
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
        await kernel.setattr("ns/d", Attributes(mode=0o500))
        if kind == "sftp":  # the server would say it, which the one in memory does not
            await kernel.unlink("ns/d/f")
            return
        with pytest.raises(PermissionDenied):
            await kernel.unlink("ns/d/f")
        with pytest.raises(PermissionDenied):
            await kernel.rename("ns/d/f", "ns/f")
        with pytest.raises(PermissionDenied):
            await kernel.write_file("ns/d/new", b"")
        assert await kernel.read_file("ns/d/f") == b"content"
        await kernel.setattr("ns/d", Attributes(mode=0o600))
        with pytest.raises(PermissionDenied):
            await kernel.stat("ns/d/f")

    run(kind, tmp_path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_clears_the_set_user_id_bit(kind: str, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        kernel = w.kernel
        await kernel.write_file("ns/f", b"content")
        for mode, left in ((0o6755, 0o755), (0o2745, 0o2745), (0o1755, 0o1755)):
            await kernel.setattr("ns/f", Attributes(mode=mode))
            handle = await kernel.open("ns/f", os.O_RDWR)
            assert await mode_of(w, "ns/f") == mode
            await kernel.pwrite(handle, 0, b"CON")
            assert await mode_of(w, "ns/f") == left
            await kernel.close(handle)
            assert await mode_of(w, "ns/f") == left
            assert stat.S_IMODE((await w.remotes["ns"].stat(b"f")).mode) == left

    run(kind, tmp_path, body)


# --- the remote decides -----------------------------------------------------------------------


def on_sftp(write: WriteMode, directory: Path, body: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with world(directory, "sftp", write=write) as w:
            with trio.fail_after(20):
                await body(w)

    trio.run(main)


def at(w: World, path: bytes) -> Item:
    return w.remote.paths()[path]


async def uploaded(w: World) -> None:
    await w.queue.wait_for(w.closer.dirty())


@pytest.mark.parametrize("write", WRITE_MODES)
def test_new_entries_are_shown_as_the_remote_has_them(write: WriteMode, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.remote.umask = 0o077
        w.remote.root.mode |= stat.S_ISGID
        w.remote.root.gid = PROJECT
        await w.kernel.write_file("ns/f", b"content")
        assert (await w.kernel.stat("ns/f")).gid == PROJECT
        await w.kernel.mkdir("ns/d")
        await uploaded(w)
        for path, mode in (("f", 0o600), ("d", 0o2700)):
            entry, item = await w.kernel.stat(f"ns/{path}"), at(w, path.encode())
            assert stat.S_IMODE(item.mode) == stat.S_IMODE(entry.mode) == mode
            assert item.gid == entry.gid == PROJECT

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_a_mode_that_a_program_sets_is_the_mode(write: WriteMode, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.remote.umask = 0o077
        handle = await w.kernel.open("ns/f", NEW)
        await w.kernel.pwrite(handle, 0, b"content")
        await w.kernel.setattr("ns/f", Attributes(mode=0o664))
        await w.kernel.close(handle)
        await uploaded(w)
        assert stat.S_IMODE((await w.kernel.stat("ns/f")).mode) == 0o664
        assert stat.S_IMODE(at(w, b"f").mode) == 0o664

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("size", [0, 10])
@pytest.mark.parametrize("write", WRITE_MODES)
def test_nobody_gives_files_away(write: WriteMode, size: int, tmp_path: Path) -> None:
    """gzip, xz, sed -i and perl -i try it with the new file, and go on; the upload must not fail
    for it."""

    async def body(w: World) -> None:
        for path in ("ns/f", "ns/g"):
            handle = await w.kernel.open(path, NEW)
            await w.kernel.pwrite(handle, 0, bytes(size))
            with pytest.raises(NotOwner):
                await w.kernel.setattr(path, Attributes(uid=COLLEAGUE, gid=PROJECT))
            with pytest.raises(NotOwner):
                await w.kernel.setattr(path, Attributes(gid=FOREIGN))
            await w.kernel.setattr(path, Attributes(mode=0o640))
            await w.kernel.close(handle)
        await uploaded(w)
        assert (at(w, b"f").uid, at(w, b"f").gid) == (UID, GID)
        assert stat.S_IMODE(at(w, b"g").mode) == 0o640
        assert len(at(w, b"g").content) == size
        assert not w.closer.dirty()

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_files_are_given_to_groups_that_the_user_is_in(write: WriteMode, tmp_path: Path) -> None:
    """Whether the user is, the remote is asked once for each group."""

    async def body(w: World) -> None:
        w.remote.groups.add(PROJECT)
        for number in range(3):
            path = f"ns/{number}"
            handle = await w.kernel.open(path, NEW)
            await w.kernel.pwrite(handle, 0, b"content")
            await w.kernel.setattr(path, Attributes(gid=PROJECT))
            assert (await w.kernel.stat(path)).gid == PROJECT
            await w.kernel.pwrite(handle, 7, b"!")
            await w.kernel.close(handle)
            await uploaded(w)
            assert (await w.kernel.stat(path)).gid == at(w, b"%d" % number).gid == PROJECT
            assert w.remote.get(b"%d" % number) == b"content!"
        asked = [r for r in w.cues.calls if isinstance(r, m.SetAttributes)]
        assert len(asked) == 1

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_what_only_the_owner_may_do_with_a_file_that_is_being_written(
    write: WriteMode, tmp_path: Path
) -> None:
    """A colleague's file that the group may write."""

    async def body(w: World) -> None:
        w.remote.put(b"f", b"content", 0o664)
        at(w, b"f").uid = COLLEAGUE
        handle = await w.kernel.open("ns/f", os.O_WRONLY)
        await w.kernel.pwrite(handle, 0, b"CON")
        for attributes in (
            Attributes(mode=0o600),
            Attributes(gid=PROJECT),
            Attributes(uid=UID),
            Attributes(atime_ns=10**18, mtime_ns=10**18),
        ):
            with pytest.raises(NotOwner):
                await w.kernel.setattr("ns/f", attributes)
        await w.kernel.close(handle)
        await uploaded(w)
        assert w.remote.get(b"f") == b"CONtent"
        assert stat.S_IMODE(at(w, b"f").mode) == 0o664

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_writing_to_a_file_of_others_leaves_its_mode_to_the_remote(
    write: WriteMode, tmp_path: Path
) -> None:
    async def body(w: World) -> None:
        w.remote.put(b"f", b"content", 0o6777)
        at(w, b"f").uid = COLLEAGUE
        handle = await w.kernel.open("ns/f", os.O_WRONLY)
        await w.kernel.pwrite(handle, 0, b"CON")
        await w.kernel.close(handle)
        await uploaded(w)
        assert w.remote.get(b"f") == b"CONtent"

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_chown_to_the_same_owner_sets_ctime(kind: str, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.kernel.write_file("ns/f", b"content")
        node = await w.kernel.walk("ns/f")
        node.changed_ns = 0
        await w.kernel.setattr("ns/f", Attributes(uid=UID, gid=GID))
        assert node.changed_ns
        assert not [r for r in w.cues.calls if isinstance(r, m.SetAttributes)]

    run(kind, tmp_path, body)


def test_what_is_refused_leaves_ctime(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.kernel.write_file("ns/f", b"content")
        node = await w.kernel.walk("ns/f")
        node.changed_ns = 0
        with pytest.raises(NotOwner):
            await w.kernel.setattr("ns/f", Attributes(uid=COLLEAGUE))
        assert not node.changed_ns

    run("sftp", tmp_path, body)


def test_a_version_that_is_saved_beside_gets_no_mode_that_nobody_set(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.remote.umask = 0o027
        handle = await w.kernel.open("ns/f", NEW)
        await w.kernel.pwrite(handle, 0, b"content")
        w.remote.put(b"f", b"others", 0o644)
        with pytest.raises(Conflict):
            await w.kernel.fsync(handle)
        (beside,) = (item for path, item in w.remote.paths().items() if path != b"f")
        assert stat.S_IMODE(beside.mode) == 0o640

    on_sftp("back", tmp_path, body)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_a_file_of_others_is_not_opened_for_writing_in_vain(
    write: WriteMode, tmp_path: Path
) -> None:
    async def body(w: World) -> None:
        w.remote.put(b"f", b"content", 0o644)
        at(w, b"f").uid = COLLEAGUE
        with pytest.raises(PermissionDenied):
            await w.kernel.open("ns/f", os.O_WRONLY)
        with pytest.raises(PermissionDenied):
            await w.kernel.truncate("ns/f", 3)
        node = await w.kernel.walk("ns/f")
        with pytest.raises(PermissionDenied):
            await w.fs.access(node.ino, os.W_OK)
        await w.fs.access(node.ino, os.R_OK)
        assert await w.kernel.read_file("ns/f") == b"content"

    on_sftp(write, tmp_path, body)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_a_remote_that_is_read_only_for_a_while(write: WriteMode, tmp_path: Path) -> None:
    async def body(w: World) -> None:
        w.remote.put(b"f", b"content")
        w.remote.read_only = True
        with pytest.raises(ReadOnly):
            await w.kernel.open("ns/f", os.O_WRONLY)
        with pytest.raises(ReadOnly):
            await w.kernel.write_file("ns/new", b"")
        with pytest.raises(ReadOnly):
            await w.fs.access((await w.kernel.walk("ns/f")).ino, os.W_OK)
        w.remote.read_only = False
        await w.kernel.write_file("ns/new", b"new")
        await uploaded(w)
        assert w.remote.get(b"new") == b"new"

    on_sftp(write, tmp_path, body)
