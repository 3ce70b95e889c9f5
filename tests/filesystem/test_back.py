"""`back` mode: what close(2) and other calls promise before the remote hears of anything, what is
uploaded in the end, and what the next mount takes up."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hpcfs.cache.file import CacheFile
from hpcfs.filesystem.create_predictor import RUN
from hpcfs.model.entries import BLOCK_BYTES, Attributes, Entry
from hpcfs.model.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    JournalFull,
    NoSpace,
    NotConnected,
    RemoteError,
)
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import WriteMode
from tests.filesystem.world import KINDS, RW, Story, World, live, until, world
from tests.support.memory_remote import MemoryRemote

OLD, NEW = b"o" * BLOCK_BYTES, b"n" * BLOCK_BYTES
NOTHING_UPLOADED = (m.Upload, m.Create, m.UploadPiece)


back = partial(live, write="back")


async def synced(w: World) -> None:
    await w.queue.wait_for(w.closer.dirty())


def uploads(w: World) -> int:
    return w.cues.count(m.Upload)


@back()
async def test_close_returns_before_the_remote_heard_of_the_file(w: World) -> None:
    held = w.cues.hold(m.Upload)
    await w.kernel.write_file("ns/f", NEW)
    assert w.remote.paths() == {}
    assert w.cues.count(m.Create) == 0
    (row,) = w.journal.rows
    assert (row.path, row.size, row.new, row.ranges) == (b"f", len(NEW), True, [(0, BLOCK_BYTES)])
    assert await w.kernel.read_file("ns/f") == NEW
    assert (await w.kernel.stat("ns/f")).size == len(NEW)
    assert set(await w.kernel.listdir("ns")) == {b"f"}
    held.go.set()
    await synced(w)
    assert w.remote.get(b"f") == NEW
    assert w.journal.rows == []


@back()
async def test_a_file_that_goes_up_while_its_directory_is_listed_is_listed(w: World) -> None:
    """By the remote, or, where the file came too late for that, from here."""
    listed: set[bytes] = set()

    async def read() -> None:
        listed.update(await w.kernel.listdir("ns"))

    for stage in ("before", "after"):
        await w.kernel.write_file(f"ns/{stage}", NEW)
        held = w.cues.hold(m.List, stage=stage)
        listed.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await held.reached.wait()
            await synced(w)
            held.go.set()
        assert stage.encode() in listed


@back()
async def test_no_older_listing_tells_of_what_was_just_uploaded(w: World) -> None:
    """It comes when the remote has the file, and the journal does not know it yet."""
    w.remote.put(b"old", OLD)
    handle = await w.kernel.open("ns/old", RW)
    await w.kernel.pwrite(handle, len(OLD), NEW)
    await w.kernel.close(handle)
    await w.kernel.write_file("ns/new", NEW)
    held = w.cues.hold(m.List, stage="after")
    listed: set[bytes] = set()
    read = trio.Event()
    confirm = w.journal.confirm

    async def list_first(name: str) -> None:
        held.go.set()
        await read.wait()
        await confirm(name)

    async def list_all() -> None:
        listed.update(await w.kernel.listdir("ns"))
        read.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.journal, "confirm", list_first)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(list_all)
            await held.reached.wait()
            await synced(w)
    assert listed == {b"old", b"new"}
    assert (await w.kernel.stat("ns/old")).size == 2 * BLOCK_BYTES
    assert await w.kernel.read_file("ns/old") == OLD + NEW


@back()
async def test_fsync_returns_when_the_remote_has_it(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, NEW)
    await w.kernel.fsync(handle)
    assert w.remote.get(b"f") == NEW
    await w.kernel.close(handle)


@back()
async def test_a_file_goes_up_once_with_its_last_name_and_attributes(w: World) -> None:
    """As rsync does it: a temporary name, mode and times, and then the name."""
    await w.kernel.write_file("ns/.f.tmp", NEW)
    await w.kernel.setattr("ns/.f.tmp", Attributes(mtime_ns=10**18))
    await w.kernel.setattr("ns/.f.tmp", Attributes(mode=0o600))
    await w.kernel.rename("ns/.f.tmp", "ns/f")
    assert (await w.kernel.stat("ns/f")).mtime_ns == 10**18
    await synced(w)
    assert set(w.remote.paths()) == {b"f"}
    item = w.remote.paths()[b"f"]
    assert (item.mtime_ns, stat.S_IMODE(item.mode), bytes(item.content)) == (10**18, 0o600, NEW)
    assert uploads(w) == 1
    assert w.cues.count(m.Rename) == w.cues.count(m.SetAttributes) == 0


@back()
async def test_a_file_renamed_over_another_takes_its_place_in_one_step(w: World) -> None:
    w.remote.put(b"f", OLD, 0o604)
    await w.kernel.write_file("ns/tmp", NEW)
    await w.kernel.rename("ns/tmp", "ns/f")
    assert await w.kernel.read_file("ns/f") == NEW
    assert w.remote.get(b"f") == OLD
    await synced(w)
    assert {path: w.remote.get(path) for path in w.remote.paths()} == {b"f": NEW}
    (upload,) = [call for call in w.cues.calls if isinstance(call, m.Upload)]
    assert upload.request.replace


@back()
async def test_a_file_renamed_over_one_that_waits_replaces_it(w: World) -> None:
    await w.kernel.write_file("ns/f", OLD)
    await w.kernel.write_file("ns/tmp", NEW)
    await w.kernel.rename("ns/tmp", "ns/f")
    (row,) = w.journal.rows
    assert row.path == b"f"
    await synced(w)
    assert {path: w.remote.get(path) for path in w.remote.paths()} == {b"f": NEW}
    assert uploads(w) == 1


@back()
async def test_what_replaces_another_file_is_more_than_a_new_one(w: World) -> None:
    """Removed or renamed again before it went up: the other one must not come back."""
    for name in ("f", "g"):
        w.remote.put(name.encode(), OLD)
        await w.kernel.write_file("ns/tmp", NEW)
        await w.kernel.rename("ns/tmp", f"ns/{name}")
    await w.kernel.unlink("ns/f")
    await w.kernel.rename("ns/g", "ns/h")
    await synced(w)
    assert {path: w.remote.get(path) for path in w.remote.paths()} == {b"h": NEW}


@back()
async def test_a_directory_that_is_filled_here_costs_no_questions(w: World) -> None:
    """What rsync asks for each file: is it there, a temporary name, mode and times, the name."""
    w.kernel.process = 7
    await w.kernel.mkdir("ns/d")
    for number in range(RUN):
        if number == RUN // 2:
            w.cues.calls.clear()
        await w.kernel.exists(f"ns/d/{number}")
        await w.kernel.write_file(f"ns/d/.{number}.tmp", NEW)
        await w.kernel.setattr(f"ns/d/.{number}.tmp", Attributes(mode=0o600, mtime_ns=10**18))
        await w.kernel.rename(f"ns/d/.{number}.tmp", f"ns/d/{number}")
    asked = [call for call in w.cues.calls if not isinstance(call, m.List | m.Upload)]
    assert asked == []
    await synced(w)
    assert len(w.remote.paths()) == RUN + 1


@back()
async def test_a_temporary_file_never_goes_up(w: World) -> None:
    await w.kernel.write_file("ns/tmp", NEW)
    await w.kernel.unlink("ns/tmp")
    assert w.journal.rows == []
    assert not await w.kernel.exists("ns/tmp")
    await synced(w)
    assert not any(isinstance(call, NOTHING_UPLOADED) for call in w.cues.calls)
    w.kernel.forget_all()
    await until(lambda: len(w.fs.tree) == 2)


@back()
async def test_what_waits_has_its_name(w: World) -> None:
    held = w.cues.hold(m.Upload)
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/f", b"x")
    for refused in (w.kernel.mkdir("ns/d/f"), w.kernel.symlink("ns/d/f", b"t")):
        with pytest.raises(AlreadyExists):
            await refused
    with pytest.raises(DirectoryNotEmpty):
        await w.kernel.rmdir("ns/d")
    await w.kernel.write_file("ns/g", b"y")
    with pytest.raises(AlreadyExists):
        await w.kernel.rename("ns/g", "ns/d/f", replace=False)
    held.go.set()


@back()
async def test_a_directory_with_what_waits_is_not_replaced(w: World) -> None:
    held = w.cues.hold(m.Upload)
    for name in ("d", "e"):
        await w.kernel.mkdir(f"ns/{name}")
    await w.kernel.write_file("ns/d/f", NEW)
    with pytest.raises(DirectoryNotEmpty):
        await w.kernel.rename("ns/e", "ns/d")
    assert await w.kernel.read_file("ns/d/f") == NEW
    held.go.set()


@back()
async def test_a_directory_is_read_only_once_what_waits_in_it_is_there(w: World) -> None:
    """As cp -a and tar leave it: afterwards nothing can be made in it."""
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/f", NEW)
    await w.kernel.setattr("ns/d", Attributes(mode=0o555))
    kinds = [type(call) for call in w.cues.calls]
    assert kinds.index(m.Upload) < kinds.index(m.SetAttributes)
    assert w.remote.get(b"d/f") == NEW


@back()
async def test_a_directory_is_renamed_once_what_waits_in_it_is_there(w: World) -> None:
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/f", NEW)
    await w.kernel.rename("ns/d", "ns/e")
    assert w.remote.get(b"e/f") == NEW
    assert await w.kernel.read_file("ns/e/f") == NEW


@back()
async def test_an_existing_file_is_changed_in_the_journal_first(w: World) -> None:
    w.remote.put(b"f", OLD * 3)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, BLOCK_BYTES + 5, b"changed")
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == OLD * 3
    expected = OLD + OLD[:5] + b"changed" + OLD[12:] + OLD
    assert await w.kernel.read_file("ns/f") == expected
    await synced(w)
    assert w.remote.get(b"f") == expected


@back()
async def test_many_files_go_up_at_once(w: World) -> None:
    held = [w.cues.hold(m.Upload) for _ in range(20)]
    for number in range(20):
        await w.kernel.write_file(f"ns/{number}", b"%d" % number)
    w.queue._hurry_all()
    for one in held:
        await one.reached.wait()
    for one in held:
        one.go.set()
    await synced(w)
    assert len(w.remote.paths()) == 20


@back()
async def test_what_is_written_while_it_goes_up_goes_up_after_it(w: World) -> None:
    await w.kernel.write_file("ns/f", OLD)
    held = w.cues.hold(m.Upload, stage="after")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(synced, w)
        await held.reached.wait()
        handle = await w.kernel.open("ns/f")
        await w.kernel.pwrite(handle, 1, b"new")
        await w.kernel.close(handle)
        held.go.set()
    await synced(w)
    assert w.remote.get(b"f") == OLD[:1] + b"new" + OLD[4:]


@back()
async def test_without_a_connection_it_waits_and_is_readable(w: World) -> None:
    down = NotConnected("the link is down")
    await w.kernel.write_file("ns/f", NEW)
    w.cues.fail(m.Upload, down, times=2)
    w.cues.fail(m.Stat, down, times=100)
    with pytest.raises(RemoteError, match="ns/f: the link is down"):
        await synced(w)
    assert await w.kernel.read_file("ns/f") == NEW
    (row,) = w.journal.rows
    assert (row.attempted, row.reason) == (False, "")
    w.cues.clear()
    await synced(w)
    assert w.remote.get(b"f") == NEW


@back()
async def test_what_the_remote_refuses_stays_is_listed_and_told_once(w: World) -> None:
    await w.kernel.write_file("ns/f", NEW)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    with pytest.raises(RemoteError, match="the quota is used up"):
        await synced(w)
    await until(lambda: bool(w.journal.rows) and bool(w.journal.rows[0].reason))
    assert w.journal.rows[0].reason == "the quota is used up"
    assert await w.kernel.read_file("ns/f") == NEW
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"more")
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    with pytest.raises(NoSpace):
        await w.kernel.close(handle)
    await synced_in_the_end(w)
    assert w.remote.get(b"f") == b"more" + NEW[4:]
    assert w.journal.rows == []


async def synced_in_the_end(w: World) -> None:
    """The user asks again, after the remote refused once more."""
    with pytest.raises(RemoteError):
        await synced(w)
    await synced(w)


@back()
async def test_what_others_wrote_meanwhile_is_not_overwritten(w: World) -> None:
    w.remote.put(b"f", OLD)
    assert await w.kernel.read_file("ns/f") == OLD
    held = w.cues.hold(m.Upload)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"mine")
    await w.kernel.close(handle)
    w.remote.put(b"f", b"theirs")
    held.go.set()
    await until(lambda: bool(w.closer.notices))
    assert w.remote.get(b"f") == b"theirs"
    (beside,) = w.remote.paths().keys() - {b"f"}
    assert w.remote.get(beside) == b"mine" + OLD[4:]
    assert await w.kernel.read_file("ns/f") == b"theirs"
    await until(lambda: not w.journal.rows)


@back("sftp")
async def test_times_of_a_directory_outlast_the_uploads_into_it(w: World) -> None:
    """rsync and tar set them last. Who waits for the uploads waits for that, too."""
    held = w.cues.hold(m.Upload)
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/f", NEW)
    await w.kernel.setattr("ns/d", Attributes(mtime_ns=10**18))
    directory = w.remote.paths()[b"d"]
    assert directory.mtime_ns == 10**18
    again = w.cues.hold(m.SetAttributes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(synced, w)
        await held.reached.wait()
        directory.mtime_ns = 5  # what the file's upload makes of it
        held.go.set()
        await again.reached.wait()
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        again.go.set()
    assert directory.mtime_ns == 10**18


@back("sftp")
async def test_times_of_a_directory_outlast_an_upload_that_ends_meanwhile(w: World) -> None:
    """The remote set them first, and was heard last."""
    upload = w.cues.hold(m.Upload)
    await w.kernel.mkdir("ns/d")
    await w.kernel.write_file("ns/d/f", NEW)
    setting = w.cues.hold(m.SetAttributes, stage="after")
    directory = w.remote.paths()[b"d"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(synced, w)
        await upload.reached.wait()
        nursery.start_soon(w.kernel.setattr, "ns/d", Attributes(mtime_ns=10**18))
        await setting.reached.wait()
        assert directory.mtime_ns == 10**18
        directory.mtime_ns = 5  # what the file's upload makes of it
        upload.go.set()
        await until(lambda: not w.journal.rows)
        setting.go.set()
    assert directory.mtime_ns == 10**18


@back()
async def test_a_full_journal_makes_writers_wait(w: World) -> None:
    backlog = w.queue
    backlog.limit = 2 * BLOCK_BYTES
    held = w.cues.hold(m.Upload)
    await w.kernel.write_file("ns/f", NEW * 3)
    handle = await w.kernel.open("ns/g", RW | os.O_CREAT)
    written = trio.Event()

    async def write() -> None:
        await w.kernel.pwrite(handle, 0, NEW)
        written.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await held.reached.wait()
        await wait_all_tasks_blocked(0.05)
        assert not written.is_set()
        held.go.set()
        await written.wait()
    await w.kernel.close(handle)


@back()
async def test_a_journal_full_of_what_is_refused_lets_write_on(w: World) -> None:
    """Nothing could make room by itself: the disk decides then."""
    w.queue.limit = BLOCK_BYTES
    await w.kernel.write_file("ns/f", NEW * 3)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    with pytest.raises(RemoteError):
        await synced(w)
    await w.kernel.write_file("ns/g", NEW)
    await synced(w)
    assert w.remote.get(b"g") == NEW


@back()
async def test_what_fsync_brought_does_not_count_as_waiting(w: World) -> None:
    backlog = w.queue
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, NEW)
    await w.kernel.fsync(handle)
    await w.kernel.close(handle)
    assert (backlog._bytes, backlog._counted) == (0, {})


@back()
async def test_a_reason_is_not_forgotten_while_nothing_changes(w: World) -> None:
    """The daemon brings the journal up to date every two seconds."""
    await refused(w)
    await until(lambda: bool(w.journal.rows[0].reason))
    noted = w.journal.rows
    await w.closer.note_dirty()
    assert w.journal.rows == noted


def test_a_journal_that_stays_full_is_an_error(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path, "sftp", write="back") as w:
            w.queue.limit = BLOCK_BYTES
            await w.kernel.write_file("ns/f", NEW * 3)
            held = w.cues.hold(m.Upload)
            handle = await w.kernel.open("ns/g", RW | os.O_CREAT)
            with pytest.raises(JournalFull):
                await w.kernel.pwrite(handle, 0, NEW)
            held.go.set()
            await w.kernel.close(handle)

    trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0.05))


# --- what the user asks for -----------------------------------------------------------------------


async def refused(w: World, path: str = "ns/f", data: bytes = NEW) -> str:
    """A file that the remote refused; returns its id."""
    await w.kernel.write_file(path, data)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    with pytest.raises(RemoteError):
        await synced(w)
    (row,) = w.pending.pending()
    assert (row.state, row.reason, row.size) == ("failed", "the quota is used up", len(data))
    return row.id


@back()
async def test_what_was_refused_is_tried_again_when_the_user_says_so(w: World) -> None:
    await w.pending.retry([await refused(w)])
    await until(lambda: not w.journal.rows)
    assert w.remote.get(b"f") == NEW
    assert w.pending.pending() == []


@back()
async def test_an_interrupted_close_leaves_it_to_the_next_to_tell_of_a_refusal(w: World) -> None:
    await refused(w)
    held = w.cues.hold(m.Upload)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, 8 * NEW)
    with trio.CancelScope() as scope:
        scope.cancel()
        await w.fs.files.flush_handle(handle)
    assert scope.cancelled_caught
    with pytest.raises(NoSpace, match="the quota is used up"):
        await w.kernel.close(handle)
    held.go.set()
    await synced(w)
    assert w.remote.get(b"f") == 8 * NEW


@back()
async def test_what_was_refused_can_be_copied_out(w: World) -> None:
    w.remote.put(b"f", OLD * 3)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 2 * BLOCK_BYTES, b"new")
    await w.kernel.close(handle)
    (row,) = w.pending.pending()
    target = w.directory / "copy"
    assert await w.pending.recover(row.id, target) == 3 * BLOCK_BYTES
    assert target.read_bytes() == OLD * 2 + b"new" + OLD[3:]


@back()
async def test_what_is_given_up_is_gone_and_the_remotes_version_shows(w: World) -> None:
    w.remote.put(b"f", OLD)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"mine")
    await w.kernel.close(handle)
    await w.kernel.write_file("ns/new", NEW)
    await w.pending.discard([row.id for row in w.pending.pending()])
    assert w.pending.pending() == w.journal.rows == []
    assert await w.kernel.read_file("ns/f") == OLD
    assert not await w.kernel.exists("ns/new")
    assert uploads(w) == 0


@live()
async def test_a_kept_file_is_shown_and_uploaded_again(w: World) -> None:
    """`through` mode: the program was told, and the mount shows what the remote has."""
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"precious")
    w.cues.fail(m.Upload, NoSpace("the quota is used up"), times=2)
    with pytest.raises(NoSpace):
        await w.kernel.close(handle)
    (row,) = w.pending.pending()
    assert (row.state, row.path) == ("kept", b"f")
    await w.pending.retry([row.id])
    assert await w.kernel.read_file("ns/f") == b"precious"
    await until(lambda: not w.journal.rows)
    assert w.remote.get(b"f") == b"precious"
    assert list((w.directory / "kept").iterdir()) == []


# --- the next mount -------------------------------------------------------------------------------

Left = Callable[[World], Awaitable[None]]


def killed_and_mounted_again(
    tmp_path: Path,
    kind: str,
    left: Left,
    then: Story,
    others: dict[str, MemoryRemote] | None = None,
    write: WriteMode = "back",
) -> None:
    """`left` happens on a mount that is killed; `then` on the one that follows it, whose remote and
    cache directory are the same as they were at that moment. `others` are mounted instead."""

    async def first() -> dict[str, MemoryRemote]:
        async with world(tmp_path / "cache", kind, write=write) as w:
            w.cues.fail(m.Upload, NotConnected("the link is down"), times=1000)
            await left(w)
            await trio.run_process(["cp", "-a", str(tmp_path / "cache"), str(tmp_path / "crash")])
            found = dict(w.remotes)
            w.cues.clear()
            for content in w.closer.dirty():  # nothing of it goes up at this mount's end
                w.queue.gone(content)
                content.discard()
            return found

    async def second(remotes: dict[str, MemoryRemote]) -> None:
        async with world(tmp_path / "crash", remotes, write=write) as w:
            with trio.fail_after(20):
                await then(w)

    remotes = trio.run(first)
    (tmp_path / "crash" / "journal.db-shm").unlink()
    trio.run(second, others or remotes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_shows_and_uploads_what_was_closed(kind: str, tmp_path: Path) -> None:
    async def left(w: World) -> None:
        await w.kernel.mkdir("ns/d")
        await w.kernel.write_file("ns/d/f", NEW)
        await w.kernel.write_file("ns/empty", b"")
        await w.kernel.setattr("ns/d/f", Attributes(mode=0o600, mtime_ns=10**18))

    async def then(w: World) -> None:
        held = w.cues.hold(m.Upload)
        assert await w.kernel.read_file("ns/d/f") == NEW
        entry = await w.kernel.stat("ns/d/f")
        assert (stat.S_IMODE(entry.mode), entry.mtime_ns) == (0o600, 10**18)
        held.go.set()
        await synced(w)
        assert {p: w.remote.get(p) for p in (b"d/f", b"empty")} == {b"d/f": NEW, b"empty": b""}
        item = w.remote.paths()[b"d/f"]
        assert (stat.S_IMODE(item.mode), item.mtime_ns) == (0o600, 10**18)
        assert w.journal.rows == []

    killed_and_mounted_again(tmp_path, kind, left, then)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_shows_as_much_of_a_file_as_it_will_upload(
    kind: str, tmp_path: Path
) -> None:
    """The first write to an old file is noted before the file's new size is the mount's."""
    original = OLD + b"more"

    async def left(w: World) -> None:
        w.remote.put(b"f", original)
        handle = await w.kernel.open("ns/f")
        await w.kernel.pwrite(handle, len(original), b"appended")

    async def then(w: World) -> None:
        held = w.cues.hold(m.Upload)
        assert (await w.kernel.stat("ns/f")).size == len(original) + 8
        assert await w.kernel.read_file("ns/f") == original + b"appended"
        held.go.set()
        await synced(w)
        assert w.remote.get(b"f") == original + b"appended"

    killed_and_mounted_again(tmp_path, kind, left, then)


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_up_while_the_next_mount_lists_its_directory_is_listed(
    kind: str, tmp_path: Path
) -> None:
    """Nobody had asked for the file, so that nothing is known of it once it is uploaded."""

    async def left(w: World) -> None:
        w.remote.put(b"log", OLD)
        await w.kernel.write_file("ns/f", NEW)
        handle = await w.kernel.open("ns/log")
        await w.kernel.pwrite(handle, len(OLD), b"appended")
        await w.kernel.close(handle)

    async def then(w: World) -> None:
        listed: dict[bytes, Entry] = {}
        held = w.cues.hold(m.List, stage="after")

        async def read() -> None:
            listed.update(await w.kernel.listdir("ns"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await held.reached.wait()
            await synced(w)
            held.go.set()
        sizes = {name: entry.size for name, entry in listed.items()}
        assert (sizes.get(b"f"), sizes.get(b"log")) == (len(NEW), len(OLD) + 8)

    killed_and_mounted_again(tmp_path, kind, left, then)


def test_the_journal_claims_no_bytes_that_are_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after it was cut, the file must not come back with zeros in their place."""
    claimed: list[list[tuple[int, int]]] = []

    async def story() -> None:
        async with world(tmp_path, "sftp", write="back") as w:
            await w.kernel.write_file("ns/f", NEW * 2)
            resize = CacheFile.resize

            def noting(file: CacheFile, size: int) -> None:
                claimed.extend(row.ranges for row in w.journal.rows)
                resize(file, size)

            with monkeypatch.context() as patches:
                patches.setattr(CacheFile, "resize", noting)
                await w.kernel.truncate("ns/f", 100)
            await synced(w)
            assert w.remote.get(b"f") == NEW[:100]

    trio.run(story)
    assert claimed == [[(0, 100)]]


