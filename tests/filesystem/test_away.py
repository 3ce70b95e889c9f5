"""A laptop that is away: what the mount has seen of it is believed, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hpcfs.model.errors import NotConnected, NotFound
from tests.filesystem.test_back import synced
from tests.filesystem.world import World, live, until


async def laptop(w: World) -> None:
    namespace = (await w.kernel.walk("ns")).namespace
    assert namespace
    namespace.sleeps = True
    await namespace.capabilities()


@contextmanager
def away(w: World) -> Iterator[None]:
    w.cues.fail(object, NotConnected("the laptop does not answer"), times=10_000)
    w.clock.expire_attributes()
    yield
    w.cues.clear()
    w.clock.expire_attributes()


@live("sftp")
async def test_cached_files_stay_readable(w: World) -> None:
    w.remote.put(b"seen", b"content")
    w.remote.put(b"unseen", b"content")
    await laptop(w)
    assert await w.kernel.read_file("ns/seen") == b"content"
    await w.kernel.stat("ns/unseen")
    with away(w):
        assert await w.kernel.read_file("ns/seen") == b"content"
        assert (await w.kernel.stat("ns/seen")).size == 7
        with pytest.raises(NotConnected):  # of what is not cached
            await w.kernel.read_file("ns/unseen")
    w.remote.put(b"seen", b"changed meanwhile")
    assert await w.kernel.read_file("ns/seen") == b"changed meanwhile"


@live("sftp")
async def test_names_that_nobody_looked_at_are_neither_there_nor_missing(w: World) -> None:
    w.remote.put(b"file", b"content")
    await laptop(w)
    with away(w):
        for name in ("file", "missing"):
            with pytest.raises(NotConnected):
                await w.kernel.stat(f"ns/{name}")
        with pytest.raises(NotConnected):
            await w.kernel.listdir("ns")


@live("sftp")
async def test_names_that_were_not_listed_are_missing(w: World) -> None:
    w.remote.put(b"file", b"content")
    await laptop(w)
    await w.kernel.listdir("ns")
    w.clock.expire_attributes()
    assert await w.kernel.exists("ns/file")  # the listing grows old by that
    with away(w):
        assert await w.kernel.exists("ns/file")
        assert not await w.kernel.exists("ns/missing")
        with pytest.raises(NotConnected):  # file servers have these and do not list them
            await w.kernel.exists("ns/.snapshot")


@live("sftp", write="back")
async def test_what_is_written_in_back_mode_waits_for_the_return(w: World) -> None:
    w.remote.put(b"old", b"old")
    await laptop(w)
    await w.kernel.read_file("ns/old")
    await w.kernel.listdir("ns")
    with away(w):
        await w.kernel.write_file("ns/new", b"results")
        await w.kernel.write_file("ns/old", b"newer")
        assert await w.kernel.read_file("ns/new") == b"results"
        assert w.remote.get(b"old") == b"old"
    await synced(w)
    assert (w.remote.get(b"old"), w.remote.get(b"new")) == (b"newer", b"results")


@live("sftp", write="back")
async def test_a_file_that_somebody_made_on_the_laptop_meanwhile_is_kept(w: World) -> None:
    await laptop(w)
    await w.kernel.listdir("ns")
    with away(w):
        await w.kernel.write_file("ns/new", b"mine")
        w.remote.put(b"new", b"theirs")
    await until(lambda: any(b"conflict" in path for path in w.remote.paths()))
    assert w.remote.get(b"new") == b"theirs"


@live("sftp")
async def test_a_cluster_out_of_reach_is_an_error(w: World) -> None:
    w.remote.put(b"seen", b"content")
    await w.kernel.read_file("ns/seen")
    with away(w):
        with pytest.raises(NotConnected):
            await w.kernel.stat("ns/seen")
        with pytest.raises(NotFound):
            await w.kernel.open("elsewhere", os.O_RDONLY)
