"""Small files are fetched ahead of a program that reads them one after another, and only then."""

from __future__ import annotations

import os
import stat

import pytest

from hpcfs.inodes.tree import ATTRIBUTE_SECONDS
from hpcfs.model.errors import NotFound, Unreachable
from hpcfs.protocol import messages as m
from tests.filesystem.world import World, live, until
from tests.support.memory_remote import Item

COUNT = 30


def _content(number: int) -> bytes:
    return b"%d" % number * 100


async def _directory(w: World, name: str = "d") -> list[str]:
    """The paths of COUNT files in a directory, listed as programs do it."""
    folder = Item(stat.S_IFDIR | 0o755, 10**18)
    w.remote.root.children[name.encode()] = folder
    for number in range(COUNT):
        w.remote.put(f"{name}/f{number:03}".encode(), _content(number))
    listed = await w.kernel.listdir(f"ns/{name}")
    return [f"ns/{name}/{entry.decode()}" for entry in sorted(listed)]


def _asked(w: World, path: str, kind: type) -> int:
    wanted = path.removeprefix("ns/").encode()
    calls = w.cues.calls
    return sum(isinstance(call, kind) and getattr(call, "path", b"") == wanted for call in calls)


async def _read(w: World, path: str) -> bytes:
    handle = await w.kernel.open(path, os.O_RDONLY)
    try:
        return await w.kernel.pread(handle, 0, 10_000)
    finally:
        await w.kernel.close(handle)


async def _read_first(w: World, paths: list[str], count: int) -> None:
    """Then wait until what was foreseen has come."""
    for number in range(count):
        assert await _read(w, paths[number]) == _content(number)
    await until(lambda: _asked(w, paths[count], m.Fetch) >= 1)
    await until(lambda: all(hold.fetched.is_set() for hold in w.fs.file_prefetcher.holds))


@live()
async def test_after_three_files_the_next_ones_are_fetched_ahead(w: World) -> None:
    paths = await _directory(w)
    await _read_first(w, paths, 3)
    w.cues.calls.clear()
    assert await _read(w, paths[3]) == _content(3)
    assert _asked(w, paths[3], m.Fetch) == 0
    assert _asked(w, paths[3], m.Stat) == 0, "the fetch vouched for its version"


@live()
async def test_a_file_that_changed_after_it_was_fetched_ahead_is_seen_a_second_later(
    w: World,
) -> None:
    paths = await _directory(w)
    await _read_first(w, paths, 3)
    w.remote.put(paths[3].removeprefix("ns/").encode(), b"changed")
    w.clock.seconds += ATTRIBUTE_SECONDS
    assert await _read(w, paths[3]) == b"changed"


@live()
async def test_a_file_that_changed_before_it_was_fetched_ahead_is_seen_at_once(w: World) -> None:
    paths = await _directory(w)
    w.remote.put(paths[3].removeprefix("ns/").encode(), b"changed before")
    await _read_first(w, paths, 3)
    assert await _read(w, paths[3]) == b"changed before"


@live()
async def test_reading_files_at_random_fetches_nothing_ahead(w: World) -> None:
    paths = await _directory(w)
    chosen = [20, 3, 11, 29, 0, 17, 8]
    for number in chosen:
        assert await _read(w, paths[number]) == _content(number)
    fetched = {call.path for call in w.cues.calls if isinstance(call, m.Fetch)}
    assert fetched == {paths[number].removeprefix("ns/").encode() for number in chosen}


@live()
async def test_a_remote_that_fails_ahead_harms_nobody(w: World) -> None:
    paths = await _directory(w)
    await _read_first(w, paths, 3)
    held = [hold for hold in w.fs.file_prefetcher.holds if not hold.taken.is_set()]
    assert held
    failing = paths[3 + len(held)].removeprefix("ns/").encode()
    w.cues.fail(m.Fetch, Unreachable("down"), times=1)
    assert await _read(w, paths[3]) == _content(3)
    await until(lambda: any(getattr(c, "path", None) == failing for c in w.cues.calls))
    for number in range(4, COUNT):
        assert await _read(w, paths[number]) == _content(number)


@live()
async def test_what_is_written_is_never_lost_to_what_was_fetched_ahead(w: World) -> None:
    paths = await _directory(w)
    await _read_first(w, paths, 3)
    await w.kernel.write_file(paths[3], b"mine")
    assert await _read(w, paths[3]) == b"mine"
    assert bytes(w.remote.root.children[b"d"].children[b"f003"].content) == b"mine"


@live()
async def test_files_that_are_removed_while_they_are_fetched_ahead_are_gone(w: World) -> None:
    paths = await _directory(w)
    await _read_first(w, paths, 3)
    await w.kernel.unlink(paths[4])
    assert not await w.kernel.exists(paths[4])
    with pytest.raises((NotFound, NotFound)):
        await _read(w, paths[4])


@live()
async def test_in_the_next_directory_the_first_files_are_fetched_once_it_is_listed(
    w: World,
) -> None:
    paths = await _directory(w)
    await _read_first(w, paths, 5)
    w.cues.calls.clear()
    others = await _directory(w, "e")
    await until(lambda: _asked(w, others[0], m.Fetch) == 1)
    await until(lambda: all(hold.fetched.is_set() for hold in w.fs.file_prefetcher.holds))
    w.cues.calls.clear()
    assert await _read(w, others[0]) == _content(0)
    assert _asked(w, others[0], m.Fetch) == _asked(w, others[0], m.Stat) == 0
