"""`write = "back"`, and a connection that is lost when somebody waits for the uploads: they are
tried for as long as he waits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import Mount, RealHome, kill, mounted, run, until

KINDS = ("sftp", "s3-rclone")
EXPECTED = ("reach|nothing answers|connection|ended|no answer|lost|closed|not all is uploaded",)
FILES = 12

Starts = Callable[[str], Linked]


@contextmanager
def written(
    kind: str, linked: Starts, home: RealHome, *, frozen: bool = False
) -> Iterator[tuple[Linked, Mount]]:
    """Files that are closed and on their way; `frozen`, none gets far."""
    far = linked(kind)
    with mounted(home, {"ns": far.served.but(write="back")}, expected=EXPECTED) as mount:
        (mount.path / "ns" / "folder").mkdir()
        flags = os.O_WRONLY | os.O_CREAT
        names = [mount.path / "ns" / "folder" / f"f{number}" for number in range(FILES)]
        files = [os.open(name, flags) for name in names]  # each name is asked for
        if frozen:
            far.link.freeze()
        for number, file in enumerate(files):
            os.write(file, b"%d" % number * 1000)
            os.close(file)
        yield far, mount


def arrived(far: Linked) -> int:
    inside = far.served.inside
    return sum(
        inside.exists(f"folder/f{number}")
        and inside.read(f"folder/f{number}") == b"%d" % number * 1000
        for number in range(FILES)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["hpcfs umount", "fusermount3", "SIGTERM"])
def test_a_connection_lost_just_before_the_end(
    kind: str, how: str, linked: Starts, real_home: RealHome
) -> None:
    """All are under way then, and the server takes new connections at once."""
    with written(kind, linked, real_home, frozen=True) as (far, mount):
        pid = mount.status.pid
        losing = threading.Timer(2.0, lambda: (far.link.cut(), far.link.mend()))
        losing.start()
        if how == "hpcfs umount":
            done = real_home.run("umount", mount.path)
            assert (done.returncode, done.stdout) == (0, "")
            assert "not uploaded" not in done.stderr
        elif how == "fusermount3":
            run("fusermount3", "-u", mount.path)
        else:
            kill(pid, signal.SIGTERM)
        losing.join()
        until(lambda: not Path(f"/proc/{pid}").exists(), 30)
        assert arrived(far) == FILES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["umount", "sync"])
def test_a_link_that_comes_back_while_somebody_waits(
    kind: str, command: str, linked: Starts, real_home: RealHome
) -> None:
    with written(kind, linked, real_home) as (far, mount):
        far.link.cut()
        timer = threading.Timer(5.0, far.link.mend)
        timer.start()
        done = real_home.run(command, "--timeout", "50", mount.path)
        timer.join()
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("waiting for a connection (") == 1
        assert arrived(far) == FILES


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_does_not_come_back(kind: str, linked: Starts, real_home: RealHome) -> None:
    with written(kind, linked, real_home) as (far, mount):
        far.link.cut()
        pid, began = mount.status.pid, time.monotonic()
        done = real_home.run("umount", "--timeout", "4", mount.path)
        assert done.returncode == 3
        assert 4 <= time.monotonic() - began < 15
        assert "the next mount resumes" in done.stderr
        until(lambda: not Path(f"/proc/{pid}").exists(), 40)
        far.link.mend()
        mount.mount()
        assert real_home.run("sync", mount.path).returncode == 0
        assert arrived(far) == FILES
