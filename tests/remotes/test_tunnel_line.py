"""A mount's connection to a laptop that is cut off, falls silent, moves, or is not there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from hpcfs.laptop.acceptor import EndpointKind
from hpcfs.laptop.identity import TunnelIdentity
from hpcfs.laptop.shares import Share
from hpcfs.model.errors import AccessRefused, RemoteError, Unreachable, WrongSettings
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.tunnel import line
from hpcfs.remotes.tunnel.site import TunnelSiteConnection
from tests.remotes.contract import get, put
from tests.support.laptop import Laptop, laptop

Story = Callable[[SftpRemote], Awaitable[None]]
MIB = 1024 * 1024
RETURN_SECONDS = 3.0
"""From the laptop's return to the first successful read."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    found = tmp_path / "data"
    found.mkdir()
    return found


@pytest.fixture(params=["unix", "tcp"])
def running(request: pytest.FixtureRequest, tmp_path: Path, data: Path) -> Iterator[Laptop]:
    kind: EndpointKind = request.param
    with laptop(tmp_path, Share("data", data), kind=kind) as found:
        yield found


def tell(running: Laptop, tmp_path: Path, story: Story) -> None:
    async def main() -> None:
        site = TunnelSiteConnection(running.site_spec("/data", tmp_path))
        try:
            await story(site.remote("ns"))
        finally:
            await site.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def in_thread(function: Callable[[], object]) -> None:
    await asyncio.to_thread(function)


async def comes_back(remote: SftpRemote, name: bytes) -> float:
    """Seconds until the file can be looked at."""
    began = time.monotonic()
    while True:
        try:
            await remote.stat(name)
        except Unreachable:
            await asyncio.sleep(0.05)
        else:
            return time.monotonic() - began


async def fails(remote: SftpRemote) -> RemoteError:
    """What a request says once the mount has noticed that nobody is there."""
    while True:
        await asyncio.sleep(0.05)
        try:
            await remote.stat(b"")
        except RemoteError as error:
            return error


def test_cuts_in_the_middle_of_requests_are_not_noticed(
    running: Laptop, tmp_path: Path, data: Path
) -> None:
    """Reads, writes, exclusive creations, directories, renames and removals: none fails, and none
    is done twice."""
    content = random.Random(1).randbytes(20 * MIB)
    (data / "big").write_bytes(content)
    rounds = 30
    cuts = 0

    async def story(remote: SftpRemote) -> None:
        await remote.connect()
        cutting = asyncio.create_task(cut_again_and_again())
        for number in range(rounds):
            name = b"d%d" % number
            await remote.make_directory(name, 0o755)
            await put(remote, name + b"/new", content[: number * 10_000])
            await remote.rename(name + b"/new", name + b"/kept", replace=False)
            await remote.create(name + b"/lock", 0o600)
            await remote.remove(name + b"/lock")
            entry = await remote.stat(b"big")
            start = number * MIB // 2
            pieces = await remote.fetch(b"big", entry.version, start, 2 * MIB, 7)
            assert b"".join(pieces) == content[start : start + 2 * MIB]
        cutting.cancel()
        await asyncio.wait([cutting])

    async def cut_again_and_again() -> None:
        nonlocal cuts
        while True:
            await asyncio.sleep(0.03)
            await in_thread(running.cut)
            cuts += 1

    tell(running, tmp_path, story)
    assert cuts > 5
    for number in range(rounds):
        kept = data / f"d{number}" / "kept"
        assert kept.read_bytes() == content[: number * 10_000]
        assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_a_mount_follows_the_tunnel_to_its_new_place(
    running: Laptop, tmp_path: Path, data: Path
) -> None:
    (data / "file").write_bytes(b"content")

    async def story(remote: SftpRemote) -> None:
        entry = await remote.stat(b"file")
        assert await remote.fetch(b"file", entry.version, 0, 3, 7)
        for _ in range(3):
            await in_thread(running.deafen)
            await in_thread(running.listen)
            got = await remote.fetch(b"file", entry.version, 3, 4, 7)
            assert b"".join(got) == b"tent"

    tell(running, tmp_path, story)


def test_an_open_file_goes_on_where_the_old_place_only_fell_silent(
    running: Laptop, tmp_path: Path, data: Path
) -> None:
    """A login node holds a dead connection's forward: it accepts, and nothing comes of it."""
    (data / "file").write_bytes(b"content")

    async def story(remote: SftpRemote) -> None:
        entry = await remote.stat(b"file")
        running.silent = True
        reading = asyncio.create_task(remote.fetch(b"file", entry.version, 0, 7, 7))
        await asyncio.sleep(0.2)
        running.silent = False
        began = time.monotonic()
        await in_thread(running.listen)
        assert b"".join(await reading) == b"content"
        assert time.monotonic() - began < RETURN_SECONDS

    tell(running, tmp_path, story)


