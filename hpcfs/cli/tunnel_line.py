"""The status line of `hpcfs tunnel` on a terminal, redrawn each second."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hpcfs.cli import terminal
from hpcfs.cli.output import ago, complain, size
from hpcfs.laptop.status import TunnelStatus
from hpcfs.system.text import printable

_CLEAR = "\r\x1b[K"


class TunnelStatusLine:
    """The status line. Questions interrupt it. Where stderr is no terminal nothing is drawn."""

    def __init__(self) -> None:
        self._draws = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._notes: list[str] = []

    def ask(self, text: str, echo: bool) -> str | None:
        """Clear the line and ask the user."""
        with self._lock:
            self._write(_CLEAR)
            return terminal.ask(text, echo)

    def show(self, status: TunnelStatus) -> None:
        """Draw the status, unless a question may be on the screen."""
        if not self._draws or not self._lock.acquire(blocking=False):
            return
        try:
            self._write(_CLEAR)
            if status.state == "up" and status.notes != self._notes:
                self._notes = status.notes
                for note in status.notes:
                    complain(note)
            width = shutil.get_terminal_size().columns - 1
            self._write(printable(sentence(status))[:width])
        finally:
            self._lock.release()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Clear the line when the block ends."""
        try:
            yield
        finally:
            self._write(_CLEAR)

    def _write(self, text: str) -> None:
        if self._draws:
            sys.stderr.write(text)
            sys.stderr.flush()


def sentence(status: TunnelStatus) -> str:
    """Return the status as one sentence."""
    if status.state == "connecting":
        return f"connecting to {status.host}"
    if status.state == "lost":
        when = "now" if status.next_try is None else f"in {status.next_try:.0f} s"
        return f"reconnecting to {status.host}, next try {when}: {status.reason}"
    hosts = sorted({seen.host for seen in status.mounts})
    users = f"mounted on {', '.join(hosts)}" if hosts else "no mount is connected"
    rates = f"up {size(round(status.up_rate))}/s, down {size(round(status.down_rate))}/s"
    return f"{status.name} at {status.host} for {ago(status.since)}: {users}; {rates}"
