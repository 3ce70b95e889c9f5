"""The seam when the transfer process stalls, talks nonsense or is slow to obey."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
import uvloop

from hpcfs.model.entries import Entry
from hpcfs.model.errors import RemoteError, TimedOut, Unreachable
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.protocol import messages as m
from hpcfs.protocol.messages import Fetch, Fetched, Stat
from hpcfs.site import client as client_module
from hpcfs.site.client import SiteClient
from hpcfs.site.worker_process import WorkerProcess
from hpcfs.worker.cache_io import CacheDisk
from hpcfs.worker.main import DaemonConnection, DaemonGone, Worker
from tests.support.memory_remote import MemoryRemote

SECONDS = 30.0
NOBODY = "http://127.0.0.1:1"
"""An endpoint where nobody listens: the process itself answers every call, with Unreachable."""


def start(directory: Path) -> m.Start:
    site = S3Site(NOBODY, "us-east-1", None, Secret("AKIAHPCFSTEST"), Secret("secret"))
    return m.Start(SiteSpec(site, {"ns": S3Root("bucket")}, str(directory), 0, 0))


@asynccontextmanager
async def site_client(directory: Path) -> AsyncIterator[SiteClient]:
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            yield SiteClient(start(directory), directory / "log", nursery)
            nursery.cancel_scope.cancel()


async def answers(client: SiteClient) -> int:
    """The pid of the process that answered."""
    with pytest.raises(Unreachable) as caught:
        await client.call("ns", Stat(b"x"), Entry)
    assert "127.0.0.1:1" in caught.value.message, "the process answered, not the client"
    assert client.pid
    return client.pid


async def until_answered(client: SiteClient) -> int:
    while True:
        try:
            return await answers(client)
        except AssertionError:  # "just ended": a new process is started a second later
            await trio.lowlevel.checkpoint()


def test_calls_that_time_out_leave_the_stream_whole(tmp_path: Path) -> None:
    """More than the socket's buffer takes, so that a frame is cut where sending waits."""
    large = b"x" * 100_000

    async def give_up(client: SiteClient) -> None:
        with pytest.raises(TimedOut):
            await client.call("ns", Stat(large), Entry, timeout=0.2)

    async def story() -> None:
        async with site_client(tmp_path) as client:
            pid = await answers(client)
            os.kill(pid, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(give_up, client)
            os.kill(pid, signal.SIGCONT)
            assert await answers(client) == pid

    trio.run(story)


def test_a_fetch_ends_before_anybody_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_CONFIRM_SECONDS", 0.2)

    async def story() -> None:
        async with site_client(tmp_path) as client:
            pid = await answers(client)
            os.kill(pid, signal.SIGSTOP)
            request = Fetch(b"x", b"v", 0, 1, str(tmp_path / "file"), 1)
            with pytest.raises(RemoteError):
                await client.call("ns", request, Fetched, timeout=0.2)
            with pytest.raises(ProcessLookupError):  # else it might still write
                os.kill(pid, 0)
            assert await until_answered(client) != pid

    trio.run(story)


def test_the_end_of_the_mount_waits_for_no_fetch(tmp_path: Path) -> None:
    async def story() -> None:
        async with site_client(tmp_path) as client:
            os.kill(await answers(client), signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                request = Fetch(b"x", b"v", 0, 1, str(tmp_path / "file"), 1)
                nursery.start_soon(client.call, "ns", request, Fetched)
                await trio.testing.wait_all_tasks_blocked()
                client._nursery.cancel_scope.cancel()
                nursery.cancel_scope.cancel()

    trio.run(story)


def test_a_fetch_that_obeys_keeps_its_process(tmp_path: Path) -> None:
    async def story() -> None:
        async with site_client(tmp_path) as client:
            pid = await answers(client)
            request = Fetch(b"x", b"v", 0, 1, str(tmp_path / "file"), 1)
            with pytest.raises(RemoteError):
                await client.call("ns", request, Fetched, timeout=0.0)
            assert await answers(client) == pid

    trio.run(story)


@pytest.mark.parametrize("said", [b"\0\0\0\1\xff", b"\xff\xff\xff\xff", b"\0\0\0\1\x81"])
def test_nonsense_ends_the_process_alone(
    said: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"import os, sys\nos.write(int(sys.argv[1]), {said!r})\nsys.stdin.read()"

    async def story() -> None:
        ours, theirs = socket.socketpair()
        files, their_files = socket.socketpair()
        with theirs, their_files:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-c", code, str(theirs.fileno())], pass_fds=(theirs.fileno(),)
            )
        child = WorkerProcess(process, ours, files)
        with trio.fail_after(SECONDS):
            await child.run(lambda message: None)
        assert child.ended
        assert process.returncode is not None
        with pytest.raises(Unreachable):
            child.send(start(tmp_path))

    with caplog.at_level(logging.ERROR):
        trio.run(story)
    assert "can't be understood" in caplog.text


def test_an_answer_that_comes_late_is_no_answer_to_the_next_question() -> None:
    """A code that was typed for one host is not for another."""

    async def story() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        connection = DaemonConnection(reader, writer)
        with theirs:
            first = asyncio.create_task(connection.ask("Token of host a: "))
            number = await asyncio.to_thread(_number_of_question, theirs)
            first.cancel()
            await asyncio.wait([first])
            second = asyncio.create_task(connection.ask("Password of host b: "))
            next_number = await asyncio.to_thread(_number_of_question, theirs)
            connection.answered(m.Answer(number, Secret("123456")))
            connection.answered(m.Answer(next_number, Secret("password")))
            assert await second == "password"
        writer.close()

    uvloop.run(story())


def _number_of_question(theirs: socket.socket) -> int:
    (length,) = m.FRAME_HEADER.unpack(theirs.recv(m.FRAME_HEADER.size, socket.MSG_WAITALL))
    body = theirs.recv(length, socket.MSG_WAITALL)
    question = msgspec.msgpack.decode(body, type=m.FromWorker)
    assert isinstance(question, m.Question)
    return question.id


def test_what_ends_after_the_daemon_was_killed_tells_nobody() -> None:
    async def story() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        connection = DaemonConnection(reader, writer)
        theirs.close()
        writer.transport.abort()
        await asyncio.sleep(0)
        connection.send_soon(m.Reply(1))
        with pytest.raises(DaemonGone):
            await connection.send(m.Reply(1))

    uvloop.run(story())


def test_a_listing_goes_on_quietly_after_the_daemon_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon is gone between two pages."""

    class Remote(MemoryRemote):
        async def list(self, path: bytes) -> AsyncGenerator[Sequence[Entry], None]:
            yield [await self.stat(b"")]
            theirs.close()
            writer.transport.abort()
            await asyncio.sleep(0)
            yield [await self.stat(b"")]

    class OneRemote:
        def remote(self, namespace: str) -> Remote:
            return remote

    async def story() -> None:
        nonlocal writer
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        worker = Worker(DaemonConnection(reader, writer), OneRemote(), CacheDisk())  # type: ignore[arg-type]
        await worker._answer(m.Call(1, "ns", m.List(b"")))

    remote = Remote("sftp")
    ours, theirs = socket.socketpair()
    writer: Any = None
    with caplog.at_level(logging.ERROR):
        uvloop.run(story())
    assert not caplog.records
