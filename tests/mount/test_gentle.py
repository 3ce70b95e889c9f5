"""Limits that a user sets to be gentle with a shared link."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.mounts import RealHome, mounted

BYTES = 9_000_000
RATE = 3_000_000


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone"])
def test_a_limit_of_the_bandwidth_holds_in_both_directions(
    kind: str, servers: Servers, real_home: RealHome
) -> None:
    served = servers.serve(kind).but(bandwidth_limit="3 MB")
    data = random.Random(3).randbytes(BYTES)
    served.inside.write("there", data)
    with mounted(real_home, {"ns": served}) as mount:
        took: dict[str, float] = {}

        def read(path: Path) -> None:
            assert path.read_bytes() == data

        def write(path: Path) -> None:
            path.write_bytes(data)

        for name, call in (("there", read), ("new", write)):
            began = time.monotonic()
            call(mount.path / "ns" / name)
            took[name] = time.monotonic() - began
        assert served.inside.read("new") == data
        least = (BYTES - RATE) / RATE  # a second of bursts, and of requests that are under way
        assert {name: at for name, at in took.items() if at < least} == {}


def _wakeups(pid: int) -> int:
    """How often the process went to sleep, all of its threads together (proc_pid_status(5))."""
    status = [task / "status" for task in Path(f"/proc/{pid}/task").iterdir()]
    found = [
        re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", one.read_text(), re.M) for one in status
    ]
    return sum(int(count) for counts in found for count in counts)


def test_an_idle_mount_sleeps(servers: Servers, real_home: RealHome) -> None:
    served = {"one": servers.serve("sftp"), "two": servers.serve("s3-rclone")}
    with mounted(real_home, served) as mount:
        for name in served:
            (mount.path / name / "file").write_bytes(b"bytes")
        pid, seconds = mount.status.pid, 8.0
        time.sleep(3)  # until what was used a moment ago rests
        before = _wakeups(pid)
        time.sleep(seconds)  # the time itself is what is tested
        assert (_wakeups(pid) - before) / seconds < 3
