"""Runs the command line as users do, in a process and a home of its own, over the stub daemon."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Home:
    """A user's home directory, with the environment of a shell there."""

    path: Path
    environ: dict[str, str] = field(default_factory=dict)
    enter: tuple[str, ...] = ()
    """Before a command, so that it runs on the machine that the home is on (nodes.py)."""

    @property
    def mountpoint(self) -> Path:
        return self.path / "mnt"

    @property
    def config(self) -> Path:
        return self.path / ".config" / "hpcfs" / "config.toml"

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
        runtime = {"XDG_RUNTIME_DIR": str(self.path / "run"), "PYTHONPATH": str(REPOSITORY)}
        return {**kept, "HOME": str(self.path), **runtime, **self.environ, **more}

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "tests.support.stub_daemon", *map(str, arguments)]

    def run(
        self, *arguments: str | Path, stub: str = "fine", **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.enter, *self.command(*arguments)],
            env=self.environment(HPCFS_STUB=stub, **more),
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str | Path, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.enter, *self.command(*arguments)],
            env=self.environment(**more),
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def make_home(path: Path) -> Home:
    for name in ("mnt", "run"):
        (path / name).mkdir(mode=0o700)
    return Home(path)


def end_mounts_below(path: Path) -> None:
    """What a failed test left behind: the daemon first, then the mount."""
    from hpcfs.control import control, mountpoint
    from hpcfs.model.errors import SetupError
    from hpcfs.system import paths

    for found in mountpoint.mounts():
        if not found.mountpoint.is_relative_to(path):
            continue
        socket = paths.find_socket(found.mountpoint, {"XDG_RUNTIME_DIR": str(path / "run")})
        try:
            pid = control.query_status(socket).pid
        except SetupError:
            pid = 0
        mountpoint.unmount(found.mountpoint, lazy=True)
        if pid:
            os.kill(pid, signal.SIGKILL)


class Terminal:
    """A command on a pseudo-terminal of its own: what ssh-like questions need."""

    def __init__(self, home: Home, *arguments: str | Path, **more: str) -> None:
        self.shown = ""
        environment = home.environment(**more)
        command = home.command(*arguments)
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(home.path)
            os.execve(command[0], command, environment)

    def wait_for(self, text: str) -> None:
        while text not in self.shown:
            ready, _, _ = select.select([self._terminal], [], [], 30)
            assert ready, f"{text!r} did not appear: {self.shown!r}"
            self.shown += os.read(self._terminal, 4096).decode()

    def write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def exit_code(self) -> int:
        """Waits for the command's end, and reads the rest of what it shows."""
        with suppress(OSError):  # EIO: the last process has left the terminal
            while chunk := os.read(self._terminal, 4096):
                self.shown += chunk.decode()
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
