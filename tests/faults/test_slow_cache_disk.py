"""A cache disk that is slower than the remote: reading must not wait for it.

The disk is emulated inside the mount's own processes: what the transfer process writes to a cache
file takes as long as the disk's rate says, one write after the other.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.support.command import REPOSITORY
from tests.support.mounts import Mount, RealHome, mounted, served_by_ssh
from tests.support.sshd import SshServer

MIB = 1 << 20
SIZE = 64 * MIB
RATE = 5e6
SLOW_DISK = """
import os, threading, time

write, lock = os.pwritev, threading.Lock()

def pwritev(fd, buffers, offset, *more):
    on_disk = not os.readlink(f"/proc/self/fd/{{fd}}").startswith("/memfd:")
    if on_disk and os.path.exists({switch!r}):
        with lock:
            time.sleep(sum(map(len, buffers)) / {rate})
    return write(fd, buffers, offset, *more)

os.pwritev = pwritev
"""


def _seconds(mount: Mount, name: str, data: bytes) -> float:
    began = time.monotonic()
    found = (mount.path / "ns" / name).read_bytes()
    seconds = time.monotonic() - began
    assert found == data
    return seconds


def test_a_slow_cache_disk_does_not_slow_reading(
    sshd: SshServer, real_home: RealHome, tmp_path: Path
) -> None:
    switch, code = tmp_path / "disk-is-slow", tmp_path / "code"
    code.mkdir()
    source = SLOW_DISK.format(switch=str(switch), rate=RATE)
    (code / "sitecustomize.py").write_text(source)
    real_home.environ["PYTHONPATH"] = f"{code}:{REPOSITORY}"
    served = served_by_ssh(sshd)
    names = [f"f{number}" for number in range(6)]
    contents = {name: random.Random(name).randbytes(SIZE) for name in names}
    for name, data in contents.items():
        served.inside.write(name, data)
    with mounted(real_home, {"ns": served}) as mount:
        _seconds(mount, "f0", contents["f0"])
        fast = min(_seconds(mount, name, contents[name]) for name in ("f1", "f2"))
        switch.touch()
        first = _seconds(mount, "f3", contents["f3"])
        slow = min(_seconds(mount, name, contents[name]) for name in ("f4", "f5"))
        told = f"{fast:.2f} s; once the disk is slow {first:.2f} s, then {slow:.2f} s"
        assert first < 0.75 * SIZE / RATE, told
        assert slow < 1.5 * fast + 0.2, told
        (mount.path / "ns" / "f5").write_bytes(b"written")
        assert served.inside.read("f5") == b"written"
