"""Programs that walk trees and ask for many names: what they need not wait for, and that nothing
which was listed before a change made here undoes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hpcfs.directories import listing, listing_prefetcher
from hpcfs.filesystem.create_predictor import RUN
from hpcfs.model.entries import Attributes
from hpcfs.model.errors import NotFound, PermissionDenied, RemoteError, RemoteFailure
from hpcfs.protocol import messages as m
from tests.filesystem.world import World, live, until, world
from tests.support.memory_remote import Item

FOLDERS = [f"{number:02}" for number in range(40)]


def fill(w: World, folders: list[str] = FOLDERS, files: int = 3) -> None:
    for folder in folders:
        children = {b"f%d" % number: Item(stat.S_IFREG | 0o644, 0) for number in range(files)}
        w.remote.root.children[folder.encode()] = Item(stat.S_IFDIR | 0o755, 0, children=children)


def lists(w: World, path: str) -> int:
    return sum(call == m.List(path.encode()) for call in w.cues.calls)


async def begin_walk(w: World) -> None:
    """The first two directories are read: the next ones are listed ahead."""
    for path in ("ns", "ns/00", "ns/01"):
        await w.kernel.listdir(path)
    await until(lambda: lists(w, "02") == 1)
    await wait_all_tasks_blocked()


# --- names ----------------------------------------------------------------------------------------


USES = {
    "read": lambda w: w.kernel.open("ns/d/new", os.O_RDONLY),
    "write": lambda w: w.kernel.open("ns/d/new", os.O_WRONLY),
    "cut": lambda w: w.kernel.open("ns/d/new", os.O_RDWR | os.O_TRUNC),
    "stat": lambda w: w.kernel.stat("ns/d/new"),
    "unlink": lambda w: w.kernel.unlink("ns/d/new"),
    "rename": lambda w: w.kernel.rename("ns/d/new", "ns/d/newer"),
    "truncate": lambda w: w.kernel.truncate("ns/d/new", 3),
}


@pytest.mark.parametrize("kind", ["sftp", "s3"])
@pytest.mark.parametrize("made_here", [False, True])
@pytest.mark.parametrize("use", USES)
def test_what_others_just_made_is_found_by_who_touched_many_names(
    kind: str, made_here: bool, use: str, tmp_path: Path
) -> None:
    """A listing of a moment ago does not have it, nor has a directory that was made here."""

    async def run() -> None:
        async with world(tmp_path, kind) as w:
            w.kernel.process = 7
            if made_here:
                await w.kernel.mkdir("ns/d")
            else:
                fill(w, ["d"])
            for number in range(RUN // 2):
                await w.kernel.write_file(f"ns/d/{number}", b"x")
                await w.kernel.exists(f"ns/d/missing {number}")
                await w.kernel.exists(f"ns/d/{number}")
            await w.kernel.listdir("ns/d")
            await wait_all_tasks_blocked()
            w.remote.put(b"d/new", b"made by others")
            handle = await USES[use](w)
            if isinstance(handle, int):
                await w.kernel.close(handle)

    trio.run(run)


@live()
async def test_a_program_that_makes_all_it_asks_for_is_told_by_listings(w: World) -> None:
    """cp and tar. What the remote has is not made anew, and then everything is asked again."""
    fill(w, ["d"], files=0)
    w.kernel.process = 7
    await w.kernel.walk("ns/d")

    async def copy(number: int) -> int:
        """The questions that it takes to find out that the name is free."""
        w.cues.calls.clear()
        assert not await w.kernel.exists(f"ns/d/{number}")
        asked = w.cues.calls.count(m.Stat(b"d/%d" % number))
        await w.kernel.write_file(f"ns/d/{number}", b"x")
        await wait_all_tasks_blocked()
        return asked

    assert sum([await copy(number) for number in range(RUN)]) >= RUN
    assert sum([await copy(number) for number in range(RUN, 2 * RUN)]) == 0
    w.remote.put(b"d/theirs", b"made by others")
    handle = await w.kernel.open("ns/d/theirs", os.O_CREAT | os.O_RDONLY)
    assert await w.kernel.pread(handle, 0, 100) == b"made by others"
    await w.kernel.close(handle)
    assert await copy(2 * RUN) > 0
    w.kernel.process = 8
    w.remote.put(b"d/more", b"made by others")
    assert await w.kernel.exists("ns/d/more")


@live()
async def test_a_single_name_that_others_just_made_is_found(w: World) -> None:
    """`ssh cluster make-it; cat it`, a moment after a listing without it."""
    await w.kernel.listdir("ns")
    w.remote.put(b"it", b"made by others")
    assert await w.kernel.read_file("ns/it") == b"made by others"


@live()
async def test_a_name_whose_node_was_forgotten_is_known_from_the_listing(w: World) -> None:
    w.remote.put(b"f", b"content")
    await w.kernel.listdir("ns")
    w.kernel.forget_all()
    await w.kernel.walk("ns")
    w.cues.calls.clear()
    assert (await w.kernel.stat("ns/f")).size == 7
    assert w.cues.count(m.Stat) == 0


@live()
async def test_names_that_servers_do_not_list_are_asked_for(w: World) -> None:
    await w.kernel.listdir("ns")
    w.cues.calls.clear()
    assert not await w.kernel.exists("ns/.snapshot")
    assert w.cues.count(m.Stat) == 1


@live()
async def test_what_was_changed_here_is_seen_whatever_a_listing_says(w: World) -> None:
    kernel = w.kernel
    for name in (b"gone", b"old", b"longer"):
        w.remote.put(name, b"1")
    await kernel.listdir("ns")
    await kernel.unlink("ns/gone")
    await kernel.rename("ns/old", "ns/new")
    await kernel.mkdir("ns/made")
    await kernel.write_file("ns/file", b"content")
    await kernel.write_file("ns/longer", b"content")
    kernel.forget_all()  # else the nodes would know
    for path, there in [("gone", False), ("old", False), ("new", True), ("made", True)]:
        assert await kernel.exists(f"ns/{path}") == there, path
    assert (await kernel.stat("ns/file")).size == 7
    assert (await kernel.stat("ns/longer")).size == 7


@live()
async def test_a_name_made_while_a_listing_is_under_way_is_there(w: World) -> None:
    await w.kernel.walk("ns")
    held = w.cues.hold(m.List, stage="after")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.listdir, "ns")
        await held.reached.wait()
        await w.kernel.write_file("ns/new", b"content")
        held.go.set()
    w.kernel.forget_all()
    assert (await w.kernel.stat("ns/new")).size == 7


@live()
async def test_a_program_that_could_not_make_what_others_made_finds_it(w: World) -> None:
    """The listing is older than what the others made, and its word does not count after this."""
    await w.kernel.listdir("ns")
    w.remote.put(b"f", b"content")
    handle, node = await w.fs.create((await w.kernel.walk("ns")).ino, b"f", 0o644, os.O_RDWR)
    assert node.entry.size == 7
    await w.kernel.release(handle)


@live()
async def test_many_names_asked_for_make_one_listing(w: World) -> None:
    """As rsync, git and compilers do: after a few names the directory is listed."""
    fill(w, ["00"], files=100)
    await w.kernel.walk("ns/00")
    w.cues.calls.clear()
    for number in range(4):
        assert not await w.kernel.exists(f"ns/00/missing{number}")
    await until(lambda: lists(w, "00") == 1)
    await wait_all_tasks_blocked()
    for number in range(100):
        assert await w.kernel.exists(f"ns/00/f{number}")
    assert w.cues.count(m.Stat) == 4
    assert w.cues.count(m.List) == 1


@live()
async def test_a_program_that_goes_on_in_a_directory_does_not_wait(w: World) -> None:
    """cp -r in a large directory: its listing is renewed before it is too old."""
    fill(w, ["00"], files=200)
    await w.kernel.listdir("ns/00")
    w.cues.calls.clear()
    for number in range(200):
        w.clock.seconds += 0.05
        await w.kernel.stat(f"ns/00/f{number}")
        await wait_all_tasks_blocked()
    assert lists(w, "00") >= 10
    asked = [call.path for call in w.cues.calls if isinstance(call, m.Stat)]
    assert sum(path.startswith(b"00/") for path in asked) <= 3


@live()
async def test_a_renewed_listing_does_not_undo_what_was_written_meanwhile(w: World) -> None:
    fill(w, ["00"])
    await w.kernel.walk("ns/00")
    held = w.cues.hold(m.List, stage="after")
    for number in range(4):
        await w.kernel.exists(f"ns/00/missing{number}")
    await held.reached.wait()
    await w.kernel.write_file("ns/00/f0", b"content")
    await w.kernel.unlink("ns/00/f1")
    held.go.set()
    await wait_all_tasks_blocked()
    w.kernel.forget_all()
    assert (await w.kernel.stat("ns/00/f0")).size == 7
    assert not await w.kernel.exists("ns/00/f1")


@live()
async def test_a_directory_that_is_too_large_is_not_listed_again_and_again(w: World) -> None:
    fill(w, ["00"], files=100)
    await w.kernel.walk("ns/00")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "MEMORY_BYTES", 1000)
        for number in range(30):
            assert not await w.kernel.exists(f"ns/00/missing{number}")
            await wait_all_tasks_blocked()
        assert lists(w, "00") == 1
        assert len(await w.kernel.listdir("ns/00")) == 100


# --- walks ----------------------------------------------------------------------------------------


@live()
async def test_a_walk_finds_its_directories_listed(w: World) -> None:
    fill(w)
    await begin_walk(w)
    for folder in FOLDERS[2:]:
        before = lists(w, folder)
        assert len(await w.kernel.listdir(f"ns/{folder}")) == 3
        assert (before, lists(w, folder)) == (1, 1)
    assert w.cues.count(m.List) == 1 + len(FOLDERS)


@live()
async def test_a_walk_that_takes_long_looks_no_name_up_at_the_remote(w: World) -> None:
    """The attributes of its directories are a second old then; their parent is listed again."""
    fill(w, [f"{number:03}" for number in range(100)])
    root = await w.kernel.walk("ns")
    await w.kernel.listdir("ns")
    w.cues.calls.clear()
    for number in range(100):
        w.clock.seconds += 0.05
        node = await w.fs.lookup.find(root.ino, b"%03d" % number)
        w.fs.tree.count_lookup(node)
        handle = w.fs.directories.open(node)
        assert len(list(await w.fs.directories.read(handle, 0))) == 5
        w.fs.directories.close(handle)
        await wait_all_tasks_blocked()
    assert w.cues.count(m.Stat) == 0
    assert w.cues.count(m.List) < 100 + 12


@live()
async def test_reading_a_directory_again_lists_it_anew(w: World) -> None:
    fill(w)
    await begin_walk(w)
    await w.kernel.listdir("ns/02")
    w.remote.put(b"02/made by others", b"")
    assert b"made by others" in await w.kernel.listdir("ns/02")


@live()
async def test_a_program_joins_the_listing_that_is_under_way(w: World) -> None:
    fill(w)
    for path in ("ns", "ns/00"):
        await w.kernel.listdir(path)
    await wait_all_tasks_blocked()
    held = [w.cues.hold(m.List), w.cues.hold(m.List)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.listdir, "ns/01")
        await held[1].reached.wait()
        nursery.start_soon(w.kernel.listdir, "ns/02")
        await wait_all_tasks_blocked()
        for one in held:
            one.go.set()
    assert lists(w, "02") == 1


CHANGES = {
    "unlink": lambda k: k.unlink("ns/03/f0"),
    "create": lambda k: k.write_file("ns/03/new", b"content"),
    "write": lambda k: k.write_file("ns/03/f1", b"content"),
    "mkdir": lambda k: k.mkdir("ns/03/new"),
    "chmod": lambda k: k.setattr("ns/03/f1", Attributes(mode=0o600)),
    "rename": lambda k: k.rename("ns/03/f0", "ns/03/f9"),
    "move": lambda k: k.rename("ns/03/f0", "ns/f0"),
}


@pytest.mark.parametrize("kind", ["sftp", "s3"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_here_is_not_shown_as_it_was_ahead(
    kind: str, change: str, tmp_path: Path
) -> None:
    async def run() -> None:
        async with world(tmp_path, kind) as w:
            fill(w)
            await begin_walk(w)
            await w.kernel.listdir("ns/02")
            await until(lambda: lists(w, "03") == 1)
            await wait_all_tasks_blocked()
            await CHANGES[change](w.kernel)
            w.kernel.forget_all()
            found = await w.kernel.listdir("ns/03")
            remote = [page async for page in w.remote.list(b"03")]
            assert found == {entry.name: entry for page in remote for entry in page}

    trio.run(run)


@live()
async def test_a_directory_that_took_anothers_name_is_listed_anew(w: World) -> None:
    fill(w)
    await begin_walk(w)
    await w.kernel.rename("ns/02", "ns/elsewhere")
    await w.kernel.mkdir("ns/02")
    assert await w.kernel.listdir("ns/02") == {}
    assert len(await w.kernel.listdir("ns/elsewhere")) == 3


@live()
async def test_a_listing_ahead_that_fails_is_nobodys_error(w: World) -> None:
    fill(w)
    for path in ("ns", "ns/00"):
        await w.kernel.listdir(path)
    await wait_all_tasks_blocked()
    w.cues.fail(m.List, RemoteFailure("it hiccups"))  # 02 or 03, ahead of who reads 01
    await w.kernel.listdir("ns/01")
    await wait_all_tasks_blocked()
    for folder in FOLDERS[2:6]:
        assert len(await w.kernel.listdir(f"ns/{folder}")) == 3
    assert sorted([lists(w, "02"), lists(w, "03")]) == [1, 2]


@live()
async def test_who_waits_for_a_listing_that_fails_gets_its_error(w: World) -> None:
    fill(w)
    for path in ("ns", "ns/00"):
        await w.kernel.listdir(path)
    await wait_all_tasks_blocked()
    held = w.cues.hold(m.List)
    w.cues._cues[-1].error = PermissionDenied("not yours")
    await w.kernel.listdir("ns/01")
    await held.reached.wait()
    outcome: list[RemoteError] = []

    async def read(folder: str) -> None:
        try:
            await w.kernel.listdir(f"ns/{folder}")
        except RemoteError as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "02")  # one of these two was asked for by that call
        nursery.start_soon(read, "03")
        await wait_all_tasks_blocked()
        assert not outcome
        held.go.set()
    assert [type(error) for error in outcome] == [PermissionDenied]
    for folder in ("02", "03"):
        assert len(await w.kernel.listdir(f"ns/{folder}")) == 3


@live()
async def test_what_was_listed_ahead_is_used_for_a_second(w: World) -> None:
    fill(w)
    await begin_walk(w)
    w.clock.expire_attributes()
    w.remote.put(b"02/made by others", b"")
    assert b"made by others" in await w.kernel.listdir("ns/02")


def test_when_the_walk_stops_all_is_cancelled_and_dropped(tmp_path: Path) -> None:
    clock = MockClock()

    async def run() -> None:
        async with world(tmp_path, "sftp") as w:
            fill(w)
            await begin_walk(w)
            held = w.cues.hold(m.List)
            await w.kernel.listdir("ns/02")
            await held.reached.wait()
            ahead = w.fs.lister._ahead
            assert ahead.flights
            w.clock.expire_attributes()
            clock.jump(listing_prefetcher.EXPIRE_SECONDS * 1.1)
            await wait_all_tasks_blocked()
            assert not ahead.flights
            assert not ahead._is_expiring
            calls = len(w.cues.calls)
            clock.jump(10)
            await wait_all_tasks_blocked()
            assert len(w.cues.calls) == calls

    trio.run(run, clock=clock)


@live()
async def test_what_is_listed_ahead_is_bounded(w: World) -> None:
    """A directory too large to be kept is listed when it is read; the others are not given up."""
    fill(w, FOLDERS[:10], files=100)
    fill(w, ["05"], files=1000)
    ahead = w.fs.lister._ahead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "MEMORY_BYTES", 10_000)
        patch.setattr(listing_prefetcher, "MAX_BYTES", 20_000)
        for path in ["ns", *(f"ns/{folder}" for folder in FOLDERS[:10])]:
            await w.kernel.listdir(path)
            await wait_all_tasks_blocked()
            assert ahead._size <= listing_prefetcher.MAX_BYTES
    assert lists(w, "05") == 2
    assert w.cues.count(m.List) == 12


@live("sftp")
async def test_a_walk_over_many_directories_leaves_no_nodes(w: World) -> None:
    fill(w, [f"{number:03}" for number in range(300)], files=10)
    await w.kernel.listdir("ns")
    for number in range(300):
        await w.kernel.listdir(f"ns/{number:03}")
    w.kernel.forget_all()
    assert len(w.fs.tree) == 2


@live()
async def test_an_open_file_is_not_overwritten_by_an_older_listing(w: World) -> None:
    fill(w)
    handle = await w.kernel.open("ns/03/f0")
    await begin_walk(w)
    await w.kernel.pwrite(handle, 0, b"content")
    assert (await w.kernel.listdir("ns/03"))[b"f0"].size == 7
    await w.kernel.close(handle)
    assert (await w.kernel.listdir("ns/03"))[b"f0"].size == 7
    assert w.remote.get(b"03/f0") == b"content"


@live()
async def test_a_lookup_is_not_answered_by_a_listing_of_the_directory_before_it(w: World) -> None:
    """A directory made in place of another one has other names."""
    fill(w, ["00"])
    await w.kernel.listdir("ns/00")
    for name in ("f0", "f1", "f2"):
        await w.kernel.unlink(f"ns/00/{name}")
    await w.kernel.rmdir("ns/00")
    await w.kernel.mkdir("ns/00")
    w.remote.put(b"00/x", b"")
    with pytest.raises(NotFound):
        await w.kernel.walk("ns/00/f0")
    w.clock.expire_attributes()
    assert await w.kernel.exists("ns/00/x")


@live()
async def test_in_a_directory_made_here_a_program_that_fills_it_asks_nothing(w: World) -> None:
    """cp -r and rsync ask for each name before they make it, rsync some time after the directory
    was made."""
    w.kernel.process = 7
    for number in range(RUN):
        await w.kernel.exists(f"ns/{number}")
        await w.kernel.write_file(f"ns/{number}", b"x")
    await w.kernel.mkdir("ns/d")
    w.clock.expire_attributes()
    await w.kernel.stat("ns/d")
    w.cues.calls.clear()
    for number in range(10):
        assert not await w.kernel.exists(f"ns/d/{number}")
        await w.kernel.write_file(f"ns/d/{number}", b"x")
        assert await w.kernel.exists(f"ns/d/{number}")
    assert not any(isinstance(c, m.Stat) and c.path.startswith(b"d/") for c in w.cues.calls)


def test_pages_that_come_after_it_was_given_up_do_no_harm(tmp_path: Path) -> None:
    """They arrive in the task that receives for all: an error there would end the mount."""

    async def run() -> None:
        async with world(tmp_path, "sftp") as w:
            fill(w)
            await begin_walk(w)
            flight = next(iter(w.fs.lister._ahead.flights.values()))
            page = msgspec.msgpack.encode([await w.remote.stat(b"00")])
            before = flight.listing.count
            flight.give_up()
            w.fs.lister._ahead._add_page(flight, page)
            assert flight.listing.count == before

    trio.run(run)


@live()
async def test_who_asks_for_names_in_one_directory_after_the_other_finds_them_listed(
    w: World,
) -> None:
    """As rsync's receiver and git do: the directories are listed ahead, as for who reads them."""
    fill(w)
    for number, folder in enumerate(FOLDERS):
        if number == 8:
            w.cues.calls.clear()
        for name in ("f0", "missing", "f1", "absent", "f2"):
            w.clock.seconds += 0.001
            assert await w.kernel.exists(f"ns/{folder}/{name}") == name.startswith("f")
            await wait_all_tasks_blocked()
    assert w.cues.count(m.Stat) == 2 * (len(FOLDERS) - 8), "of what is missing"
    assert all(lists(w, folder) <= 1 for folder in FOLDERS)


