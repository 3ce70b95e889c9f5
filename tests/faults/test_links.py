"""Links that go down in the middle: a clear error in time, nothing wrong returned, nothing lost."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import Mount, RealHome, errno_of, mounted, served_by_ssh, until
from tests.support.sshd import SshServer

KINDS = ("sftp", "s3-rclone")
CLEAR = (errno.EHOSTUNREACH, errno.ETIMEDOUT)
DEADLINE = 20.0
"""For a link that is cut; a lost connection is noticed at once, a new one is tried."""
PROMPT = 1.5
IMPATIENT = ("--patience", "2")
"""For errors; tests/faults/test_pauses.py has outages that end before the patience does."""
EXPECTED = ("reach|nothing answers|connection|ended|no answer|kept|lost|closed|not uploaded",)

Starts = Callable[[str], Linked]


def read_all(path: Path, chunk: int = 256 * 1024) -> tuple[bytes, int | None]:
    """-> (what was read, the errno that ended it)."""
    found = b""
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(chunk):
                found += data
    except OSError as error:
        return found, error.errno
    return found, None


@pytest.mark.parametrize("kind", KINDS)
def test_cut_in_the_middle_of_a_read(kind: str, linked: Starts, real_home: RealHome) -> None:
    data = random.Random(1).randbytes(40_000_000)
    far = linked(kind)
    far.served.inside.write("file", data)
    with mounted(real_home, {"ns": far.served}, *IMPATIENT, expected=EXPECTED) as mount:
        os.stat(mount.path / "ns" / "file")
        far.link.fail_after(12_000_000)
        started = time.monotonic()
        found, number = read_all(mount.path / "ns" / "file")
        assert number in CLEAR
        assert time.monotonic() - started < DEADLINE
        assert len(found) < len(data)
        assert found == data[: len(found)]
        found, number = read_all(mount.path / "ns" / "file")
        assert number in CLEAR
        assert data.startswith(found)
        assert mount.namespace("ns").state == "failed"
        far.link.mend()
        until(lambda: read_all(mount.path / "ns" / "file") == (data, None), DEADLINE)
        assert mount.namespace("ns").state == "connected"


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_goes_on_after_the_links_return(
    kind: str, linked: Starts, real_home: RealHome
) -> None:
    """The same open file: either all of its bytes, or an error, and never another file's."""
    data = random.Random(2).randbytes(20_000_000)
    far = linked(kind)
    far.served.inside.write("file", data)
    with (
        mounted(real_home, {"ns": far.served}, *IMPATIENT, expected=EXPECTED) as mount,
        (mount.path / "ns" / "file").open("rb", buffering=0) as file,
    ):
        assert os.pread(file.fileno(), 1000, 0) == data[:1000]
        far.link.cut()
        assert errno_of(os.pread, file.fileno(), 1000, 15_000_000) in CLEAR
        far.link.mend()
        until(lambda: errno_of(os.pread, file.fileno(), 1000, 15_000_000) is None, DEADLINE)
        assert os.pread(file.fileno(), 1000, 15_000_000) == data[15_000_000:15_001_000]
        file.close()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_in_the_middle_of_a_write(kind: str, linked: Starts, real_home: RealHome) -> None:
    data = random.Random(3).randbytes(24_000_000)
    far = linked(kind)
    with mounted(real_home, {"ns": far.served}, *IMPATIENT, expected=EXPECTED) as mount:
        far.link.fail_after(8_000_000)
        file = os.open(mount.path / "ns" / "file", os.O_CREAT | os.O_WRONLY)
        view = memoryview(data)
        while view:
            view = view[os.write(file, view[: 1 << 20]) :]
        started = time.monotonic()
        assert errno_of(os.close, file) in CLEAR
        assert time.monotonic() - started < 2 * DEADLINE
        (kept,) = until(lambda: mount.kept, DEADLINE)
        assert (kept.namespace, kept.path, kept.size) == ("ns", "file", len(data))
        assert Path(kept.data).read_bytes() == data
        shown = real_home.run("status", mount.path).stdout
        assert "could not be uploaded" in shown
        assert kept.data in shown
        far.link.mend()
        _works_again(mount, "ns")
        mount.remount()
        assert [(one.path, Path(one.data).read_bytes()) for one in mount.kept] == [("file", data)]


def _works_again(mount: Mount, name: str) -> None:
    other = mount.path / name / "other"
    until(lambda: errno_of(other.write_bytes, b"works again") is None, DEADLINE)
    assert mount.namespaces[name].inside.read("other") == b"works again"
    assert other.read_bytes() == b"works again"


