"""A cache directory and its journal that an earlier version of hpcfs left are taken up.

left_by_an_earlier_version.tar.xz has two cache directories, "sftp" and "s3", as they were when the
daemon was killed. They were made by commit 0f08ee3, the last before the states of a file were
written down: a script ran a World of that commit in `back` mode over a MemoryRemote with the files
of `_remote`, and did to it what `EXPECTED` says, while uploads failed for want of a connection.
Then it copied the directory without the -shm files, which a crash of the machine leaves none of.
The versions in the rows are those that MemoryRemote gives to files that are put in this order.
"""

from __future__ import annotations

import sqlite3
import stat
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from hpcfs.content.state import Changes, RemoteSide
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import NotConnected
from hpcfs.protocol.messages import Upload
from tests.filesystem.world import KINDS, World, world
from tests.support.memory_remote import MemoryRemote

LEFT = Path(__file__).with_name("left_by_an_earlier_version.tar.xz")
OLD = b"o" * BLOCK_BYTES * 2


def _old(name: bytes) -> bytes:
    return name + b" " + OLD


def _changed(old: bytes, offset: int, data: bytes) -> bytes:
    return old[:offset] + data + old[offset + len(data) :]


EXPECTED = {
    b"d/new": b"new content",
    b"empty": b"",
    b"over": b"instead",  # renamed over it, as .over.tmp
    b"cut": b"cut",
    b"log": _old(b"log") + b"appended",
    b"changed": _changed(_old(b"changed"), BLOCK_BYTES + 5, b"changed"),  # and mode, and time
    b"lost": b"lost content",  # the remote has it, and its answer was lost
    b"denied": _changed(_old(b"denied"), 0, b"DENIED"),  # refused, for the user to say
    b"open": b"open still",  # written to when the daemon was killed
    b"second": b"x" * 10,
}
REFUSED = "the remote refused it"
SIDES = {
    b"d/new": RemoteSide.ABSENT,
    b"empty": RemoteSide.ABSENT,
    b"over": RemoteSide.REPLACES,
    b"cut": RemoteSide.PRESENT,
    b"log": RemoteSide.PRESENT,
    b"changed": RemoteSide.PRESENT,
    b"lost": RemoteSide.PARTIAL,
    b"denied": RemoteSide.PARTIAL,
    b"open": RemoteSide.ABSENT,
    b"second": RemoteSide.ABSENT,
}
CHANGES = {b"cut": Changes.RESIZED, b"log": Changes.APPENDED}


def _remote(kind: str) -> MemoryRemote:
    remote = MemoryRemote(kind)
    for name in (b"over", b"cut", b"log", b"changed", b"theirs", b"denied"):
        remote.put(name, _old(name))
    remote.overwrite(b"theirs", b"theirs now")
    remote.put(b"lost", b"lost content")
    return remote


def _unpack(kind: str, directory: Path) -> Path:
    with tarfile.open(LEFT) as archive:
        members = [one for one in archive.getmembers() if one.name.split("/")[0] == kind]
        archive.extractall(directory, members, filter="data")
    return directory / kind


def _rows(cache: Path) -> dict[bytes, dict[str, Any]]:
    """As they are on the disk, by path."""
    with sqlite3.connect(cache / "journal.db") as db:
        blobs = db.execute("SELECT row FROM unconfirmed").fetchall()
    rows = [msgspec.msgpack.decode(blob) for (blob,) in blobs]
    return {row["path"]: row for row in rows}


Story = Callable[[World, dict[bytes, dict[str, Any]]], Awaitable[None]]


def taken_up(kind: str, directory: Path, story: Story) -> None:
    """The story of a mount of this version, and of the rows that it found; the link is down."""
    cache = _unpack(kind, directory)
    rows = _rows(cache)

    async def run() -> None:
        async with world(cache, {"ns": _remote(kind)}, write="back") as w:
            w.cues.fail(Upload, NotConnected("the link is down"), times=10_000)
            await w.remote.make_directory(b"d", 0o755)
            with trio.fail_after(20):
                await story(w, rows)

    trio.run(run)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_it_left_is_shown_and_reaches_the_remote(kind: str, tmp_path: Path) -> None:
    async def story(w: World, rows: dict[bytes, dict[str, Any]]) -> None:
        for path, content in EXPECTED.items():
            assert await w.kernel.read_file(f"ns/{path.decode()}") == content, path
        entry = await w.kernel.stat("ns/changed")
        assert (stat.S_IMODE(entry.mode), entry.mtime_ns) == (0o600, 10**18)
        stuck = {row.path: row for row in w.pending.pending() if row.is_stuck}
        assert stuck.keys() == {b"denied", b"theirs"}
        assert (stuck[b"denied"].state, stuck[b"denied"].reason) == ("failed", REFUSED)
        w.cues.clear()
        await w.queue.wait_for(w.closer.dirty())  # that of "denied" is another attempt
        assert {path: w.remote.get(path) for path in EXPECTED} == EXPECTED
        item = w.remote.paths()[b"changed"]
        assert (stat.S_IMODE(item.mode), item.mtime_ns) == (0o600, 10**18)
        assert w.remote.paths().keys() == {*EXPECTED, b"d", b"theirs"}
        (kept,) = w.journal.rows
        assert (kept.path, kept.is_stranded, kept.reason != "") == (b"theirs", True, True)
        (found,) = w.kept_bytes()
        assert found[:9] == b"theirmine"
        assert await w.kernel.read_file("ns/theirs") == b"theirs now"

    taken_up(kind, tmp_path, story)


@pytest.mark.parametrize("kind", KINDS)
def test_its_rows_are_states_and_the_states_are_its_rows(kind: str, tmp_path: Path) -> None:
    """This version would write the same; the version that left them can take up what it writes."""

    async def story(w: World, rows: dict[bytes, dict[str, Any]]) -> None:
        contents = {content.place.path: content for content in w.closer.dirty()}
        assert {path: one.state.remote for path, one in contents.items()} == SIDES
        changes = {path: one.state.changes for path, one in contents.items()}
        assert changes == {**dict.fromkeys(SIDES, Changes.ANY), **CHANGES}
        for path, content in contents.items():
            row = rows[path]
            writing, reason = row.get("writing", False), row.get("reason", "")
            again = msgspec.structs.replace(
                content.unconfirmed(reason, writing=writing), since=row["since"], data=row["data"]
            )
            found = msgspec.msgpack.decode(msgspec.msgpack.encode(again))
            if not writing:  # which the taking up adds to what it finds in the cache file
                assert found == row

    taken_up(kind, tmp_path, story)
