"""A laptop behind a login node, reached from there in two ways.

One is `hpcfs tunnel`; the other is the usual way without it, an SSH server on the laptop and `ssh
-R`. Login node and laptop are this machine: the SSH server is both, and the link lies between.
Mounts are on the login node, so that the data that they read crosses the link once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.sshd import ALIAS, LOOPBACK

NAME = "laptop"
SHARE = "files"
START_SECONDS = 30.0
_ALLOCATED = re.compile(r"Allocated port (\d+) for remote forward")


@contextmanager
def hpcfs_tunnel(
    ssh_config: Path, files: Path, home: Path, rendezvous: Path, repository: Path
) -> Iterator[None]:
    """Share `files` until the block ends; `rendezvous` is the directory of the tunnel's file."""
    (home / ".ssh").mkdir(mode=0o700, parents=True)
    (home / ".ssh" / "config").write_text(ssh_config.read_text())
    program = "from hpcfs.cli.main import main; main()"
    line = [sys.executable, "-P", "-c", program, "tunnel", ALIAS, "--name", NAME]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home),
        "PYTHONPATH": str(repository),
    }
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*line, "--share", f"{SHARE}={files}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (rendezvous / f"{NAME}.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"hpcfs tunnel is not up: {(home / 'log').read_text()}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(START_SECONDS)


@contextmanager
def ssh_tunnel(ssh_config: Path, laptop_port: int) -> Iterator[int]:
    """Yield the port on the login node that leads to the laptop's SSH server.

    It runs a command, which waits for its input to end, and not -N: OpenSSH sets TCP_NODELAY only
    once there is a session, and without that sshfs was seen to take ten times as long.
    """
    line = ["ssh", "-T", "-F", str(ssh_config), "-R", f"0:{LOOPBACK}:{laptop_port}"]
    process = subprocess.Popen(
        [*line, "-c", "aes128-gcm@openssh.com", ALIAS, "cat"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stdin is not None
    try:
        told = process.stderr.readline()
        allocated = _ALLOCATED.match(told)
        if allocated is None:
            raise RuntimeError(f"ssh -R did not get a port: {told}")
        yield int(allocated[1])
    finally:
        process.terminate()
        process.wait(START_SECONDS)
        process.stderr.close()
        process.stdin.close()
