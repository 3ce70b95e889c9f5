"""Requests that were not sent, or refused, change nothing: what others do to the file meanwhile is
noticed as before. Those whose answer is lost may have been carried out."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from hpcfs.cache.file import CacheFile
from hpcfs.content.record import Unconfirmed
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import NotConnected, PermissionDenied, RemoteError, Unreachable
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import WriteMode
from tests.filesystem.test_silence import PatientSite
from tests.filesystem.world import KINDS, World, live, until, world
from tests.support.memory_remote import Cues, MemoryRemote

BASE, MINE, OTHERS = b"base", b"mine", b"others' longer version"
LINK_IS_DOWN = NotConnected("the link is down")
FOR_EVER = 10**9

Act = Callable[[], Awaitable[object]]


@asynccontextmanager
async def _patient(
    directory: Path, kind: str, write: WriteMode
) -> AsyncIterator[tuple[World, Cues]]:
    """A world with patience, whose namespace has answered; and the cues behind the patience."""
    remotes = {"ns": MemoryRemote(kind)}
    remotes["ns"].put(b"f", BASE)
    async with trio.open_nursery() as looking:
        site = PatientSite(remotes, looking)
        async with world(directory, remotes, sites={"ns": site}, write=write) as w:
            with trio.fail_after(20):
                await w.namespaces[0].capabilities()
                yield w, site.inner.cues
        looking.cancel_scope.cancel()


async def _begin_outage(w: World, cues: Cues) -> None:
    """The namespace fails, and has not failed for long."""
    cues.fail(object, LINK_IS_DOWN, times=FOR_EVER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.namespaces[0].stat, b"f")
        await until(lambda: w.sites["ns"].outer.failing != "")  # type: ignore[attr-defined]
        nursery.cancel_scope.cancel()


async def _interrupt_waiting(act: Act, is_under_way: Callable[[], bool]) -> None:
    """Ctrl-C once the call waits for the namespace."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(act)
        await until(is_under_way)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()


def _rows(w: World) -> list[Unconfirmed]:
    return [row for row in w.journal.rows if row.path == b"f"]


def _assert_both_are_there(w: World) -> None:
    found = {path: bytes(item.content) for path, item in w.remote.paths().items()}
    assert found.pop(b"f") == OTHERS
    assert list(found.values()) == [MINE], "a copy beside it"


# --- uploads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tried", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_close_that_is_interrupted_in_an_outage_has_sent_nothing(
    kind: str, is_tried: bool, tmp_path: Path
) -> None:
    """Whether it waits from the beginning, or since an attempt that found no connection."""

    async def main() -> None:
        async with _patient(tmp_path, kind, "through") as (w, cues):
            handle = await w.kernel.open("ns/f")
            await w.kernel.pwrite(handle, 0, MINE)
            content = w.fs.files.get(handle).content
            if is_tried:
                cues.fail(object, LINK_IS_DOWN, times=FOR_EVER)
            else:
                await _begin_outage(w, cues)
            await _interrupt_waiting(
                partial(w.fs.files.flush_handle, handle),
                lambda: content.state.taken is not None and cues.count(m.Upload) == is_tried,
            )
            assert not _rows(w)[0].attempted, "nor does the next mount think so"
            w.remote.put(b"f", OTHERS)
            cues.clear()
            await w.kernel.release(handle)
            _assert_both_are_there(w)

    trio.run(main)


@live()
async def test_bytes_of_others_that_move_are_none_of_an_upload(w: World) -> None:
    w.remote.put(b"f", BASE)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, MINE)

    async def fails(request: object, source: object, report: Callable[[int], None]) -> None:
        report(0)
        raise LINK_IS_DOWN

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.remote, "upload", fails)
        with pytest.raises(NotConnected):
            await w.fs.files.flush_handle(handle)
    w.remote.put(b"f", OTHERS)
    await w.kernel.release(handle)
    _assert_both_are_there(w)


# --- removals -------------------------------------------------------------------------------------


async def _write_and_close(w: World) -> None:
    """Change a file, whose upload waits."""
    w.remote.put(b"f", BASE)
    w.cues.fail(m.Upload, LINK_IS_DOWN, times=FOR_EVER)
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 0, MINE)
    await w.kernel.close(handle)
    await until(lambda: w.cues.count(m.Upload) > 0 and not w.closer.dirty()[0].state.taken)


async def _upload_again(w: World) -> None:
    w.cues.clear()
    await w.queue.wait_for(w.closer.dirty())
    assert w.journal.rows == []


@live(write="back")
async def test_a_removal_that_is_refused_changes_nothing(w: World) -> None:
    errors: list[RemoteError] = [PermissionDenied("not yours"), LINK_IS_DOWN]
    await _write_and_close(w)
    content = w.closer.dirty()[0]
    await w.closer.uploader.note_progress(content, "an upload was refused")
    before = _rows(w)
    assert before[0].reason
    for error in errors:
        w.cues.fail(m.Remove, error)
        with pytest.raises(type(error)):
            await w.kernel.unlink("ns/f")
        assert _rows(w) == before
    w.remote.put(b"f", OTHERS)
    await _upload_again(w)
    _assert_both_are_there(w)


@pytest.mark.parametrize("kind", KINDS)
def test_a_removal_that_is_interrupted_in_an_outage_was_not_sent(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with _patient(tmp_path, kind, "back") as (w, cues):
            held = cues.hold(m.Upload)
            handle = await w.kernel.open("ns/f")
            await w.kernel.pwrite(handle, 0, MINE)
            before = _rows(w)
            await w.kernel.walk("ns/f")
            await _begin_outage(w, cues)
            parent = await w.kernel.parent("ns/f")
            await _interrupt_waiting(
                partial(w.fs.unlink, *parent), lambda: bool(_rows(w)) and _rows(w)[0].attempted
            )
            assert not held.reached.is_set()
            assert not _rows(w)[0].attempted
            assert [row.ranges for row in _rows(w)] == [row.ranges for row in before]
            w.remote.put(b"f", OTHERS)
            cues.clear()
            await w.kernel.close(handle)
            await w.queue.wait_for(w.closer.dirty())
            _assert_both_are_there(w)

    trio.run(main)


@live(write="back")
async def test_a_removal_whose_answer_is_lost_may_have_been_carried_out(w: World) -> None:
    for stage in ("before", "after"):
        await _write_and_close(w)
        w.cues.fail(m.Remove, Unreachable("the answer is lost"), stage=stage)
        with pytest.raises(Unreachable):
            await w.kernel.unlink("ns/f")
        assert _rows(w)[0].attempted
        await _upload_again(w)
        found = {path: bytes(item.content) for path, item in w.remote.paths().items()}
        assert found == {b"f": MINE}


@live(write="back")
async def test_what_others_removed_can_be_removed_here(w: World) -> None:
    await _write_and_close(w)
    await w.remote.remove(b"f")
    await w.kernel.unlink("ns/f")
    assert w.journal.rows == []
    assert not await w.kernel.exists("ns/f")


@live(write="back")
async def test_a_removal_reads_nothing_of_what_was_written(w: World) -> None:
    w.remote.put(b"f", BASE)
    handle = await w.kernel.open("ns/f", os.O_RDWR | os.O_TRUNC)
    await w.kernel.pwrite(handle, 0, bytes(10 * BLOCK_BYTES))

    def reads(*_: object) -> None:
        pytest.fail("the file is read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheFile, "compute_checksums", reads)
        await w.kernel.unlink("ns/f")
    assert w.remote.paths() == {}
    await w.kernel.close(handle)
