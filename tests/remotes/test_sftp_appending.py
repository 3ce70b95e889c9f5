"""What programs appended, on a real server: where it lands, and that it lands once."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest import mock

import asyncssh
import pytest

from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import Conflict, RemoteFailure, Unreachable
from hpcfs.model.sites import SftpRoot, SiteSpec
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.sftp.remote import SftpRemote
from tests.remotes.contract import MemorySource
from tests.remotes.test_sftp import on
from tests.support.sshd import SshServer

Story = Callable[[SftpRemote, Path], Awaitable[None]]
OLD = b"a line\n" * 150
BASE = b"1050:7"
SIZES = [1, 10, 300_000, 3_000_000]
"""One write, and several; below and above what goes in one flight."""


def on_folder(sshd: SshServer, story: Story, *, verify: bool = False) -> None:
    folder = sshd.root / f"appended-{random.getrandbits(64):x}"
    folder.mkdir()
    spec = sshd.site_spec(str(folder))
    if verify:
        spec = SiteSpec(spec.site, {"ns": SftpRoot(str(folder), verify=True)}, spec.state_dir, 0, 0)
    on(spec, lambda remote: story(remote, folder))


async def append(
    remote: SftpRemote,
    tail: bytes,
    *,
    old: bytes = OLD,
    base_version: bytes | None = BASE,
    mtime: int | None = None,
) -> Entry:
    """`tail`, to what was `old` when it was opened."""
    whole = old + tail
    request = UploadRequest(
        b"log",
        len(whole),
        len(old),
        [(len(old), len(tail))],
        Attributes(mtime_ns=mtime, atime_ns=mtime),
        0o644,
        base_version=base_version,
        append=True,
    )
    return await remote.upload(request, MemorySource(whole), lambda done: None)


def tail_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("there", [OLD, OLD + b"theirs\n", b"cut\n", b""])
def test_it_goes_where_the_file_ends(sshd: SshServer, size: int, there: bytes) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(there)
        entry = await append(remote, tail_of(size), mtime=10**18)
        assert (folder / "log").read_bytes() == there + tail_of(size)
        assert (entry.size, entry.mtime_ns) == (len(there) + size, 10**18)
        assert entry.version == (await remote.stat(b"log")).version

    on_folder(sshd, story, verify=size == 300_000)


@pytest.mark.parametrize("size", SIZES)
def test_a_server_that_can_not_append_is_told_where(sshd: SshServer, size: int) -> None:
    """As Go's, whose files that are open for appending take no offsets."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(OLD + b"theirs\n")
        session = (await remote._place(b"")).session
        write = session.bulk.write

        async def refused(handle: bytes, offset: int, data: bytes) -> int:
            if session.appends:
                raise asyncssh.SFTPFailure("invalid use of WriteAt on file opened with O_APPEND")
            return await write(handle, offset, data)

        tail = tail_of(size)
        with mock.patch.object(session.bulk, "write", refused):
            with pytest.raises(RemoteFailure):
                await append(remote, tail)
            session.appends = False
            await append(remote, tail)
        assert (folder / "log").read_bytes() == OLD + b"theirs\n" + tail

    on_folder(sshd, story)


def test_the_flag_is_done_without_once_it_failed(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(OLD)
        session = (await remote._place(b"")).session
        write, calls = session.bulk.write, 0

        async def refused_once(handle: bytes, offset: int, data: bytes) -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise asyncssh.SFTPFailure("no appending here")
            return await write(handle, offset, data)

        with mock.patch.object(session.bulk, "write", refused_once):
            await append(remote, b"ours\n")
            assert not session.appends
        assert (folder / "log").read_bytes() == OLD + b"ours\n"

    on_folder(sshd, story)


@pytest.mark.parametrize("size", SIZES)
def test_an_attempt_whose_answer_was_lost_is_found(sshd: SshServer, size: int) -> None:
    tail = tail_of(size)

    async def story(remote: SftpRemote, folder: Path) -> None:
        for theirs_before, theirs_after in [
            (b"", b""),
            (b"x\n", b""),
            (b"", b"y\n"),
            (b"x\n",) * 2,
        ]:
            there = OLD + theirs_before + tail + theirs_after
            (folder / "log").write_bytes(there)
            entry = await append(remote, tail, base_version=None)
            assert (folder / "log").read_bytes() == there
            assert entry.size == len(there)

    on_folder(sshd, story)


@pytest.mark.parametrize("begun", [300, 255 * 1024, 1_000_000])
def test_an_attempt_that_was_cut_off_goes_on(sshd: SshServer, begun: int) -> None:
    tail = tail_of(3_000_000)

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(OLD + b"theirs\n" + tail[:begun])
        await append(remote, tail, base_version=None)
        assert (folder / "log").read_bytes() == OLD + b"theirs\n" + tail

    on_folder(sshd, story)


def test_bytes_that_only_begin_alike_are_no_attempt(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(OLD + b"step 1 of theirs\n")
        await append(remote, b"step 1 of ours\n", base_version=None)
        assert (folder / "log").read_bytes() == OLD + b"step 1 of theirs\nstep 1 of ours\n"
        (folder / "log").write_bytes(OLD + b"ste")
        await append(remote, b"step 1 of ours\n", base_version=None)
        assert (folder / "log").read_bytes() == OLD + b"stestep 1 of ours\n"

    on_folder(sshd, story)


def test_a_connection_that_is_lost_meanwhile(sshd: SshServer) -> None:
    tail = tail_of(3_000_000)

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(OLD)
        session = (await remote._place(b"")).session
        write, calls = session.bulk.write, 0

        async def lost(handle: bytes, offset: int, data: bytes) -> int:
            nonlocal calls
            calls += 1
            if calls == 4:
                await session.close()
            return await write(handle, offset, data)

        with mock.patch.object(session.bulk, "write", lost), pytest.raises(Unreachable):
            await append(remote, tail)
        with (folder / "log").open("ab") as log:
            log.write(b"theirs\n")
        async with asyncio.timeout(20):
            await append(remote, tail, base_version=None)
        found = (folder / "log").read_bytes()
        assert found.startswith(OLD)
        assert found.endswith(b"theirs\n" + tail)

    on_folder(sshd, story)


def test_a_file_that_is_gone_is_a_conflict(sshd: SshServer) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        for base_version in (BASE, None):
            with pytest.raises(Conflict):
                await append(remote, b"ours\n", base_version=base_version)
        assert os.listdir(folder) == []

    on_folder(sshd, story)


def test_nothing_is_lost_between_two_who_append(sshd: SshServer) -> None:
    """The look before the write gives nobody the time to be overwritten."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        (folder / "log").write_bytes(OLD)
        script = "i=0; while [ $i -lt 4000 ]; do echo their line $i; i=$((i+1)); done"
        job = await asyncio.create_subprocess_shell(f"({script}) >> {folder / 'log'}")
        for number in range(100):
            await append(remote, b"our line %d\n" % number)
        assert await job.wait() == 0
        found = (folder / "log").read_bytes().removeprefix(OLD).splitlines()
        assert [line for line in found if line.startswith(b"our")] == [
            b"our line %d" % number for number in range(100)
        ]
        assert [line for line in found if line.startswith(b"their")] == [
            b"their line %d" % number for number in range(4000)
        ]

    on_folder(sshd, story)
