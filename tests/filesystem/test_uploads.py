"""Writes on their way to the remote: two handles, writes and fetches meanwhile, refusals."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hpcfs.content.reader import WHOLE_AT_OPEN_BYTES
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import Conflict, NoSpace, NotSupported, Stale, Unreachable
from hpcfs.model.uploads import PART_COPY_BYTES
from hpcfs.protocol import messages as m
from tests.filesystem.world import RW, World, live

OLD, NEW = b"o" * BLOCK_BYTES, b"n" * BLOCK_BYTES
MANY = 1 + WHOLE_AT_OPEN_BYTES // BLOCK_BYTES
"""Blocks of a file of which nothing comes with open(2)."""


@live()
async def test_two_handles_see_each_others_bytes(w: World) -> None:
    one = await w.kernel.open("ns/f", RW | os.O_CREAT)
    two = await w.kernel.open("ns/f", RW)
    await w.kernel.pwrite(one, 0, b"one")
    await w.kernel.pwrite(two, 3, b"two")
    assert await w.kernel.pread(one, 0, 100) == b"onetwo"
    await w.kernel.close(one)
    assert w.remote.get(b"f") == b"onetwo"
    await w.kernel.pwrite(two, 0, b"1")
    await w.kernel.close(two)
    assert w.remote.get(b"f") == b"1netwo"


@live()
async def test_bytes_written_during_an_upload_go_with_the_next(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, OLD)
    held = w.cues.hold(m.Upload, stage="after")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.fsync, handle)
        await held.reached.wait()
        await w.kernel.pwrite(handle, 5, b"newer")
        held.go.set()
    assert w.remote.get(b"f") == OLD
    assert (await w.kernel.fstat(handle)).size == BLOCK_BYTES
    await w.kernel.fsync(handle)
    expected = OLD[:5] + b"newer" + OLD[10:]
    assert w.remote.get(b"f") == expected
    assert await w.kernel.pread(handle, 0, BLOCK_BYTES) == expected


@live()
async def test_a_failed_upload_leaves_newer_and_older_bytes_dirty(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, OLD)
    held = w.cues.hold(m.Upload)
    w.cues.fail(m.Upload, Unreachable("the link is down"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fsync_fails, w, handle)
        await held.reached.wait()
        await w.kernel.pwrite(handle, BLOCK_BYTES - 1, b"newer")
        held.go.set()
    await w.kernel.fsync(handle)
    assert w.remote.get(b"f") == OLD[:-1] + b"newer"


async def _fsync_fails(w: World, handle: int) -> None:
    with pytest.raises(Unreachable):
        await w.kernel.fsync(handle)


@live("sftp")
async def test_a_fetch_waits_for_the_end_of_an_upload(w: World) -> None:
    w.remote.put(b"f", OLD + NEW)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"x")
    held = w.cues.hold(m.Upload, stage="after")
    found: list[bytes] = []

    async def read() -> None:
        found.append(await w.kernel.pread(handle, BLOCK_BYTES, BLOCK_BYTES))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.fsync, handle)
        await held.reached.wait()
        fetches = w.cues.count(m.Fetch)
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert not found
        assert w.cues.count(m.Fetch) == fetches
        held.go.set()
    assert found == [NEW]


@live("sftp")
async def test_a_hole_is_readable_though_the_upload_meanwhile_failed(w: World) -> None:
    """A reader waits for the upload; when it fails, the remote is as short as it was."""
    w.remote.put(b"f", b"short")
    handle = await w.kernel.open("ns/f")
    await w.kernel.ftruncate(handle, 3 * BLOCK_BYTES)
    held = w.cues.hold(m.Upload)
    w.cues.fail(m.Upload, Unreachable("the link is down"))
    found: list[bytes] = []

    async def read() -> None:
        found.append(await w.kernel.pread(handle, 0, 3 * BLOCK_BYTES))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fsync_fails, w, handle)
        await held.reached.wait()
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        held.go.set()
    assert found == [b"short" + bytes(3 * BLOCK_BYTES - 5)]


@live()
async def test_a_prefetch_under_way_does_not_overwrite_what_is_written(w: World) -> None:
    w.remote.put(b"f", OLD * 4)
    handle = await w.kernel.open("ns/f")
    content = w.kernel.node_of(handle).content
    assert content
    held = w.cues.hold(m.Fetch, stage="middle")
    async with trio.open_nursery() as nursery:
        content.reader.prefetch(0, 4 * BLOCK_BYTES)
        await held.reached.wait()
        await w.kernel.pwrite(handle, 4 * BLOCK_BYTES, b"elsewhere")  # the journal knows the file
        nursery.start_soon(w.kernel.pwrite, handle, BLOCK_BYTES, NEW)
        await wait_all_tasks_blocked()
        held.go.set()
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == OLD + NEW + OLD * 2 + b"elsewhere"


@live()
async def test_a_prefetch_that_outlives_its_reader_does_not_either(w: World) -> None:
    """The transfer process writes into the cache file for a while after the reader closed."""
    w.remote.put(b"f", OLD * MANY)
    reader = await w.kernel.open("ns/f", os.O_RDONLY)
    content = w.kernel.node_of(reader).content
    assert content
    held = w.cues.hold(m.Fetch, stage="middle")
    content.reader.prefetch(0, 4 * BLOCK_BYTES)
    await held.reached.wait()
    await w.kernel.close(reader)
    await w.store.save()
    writer = await w.kernel.open("ns/f")
    await w.kernel.pwrite(writer, MANY * BLOCK_BYTES, b"elsewhere")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.pwrite, writer, BLOCK_BYTES, NEW)
        await wait_all_tasks_blocked()
        held.go.set()
    expected = OLD + NEW + OLD * (MANY - 2) + b"elsewhere"
    assert await w.kernel.pread(writer, 0, 2 * MANY * BLOCK_BYTES) == expected
    await w.kernel.close(writer)
    assert w.remote.get(b"f") == expected


@live()
async def test_what_the_remote_refuses_is_kept_and_the_remotes_truth_is_shown(w: World) -> None:
    w.remote.put(b"f", b"what was there")
    handle = await w.kernel.open("ns/f", RW | os.O_TRUNC)
    await w.kernel.pwrite(handle, 0, b"precious bytes")
    w.cues.fail(m.Upload, NoSpace("the quota is used up"), times=2)
    with pytest.raises(NoSpace):
        await w.kernel.close(handle)
    (row,) = w.journal.stranded
    assert (row.path, row.reason, row.ranges) == (b"f", "the quota is used up", [(0, 14)])
    assert w.kept_bytes() == [b"precious bytes"]
    assert (await w.kernel.stat("ns/f")).size == len(b"what was there")
    assert await w.kernel.read_file("ns/f") == b"what was there"
    await w.store.save()
    assert w.kept_bytes() == [b"precious bytes"]


@live()
async def test_what_is_dirty_only_at_the_last_close_is_uploaded_and_the_node_knows(
    w: World,
) -> None:
    """mmap writes after close(2): only release is left, and who opens next needs the version."""
    w.remote.put(b"f", b"old")
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"new")
    await w.kernel.release(handle)
    assert w.remote.get(b"f") == b"new"
    assert await w.kernel.read_file("ns/f") == b"new"


@live()
async def test_open_during_a_failing_last_close_sees_the_remotes_truth(w: World) -> None:
    w.remote.put(b"f", b"remote")
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"LOCAL and longer")
    held = w.cues.hold(m.Upload)
    w.cues.fail(m.Upload, NoSpace("the quota is used up"))
    found: list[bytes] = []

    async def read() -> None:
        found.append(await w.kernel.read_file("ns/f"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.release, handle)
        await held.reached.wait()
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        held.go.set()
    assert found == [b"remote"]
    assert [data[:16] for data in w.kept_bytes()] == [b"LOCAL and longer"]


@live()
async def test_writes_after_unlink_go_nowhere_and_are_readable(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"before")
    await w.kernel.unlink("ns/f")
    await w.kernel.pwrite(handle, 6, b" after")
    w.clock.expire_attributes()
    assert (await w.kernel.fstat(handle)).size == 12
    assert await w.kernel.pread(handle, 0, 100) == b"before after"
    await w.kernel.close(handle)
    assert w.remote.paths() == {}
    assert w.journal.stranded == []


@live("sftp")
async def test_a_removed_files_growth_elsewhere_does_not_reach_what_was_written(w: World) -> None:
    w.remote.put(b"f", b"first")
    item = w.remote.paths()[b"f"]
    handle = await w.kernel.open("ns/f")
    assert await w.kernel.pread(handle, 0, 5) == b"first"
    await w.kernel.unlink("ns/f")
    await w.kernel.pwrite(handle, 5, b" second")
    item.content += b"!" * 100
    item.changes += 1
    w.clock.expire_attributes()
    assert (await w.kernel.fstat(handle)).size == 12
    assert await w.kernel.pread(handle, 0, 100) == b"first second"
    await w.kernel.close(handle)


@live()
async def test_a_dirty_open_file_is_renamed_with_its_bytes(w: World) -> None:
    handle = await w.kernel.open("ns/new", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"content")
    await w.kernel.rename("ns/new", "ns/name")
    await w.kernel.pwrite(handle, 7, b" more")
    await w.kernel.close(handle)
    assert {path: bytes(item.content) for path, item in w.remote.paths().items()} == {
        b"name": b"content more"
    }


@live()
async def test_a_read_that_meets_a_rename_goes_on_under_the_new_name(w: World) -> None:
    w.remote.put(b"f", OLD)
    handle = await w.kernel.open("ns/f")
    fetch, rename = w.cues.hold(m.Fetch), w.cues.hold(m.Rename, stage="after")
    found: list[bytes] = []

    async def read() -> None:
        found.append(await w.kernel.pread(handle, 0, BLOCK_BYTES))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await fetch.reached.wait()
        nursery.start_soon(w.kernel.rename, "ns/f", "ns/g")
        await rename.reached.wait()
        fetch.go.set()
        await wait_all_tasks_blocked()
        rename.go.set()
    assert found == [OLD]
    await w.kernel.close(handle)


@live()
async def test_mknod_gives_a_node_that_lives(w: World) -> None:
    parent, name = await w.kernel.parent("ns/f")
    node = await w.fs.mknod(parent, name, 0o100644)
    assert w.fs.tree.get(node.ino) is node
    assert w.remote.get(b"f") == b""


@live()
async def test_what_others_wrote_since_the_open_is_not_overwritten(w: World) -> None:
    """Both versions stay: the remote's under its name, this one beside it."""
    w.remote.put(b"f", OLD * 2)
    handle = await w.kernel.open("ns/f")
    assert await w.kernel.pread(handle, 0, 2 * BLOCK_BYTES) == OLD * 2
    await w.kernel.pwrite(handle, 0, b"mine")
    w.remote.put(b"f", NEW)
    node = w.kernel.node_of(handle)
    with pytest.raises(Conflict, match=r"is beside it as f\.hpcfs-conflict-"):
        await w.fs.files.flush_handle(handle)
    with pytest.raises(Stale):  # the kernel may still believe that the name is this file's
        await w.fs.files.open(node, os.O_RDONLY)
    assert await w.kernel.pread(handle, 0, 4) == b"mine"
    await w.kernel.release(handle)
    assert w.remote.get(b"f") == NEW
    (beside,) = w.remote.paths().keys() - {b"f"}
    assert w.remote.get(beside) == b"mine" + (OLD * 2)[4:]
    assert await w.kernel.read_file("ns/f") == NEW
    assert w.journal.rows == []
    assert len(w.closer.notices) == 1


