"""Asks the user on the terminal, while there still is one: passwords, second factors, host keys.

Reads /dev/tty rather than stdin, as ssh and sudo do, but only if stdin is a terminal too: a mount
from a script must fail with a reason instead of waiting for somebody who is not there.
"""

from __future__ import annotations

import os
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hpcfs.system.text import printable

_one_question_at_a_time = threading.Lock()


def ask(text: str, echo: bool) -> str | None:
    """Ask the user; return the typed text without its newline, None where there is nobody to
    ask."""
    with _one_question_at_a_time:
        terminal = _open_terminal()
        if terminal is None:
            return None
        try:
            return _ask_on(terminal, text, echo=echo)
        finally:
            os.close(terminal)


def _open_terminal() -> int | None:
    try:
        if not os.isatty(0):
            return None
        return os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # no controlling terminal: nobody to ask
        return None


def _ask_on(terminal: int, text: str, *, echo: bool) -> str | None:
    before = termios.tcgetattr(terminal)
    wanted = termios.tcgetattr(terminal)
    if not echo:
        wanted[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, wanted)
        os.write(terminal, _shown(text).encode(errors="replace"))
        line = _read_line(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        if not echo:
            os.write(terminal, b"\n")
    return line


def _read_line(terminal: int) -> str | None:
    """Read a line. Ctrl-D on an empty line declines to answer: None."""
    received = b""
    while not received.endswith(b"\n"):
        chunk = os.read(terminal, 4096)
        if not chunk:
            break
        received += chunk
    if not received:
        return None
    return received.rstrip(b"\r\n").decode(errors="surrogateescape")


def _shown(text: str) -> str:
    """Return the prompt with printable characters and newlines only, since prompts come from
    servers."""
    clean = "\n".join(map(printable, text.split("\n")))
    return clean if clean.endswith((" ", "\n")) else f"{clean} "


@contextmanager
def restored() -> Iterator[None]:
    """Restore the terminal's modes afterwards: Ctrl-C at a password leaves the echo off."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal went away: nothing to put back
            termios.tcsetattr(0, termios.TCSADRAIN, before)
