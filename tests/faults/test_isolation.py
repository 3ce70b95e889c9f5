"""A namespace that does not answer delays no other, however many programs wait for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcfs.kernel.handshake import MAX_BACKGROUND
from tests.faults.conftest import Linked
from tests.support.mounts import Mount, RealHome, mounted, run, served_by_ssh, until
from tests.support.sshd import SshServer
from tests.support.stuck import threads_waiting

Starts = Callable[[str], Linked]
READERS = int(os.environ.get("HPCFS_TEST_READERS", "150"))
PROMPT = 5.0
"""Seconds; on a machine that is not busy with other tests it takes some milliseconds."""
FILES, FILE_BYTES = 16, 2_000_000
EXPECTED = ("reach|nothing answers|not answer|connection|ended|no answer|lost|closed",)
_READERS = """
import os, sys, threading
files = [os.open(sys.argv[1], os.O_RDONLY) for _ in range(int(sys.argv[2]))]
print("ready", flush=True)
sys.stdin.readline()
for number, file in enumerate(files):
    threading.Thread(target=os.pread, args=(file, 1 << 17, number << 18)).start()
"""


def _longest(mount: Mount, first: int) -> float:
    """Seconds that the slowest call on the namespace that is alive, or on the top, took."""
    longest = 0.0
    for number in range(first, first + FILES // 2):
        path = mount.path / "alive" / str(number)
        for call in (
            lambda: os.listdir(mount.path),
            lambda: os.statvfs(mount.path),
            lambda path=path: _read_here_and_there(path),
            lambda path=path: _read_whole(path),
        ):
            began = time.monotonic()
            call()
            longest = max(longest, time.monotonic() - began)
    return longest


def _read_here_and_there(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        for offset in random.Random(1).sample(range(0, FILE_BYTES, 4096), 8):
            assert len(os.pread(file.fileno(), 4096, offset))


def _read_whole(path: Path) -> None:
    assert path.read_bytes() == b"x" * FILE_BYTES


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone"])
def test_readers_of_a_dead_namespace_delay_no_other(
    kind: str, linked: Starts, sshd: SshServer, real_home: RealHome
) -> None:
    dead, alive = linked(kind), served_by_ssh(sshd)
    dead.served.inside.write("file", bytes(READERS << 18))
    for number in range(FILES):
        alive.inside.write(str(number), b"x" * FILE_BYTES)
    namespaces = {"dead": dead.served.but(patience="10 min"), "alive": alive}
    with mounted(real_home, namespaces, expected=EXPECTED) as mount:
        without = _longest(mount, 0)
        readers = subprocess.Popen(
            [sys.executable, "-c", _READERS, str(mount.path / "dead" / "file"), str(READERS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert readers.stdin
        assert readers.stdout
        try:
            assert readers.stdout.readline() == b"ready\n"
            dead.link.freeze()
            readers.stdin.write(b"\n")
            readers.stdin.flush()
            until(lambda: threads_waiting(readers.pid) >= READERS, what="all readers wait")
            longest = _longest(mount, FILES // 2)
            assert longest < PROMPT, f"{longest:.2f} s; without readers {without:.2f} s"
            assert threads_waiting(readers.pid) >= READERS, "they wait still"
            readers.send_signal(signal.SIGTERM)
            readers.wait(PROMPT)
            dead.link.mend()
        finally:
            dead.link.cut()  # else who still waits could not be ended
            readers.kill()
            readers.communicate()


def test_the_kernel_lets_many_requests_wait(
    sshd: SshServer, real_home: RealHome, tmp_path: Path
) -> None:
    """What pyfuse3 has no setting for, as the kernel itself tells."""
    control = tmp_path / "fusectl"
    control.mkdir()
    with mounted(real_home, {"ns": served_by_ssh(sshd)}) as mount:
        run("mount", "-t", "fusectl", "none", control)
        try:
            connection = control / str(os.minor(os.stat(mount.path).st_dev))
            for name in ("max_background", "congestion_threshold"):
                assert int((connection / name).read_text()) == MAX_BACKGROUND
        finally:
            run("umount", control)
