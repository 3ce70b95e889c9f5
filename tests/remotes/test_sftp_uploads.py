"""SFTP uploads: their round trips, what they stand on, what is left when they fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import asyncssh
import msgspec
import pytest
from asyncssh import SFTPAttrs
from asyncssh.constants import FXP_CLOSE, FXP_OPEN

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import (
    AlreadyExists,
    Conflict,
    InvalidRequest,
    NoSpace,
    PiecesLost,
    RemoteError,
    RemoteFailure,
    Unreachable,
)
from hpcfs.model.sites import SftpRoot, SiteSpec
from hpcfs.model.uploads import PIECE_BYTES, UploadRequest
from hpcfs.remotes.sftp.hashes import Hasher
from hpcfs.remotes.sftp.opening import NEW
from hpcfs.remotes.sftp.parallel_channels import WIDE_BYTES
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.sftp.streaming_upload import MAX_STREAMS
from hpcfs.remotes.sftp.uploads import SftpUploads
from hpcfs.remotes.sftp.write import WritableFile, write_ranges
from tests.remotes.contract import MemorySource, get, put, put_ahead
from tests.remotes.test_sftp import EXTENSIONS, on, on_evil
from tests.support import evil_sftp
from tests.support.evil_sftp import EvilSite, Plain
from tests.support.link import Link, link_to, ssh_config_through
from tests.support.roundtrips import counting
from tests.support.sshd import ScriptedPrompter, SshServer, ssh_server

TIMES = Attributes(atime_ns=10**18, mtime_ns=10**18)
LATER = Attributes(atime_ns=2 * 10**18, mtime_ns=2 * 10**18)
Story = Callable[[SftpRemote, Path], Awaitable[None]]


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def on_folder(sshd: SshServer, story: Story, transport: str = "asyncssh") -> None:
    folder = sshd.root / f"uploads-{random.getrandbits(64):x}"
    folder.mkdir()
    spec = sshd.site_spec(str(folder), sshd.site(transport=transport))
    on(spec, lambda remote: story(remote, folder))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - between two turns of the loop there is no event
            await asyncio.sleep(0)


async def held_open(remote: SftpRemote) -> int:
    return len(remote._uploads._streams)


# --- round trips --------------------------------------------------------------------------------


def test_round_trips(sshd: SshServer) -> None:
    """Each number is what a program waits for at 20 ms: they must not grow."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "old").write_bytes(b"x")
        version = (await remote.stat(b"old")).version
        session = (await remote._place(b"")).session

        async def trips(request: Awaitable[object]) -> int:
            counter.restart()
            await request
            return counter.reached

        with counting(session) as counter:
            assert await trips(remote.create(b"held", 0o644, 1)) == 1
            assert await trips(put(remote, b"held", b"x", attributes=TIMES, handle=1)) == 1
            assert await trips(remote.create(b"synced", 0o644, 1)) == 1
            assert await trips(put(remote, b"synced", b"x", sync=True, handle=1)) == 1
            assert await trips(put(remote, b"new", b"x", attributes=TIMES, base_version=b"")) == 2
            assert await trips(put(remote, b"old", b"y", base_version=version)) == 2
            assert await trips(put(remote, b"old", b"yz", ranges=[(1, 1)], base_size=1)) == 2
            assert await trips(put(remote, b"old", content(10**6))) == 2
            assert await trips(put(remote, b"old", b"z", attributes=TIMES, replace=True)) == 3
            assert await trips(remote.create(b"unheld", 0o644)) == 2
            assert await trips(remote.make_directory(b"d", 0o755)) == 1
            assert await trips(remote.make_symlink(b"l", b"old")) == 2  # the order is looked for
            assert await trips(remote.make_symlink(b"l2", b"old")) == 1
            assert await trips(remote.make_link(b"old", b"hard")) == 1
            assert await trips(remote.set_attributes(b"old", Attributes(mode=0o600))) == 1
            assert await trips(remote.set_attributes(b"old", TIMES)) == 1
            assert await trips(remote.set_attributes(b"l", TIMES)) == 1
            assert await trips(remote.rename(b"old", b"new", replace=True)) == 1
            assert await trips(remote.remove(b"new")) == 1
            assert await trips(remote.remove_directory(b"d")) == 1
            large = content(5 * 1024 * 1024)
            assert await trips(remote.create(b"large", 0o644, 1)) == 1
            assert await trips(put(remote, b"large", large, handle=1)) <= 3

    on_folder(sshd, story)


