"""Callers that are interrupted while they wait for the remote, at each request of each call and on
both sides of it: what programs see afterwards is what the remote has, and nothing stays behind."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
import trio.abc
import trio.lowlevel
import trio.testing

from hpcfs.model.entries import Attributes
from hpcfs.site.namespace import WriteMode
from tests.filesystem.world import KINDS, RW, World, live

OLD = bytes(range(256)) * 800
NEW = b"what was written"
MOST_REQUESTS = 20
"""More than any of these calls makes."""
MOST_STEPS = 100

Call = Callable[[World, str], Awaitable[None]]


async def overwrite(w: World, at: str) -> None:
    handle = await w.kernel.open(f"{at}/old")
    try:
        await w.kernel.pwrite(handle, 70_000, NEW)
    finally:
        await w.kernel.close(handle)


async def write_anew(w: World, at: str) -> None:
    await w.kernel.write_file(f"{at}/old", NEW)


async def create(w: World, at: str) -> None:
    await w.kernel.write_file(f"{at}/new", NEW)


async def sync(w: World, at: str) -> None:
    handle = await w.kernel.open(f"{at}/new", RW | os.O_CREAT)
    try:
        await w.kernel.pwrite(handle, 0, NEW)
        await w.kernel.fsync(handle)
    finally:
        await w.kernel.close(handle)


async def read(w: World, at: str) -> None:
    await w.kernel.read_file(f"{at}/old")


async def truncate(w: World, at: str) -> None:
    await w.kernel.truncate(f"{at}/old", 100)


async def rename(w: World, at: str) -> None:
    await w.kernel.rename(f"{at}/old", f"{at}/new")


async def rename_over(w: World, at: str) -> None:
    await w.kernel.rename(f"{at}/old", f"{at}/other")


async def save(w: World, at: str) -> None:
    """As editors do: `back` mode renames it here alone."""
    await w.kernel.write_file(f"{at}/new", NEW)
    await w.kernel.rename(f"{at}/new", f"{at}/old")


async def unlink(w: World, at: str) -> None:
    await w.kernel.unlink(f"{at}/old")


async def mkdir(w: World, at: str) -> None:
    await w.kernel.mkdir(f"{at}/new")


async def rmdir(w: World, at: str) -> None:
    await w.kernel.rmdir(f"{at}/empty")


async def symlink(w: World, at: str) -> None:
    await w.kernel.symlink(f"{at}/new", b"old")


async def chmod(w: World, at: str) -> None:
    await w.kernel.setattr(f"{at}/old", Attributes(mode=0o600))


async def listing(w: World, at: str) -> None:
    await w.kernel.listdir(at)


CALLS: tuple[Call, ...] = (
    *(overwrite, write_anew, create, sync, read, truncate, rename, rename_over, save),
    *(unlink, mkdir, rmdir, symlink, chmod, listing),
)


class AtStep(trio.abc.Instrument):
    """Cancels the scope when the task has waited so often."""

    def __init__(self, task: trio.lowlevel.Task, step: int, scope: trio.CancelScope) -> None:
        self._task = task
        self._left = step
        self._scope = scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if not self._left:
                self._scope.cancel()


@dataclass
class Interruption:
    """Holds one request until the caller is gone."""

    w: World
    call: Call
    at: str

    async def carry_out(self, nth: int, stage: str) -> bool:
        """Whether there was such a request of the call."""
        held = self.w.cues.hold(object, nth=nth, stage=stage)
        has_ended = False
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def interrupt() -> None:
                    await held.reached.wait()
                    scope.cancel()

                nursery.start_soon(interrupt)
                await self.call(self.w, self.at)
                has_ended = True
                nursery.cancel_scope.cancel()
        self.w.cues.clear()
        held.go.set()
        return not has_ended

    async def carry_out_at(self, step: int) -> bool:
        """Whether the call had so many steps from one wait to the next, for whatever."""
        with trio.CancelScope() as scope:
            clock = AtStep(trio.lowlevel.current_task(), step, scope)
            trio.lowlevel.add_instrument(clock)
            try:
                await self.call(self.w, self.at)
            finally:
                trio.lowlevel.remove_instrument(clock)
        return scope.cancelled_caught

    async def check(self) -> None:
        """What is seen is what the remote has once all is uploaded."""
        w = self.w
        await w.closer.wait_ended()
        await w.queue.wait_for(w.closer.dirty())
        await trio.testing.wait_all_tasks_blocked()
        assert w.pending.pending() == []
        assert w.journal.rows == []
        assert w.fs.files.open_count == 0
        assert not [file for file in w.store.registry.files.values() if file.users]
        below = os.fsencode(self.at.partition("/")[2]) + b"/"
        there = {path[len(below) :]: item for path, item in w.remote.paths().items()
                 if path.startswith(below)}  # fmt: skip
        assert set(await w.kernel.listdir(self.at)) - {b".", b".."} == set(there)
        for name in (b"old", b"other", b"new", b"empty"):
            path = f"{self.at}/{os.fsdecode(name)}"
            assert await w.kernel.exists(path) == (name in there), path
            if name in there and (await w.kernel.stat(path)).mode & 0o170000 == 0o100000:
                assert await w.kernel.read_file(path) == w.remote.get(below + name), path
        await w.kernel.write_file(f"{self.at}/old", b"it goes on")
        await w.queue.wait_for(w.closer.dirty())
        assert w.remote.get(below + b"old") == b"it goes on"


async def prepare(w: World, call: Call, number: int) -> Interruption:
    at = f"ns/{call.__name__}{number}"
    below = os.fsencode(at.partition("/")[2])
    await w.kernel.mkdir(at)
    await w.kernel.mkdir(f"{at}/empty")
    w.remote.put(below + b"/old", OLD)
    w.remote.put(below + b"/other", OLD[:1000])
    if call is not read:
        for name in ("old", "other"):
            await w.kernel.read_file(f"{at}/{name}")
        await w.store.save()
    w.clock.expire_attributes()
    return Interruption(w, call, at)


async def interrupt_everywhere(w: World, call: Call) -> None:
    number = 0
    for stage in ("before", "after"):
        for nth in range(1, MOST_REQUESTS):
            number += 1
            interruption = await prepare(w, call, number)
            was_interrupted = await interruption.carry_out(nth, stage)
            await interruption.check()
            if not was_interrupted:
                break
        else:
            pytest.fail(f"{call.__name__} makes {MOST_REQUESTS} requests")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_interrupted_call_leaves(
    kind: str, write: WriteMode, call: Call, tmp_path: object
) -> None:
    async def story(w: World) -> None:
        await interrupt_everywhere(w, call)

    live(kind, write=write)(story)(kind, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize(("kind", "write"), [("sftp", "through"), ("s3", "back")])
def test_what_a_call_leaves_that_is_interrupted_at_any_step(
    kind: str, write: WriteMode, call: Call, tmp_path: object
) -> None:
    """Also while it waits for the disk, for a lock, or for its turn."""

    async def story(w: World) -> None:
        for step in range(1, MOST_STEPS):
            interruption = await prepare(w, call, step)
            was_interrupted = await interruption.carry_out_at(step)
            await interruption.check()
            if not was_interrupted:
                break
        else:
            pytest.fail(f"{call.__name__} has {MOST_STEPS} steps")

    live(kind, write=write)(story)(kind, tmp_path)  # type: ignore[arg-type]
