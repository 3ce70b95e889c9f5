"""Extended attributes: what the mount shows, and what the remote has of them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import (
    AttributesFull,
    Conflict,
    InvalidRequest,
    NoAttribute,
    NoSpace,
    NotSupported,
    PermissionDenied,
    ReadOnly,
)
from hpcfs.protocol import messages as m
from tests.filesystem.world import World, live, world
from tests.support.memory_remote import MemoryRemote

NAME = b"user.colour"


async def set_on(w: World, path: str, name: bytes = NAME, value: bytes = b"red") -> None:
    await w.fs.xattrs.set((await w.kernel.walk(path)).ino, name, value)


async def all_of(w: World, path: str) -> dict[bytes, bytes]:
    ino = (await w.kernel.walk(path)).ino
    return {name: await w.fs.xattrs.get(ino, name) for name in await w.fs.xattrs.list(ino)}


def on_remote(w: World, path: bytes) -> dict[bytes, bytes]:
    return dict(w.remote.paths()[path].xattrs)


@live("s3")
async def test_of_a_file_on_the_remote_they_are_changed_at_once(w: World) -> None:
    w.remote.put(b"file", b"abc")
    w.remote.paths()[b"file"].xattrs = ((b"user.old", b"1"),)
    await set_on(w, "ns/file")
    assert on_remote(w, b"file") == {b"user.old": b"1", NAME: b"red"}
    node = await w.kernel.walk("ns/file")
    await w.fs.xattrs.remove(node.ino, b"user.old")
    assert on_remote(w, b"file") == await all_of(w, "ns/file") == {NAME: b"red"}
    with pytest.raises(NoAttribute):
        await w.fs.xattrs.get(node.ino, b"user.old")
    with pytest.raises(NoAttribute):
        await w.fs.xattrs.remove(node.ino, b"user.old")


@live("s3")
async def test_directories_have_them_too(w: World) -> None:
    await w.kernel.mkdir("ns/d")
    await set_on(w, "ns/d")
    assert on_remote(w, b"d") == await all_of(w, "ns/d") == {NAME: b"red"}


@live("s3")
async def test_what_others_set_is_seen_with_the_other_attributes(w: World) -> None:
    w.remote.put(b"file", b"abc")
    assert await all_of(w, "ns/file") == {}
    w.remote.paths()[b"file"].xattrs = ((NAME, b"red"),)
    w.clock.expire_attributes()
    assert await all_of(w, "ns/file") == {NAME: b"red"}
    asked = len(w.cues.calls)
    assert await all_of(w, "ns/file") == {NAME: b"red"}
    assert len(w.cues.calls) == asked, "they cost a request of their own"


async def _with_the_upload(w: World) -> None:
    handle = await w.kernel.open("ns/file", os.O_CREAT | os.O_RDWR)
    await w.kernel.pwrite(handle, 0, b"abc")
    await set_on(w, "ns/file", b"user.gone")
    await set_on(w, "ns/file")
    await w.fs.xattrs.remove(w.kernel.node_of(handle).ino, b"user.gone")
    assert await all_of(w, "ns/file") == {NAME: b"red"}
    assert not w.cues.count(m.SetAttributes)
    await w.kernel.fsync(handle)
    assert on_remote(w, b"file") == {NAME: b"red"}
    await w.kernel.pwrite(handle, 0, b"ABC")
    await w.kernel.setattr("ns/file", Attributes(mode=0o600))
    await w.kernel.close(handle)
    await w.queue.wait_for(w.queue.schedule)
    assert w.remote.get(b"file") == b"ABC"
    assert on_remote(w, b"file") == await all_of(w, "ns/file") == {NAME: b"red"}


@live("s3")
async def test_they_go_up_with_a_new_file_and_stay_with_new_content(w: World) -> None:
    await _with_the_upload(w)


@live("s3", write="back")
async def test_they_go_up_with_a_new_file_in_back_mode(w: World) -> None:
    await _with_the_upload(w)


@live("s3")
async def test_an_upload_that_fails_does_not_lose_them(w: World) -> None:
    handle = await w.kernel.open("ns/file", os.O_CREAT | os.O_RDWR)
    await set_on(w, "ns/file")
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    with pytest.raises(NoSpace):
        await w.kernel.fsync(handle)
    await set_on(w, "ns/file", b"user.more")
    await w.kernel.close(handle)
    assert on_remote(w, b"file") == {NAME: b"red", b"user.more": b"red"}


@live("s3", write="back")
async def test_a_file_renamed_over_another_brings_its_own(w: World) -> None:
    w.remote.put(b"file", b"old")
    w.remote.paths()[b"file"].xattrs = ((b"user.old", b"1"),)
    handle = await w.kernel.open("ns/new", os.O_CREAT | os.O_RDWR)
    await w.kernel.pwrite(handle, 0, b"new")
    await set_on(w, "ns/new")
    await w.kernel.close(handle)
    await w.kernel.rename("ns/new", "ns/file")
    await w.queue.wait_for(w.queue.schedule)
    assert w.remote.get(b"file") == b"new"
    assert on_remote(w, b"file") == {NAME: b"red"}


@live("s3")
async def test_a_version_set_aside_brings_them_along(w: World) -> None:
    w.remote.put(b"file", b"old")
    handle = await w.kernel.open("ns/file")
    await w.kernel.pwrite(handle, 0, b"ours")
    await set_on(w, "ns/file")
    w.remote.put(b"file", b"theirs")
    with pytest.raises(Conflict):
        await w.kernel.close(handle)
    aside = next(path for path in w.remote.paths() if b"hpcfs-conflict" in path)
    assert (on_remote(w, aside), on_remote(w, b"file")) == ({NAME: b"red"}, {})


@live("s3", write="back")
async def test_the_journal_has_them(w: World) -> None:
    handle = await w.kernel.open("ns/file", os.O_CREAT | os.O_RDWR)
    await w.kernel.pwrite(handle, 0, b"abc")
    await set_on(w, "ns/file")
    content = w.kernel.node_of(handle).content
    assert content
    row = content.unconfirmed()
    await w.kernel.close(handle)
    assert (row.pending.xattrs, row.entry.xattrs) == ({NAME: b"red"}, ((NAME, b"red"),))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=type(row))
    assert again == row


@live("s3")
async def test_too_many_are_refused_before_the_upload_could_fail(w: World) -> None:
    handle = await w.kernel.open("ns/file", os.O_CREAT | os.O_RDWR)
    with pytest.raises(AttributesFull):
        await set_on(w, "ns/file", value=bytes(2000))
    await set_on(w, "ns/file", value=bytes(1000))
    with pytest.raises(AttributesFull):
        await set_on(w, "ns/file", b"user.more", bytes(1000))
    await w.kernel.close(handle)
    assert on_remote(w, b"file") == {NAME: bytes(1000)}


@live("s3")
async def test_links_and_the_mounts_top_have_none(w: World) -> None:
    await w.kernel.symlink("ns/link", b"file")
    w.remote.paths()[b"link"].xattrs = ((NAME, b"red"),)
    w.clock.expire_attributes()
    assert await all_of(w, "ns/link") == {}
    with pytest.raises(NotSupported):
        await all_of(w, "")
    with pytest.raises(ReadOnly):
        await set_on(w, "")


@live("s3")
async def test_the_files_mode_counts(w: World) -> None:
    w.remote.put(b"file", b"abc", 0o000)
    with pytest.raises(PermissionDenied):
        await set_on(w, "ns/file")
    with pytest.raises(PermissionDenied):
        await w.fs.xattrs.get((await w.kernel.walk("ns/file")).ino, NAME)


@live("s3")
async def test_other_namespaces_are_not_supported(w: World) -> None:
    w.remote.put(b"file", b"abc")
    for name in (b"security.capability", b"system.posix_acl_access", b"trusted.x"):
        with pytest.raises(NotSupported):
            await set_on(w, "ns/file", name)
    with pytest.raises(InvalidRequest):
        await set_on(w, "ns/file", b"user.")


@live("sftp")
async def test_sftp_has_none(w: World) -> None:
    w.remote.put(b"file", b"abc")
    assert not w.fs.xattrs.any_keeps
    with pytest.raises(NotSupported):
        await set_on(w, "ns/file")
    with pytest.raises(NotSupported):
        await all_of(w, "ns/file")


def test_a_read_only_namespace_takes_none(tmp_path: Path) -> None:
    async def story() -> None:
        remote = MemoryRemote("s3")
        remote.put(b"file", b"abc")
        async with world(tmp_path, {"ns": remote}, read_only=True) as w:
            with pytest.raises(ReadOnly):
                await set_on(w, "ns/file")

    trio.run(story)