@live()
async def test_a_version_that_can_not_be_had_whole_any_more_is_kept(w: World) -> None:
    """Others replaced the file, and of the older version only a part was ever fetched here."""
    w.remote.put(b"f", OLD * 2)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, NEW)
    w.remote.overwrite(b"f", b"theirs")
    with pytest.raises(Conflict, match="is kept"):
        await w.kernel.close(handle)
    assert {path: w.remote.get(path) for path in w.remote.paths()} == {b"f": b"theirs"}
    (row,) = w.journal.stranded
    assert (row.path, row.ranges) == (b"f", [(0, BLOCK_BYTES)])
    assert w.kept_bytes()[0].startswith(NEW)


@live()
async def test_a_file_that_others_made_at_the_same_time_is_not_overwritten(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"mine")
    if w.remote.is_sftp:  # there it exists since it was opened: others can only replace it
        await w.kernel.fsync(handle)
        await w.kernel.pwrite(handle, 0, b"MINE")
    w.remote.put(b"f", b"theirs")
    with pytest.raises(Conflict):
        await w.kernel.close(handle)
    assert w.remote.get(b"f") == b"theirs"
    (beside,) = w.remote.paths().keys() - {b"f"}
    assert w.remote.get(beside).lower() == b"mine"


@live()
async def test_the_journal_holds_a_row_until_the_last_write_is_through(w: World) -> None:
    """A write that waits for a fetch while an upload ends makes bytes dirty afterwards."""
    w.remote.put(b"f", OLD * 2)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pread(handle, BLOCK_BYTES, 1)
    await w.kernel.pwrite(handle, BLOCK_BYTES, b"first")
    content = w.kernel.node_of(handle).content
    assert content
    async with w.closer.uploader.writing(content):
        await w.kernel.fsync(handle)
        assert content.state.has_row
    await w.kernel.close(handle)
    assert not content.state.has_row


