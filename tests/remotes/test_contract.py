"""The Remote protocol, on a real server of every kind."""

from __future__ import annotations

import asyncio
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcfs.model.entries import BLOCK_BYTES, LIST_PAGE_ENTRIES, Attributes
from hpcfs.model.errors import (
    AlreadyExists,
    Changed,
    Conflict,
    DirectoryNotEmpty,
    InvalidName,
    InvalidRequest,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotFound,
    NotSupported,
    TooLarge,
)
from hpcfs.model.usage import Traffic
from hpcfs.remotes.base import Remote, Site
from tests.remotes.contract import FILE_MODE, READER, Subject, contract, get, listed, put
from tests.support.sshd import LOCAL_GID, LOCAL_UID

SECOND = 1_000_000_000
SIZES = (0, 1, 2, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * 1024 * 1024 + 3)


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:05}").touch()


# --- connections --------------------------------------------------------------------------------


async def become(site: Site, rests: Callable[[Traffic], bool]) -> None:
    async with asyncio.timeout(10):
        while not rests(site.traffic()):  # noqa: ASYNC110 - nothing tells when they end
            await asyncio.sleep(0.01)


def test_a_site_tells_what_is_open_to_it(subject: Subject) -> None:
    async def test() -> None:
        site = subject.make_site()
        assert site.traffic() == Traffic()
        try:
            remote = site.remote("ns")
            await remote.connect()
            await put(remote, b"file", content(100_000))
            reading = asyncio.gather(*(get(remote, b"file", READER + n) for n in range(10)))
            seen = [site.traffic()]
            while not reading.done():
                await asyncio.sleep(0)
                seen.append(site.traffic())
            await reading
            assert max(now.requests for now in seen) >= 10
            most = max(now.connections for now in seen)
            at_least = {"tunnel": 7, "s3-rclone": 10, "s3-moto": 10}
            assert most >= at_least.get(subject.kind, 1)
            channels = {"sftp": 2, "openssh": 1, "tunnel": 7, "tunnel-tcp": 2}
            assert seen[0].channels == channels.get(subject.kind, 0)
            await become(site, lambda now: not now.requests)
        finally:
            await site.close()
        await become(site, lambda now: now == Traffic())

    asyncio.run(test())


# --- looking ------------------------------------------------------------------------------------


@contract
async def test_connect_tells_what_the_remote_can_do(remote: Remote, subject: Subject) -> None:
    capabilities = await remote.connect()
    assert capabilities.partial_writes == subject.is_sftp
    assert capabilities.handles == subject.is_sftp


@contract
async def test_the_root_is_an_empty_directory(remote: Remote, subject: Subject) -> None:
    root = await remote.stat(b"")
    assert stat.S_ISDIR(root.mode)
    assert root.name == b""
    assert root.version == b""
    assert await listed(remote, b"") == {}


@contract
async def test_what_is_not_there_is_not_found(remote: Remote, subject: Subject) -> None:
    for path in (b"missing", b"missing/below"):
        with pytest.raises(NotFound):
            await remote.stat(path)
    with pytest.raises(NotFound):
        await listed(remote, b"missing")
    with pytest.raises(NotFound):
        await remote.remove(b"missing")
    with pytest.raises(NotFound):
        await remote.remove_directory(b"missing")
    with pytest.raises(NotFound):
        await remote.rename(b"missing", b"other", replace=True)
    with pytest.raises(NotFound):
        await remote.rename(b"missing", b"other", replace=False)
    with pytest.raises(NotFound):
        await remote.set_attributes(b"missing", Attributes(mode=0o600))
    with pytest.raises(NotFound):
        await remote.truncate(b"missing", 3)
    with pytest.raises((NotFound, Changed)):
        await remote.fetch(b"missing", b"1:1", 0, 1, READER)


