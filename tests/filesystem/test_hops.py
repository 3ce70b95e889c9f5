"""How many modules an operation passes: what a reader of the code must open to follow it.

Counted are the modules of hpcfs/ of which a function is called, from the kernel's call on, by the
task that answers it, as sys.setprofile sees it. Not counted are kernel/, where the call comes from,
worker/ and the tests' own modules, which stand for the other process, and what other tasks do
meanwhile (begun by the operation or not). A close is the flush that close(2) waits for; the kernel
sends the release later, and nobody waits for it. S3 takes only whole files, so that a close first
sees to it that all of the file is here. A rename is of a file that is uploaded already: otherwise
the modules of the upload come on top.

Before the layers were cut anew, these were 8, 17, 20 (22) and 16; 28 with the upload in the rename.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace

import trio.lowlevel

import hpcfs
from hpcfs.kernel.callers import Callers
from hpcfs.kernel.operations import KernelOperations
from hpcfs.kernel.requests import KernelRequests
from tests.filesystem.world import World, live

ROOT = str(Path(hpcfs.__file__).parent) + os.sep
NOT_COUNTED = ("kernel/", "worker/")
CONTEXT = SimpleNamespace(pid=os.getpid(), uid=0, gid=0, umask=0o22)
KIB, MIB = 1024, 1024 * 1024

READ, WRITE, RENAME = 6, 10, 19
"""A rename is noted in the last listings of its directories too, which serve during an outage."""
CLOSE = {"sftp": 14, "s3": 16}


@contextmanager
def passed_modules() -> Iterator[set[str]]:
    """The modules that this task passes, filled in until the block ends."""
    task, found = trio.lowlevel.current_task(), set[str]()

    def trace(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(ROOT):
            return
        module = file[len(ROOT) :]
        if not module.startswith(NOT_COUNTED) and trio.lowlevel.current_task() is task:
            found.add(module)

    sys.setprofile(trace)
    try:
        yield found
    finally:
        sys.setprofile(None)


def operations(w: World) -> KernelOperations:
    return KernelOperations(w.fs, KernelRequests(Callers()))


async def open_file(w: World, path: str, size: int, flags: int = os.O_RDWR) -> int:
    """A handle of a file that was written, uploaded and read before."""
    await w.kernel.write_file(path, b"x" * size)
    await w.queue.drain()
    handle = await w.kernel.open(path, flags)
    assert await w.kernel.pread(handle, 0, size)
    return handle


@live()
async def test_a_warm_read(w: World) -> None:
    handle = await open_file(w, "ns/f", MIB)
    with passed_modules() as passed:
        assert len(await operations(w).read(handle, MIB // 2, 4 * KIB)) == 4 * KIB
    assert len(passed) <= READ, " ".join(sorted(passed))
    await w.kernel.close(handle)


@live()
async def test_a_write_of_4_kib(w: World) -> None:
    handle = await open_file(w, "ns/f", MIB)
    await w.kernel.pwrite(handle, 0, b"y" * 4 * KIB)
    with passed_modules() as passed:
        await operations(w).write(handle, 4 * KIB, b"y" * 4 * KIB)
    assert len(passed) <= WRITE, " ".join(sorted(passed))
    await w.kernel.close(handle)


@live()
async def test_a_close_that_uploads(w: World) -> None:
    handle = await open_file(w, "ns/f", 8 * KIB)
    await w.kernel.pwrite(handle, 0, b"y" * 4 * KIB)
    with passed_modules() as passed:
        await operations(w).flush(handle)
    assert len(passed) <= CLOSE["sftp" if w.remote.is_sftp else "s3"], " ".join(sorted(passed))
    await w.kernel.close(handle)
    assert w.remote.get(b"f").startswith(b"y")


@live()
async def test_a_rename_over_another_file(w: World) -> None:
    for name in ("ns/old", "ns/new"):
        await w.kernel.write_file(name, b"x")
    parent = (await w.kernel.walk("ns")).ino
    await w.kernel.walk("ns/old")
    await w.kernel.walk("ns/new")
    with passed_modules() as passed:
        await operations(w).rename(parent, b"new", parent, b"old", 0, CONTEXT)
    assert len(passed) <= RENAME, " ".join(sorted(passed))
