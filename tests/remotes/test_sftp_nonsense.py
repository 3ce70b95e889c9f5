"""Answers of an SFTP server that make no sense: a few on purpose, and as many at random as wanted.

CI takes some twenty seconds of random ones. For a long run (a million takes half an hour):
    HPCFS_FUZZ_ANSWERS=1000000 pytest tests/remotes/test_sftp_nonsense.py
and a failure is run again with HPCFS_FUZZ_SEED, which it tells.
"""

from __future__ import annotations

import asyncio
import os
import resource
import stat
from collections.abc import Awaitable, Callable

import pytest
from asyncssh.constants import (
    FXP_DATA,
    FXP_INIT,
    FXP_LSTAT,
    FXP_READ,
    FXP_READDIR,
    FXP_REALPATH,
    FXP_STATUS,
    FXP_VERSION,
)
from asyncssh.packet import String, UInt32

from hpcfs.model.errors import NoService, ProtocolError, RemoteError, Unreachable
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.requests import MESSAGE_SECONDS
from hpcfs.remotes.sftp.stdio import Stdio
from tests.support.sftp_fuzzer import CONTENT, Fuzzer, complain
from tests.support.sftp_in_memory import with_length
from tests.support.virtual_time import VirtualLoop, run_virtually

ANSWERS = int(os.environ.get("HPCFS_FUZZ_ANSWERS", "0"))
SEED = int(os.environ.get("HPCFS_FUZZ_SEED", "0"))
RUN_ANSWERS = 3000
"""Changed ones, of one remote; then another begins."""
CI_RUNS = 6
GROWTH_BYTES = 200 * 1024 * 1024
"""The uploads of the story itself are of 16 MiB, and Python gives little back."""

pytestmark = [pytest.mark.timeout(0)] if ANSWERS else []

Twist = Callable[[int, bytes], bytes]