@live()
async def test_an_upload_whose_answer_was_lost_can_be_repeated(w: World) -> None:
    """The remote has it, though nobody was told: what was cached of the old version is not there
    any more, and must not be needed."""
    w.remote.put(b"f", OLD * 3)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, b"new")
    w.cues.fail(m.Upload, Unreachable("the link is down"), stage="after")
    with pytest.raises(Unreachable):
        await w.kernel.fsync(handle)
    await w.store.make_room(10**9)
    await w.kernel.pwrite(handle, 5, b"newer")
    await w.kernel.close(handle)
    expected = b"newoonewer" + (OLD * 3)[10:]
    assert w.remote.get(b"f") == expected
    assert await w.kernel.read_file("ns/f") == expected
    assert w.journal.stranded == []


@live()
async def test_times_are_the_same_after_close_as_before(w: World) -> None:
    """Also of a file that nothing is written to: the remote's clock and ours differ."""
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.ftruncate(handle, 0)
    open_times = (await w.kernel.fstat(handle)).mtime_ns
    await w.kernel.close(handle)
    w.clock.expire_attributes()
    assert (await w.kernel.stat("ns/f")).mtime_ns == open_times


@live()
async def test_times_of_a_written_file_are_the_same_after_close_as_before(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"bytes")
    open_times = (await w.kernel.fstat(handle)).mtime_ns
    await w.kernel.close(handle)
    w.clock.expire_attributes()
    assert (await w.kernel.stat("ns/f")).mtime_ns == open_times


