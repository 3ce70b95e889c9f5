"""SFTP as real and as wicked servers speak it; what all remotes share is in test_contract.py."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from asyncssh import FXF_READ, SFTPAttrs
from asyncssh.constants import FXP_CLOSE, FXP_OPENDIR, FXP_READDIR

from hpcfs.model.entries import NO_HANDLE, Attributes
from hpcfs.model.errors import (
    AlreadyExists,
    Changed,
    CrossDevice,
    DirectoryNotEmpty,
    IsADirectory,
    NameTooLong,
    NoService,
    NoSpace,
    NotADirectory,
    NotFound,
    NotSupported,
    PermissionDenied,
    ProtocolError,
    RemoteFailure,
    WrongSettings,
)
from hpcfs.model.sites import S3Root, SftpRoot, SiteSpec
from hpcfs.remotes.sftp.attrs import Owners
from hpcfs.remotes.sftp.read import MAX_OPEN_HANDLES
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.root import full_path
from hpcfs.remotes.sftp.site import SshSiteConnection
from tests.remotes.contract import get, listed, put
from tests.support import evil_sftp
from tests.support.evil_sftp import EvilSite, Plain, evil_site
from tests.support.sshd import (
    LOCAL_GID,
    LOCAL_UID,
    ScriptedPrompter,
    SshServer,
    sftp_server_binary,
    ssh_server,
)

T = TypeVar("T")
SECOND = 1_000_000_000
EXTENSIONS = (
    b"posix-rename@openssh.com", b"statvfs@openssh.com", b"fstatvfs@openssh.com",
    b"fsync@openssh.com", b"limits@openssh.com", b"hardlink@openssh.com", b"lsetstat@openssh.com",
)  # fmt: skip


def on(spec: SiteSpec, story: Callable[[SftpRemote], Awaitable[T]]) -> T:
    """Run a story on a real server's namespace."""

    async def main() -> T:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            return await story(site.remote("ns"))
        finally:
            await site.close()

    return asyncio.run(main())


def on_evil(
    base: Path,
    sftp: type[Plain],
    story: Callable[[SftpRemote, EvilSite], Awaitable[T]],
    without: tuple[bytes, ...] = (),
) -> T:
    """Run a story on a wicked server's namespace."""

    async def main() -> T:
        async with evil_site(base, sftp, without=without) as evil:
            site = SshSiteConnection(evil.spec, ScriptedPrompter())
            try:
                return await story(site.remote("ns"), evil)
            finally:
                await site.close()

    return asyncio.run(main())


# --- where the namespace is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("~", b"/home/u"), ("", b"/home/u"), ("~/x", b"/home/u/x"), ("x/y", b"/home/u/x/y"),
        ("/data", b"/data"), ("/", b"/"), ("~/", b"/home/u"), ("~other", b"/home/u/~other"),
        ("caf\udce9", b"/home/u/caf\xe9"),
    ],
)  # fmt: skip
def test_root_paths(path: str, full: bytes) -> None:
    assert full_path(path, b"/home/u") == full


def test_a_missing_root_names_host_and_path(sshd: SshServer) -> None:
    spec = sshd.site_spec(str(sshd.root / "nowhere"))
    with pytest.raises(WrongSettings, match=r"nowhere on cluster \(127.0.0.1\) does not exist"):
        on(spec, lambda remote: remote.stat(b"x"))


def test_a_root_that_is_a_file_is_refused(sshd: SshServer) -> None:
    (sshd.root / "plain").write_bytes(b"x")
    with pytest.raises(WrongSettings, match="is not a folder"):
        on(sshd.site_spec(str(sshd.root / "plain")), lambda remote: remote.connect())


def test_a_root_made_later_is_found_by_the_next_request(sshd: SshServer) -> None:
    late = sshd.root / "late"

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(WrongSettings):
            await remote.connect()
        late.mkdir()
        assert await listed(remote, b"") == {}

    on(sshd.site_spec(str(late)), story)


def test_a_root_may_be_a_link_to_a_directory(sshd: SshServer) -> None:
    (sshd.root / "real").mkdir()
    (sshd.root / "real" / "file").write_bytes(b"x")
    (sshd.root / "alias").symlink_to("real")

    async def story(remote: SftpRemote) -> None:
        assert stat.S_ISDIR((await remote.stat(b"")).mode)
        assert set(await listed(remote, b"")) == {b"file"}

    on(sshd.site_spec(str(sshd.root / "alias")), story)