def test_answers_that_were_changed_at_random() -> None:
    runs = -(-ANSWERS // RUN_ANSWERS) if ANSWERS else CI_RUNS
    before = _peak_bytes()
    for number in range(runs):
        seed = SEED + number
        found = run_virtually(_fuzzed(seed))
        assert not found.findings, f"HPCFS_FUZZ_SEED={seed}\n{complain(found.findings)}"
        assert found.luck.changed >= RUN_ANSWERS
        assert found.outcomes["done"] > 20
        assert found.outcomes["ProtocolError"] > 20
        assert found.outcomes["a lie believed"] <= 1
    assert _peak_bytes() - before < GROWTH_BYTES


async def _fuzzed(seed: int) -> Fuzzer:
    fuzzer = Fuzzer(seed)
    await fuzzer.run(RUN_ANSWERS)
    return fuzzer


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- on purpose -----------------------------------------------------------------------------------


def meet(twist: Twist, story: Callable[[SftpRemote], Awaitable[None]]) -> None:
    """A story with a server whose answers go through `twist`, with the kind of their request."""

    async def main() -> None:
        fuzzer = Fuzzer(0)
        fuzzer.furnish()
        fuzzer.server.twist = twist
        async with asyncio.timeout(3600):
            await story(fuzzer.remote)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert not loop.complaints
        await fuzzer.site.close()

    run_virtually(main())


def once(kind: int, change: Callable[[bytes], bytes]) -> Twist:
    """Changes the first answer to a request of this kind."""
    left = [change]

    def twist(asked: int, answer: bytes) -> bytes:
        return left.pop()(answer) if asked == kind and left else answer

    return twist


def bad_status(answer: bytes) -> bytes:
    """A refusal whose words are none."""
    return with_length(bytes([FXP_STATUS]) + answer[5:9] + UInt32(4) + UInt32(2**31))


def bad_language(answer: bytes) -> bytes:
    return with_length(
        bytes([FXP_STATUS]) + answer[5:9] + UInt32(4) + String(b"Failure") + String(b"\xff")
    )


@pytest.mark.parametrize("change", [bad_status, bad_language])
def test_a_read_that_is_refused_in_no_words_ends(change: Callable[[bytes], bytes]) -> None:
    async def story(remote: SftpRemote) -> None:
        entry = await remote.stat(b"file")
        with pytest.raises(ProtocolError):
            await remote.fetch(b"file", entry.version, 0, entry.size, 1)
        found = await remote.fetch(b"file", entry.version, 0, entry.size, 1)
        assert b"".join(found) == CONTENT

    meet(once(FXP_READ, change), story)


def test_bytes_in_the_place_of_attributes_leave_nobody_waiting() -> None:
    def data(answer: bytes) -> bytes:
        return with_length(bytes([FXP_DATA]) + answer[5:9] + String(b"bytes"))

    async def story(remote: SftpRemote) -> None:
        with pytest.raises(Unreachable):
            await remote.stat(b"file")
        assert (await remote.stat(b"file")).size == len(CONTENT)

    meet(once(FXP_LSTAT, data), story)


def test_a_message_that_swallows_the_next_ones_ends() -> None:
    """Its length was wrong, so that the answers that follow count as the rest of it."""

    def longer(answer: bytes) -> bytes:
        return UInt32(1_000_000) + answer[4:]

    async def story(remote: SftpRemote) -> None:
        began = asyncio.get_running_loop().time()
        while not await _is_well(remote):
            pass
        took = asyncio.get_running_loop().time() - began
        assert MESSAGE_SECONDS < took < MESSAGE_SECONDS + 20

    meet(once(FXP_LSTAT, longer), story)


def test_a_message_that_comes_slowly_is_waited_for() -> None:
    """A piece of 256 KiB over a link of 3 kB/s."""

    async def story() -> float:
        loop = asyncio.get_running_loop()
        requests = Stdio().requests
        left = with_length(bytes(256 * 1024))
        while left:
            await asyncio.sleep(1.0)
            requests.received(left[:3000])
            left = left[3000:]
        assert not requests.ended
        return loop.time()

    assert run_virtually(story()) > MESSAGE_SECONDS


async def _is_well(remote: SftpRemote) -> bool:
    try:
        async with asyncio.timeout(10):
            return (await remote.stat(b"file")).size == len(CONTENT)
    except (TimeoutError, RemoteError):
        return False


@pytest.mark.parametrize(
    "first",
    [
        UInt32(20) + bytes([FXP_VERSION]) + UInt32(3) + b"cut off" + bytes(8),
        with_length(bytes([FXP_VERSION]) + UInt32(6)),
        with_length(bytes([77]) + UInt32(3)),
        bytes.fromhex("ffffffff02000000030000"),
        with_length(bytes([FXP_VERSION]) + UInt32(3)) * 2,
    ],
)
def test_a_first_message_that_makes_no_sense_is_forgotten(first: bytes) -> None:
    """Only what somebody wrote there is for a person to mend."""

    async def story(remote: SftpRemote) -> None:
        with pytest.raises((ProtocolError, Unreachable)):
            await remote.connect()
        await asyncio.sleep(60)
        await remote.connect()

    left = [first, first]
    meet(lambda kind, answer: left.pop() if kind == FXP_INIT and left else answer, story)


def test_what_a_login_script_prints_is_for_a_person_to_mend() -> None:
    async def story(remote: SftpRemote) -> None:
        for _ in range(2):
            with pytest.raises(NoService, match="Willkommen"):
                await remote.connect()
            await asyncio.sleep(600)

    meet(
        lambda kind, answer: b"Willkommen auf dem Cluster\n" if kind == FXP_INIT else answer, story
    )


def test_a_home_that_was_told_wrong_is_asked_for_again() -> None:
    def elsewhere(answer: bytes) -> bytes:
        return answer.replace(b"/home/tester", b"/home/nobody")

    async def story(remote: SftpRemote) -> None:
        assert (await remote.stat(b"file")).size == len(CONTENT)

    meet(once(FXP_REALPATH, elsewhere), story)


def test_a_type_that_is_none_is_found_out() -> None:
    mode = stat.S_IFREG | 0o644

    async def story(remote: SftpRemote) -> None:
        entry = await remote.stat(b"file")
        assert (entry.mode, entry.size) == (mode, len(CONTENT))
        (listed,) = [one async for page in remote.list(b"") for one in page if one.name == b"file"]
        assert listed.mode == mode

    def twist(kind: int, answer: bytes) -> bytes:
        is_look = kind in (FXP_LSTAT, FXP_READDIR)
        return answer.replace(UInt32(mode), UInt32(0o170644)) if is_look else answer

    meet(twist, story)