@contract
async def test_stat_and_list_say_the_same(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"abc", attributes=Attributes(mtime_ns=1_600_000_000 * SECOND))
    await remote.make_directory(b"folder", 0o755)
    await remote.make_symlink(b"link", b"file")
    entries = await listed(remote, b"")
    assert set(entries) == {b"file", b"folder", b"link"}
    for name, entry in entries.items():
        seen = await remote.stat(name)
        assert (seen.name, seen.mode, seen.size) == (entry.name, entry.mode, entry.size)
        assert (seen.mtime_ns, seen.version) == (entry.mtime_ns, entry.version)
    assert entries[b"file"].size == 3
    assert (entries[b"file"].uid, entries[b"file"].gid) == (LOCAL_UID, LOCAL_GID)


@contract
async def test_names_that_need_care(remote: Remote, subject: Subject) -> None:
    names = [
        b"with space", b"%41", b"a+b&c=d", b"?#*[x]", b"back\\slash", b"new\nline", b"-rf",
        b".hidden",
        "älter".encode(), "日本".encode(), b"x" * 255, b"~", b'"quoted"', b"tab\t", b"trailing.",
    ]  # fmt: skip
    if not subject.is_sftp:
        names.remove(b"new\nline")  # neither of the two S3 test servers takes one in a key
    for name in names:
        await put(remote, name, name)
    assert set(await listed(remote, b"")) == set(names)
    for name in names:
        assert await get(remote, name) == name
        await remote.remove(name)
    assert await listed(remote, b"") == {}


@contract
async def test_names_in_latin_1(remote: Remote, subject: Subject) -> None:
    name = b"caf\xe9"
    if subject.is_sftp:
        await put(remote, name, b"x")
        assert set(await listed(remote, b"")) == {name}
        assert await get(remote, name) == b"x"
    else:
        with pytest.raises(InvalidName):
            await put(remote, name, b"x")


@contract
async def test_names_that_no_remote_can_hold(remote: Remote, subject: Subject) -> None:
    with pytest.raises((NameTooLong, InvalidName)):
        await put(remote, b"n" * 256, b"x")
    with pytest.raises(InvalidName):
        await put(remote, b"a\0b", b"x")


@contract
async def test_a_file_is_no_directory(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"abc")
    with pytest.raises(NotADirectory):
        await listed(remote, b"file")
    with pytest.raises(NotADirectory):
        await remote.remove_directory(b"file")
    with pytest.raises((NotADirectory, NotFound)):
        await remote.stat(b"file/below")
    assert await get(remote, b"file") == b"abc"


@contract
async def test_a_long_listing_comes_in_pages(remote: Remote, subject: Subject) -> None:
    count = 2 * LIST_PAGE_ENTRIES + 1 if subject.folder else 40
    if subject.folder:
        fill(subject.folder / "many", count)
    else:
        await remote.make_directory(b"many", 0o755)
        await asyncio.gather(*(put(remote, b"many/%05d" % n, b"") for n in range(count)))
    pages = [page async for page in remote.list(b"many")]
    assert all(0 < len(page) <= LIST_PAGE_ENTRIES for page in pages)
    names = [entry.name for page in pages for entry in page]
    assert sorted(names) == [b"%05d" % number for number in range(count)]


@contract
async def test_disk_usage_makes_sense(remote: Remote, subject: Subject) -> None:
    usage = await remote.disk_usage()
    assert (usage is not None) == subject.is_sftp
    if usage is not None:
        assert 0 <= usage.available <= usage.total
        assert 0 <= usage.free <= usage.total
        assert usage.total > 0


# --- bytes --------------------------------------------------------------------------------------


@contract
async def test_content_of_every_size_comes_back(remote: Remote, subject: Subject) -> None:
    for size in SIZES:
        data = content(size)
        progress: list[int] = []
        entry = await put(remote, b"file", data, progress=progress, sync=True)
        assert entry.size == size
        assert entry.name == b"file"
        assert entry.version == (await remote.stat(b"file")).version
        assert await get(remote, b"file") == data
        assert progress == sorted(progress)
        if size:
            assert progress[-1] == size