def test_two_namespaces_share_one_connection(sshd: SshServer) -> None:
    for name in ("one", "two"):
        (sshd.root / name).mkdir()
        (sshd.root / name / name).write_bytes(b"")
    roots: dict[str, SftpRoot | S3Root] = {
        name: SftpRoot(str(sshd.root / name)) for name in ("one", "two")
    }
    base = sshd.site_spec()
    spec = SiteSpec(base.site, roots, base.state_dir, base.uid, base.gid)

    async def main() -> None:
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            one, two = await asyncio.gather(
                listed(site.remote("one"), b""), listed(site.remote("two"), b"")
            )
            assert (set(one), set(two)) == ({b"one"}, {b"two"})
            with pytest.raises(WrongSettings):
                site.remote("three")
        finally:
            await site.close()

    asyncio.run(main())


# --- a real server ------------------------------------------------------------------------------


def test_owners_change_places() -> None:
    owners = Owners(local_uid=1000, local_gid=100, remote_uid=5000, remote_gid=500)
    assert owners.uid(5000) == 1000
    assert owners.uid(1000) == 5000, "somebody else with the local number is not the local user"
    assert owners.uid(0) == 0
    assert owners.uid(owners.uid(77)) == 77
    assert owners.uid(None) == 1000
    assert Owners(1000, 100, None, None).gid(0) == 0, "an unknown remote user changes nothing"


def test_the_remote_user_is_the_local_user(sshd: SshServer) -> None:
    folder = sshd.root / "owned"
    folder.mkdir()

    async def story(remote: SftpRemote) -> None:
        entry = await remote.create(b"file", 0o600)
        assert (entry.uid, entry.gid) == (LOCAL_UID, LOCAL_GID)
        await remote.set_attributes(b"file", Attributes(uid=LOCAL_UID, gid=LOCAL_GID))

    on(sshd.site_spec(str(folder)), story)
    assert (folder / "file").stat().st_uid == os.getuid()


def test_a_growing_file_is_followed_through_its_handle(sshd: SshServer) -> None:
    folder = sshd.root / "growing"
    folder.mkdir()
    log = folder / "log"
    log.write_bytes(b"one\n")

    async def story(remote: SftpRemote) -> None:
        assert await remote.stat_open(1) is None
        first = await remote.stat(b"log")
        assert b"".join(await remote.fetch(b"log", first.version, 0, 4, 1)) == b"one\n"
        with log.open("ab") as file:
            file.write(b"two\n")
        with pytest.raises(Changed):
            await remote.fetch(b"log", first.version, 0, 4, 1)
        grown = await remote.stat_open(1)
        assert grown is not None
        assert (grown.name, grown.size) == (b"log", 8)
        assert b"".join(await remote.fetch(b"log", grown.version, 0, 8, 1)) == b"one\ntwo\n"
        log.rename(folder / "log.1")
        log.write_bytes(b"three\n")
        assert b"".join(await remote.fetch(b"log", grown.version, 4, 4, 1)) == b"two\n", (
            "the handle's file"
        )
        await remote.release(1)
        assert await remote.stat_open(1) is None
        with pytest.raises(Changed):
            await remote.fetch(b"log", grown.version, 4, 4, 1)

    on(sshd.site_spec(str(folder)), story)


def test_a_removed_file_is_still_read_by_who_has_it_open(sshd: SshServer) -> None:
    folder = sshd.root / "removed"
    folder.mkdir()
    (folder / "file").write_bytes(b"abcdef")

    async def story(remote: SftpRemote) -> None:
        entry = await remote.stat(b"file")
        await remote.fetch(b"file", entry.version, 0, 3, 1)
        (folder / "file").unlink()
        assert b"".join(await remote.fetch(b"file", entry.version, 3, 3, 1)) == b"def"
        with pytest.raises(NotFound):
            await remote.fetch(b"file", entry.version, 3, 3, 2)

    on(sshd.site_spec(str(folder)), story)


