"""Servers that work for long on one request, over connections that are alive."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcfs.remotes import life
from hpcfs.remotes.sftp import working
from hpcfs.remotes.sftp.remote import SftpRemote
from tests.remotes.contract import put
from tests.remotes.test_sftp_uploads import content, on_folder
from tests.support.sshd import SshServer, sftp_server_binary, ssh_server

OUTER = 30.0
LARGE = 3 * 1024 * 1024


@pytest.fixture(autouse=True)
def _short_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "REPORT_SECONDS", 0.05)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A server whose SFTP is a program of its own, apart from what keeps the connection."""
    directory = tmp_path_factory.mktemp("worker") / "server"
    with ssh_server(directory, subsystem=sftp_server_binary()) as server:
        yield server


def servers(sshd: SshServer) -> list[int]:
    return [pid for pid in sshd.sessions() if b"sftp-server" in _line(pid).split(b"\0")[0]]


def _line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def stop(sshd: SshServer) -> list[int]:
    """What they were asked takes them long from now on, as fsync does on a busy disk."""
    found = servers(sshd)
    assert found
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


@contextmanager
def going_on(pids: list[int]) -> Iterator[None]:
    """Have them go on after the block; the caller adds them."""
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def until_told(told: asyncio.Event, call: asyncio.Task[Any]) -> None:
    """Return when life is reported while the call waits."""
    telling = asyncio.create_task(told.wait())
    async with asyncio.timeout(OUTER):
        await asyncio.wait([telling, call], return_when=asyncio.FIRST_COMPLETED)
    assert told.is_set(), "the call ended first"
    assert not call.done()


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
@pytest.mark.parametrize("size", [100, LARGE])
def test_an_upload_whose_server_works_for_long_is_alive(
    size: int, transport: str, worker: SshServer
) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        told, stopped = asyncio.Event(), list[int]()
        body = content(size)
        await remote.create(b"f", 0o644, 1)
        with going_on(stopped), life.reported_to(told.set):
            stopped += stop(worker)
            call = asyncio.create_task(put(remote, b"f", body, sync=True, handle=1))
            await until_told(told, call)
        async with asyncio.timeout(OUTER):
            await call
        assert (folder / "f").read_bytes() == body

    on_folder(worker, story, transport)


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_a_read_that_takes_the_server_long_is_alive(worker: SshServer, transport: str) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        told, stopped = asyncio.Event(), list[int]()
        body = content(1000)
        (folder / "f").write_bytes(body)
        version = (await remote.stat(b"f")).version
        await remote.fetch(b"f", version, 0, 10, 1)
        with going_on(stopped), life.reported_to(told.set):
            stopped += stop(worker)
            call = asyncio.create_task(remote.fetch(b"f", version, 0, len(body), 1))
            await until_told(told, call)
        async with asyncio.timeout(OUTER):
            assert b"".join(await call) == body

    on_folder(worker, story, transport)