@contract
async def test_ranges_anywhere_in_a_file(remote: Remote, subject: Subject) -> None:
    data = content(3 * 1024 * 1024 + 17)
    entry = await put(remote, b"file", data)
    chooser = random.Random(5)

    async def compare() -> None:
        offset = chooser.randrange(len(data))
        length = chooser.randrange(1, len(data) - offset + 1)
        got = b"".join(await remote.fetch(b"file", entry.version, offset, length, READER))
        assert got == data[offset : offset + length]

    await asyncio.gather(*(compare() for _ in range(30)))
    await remote.release(READER)
    await remote.release(READER)


@contract
async def test_another_version_is_never_served(remote: Remote, subject: Subject) -> None:
    old = await put(remote, b"file", b"first", attributes=Attributes(mtime_ns=10**18))
    assert b"".join(await remote.fetch(b"file", old.version, 0, 5, READER)) == b"first"
    new = await put(remote, b"file", b"other", attributes=Attributes(mtime_ns=10**18 + SECOND))
    assert new.version != old.version
    for handle in (READER, READER + 1):
        with pytest.raises(Changed):
            await remote.fetch(b"file", old.version, 0, 5, handle)
    assert b"".join(await remote.fetch(b"file", new.version, 0, 5, READER)) == b"other"


@contract
async def test_bytes_beyond_the_end_are_a_change(remote: Remote, subject: Subject) -> None:
    entry = await put(remote, b"file", b"12345")
    with pytest.raises(Changed):
        await remote.fetch(b"file", entry.version, 0, 6, READER)
    assert b"".join(await remote.fetch(b"file", entry.version, 4, 1, READER)) == b"5"


@contract
async def test_a_removed_file_is_not_mixed_with_its_successor(
    remote: Remote, subject: Subject
) -> None:
    old = await put(remote, b"file", b"a" * 1000, attributes=Attributes(mtime_ns=10**18))
    await remote.remove(b"file")
    with pytest.raises((NotFound, Changed)):
        await remote.fetch(b"file", old.version, 0, 1000, READER)
    await put(remote, b"file", b"b" * 1000, attributes=Attributes(mtime_ns=10**18 + SECOND))
    with pytest.raises(Changed):
        await remote.fetch(b"file", old.version, 0, 1000, READER + 1)


@contract
async def test_upload_of_parts_of_a_file(remote: Remote, subject: Subject) -> None:
    """The source holds all bytes; remotes with partial writes are given the dirty ranges only."""
    old = content(700_000)
    await put(remote, b"file", old)
    new = old[:100] + b"X" * 50 + old[150:300_000] + b"Y" * 300_000 + old[600_000:]
    ranges = [(100, 50), (300_000, 300_000)]
    entry = await put(remote, b"file", new, ranges=ranges, base_size=len(old))
    assert entry.size == len(new)
    assert await get(remote, b"file") == new


@contract
async def test_upload_that_appends_or_cuts_or_leaves_a_hole(
    remote: Remote, subject: Subject
) -> None:
    old = content(1000)
    await put(remote, b"file", old)
    longer = old + b"tail"
    await put(remote, b"file", longer, ranges=[(1000, 4)], base_size=1000)
    assert await get(remote, b"file") == longer
    await put(remote, b"file", longer[:10], ranges=[], base_size=10)
    assert await get(remote, b"file") == longer[:10]
    holed = longer[:10] + bytes(90) + b"end" + bytes(7)
    await put(remote, b"file", holed, ranges=[(100, 3)], base_size=10)
    assert await get(remote, b"file") == holed
    regrown = longer[:4] + bytes(16)
    await put(remote, b"file", regrown, ranges=[], base_size=4)
    assert await get(remote, b"file") == regrown


@contract
async def test_upload_keeps_and_sets_attributes(remote: Remote, subject: Subject) -> None:
    wanted = Attributes(mode=0o640, mtime_ns=1_234_567_890 * SECOND)
    entry = await put(remote, b"file", b"x", attributes=wanted)
    assert stat.S_IMODE(entry.mode) == 0o640
    assert entry.mtime_ns == 1_234_567_890 * SECOND
    seen = await remote.stat(b"file")
    assert (seen.mode, seen.mtime_ns) == (entry.mode, entry.mtime_ns)
    assert stat.S_IMODE((await put(remote, b"new", b"x", mode=0o600)).mode) == 0o600