LARGE = OLD * (PART_COPY_BYTES // BLOCK_BYTES + 1)
CHANGED_AT = 5 * BLOCK_BYTES + 7
CHANGED = LARGE[:CHANGED_AT] + b"changed" + LARGE[CHANGED_AT + 7 :] + b"more"


async def change_in_the_middle(w: World) -> int:
    """A large object, of which a little is changed; returns the open file."""
    w.remote.copies_parts = True
    w.remote.put(b"f", LARGE)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, CHANGED_AT, b"changed")
    await w.kernel.pwrite(handle, len(LARGE), b"more")
    return handle


@live("s3", max_blocks=1000)
async def test_of_a_large_object_only_what_changed_is_sent(w: World) -> None:
    """And only the blocks that it is in were fetched."""
    await w.kernel.close(await change_in_the_middle(w))
    assert w.remote.get(b"f") == CHANGED
    (upload,) = [call for call in w.cues.calls if isinstance(call, m.Upload)]
    assert not upload.request.whole
    assert sum(length for _, length in upload.request.ranges) == 11
    fetched = sum(call.length for call in w.cues.calls if isinstance(call, m.Fetch))
    assert fetched <= 2 * BLOCK_BYTES
    assert await w.kernel.read_file("ns/f") == CHANGED


@live("s3", max_blocks=1000)
async def test_where_the_server_can_not_copy_parts_all_is_sent(w: World) -> None:
    w.cues.fail(m.Upload, NotSupported("this server can't copy by parts"))
    await w.kernel.close(await change_in_the_middle(w))
    assert w.remote.get(b"f") == CHANGED
    uploads = [call for call in w.cues.calls if isinstance(call, m.Upload)]
    assert [upload.request.whole for upload in uploads] == [False, True]
    assert uploads[0].request.base_version == uploads[1].request.base_version


@live("s3", max_blocks=1000)
async def test_an_upload_of_parts_that_failed_is_repeated_as_it_was(w: World) -> None:
    """What is not in the cache must not be sent from there."""
    handle = await change_in_the_middle(w)
    w.cues.fail(m.Upload, Unreachable("the link is down"))
    with pytest.raises(Unreachable):
        await w.kernel.fsync(handle)
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == CHANGED


@live("sftp")
async def test_closing_a_second_descriptor_of_a_new_file_uploads_nothing(w: World) -> None:
    """As the shell does it for `program > file`."""
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.fs.files.flush_handle(handle)
    assert w.cues.count(m.Upload) == 0
    await w.kernel.pwrite(handle, 0, b"content")
    await w.kernel.close(handle)
    assert w.cues.count(m.Upload) == 1
    assert w.remote.get(b"f") == b"content"
    empty = await w.kernel.open("ns/empty", RW | os.O_CREAT)
    times = (await w.kernel.fstat(empty)).mtime_ns
    await w.kernel.close(empty)
    w.clock.expire_attributes()
    assert (await w.kernel.stat("ns/empty")).mtime_ns == times
