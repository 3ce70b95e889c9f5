"""The laptop's SFTP server against those who want more than its shares: every request on a
read-only share, names that lead out, numbers that can't be, handles of others, and much of it."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh import SFTPAttrs, SFTPEOFError, SFTPError
from asyncssh.constants import (
    FXF_APPEND,
    FXF_CREAT,
    FXF_EXCL,
    FXF_READ,
    FXF_TRUNC,
    FXF_WRITE,
)
from asyncssh.sftp import SFTPClientHandler

from hpcfs.laptop import channel as served_channel, connected_mounts, memory, sftp_server
from hpcfs.laptop.acceptor import EndpointKind
from hpcfs.laptop.channel import HandleTable, ServerChannel
from hpcfs.laptop.sftp_server import Shares, ShareServer
from hpcfs.laptop.shares import Share
from hpcfs.model.errors import CrossDevice
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.requests import Requests
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.tunnel.line import RendezvousFile
from hpcfs.remotes.tunnel.session import TunnelLogin, open_session
from hpcfs.remotes.tunnel.site import TunnelSiteConnection
from tests.remotes.contract import put
from tests.support.laptop import NAME, Laptop, laptop

CONTENT = b"what was there"
MIB = 1024 * 1024
SECRET = b"what nobody may see"
ALL = SFTPAttrs(size=3, permissions=0o777, uid=os.getuid(), gid=os.getgid(), atime=1, mtime=1)
LINK, BLOCK = 21, 22
"""Requests of SFTP's version 6."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With shares `rw` and `ro` alike, and a secret beside them."""
    (tmp_path / "secret").write_bytes(SECRET)
    for name in ("rw", "ro"):
        share = tmp_path / name
        (share / "dir").mkdir(parents=True)
        (share / "file").write_bytes(CONTENT)
        (share / "link").symlink_to("file")
        (share / "out").symlink_to("../secret")
    return tmp_path


@pytest.fixture(params=["unix", "tcp"])
def running(request: pytest.FixtureRequest, directory: Path) -> Iterator[Laptop]:
    kind: EndpointKind = request.param
    shares = (Share("rw", directory / "rw"), Share("ro", directory / "ro", read_only=True))
    with laptop(directory / "home", *shares, kind=kind) as found:
        yield found


@asynccontextmanager
async def session(running: Laptop) -> AsyncIterator[SftpSession]:
    spec = running.site_spec("/", running.directory)
    found = await open_session(spec, RendezvousFile(running.directory, NAME))
    try:
        yield found
    finally:
        await found.login.close()


def ask(running: Laptop, story: Callable[[Requests], Awaitable[None]]) -> None:
    async def main() -> None:
        async with session(running) as found:
            await story(found.meta)

    asyncio.run(asyncio.wait_for(main(), 60))


async def code(request: Coroutine[Any, Any, object]) -> int:
    with pytest.raises(SFTPError) as refused:
        await request
    return refused.value.code


async def read(channel: Requests, handle: bytes, offset: int, length: int) -> bytes:
    return b"".join(await channel.read_piece(handle, offset, length))


async def listed(channel: Requests, path: bytes) -> set[bytes]:
    handle = await channel.opendir(path)
    found: set[bytes] = set()
    while True:
        try:
            found |= {name for name, _ in await channel.names(handle)}
        except SFTPEOFError:
            await channel.close(handle)
            return found - {b".", b".."}