def test_many_small_files_wait_for_nobody(sshd: SshServer) -> None:
    """32 at once are as many round trips as one."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        async def one(number: int) -> None:
            name = b"%d" % number
            await remote.create(name, 0o644, number)
            await put(remote, name, name * 100, attributes=TIMES, base_version=b"", handle=number)

        session = (await remote._place(b"")).session
        with counting(session) as counter:
            await asyncio.gather(*(one(number) for number in range(1, 33)))
            assert counter.reached == 2
        for number in range(1, 33):
            assert (folder / str(number)).read_bytes() == b"%d" % number * 100

    on_folder(sshd, story)


def test_a_small_file_overtakes_large_ones(sshd: SshServer) -> None:
    """It is sent while the server has not answered to any of what is under way."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        await remote.create(b"small", 0o644, 1)
        session = (await remote._place(b"")).session
        unheard: list[bytes] = []
        bulk = session.bulk
        target = WritableFile(await remote._place(b"large"), await opened(folder, remote))
        with mock.patch.object(bulk, "message", unheard.append):
            source = MemorySource(content(48 * 1024 * 1024))
            ranges = [(0, source.size)]
            large = asyncio.ensure_future(
                write_ranges(target, ranges, source, lambda done: None, wide=False)
            )
            await until(lambda: session.writing.is_awaited)
            small = asyncio.ensure_future(put(remote, b"small", b"x", handle=1))
            await until((folder / "small").read_bytes)
        for answer in unheard:
            bulk.message(answer)
        await small
        assert not large.done()
        await large

    on_folder(sshd, story)


async def opened(folder: Path, remote: SftpRemote) -> bytes:
    """A remote handle of a new file "large"."""
    session = (await remote._place(b"")).session
    return await session.bulk.open(os.fsencode(folder / "large"), NEW, SFTPAttrs())


def test_large_files_take_turns(sshd: SshServer) -> None:
    """The second has not to wait until the first is done."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        body = content(64 * 1024 * 1024)
        session = (await remote._place(b"")).session
        session.open_channel = None  # over one channel it takes long enough
        first = asyncio.ensure_future(put(remote, b"first", body))
        await until(lambda: session.writing.is_awaited)
        progress: list[int] = []
        second = asyncio.ensure_future(put(remote, b"second", body, progress=progress))
        await until(lambda: bool(progress))
        assert not first.done()
        await asyncio.gather(first, second)

    on_folder(sshd, story)


# --- several channels to one file -----------------------------------------------------------


async def bytes_by_channel(session: SftpSession, upload: Awaitable[object]) -> list[int]:
    """How much of it went over which channel, those for small requests first."""
    channels = [*session.channels, *await session.more_channels()]
    counts = [0] * len(channels)

    def counted(number: int, write: Callable[..., Any]) -> Callable[..., Any]:
        def count(handle: bytes, offset: int, data: bytes) -> Any:
            counts[number] += len(data)
            return write(handle, offset, data)

        return count

    with contextlib.ExitStack() as stack:
        for number, channel in enumerate(channels):
            patch = mock.patch.object(channel, "write", counted(number, channel.write))
            stack.enter_context(patch)
        await upload
    return counts


def test_a_large_file_goes_over_several_channels(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        body = content(3 * WIDE_BYTES + 7)
        session = (await remote._place(b"")).session
        counts = await bytes_by_channel(session, put(remote, b"f", body, attributes=TIMES))
        assert (folder / "f").read_bytes() == body
        assert (folder / "f").stat().st_mtime == 10**9
        assert counts[0] == 0
        assert sum(counts) == len(body)
        assert all(counts[1:])
        over = content(3 * WIDE_BYTES, seed=2)
        upload = put(remote, b"f", over + body[-7:], ranges=[(0, len(over))], base_size=len(body))
        counts = await bytes_by_channel(session, upload)
        assert counts == [0, len(over), 0, 0], "what is written over old content keeps its order"
        assert (folder / "f").read_bytes() == over + body[-7:]

    on_folder(sshd, story)


def test_a_file_that_lost_its_name_is_written_over_one_channel(sshd: SshServer) -> None:
    """Its name is somebody else's file by the time at which it is opened once more."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        body = content(2 * WIDE_BYTES)
        session = (await remote._place(b"")).session
        channels = await session.more_channels()

        async def swap() -> list[Any]:
            (folder / "f").rename(folder / "ours")
            (folder / "f").write_bytes(b"theirs")
            return channels

        with mock.patch.object(session, "more_channels", swap):
            await put(remote, b"f", body)
        assert (folder / "f").read_bytes() == b"theirs"
        assert (folder / "ours").read_bytes() == body

    on_folder(sshd, story)


