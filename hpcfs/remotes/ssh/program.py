"""Runs a program of the user's that a login needs: `ssh`, or a ProxyCommand.

It runs in a session of its own: no terminal but ours asks, and what it starts can end with it. No
secret is on a command line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO

from hpcfs.system import limits
from hpcfs.system.text import one_line

log = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
"""Each for ending by itself, and for ending when told to."""
LINES_KEPT = 40
LINE_BYTES = 300
MOST_SAID = 1024 * 1024


async def run(
    line: list[str],
    ends: tuple[int, int, int],
    environ: Mapping[str, str] | None = None,
) -> Process:
    """Start a program in a process group of its own. Raises OSError where it can't be started."""
    stdin, stdout, stderr = ends
    process = await asyncio.create_subprocess_exec(
        *line, stdin=stdin, stdout=stdout, stderr=stderr, env=environ, start_new_session=True
    )
    limits.give_back(process.pid)
    return process


async def ask(
    line: list[str], seconds: float, given: int = DEVNULL
) -> tuple[int | None, bytes, bytes]:
    """Run a program to its end -> its exit code, and what it said on stdout and stderr.

    Raises TimeoutError after `seconds`, and OSError where it can't be started. It writes to files:
    a process that a `Match exec` left in the background may hold a pipe open for ever.
    """
    with _memory("stdout") as answer, _memory("stderr") as complaint:
        process = await run(line, (given, answer.fileno(), complaint.fileno()))
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        finally:
            end(process, signal.SIGKILL)
            await process.wait()
        answer.seek(0)
        complaint.seek(0)
        return process.returncode, answer.read(MOST_SAID), complaint.read(MOST_SAID)


def _memory(name: str) -> BinaryIO:
    return os.fdopen(os.memfd_create(name), "w+b")


def end(process: Process, how: signal.Signals) -> None:
    """The program and what it started, if it still runs."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)


class Program:
    """A running program, its stderr going to the log as what `name` says. `socket` is at its stdin
    and stdout; it belongs to whoever makes a transport of it."""

    def __init__(
        self, name: str, process: Process, ours: socket.socket, errors: socket.socket
    ) -> None:
        self.pid = process.pid
        self._name = name
        self.socket = ours
        self._errors = errors
        self._process = process
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(
        cls, name: str, line: list[str], environ: Mapping[str, str] | None = None
    ) -> Program:
        """Start a program with a socket at its stdin and stdout. Raises OSError where it can't be
        started.

        asyncio's own pipe for stderr would not do: asyncio waits for its end too, and a process
        that a ProxyCommand left in the background may hold it open for ever.
        """
        ours, theirs = socket.socketpair()
        errors, their_errors = socket.socketpair()
        try:
            with theirs, their_errors:
                ends = theirs.fileno(), theirs.fileno(), their_errors.fileno()
                process = await run(line, ends, environ)
        except BaseException:
            ours.close()
            errors.close()
            raise
        return cls(name, process, ours, errors)

    async def _listen(self) -> None:
        stderr, writer = await asyncio.open_connection(sock=self._errors)
        rest = b""
        try:
            while chunk := await stderr.read(4096):
                *lines, rest = (rest + chunk).split(b"\n")
                rest = rest[:LINE_BYTES]
                for line in lines:
                    self._heard(line)
        finally:
            self._heard(rest)
            writer.close()

    def _heard(self, line: bytes) -> None:
        text = one_line(line[:LINE_BYTES].decode(errors="replace"))
        if text:
            log.info("%s says: %s", self._name, text)
            self._lines.append(text)

    async def last_words(self) -> tuple[int | None, list[str]]:
        """Return its exit code and what it wrote on stderr, once it has ended; where it does not,
        it is ended, and the code is None."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._process.wait()
                await asyncio.shield(self._listening)
        code = self._process.returncode
        await self.close()
        return code, list(self._lines)

    async def close(self) -> None:
        """End the program and wait for it."""
        end(self._process, signal.SIGTERM)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            end(self._process, signal.SIGKILL)
            await self._process.wait()
        self._listening.cancel()
        await asyncio.wait([self._listening])