@live()
async def test_a_listing_made_for_names_is_shown_once(w: World) -> None:
    fill(w, ["00"])
    await w.kernel.walk("ns/00")
    for number in range(4):
        await w.kernel.exists(f"ns/00/missing{number}")
    await until(lambda: lists(w, "00") == 1)
    await wait_all_tasks_blocked()
    assert len(await w.kernel.listdir("ns/00")) == 3
    assert lists(w, "00") == 1
    w.remote.put(b"00/made by others", b"")
    assert len(await w.kernel.listdir("ns/00")) == 4


@live()
async def test_a_listing_made_for_names_is_not_shown_once_they_changed(w: World) -> None:
    fill(w, ["00"])
    await w.kernel.walk("ns/00")
    for number in range(4):
        await w.kernel.exists(f"ns/00/missing{number}")
    await until(lambda: lists(w, "00") == 1)
    await wait_all_tasks_blocked()
    await w.kernel.write_file("ns/00/new", b"content")
    found = await w.kernel.listdir("ns/00")
    assert found[b"new"].size == 7


@live()
async def test_what_others_put_into_a_directory_made_here_is_found(w: World) -> None:
    """Also while programs ask for many names elsewhere, and after one was made in it here."""
    for number in range(10):
        assert not await w.kernel.exists(f"ns/{number}")
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/ours", b"ours")
    w.remote.put(b"d/x", b"theirs")
    assert await w.kernel.read_file("ns/d/x") == b"theirs"
    await w.kernel.mkdir("ns/e")
    w.remote.put(b"e/x", b"theirs")
    assert b"x" in await w.kernel.listdir("ns/e")
