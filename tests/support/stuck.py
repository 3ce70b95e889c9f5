"""Programs that wait for a mount: each makes one call when it is told to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.mounts import until

WAITING = ("request_wait_answer", "folio_wait", "fuse", "d_alloc_parallel", "wait_on_page")
"""In the kernel's functions (/proc/PID/wchan) while a program waits for an answer."""
_PROGRAM = """
import os, sys
path = sys.argv[1]
{prepare}
print("ready", flush=True)
sys.stdin.readline()
{call}
"""
CALLS = {
    "read": ("f = os.open(path + '/read', os.O_RDONLY)", "os.pread(f, 4096, 1_500_000)"),
    "stat": ("", "os.stat(path + '/stat')"),
    "ls": ("", "os.listdir(path)"),
    "open": ("os.stat(path + '/open')", "os.open(path + '/open', os.O_RDWR)"),
    "write": ("f = os.open(path + '/write', os.O_WRONLY)", "os.pwrite(f, b'new', 1_500_000)"),
    "close": (
        "f = os.open(path + '/close', os.O_CREAT | os.O_WRONLY); os.write(f, b'bytes')",
        "os.close(f)",
    ),
    "fsync": (
        "f = os.open(path + '/fsync', os.O_CREAT | os.O_WRONLY); os.write(f, b'bytes')",
        "os.fsync(f)",
    ),
    "rename": ("os.stat(path + '/rename')", "os.rename(path + '/rename', path + '/renamed')"),
    "mkdir": ("os.stat(path)", "os.mkdir(path + '/mkdir')"),
}
"""What is prepared while the link is up, and the call, in a directory of its own."""
OLD_FILES = ("read", "stat", "open", "write", "rename")
"""Calls whose directory has a file of the same name."""
OLD_BYTES = 2_000_000
"""More than what comes whole with open(2) from S3."""


def threads_waiting(process: int) -> int:
    """How many threads of the process wait for the kernel's answer."""
    found = 0
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):
            place = (thread / "wchan").read_text()
            found += any(name in place for name in WAITING)
    return found


@dataclass
class Stuck:
    """A program in one call."""

    name: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, call: str, directory: Path) -> Stuck:
        """Returns once all is prepared."""
        prepare, then = CALLS[call]
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(prepare=prepare, call=then), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n", call
        return cls(call, process)

    def go(self) -> None:
        """Make the call; returns once the kernel waits for its answer."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        until(self._is_waiting, what=f"{self.name} waits for the mount")

    def _is_waiting(self) -> bool:
        assert self.process.poll() is None, f"{self.name} did not wait"
        return threads_waiting(self.process.pid) > 0

    def end(self, number: signal.Signals, within: float) -> float:
        """How many seconds it lived after this signal."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(within)
        return time.monotonic() - began

    def close(self) -> None:
        """Never leave it behind."""
        self.process.kill()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)
