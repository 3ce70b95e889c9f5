"""What happens to a file while something else of it, or of its directory, is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hpcfs.content.content import Content
from hpcfs.content.record import Unconfirmed, flags_of
from hpcfs.content.state import Changes, Durability, RemoteSide, State
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.protocol import messages as m
from hpcfs.writeback.journal import Journal
from tests.filesystem.test_back import back
from tests.filesystem.world import RW, World, live

ENTRY = Entry(b"f", 0o100644, 3, 0, 0, 1, 1, b"v")
CAPABILITIES = Capabilities(
    partial_writes=True, creates_on_upload=False, handles=True, mtime_resolution_ns=10**9
)


def content_of(w: World, handle: int) -> Content:
    content = w.kernel.node_of(handle).content
    assert content
    return content


@live("sftp")
async def test_a_file_that_is_uploaded_while_a_rename_waits_is_waited_for_too(w: World) -> None:
    """It came into being in the directory after the rename had looked for open files there."""
    await w.kernel.mkdir("ns/d")
    first = await w.kernel.open("ns/d/x", RW | os.O_CREAT)
    await w.kernel.fsync(first)
    lock = content_of(w, first).upload.lock
    await lock.acquire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.rename, "ns/d", "ns/e")
        await wait_all_tasks_blocked()
        second = await w.kernel.open("ns/d/y", RW | os.O_CREAT)
        await w.kernel.pwrite(second, 0, b"content")
        held = w.cues.hold(m.Upload)
        nursery.start_soon(w.kernel.fsync, second)
        await held.reached.wait()
        lock.release()
        await wait_all_tasks_blocked()
        assert w.cues.count(m.Rename) == 0
        held.go.set()
    assert w.remote.get(b"e/y") == b"content"
    await w.kernel.close(first)
    await w.kernel.close(second)


@live()
async def test_a_sync_waits_for_last_closes(w: World) -> None:
    """close(2) returned with an error, and the kernel releases the file a moment later: until then
    it is uploaded once more, or stranded."""
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"content")
    held = w.cues.hold(m.Upload)
    has_returned = False

    async def sync() -> None:
        nonlocal has_returned
        await w.pending.sync(None, b"", ignore)
        has_returned = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.release, handle)
        await held.reached.wait()
        assert [row.path for row in w.pending.pending()] == [b"f"]
        nursery.start_soon(sync)
        await wait_all_tasks_blocked()
        assert not has_returned
        held.go.set()
    assert w.remote.get(b"f") == b"content"
    assert w.pending.pending() == []


async def ignore(_: object) -> None:
    pass


@back()
async def test_what_was_uploaded_meanwhile_is_not_discarded(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"content")
    held = w.cues.hold(m.Upload, stage="after")
    await w.kernel.close(handle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.queue.wait_for, w.closer.dirty())
        await held.reached.wait()
        nursery.start_soon(w.pending.discard, [row.id for row in w.pending.pending()])
        await wait_all_tasks_blocked()
        held.go.set()
    assert w.remote.get(b"f") == b"content"
    assert await w.kernel.read_file("ns/f") == b"content"
    assert w.journal.rows == []


@back()
async def test_a_row_that_was_removed_while_it_was_noted_is_noted_again(w: World) -> None:
    """An upload confirms while a close waits for the journal: the next write notes the file anew,
    as if it had no row."""
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await w.kernel.pwrite(handle, 0, b"content")
    content, noted, go = content_of(w, handle), trio.Event(), trio.Event()
    note = Journal.note

    async def slow(journal: Journal, *args: object, **named: object) -> None:
        await note(journal, *args, **named)  # type: ignore[arg-type]
        noted.set()
        await go.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "note", slow)
        await forget_while_it_is_persisted(w, content, noted, go)
    assert content.state.durability is Durability.UNJOURNALED
    await w.kernel.pwrite(handle, 0, b"CONTENT")
    assert [row.path for row in w.journal.rows] == [b"f"]
    await w.kernel.close(handle)
    await w.queue.wait_for(w.closer.dirty())


async def forget_while_it_is_persisted(
    w: World, content: Content, noted: trio.Event, go: trio.Event
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.closer.uploader.persist, content)
        await noted.wait()
        await w.closer.uploader.forget(content)
        go.set()


def row(**flags: object) -> Unconfirmed:
    return Unconfirmed(
        "n", "ns", "origin", b"f", 3, 3, [], "data", b"v", ENTRY, CAPABILITIES,
        **flags,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_row_of_which_nothing_was_written_brings_nothing() -> None:
    """Noted before the first byte of a write, which waited for the remote when it was killed."""
    assert not row(writing=True).unsent
    assert row(resized=True).unsent.changes is Changes.RESIZED
    assert row(new=True).unsent.changes is Changes.ANY


def test_what_was_appended_to_an_empty_file_still_belongs_to_its_end(tmp_path: Path) -> None:
    state = State()
    state.note_changed(Changes.APPENDED)
    state.begin_upload()
    state.fail_upload(begun=True)
    assert state.remote is RemoteSide.PARTIAL
    again = row(**flags_of(state, base_size=0))
    assert again.unsent.changes is Changes.APPENDED
