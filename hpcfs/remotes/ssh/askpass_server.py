"""Brings the questions of a child `ssh` to the user: SSH_ASKPASS with a socket behind it.

ssh runs a program for each question (askpass.py), which hands it over through a socket in a
directory that only this user may enter, and gets the answer back. Nothing typed is stored, logged
or put on a command line. Directory and socket live as long as the login takes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from hpcfs.model.errors import SetupError, WrongSettings
from hpcfs.remotes.ssh import askpass
from hpcfs.remotes.ssh.login_clock import LoginClock, said_by
from hpcfs.system import temporary

log = logging.getLogger(__name__)

_OF_A_SERVER = re.compile(r"\(([^()\s]+@[^()\s]+)\) ")
"""How ssh marks the beginning of what a server asks."""
_DECISION = re.compile(r"\(yes/no|[Pp]lease type 'yes'")
"""ssh's question about a host key, whose answer is no secret."""


class AskpassServer:
    """Answers the questions of one ssh. `unanswered` is the one that nobody was there to answer."""

    def __init__(self, clock: LoginClock, folder: Path) -> None:
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self.program = folder / "askpass"
        self.socket = folder / "socket"
        self.unanswered: str | None = None

    @property
    def environ(self) -> dict[str, str]:
        """Versions before 8.4 know no SSH_ASKPASS_REQUIRE and want a DISPLAY."""
        return {
            "DISPLAY": "none",
            **os.environ,
            "SSH_ASKPASS": str(self.program),
            "SSH_ASKPASS_REQUIRE": "force",
            askpass.SOCKET_VARIABLE: str(self.socket),
        }

    def write_program(self) -> None:
        """Write the program that ssh runs as SSH_ASKPASS."""
        words = shlex.join([sys.executable, "-IS", os.path.abspath(askpass.__file__)])
        self.program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.program.chmod(0o700)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bring one question of ssh to the user and the answer back."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            text = os.fsdecode(await reader.read())
            answer = await self._ask(text)
            if answer is not None:
                writer.write(askpass.ANSWERED + os.fsencode(answer))
        except ConnectionError as error:
            log.debug("ssh gave a question up: %s", error)
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _ask(self, text: str) -> str | None:
        if self.unanswered is not None:
            return None
        asked = text
        if found := _OF_A_SERVER.match(text):
            asked = said_by(found[1], text[found.end() :])
        answer = await self._clock.ask(asked, echo=is_decision(text) and not found)
        if answer is None:
            self.unanswered = text
        return answer

    async def end(self) -> None:
        """Give up the questions that are open."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_decision(question: str) -> bool:
    """Return whether ssh asks for "yes" or "no", and not for a secret."""
    return _DECISION.search(question) is not None


@asynccontextmanager
async def asking(clock: LoginClock) -> AsyncIterator[AskpassServer]:
    """Yield a server for the questions of one ssh. Raises WrongSettings where there is no place for
    a socket and a program."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary.directory("hpcfs-ssh-"))
        except SetupError as error:
            raise WrongSettings(f"ssh could ask nothing: {error}") from error
        answerer = AskpassServer(clock, folder)
        try:
            answerer.write_program()
            server = await asyncio.start_unix_server(answerer.answer, answerer.socket)
        except OSError as error:
            raise WrongSettings(
                f"ssh could ask nothing, since {folder} takes no socket ({error}): "
                "set TMPDIR to a local directory with a short name"
            ) from error
        try:
            yield answerer
        finally:
            server.close()
            await answerer.end()
