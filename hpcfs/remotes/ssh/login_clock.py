"""Bounds what one login may take: its time, which stands still while the user is asked, and how
often and how long the user is asked. The questions may be a server's, who must not make them look
like somebody else's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpcfs.remotes.base import Prompter

_LINE_END = re.compile(r"\r\n|[\n\r\v\f\x85\u2028\u2029]")
LOGIN_SECONDS = 75.0
"""For a login that somebody takes part in, once the connection is made: a second factor may have to
be confirmed on a phone, of which nothing is seen here. Less than a mount waits for a login
(site/namespace.py)."""
MOST_QUESTIONS = 30
MOST_LETTERS = 4000
"""Of one question: a screen full."""


class LoginClock:
    """Bounds one login by seconds and by questions, and asks the user meanwhile."""

    def __init__(self, seconds: float, prompter: Prompter):
        self._seconds = seconds
        self._prompter = prompter
        self._timeout: asyncio.Timeout | None = None
        self._questions_left = MOST_QUESTIONS
        self.was_answered = False
        """Whether the user took part, as the next login would ask for again: typed something, or
        may have had to confirm it elsewhere."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raise TimeoutError where the block takes longer, questions apart."""
        try:
            async with asyncio.timeout(self._seconds) as self._timeout:
                yield
        finally:
            self._timeout = None

    @property
    def seconds(self) -> float:
        """For how long the login may take, questions apart."""
        return self._seconds

    def expect_person(self) -> None:
        """Leave the time to confirm the login on a phone, without a question to be seen here. It
        counts as one that the user took part in."""
        self.was_answered = True
        self._seconds = max(self._seconds, LOGIN_SECONDS)
        self._set(asyncio.get_running_loop().time() + self._seconds)

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        """Ask the user; None where nobody answers, or where there were enough questions: whoever is
        asked without end would at last type anything."""
        if self._questions_left == 0:
            return None
        self._questions_left -= 1
        if len(text) > MOST_LETTERS:
            half = MOST_LETTERS // 2
            text = f"{text[:half]} [...] {text[-half:]}"
        self._set(None)
        try:
            answer = await self._prompter.ask(text, echo=echo)
            self.was_answered = self.was_answered or answer is not None
            return answer
        finally:
            self._set(asyncio.get_running_loop().time() + self._seconds)

    def _set(self, when: float | None) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(when)


def said_by(who: str, text: str) -> str:
    """Put the name of who says it before each line: a line without one would pass for another
    program's question, for the passphrase of a key or another host's password. `who` is
    user@host."""
    return "\n".join(f"({who}) {line}" for line in _LINE_END.split(text))
