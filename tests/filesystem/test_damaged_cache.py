"""Damage to the files of a cache directory: what was acknowledged reaches the remote as it was
written, or is told; what the remote has can be read; the mount works.

HPCFS_EXAMPLES sets how many damages are tried of each kind.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st

from hpcfs.cache.renewal import renew_if_removed
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import NotConnected
from hpcfs.protocol.messages import Upload
from tests.filesystem.world import RW, World, world
from tests.support.damage import Damage, damage, damages
from tests.support.memory_remote import MemoryRemote

EXAMPLES = int(os.environ.get("HPCFS_EXAMPLES", "15"))
some = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = 8


def _bytes(number: int, blocks: int = 2) -> bytes:
    return random.Random(number).randbytes(blocks * BLOCK_BYTES + 77 * number)


OLD = {b"old%d" % n: _bytes(n) for n in range(FILES // 2)}
NEW = {b"new%d" % n: _bytes(50 + n) for n in range(FILES // 2)}
CHANGED = {
    name: data[:BLOCK_BYTES] + b"changed" + data[BLOCK_BYTES + 7 :] for name, data in OLD.items()
}
EXPECTED = {**NEW, **CHANGED}


def _remote() -> MemoryRemote:
    remote = MemoryRemote("sftp")
    for name, data in OLD.items():
        remote.put(name, data)
    return remote


def copied(directory: Path, into: Path) -> Path:
    """The cache directory as a daemon killed at this moment leaves it, hard links included."""
    subprocess.run(["cp", "-a", directory, into], check=True)
    for name in ("journal.db-shm", "index.db-shm"):
        (into / name).unlink(missing_ok=True)
    return into


async def write_all(w: World) -> None:
    w.cues.fail(Upload, NotConnected("the link is down"), times=10_000)
    for path, data in NEW.items():
        await w.kernel.write_file(f"ns/{path.decode()}", data)
    for path in CHANGED:
        handle = await w.kernel.open(f"ns/{path.decode()}", RW)
        await w.kernel.pwrite(handle, BLOCK_BYTES, b"changed")
        await w.kernel.close(handle)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a daemon left that was killed with eight closed files on their way."""
    directory = tmp_path_factory.mktemp("left")

    async def run() -> None:
        async with world(directory / "mounted", {"ns": _remote()}, write="back") as w:
            await write_all(w)
            await w.store.save()
            copied(directory / "mounted", directory / "killed")

    trio.run(run)
    return directory / "killed"


Check = Callable[[World], Awaitable[None]]


def next_mount(left: Path, spoil: Callable[[Path], None], check: Check, mounts: int = 1) -> None:
    """The story of a mount on a copy of what was left, spoilt, or of several, one after the other;
    the link is up."""
    remote = _remote()

    async def run(cache: Path) -> None:
        async with world(cache, {"ns": remote}, write="back") as w:
            with trio.fail_after(60):
                await w.queue.wait_for(w.closer.dirty())
                await check(w)

    with TemporaryDirectory() as directory:
        cache = copied(left, Path(directory) / "cache")
        spoil(cache)
        for _ in range(mounts):
            trio.run(run, cache)


def told(w: World) -> set[bytes]:
    """The paths of the files that are stuck, as `hpcfs status` lists them."""
    return {row.path for row in w.pending.pending() if row.is_stuck and row.reason}


async def nothing_is_lost(w: World) -> None:
    for path, data in EXPECTED.items():
        now = w.remote.paths().get(path)
        content = bytes(now.content) if now else None
        assert content in (data, OLD.get(path)), path
        if content != data:
            assert path in told(w), (path, told(w), w.store.troubles.sentences)
    assert len(w.kept_bytes()) == len(w.journal.stranded)


def test_what_is_not_damaged_is_uploaded(left: Path) -> None:
    async def check(w: World) -> None:
        await nothing_is_lost(w)
        assert told(w) == set()
        assert w.store.troubles.sentences == []

    next_mount(left, lambda cache: None, check)


JOURNALS: dict[str, dict[str, bytes | int | None]] = {
    "emptied": {"journal.db": 0, "journal.db-wal": 0},
    "removed": {"journal.db": None, "journal.db-wal": None},
    "zeros": {"journal.db": bytes(8192)},
    "wrong magic": {"journal.db": b"MZ" * 4096},
    "a stale log": {"journal.db": b""},
    "a log that is cut": {"journal.db-wal": 9000},
    "no log": {"journal.db-wal": None},
}
"""The new content of a file, the length to which it is cut, or None where it is removed."""


def _replaced(cache: Path, files: dict[str, bytes | int | None]) -> None:
    for name, content in files.items():
        if content is None:
            (cache / name).unlink()
        elif isinstance(content, int):
            os.truncate(cache / name, content)
        else:
            (cache / name).write_bytes(content)