@back("s3")
async def test_what_an_upload_replaces_is_in_the_journal_with_it(w: World) -> None:
    """Killed before the answer is heard, nobody else has the old content's other blocks."""
    w.remote.put(b"f", OLD * 3)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, BLOCK_BYTES, NEW)
    await w.kernel.close(handle)
    held = w.cues.hold(m.Upload, stage="after")
    w.queue.retry(*w.closer.dirty())
    await held.reached.wait()
    (row,) = w.journal.rows
    assert (row.attempted, row.ranges) == (True, [(0, 3 * BLOCK_BYTES)])
    held.go.set()
    await synced(w)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_knows_what_is_under_the_changed_ranges(kind: str, tmp_path: Path) -> None:
    original = OLD * 3

    async def left(w: World) -> None:
        w.remote.put(b"f", original)
        handle = await w.kernel.open("ns/f")
        await w.kernel.pwrite(handle, BLOCK_BYTES + 5, b"changed")
        await w.kernel.close(handle)

    async def then(w: World) -> None:
        expected = original[: BLOCK_BYTES + 5] + b"changed" + original[BLOCK_BYTES + 12 :]
        assert await w.kernel.read_file("ns/f") == expected
        await synced(w)
        assert w.remote.get(b"f") == expected

    killed_and_mounted_again(tmp_path, kind, left, then)


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_being_written_is_not_lost_either(
    kind: str, write: WriteMode, tmp_path: Path
) -> None:
    """Nobody was told that it is safe; but a killed daemon is no reason to throw it away."""

    async def left(w: World) -> None:
        w.remote.put(b"old", OLD * 3)
        new = await w.kernel.open("ns/new", RW | os.O_CREAT)
        for block in range(3):
            await w.kernel.pwrite(new, 2 * block * BLOCK_BYTES, NEW)
        old = await w.kernel.open("ns/old")
        await w.kernel.pwrite(old, BLOCK_BYTES, b"changed")
        cut = await w.kernel.open("ns/cut", RW | os.O_CREAT)
        await w.kernel.pwrite(cut, 0, NEW)
        await w.kernel.ftruncate(cut, 7)

    async def then(w: World) -> None:
        hole = bytes(BLOCK_BYTES)
        expected = {
            "new": NEW + hole + NEW + hole + NEW,
            "old": OLD + b"changed" + OLD[7:] + OLD,
            "cut": NEW[:7],
        }
        for name, content in expected.items():
            assert await w.kernel.read_file(f"ns/{name}") == content, name
        await synced(w)
        for name, content in expected.items():
            assert w.remote.get(name.encode()) == content

    killed_and_mounted_again(tmp_path, kind, left, then, write=write)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_mount_does_not_overwrite_what_others_wrote_meanwhile(
    kind: str, tmp_path: Path
) -> None:
    async def left(w: World) -> None:
        w.remote.put(b"f", OLD)
        handle = await w.kernel.open("ns/f", RW | os.O_TRUNC)
        await w.kernel.pwrite(handle, 0, b"mine")
        await w.kernel.close(handle)
        w.remote.put(b"f", b"theirs")

    async def then(w: World) -> None:
        await until(lambda: bool(w.closer.notices))
        assert w.remote.get(b"f") == b"theirs"
        (beside,) = w.remote.paths().keys() - {b"f"}
        assert w.remote.get(beside) == b"mine"

    killed_and_mounted_again(tmp_path, kind, left, then)


@pytest.mark.parametrize("kind", KINDS)
def test_what_belongs_to_no_namespace_any_more_is_kept(kind: str, tmp_path: Path) -> None:
    async def left(w: World) -> None:
        await w.kernel.write_file("ns/f", NEW)

    async def then(w: World) -> None:
        (row,) = w.journal.stranded
        assert (
            row.reason == "its namespace ns is not in the configuration any more, or read-only now"
        )
        assert w.kept_bytes() == [NEW]

    other = {"other": MemoryRemote(kind)}
    killed_and_mounted_again(tmp_path, kind, left, then, other)


@back()
async def test_what_the_remote_refuses_can_be_replaced(w: World) -> None:
    w.remote.put(b"old", OLD)
    w.remote.put(b"better", NEW)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"), times=100)
    await w.kernel.write_file("ns/old", b"too much")
    await w.kernel.rename("ns/better", "ns/old")
    w.cues.clear()
    await synced(w)
    assert {path: w.remote.get(path) for path in w.remote.paths()} == {b"old": NEW}
    assert w.journal.rows == []
