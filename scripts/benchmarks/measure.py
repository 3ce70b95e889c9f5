"""Resource usage of a contender's processes, programs with a deadline, and dropping page caches.

Memory is the sum over all processes of a mount of their proportional set sizes (Pss), sampled. CPU
seconds include ended processes, as last seen. Caches are dropped file by file with posix_fadvise:
that needs no root, disturbs nobody else on the machine, and leaves the servers' files cached. Pages
that can't be dropped so (dirty, mapped) are an error, since the measurement would be wrong.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.2
MARK = "HPCFS_BENCH_MOUNT"
"""The variable in the environment of a mount's processes."""
TICKS = os.sysconf("SC_CLK_TCK")
PROBES = 64
CACHED_PROBES = 3
"""Probed pages that may be cached: the kernel's readahead may race with us."""


class TimedOut(Exception):
    """A measurement exceeded its time limit."""


class WrongResult(Exception):
    """The data read differs from the server's, or the program failed."""


# --- processes ------------------------------------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    return 0


def _is_child_of_this(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and int(fields[1]) == os.getpid()


class Usage:
    """The usage of all processes with a mark in their environment, ended ones included.

    Parentage is no criterion: sshfs, for one, disowns its ssh.
    """

    def __init__(self, value: str) -> None:
        self._mark = f"{MARK}={value}".encode()
        self._ticks: dict[int, int] = {}
        """CPU ticks by process, as last seen."""
        self._others: set[int] = set(map(int, filter(str.isdigit, os.listdir("/proc"))))

    def look(self) -> list[int]:
        """Update the usage, and return the processes that are alive."""
        alive = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid in self._others or not (fields := _stat(pid)) or fields[0] == "Z":
                continue
            if pid in self._ticks or self._is_ours(pid):
                self._ticks[pid] = int(fields[11]) + int(fields[12])
                alive.append(pid)
        return alive

    def _is_ours(self, pid: int) -> bool:
        """Return whether the process has the mark. One that is still between fork and exec is
        checked again the next time: it has our environment, or none."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            return False
        if environment != [b""] and self._mark not in environment and not _is_child_of_this(pid):
            self._others.add(pid)
        return self._mark in environment

    @property
    def cpu_seconds(self) -> float:
        self.look()
        return sum(self._ticks.values()) / TICKS

    def memory(self) -> int:
        return sum(_pss(pid) for pid in self.look())


class Sampler:
    """Records the peak of the memory while a block runs."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_memory = 0
        self.cpu_seconds = 0.0

    def __enter__(self) -> Sampler:
        self._before = self._usage.cpu_seconds
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()
        self.cpu_seconds = self._usage.cpu_seconds - self._before

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_memory = max(self.peak_memory, self._usage.memory())


# --- programs with a deadline ---------------------------------------------------------------------


@dataclass
class Programs:
    """The programs that work on one mount; they are killed at the deadline.

    A program that waits for a dead mount can't be killed, so `abandon` is called first: it kills
    the mount.
    """

    deadline: float
    abandon: Callable[[], None]

    def run(self, *command: str | Path, ok: tuple[int, ...] = (0,)) -> tuple[float, str]:
        """Run a program; return its seconds and its output."""
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
        out, told = self._communicate([process])[0]
        took = time.monotonic() - started
        if process.returncode not in ok:
            raise WrongResult(f"{command[0]} failed: {told.strip()[-300:]}")
        return took, out

    def together(self, commands: list[list[str]]) -> list[str]:
        """Start programs that report when they are ready, let them begin together, and return what
        each printed then."""
        running = []
        try:
            for command in commands:
                running.append(_gated(command))
            for process in running:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    raise WrongResult(f"{command} did not start")
            for process in running:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            ended = self._communicate(running)
        finally:
            _kill(running)
        for process, (_, told) in zip(running, ended, strict=True):
            if process.returncode:
                raise WrongResult((told.strip().splitlines() or ["the reader failed"])[-1])
        return [out for out, _ in ended]

    def _communicate(self, running: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
        try:
            return [
                process.communicate(timeout=max(0.01, self.deadline - time.monotonic()))
                for process in running
            ]
        except subprocess.TimeoutExpired:
            raise TimedOut from None
        finally:
            if any(process.poll() is None for process in running):
                self.abandon()
                _kill(running)


def _gated(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _kill(running: list[subprocess.Popen[str]]) -> None:
    for process in running:
        if process.poll() is None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel: nothing helps
                process.communicate(timeout=10)


# --- the kernel's cache ---------------------------------------------------------------------------


def drop_cached(mounted: Path, cache: Path, pids: list[int]) -> None:
    """Drop the file's pages: those of the mount, and those of every file in which its contender may
    have them."""
    for place in (mounted, *_files_below(cache), *_open_files(pids)):
        with suppress(FileNotFoundError, PermissionError, ProcessLookupError):
            _drop(place)


def _files_below(directory: Path) -> Iterator[Path]:
    return (file for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def _open_files(pids: list[int]) -> Iterator[Path]:
    """Yield open files, also those without a name: s3fs keeps its copies in such."""
    for pid in pids:
        with suppress(FileNotFoundError, PermissionError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if stat.S_ISREG(descriptor.stat().st_mode):
                        yield descriptor


def _drop(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        with suppress(OSError):  # some filesystems have no fsync for readers, and nothing dirty
            os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        cached = sum(_is_cached(fd, offset) for offset in _probes(os.fstat(fd).st_size))
    finally:
        os.close(fd)
    if cached > CACHED_PROBES:
        raise WrongResult(f"{file} could not be dropped from the page cache")


def _probes(size: int) -> Iterator[int]:
    if size > PROBES * 1024 * 1024:
        yield from range(0, size, size // PROBES)


def _is_cached(fd: int, offset: int) -> bool:
    """Return whether a read there would be answered without waiting."""
    try:
        return bool(os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return False
        raise


def end(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
