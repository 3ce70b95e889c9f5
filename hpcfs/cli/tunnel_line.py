"""What `hpcfs tunnel` shows while it runs: one line, drawn anew each second, on a terminal."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hpcfs.cli import terminal
from hpcfs.cli.output import ago, complain, printable, size
from hpcfs.laptop.status import TunnelStatus

_CLEAR = "\r\x1b[K"


class TunnelStatusLine:
    """Questions have the terminal for themselves. Where stderr is no terminal nothing is drawn."""

    def __init__(self) -> None:
        self._draws = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._notes: list[str] = []

    def ask(self, text: str, echo: bool) -> str | None:
        with self._lock:
            self._write(_CLEAR)
            return terminal.ask(text, echo)

    def show(self, status: TunnelStatus) -> None:
        """A question may be on the screen: then another time."""
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
        """Cleared afterwards."""
        try:
            yield
        finally:
            self._write(_CLEAR)

    def _write(self, text: str) -> None:
        if self._draws:
            sys.stderr.write(text)
            sys.stderr.flush()


def sentence(status: TunnelStatus) -> str:
    if status.state == "connecting":
        return f"connecting to {status.host}"
    if status.state == "lost":
        when = "now" if status.next_try is None else f"in {status.next_try:.0f} s"
        return f"reconnecting to {status.host}, next try {when}: {status.reason}"
    hosts = sorted({seen.host for seen in status.mounts})
    users = f"mounted on {', '.join(hosts)}" if hosts else "no mount is connected"
    rates = f"up {size(round(status.up_rate))}/s, down {size(round(status.down_rate))}/s"
    return f"{status.name} at {status.host} for {ago(status.since)}: {users}; {rates}"