@pytest.mark.parametrize("how", JOURNALS)
def test_a_journal_that_can_not_be_read(left: Path, how: str) -> None:
    """All bytes are uploaded or kept as they were written, and told of by their paths."""

    async def check(w: World) -> None:
        await nothing_is_lost(w)
        rows = w.journal.stranded
        kept = dict(zip((row.path for row in rows), w.kept_bytes(), strict=True))
        uploaded = {path for path in EXPECTED if w.remote.paths().get(path)}
        assert kept.keys() | uploaded >= EXPECTED.keys()
        for path in kept.keys() & NEW.keys():
            assert kept[path] == NEW[path]
        for path in kept.keys() & CHANGED.keys():
            assert kept[path][BLOCK_BYTES:][:7] == b"changed"
        await w.kernel.write_file("ns/afterwards", b"the mount works")
        await w.queue.wait_for(w.closer.dirty())
        assert w.remote.get(b"afterwards") == b"the mount works"

    next_mount(left, lambda cache: _replaced(cache, JOURNALS[how]), check, mounts=2)


@some
@given(st.lists(damages, min_size=1, max_size=4), st.booleans())
def test_a_journal_with_random_damage(left: Path, how: list[Damage], is_log: bool) -> None:
    def spoil(cache: Path) -> None:
        for one in how:
            damage(cache / ("journal.db-wal" if is_log else "journal.db"), one)

    next_mount(left, spoil, nothing_is_lost)


@some
@given(st.lists(damages, min_size=1, max_size=2), st.integers(0, FILES - 1))
def test_damaged_bytes_are_never_uploaded(left: Path, how: list[Damage], number: int) -> None:
    def spoil(cache: Path) -> None:
        pending = sorted((cache / "pending").iterdir())
        for one in how:
            damage(pending[number], one)

    next_mount(left, spoil, nothing_is_lost)


def test_one_flipped_bit_is_told_and_the_rest_goes_on(left: Path) -> None:
    name = b"new1"

    def spoil(cache: Path) -> None:
        place = next(p for p in (cache / "pending").iterdir() if p.read_bytes() == NEW[name])
        damage(place, ("flip", 0.5, 0.1))

    async def check(w: World) -> None:
        await nothing_is_lost(w)
        assert told(w) == {name}
        (row,) = w.journal.stranded
        assert "damaged on the local disk" in row.reason
        assert [len(data) for data in w.kept_bytes()] == [len(NEW[name])]
        await w.pending.retry([row.name])  # the user wants it all the same
        await w.queue.wait_for(w.closer.dirty())
        assert len(w.remote.get(name)) == len(NEW[name])
        assert w.journal.rows == []

    next_mount(left, spoil, check)


def _damaged_in_use(directory: Path, spoil: Callable[[Path], None], expected: set[bytes]) -> None:
    """A journal is damaged under the daemon, which then closes one file more and is killed. The
    paths `expected` are told of by the next mount, and all others are uploaded."""
    cache = directory / "cache"

    async def run() -> None:
        async with world(cache, {"ns": _remote()}, write="back") as w:
            await write_all(w)
            spoil(cache)
            await w.kernel.write_file("ns/more", b"more")
            copied(cache, directory / "killed")
            w.cues.clear()

    async def check(w: World) -> None:
        await nothing_is_lost(w)
        assert told(w) == expected

    trio.run(run)
    next_mount(directory / "killed", lambda cache: None, check)


def test_a_journal_that_is_overwritten_while_it_is_in_use(tmp_path: Path) -> None:
    """SQLite does not look at what it has in memory: the next mount finds out."""

    def spoil(cache: Path) -> None:
        for name in ("journal.db", "journal.db-wal"):
            with (cache / name).open("r+b") as file:
                file.write(b"garbage!" * 2000)

    _damaged_in_use(tmp_path, spoil, {*EXPECTED, b"more"})


def test_a_journal_that_fails_while_it_is_in_use_is_written_anew(tmp_path: Path) -> None:
    def spoil(cache: Path) -> None:
        with closing(sqlite3.connect(cache / "journal.db", isolation_level=None)) as db:
            db.execute("DROP TABLE unconfirmed")

    _damaged_in_use(tmp_path, spoil, set())


def test_a_cache_directory_that_is_removed_while_it_is_in_use(tmp_path: Path) -> None:
    """What waits is written to the disk again: a kill after that loses nothing."""
    cache = tmp_path / "cache"

    async def run() -> None:
        async with world(cache, {"ns": _remote()}, write="back") as w:
            await write_all(w)
            await w.kernel.read_file("ns/old0")
            shutil.rmtree(cache)
            assert await w.kernel.read_file("ns/new0") == NEW[b"new0"]
            await renew_if_removed(w.store)
            await w.journal.renew_if_removed()
            assert stat.S_IMODE(cache.stat().st_mode) == 0o700
            copied(cache, tmp_path / "killed")
            w.cues.clear()

    async def check(w: World) -> None:
        await nothing_is_lost(w)
        assert told(w) == set()

    trio.run(run)
    next_mount(tmp_path / "killed", lambda cache: None, check)


