"""The daemon is killed, and the next one as well, at each point of an upload: what was acknowledged
comes to the remote as it was, whatever kind of change it is, and nothing else does.

HPCFS_FULL=1 in the environment combines all points of the first daemon with all of the next.
tests/faults/test_kills.py does it to real processes, before any of their steps.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from hpcfs.model.entries import BLOCK_BYTES, Attributes
from hpcfs.model.errors import NotConnected, Unreachable
from hpcfs.protocol.messages import Remove, Rename, Upload
from tests.filesystem.world import KINDS, World, world
from tests.support.memory_remote import MemoryRemote

OLD, NEW = b"o" * (BLOCK_BYTES + 5), b"n" * 100
SEEDS = {b"f": OLD, b"g": OLD[::-1], b"empty": b""}
MODE, TIME = 0o600, 1_234_567_890 * 10**9
FOR_EVER = 10**9
FULL = os.environ.get("HPCFS_FULL") == "1"
Change = Callable[[World], Awaitable[None]]


async def _write_new(w: World) -> None:
    await w.kernel.write_file("ns/new", NEW)


async def _make_empty(w: World) -> None:
    await w.kernel.write_file("ns/new", b"")


async def _make_empty_with_attributes(w: World) -> None:
    await w.kernel.write_file("ns/new", b"")
    await w.kernel.setattr("ns/new", Attributes(mode=MODE, mtime_ns=TIME))


async def _empty(w: World) -> None:
    await w.kernel.write_file("ns/f", b"")


async def _cut_to_nothing(w: World) -> None:
    handle = await w.kernel.open("ns/f")
    await w.kernel.ftruncate(handle, 0)
    await w.kernel.close(handle)


async def _empty_twice(w: World) -> None:
    await w.kernel.write_file("ns/f", NEW)
    await w.kernel.write_file("ns/f", b"")


async def _fill(w: World) -> None:
    await w.kernel.write_file("ns/empty", NEW)


async def _empty_what_is_empty(w: World) -> None:
    await w.kernel.write_file("ns/empty", b"")


async def _append(w: World) -> None:
    handle = await w.kernel.open("ns/f", os.O_WRONLY | os.O_APPEND)
    await w.kernel.pwrite(handle, 0, NEW)
    await w.kernel.close(handle)


async def _write_into(w: World) -> None:
    handle = await w.kernel.open("ns/f")
    await w.kernel.pwrite(handle, 3, NEW)
    await w.kernel.close(handle)


async def _empty_with_attributes(w: World) -> None:
    await w.kernel.write_file("ns/f", b"")
    await w.kernel.setattr("ns/f", Attributes(mode=MODE, mtime_ns=TIME))


async def _rename_new(w: World) -> None:
    await w.kernel.write_file("ns/tmp", NEW)
    await w.kernel.rename("ns/tmp", "ns/new")


async def _rename_empty_over(w: World) -> None:
    await w.kernel.write_file("ns/tmp", b"")
    await w.kernel.setattr("ns/tmp", Attributes(mode=MODE, mtime_ns=TIME))
    await w.kernel.rename("ns/tmp", "ns/f")


async def _rename_over_what_is_dirty(w: World) -> None:
    await w.kernel.write_file("ns/f", b"")
    await w.kernel.write_file("ns/tmp", NEW)
    await w.kernel.rename("ns/tmp", "ns/f")


async def _rename_over_and_empty(w: World) -> None:
    await w.kernel.write_file("ns/tmp", NEW)
    await w.kernel.rename("ns/tmp", "ns/f")
    await w.kernel.write_file("ns/f", b"")


async def _remove_new(w: World) -> None:
    await w.kernel.write_file("ns/new", NEW)
    await w.kernel.unlink("ns/new")


async def _remove_emptied(w: World) -> None:
    await w.kernel.write_file("ns/f", b"")
    await w.kernel.unlink("ns/f")


async def _remove_and_make_anew(w: World) -> None:
    await w.kernel.unlink("ns/f")
    await w.kernel.write_file("ns/f", b"")


async def _rename_there_and_set_attributes(w: World) -> None:
    """At once on the remote: only names and attributes."""
    await w.kernel.rename("ns/f", "ns/new")
    await w.kernel.setattr("ns/new", Attributes(mode=MODE, mtime_ns=TIME))


CHANGES: dict[Change, dict[bytes, bytes | None]] = {
    _write_new: {b"new": NEW},
    _make_empty: {b"new": b""},
    _make_empty_with_attributes: {b"new": b""},
    _empty: {b"f": b""},
    _cut_to_nothing: {b"f": b""},
    _empty_twice: {b"f": b""},
    _fill: {b"empty": NEW},
    _empty_what_is_empty: {},
    _append: {b"f": OLD + NEW},
    _write_into: {b"f": OLD[:3] + NEW + OLD[3 + len(NEW) :]},
    _empty_with_attributes: {b"f": b""},
    _rename_new: {b"new": NEW},
    _rename_empty_over: {b"f": b""},
    _rename_over_what_is_dirty: {b"f": NEW},
    _rename_over_and_empty: {b"f": b""},
    _remove_new: {},
    _remove_emptied: {b"f": None},
    _remove_and_make_anew: {b"f": b""},
    _rename_there_and_set_attributes: {b"f": None, b"new": OLD},
}
"""What they make of the names, None for removed."""
SET = {
    _make_empty_with_attributes: b"new",
    _empty_with_attributes: b"f",
    _rename_empty_over: b"f",
    _rename_there_and_set_attributes: b"new",
}
"""The names of which they set attributes."""
POINTS = ("waiting", "before", "after", "lost")
"""The upload waits, is about to arrive, has arrived and is not answered; or it has arrived, its
answer was lost, and it waits again."""


async def _reach(w: World, point: str) -> None:
    """Bring an upload of what is dirty to this point."""
    if point == "waiting" or not w.closer.dirty():
        return
    w.cues.clear()
    if point == "lost":
        w.cues.fail(Upload, Unreachable("the answer is lost"), stage="after")
        w.cues.fail(Upload, NotConnected("the link is down"), nth=2, times=FOR_EVER)
        asked = w.cues.count(Upload)
        w.queue.retry(w.closer.dirty()[0])
        while w.cues.count(Upload) < asked + 2:
            await trio.lowlevel.checkpoint()
        return
    held = w.cues.hold(Upload, stage=point)
    w.cues.fail(Upload, NotConnected("the link is down"), nth=2, times=FOR_EVER)
    w.queue.retry(w.closer.dirty()[0])
    await held.reached.wait()


async def _die(directory: Path, into: Path, remote: MemoryRemote, act: Change, point: str) -> None:
    """Mount, act, and be killed at that point; what is left is in `into`."""
    async with world(directory, {"ns": remote}, write="back") as w:
        w.cues.fail(Upload, NotConnected("the link is down"), times=FOR_EVER)
        with trio.fail_after(20):
            await act(w)
            await _reach(w, point)
        await trio.run_process(["cp", "-a", str(directory), str(into)])
        (into / "journal.db-shm").unlink()
        w.cues.clear()
        for content in w.closer.dirty():  # nothing of it goes up at this mount's end
            w.queue.gone(content)
            content.discard()
        for content in w.queue.schedule:
            w.queue.gone(content)


async def _nothing(w: World) -> None:
    """What an earlier mount left is taken up."""


ALL = [(point, again) for point in POINTS for again in (None, *POINTS)]
SOME = [("waiting", None), ("before", None), ("after", "before"), ("lost", "after")]


@pytest.mark.parametrize(("point", "again"), ALL if FULL else SOME)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_was_changed_outlives_kills(
    kind: str, point: str, again: str | None, tmp_path: Path
) -> None:
    async def main(change: Change, directory: Path) -> None:
        remote = MemoryRemote(kind)
        for name, data in SEEDS.items():
            remote.put(name, data)
        await _die(directory / "0", directory / "1", remote, change, point)
        if again is not None:
            await _die(directory / "1", directory / "2", remote, _nothing, again)
        last = directory / ("1" if again is None else "2")
        async with world(last, {"ns": remote}, write="back") as w:
            with trio.fail_after(20):
                await w.queue.wait_for(w.closer.dirty())
            assert w.journal.rows == []
        wanted = {
            path: data for path, data in (SEEDS | CHANGES[change]).items() if data is not None
        }
        assert {path: bytes(item.content) for path, item in remote.paths().items()} == wanted
        if change in SET:
            item = remote.paths()[SET[change]]
            assert (stat.S_IMODE(item.mode), item.mtime_ns) == (MODE, TIME)

    for change in CHANGES:
        directory = tmp_path / change.__name__
        directory.mkdir()
        try:
            trio.run(main, change, directory)
        except BaseException as error:
            error.add_note(f"after {change.__name__}")
            raise


# --- names that are changed on the remote ---------------------------------------------------------


async def _write_whole(w: World) -> bytes:
    await w.kernel.write_file("ns/f", NEW)
    return NEW


async def _write_a_part(w: World) -> bytes:
    await _write_into(w)
    return OLD[:3] + NEW + OLD[3 + len(NEW) :]


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("write", [_write_whole, _write_a_part])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_the_remote_removes_what_is_dirty(
    kind: str, write: Callable[[World], Awaitable[bytes]], stage: str, tmp_path: Path
) -> None:
    """It is removed, or there as it was written: not kept, and no conflict."""
    written = b""

    async def act(w: World) -> None:
        nonlocal written
        written = await write(w)
        held = w.cues.hold(Remove, stage=stage)
        w.nursery.start_soon(w.kernel.unlink, "ns/f")
        await held.reached.wait()

    found = trio.run(_killed_once, kind, tmp_path, act)
    assert found.pop(b"f", written) == written
    assert found == {name: data for name, data in SEEDS.items() if name != b"f"}


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_the_remote_renames_over_what_is_dirty(
    kind: str, stage: str, tmp_path: Path
) -> None:
    async def act(w: World) -> None:
        await w.kernel.write_file("ns/f", NEW)
        w.cues.clear()
        held = w.cues.hold(Rename, stage=stage)
        w.nursery.start_soon(w.kernel.rename, "ns/g", "ns/f")
        await held.reached.wait()

    found = trio.run(_killed_once, kind, tmp_path, act)
    before = SEEDS | {b"f": NEW}
    after = {b"f": SEEDS[b"g"], b"empty": b""}
    assert found == (before if stage == "before" else after)


async def _killed_once(kind: str, directory: Path, act: Change) -> dict[bytes, bytes]:
    """What the remote has once the next daemon has brought what was left."""
    remote = MemoryRemote(kind)
    for name, data in SEEDS.items():
        remote.put(name, data)
    await _die(directory / "0", directory / "1", remote, act, "waiting")
    async with world(directory / "1", {"ns": remote}, write="back") as w:
        with trio.fail_after(20):
            await w.queue.wait_for(w.closer.dirty())
        assert w.journal.rows == []
        return {path: bytes(item.content) for path, item in remote.paths().items()}