def test_open_handles_are_bounded_and_closed(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"x")
        version = (await remote.stat(b"file")).version
        many = range(1, MAX_OPEN_HANDLES + 21)
        for handle in many:
            assert b"".join(await remote.fetch(b"file", version, 0, 1, handle)) == b"x"
        await remote.fetch(b"file", version, 0, 1, 10**6)  # behind the closes, on their channel
        assert evil_sftp.Counting.held == MAX_OPEN_HANDLES
        assert b"".join(await remote.fetch(b"file", version, 0, 1, 1)) == b"x", "opened again"
        for handle in (*many, 10**6):
            await remote.release(handle)
        await remote.fetch(b"file", version, 0, 1, 5)
        assert evil_sftp.Counting.held == 1

    on_evil(tmp_path, evil_sftp.Counting, story)
    assert evil_sftp.Counting.held == 0


def test_without_a_handle_nothing_stays_open(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"x")
        version = (await remote.stat(b"file")).version
        for _ in range(10):
            assert b"".join(await remote.fetch(b"file", version, 0, 1, NO_HANDLE)) == b"x"
        await remote.fetch(b"file", version, 0, 1, 1)  # behind the closes, on their channel
        assert evil_sftp.Counting.held == 1

    on_evil(tmp_path, evil_sftp.Counting, story)
    assert evil_sftp.Counting.held == 0


def test_one_opening_serves_all_fetches_of_a_handle(sshd: SshServer) -> None:
    folder = sshd.root / "single"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(range(100)))

    async def story(remote: SftpRemote) -> None:
        version = (await remote.stat(b"file")).version
        got = await asyncio.gather(
            *(remote.fetch(b"file", version, start, 10, 1) for start in range(0, 100, 10))
        )
        assert b"".join(map(b"".join, got)) == bytes(range(100))
        assert len(remote._files._files) == 1

    on(sshd.site_spec(str(folder)), story)


def test_bytes_lost_on_the_remote_are_not_replaced_by_zeros(sshd: SshServer) -> None:
    folder = sshd.root / "lost"
    folder.mkdir()

    async def story(remote: SftpRemote) -> None:
        await put(remote, b"log", b"0123456789")
        (folder / "log").write_bytes(b"")
        with pytest.raises(Changed):
            await put(remote, b"log", b"0123456789tail", ranges=[(10, 4)], base_size=10)
        assert (folder / "log").read_bytes() == b""

    on(sshd.site_spec(str(folder)), story)


def test_uploading_to_a_directory_is_refused(sshd: SshServer) -> None:
    folder = sshd.root / "updir"
    (folder / "d").mkdir(parents=True)

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(IsADirectory):
            await put(remote, b"d", b"x")
        with pytest.raises(NotFound):
            await put(remote, b"missing/file", b"x")

    on(sshd.site_spec(str(folder)), story)


def test_names_below_a_file_can_not_be_made(sshd: SshServer) -> None:
    folder = sshd.root / "below"
    folder.mkdir()
    (folder / "file").write_bytes(b"")

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(NotADirectory):
            await remote.create(b"file/new", 0o644)
        with pytest.raises(NotADirectory):
            await remote.make_directory(b"file/new", 0o755)

    on(sshd.site_spec(str(folder)), story)


def test_changing_what_is_not_a_link_never_goes_through_one(sshd: SshServer) -> None:
    folder = sshd.root / "links"
    folder.mkdir()
    (folder / "target").write_bytes(b"precious")
    (folder / "target").chmod(0o640)
    (folder / "link").symlink_to("target")

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(NotSupported):
            await remote.set_attributes(b"link", Attributes(mode=0o777))
        with pytest.raises(Exception, match="symbolic link"):
            await remote.truncate(b"link", 0)

    on(sshd.site_spec(str(folder)), story)
    assert (folder / "target").read_bytes() == b"precious"
    assert stat.S_IMODE((folder / "target").stat().st_mode) == 0o640


def test_times_out_of_range_are_clamped(sshd: SshServer) -> None:
    folder = sshd.root / "times"
    folder.mkdir()

    async def story(remote: SftpRemote) -> None:
        await put(remote, b"file", b"x")
        early = await remote.set_attributes(b"file", Attributes(mtime_ns=-5 * SECOND))
        assert early.mtime_ns == 0
        late = await remote.set_attributes(b"file", Attributes(mtime_ns=2**40 * SECOND))
        assert late.mtime_ns == (2**32 - 1) * SECOND
        both = await remote.set_attributes(b"file", Attributes(atime_ns=3 * SECOND))
        assert (both.atime_ns, both.mtime_ns) == (3 * SECOND, late.mtime_ns)

    on(sshd.site_spec(str(folder)), story)