def test_an_old_file_survives_a_failed_overwrite_on_s3(linked: Starts, real_home: RealHome) -> None:
    """S3 writes whole objects: the old one stays until the new one is there."""
    old, new = bytes(10_000_000), random.Random(4).randbytes(20_000_000)
    far = linked("s3-rclone")
    with mounted(real_home, {"ns": far.served}, *IMPATIENT, expected=EXPECTED) as mount:
        (mount.path / "ns" / "file").write_bytes(old)
        far.link.fail_after(3_000_000)
        assert errno_of((mount.path / "ns" / "file").write_bytes, new) in CLEAR
        (kept,) = until(lambda: mount.kept, DEADLINE)
        assert Path(kept.data).read_bytes() == new
        far.link.mend()
        until(lambda: read_all(mount.path / "ns" / "file")[1] is None, DEADLINE)
        assert read_all(mount.path / "ns" / "file") == (old, None)


def test_sshd_restarts(sshd: SshServer, real_home: RealHome) -> None:
    data = random.Random(5).randbytes(3_000_000)
    with mounted(real_home, {"ns": served_by_ssh(sshd)}, *IMPATIENT, expected=EXPECTED) as mount:
        (mount.path / "ns" / "before").write_bytes(data)
        for _ in range(2):
            sshd.kill()
            assert errno_of(os.mkdir, mount.path / "ns" / "new") in CLEAR
            assert (mount.path / "ns").is_dir()
            sshd.start()
            until(lambda: errno_of(os.listdir, mount.path / "ns") is None, DEADLINE)
            _works_again(mount, "ns")
        assert (mount.path / "ns" / "before").read_bytes() == data


def test_polling_a_dead_namespace_does_not_fill_the_log(
    linked: Starts, real_home: RealHome
) -> None:
    far = linked("sftp")
    with mounted(real_home, {"ns": far.served}, *IMPATIENT, expected=EXPECTED) as mount:
        far.link.cut()
        for _ in range(200):
            assert errno_of(os.listdir, mount.path / "ns") in CLEAR
        lines = [line for line in mount.log.splitlines() if " mount[" in line]
        assert len(lines) < 20
        assert len(set(lines)) > 1, "but it is said"


def test_a_session_that_is_killed_is_renewed(sshd: SshServer, real_home: RealHome) -> None:
    """Only the session's process: the server goes on."""
    with mounted(real_home, {"ns": served_by_ssh(sshd)}, expected=EXPECTED) as mount:
        for number in range(3):
            sshd.kill_sessions()
            file = mount.path / "ns" / f"file{number}"
            until(partial(_writes, file), DEADLINE)
            assert mount.namespaces["ns"].inside.read(f"file{number}") == b"content"


def _writes(path: Path) -> bool:
    return errno_of(path.write_bytes, b"content") is None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """`cat` of a file, which is not waited for."""
    command = ["cat", str(path)]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=nowhere, stderr=nowhere) as process:
        yield
        process.kill()


# --- silence --------------------------------------------------------------------------------------


def test_a_server_that_stops_delays_no_other(
    linked: Starts, real_home: RealHome, tmp_path: Path
) -> None:
    """Frozen links, with many requests that wait for them: the other namespace answers at once."""
    silent, bucket = linked("sftp"), linked("s3-rclone")
    names = {"silent": silent.served, "bucket": bucket.served}
    for number in range(30):
        silent.served.inside.write(f"file{number}", bytes(1000))
    bucket.served.inside.write("file", b"content")
    with mounted(real_home, names, expected=EXPECTED) as mount, ExitStack() as stack:
        os.listdir(mount.path / "silent")
        silent.link.freeze()
        stack.callback(silent.link.cut)
        for number in range(30):
            stack.enter_context(_reading(mount.path / "silent" / f"file{number}"))
        started = time.monotonic()
        for number in range(5):
            (mount.path / "bucket" / f"new{number}").write_bytes(b"content")
            assert (mount.path / "bucket" / "file").read_bytes() == b"content"
        assert sorted(os.listdir(mount.path)) == ["bucket", "silent"]
        assert os.statvfs(mount.path).f_blocks
        assert real_home.run("status", mount.path).returncode == 0
        assert time.monotonic() - started < 10 * PROMPT
        silent.link.cut()


def test_a_silent_link_is_given_up_in_time(linked: Starts, real_home: RealHome) -> None:
    """What the process says by itself is no sign of life."""
    far = linked("s3-rclone")
    with mounted(real_home, {"ns": far.served}, "--patience", "5", expected=EXPECTED) as mount:
        (mount.path / "ns" / "file").write_bytes(b"content")
        far.link.freeze()
        started = time.monotonic()
        with _reading(mount.path / "ns" / "file"):
            assert os.statvfs(mount.path).f_blocks
            assert errno_of(os.stat, mount.path / "ns" / "other") in CLEAR
        assert time.monotonic() - started < 10
        found = mount.namespace("ns")
        assert (found.state, found.reason) == ("failed", "no answer within 5 s")
        started = time.monotonic()
        assert errno_of(os.listdir, mount.path / "ns") in CLEAR
        assert time.monotonic() - started < PROMPT, "a site that fell silent is given no time"
        started = time.monotonic()
        far.link.mend()
        _works_again(mount, "ns")
        assert time.monotonic() - started < DEADLINE