@contract
async def test_truncate_cuts_and_extends(remote: Remote, subject: Subject) -> None:
    data = content(500_000)
    await put(remote, b"file", data)
    assert (await remote.truncate(b"file", 300_001)).size == 300_001
    assert await get(remote, b"file") == data[:300_001]
    assert (await remote.truncate(b"file", 400_000)).size == 400_000
    assert await get(remote, b"file") == data[:300_001] + bytes(99_999)
    assert (await remote.truncate(b"file", 0)).size == 0
    assert await get(remote, b"file") == b""
    with pytest.raises(InvalidRequest):
        await remote.truncate(b"file", -1)
    await remote.make_directory(b"folder", 0o755)
    with pytest.raises(IsADirectory):
        await remote.truncate(b"folder", 0)


@contract
async def test_a_rename_tells_that_it_moves_on(remote: Remote, subject: Subject) -> None:
    await remote.make_directory(b"a", 0o755)
    for number in range(5):
        await put(remote, b"a/%d" % number, b"x")
    told: list[int] = []
    await remote.rename(b"a", b"b", replace=True, report=told.append)
    assert told == sorted(told)
    assert subject.is_sftp or told
    assert len(await listed(remote, b"b")) == 5


@contract
async def test_many_requests_at_once(remote: Remote, subject: Subject) -> None:
    data = {b"f%d" % number: content(200_000, number) for number in range(12)}
    await asyncio.gather(*(put(remote, name, body) for name, body in data.items()))
    bodies = await asyncio.gather(*(get(remote, name, handle) for handle, name in enumerate(data)))
    assert bodies == list(data.values())


# --- names --------------------------------------------------------------------------------------


@contract
async def test_create_makes_an_empty_file_once(remote: Remote, subject: Subject) -> None:
    entry = await remote.create(b"file", 0o640)
    assert (entry.name, entry.size, entry.mode) == (b"file", 0, stat.S_IFREG | 0o640)
    await put(remote, b"file", b"now it is there", base_size=0)
    with pytest.raises(AlreadyExists):
        await remote.create(b"file", 0o644)
    assert await get(remote, b"file") == b"now it is there"
    await remote.make_directory(b"folder", 0o755)
    with pytest.raises(AlreadyExists):
        await remote.create(b"folder", 0o644)


@contract
async def test_directories(remote: Remote, subject: Subject) -> None:
    entry = await remote.make_directory(b"folder", 0o750)
    assert (entry.name, entry.mode) == (b"folder", stat.S_IFDIR | 0o750)
    await remote.make_directory(b"folder/inner", 0o777)
    assert set(await listed(remote, b"folder")) == {b"inner"}
    assert stat.S_ISDIR((await remote.stat(b"folder/inner")).mode)
    with pytest.raises(AlreadyExists):
        await remote.make_directory(b"folder", 0o755)
    with pytest.raises(DirectoryNotEmpty):
        await remote.remove_directory(b"folder")
    with pytest.raises(IsADirectory):
        await remote.remove(b"folder")
    await remote.remove_directory(b"folder/inner")
    assert await listed(remote, b"folder") == {}, "an empty directory stays"
    await remote.remove_directory(b"folder")
    with pytest.raises(NotFound):
        await remote.stat(b"folder")


@contract
async def test_symbolic_links(remote: Remote, subject: Subject) -> None:
    for name, target in ((b"to-file", b"file"), (b"dangling", b"../no/where"), (b"abs", b"/etc")):
        entry = await remote.make_symlink(name, target)
        assert stat.S_ISLNK(entry.mode)
        assert entry.version == b""
        assert await remote.read_link(name) == target
        assert stat.S_ISLNK((await remote.stat(name)).mode)
    with pytest.raises(AlreadyExists):
        await remote.make_symlink(b"abs", b"elsewhere")
    await put(remote, b"file", b"x")
    with pytest.raises(InvalidRequest):
        await remote.read_link(b"file")
    await remote.remove(b"to-file")
    assert await get(remote, b"file") == b"x", "removing a link leaves its target"


