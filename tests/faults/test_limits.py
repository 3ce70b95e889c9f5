"""A process may have so many descriptors only: the daemon lives on, whatever programs open."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounts import Mount, RealHome, Served, errno_of, mounted, served_by_ssh, until
from tests.support.sshd import SshServer

FULL = os.environ.get("HPCFS_FULL") == "1"
FILES = 5000 if FULL else 1500
"""As many as are opened at once; the daemon may have 1024 descriptors."""


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """The soft limit of open files of what is started in the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def daemon_pid(mount: Mount) -> int:
    return mount.status.pid


def many(sshd: SshServer) -> Served:
    served = served_by_ssh(sshd)
    folder = Path(str(served.keys["path"])) / "many"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"f{number:04}").write_bytes(b"%d" % number)
    return served


def test_the_soft_limit_is_raised(sshd: SshServer, real_home: RealHome) -> None:
    """In the daemon and its worker processes."""
    with soft_limit(256), mounted(real_home, {"ns": served_by_ssh(sshd)}) as mount:
        os.listdir(mount.path / "ns")
        for pid in (daemon_pid(mount), *mount.transfer_processes()):
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            assert soft == min(hard, 65536)


def test_more_files_are_opened_than_there_are_descriptors(
    sshd: SshServer, real_home: RealHome
) -> None:
    """Each open(2) works or is EMFILE, and what is open is read; afterwards all can be read."""
    served = many(sshd)
    with mounted(real_home, {"ns": served}, expected=["open: raise the limit"]) as mount:
        pid = daemon_pid(mount)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, 1024))
        names = sorted(os.listdir(mount.path / "ns" / "many"))
        opened: list[tuple[int, int]] = []
        refused: list[int | None] = []
        for number, name in enumerate(names):
            try:
                opened.append((number, os.open(mount.path / "ns" / "many" / name, os.O_RDONLY)))
            except OSError as error:
                refused.append(error.errno)
        print(f"{len(opened)} of {len(names)} are open, {len(refused)} were refused")
        assert set(refused) == {errno.EMFILE}
        assert len(opened) >= 500
        for number, fd in opened:
            assert os.pread(fd, 100, 0) == b"%d" % number
            os.close(fd)
        assert daemon_pid(mount) == pid
        for number, name in enumerate(names):
            assert (mount.path / "ns" / "many" / name).read_bytes() == b"%d" % number


def test_no_descriptor_is_left_at_all(
    sshd: SshServer, real_home: RealHome, small_disk: Callable[[int], Path]
) -> None:
    """Housekeeping fails and is started again; the mount is there when descriptors are back."""
    served = served_by_ssh(sshd)
    served.inside.write("file", b"content")
    with mounted(
        real_home, {"ns": served}, expected=["Too many open files", "has to wait"]
    ) as mount:
        pid = daemon_pid(mount)
        assert (mount.path / "ns" / "file").read_bytes() == b"content"
        _, hard = before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        small_disk(1)  # a mount more or less is a reason to look, which takes a descriptor
        until(lambda: "looking at the mount failed" in mount.log)
        number = errno_of((mount.path / "ns" / "new").write_bytes, b"x")
        assert number in (errno.EMFILE, errno.ENFILE, errno.EHOSTUNREACH, None)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert (mount.path / "ns" / "file").read_bytes() == b"content"
        (mount.path / "ns" / "later").write_bytes(b"y")
        assert served.inside.read("later") == b"y"
        assert daemon_pid(mount) == pid
        assert any("looking at the mount failed" in one for one in mount.status.troubles)


def test_programs_of_the_user_get_the_old_limit() -> None:
    """ProxyCommand and ssh: programs that use select(2) expect it."""
    script = (
        "import asyncio\n"
        "from hpcfs.remotes.ssh import program\n"
        "from hpcfs.system import limits\n"
        "assert limits.raise_open_files() > 300\n"
        "line = 'while [ $(ulimit -Sn) != 300 ]; do :; done'\n"  # a moment after its start
        "print(asyncio.run(program.ask(['sh', '-c', line], 20)))\n"
    )
    with soft_limit(300):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
    assert done.stdout.startswith("(0, "), done.stderr


def _virtual_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_no_memory_is_left(sshd: SshServer, real_home: RealHome) -> None:
    """Calls may fail while it lasts; the daemon lives, and what was read is right."""
    served = served_by_ssh(sshd)
    data = os.urandom(24 << 20)
    served.inside.write("file", data)
    with mounted(real_home, {"ns": served}, expected=["."]) as mount:
        pid = daemon_pid(mount)
        assert (mount.path / "ns" / "file").read_bytes() == data
        _, hard = before = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (_virtual_bytes(pid) + (1 << 20), hard))
        found = []
        for number in range(60):
            name = f"new{number}"
            found.append(errno_of((mount.path / "ns" / name).write_bytes, data[: 1 << 18]))
            found.append(errno_of(os.listdir, mount.path / "ns"))
        with (mount.path / "ns" / "file").open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            number = errno_of(file.read)
            found.append(number)
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        print(f"{sum(one is not None for one in found)} of {len(found)} calls failed: {set(found)}")
        assert (mount.path / "ns" / "file").read_bytes() == data
        (mount.path / "ns" / "later").write_bytes(b"later")
        assert served.inside.read("later") == b"later"
        assert daemon_pid(mount) == pid