def test_without_the_cache_directory_files_are_read_through_memory(tmp_path: Path) -> None:
    """Also those that are open already; writes say what is wrong."""
    cache = tmp_path / "cache"
    remote = MemoryRemote("sftp")
    data = {b"open": _bytes(1, 4), b"other": _bytes(2, 4)}
    for name, content in data.items():
        remote.put(name, content)

    async def run() -> None:
        async with world(cache, {"ns": remote}) as w:
            handle = await w.kernel.open("ns/open", os.O_RDONLY)
            assert await w.kernel.pread(handle, 0, 10) == data[b"open"][:10]
            shutil.rmtree(cache)
            cache.write_bytes(b"in the way")
            await renew_if_removed(w.store)
            assert any("was removed" in one for one in w.store.troubles.sentences)
            assert await w.kernel.pread(handle, 0, 1 << 20) == data[b"open"]
            assert await w.kernel.read_file("ns/other") == data[b"other"]
            with pytest.raises(OSError, match="Not a directory"):
                await w.kernel.write_file("ns/new", b"x")
            assert b"new" not in remote.paths()
            await w.kernel.close(handle)
            cache.unlink()
            await renew_if_removed(w.store)
            await w.journal.renew_if_removed()
            await w.kernel.write_file("ns/new", b"x")
            assert remote.get(b"new") == b"x"

    trio.run(run)


# --- the index ----------------------------------------------------------------------------------

MANY = {b"f%02d" % n: random.Random(n).randbytes(1000 + n) for n in range(60)}


def _many() -> MemoryRemote:
    remote = MemoryRemote("sftp")
    for name, data in MANY.items():
        remote.put(name, data)
    return remote


async def read_all(w: World) -> None:
    for name, data in MANY.items():
        assert await w.kernel.read_file(f"ns/{name.decode()}") == data


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cached")

    async def run() -> None:
        async with world(directory / "mounted", {"ns": _many()}) as w:
            await read_all(w)
            await w.store.save()
            copied(directory / "mounted", directory / "killed")

    trio.run(run)
    return directory / "killed"


@some
@given(st.lists(damages, min_size=1, max_size=4), st.booleans())
def test_an_index_with_random_damage(cached: Path, how: list[Damage], is_log: bool) -> None:
    """All files have the remote's bytes, whatever the index says."""
    with TemporaryDirectory() as directory:
        cache = copied(cached, Path(directory) / "cache")
        for one in how:
            damage(cache / ("index.db-wal" if is_log else "index.db"), one)

        async def run() -> None:
            async with world(cache, {"ns": _many()}) as w:
                with trio.fail_after(60):
                    await w.store.remove_strays()
                    await read_all(w)
                    await w.store.save()

        trio.run(run)


@some
@given(st.lists(damages, min_size=1, max_size=4), st.booleans())
def test_an_index_that_is_damaged_while_it_is_in_use(
    cached: Path, how: list[Damage], is_log: bool
) -> None:
    with TemporaryDirectory() as directory:
        cache = copied(cached, Path(directory) / "cache")

        async def run() -> None:
            async with world(cache, {"ns": _many()}) as w:
                with trio.fail_after(60):
                    await w.kernel.read_file("ns/f00")
                    await w.store.save()
                    for one in how:
                        damage(cache / ("index.db-wal" if is_log else "index.db"), one)
                    await read_all(w)
                    await w.store.save()
                    await w.store.remove_strays()
                    await read_all(w)
                    await w.kernel.rename("ns/f00", "ns/moved")
                    await w.kernel.unlink("ns/f01")

        trio.run(run)


def test_a_lost_index_costs_one_line_and_no_error(
    cached: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """60 files, no EIO; the pins stay, what is open is saved anew, and the rest is swept away."""
    cache = copied(cached, tmp_path / "cache")

    async def run() -> None:
        async with world(cache, {"ns": _many()}) as w:
            await w.store.in_thread(w.store.registry.index.pin, "memory:ns", b"f00")
            handle = await w.kernel.open("ns/f00")
            await w.kernel.pread(handle, 0, 10)
            w.store.registry.index._db.execute("DROP TABLE files")
            await read_all(w)
            await w.store.save()
            await w.store.remove_strays()
            assert w.store.registry.index.is_pinned("memory:ns", b"f00")
            assert await w.store.in_thread(w.store.registry.index.find, "memory:ns", b"f00")
            on_disk = {one.name for one in (cache / "data").rglob("*") if one.is_file()}
            assert len(on_disk) == 60
            await w.kernel.close(handle)
            await read_all(w)

    trio.run(run)
    lines = [one.getMessage() for one in caplog.records if "index" in one.getMessage()]
    assert len(lines) == 1
    assert "begins anew" in lines[0]
    assert (cache / "index.db.damaged").exists()