def test_a_server_that_grants_no_more_channels_is_written_to_all_the_same(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        body = content(2 * WIDE_BYTES)
        await put(remote, b"f", body)
        assert (folder / "f").read_bytes() == body

    with ssh_server(tmp_path / "server", "MaxSessions 2") as server:
        on_folder(server, story)


# --- what an upload stands on -------------------------------------------------------------------


async def lose(remote: SftpRemote, kind: int, upload: Awaitable[object]) -> None:
    """Carry out an upload whose connection ends once the server has treated this request, and
    before the answer is heard."""
    session = (await remote._place(b"")).session
    bulk = session.bulk
    send, message = bulk._send_request, bulk.message
    numbers: set[int] = set()
    answered = asyncio.Event()

    def noted(sent: int | bytes, *more: Any) -> None:
        if sent == kind:
            numbers.add(bulk._next_pktid)
        send(sent, *more)

    def unheard(answer: bytes) -> None:
        if int.from_bytes(answer[1:5], "big") in numbers:
            answered.set()
        if not answered.is_set():
            message(answer)

    with (
        mock.patch.object(bulk, "_send_request", noted),
        mock.patch.object(bulk, "message", unheard),
    ):
        running = asyncio.ensure_future(upload)
        await answered.wait()
        await session.close()
        with pytest.raises(Unreachable):
            await running


def test_an_upload_whose_answer_was_lost_is_no_conflict(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        def again(body: bytes, attributes: Attributes = TIMES) -> Awaitable[object]:
            return put(remote, b"file", body, base_version=b"", attributes=attributes)

        await lose(remote, FXP_CLOSE, again(b"content"))
        assert (folder / "file").read_bytes() == b"content"
        await again(b"content")
        (folder / "file").unlink()

        await lose(remote, FXP_OPEN, again(b"content"))
        assert (folder / "file").read_bytes() == b""
        await again(b"content")
        assert (folder / "file").read_bytes() == b"content"

        (folder / "file").write_bytes(b"of somebody else")
        with pytest.raises(Conflict, match="made by somebody else"):
            await again(b"content")
        assert (folder / "file").read_bytes() == b"of somebody else"

    on_folder(sshd, story)


def test_content_changed_between_two_attempts(sshd: SshServer) -> None:
    """The first attempt is remembered here, so that it is recognised."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "file").write_bytes(b"original")
        version = (await remote.stat(b"file")).version
        first = put(remote, b"file", b"first attempt", base_version=version, attributes=TIMES)
        await lose(remote, FXP_CLOSE, first)
        assert (folder / "file").read_bytes() == b"first attempt"
        await put(remote, b"file", b"changed since", base_version=version, attributes=LATER)
        assert (folder / "file").read_bytes() == b"changed since"
        with pytest.raises(Conflict):
            await put(remote, b"file", b"whatever", base_version=version, attributes=TIMES)

    on_folder(sshd, story)


@pytest.mark.parametrize("there", [0, 1, 1000, 2_000_000, 3_000_000])
def test_a_half_done_upload_goes_on_in_a_new_process(sshd: SshServer, there: int) -> None:
    """What another process had sent of it by the time it was killed is in the file."""
    body = content(3_000_000)

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "file").write_bytes(body[:there])
        await put(remote, b"file", body, base_version=b"12:34", attributes=TIMES)
        assert (folder / "file").read_bytes() == body

    on_folder(sshd, story)


def test_a_half_done_append_goes_on_in_a_new_process(sshd: SshServer) -> None:
    old, tail = content(1000), content(2_000_000, 2)

    async def story(remote: SftpRemote, folder: Path) -> None:
        async def append(there: bytes) -> None:
            (folder / "log").write_bytes(old + there)
            ranges = [(len(old), len(tail))]
            await put(
                remote, b"log", old + tail, ranges=ranges, base_size=1000, base_version=b"1000:7"
            )
            assert (folder / "log").read_bytes() == old + tail

        await append(tail)
        await append(tail[:300])
        await append(tail[:1_000_000])
        with pytest.raises(Conflict, match="changed by somebody else"):
            await append(b"somebody else's line\n")
        assert (folder / "log").read_bytes() == old + b"somebody else's line\n"
        with pytest.raises(Conflict):
            await append(tail + b"and somebody else's line\n")
        with pytest.raises(Conflict):
            await append(b"")

    on_folder(sshd, story)


def test_changes_of_others_within_the_old_content_are_a_conflict(sshd: SshServer) -> None:
    """Even where they left alone what was to be written first."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        mine = b"same head" + content(100_000)
        theirs = b"same head" + content(100_000, 2)
        (folder / "db").write_bytes(theirs)
        size = len(mine)
        with pytest.raises(Conflict):
            await put(remote, b"db", mine, base_size=size, base_version=b"%d:7" % size)
        assert (folder / "db").read_bytes() == theirs

    on_folder(sshd, story)


def test_what_is_no_file_is_not_uploaded_to(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "target").write_bytes(b"precious")
        (folder / "link").symlink_to("target")
        for base in (b"8:1", b""):
            with pytest.raises(Conflict):
                await put(remote, b"link", b"x", base_version=base)
        with pytest.raises(InvalidRequest):
            await put(remote, b"link", b"x")
        with pytest.raises(Conflict, match="removed"):
            await put(remote, b"gone", b"x", base_version=b"8:1")
        assert (folder / "target").read_bytes() == b"precious"
        assert sorted(os.listdir(folder)) == ["link", "target"]

    on_folder(sshd, story)


def test_a_half_done_overwriting_is_recognised_by_who_began_it(sshd: SshServer) -> None:
    old, new = content(1_000_000), content(1_000_000, 2)

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "db").write_bytes(old)
        os.utime(folder / "db", (5, 5))
        version = (await remote.stat(b"db")).version

        def overwrite(to: SftpRemote) -> Awaitable[object]:
            return put(to, b"db", new, base_size=len(new), base_version=version, attributes=TIMES)

        await lose(remote, FXP_CLOSE, overwrite(remote))
        (folder / "db").write_bytes(new[:500_000] + old[500_000:])  # had it been cut short there
        stranger = SshSiteConnection(sshd.site_spec(str(folder)), ScriptedPrompter())
        with pytest.raises(Conflict):
            await overwrite(stranger.remote("ns"))
        await stranger.close()
        await overwrite(remote)
        assert (folder / "db").read_bytes() == new

    on_folder(sshd, story)


# --- files held open ----------------------------------------------------------------------------


def test_a_created_file_survives_the_loss_of_its_connection(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await remote.create(b"file", 0o640, 1)
        await (await remote._place(b"")).session.close()
        await put(remote, b"file", b"content", base_version=b"", handle=1)
        assert (folder / "file").read_bytes() == b"content"
        await remote.create(b"other", 0o640, 2)
        await (await remote._place(b"")).session.close()
        (folder / "other").write_bytes(b"somebody else writes to it")
        with pytest.raises(Conflict):
            await put(remote, b"other", b"content", base_version=b"", handle=2)

    on_folder(sshd, story)


def test_a_created_file_is_ours_whatever_its_name_is_by_now(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await remote.create(b"temporary", 0o640, 1)
        await remote.rename(b"temporary", b"final", replace=True)
        entry = await put(remote, b"final", b"content", base_version=b"", handle=1)
        assert entry.name == b"final"
        assert (folder / "final").read_bytes() == b"content"
        await remote.create(b"removed", 0o640, 2)
        await remote.remove(b"removed")
        await remote.release(2)
        assert os.listdir(folder) == ["final"]

    on_folder(sshd, story)


def test_held_files_are_bounded_and_closed(tmp_path: Path) -> None:
    many = range(1, MAX_STREAMS + 21)

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        for handle in many:
            await remote.create(b"%d" % handle, 0o644, handle)
        await settle(remote)
        assert evil_sftp.Counting.held == MAX_STREAMS
        for handle in many:
            name = b"%d" % handle
            await put(remote, name, name, base_version=b"", handle=handle)
            assert (evil.directory / os.fsdecode(name)).read_bytes() == name
        await settle(remote)
        assert evil_sftp.Counting.held == 0
        await remote.create(b"released", 0o644, 1)
        await remote.release(1)
        await settle(remote)
        assert evil_sftp.Counting.held == 0

    on_evil(tmp_path, evil_sftp.Counting, story)


async def settle(remote: SftpRemote) -> None:
    """Return once the server is through with what was sent."""
    session = (await remote._place(b"")).session
    await session.bulk.realpath(b".")


@pytest.mark.parametrize("size", [10, 30_000_000])
def test_an_upload_given_up_closes_its_file(tmp_path: Path, size: int) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        session = (await remote._place(b"")).session
        for kind in ("opened", "held", "replaced"):
            handle = 1 if kind == "held" else 0
            if handle:
                await remote.create(b"held", 0o644, handle)
            upload = asyncio.ensure_future(
                put(remote, kind.encode(), content(size), handle=handle, replace=kind == "replaced")
            )
            await until(lambda: bool(session.writing.under_way))
            upload.cancel()
            with pytest.raises(asyncio.CancelledError):
                await upload
            assert session.writing.under_way == 0
            await settle(remote)
            assert evil_sftp.Counting.held == 0
        assert not [name for name in os.listdir(evil.directory) if ".hpcfs-" in name]

    on_evil(tmp_path, evil_sftp.Counting, story)


def test_an_upload_given_up_ends_when_nothing_is_written_any_more(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await remote.create(b"file", 0o644, 1)
        bulk = (await remote._place(b"")).session.bulk
        unheard: list[bytes] = []
        with mock.patch.object(bulk, "message", unheard.append):
            upload = asyncio.ensure_future(put(remote, b"file", b"x", handle=1))
            await until((folder / "file").read_bytes)
            upload.cancel()
            done, _ = await asyncio.wait([upload], timeout=0.1)
            assert not done
        for answer in unheard:
            bulk.message(answer)
        with pytest.raises(asyncio.CancelledError):
            await upload

    on_folder(sshd, story)


# --- sent ahead ---------------------------------------------------------------------------------


def test_a_file_is_sent_ahead(sshd: SshServer) -> None:
    body = content(3 * PIECE_BYTES + 12345)

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "file").write_bytes(b"old" * 100)
        version = (await remote.stat(b"file")).version
        with pytest.raises(Conflict):
            await put_ahead(remote, b"file", body, 0, 1, base_version=b"12:34")
        assert (folder / "file").read_bytes() == b"old" * 100
        await asyncio.gather(
            *(put_ahead(remote, b"file", body, n, 2, base_version=version) for n in (1, 0, 2))
        )
        tail = [(3 * PIECE_BYTES, 12345)]
        entry = await put(
            remote, b"file", body, ranges=tail, attributes=TIMES, base_version=version, handle=2
        )
        assert (entry.size, entry.mtime_ns) == (len(body), 10**18)
        assert (folder / "file").read_bytes() == body
        assert await held_open(remote) == 0

    on_folder(sshd, story)


def test_a_created_file_is_sent_ahead_and_written_over(sshd: SshServer) -> None:
    body = bytearray(content(PIECE_BYTES + 10))

    async def story(remote: SftpRemote, folder: Path) -> None:
        await remote.create(b"file", 0o604, 1)
        await put_ahead(remote, b"file", bytes(body), 0, 1, base_version=b"")
        body[100:103] = b"new"
        ranges = [(PIECE_BYTES, 10), (100, 3)]
        entry = await put(
            remote, b"file", bytes(body), ranges=ranges, base_version=b"", handle=1, replace=True
        )
        assert stat.S_IMODE(entry.mode) == 0o604
        assert (folder / "file").read_bytes() == body
        assert os.listdir(folder) == ["file"]

    on_folder(sshd, story)


def test_what_was_sent_ahead_is_lost_with_its_connection(sshd: SshServer) -> None:
    body = content(2 * PIECE_BYTES)

    async def story(remote: SftpRemote, folder: Path) -> None:
        async def begin(handle: int) -> None:
            await put_ahead(remote, b"file", body, 0, handle, base_version=b"")
            await (await remote._place(b"")).session.close()

        rest = [(PIECE_BYTES, PIECE_BYTES)]
        await begin(1)
        with pytest.raises(PiecesLost):
            await put_ahead(remote, b"file", body, 1, 1, base_version=b"")
        await begin(1)
        with pytest.raises(PiecesLost):
            await put(remote, b"file", body, ranges=rest, base_version=b"", handle=1)
        await put(remote, b"file", body, base_version=b"", handle=1)
        assert (folder / "file").read_bytes() == body
        await put_ahead(remote, b"file", body, 1, 3)
        await (await remote._place(b"")).session.close()
        with pytest.raises(PiecesLost):
            await put_ahead(remote, b"file", body, 0, 3)

    on_folder(sshd, story)


def test_what_was_sent_ahead_by_a_killed_process_is_lost(sshd: SshServer) -> None:
    """Nothing is known of the handle in the new process: bytes that it lacks are never made up."""
    body = content(2 * PIECE_BYTES)
    rest = [(PIECE_BYTES, PIECE_BYTES)]

    async def story(_: SftpRemote, folder: Path) -> None:
        spec = sshd.site_spec(str(folder))

        async def on_new(story: Callable[[SftpRemote], Awaitable[None]]) -> None:
            site = SshSiteConnection(spec, ScriptedPrompter())
            try:
                await story(site.remote("ns"))
            finally:
                await site.close()

        async def first(remote: SftpRemote) -> None:
            await put_ahead(remote, b"file", body, 0, 1, base_version=b"")

        async def second(remote: SftpRemote) -> None:
            with pytest.raises(PiecesLost):
                await put_ahead(remote, b"file", body, 1, 1, base_version=b"")
            await put_ahead(remote, b"file", body, 0, 1, base_version=b"")

        async def third(remote: SftpRemote) -> None:
            with pytest.raises(PiecesLost):
                await put(remote, b"file", body, ranges=rest, base_version=b"", handle=1)
            await put(remote, b"file", body, base_version=b"", handle=1)

        for one in (first, second, third):
            await on_new(one)
        assert (folder / "file").read_bytes() == body

    on_folder(sshd, story)


def test_an_upload_that_failed_takes_what_was_sent_ahead_with_it(tmp_path: Path) -> None:
    """Its file is closed: under the same handle nothing counts as sent any more."""
    body = content(PIECE_BYTES + 10)

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await remote.create(b"file", 0o644, 1)
        await put_ahead(remote, b"file", body, 0, 1)
        tail = [(PIECE_BYTES, 10)]
        with pytest.raises(RemoteFailure):
            await put(remote, b"file", body, ranges=tail, attributes=TIMES, handle=1)
        Broken.times = False
        with pytest.raises(PiecesLost):
            await put(remote, b"file", body, ranges=tail, attributes=TIMES, handle=1)
        await put(remote, b"file", body, attributes=TIMES, handle=1)
        assert (evil.directory / "file").read_bytes() == body

    Broken.times = True
    on_evil(tmp_path, Broken, story)


class Broken(Plain):
    """No times can be set for a while."""

    times = True

    def fsetstat(self, file_obj: Any, attrs: SFTPAttrs) -> Any:
        if Broken.times and attrs.mtime is not None:
            raise asyncssh.SFTPFailure("Failure")
        return super().fsetstat(file_obj, attrs)


# --- replacing ----------------------------------------------------------------------------------


def test_nobody_sees_a_part_of_a_file_that_is_replaced(sshd: SshServer) -> None:
    old, new = content(4_000_000), content(4_000_000, 2)

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "file").write_bytes(old)
        upload = asyncio.ensure_future(put(remote, b"file", new, replace=True, mode=0o604))
        seen = set()
        while not upload.done():
            seen.add((folder / "file").read_bytes())
            seen.add(b"".join(sorted(os.fsencode(n) for n in os.listdir(folder)))[:1])
            await asyncio.sleep(0)
        await upload
        assert seen - {b".", b"f"} <= {old, new}
        assert b"." in seen, "it came under another name"
        assert (folder / "file").read_bytes() == new
        assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o604
        with pytest.raises(InvalidRequest):
            await put(remote, b"file", new, base_size=1, replace=True)

    on_folder(sshd, story)


@pytest.mark.parametrize("without", [(), EXTENSIONS])
def test_a_replacement_that_fails_leaves_nothing(
    tmp_path: Path, without: tuple[bytes, ...]
) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        longest = b"n" * 255
        (evil.directory / os.fsdecode(longest)).write_bytes(b"old")
        with pytest.raises((NoSpace, RemoteFailure)):
            await put(remote, longest, b"new", replace=True)
        with pytest.raises(Conflict):
            await put(remote, longest, b"new", replace=True, base_version=b"")
        assert [(p.name, p.read_bytes()) for p in evil.directory.iterdir()] == [("n" * 255, b"old")]

    on_evil(tmp_path, evil_sftp.FullDisk, story, without)


@pytest.mark.parametrize("without", [(), EXTENSIONS])
def test_replacing_with_and_without_extensions(tmp_path: Path, without: tuple[bytes, ...]) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await put(remote, b"file", b"one", replace=True, base_version=b"")
        version = (await remote.stat(b"file")).version
        await put(remote, b"file", b"two", replace=True, base_version=version)
        assert [(p.name, p.read_bytes()) for p in evil.directory.iterdir()] == [("file", b"two")]

    on_evil(tmp_path, Plain, story, without)


def test_a_temporary_file_of_a_lost_connection_goes_with_the_next_upload(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await lose(remote, FXP_CLOSE, put(remote, b"file", b"new", replace=True))
        (left,) = os.listdir(folder)
        assert left.startswith(".file.hpcfs-")
        await put(remote, b"file", b"new", replace=True)
        assert os.listdir(folder) == ["file"]

    on_folder(sshd, story)


def test_a_temporary_file_of_a_killed_process_goes_with_the_next_attempt(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await lose(remote, FXP_CLOSE, put(remote, b"file", b"new", replace=True))
        (left,) = os.listdir(folder)
        assert left.startswith(".file.hpcfs-")
        remote._uploads = SftpUploads()  # knows what a new process knows
        await put(remote, b"file", b"new", replace=True)
        assert os.listdir(folder) == ["file"]

    on_folder(sshd, story)


# --- failures -----------------------------------------------------------------------------------


class NoTimes(Plain):
    """As for a file of somebody else's that the group may write to."""

    def fsetstat(self, file_obj: Any, attrs: SFTPAttrs) -> Any:
        if attrs.mtime is not None:
            raise asyncssh.SFTPPermissionDenied("Permission denied")
        return super().fsetstat(file_obj, attrs)


def test_somebody_elses_file_can_be_written_to(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"old")
        entry = await put(remote, b"file", b"new", attributes=TIMES)
        assert entry.mtime_ns > 10**18, "the server's time"
        assert (evil.directory / "file").read_bytes() == b"new"
        with pytest.raises(RemoteError):
            await put(remote, b"file", b"new", attributes=Attributes(mode=0o600, mtime_ns=10**18))

    on_evil(tmp_path, NoTimes, story)


def test_a_failed_upload_does_not_look_like_the_version_it_was_to_be(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        for handle in (0, 1):
            name = b"file%d" % handle
            if handle:
                await remote.create(name, 0o644, handle)
            with pytest.raises(NoSpace):
                await put(remote, name, b"x" * 100, attributes=TIMES, handle=handle)
            assert (await remote.stat(name)).mtime_ns > 10**18

    on_evil(tmp_path, evil_sftp.FullDisk, story)


class LateFull(evil_sftp.FullDisk):
    """Network file systems may tell of a full disk only when a file is closed."""

    def write(self, file_obj: Any, offset: int, data: bytes) -> int:
        return Plain.write(self, file_obj, offset, data)  # type: ignore[return-value]

    def close(self, file_obj: Any) -> None:
        super().close(file_obj)
        raise asyncssh.SFTPFailure("Failure")


def test_a_full_disk_that_is_noticed_at_the_close(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        with pytest.raises(NoSpace):
            await put(remote, b"file", b"x" * 100)

    on_evil(tmp_path, LateFull, story)


class NoInodes(evil_sftp.FullDisk):
    """There is room for bytes, and none for files."""

    def open(self, path: bytes, pflags: int, attrs: SFTPAttrs) -> Any:
        raise asyncssh.SFTPFailure("Failure")

    def statvfs(self, path: bytes) -> Any:
        full = super().statvfs(path)
        full.f_bavail, full.f_favail = 10**6, 0
        return full


def test_a_disk_that_holds_no_more_files(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        with pytest.raises(NoSpace, match="more files"):
            await remote.create(b"file", 0o644, 1)

    on_evil(tmp_path, NoInodes, story)


def test_a_connection_lost_anywhere_in_an_upload(tmp_path: Path) -> None:
    """After any number of bytes: a repeat with the same base brings the whole file."""
    body = content(400_000)

    async def story(remote: SftpRemote, link: Link, folder: Path) -> None:
        for number, limit in enumerate([0, 200, 1000, 5000, 50_000, 300_000, 399_000, 401_000]):
            name, handle = b"%d" % number, number + 1
            await remote.create(name, 0o644, handle)
            link.fail_after(limit)
            with contextlib.suppress(Unreachable):
                await put(remote, name, body, attributes=TIMES, base_version=b"", handle=handle)
            link.mend()
            await put(remote, name, body, attributes=TIMES, base_version=b"", handle=handle)
            assert (folder / os.fsdecode(name)).read_bytes() == body

    with ssh_server(tmp_path / "server") as server, link_to(server.port) as link:
        config = tmp_path / "ssh_config"
        config.write_text(ssh_config_through(link, server))
        site = msgspec.structs.replace(server.site(), ssh_config=str(config))
        on(server.site_spec(site=site), lambda remote: story(remote, link, server.root))


def test_creating_what_is_there_is_refused(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "file").write_bytes(b"")
        with pytest.raises(AlreadyExists):
            await remote.create(b"file", 0o644, 1)
        assert await held_open(remote) == 0

    on_folder(sshd, story)


# --- verify -------------------------------------------------------------------------------------


class Corrupting(MemorySource):
    """Its bytes are damaged on their way, and as they should be once the server has them."""

    def __init__(self, body: bytes, damaged: int) -> None:
        super().__init__(body)
        self._damaged = damaged
        self._arrived = False

    def read(self, offset: int, length: int) -> bytes:
        piece = bytearray(super().read(offset, length))
        if offset <= self._damaged < offset + length and not self._arrived:
            piece[self._damaged - offset] ^= 1
        return bytes(piece)

    def report(self, done: int) -> None:
        self._arrived = True


async def fail_to_verify(
    remote: SftpRemote, request: UploadRequest, body: bytes, damaged: int
) -> None:
    source = Corrupting(body, damaged)
    with pytest.raises(RemoteFailure, match=r"SHA-256 differs.*the local copy is kept"):
        await remote.upload(request, source, source.report)


def verifying(spec: SiteSpec) -> SiteSpec:
    (root,) = spec.roots.values()
    assert isinstance(root, SftpRoot)
    return msgspec.structs.replace(spec, roots={"ns": SftpRoot(root.path, verify=True)})


def request_for(path: bytes, body: bytes, **more: Any) -> UploadRequest:
    fields = {"base_size": 0, "ranges": [(0, len(body))], "attributes": TIMES, "mode": 0o644}
    return UploadRequest(path=path, size=len(body), **(fields | more))


async def verify_uploads(remote: SftpRemote, folder: Path) -> None:
    """Good ones pass and bad ones do not, whatever their names and sizes."""
    for name in (b"plain", b"it's", b"new\nline", b"-rf", b'$(touch x) `y` "z" \\', b"caf\xe9"):
        for size in (1, 70_000, 3_000_000):
            body = content(size)
            await put(remote, name, body, replace=size == 70_000)
            assert await get(remote, name) == body
            for replace in (False, True):
                bad = request_for(name, body, replace=replace)
                await fail_to_verify(remote, bad, body, size - 1)
            assert (await remote.stat(name)).mtime_ns > 10**18, "no version that it was to be"
    body = content(5000)
    ranges = [(number * 10, 3) for number in range(450)]
    await put(remote, b"parts", body)
    parts = request_for(b"parts", body, base_size=5000, ranges=ranges)
    await remote.upload(parts, MemorySource(body), lambda done: None)
    await fail_to_verify(remote, parts, body, 4491)
    await put(remote, b"empty", b"")
    assert sorted(os.listdir(os.fsencode(folder)))[:2] == [b'$(touch x) `y` "z" \\', b"-rf"]
    assert not [name for name in os.listdir(folder) if ".hpcfs-" in name]


def test_uploads_are_verified(sshd: SshServer) -> None:
    folder = sshd.root / "verified"
    folder.mkdir()
    spec = verifying(sshd.site_spec(str(folder)))
    on(spec, lambda remote: verify_uploads(remote, folder))


def test_many_uploads_are_verified_at_once(sshd: SshServer) -> None:
    async def story(remote: SftpRemote) -> None:
        bodies = [content(50_000, number) for number in range(40)]
        await asyncio.gather(
            *(put(remote, b"%d" % number, body) for number, body in enumerate(bodies))
        )
        await fail_to_verify(remote, request_for(b"bad", bodies[0]), bodies[0], 77)

    (sshd.root / "verified-at-once").mkdir()
    on(verifying(sshd.site_spec(str(sshd.root / "verified-at-once"))), story)


def test_a_connection_that_verifies_is_not_idle(
    sshd: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shell is at work then, and no SFTP request is under way."""
    asked, may_answer = asyncio.Event(), asyncio.Event()
    there = Hasher._there

    async def slow(*asking: Any) -> bytes:
        asked.set()
        await may_answer.wait()
        return await there(*asking)

    async def story(remote: SftpRemote) -> None:
        session = (await remote._place(b"")).session
        async with asyncio.timeout(20):
            upload = asyncio.create_task(put(remote, b"file", b"content"))
            await asked.wait()
            assert not session.traffic().requests
            assert not session.handles.open_count
            assert not session.is_idle
            may_answer.set()
            await upload
            await until(lambda: session.is_idle)

    monkeypatch.setattr(Hasher, "_there", slow)
    (sshd.root / "verified-slowly").mkdir()
    on(verifying(sshd.site_spec(str(sshd.root / "verified-slowly"))), story)


@pytest.mark.parametrize("options", [("ForceCommand internal-sftp",), ("MaxSessions 2",)])
def test_a_server_that_can_not_verify_says_so_once(
    tmp_path: Path, options: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async def story(remote: SftpRemote) -> None:
        for number in range(3):
            await put(remote, b"%d" % number, b"content")

    with ssh_server(tmp_path / "s", *options) as server, caplog.at_level("WARNING", "hpcfs"):
        on(verifying(server.site_spec()), story)
        assert len(os.listdir(server.root)) == 3
    assert len([r for r in caplog.records if "computes no hashes" in r.message]) == 1


def test_without_a_master_connection_ssh_can_not_verify(
    sshd: SshServer, caplog: pytest.LogCaptureFixture
) -> None:
    (sshd.root / "no-master").mkdir()
    spec = sshd.site_spec(str(sshd.root / "no-master"), sshd.site(transport="openssh"))
    with caplog.at_level("WARNING", "hpcfs"):
        on(verifying(spec), lambda remote: put(remote, b"file", b"content"))
    assert [r.message for r in caplog.records if "computes no hashes" in r.message]