def snapshot(place: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in sorted((place, *place.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found.append(
            (path, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink, content)
        )
    return found


def settled(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# --- shares ---------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Requests], Coroutine[Any, Any, object]]] = {
    "write": lambda c: c.open(b"/ro/file", FXF_WRITE, SFTPAttrs()),
    "read and write": lambda c: c.open(b"/ro/file", FXF_READ | FXF_WRITE, SFTPAttrs()),
    "append": lambda c: c.open(b"/ro/file", FXF_APPEND, SFTPAttrs()),
    "truncate": lambda c: c.open(b"/ro/file", FXF_READ | FXF_TRUNC, SFTPAttrs()),
    "create": lambda c: c.open(b"/ro/new", FXF_READ | FXF_CREAT, SFTPAttrs()),
    "create, existing": lambda c: c.open(b"/ro/file", FXF_READ | FXF_CREAT, SFTPAttrs()),
    "create, exclusive": lambda c: c.open(b"/ro/new", FXF_CREAT | FXF_EXCL, SFTPAttrs()),
    "by a link": lambda c: c.open(b"/ro/link", FXF_WRITE, SFTPAttrs()),
    "setstat": lambda c: c.setstat(b"/ro/file", ALL),
    "setstat, directory": lambda c: c.setstat(b"/ro", SFTPAttrs(permissions=0o777)),
    "setstat, nothing": lambda c: c.setstat(b"/ro/file", SFTPAttrs()),
    "lsetstat": lambda c: c.setstat(b"/ro/link", ALL, follow_symlinks=False),
    "remove": lambda c: c.remove(b"/ro/file"),
    "remove, twice a slash": lambda c: c.remove(b"//ro//file"),
    "remove, dots": lambda c: c.remove(b"/../ro/./dir/../file"),
    "mkdir": lambda c: c.mkdir(b"/ro/new", SFTPAttrs()),
    "rmdir": lambda c: c.rmdir(b"/ro/dir"),
    "symlink": lambda c: c.symlink(b"file", b"/ro/new"),
    "link": lambda c: c.link(b"/ro/file", b"/ro/new"),
    "link, out": lambda c: c.link(b"/ro/file", b"/rw/new"),
    "link, in": lambda c: c.link(b"/rw/file", b"/ro/new"),
    "rename": lambda c: c.rename(b"/ro/file", b"/ro/new", 0),
    "rename, out": lambda c: c.rename(b"/ro/file", b"/rw/new", 0),
    "posix-rename": lambda c: c.posix_rename(b"/ro/file", b"/ro/new"),
    "posix-rename, out": lambda c: c.posix_rename(b"/ro/file", b"/rw/file"),
    "posix-rename, in": lambda c: c.posix_rename(b"/rw/file", b"/ro/file"),
}


def test_nothing_changes_a_read_only_share(running: Laptop, directory: Path) -> None:
    before = snapshot(directory / "ro"), snapshot(directory / "rw")

    async def story(channel: Requests) -> None:
        for change, request in CHANGES.items():
            assert (change, await code(request(channel))) == (change, asyncssh.FX_PERMISSION_DENIED)
        handle = await channel.open(b"/ro/file", FXF_READ, SFTPAttrs())
        assert await code(channel.fsetstat(handle, ALL)) == asyncssh.FX_PERMISSION_DENIED
        await code(channel.write(handle, 0, b"changed"))
        await channel.fsync(handle)
        assert await read(channel, handle, 0, 100) == CONTENT

    ask(running, story)
    assert (snapshot(directory / "ro"), snapshot(directory / "rw")) == before


def test_a_read_only_file_is_not_changed_under_another_name(
    running: Laptop, directory: Path
) -> None:
    """A hard link in the writable share, made on the laptop; those that mounts make are theirs."""
    os.link(directory / "ro" / "file", directory / "rw" / "shared")
    (directory / "rw" / "sly").symlink_to("shared")
    before = snapshot(directory / "ro")

    async def story(channel: Requests) -> None:
        reading = await channel.open(b"/rw/shared", FXF_READ, SFTPAttrs())
        refused = [
            channel.fsetstat(reading, SFTPAttrs(permissions=0o777)),
            channel.fsetstat(reading, SFTPAttrs(atime=1, mtime=1)),
        ]
        for path in (b"/rw/shared", b"/rw/sly", b"/rw/dir/../shared"):
            refused += [
                channel.open(path, flags, SFTPAttrs())
                for flags in (
                    FXF_WRITE,
                    FXF_READ | FXF_WRITE,
                    FXF_WRITE | FXF_CREAT | FXF_TRUNC,
                    FXF_WRITE | FXF_APPEND,
                    FXF_READ | FXF_TRUNC,
                )
            ]
            refused += [
                channel.setstat(path, attrs)
                for attrs in (
                    SFTPAttrs(size=0),
                    SFTPAttrs(permissions=0o777),
                    SFTPAttrs(atime=1, mtime=1),
                    SFTPAttrs(uid=os.getuid(), gid=os.getgid()),
                )
            ]
        for request in refused:
            assert await code(request) == asyncssh.FX_PERMISSION_DENIED
        assert snapshot(directory / "ro") == before
        assert await read(channel, reading, 0, 100) == CONTENT
        await channel.link(b"/rw/shared", b"/rw/again")
        assert await code(channel.open(b"/rw/again", FXF_WRITE, SFTPAttrs()))
        await channel.remove(b"/rw/again")
        await channel.posix_rename(b"/rw/shared", b"/rw/dir/shared")
        assert await code(channel.open(b"/rw/dir/shared", FXF_WRITE, SFTPAttrs()))
        await channel.posix_rename(b"/rw/file", b"/rw/dir/shared")
        await channel.open(b"/rw/dir/shared", FXF_WRITE, SFTPAttrs())

    ask(running, story)
    assert (directory / "ro" / "file").stat().st_nlink == 1
    assert (directory / "ro" / "file").read_bytes() == CONTENT


def test_links_that_mounts_make_are_written_through(running: Laptop, directory: Path) -> None:
    """Until somebody on the laptop makes one more, of which nobody knows where."""

    async def opens(channel: Requests, *names: bytes) -> None:
        for name in names:
            handle = await channel.open(name, FXF_WRITE, SFTPAttrs())
            await channel.close(handle)

    async def refuses(channel: Requests, *names: bytes) -> None:
        for name in names:
            opening = channel.open(name, FXF_WRITE, SFTPAttrs())
            assert await code(opening) == asyncssh.FX_PERMISSION_DENIED

    async def story(channel: Requests) -> None:
        await channel.link(b"/rw/file", b"/rw/two")
        await channel.link(b"/rw/two", b"/rw/dir/three")
        await opens(channel, b"/rw/file", b"/rw/two", b"/rw/dir/three")
        await channel.posix_rename(b"/rw/two", b"/rw/2")
        await opens(channel, b"/rw/file", b"/rw/2", b"/rw/dir/three")
        os.link(directory / "rw" / "file", directory / "ro" / "four")
        await refuses(channel, b"/rw/file", b"/rw/2", b"/rw/dir/three")
        await channel.remove(b"/rw/2")
        await refuses(channel, b"/rw/file", b"/rw/dir/three")
        (directory / "ro" / "four").unlink()
        await opens(channel, b"/rw/file", b"/rw/dir/three")
        (directory / "rw" / "dir" / "three").unlink()
        await opens(channel, b"/rw/file")
        os.link(directory / "rw" / "file", directory / "ro" / "four")
        await refuses(channel, b"/rw/file")

    ask(running, story)


def test_without_a_read_only_share_every_name_is_written_through(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(CONTENT)
    os.link(tmp_path / "data" / "file", tmp_path / "data" / "two")

    async def story(channel: Requests) -> None:
        await channel.open(b"/data/two", FXF_WRITE | FXF_TRUNC, SFTPAttrs())

    with laptop(tmp_path / "home", Share("data", tmp_path / "data")) as running:
        ask(running, story)
    assert (tmp_path / "data" / "file").read_bytes() == b""


def test_the_shares_themselves_stay(running: Laptop, directory: Path) -> None:
    async def story(channel: Requests) -> None:
        assert await listed(channel, b"/") == {b"ro", b"rw"}
        requests: tuple[Coroutine[Any, Any, object], ...] = (
            channel.rmdir(b"/rw"),
            channel.rmdir(b"/rw/dir/.."),
            channel.remove(b"/rw"),
            channel.posix_rename(b"/rw", b"/new"),
            channel.posix_rename(b"/rw/file", b"/rw"),
            channel.posix_rename(b"/rw/dir", b"/ro"),
            channel.link(b"/rw", b"/rw/new"),
            channel.setstat(b"/", ALL),
            channel.readlink(b"/"),
            channel.mkdir(b"/new", SFTPAttrs()),
            channel.symlink(b"/", b"/new"),
            channel.open(b"/new", FXF_CREAT | FXF_WRITE, SFTPAttrs()),
        )
        for refused in requests:
            assert await code(refused) == asyncssh.FX_PERMISSION_DENIED
        requests = (
            channel.stat(b"/secret", 0),
            channel.open(os.fsencode(directory) + b"/secret", FXF_READ, SFTPAttrs()),
        )
        for refused in requests:
            assert await code(refused) == asyncssh.FX_NO_SUCH_FILE
        assert (await channel.stat(b"/..", 0)).permissions == stat.S_IFDIR | 0o555
        assert (await channel.stat(b"/../../rw", 0)).permissions is not None

    ask(running, story)
    assert (directory / "rw" / "file").read_bytes() == CONTENT


def test_no_name_leads_out(running: Laptop, directory: Path) -> None:
    async def story(channel: Requests) -> None:
        for name in (b"/rw/../secret", b"/rw/dir/../../secret", b"/rw/out", b"/rw/../ro/file"):
            opening = channel.open(name, FXF_READ, SFTPAttrs())
            assert (name, await code(opening)) == (name, asyncssh.FX_PERMISSION_DENIED)
            assert await code(channel.stat(name, 0)) == asyncssh.FX_PERMISSION_DENIED
        await channel.symlink_paths(b"..", b"/rw/up")
        await channel.symlink_paths(b"/", b"/rw/root")
        for name in (b"/rw/up", b"/rw/root", b"/rw/up/ro", b"/rw/root/etc"):
            assert await code(channel.opendir(name)) == asyncssh.FX_PERMISSION_DENIED
            assert await code(channel.statvfs(name)) == asyncssh.FX_PERMISSION_DENIED
        opening = channel.open(b"/rw/root/tmp/x", FXF_CREAT | FXF_WRITE, SFTPAttrs())
        assert await code(opening) == asyncssh.FX_PERMISSION_DENIED
        await channel.setstat(b"/rw/out", SFTPAttrs(atime=1, mtime=1), follow_symlinks=False)
        assert await code(channel.setstat(b"/rw/out", ALL)) == asyncssh.FX_PERMISSION_DENIED
        await channel.link(b"/rw/out", b"/rw/out2")  # of the link, not of what it leads to
        await channel.remove(b"/rw/out")

    before = (directory / "secret").lstat()
    ask(running, story)
    after = (directory / "secret").lstat()
    assert (after.st_mtime_ns, after.st_nlink, after.st_mode) == (
        before.st_mtime_ns,
        before.st_nlink,
        before.st_mode,
    )
    assert (directory / "rw" / "out2").is_symlink()


def test_names_and_numbers_that_cannot_be(running: Laptop, directory: Path) -> None:
    async def story(channel: Requests) -> None:
        for name in (b"/rw/a\0b", b"/rw/" + b"n" * 256, b"/rw/" + b"d/" * 3000):
            assert await code(channel.stat(name, 0)) == asyncssh.FX_BAD_MESSAGE
            assert await code(channel.mkdir(name, SFTPAttrs())) == asyncssh.FX_BAD_MESSAGE
        odd = bytes(byte for byte in range(1, 256) if byte != ord("/"))[:250]
        await channel.mkdir(b"/rw/" + odd, SFTPAttrs())
        assert odd in await listed(channel, b"/rw")
        handle = await channel.open(b"/rw/file", FXF_READ | FXF_WRITE, SFTPAttrs())
        for refused in (
            read(channel, handle, 2**64 - 1, 100),
            channel.write(handle, 2**63, b"x"),
            channel.fsetstat(handle, SFTPAttrs(size=2**64 - 1)),
        ):
            assert await code(refused) == asyncssh.FX_BAD_MESSAGE
        assert await read(channel, handle, 0, 2**32 - 1) == CONTENT
        assert await code(read(channel, handle, 2**62, 2**32 - 1)) == asyncssh.FX_EOF
        for unknown in (b"", b"\0" * 8, b"\xff" * 8, b"h" * 256):
            await code(read(channel, unknown, 0, 1))
            await code(channel.close(unknown))
        assert await read(channel, handle, 0, 4) == CONTENT[:4]

    ask(running, story)


def test_a_path_of_a_million_parts_is_not_walked(running: Laptop) -> None:
    async def story(channel: Requests) -> None:
        began = time.process_time()
        path = b"/rw/" + b"dir/../" * 500_000
        assert await code(channel.stat(path, 0)) == asyncssh.FX_BAD_MESSAGE
        assert await code(channel.realpath(path)) == asyncssh.FX_BAD_MESSAGE
        assert time.process_time() - began < 1

    ask(running, story)


def test_what_no_mount_asks_for_is_not_there(running: Laptop, directory: Path) -> None:
    """Requests of later versions, and extensions of asyncssh's: its copy of a file to itself goes
    on for ever."""

    async def story(channel: Requests) -> None:
        handle = await channel.open(b"/rw/file", FXF_READ | FXF_WRITE, SFTPAttrs())
        packed = struct.pack(">I", len(handle)) + handle
        numbers = struct.pack(">QQ", 0, 0)
        link = struct.pack(">I", 7) + b"/rw/new" + struct.pack(">I", 8) + b"/ro/file" + b"\0"
        for kind, body in (
            (LINK, link),
            (BLOCK, packed + numbers + bytes(4)),
            (b"copy-data", packed + numbers + packed + numbers[:8]),
            (b"ranges@asyncssh.com", packed + numbers),
            (b"exec@example.com", b""),
        ):
            assert await code(channel._make_request(kind, body)) == asyncssh.FX_OP_UNSUPPORTED

    ask(running, story)
    assert (directory / "rw" / "file").read_bytes() == CONTENT


def test_no_program_becomes_its_owners(running: Laptop, directory: Path) -> None:
    rw = directory / "rw"

    async def story(channel: Requests) -> None:
        made = await channel.open(b"/rw/new", FXF_CREAT | FXF_WRITE, SFTPAttrs(permissions=0o6755))
        assert stat.S_IMODE((rw / "new").stat().st_mode) & 0o7000 == 0
        await channel.fsetstat(made, SFTPAttrs(permissions=0o104755))
        assert stat.S_IMODE((rw / "new").stat().st_mode) == 0o755
        await channel.setstat(b"/rw/new", SFTPAttrs(permissions=0o6711))
        assert stat.S_IMODE((rw / "new").stat().st_mode) == 0o711
        await channel.setstat(b"/rw/dir", SFTPAttrs(permissions=0o3775))
        assert stat.S_IMODE((rw / "dir").stat().st_mode) == 0o3775

    ask(running, story)


def test_a_fifo_holds_nobody_up(running: Laptop, directory: Path) -> None:
    os.mkfifo(directory / "rw" / "fifo")

    async def story(channel: Requests) -> None:
        for flags in (FXF_READ, FXF_WRITE, FXF_WRITE | FXF_TRUNC):
            opening = channel.open(b"/rw/fifo", flags, SFTPAttrs())
            assert await code(opening) == asyncssh.FX_PERMISSION_DENIED
        size = channel.setstat(b"/rw/fifo", SFTPAttrs(size=0))
        assert await code(size) == asyncssh.FX_PERMISSION_DENIED

    ask(running, story)


# --- handles --------------------------------------------------------------------------------------


def test_a_handle_counts_in_its_session_only(running: Laptop) -> None:
    async def main() -> None:
        async with session(running) as one, session(running) as other:
            handle = await one.meta.open(b"/rw/file", FXF_READ, SFTPAttrs())
            assert await read(one.bulk, handle, 0, 100) == CONTENT
            await code(read(other.meta, handle, 0, 100))
            await code(other.meta.close(handle))
            assert await read(one.meta, handle, 0, 100) == CONTENT

    asyncio.run(main())


def test_a_read_in_a_thread_is_of_its_own_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for the disk another channel closes the file and opens the next one, which
    gets the same number from the system."""
    (directory / "rw" / "other").write_bytes(SECRET)
    monkeypatch.setattr(sftp_server, "_read_now", lambda *_: None)  # the disk is slow
    may_read = threading.Event()

    async def main() -> None:
        pool = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(pool)
        pool.submit(may_read.wait)
        shares = Shares([Share("rw", directory / "rw")])
        server = ShareServer(shares)
        file = server.open(b"/rw/file", FXF_READ, SFTPAttrs())
        number = file.descriptor
        reading = asyncio.create_task(server.read(file, 0, 100))
        await asyncio.sleep(0)
        server.close(file)
        other = server.open(b"/rw/other", FXF_READ, SFTPAttrs())
        assert other.descriptor == number
        may_read.set()
        assert await reading == CONTENT
        server.close(other)
        assert shares.open_files == 0
        shares.close()

    asyncio.run(main())


def test_there_is_an_end_to_open_files_and_listings(
    running: Laptop, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sftp_server, "MAX_OPEN_FILES", 20)
    monkeypatch.setattr(served_channel, "MAX_LISTINGS", 30)
    for number in range(200):
        (directory / "rw" / "dir" / str(number)).touch()

    async def story(channel: Requests) -> None:
        handles = [await channel.open(b"/rw/file", FXF_READ, SFTPAttrs()) for _ in range(10)]
        listings = [await channel.opendir(b"/rw/dir") for _ in range(30)]
        # Our own requests would wait for one to be given up.
        opendir = partial(SFTPClientHandler.opendir, channel)
        opening = partial(SFTPClientHandler.open, channel)
        assert await code(opendir(b"/rw/dir")) == asyncssh.FX_FAILURE
        for listing in listings[:5]:
            await channel.names(listing)  # half of them: the rest is never asked for
        assert running.served.open_files == 20
        assert await code(opening(b"/rw/file", FXF_READ, SFTPAttrs())) == asyncssh.FX_FAILURE
        assert await code(channel.names(listings[5])) == asyncssh.FX_FAILURE
        await channel.close(listings[0])
        await channel.close(handles[0])
        assert await read(channel, handles[1], 0, 100) == CONTENT

    before = len(os.listdir("/proc/self/fd"))
    ask(running, story)
    assert settled(lambda: running.served.open_files == 0)
    assert settled(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_failed_openings_are_not_counted(running: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sftp_server, "MAX_OPEN_FILES", 3)

    async def story(channel: Requests) -> None:
        for _ in range(10):
            opening = channel.open(b"/rw/missing", FXF_READ, SFTPAttrs())
            assert await code(opening) == asyncssh.FX_NO_SUCH_FILE
            assert await code(channel.opendir(b"/rw/file")) == asyncssh.FX_NO_SUCH_FILE
        assert running.served.open_files == 0

    ask(running, story)


# --- much of it -----------------------------------------------------------------------------------


def test_one_mount_does_not_keep_the_others_waiting(
    running: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests are all here, and each can be answered at once: between two turns of the
    laptop's loop there are few of them all the same."""
    asked = 20_000
    together: list[int] = [0]
    stat_of = ShareServer.stat

    def counted(server: ShareServer, path: bytes) -> SFTPAttrs:
        together[-1] += 1
        return stat_of(server, path)

    def turn() -> None:
        if together[-1]:
            together.append(0)
        if sum(together) < asked:
            running.loop.call_soon(turn)

    async def story(channel: Requests) -> None:
        running.call(turn)
        await asyncio.gather(*(channel.stat(b"/rw/file", 0) for _ in range(asked)))

    monkeypatch.setattr(served_channel, "BREATH_SECONDS", 0.002)
    monkeypatch.setattr(ShareServer, "stat", counted)
    ask(running, story)
    assert sum(together) >= asked
    assert max(together) < 1000


def wait_until_it_waits(running: Laptop) -> None:
    """The mounts' loop stands still meanwhile."""
    sent = -1
    while sent != running.served.traffic.sent or not sent:
        sent = running.served.traffic.sent
        time.sleep(0.3)


def test_answers_that_nobody_takes_are_not_gathered(
    running: Laptop, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount asks for 400 MiB and stops listening: the laptop has read a tenth when it waits."""
    monkeypatch.setattr(connected_mounts, "MOST_UNTAKEN_BYTES", 4 * 1024 * 1024)
    monkeypatch.setattr(connected_mounts, "WAITING_BYTES", 4 * 1024 * 1024)
    (directory / "rw" / "large").write_bytes(bytes(4 * 1024 * 1024))

    async def main() -> None:
        async with session(running) as found:
            channel = found.bulk
            handle = await channel.open(b"/rw/large", FXF_READ, SFTPAttrs())
            pieces = [channel.read_piece(handle, 0, 1024 * 1024) for _ in range(400)]
            await pieces[0]
            wait_until_it_waits(running)
            assert running.served.traffic.sent < 100 * 1024 * 1024
            for piece in await asyncio.gather(*pieces):
                assert sum(map(len, piece)) == 1024 * 1024

    asyncio.run(main())


def test_mounts_together_are_given_little_memory(
    running: Laptop, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks for 24 MiB and takes nothing; one that takes what it asked for gets on with it."""
    monkeypatch.setattr(memory, "MOST_ANSWER_BYTES", 4 * MIB)
    (directory / "rw" / "large").write_bytes(bytes(4 * MIB))
    mounts = 8

    async def main() -> None:
        async with AsyncExitStack() as stack:
            asked = []
            for _ in range(mounts):
                channel = (await stack.enter_async_context(session(running))).bulk
                handle = await channel.open(b"/rw/large", FXF_READ, SFTPAttrs())
                asked += [channel.read_piece(handle, 0, MIB) for _ in range(24)]
            await asyncio.gather(*asked[:: len(asked) // mounts])
            wait_until_it_waits(running)
            held = running.call(lambda: running.served.memory.answers)
            assert held <= 4 * MIB + mounts * (memory.LITTLE_BYTES + 2 * MIB)
            for piece in await asyncio.gather(*asked):
                assert sum(map(len, piece)) == MIB
        assert settled(lambda: running.served.memory == memory.ServerMemory())

    asyncio.run(main())


def test_a_large_directory_is_held_in_pages(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount may list it hundreds of times at once, and never ask for the rest."""
    for number in range(1000):
        (directory / "rw" / "dir" / str(number)).touch()
    pages: list[int] = []
    page_of = sftp_server._page

    def counted(*arguments: Any) -> Any:
        found = page_of(*arguments)
        pages.append(len(found[0]))
        return found

    monkeypatch.setattr(sftp_server, "_page", counted)

    async def main() -> None:
        shares = Shares([Share("rw", directory / "rw")])
        listing = ShareServer(shares).scandir(b"/rw/dir")
        first = [(await anext(listing)).filename for _ in range(sftp_server.LISTED_AT_ONCE)]
        assert pages == [sftp_server.LISTED_AT_ONCE]
        rest = [entry.filename async for entry in listing]
        assert sorted(map(int, first + rest)) == list(range(1000))
        assert shares.open_files == 0
        shares.close()

    asyncio.run(main())
    assert max(pages) == sftp_server.LISTED_AT_ONCE


def test_a_mount_opens_few_channels(tmp_path: Path) -> None:
    """Each would be given memory of its own."""
    (tmp_path / "data").mkdir()

    async def main(running: Laptop) -> None:
        async with session(running) as found:
            assert isinstance(found.login, TunnelLogin)
            assert found.login.ssh is not None
            connection = found.login.ssh.connection
            opened = [
                await connection.start_sftp_client()
                for _ in range(connected_mounts.MAX_CHANNELS - 2)
            ]
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.start_sftp_client()
            opened[0].exit()
            async with asyncio.timeout(10):
                while True:
                    try:
                        await connection.start_sftp_client()
                        return
                    except asyncssh.ChannelOpenError:  # the laptop has not heard of it yet
                        await asyncio.sleep(0.01)

    with laptop(tmp_path / "home", Share("data", tmp_path / "data"), kind="tcp") as running:
        asyncio.run(main(running))


INIT = struct.pack(">IBI", 5, 1, 3)
MAKE = b"/rw/made"
MKDIR = struct.pack(">IBII", 13 + len(MAKE), 14, 1, len(MAKE)) + MAKE + bytes(4)


def serve_once(directory: Path, story: Callable[[ServerChannel], Awaitable[None]]) -> bytes:
    answers = bytearray()

    async def main() -> None:
        shares = Shares([Share("rw", directory / "rw")])
        channel = ServerChannel(shares, HandleTable(), answers.extend, lambda: 0, 1)
        running = asyncio.create_task(channel.run())
        await story(channel)
        await asyncio.wait_for(running, 20)
        shares.close()

    asyncio.run(main())
    return bytes(answers)


def test_what_was_given_up_is_not_done_later(directory: Path) -> None:
    """The mount may be asking anew over another stream, and be done before."""

    async def story(channel: ServerChannel) -> None:
        channel.received(INIT)
        channel.received(MKDIR)
        channel.ended()

    serve_once(directory, story)
    assert not (directory / "rw" / "made").exists()


def test_requests_are_not_gathered_without_end(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MAX_CHANNEL_REQUEST_BYTES", 10_000)
    monkeypatch.setattr(memory, "LITTLE_BYTES", 1000)

    async def story(channel: ServerChannel) -> None:
        channel.received(INIT + MKDIR)
        while not (directory / "rw" / "made").exists():  # noqa: ASYNC110 - the answer is no event
            await asyncio.sleep(0)
        channel.received(bytes(10_001))

    assert serve_once(directory, story)


def test_garbage_on_a_channel_ends_it(running: Laptop) -> None:
    async def main() -> None:
        async with session(running) as found:
            found.meta._carrier.write(b"\xff" * 100)
            assert await asyncio.to_thread(settled, lambda: found.meta.ended)
        async with session(running) as found:
            assert (await found.meta.stat(b"/rw", 0)).permissions is not None

    asyncio.run(main())
    assert settled(lambda: not running.call(lambda: running.mounts.all))


# --- between file systems -------------------------------------------------------------------------


def test_between_shares_nothing_is_renamed_or_linked(tmp_path: Path) -> None:
    """The mount says EXDEV, with which mv(1) copies; within a share it works."""
    for name in ("one", "two"):
        (tmp_path / name / "dir").mkdir(parents=True)
    shares = [Share(name, tmp_path / name) for name in ("one", "two")]

    async def story(remote: SftpRemote) -> None:
        await put(remote, b"one/file", CONTENT)
        await put(remote, b"two/there", CONTENT)
        for target, replace in ((b"two/new", True), (b"two/new", False), (b"two/there", True)):
            with pytest.raises(CrossDevice, match="different file systems"):
                await remote.rename(b"one/file", target, replace=replace)
        with pytest.raises(CrossDevice, match="different file systems"):
            await remote.rename(b"one/dir", b"two/new", replace=True)
        with pytest.raises(CrossDevice, match="different file systems"):
            await remote.make_link(b"one/file", b"two/new")
        await remote.make_link(b"one/file", b"one/same")
        await remote.rename(b"one/file", b"one/dir/file", replace=True)

    async def main(running: Laptop) -> None:
        site = TunnelSiteConnection(running.site_spec("/", tmp_path))
        try:
            await story(site.remote("ns"))
        finally:
            await site.close()

    with laptop(tmp_path / "home", *shares) as running:
        asyncio.run(main(running))
    assert (tmp_path / "one" / "dir" / "file").read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path / "two")) == ["dir", "there"]