def test_a_sleeping_laptop_is_told_at_once_and_found_when_it_wakes(
    running: Laptop, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(line, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(line, "GRACE_SECONDS", 0.5)
    (data / "file").write_bytes(b"content")

    async def story(remote: SftpRemote) -> None:
        await remote.stat(b"file")
        running.silent = True
        error = await fails(remote)
        while "sleeps" not in error.message:
            error = await fails(remote)
        began = time.monotonic()
        for _ in range(5):
            with pytest.raises(Unreachable, match="the laptop lap does not answer"):
                await remote.stat(b"file")
        assert time.monotonic() - began < 0.1, "nobody waits for an attempt"
        running.silent = False
        await in_thread(running.listen)
        assert await comes_back(remote, b"file") < RETURN_SECONDS

    tell(running, tmp_path, story)


def test_a_tunnel_that_ended_is_known_at_once(
    running: Laptop, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with -9: its file is still there."""
    monkeypatch.setattr(line, "GRACE_SECONDS", 0.5)
    (data / "file").touch()

    async def story(remote: SftpRemote) -> None:
        await remote.stat(b"file")
        await in_thread(running.deafen)
        error = await fails(remote)
        while "not up any more" not in error.message:
            error = await fails(remote)
        assert "2026-11-25 10:00 UTC" in error.message
        await in_thread(running.withdraw)
        while "no tunnel named lap is up" not in error.message:
            error = await fails(remote)
        await in_thread(running.listen)
        assert await comes_back(remote, b"file") < RETURN_SECONDS

    tell(running, tmp_path, story)


def test_a_mount_may_be_there_before_the_tunnel(
    running: Laptop, tmp_path: Path, data: Path
) -> None:
    (data / "file").touch()
    running.deafen()
    running.withdraw()

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(Unreachable, match="no tunnel named lap is up: run 'hpcfs tunnel"):
            await remote.connect()
        await in_thread(running.listen)
        assert await comes_back(remote, b"file") < RETURN_SECONDS

    tell(running, tmp_path, story)


# --- who is there -------------------------------------------------------------------------------


def test_keys_of_another_tunnel_do_not_open_this_one(running: Laptop, tmp_path: Path) -> None:
    other = TunnelIdentity()
    running.publish(client_key=other.client_key_text)

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(AccessRefused):
            await remote.connect()
        with pytest.raises(AccessRefused):
            await remote.stat(b"")
        await in_thread(running.publish)
        while True:
            try:
                await remote.stat(b"")
            except AccessRefused:
                await asyncio.sleep(0.05)
            else:
                return

    tell(running, tmp_path, story)


def test_another_host_key_is_not_believed(running: Laptop, tmp_path: Path) -> None:
    running.publish(host_key=TunnelIdentity().host_key_line)

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(AccessRefused):
            await remote.connect()

    tell(running, tmp_path, story)


def test_a_file_that_points_at_another_tunnel_is_found_out(running: Laptop, tmp_path: Path) -> None:
    running.publish(id="f" * 32)

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(Unreachable, match="something else than this tunnel answers"):
            await remote.connect()

    tell(running, tmp_path, story)


def test_a_file_that_others_can_write_is_not_used(running: Laptop, tmp_path: Path) -> None:
    (running.directory / "lap.json").chmod(0o666)

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(WrongSettings, match="chmod go-rwx"):
            await remote.connect()

    tell(running, tmp_path, story)


def test_on_another_machine_it_is_said_where_the_tunnel_is(tmp_path: Path, data: Path) -> None:
    with laptop(tmp_path, Share("data", data)) as running:
        running.publish(login_host="login01.cluster")
        running.deafen()

        async def story(remote: SftpRemote) -> None:
            with pytest.raises(Unreachable, match=r"on login01.cluster\. .* --bind"):
                await remote.connect()

        tell(running, tmp_path, story)


def test_two_mounts_do_not_share_their_files(running: Laptop, tmp_path: Path, data: Path) -> None:
    async def story(remote: SftpRemote) -> None:
        other = TunnelSiteConnection(running.site_spec("/data", tmp_path))
        try:
            await put(remote, b"one", b"1")
            await put(other.remote("ns"), b"two", b"22")
            assert await get(remote, b"two") == b"22"
            assert len(running.call(lambda: running.mounts.all)) == 2
        finally:
            await other.close()
        assert await get(remote, b"one") == b"1"

    tell(running, tmp_path, story)


def test_what_a_mount_had_open_is_closed_when_it_leaves(
    running: Laptop, tmp_path: Path, data: Path
) -> None:
    (data / "file").write_bytes(b"content")

    async def story(remote: SftpRemote) -> None:
        entry = await remote.stat(b"file")
        await remote.fetch(b"file", entry.version, 0, 7, 7)
        assert running.served.open_files == 1

    tell(running, tmp_path, story)
    deadline = time.monotonic() + 10
    while running.served.open_files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.served.open_files == 0
    assert not running.call(lambda: running.mounts.all)