@contract
async def test_hard_links(remote: Remote, subject: Subject) -> None:
    await put(remote, b"one", b"same")
    if not subject.is_sftp:
        with pytest.raises(NotSupported):
            await remote.make_link(b"one", b"two")
        return
    entry = await remote.make_link(b"one", b"two")
    assert entry.name == b"two"
    await put(remote, b"two", b"SAME", base_size=4)
    assert await get(remote, b"one") == b"SAME"
    with pytest.raises(AlreadyExists):
        await remote.make_link(b"one", b"two")
    with pytest.raises(NotFound):
        await remote.make_link(b"missing", b"three")


# --- rename -------------------------------------------------------------------------------------


@contract
async def test_rename_files(remote: Remote, subject: Subject) -> None:
    await put(remote, b"a", b"A", attributes=Attributes(mode=0o600, mtime_ns=10**18))
    await remote.make_directory(b"folder", 0o755)
    await remote.rename(b"a", b"folder/b", replace=False)
    moved = await remote.stat(b"folder/b")
    assert (stat.S_IMODE(moved.mode), moved.mtime_ns) == (0o600, 10**18)
    assert await get(remote, b"folder/b") == b"A"
    assert set(await listed(remote, b"")) == {b"folder"}
    await put(remote, b"c", b"C")
    with pytest.raises(AlreadyExists):
        await remote.rename(b"c", b"folder/b", replace=False)
    assert await get(remote, b"folder/b") == b"A"
    await remote.rename(b"c", b"folder/b", replace=True)
    assert await get(remote, b"folder/b") == b"C"
    assert set(await listed(remote, b"")) == {b"folder"}


@contract
async def test_rename_directories(remote: Remote, subject: Subject) -> None:
    await remote.make_directory(b"a", 0o755)
    await remote.make_directory(b"a/inner", 0o755)
    await put(remote, b"a/inner/file", b"deep")
    await remote.make_symlink(b"a/link", b"inner/file")
    await remote.rename(b"a", b"b", replace=True)
    assert await get(remote, b"b/inner/file") == b"deep"
    assert await remote.read_link(b"b/link") == b"inner/file"
    with pytest.raises(NotFound):
        await remote.stat(b"a")
    await remote.make_directory(b"empty", 0o755)
    await remote.rename(b"b", b"empty", replace=True)
    assert await get(remote, b"empty/inner/file") == b"deep"
    await remote.make_directory(b"other", 0o755)
    with pytest.raises(AlreadyExists):
        await remote.rename(b"other", b"empty", replace=False)


@contract
async def test_renames_that_make_no_sense(remote: Remote, subject: Subject) -> None:
    await remote.make_directory(b"full", 0o755)
    await put(remote, b"full/file", b"kept")
    await remote.make_directory(b"folder", 0o755)
    await put(remote, b"file", b"x")
    with pytest.raises(IsADirectory):
        await remote.rename(b"file", b"folder", replace=True)
    with pytest.raises(NotADirectory):
        await remote.rename(b"folder", b"file", replace=True)
    with pytest.raises(DirectoryNotEmpty):
        await remote.rename(b"folder", b"full", replace=True)
    with pytest.raises(InvalidRequest):
        await remote.rename(b"full", b"full/below", replace=True)
    assert await get(remote, b"full/file") == b"kept"
    assert await get(remote, b"file") == b"x"
    assert await listed(remote, b"folder") == {}


@contract
async def test_rename_of_links_moves_the_link(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"x")
    await remote.make_symlink(b"link", b"file")
    await remote.make_symlink(b"dangling", b"nowhere")
    await remote.rename(b"link", b"moved", replace=True)
    assert await remote.read_link(b"moved") == b"file"
    with pytest.raises(AlreadyExists):
        await remote.rename(b"moved", b"dangling", replace=False)
    assert await remote.read_link(b"dangling") == b"nowhere"
    await remote.rename(b"moved", b"dangling", replace=True)
    assert await remote.read_link(b"dangling") == b"file"
    assert await get(remote, b"file") == b"x"


