"""Files whose size says nothing: of no bytes as in /proc, or of a page's as in /sys."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import trio

from hpcfs.model.entries import Entry
from hpcfs.model.errors import Changed
from hpcfs.protocol import messages as m
from tests.filesystem.world import World, world
from tests.support.memory_remote import Item, MemoryRemote

CONTENT = b"MemTotal: 24684084 kB\n" * 100
PAGE = 4096


class Pseudo(MemoryRemote):
    """Tells that "proc" has no bytes and "sys" has a page; both change without a trace."""

    def __init__(self) -> None:
        super().__init__("sftp")
        self.put(b"proc", CONTENT)
        self.put(b"sys", b"1500\n")
        self.put(b"empty", b"")

    def _entry(self, path: bytes, item: Item) -> Entry:
        entry = super()._entry(path, item)
        size = {bytes(CONTENT): 0, b"1500\n": PAGE, b"9000\n": PAGE}.get(bytes(item.content))
        if size is None:
            return entry
        return msgspec.structs.replace(entry, size=size, version=b"%d:1" % size)

    async def fetch(
        self, path: bytes, version: bytes, offset: int, length: int, handle: int, **more: bool
    ) -> Sequence[bytes]:
        if path != b"sys":
            return await super().fetch(path, version, offset, length, handle, **more)
        self.handles[handle] = self._find(path)
        if length:
            raise Changed("it is shorter than it was")
        return []


def on_pseudo(directory: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with world(directory, {"ns": Pseudo()}) as w:
            with trio.fail_after(20):
                await story(w)

    trio.run(main)


async def read_on(w: World, handle: int, step: int) -> bytes:
    """As a program does that reads until nothing comes."""
    found = b""
    while data := await w.fs.files.read(handle, len(found), step):
        found += data
    return found


def test_a_file_of_no_bytes_is_read_to_its_end(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        for step in (500, 1 << 17):
            handle = await w.kernel.open("ns/proc", os.O_RDONLY)
            assert w.fs.files.get(handle).is_unsized
            assert await read_on(w, handle, step) == CONTENT
            await w.kernel.close(handle)

    on_pseudo(tmp_path, story)


def test_a_file_that_ends_before_its_size_does(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        handle = await w.kernel.open("ns/sys", os.O_RDONLY)
        assert await read_on(w, handle, PAGE) == b"1500\n"
        await w.kernel.close(handle)
        w.remote._find(b"sys").content[:] = b"9000\n"
        handle = await w.kernel.open("ns/sys", os.O_RDONLY)
        assert await read_on(w, handle, PAGE) == b"9000\n"
        await w.kernel.close(handle)

    on_pseudo(tmp_path, story)


def test_an_empty_file_is_asked_for_once(tmp_path: Path) -> None:
    """As long as it stays the same."""

    async def story(w: World) -> None:
        def asked() -> int:
            return sum(isinstance(call, m.ReadUnsized) for call in w.cues.calls)

        for _ in range(3):
            handle = await w.kernel.open("ns/empty", os.O_RDONLY)
            assert await read_on(w, handle, 100) == b""
            await w.kernel.close(handle)
            assert asked() == 1
        w.remote.put(b"empty", b"")
        w.clock.expire_attributes()
        handle = await w.kernel.open("ns/empty", os.O_RDONLY)
        assert await read_on(w, handle, 100) == b""
        assert asked() == 2
        await w.kernel.close(handle)

    on_pseudo(tmp_path, story)


def test_who_reads_an_empty_file_sees_what_is_written_to_it_here(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        reader = await w.kernel.open("ns/empty", os.O_RDONLY)
        assert await read_on(w, reader, 100) == b""
        await w.kernel.write_file("ns/empty", b"written")
        assert await read_on(w, reader, 100) == b"written"
        await w.kernel.close(reader)

    on_pseudo(tmp_path, story)


def test_a_log_that_grows_from_nothing_has_the_size_of_what_was_read(tmp_path: Path) -> None:
    """tail(1) takes a file that is smaller than what it has read for one that was cut."""

    async def run() -> None:
        async with world(tmp_path, "sftp") as w:
            w.remote.put(b"log", b"")
            handle = await w.kernel.open("ns/log", os.O_RDONLY)
            w.remote.append(b"log", b"line\n")
            assert await w.kernel.pread(handle, 0, 8192) == b"line\n"
            assert (await w.kernel.fstat(handle)).size == 5
            await w.kernel.close(handle)

    trio.run(run)
