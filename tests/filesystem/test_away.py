"""A namespace that is away: what the mount has seen of it is believed, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hpcfs.directories import last_listings
from hpcfs.model.entries import BLOCK_BYTES, Attributes
from hpcfs.model.errors import AccessRefused, NotConnected, RemoteError, Unreachable
from hpcfs.protocol import messages as m
from tests.filesystem.test_back import synced
from tests.filesystem.world import World, live, until

REASONS = (NotConnected("nothing answers"), AccessRefused("the token has expired"))


@asynccontextmanager
async def away(w: World, error: RemoteError = REASONS[0]) -> AsyncIterator[None]:
    """Every call fails at once, as site/calls.py has it, of what was there when it was mounted."""
    await w.namespaces[0].capabilities()
    w.clock.expire_attributes()
    w.sites["ns"].is_away = True
    w.cues.fail(object, error, times=1_000_000)
    yield
    w.sites["ns"].is_away = False
    w.cues.clear()
    w.clock.expire_attributes()


@live()
async def test_cached_files_stay_readable(w: World) -> None:
    w.remote.put(b"seen", b"content")
    w.remote.put(b"unseen", b"content")
    assert await w.kernel.read_file("ns/seen") == b"content"
    await w.kernel.stat("ns/unseen")
    for reason in REASONS:
        async with away(w, reason):
            assert await w.kernel.read_file("ns/seen") == b"content"
            assert (await w.kernel.stat("ns/seen")).size == 7
            handle = await w.kernel.open("ns/unseen", os.O_RDONLY)
            with pytest.raises(type(reason)):  # of what is not cached
                await w.kernel.pread(handle, 0, 7)
            await w.kernel.close(handle)
    w.remote.put(b"seen", b"changed meanwhile")
    assert await w.kernel.read_file("ns/seen") == b"changed meanwhile"


@live()
async def test_the_cached_part_of_a_file_stays_readable(w: World) -> None:
    content = os.urandom(40 * BLOCK_BYTES)
    w.remote.put(b"large", content)
    handle = await w.kernel.open("ns/large", os.O_RDONLY)
    assert await w.kernel.pread(handle, 0, 100) == content[:100]
    await w.kernel.close(handle)
    async with away(w):
        handle = await w.kernel.open("ns/large", os.O_RDONLY)
        assert await w.kernel.pread(handle, 0, 100) == content[:100]
        with pytest.raises(NotConnected):
            await w.kernel.pread(handle, len(content) - 100, 100)
        await w.kernel.close(handle)


@live()
async def test_a_failure_while_the_namespace_is_there_is_told(w: World) -> None:
    """An answer that is missing says nothing of the file: it may be another one by now."""
    w.remote.put(b"seen", b"content")
    assert await w.kernel.read_file("ns/seen") == b"content"
    w.clock.expire_attributes()
    w.cues.fail(object, Unreachable("the connection was lost"), times=1_000)
    with pytest.raises(Unreachable):
        await w.kernel.stat("ns/seen")
    with pytest.raises(Unreachable):
        await w.kernel.listdir("ns")
    with pytest.raises(Unreachable):
        await w.kernel.open("ns/seen", os.O_RDONLY)
    with pytest.raises(Unreachable):
        await w.kernel.exists("ns/elsewhere")


# --- names ----------------------------------------------------------------------------------------


@live()
async def test_names_that_nobody_looked_at_are_neither_there_nor_missing(w: World) -> None:
    w.remote.put(b"file", b"content")
    async with away(w):
        for name in ("file", "missing"):
            with pytest.raises(NotConnected):
                await w.kernel.stat(f"ns/{name}")
        with pytest.raises(NotConnected):
            await w.kernel.listdir("ns")


@live()
async def test_a_directory_is_as_it_was_last_listed(w: World) -> None:
    w.remote.put(b"file", b"content")
    await w.kernel.listdir("ns")
    async with away(w):
        assert set(await w.kernel.listdir("ns")) == {b"file"}
        assert (await w.kernel.stat("ns/file")).size == 7
        assert not await w.kernel.exists("ns/missing")
        with pytest.raises(NotConnected):  # file servers have these and do not list them
            await w.kernel.exists("ns/.snapshot")
    w.remote.put(b"more", b"content")
    assert set(await w.kernel.listdir("ns")) == {b"file", b"more"}


@live()
async def test_what_the_kernel_has_forgotten_is_known_from_listings(w: World) -> None:
    await w.kernel.mkdir("ns/d")
    await w.kernel.mkdir("ns/d/e")
    w.remote.put(b"d/e/file", b"content")
    for place in ("ns", "ns/d", "ns/d/e"):
        await w.kernel.listdir(place)
    assert await w.kernel.read_file("ns/d/e/file") == b"content"
    w.kernel.forget_all()
    async with away(w):
        assert await w.kernel.read_file("ns/d/e/file") == b"content"
        assert b"file" in await w.kernel.listdir("ns/d/e")


@live()
async def test_what_was_changed_here_since_a_listing_is_as_it_became(w: World) -> None:
    for name in (b"removed", b"renamed", b"left"):
        w.remote.put(name, b"content")
    await w.kernel.mkdir("ns/empty")
    await w.kernel.mkdir("ns/old")
    w.remote.put(b"old/file", b"content")
    await w.kernel.listdir("ns/old")
    await w.kernel.listdir("ns")
    await w.kernel.unlink("ns/removed")
    await w.kernel.rename("ns/renamed", "ns/better")
    await w.kernel.write_file("ns/made", b"new")
    await w.kernel.mkdir("ns/directory")
    await w.kernel.rmdir("ns/empty")
    await w.kernel.rename("ns/old", "ns/young")
    shown = {b"left", b"better", b"made", b"directory", b"young"}
    for forgets in (False, True):
        if forgets:
            w.kernel.forget_all()
        async with away(w):
            assert set(await w.kernel.listdir("ns")) == shown
            for gone in ("removed", "renamed", "old", "empty"):
                assert not await w.kernel.exists(f"ns/{gone}")
            assert (await w.kernel.stat("ns/made")).size == 3
            assert (await w.kernel.stat("ns/better")).size == 7
            assert set(await w.kernel.listdir("ns/young")) == {b"file"}
            with pytest.raises(NotConnected):
                await w.kernel.unlink("ns/left")
            with pytest.raises(NotConnected):
                await w.kernel.mkdir("ns/another")
            assert set(await w.kernel.listdir("ns")) == shown, "a refusal changes nothing"
            assert not await w.kernel.exists("ns/another")


@live("sftp")
async def test_a_name_that_was_removed_while_it_was_listed_stays_removed(w: World) -> None:
    w.remote.put(b"file", b"content")
    await w.kernel.walk("ns/file")
    held = w.cues.hold(m.List, stage="after")
    w.nursery.start_soon(w.kernel.listdir, "ns")
    await held.reached.wait()
    await w.kernel.unlink("ns/file")
    held.go.set()
    node = await w.kernel.walk("ns")
    await until(lambda: w.fs.lister.last_seen(node, b"other") is not None)
    async with away(w):
        assert not await w.kernel.exists("ns/file")


@live("sftp")
async def test_what_is_remembered_of_changes_is_bounded(w: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_listings, "MAX_BYTES", 100_000)
        last = w.fs.lister._last
        for directory in range(20):
            await w.kernel.mkdir(f"ns/d{directory}")
            node = await w.kernel.walk(f"ns/d{directory}")
            for number in range(100):
                name = b"%d" % number
                w.fs.tree.note_made(node, name)
                if number % 2:
                    last.forgotten(node, name, node.entry)
                else:
                    last.removed(node, name)
        assert 0 < last._size <= 100_000
        assert last._size == sum(one.size for one in last._listings.values())


@live("sftp")
async def test_what_is_remembered_of_directories_is_bounded(
    w: World,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_listings, "MAX_BYTES", 4000)
        patch.setattr(last_listings, "MAX_CHANGES", 5)
        for number in range(10):
            await w.kernel.mkdir(f"ns/d{number}")
            await w.kernel.listdir(f"ns/d{number}")
        await w.kernel.mkdir("ns/busy")
        busy = await w.kernel.walk("ns/busy")
        assert w.fs.lister.last_seen(busy, b"name") is not None
        for number in range(10):
            w.fs.tree.note_made(busy, b"%d" % number)
        async with away(w):
            assert await w.kernel.listdir("ns/d9") == {}
            for forgotten in ("ns/d0", "ns/busy"):
                with pytest.raises(NotConnected):
                    await w.kernel.listdir(forgotten)


@live()
async def test_links_lead_where_they_led(w: World) -> None:
    await w.kernel.symlink("ns/link", b"target")
    await w.kernel.symlink("ns/unread", b"target")
    w.fs._symlinks._read_last.pop(("ns", b"unread"))  # as if it was made elsewhere
    node, unread = await w.kernel.walk("ns/link"), await w.kernel.walk("ns/unread")
    assert await w.fs.readlink(node.ino) == b"target"
    async with away(w):
        assert await w.fs.readlink(node.ino) == b"target"
        with pytest.raises(NotConnected):
            await w.fs.readlink(unread.ino)


# --- changes --------------------------------------------------------------------------------------


@live()
async def test_what_close_could_not_bring_there_is_refused_by_open(w: World) -> None:
    """In `through` mode; nothing is stranded, and the file is as it was."""
    w.remote.put(b"seen", b"content")
    assert await w.kernel.read_file("ns/seen") == b"content"
    await w.kernel.listdir("ns")
    async with away(w):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with pytest.raises(NotConnected):
                await w.kernel.open("ns/seen", flags)
        with pytest.raises(NotConnected):
            await w.kernel.open("ns/new", os.O_CREAT | os.O_WRONLY)
        assert await w.kernel.read_file("ns/seen") == b"content"
    assert w.journal.rows == []


@live(write="back")
async def test_what_is_written_in_back_mode_waits_for_the_return(w: World) -> None:
    w.remote.put(b"old", b"old")
    await w.kernel.read_file("ns/old")
    await w.kernel.listdir("ns")
    async with away(w):
        await w.kernel.write_file("ns/new", b"results")
        await w.kernel.write_file("ns/old", b"newer")
        assert await w.kernel.read_file("ns/new") == b"results"
        assert set(await w.kernel.listdir("ns")) == {b"old", b"new"}
        assert w.remote.get(b"old") == b"old"
    await synced(w)
    assert (w.remote.get(b"old"), w.remote.get(b"new")) == (b"newer", b"results")


@live(write="back")
async def test_files_that_are_only_here_can_do_what_any_file_can(w: World) -> None:
    """What rsync, cp -p, editors and git do in a directory that is known."""
    await w.kernel.mkdir("ns/known")
    w.remote.put(b"known/replaced", b"old")
    await w.kernel.listdir("ns/known")
    async with away(w):
        for name in ("a", "b", "removed"):
            await w.kernel.write_file(f"ns/known/.{name}.XXXX", name.encode())
            await w.kernel.setattr(
                f"ns/known/.{name}.XXXX", Attributes(mode=0o600, mtime_ns=10**18)
            )
            await w.kernel.rename(f"ns/known/.{name}.XXXX", f"ns/known/{name}")
        await w.kernel.unlink("ns/known/removed")
        await w.kernel.write_file("ns/known/tmp", b"new")
        await w.kernel.rename("ns/known/tmp", "ns/known/replaced")
        shown = {b"a", b"b", b"replaced"}
        assert set(await w.kernel.listdir("ns/known")) == shown
        entry = await w.kernel.stat("ns/known/a")
        assert (entry.mode & 0o777, entry.mtime_ns, entry.size) == (0o600, 10**18, 1)
        for refused in (w.kernel.mkdir("ns/known/d"), w.kernel.symlink("ns/known/l", b"x")):
            with pytest.raises(NotConnected):
                await refused
        handle = await w.kernel.open("ns/known/a", os.O_RDWR)
        await w.kernel.pwrite(handle, 0, b"A")
        with pytest.raises(NotConnected):  # the remote has nothing of it
            await w.kernel.fsync(handle)
        await w.kernel.close(handle)
    await synced(w)
    assert {path for path in w.remote.paths() if path.startswith(b"known/")} == {
        b"known/a",
        b"known/b",
        b"known/replaced",
    }
    assert w.remote.get(b"known/replaced") == b"new"
    assert w.remote.get(b"known/a") == b"A"


@live(write="back")
async def test_a_directory_that_was_made_here_takes_files(w: World) -> None:
    """Nobody has listed it; `cp -r` goes on when the link is lost in the middle."""
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/before", b"1")
    await synced(w)
    async with away(w):
        await w.kernel.write_file("ns/d/after", b"2")
        assert set(await w.kernel.listdir("ns/d")) == {b"before", b"after"}
    await synced(w)
    assert w.remote.get(b"d/after") == b"2"


@live(write="back")
async def test_a_name_that_is_not_known_to_be_free_is_not_taken(w: World) -> None:
    await w.kernel.mkdir("ns/d")
    w.remote.put(b"d/theirs", b"content")
    w.kernel.forget_all()
    w.fs.lister._last._listings.clear()
    await w.kernel.walk("ns/d")
    async with away(w):
        with pytest.raises(NotConnected):
            await w.kernel.write_file("ns/d/theirs", b"mine")
    assert w.remote.get(b"d/theirs") == b"content"


@live(write="back")
async def test_a_file_that_somebody_made_there_meanwhile_is_kept(w: World) -> None:
    await w.kernel.listdir("ns")
    async with away(w):
        await w.kernel.write_file("ns/new", b"mine")
        w.remote.put(b"new", b"theirs")
    await until(lambda: any(b"conflict" in path for path in w.remote.paths()))
    assert w.remote.get(b"new") == b"theirs"