# --- attributes ---------------------------------------------------------------------------------


@contract
async def test_modes_and_times(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"x", attributes=Attributes(mtime_ns=5 * SECOND))
    await remote.make_directory(b"folder", 0o755)
    for path, kind in ((b"file", stat.S_IFREG), (b"folder", stat.S_IFDIR)):
        for mode in (0o400, 0o777, 0o600, 0o755):
            entry = await remote.set_attributes(path, Attributes(mode=mode))
            assert entry.mode == kind | mode
            assert (await remote.stat(path)).mode == kind | mode
    for seconds in (0, 1_000_000_000, 2**31 + 5):
        entry = await remote.set_attributes(b"file", Attributes(mtime_ns=seconds * SECOND))
        assert entry.mtime_ns == seconds * SECOND
        assert (await remote.stat(b"file")).mtime_ns == seconds * SECOND
    assert stat.S_IMODE((await remote.stat(b"file")).mode) == 0o755, "each alone"
    assert await get(remote, b"file") == b"x"


@contract
async def test_setting_nothing_changes_nothing(remote: Remote, subject: Subject) -> None:
    before = await put(remote, b"file", b"x", mode=FILE_MODE)
    after = await remote.set_attributes(b"file", Attributes())
    assert (after.mode, after.mtime_ns, after.size) == (before.mode, before.mtime_ns, before.size)


@contract
async def test_the_local_owner_can_be_set(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"x")
    entry = await remote.set_attributes(b"file", Attributes(uid=LOCAL_UID, gid=LOCAL_GID))
    assert (entry.uid, entry.gid) == (LOCAL_UID, LOCAL_GID)


@contract
async def test_times_of_a_link_are_its_own(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"x", attributes=Attributes(mtime_ns=7 * SECOND))
    await remote.make_symlink(b"link", b"file")
    entry = await remote.set_attributes(b"link", Attributes(mtime_ns=9 * SECOND))
    assert stat.S_ISLNK(entry.mode)
    assert entry.mtime_ns == 9 * SECOND
    assert (await remote.stat(b"file")).mtime_ns == 7 * SECOND


# --- what an upload stands on -------------------------------------------------------------------


@contract
async def test_a_range_of_no_bytes_tells_whether_it_is_that_version(
    remote: Remote, subject: Subject
) -> None:
    old = await put(remote, b"file", b"old")
    assert not b"".join(await remote.fetch(b"file", old.version, 0, 0, READER))
    await remote.remove(b"file")
    await put(remote, b"file", b"newer")
    await remote.release(READER)
    with pytest.raises(Changed):
        await remote.fetch(b"file", old.version, 0, 0, READER)


@contract
async def test_changes_of_attributes_at_once_are_all_made(remote: Remote, subject: Subject) -> None:
    await put(remote, b"file", b"x")
    await remote.make_directory(b"folder", 0o755)
    for path in (b"file", b"folder"):
        await asyncio.gather(
            remote.set_attributes(path, Attributes(mode=0o700)),
            remote.set_attributes(path, Attributes(mtime_ns=7 * SECOND)),
        )
        entry = await remote.stat(path)
        assert (stat.S_IMODE(entry.mode), entry.mtime_ns) == (0o700, 7 * SECOND)


@contract
async def test_an_upload_changes_only_the_version_it_was_made_on(
    remote: Remote, subject: Subject
) -> None:
    old = await put(remote, b"file", b"mine", attributes=Attributes(mtime_ns=10**18))
    new = await put(remote, b"file", b"MINE!", base_version=old.version)
    theirs = Attributes(mtime_ns=2 * 10**18)
    await put(remote, b"file", b"theirs", attributes=theirs, base_version=new.version)
    if subject.is_sftp:  # S3 servers differ in that: test_s3.py
        with pytest.raises(Conflict):
            await put(remote, b"file", b"mine again", base_version=new.version)
        with pytest.raises(Conflict):
            await put(remote, b"file", b"", base_version=new.version)
    assert await get(remote, b"file") == b"theirs"
    assert (await remote.stat(b"file")).mtime_ns == 2 * 10**18
    await put(remote, b"file", b"whatever is there", base_version=None)
    assert await get(remote, b"file") == b"whatever is there"