def test_five_thousand_entries(sshd: SshServer) -> None:
    folder = sshd.root / "many"
    folder.mkdir()
    for number in range(5000):
        (folder / f"{number:05}").touch()

    async def story(remote: SftpRemote) -> None:
        pages = [page async for page in remote.list(b"")]
        assert max(map(len, pages)) <= 1000
        names = [entry.name for page in pages for entry in page]
        assert sorted(names) == [b"%05d" % number for number in range(5000)]
        async for page in remote.list(b""):
            assert page
            break  # a reader that leaves early leaves nothing behind
        assert stat.S_ISREG((await remote.stat(b"00000")).mode)

    on(sshd.site_spec(str(folder)), story)


def test_a_small_directory_is_two_round_trips(
    sshd: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it, then its names with their end; nobody waits for the close."""
    folder = sshd.root / "few"
    folder.mkdir()
    for number in range(90):
        (folder / f"{number}").touch()

    async def story(remote: SftpRemote) -> None:
        meta = (await remote._place(b"")).session.meta
        sent: list[int | bytes] = []
        plain = meta._send_request

        def noted(kind: int | bytes, *more: Any) -> None:
            sent.append(kind)
            plain(kind, *more)

        monkeypatch.setattr(meta, "_send_request", noted)
        assert len(await listed(remote, b"")) == 90
        assert sent == [FXP_OPENDIR, FXP_READDIR, FXP_READDIR, FXP_READDIR, FXP_CLOSE]
        assert meta._requests, "the close is not answered yet"

    on(sshd.site_spec(str(folder)), story)


def test_a_handle_that_comes_too_late_is_closed(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"x")
        bulk = (await remote._place(b"")).session.bulk
        began, may_open = asyncio.Event(), asyncio.Event()

        async def opening() -> bytes:
            began.set()
            await may_open.wait()
            return await bulk.open(b"/file", FXF_READ, SFTPAttrs())

        opened = asyncio.ensure_future(bulk.kept(opening()))
        await began.wait()
        opened.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opened
        may_open.set()
        version = (await remote.stat(b"file")).version
        await remote.fetch(b"file", version, 0, 1, 1)  # behind the open, on its channel
        await remote.fetch(b"file", version, 0, 1, 1)  # behind the close
        assert evil_sftp.Counting.held == 1

    on_evil(tmp_path, evil_sftp.Counting, story)
    assert evil_sftp.Counting.held == 0


def test_a_server_with_one_session_only(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "s", "MaxSessions 1", subsystem=sftp_server_binary()) as server:

        async def story(remote: SftpRemote) -> None:
            await put(remote, b"file", b"x" * 1_000_000)
            assert await get(remote, b"file") == b"x" * 1_000_000

        on(server.site_spec(), story)


def test_a_server_without_sftp(tmp_path: Path) -> None:
    with (
        ssh_server(tmp_path / "s", subsystem=None) as server,
        pytest.raises(WrongSettings, match="no SFTP service"),
    ):
        on(server.site_spec(), lambda remote: remote.connect())


def test_a_server_that_prints_before_sftp(tmp_path: Path) -> None:
    noisy = f"echo Welcome to the cluster; {sftp_server_binary()}"
    with (
        ssh_server(tmp_path / "s", subsystem=noisy) as server,
        pytest.raises(NoService, match=r"\('Welcome to the cluster'\).*bashrc"),
    ):
        on(server.site_spec(), lambda remote: remote.connect())


# --- wicked servers -----------------------------------------------------------------------------


def test_names_that_can_not_be_are_dropped_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(remote: SftpRemote, _: EvilSite) -> None:
        with caplog.at_level(logging.WARNING, "hpcfs"):
            assert set(await listed(remote, b"")) == {b"good", b"twice"}

    on_evil(tmp_path, evil_sftp.EvilNames, story)
    assert [record.message for record in caplog.records] == [
        "/ on cluster (127.0.0.1) lists 7 names that are repeated or can't be shown"
    ]


def test_impossible_sizes_are_listed_as_zero_and_refused_by_stat(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, _: EvilSite) -> None:
        entries = await listed(remote, b"")
        assert entries[b"huge"].size == 0
        assert entries[b"huge"].mtime_ns == (2**32 - 1) * SECOND
        with pytest.raises(ProtocolError, match="impossible size"):
            await remote.stat(b"huge")

    on_evil(tmp_path, evil_sftp.HugeSizes, story)


def test_sizes_that_change_while_reading_are_a_change(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"abc")
        version = (await remote.stat(b"file")).version
        for _ in range(2):
            with pytest.raises(Changed):
                await remote.fetch(b"file", version, 0, 3, 1)
        with pytest.raises(RemoteFailure, match="something else writes"):
            await put(remote, b"file", b"xyz")

    on_evil(tmp_path, evil_sftp.ChangingSizes, story)


def test_missing_attributes_have_defaults(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"abc")
        entry = (await listed(remote, b""))[b"file"]
        assert entry.mode == stat.S_IFREG | 0o644
        assert (entry.size, entry.mtime_ns) == (3, 0)
        assert (entry.uid, entry.gid) == (LOCAL_UID, LOCAL_GID)

    on_evil(tmp_path, evil_sftp.NoAttributes, story)


def test_names_listed_without_attributes_are_looked_at(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        for number in range(150):
            (evil.directory / f"d{number}").mkdir()
        entries = await listed(remote, b"")
        assert len(entries) == 150
        assert all(stat.S_ISDIR(entry.mode) for entry in entries.values())

    on_evil(tmp_path, evil_sftp.NamesWithoutAttributes, story)


@pytest.mark.parametrize(
    "sftp",
    [evil_sftp.NoTypes, evil_sftp.NoTypesAtAll, evil_sftp.NoModes, evil_sftp.ModesWithoutSizes],
)
def test_types_that_the_server_does_not_tell_are_found_out(
    tmp_path: Path, sftp: type[Plain]
) -> None:
    """By the line for humans in a listing, or by trying: a directory taken for a file could be
    neither entered nor removed."""

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "d" / "inner").mkdir(parents=True)
        (evil.directory / "f").write_bytes(b"content")
        (evil.directory / "l").symlink_to("d")
        (evil.directory / "dangling").symlink_to("nowhere")
        types = {b"d": stat.S_IFDIR, b"f": stat.S_IFREG, b"l": stat.S_IFLNK}
        types[b"dangling"] = stat.S_IFLNK
        found = await listed(remote, b"")
        assert {name: stat.S_IFMT(entry.mode) for name, entry in found.items()} == types
        assert found[b"f"].size == len(b"content")
        for name, kind in types.items():
            assert stat.S_IFMT((await remote.stat(name)).mode) == kind
        assert stat.S_ISDIR((await remote.make_directory(b"new", 0o700)).mode)
        assert stat.S_ISLNK((await remote.make_symlink(b"link", b"f")).mode)
        changed = await remote.set_attributes(b"d", Attributes(mtime_ns=5 * SECOND))
        assert stat.S_ISDIR(changed.mode)
        await put(remote, b"f", b"other", base_version=(await remote.stat(b"f")).version)
        assert await get(remote, b"f") == b"other"
        with pytest.raises(IsADirectory):
            await put(remote, b"d", b"x")
        with pytest.raises(DirectoryNotEmpty):
            await remote.remove_directory(b"d")
        await remote.remove_directory(b"d/inner")
        await remote.remove_directory(b"d")
        await remote.remove(b"l")

    on_evil(tmp_path, sftp, story)


def test_short_reads_are_continued(tmp_path: Path) -> None:
    data = os.urandom(70_000)

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(data)
        assert await get(remote, b"file") == data

    on_evil(tmp_path, evil_sftp.ShortReads, story)


def test_a_file_that_ends_early_is_a_change(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(bytes(100_000))
        with pytest.raises(Changed):
            await get(remote, b"file")

    on_evil(tmp_path, evil_sftp.EarlyEnd, story)


def test_more_bytes_than_asked_for_are_not_taken(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(bytes(100))
        with pytest.raises(ProtocolError):
            await get(remote, b"file")

    on_evil(tmp_path, evil_sftp.Endless, story)


def test_a_silent_read_delays_no_stat_and_can_be_given_up(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        evil_sftp.Silent.asked = asyncio.Event()
        evil_sftp.Silent.released = asyncio.Event()
        (evil.directory / "file").write_bytes(bytes(100))
        version = (await remote.stat(b"file")).version
        fetch = asyncio.ensure_future(remote.fetch(b"file", version, 0, 100, 1))
        await evil_sftp.Silent.asked.wait()
        assert (await remote.stat(b"file")).size == 100
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        place = await remote._place(b"")
        assert place.session.reading.under_way == 0, "what was given up takes no room"
        evil_sftp.Silent.released.set()

    on_evil(tmp_path, evil_sftp.Silent, story)


def test_a_full_disk_is_told_from_other_failures(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, _: EvilSite) -> None:
        with pytest.raises(NoSpace, match="full"):
            await put(remote, b"file", b"x" * 100)

    on_evil(tmp_path / "full", evil_sftp.FullDisk, story)

    async def other(remote: SftpRemote, _: EvilSite) -> None:
        with pytest.raises(RemoteFailure, match="quota"):
            await put(remote, b"file", b"x" * 10_000_000)

    on_evil(tmp_path / "broken", evil_sftp.BrokenDisk, other)


def test_a_read_only_file_is_uploaded_and_stays_read_only(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await remote.create(b"object", 0o444)
        entry = await put(remote, b"object", b"git", mode=0o444)
        assert stat.S_IMODE(entry.mode) == 0o444
        assert (evil.directory / "object").read_bytes() == b"git"
        assert stat.S_IMODE((evil.directory / "object").stat().st_mode) == 0o444

    on_evil(tmp_path, evil_sftp.NotRoot, story)


def test_a_refused_listing_is_a_permission_error(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, _: EvilSite) -> None:
        with pytest.raises(PermissionDenied):
            await listed(remote, b"")

    on_evil(tmp_path, evil_sftp.NoLooking, story)


def test_a_disk_without_end_has_one(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, _: EvilSite) -> None:
        usage = await remote.disk_usage()
        assert usage is not None
        assert (usage.total, usage.available, usage.files) == (2**63 - 1,) * 3

    on_evil(tmp_path, evil_sftp.EndlessDisk, story)


# --- servers without extensions -----------------------------------------------------------------


def test_everything_needed_works_without_extensions(tmp_path: Path) -> None:
    data = os.urandom(300_000)

    async def story(remote: SftpRemote, _: EvilSite) -> None:
        place = await remote._place(b"")
        assert place.session.read_bytes == 32 * 1024
        await put(remote, b"file", data, sync=True)
        assert await get(remote, b"file") == data
        assert await remote.disk_usage() is None
        with pytest.raises(NotSupported):
            await remote.make_link(b"file", b"other")
        await remote.make_symlink(b"link", b"file")
        assert await remote.read_link(b"link") == b"file"
        with pytest.raises(NotSupported):
            await remote.set_attributes(b"link", Attributes(mtime_ns=0))

    on_evil(tmp_path, Plain, story, EXTENSIONS)


def test_between_file_systems_nothing_is_renamed_or_linked(sshd: SshServer, tmp_path: Path) -> None:
    """OpenSSH says no more than "Failure"."""
    with TemporaryDirectory(dir="/dev/shm") as memory:
        there = Path(memory)
        assert there.stat().st_dev != tmp_path.stat().st_dev
        (tmp_path / "file").write_bytes(b"content")
        (there / "taken").touch()
        source = os.fsencode(tmp_path / "file")[1:]

        async def story(remote: SftpRemote) -> None:
            for name, replace in (("new", True), ("new", False), ("taken", True)):
                with pytest.raises(CrossDevice, match="different file systems"):
                    await remote.rename(source, os.fsencode(there / name)[1:], replace=replace)
            with pytest.raises(CrossDevice, match="different file systems"):
                await remote.make_link(source, os.fsencode(there / "new")[1:])
            await remote.rename(source, source + b"2", replace=True)
            with pytest.raises(AlreadyExists):
                await remote.make_link(source + b"2", source + b"2")

        on(sshd.site_spec("/"), story)
        assert os.listdir(there) == ["taken"]


def test_rename_over_something_without_posix_rename(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await put(remote, b"new", b"NEW")
        await put(remote, b"old", b"OLD")
        await remote.rename(b"new", b"old", replace=True)
        assert await get(remote, b"old") == b"NEW"
        await remote.rename(b"old", b"old", replace=True)
        await remote.rename(b"old", b"fresh", replace=True)
        await remote.make_directory(b"d", 0o755)
        await remote.make_directory(b"e", 0o755)
        await remote.rename(b"d", b"e", replace=True)
        await put(remote, b"e/file", b"x")
        await remote.make_directory(b"f", 0o755)
        with pytest.raises(DirectoryNotEmpty):
            await remote.rename(b"f", b"e", replace=True)
        with pytest.raises(IsADirectory):
            await remote.rename(b"fresh", b"e", replace=True)
        with pytest.raises(NotFound):
            await remote.rename(b"missing", b"fresh", replace=True)
        assert sorted(os.listdir(evil.directory)) == ["e", "f", "fresh"], "nothing left aside"

    on_evil(tmp_path, Plain, story, EXTENSIONS)


def test_a_rename_that_fails_half_way_puts_the_target_back(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await put(remote, b"new", b"NEW")
        (evil.directory / "bad").write_bytes(b"OLD")
        with pytest.raises(RemoteFailure):
            await remote.rename(b"new", b"bad", replace=True)
        assert {path.name: path.read_bytes() for path in evil.directory.iterdir()} == {
            "new": b"NEW",
            "bad": b"OLD",
        }

    on_evil(tmp_path, evil_sftp.RenameRefused, story, EXTENSIONS)


# --- long paths -----------------------------------------------------------------------------------


def deep_path(length: int) -> list[bytes]:
    """All directories on the way, and an entry's path of that many bytes."""
    names, left = [], length
    while left > 200:
        names.append(b"d" * 99)
        left -= 100
    names.append(b"f" * left)
    return [b"/".join(names[: count + 1]) for count in range(len(names))]


def test_paths_that_are_longer_than_the_server_takes(sshd: SshServer) -> None:
    """As long as programs may name below the folder, whose own path comes before them."""
    folder = sshd.root / "long"
    folder.mkdir()
    *above, path = deep_path(4095)
    parent = above[-1]

    async def story(remote: SftpRemote) -> None:
        for directory in above:
            await remote.make_directory(directory, 0o755)
        await remote.create(path, 0o644, 1)
        entry = await put(remote, path, b"content", handle=1)
        assert (entry.name, entry.size) == (path[len(parent) + 1 :], 7)
        assert await get(remote, path) == b"content"
        await put(remote, path, b"replaced", replace=True)
        await remote.set_attributes(path, Attributes(mode=0o600))
        assert stat.S_IMODE((await remote.truncate(path, 3)).mode) == 0o600
        with pytest.raises(AlreadyExists):
            await remote.create(path, 0o644)
        await remote.rename(path, b"short", replace=True)
        assert (folder / "short").read_bytes() == b"rep"
        await remote.make_link(b"short", path)
        await remote.rename(path, path[:-1] + b"x", replace=True)
        await remote.make_symlink(path, b"target")
        assert await remote.read_link(path) == b"target"
        assert set(await listed(remote, parent)) == {b"f" * 194 + end for end in (b"f", b"x")}
        with pytest.raises(NotFound):
            await remote.stat(path[:-1] + b"y")
        for name in (path, path[:-1] + b"x"):
            await remote.remove(name)
        for directory in reversed(above):
            await remote.remove_directory(directory)
        assert os.listdir(folder) == ["short"]

    on(sshd.site_spec(str(folder)), story)


def test_a_long_path_leads_nowhere_else_after_a_rename(sshd: SshServer) -> None:
    folder = sshd.root / "renamed"
    folder.mkdir()
    *above, path = deep_path(4095)

    async def story(remote: SftpRemote) -> None:
        for directory in above:
            await remote.make_directory(directory, 0o755)
        await put(remote, path, b"content")
        await remote.rename(above[0], b"other", replace=True)
        with pytest.raises(NotFound):
            await remote.stat(path)
        moved = b"other" + path[len(above[0]) :]
        assert await get(remote, moved) == b"content"

    on(sshd.site_spec(str(folder)), story)


def test_a_path_that_no_server_takes_is_too_long(sshd: SshServer) -> None:
    async def story(remote: SftpRemote) -> None:
        with pytest.raises(NameTooLong):
            await remote.stat(b"d/" * 8000)

    on(sshd.site_spec(), story)


def test_where_descriptors_have_no_names_long_paths_are_too_long(tmp_path: Path) -> None:
    """A path that the server takes itself is not: not even where what is below it may be."""

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        *above, path = deep_path(4090)
        for directory in above:
            await remote.make_directory(directory, 0o755)
        await put(remote, path[:3850], b"content")
        assert await get(remote, path[:3850]) == b"content"
        assert list(await listed(remote, above[-1])) == []
        with pytest.raises(NameTooLong):
            await remote.stat(path + b"/longer")

    on_evil(tmp_path, Plain, story)
