"""Compares what the server's disk has of an upload by hash (`verify = true`).

OpenSSH's SFTP has no such request; a shell beside it has sha256sum or shasum. One shell per
connection answers all, one after another. Where there is none (ForceCommand internal-sftp, a
restricted account, transport = "openssh" without a ControlMaster connection) that is logged once
per connection and uploads count as before, by their size.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence

import asyncssh

from hpcfs.remotes.base import ReportProgress, UploadSource
from hpcfs.remotes.ssh.shell import Shell, quoted

log = logging.getLogger(__name__)

START_SECONDS = 15.0
LEAST_BYTES_PER_SECOND = 10_000_000
"""The least that a loaded server reads and hashes."""
REPORT_SECONDS = 5.0
RANGES_AT_ONCE = 200
"""In one script: what a shell reads of a line is bounded."""
CHUNK_BYTES = 16 * 1024 * 1024
SMALL_BYTES = 1024 * 1024
"""Hashed at once: a thread would take longer."""

_SETUP = b"""\
h() { if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi; }
echo hpcfs-0 ready
"""
_READY = b"hpcfs-0 ready\n"
_LINE = re.compile(rb"hpcfs-(\d+) ([0-9a-f]*)")
HASH_DIGITS = 64

Ranges = Sequence[tuple[int, int]]


class Hasher:
    """Computes remote SHA-256 through one shell per connection."""

    def __init__(self, shown: str, open_shell: Callable[[], Awaitable[Shell | None]]) -> None:
        self._shown = shown
        self._open_shell = open_shell
        self._starting: asyncio.Task[Shell | None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._comparing = 0
        self._ended = False

    @property
    def is_busy(self) -> bool:
        """Whether something is being compared."""
        return self._comparing > 0

    async def is_same(
        self, path: bytes, ranges: Ranges, source: UploadSource, report: ReportProgress
    ) -> bool | None:
        """Return whether these ranges of the file, a whole one if it is its only range from 0 on,
        are those of the source; None where that can't be known. `path` starts with a slash."""
        self._comparing += 1
        try:
            return await self._is_same(path, ranges, source, report)
        finally:
            self._comparing -= 1

    async def _is_same(
        self, path: bytes, ranges: Ranges, source: UploadSource, report: ReportProgress
    ) -> bool | None:
        for start in range(0, len(ranges), RANGES_AT_ONCE):
            some = ranges[start : start + RANGES_AT_ONCE]
            there = await self._there(path, some, source.size, report)
            if len(there) != HASH_DIGITS:
                return None
            if there != await _here(some, source, report):
                return False
        return True

    async def _there(self, path: bytes, ranges: Ranges, size: int, report: ReportProgress) -> bytes:
        """The hash, or something else. Progress is reported meanwhile: reading a large file takes a
        while."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        shell = await asyncio.shield(self._starting)
        if shell is None or self._ended:
            return b""
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        shell.write(_script(number, path, ranges, size))
        total = sum(length for _, length in ranges)
        try:
            async with asyncio.timeout(START_SECONDS + total / LEAST_BYTES_PER_SECOND):
                while not answer.done():
                    await asyncio.wait([answer], timeout=REPORT_SECONDS)
                    report(total)
        except TimeoutError:
            log.warning("%s takes too long for the hash of a file", self._shown)
            shell.close()
            return b""
        finally:
            self._waiting.pop(number, None)
        return answer.result()

    # --- the shell ------------------------------------------------------------------------------

    async def _start(self) -> Shell | None:
        shell: Shell | None = None
        reason = "it grants no shell"
        try:
            async with asyncio.timeout(START_SECONDS):
                shell = await self._open_shell()
                if shell is not None and await _wait_ready(shell):
                    self._listening = asyncio.create_task(self._listen(shell))
                    return shell
        except TimeoutError:
            reason = "its shell does not answer"
        except (asyncssh.Error, OSError, ValueError) as error:
            reason = str(error)
        if shell is not None:
            shell.close()
        self._say_that_there_is_none(reason)
        return None

    def _say_that_there_is_none(self, reason: str) -> None:
        log.warning(
            "%s computes no hashes for us (%s): uploads are checked by their size only",
            self._shown,
            " ".join(reason.split()),
        )

    async def _listen(self, shell: Shell) -> None:
        try:
            while line := await shell.read_line():
                found = _LINE.match(line)
                waiting = self._waiting.get(int(found[1])) if found else None
                if found and waiting and not waiting.done():
                    waiting.set_result(found[2])
                    if len(found[2]) != HASH_DIGITS:
                        self._say_that_there_is_none("sha256sum or shasum failed there")
        except (asyncssh.Error, OSError, ValueError) as error:
            log.debug("the shell on %s: %s", self._shown, error)
        finally:
            self._ended = True
            shell.close()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_result(b"")


async def _wait_ready(shell: Shell) -> bool:
    """Wait until the shell is ready: what login scripts print comes before."""
    shell.write(_SETUP)
    while line := await shell.read_line():
        if line.endswith(_READY):
            return True
    return False


def _script(number: int, path: bytes, ranges: Ranges, size: int) -> bytes:
    """Return a script for sh. Names are only read through a redirection: sha256sum would mark some
    of them."""
    name = quoted(path)
    if list(ranges) == [(0, size)]:
        work = b"h <%s" % name
    else:
        parts = [b"tail -c +%d <%s | head -c %d" % (at + 1, name, length) for at, length in ranges]
        work = b"{ %s; } | h" % b"; ".join(parts)
    answer = b'"$(test -f %s && %s)"' % (name, work)
    return b"printf 'hpcfs-%d %%s\\n' %s\n" % (number, answer)


async def _here(ranges: Ranges, source: UploadSource, report: ReportProgress) -> bytes:
    """The hash of the ranges, one after another."""
    digest = hashlib.sha256()
    total = sum(length for _, length in ranges)
    for offset, length in _chunks(ranges):
        if total <= SMALL_BYTES:
            digest.update(source.read(offset, length))
            continue
        hashing = asyncio.create_task(asyncio.to_thread(_add, digest, source, offset, length))
        try:
            await asyncio.shield(hashing)
        except asyncio.CancelledError:
            await asyncio.wait([hashing])  # the source is closed once this has ended
            raise
        report(total)
    return digest.hexdigest().encode()


def _add(digest: hashlib._Hash, source: UploadSource, offset: int, length: int) -> None:
    digest.update(source.read(offset, length))


def _chunks(ranges: Ranges) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        for start in range(offset, offset + length, CHUNK_BYTES):
            yield start, min(CHUNK_BYTES, offset + length - start)
