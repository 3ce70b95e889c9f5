"""A server that twists its answers: each request of a mount ends well, or with an error that says
so, and nothing grows or stands still for it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hpcfs.model.errors import RemoteError
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from tests.remotes.contract import put
from tests.support.sftp_mutations import Mutator
from tests.support.sshd import ScriptedPrompter
from tests.support.wicked import (
    EXTENDED,
    EXTENDED_REPLY,
    INIT,
    STATUS,
    Twist,
    packet,
    status,
    string,
    wicked_server,
)

SECONDS = 2.0
"""What is not answered by then never is: the connection ends."""
BUSY_SECONDS = 1.0
FULL = 2**64 - 1

Request = Callable[[SftpRemote], Awaitable[object]]


async def _listed(remote: SftpRemote) -> None:
    async for page in remote.list(b""):
        for entry in page:
            assert entry.name not in (b"", b".", b"..")
            assert not set(entry.name) & set(b"/\0")
            assert entry.size >= 0


async def _fetched(remote: SftpRemote, name: bytes) -> None:
    entry = await remote.stat(name)
    length = min(entry.size, 2 * 1024 * 1024)
    pieces = await remote.fetch(name, entry.version, 0, length, len(name))
    assert sum(map(len, pieces)) <= length


async def _made_and_removed(remote: SftpRemote) -> None:
    await remote.create(b"gone", 0o644)
    await remote.remove(b"gone")


REQUESTS: dict[str, Request] = {
    "connect": lambda remote: remote.connect(),
    "stat": lambda remote: remote.stat(b"file"),
    "list": _listed,
    "fetch": lambda remote: _fetched(remote, b"file"),
    "fetch much": lambda remote: _fetched(remote, b"large"),
    "upload": lambda remote: put(remote, b"new", b"hello" * 1000),
    "replace": lambda remote: put(remote, b"file", b"content"),
    "mkdir": lambda remote: remote.make_directory(b"made", 0o755),
    "readlink": lambda remote: remote.read_link(b"link"),
    "symlink": lambda remote: remote.make_symlink(b"second", b"file"),
    "usage": lambda remote: remote.disk_usage(),
    "rename": lambda remote: remote.rename(b"link", b"other", replace=True),
    "create": _made_and_removed,
    "truncate": lambda remote: remote.truncate(b"file", 3),
}


def meet(base: Path, twist: Twist, caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """What came of each request: "done", or the name of an error."""
    found: dict[str, str] = {}

    async def main() -> None:
        async with wicked_server(base, twist) as wicked:
            (wicked.directory / "file").write_bytes(b"content")
            (wicked.directory / "large").write_bytes(os.urandom(3 * 1024 * 1024))
            (wicked.directory / "link").symlink_to("file")
            site = SshSiteConnection(wicked.spec, ScriptedPrompter())
            watching = asyncio.create_task(never_busy())
            for name, request in REQUESTS.items():
                asking = asyncio.ensure_future(request(site.remote("ns")))
                done, _ = await asyncio.wait([asking], timeout=SECONDS)
                if not done:
                    wicked.hang_up()
                try:
                    await asyncio.wait_for(asking, 10)
                    found[name] = "done"
                except RemoteError as error:
                    found[name] = type(error).__name__
            assert not watching.done()
            watching.cancel()
            await asyncio.wait_for(site.close(), 10)

    async def never_busy() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            assert time.monotonic() - before < BUSY_SECONDS

    asyncio.run(main())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    return found


@pytest.mark.parametrize("seed", range(4))
def test_answers_that_were_twisted_at_random(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    luck = random.Random(seed)
    mutator = Mutator(luck)

    def twist(kind: int, answer: bytes) -> bytes:
        return answer if kind == INIT or luck.random() < 0.8 else mutator.change(answer).sent

    assert len(meet(tmp_path, twist, caplog)) == len(REQUESTS)


def _limits(*numbers: int) -> Twist:
    def twist(kind: int, answer: bytes) -> bytes:
        if kind != EXTENDED or len(answer) != 9 + 4 * 8:
            return answer
        return packet(bytes([EXTENDED_REPLY]) + answer[5:9] + struct.pack(">4Q", *numbers))

    return twist


@pytest.mark.parametrize(
    "numbers", [(1, 1, 1, 1), (34000, 5, 5, 1), (0, 0, 0, 0), (FULL, FULL, FULL, FULL)]
)
def test_limits_that_no_server_has(
    tmp_path: Path, numbers: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Pieces of one byte would be three million requests for a file of three megabytes."""
    found = meet(tmp_path, _limits(*numbers), caplog)
    assert found["fetch much"] == found["upload"] == "done"


TWISTS: dict[str, Twist] = {
    "a refusal of megabytes, with escapes": lambda kind, answer: (
        status(answer, 4, b"\x1b]0;x\x07\xff" * 500_000) if kind in (3, 7, 11) else answer
    ),
    "success for what has an answer": lambda kind, answer: (
        status(answer, 0) if kind in (3, 5, 7, 11, 12, 19) else answer
    ),
    "codes that are none": lambda kind, answer: (
        status(answer, 2**32 - 1) if kind in (3, 7, 11) else answer
    ),
    "ten thousand extensions": lambda kind, answer: (
        packet(answer[4:] + b"".join(string(b"x%d" % n) + string(b"1") for n in range(10_000)))
        if kind == INIT
        else answer
    ),
    "a handle of a megabyte": lambda kind, answer: (
        packet(answer[4:9] + string(b"h" * 2**20)) if kind in (3, 11) else answer
    ),
    "answers that nobody asked for": lambda kind, answer: (
        b"".join(status(bytes(5) + struct.pack(">I", n), 0) for n in range(1000))
        if kind == 7
        else answer
    ),
    "nothing read, again and again": lambda kind, answer: (
        packet(answer[4:9] + string(b"")) if kind == 5 and answer[4] != STATUS else answer
    ),
    "a length of 2 GiB": lambda kind, answer: (
        packet(answer[4:9] + struct.pack(">I", 2**31) + b"x") if kind == 5 else answer
    ),
    "no names, again and again": lambda kind, answer: (
        packet(bytes([104]) + answer[5:9] + bytes(4)) if kind == 12 else answer
    ),
    "a name of four megabytes": lambda kind, answer: (
        packet(
            answer[4:9] + struct.pack(">I", 1) + string(b"n" * 4_000_000) + string(b"") + bytes(4)
        )
        if kind in (12, 16, 19) and answer[4] == 104
        else answer
    ),
}


@pytest.mark.parametrize("twist", TWISTS)
def test_answers_that_were_twisted_on_purpose(
    tmp_path: Path, twist: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(meet(tmp_path, TWISTS[twist], caplog)) == len(REQUESTS)