@contract
async def test_an_upload_of_a_new_file_meets_none(remote: Remote, subject: Subject) -> None:
    await put(remote, b"new", b"mine", base_version=b"")
    assert await get(remote, b"new") == b"mine"
    await put(remote, b"other", b"theirs", attributes=Attributes(mtime_ns=10**18))
    if subject.is_sftp:
        with pytest.raises(Conflict):
            await put(remote, b"other", b"mine", base_version=b"")
    assert await get(remote, b"other") == b"theirs"


@contract
async def test_an_upload_that_replaces(remote: Remote, subject: Subject) -> None:
    old = await put(remote, b"file", b"old content", attributes=Attributes(mtime_ns=10**18))
    wanted = Attributes(mtime_ns=2 * 10**18, mode=0o640)
    new = await put(
        remote, b"file", b"new", attributes=wanted, base_version=old.version, replace=True
    )
    assert await get(remote, b"file") == b"new"
    assert (new.size, new.mtime_ns, stat.S_IMODE(new.mode)) == (3, 2 * 10**18, 0o640)
    assert new.version == (await remote.stat(b"file")).version
    if subject.is_sftp:
        with pytest.raises(Conflict):
            await put(remote, b"file", b"newer", base_version=old.version, replace=True)
    assert await get(remote, b"file") == b"new"
    await put(remote, b"first", b"1", base_version=b"", replace=True)
    await put(remote, b"large", content(3 * 1024 * 1024), replace=True)
    assert await get(remote, b"large") == content(3 * 1024 * 1024)
    assert set(await listed(remote, b"")) == {b"file", b"first", b"large"}, "and nothing beside"
    await remote.make_symlink(b"link", b"file")
    await put(remote, b"link", b"no link", replace=True)
    assert await get(remote, b"link") == b"no link"
    assert await get(remote, b"file") == b"new"


@contract
async def test_an_upload_that_replaces_takes_a_links_place(
    remote: Remote, subject: Subject
) -> None:
    await put(remote, b"other", b"other")
    await remote.make_symlink(b"link", b"other")
    entry = await put(remote, b"link", b"a file now", replace=True)
    assert stat.S_ISREG(entry.mode)
    assert stat.S_ISREG((await remote.stat(b"link")).mode)
    assert await get(remote, b"link") == b"a file now"
    assert await get(remote, b"other") == b"other"


@contract
async def test_a_created_file_is_completed_by_its_upload(remote: Remote, subject: Subject) -> None:
    entry = await remote.create(b"file", 0o640, 5)
    assert (entry.name, entry.size, entry.mode) == (b"file", 0, stat.S_IFREG | 0o640)
    assert (entry.uid, entry.gid) == (LOCAL_UID, LOCAL_GID)
    assert entry.version == b""
    done = await put(remote, b"file", b"content", base_version=b"", handle=5, mode=0o640)
    assert await get(remote, b"file") == b"content"
    assert stat.S_IMODE(done.mode) == 0o640
    assert done.version == (await remote.stat(b"file")).version
    await remote.release(5)
    await put(remote, b"file", b"CONTENT", base_version=done.version)
    assert await get(remote, b"file") == b"CONTENT"


@pytest.mark.parametrize("most", [100, 10])
def test_a_directory_has_no_more_names_than_can_be_shown(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A server may go on for ever: what it tells is not remembered for ever."""
    for module in ("hpcfs.remotes.sftp.listing", "hpcfs.remotes.s3.directory"):
        monkeypatch.setattr(f"{module}.LIST_MAX_ENTRIES", most)

    async def story(remote: Remote) -> None:
        for number in range(20):
            await put(remote, b"d%02d" % number, b"x")
        if most < 20:
            with pytest.raises(TooLarge, match="more than 10 names"):
                await listed(remote, b"")
        else:
            assert len(await listed(remote, b"")) == 20

    subject.run(story)
