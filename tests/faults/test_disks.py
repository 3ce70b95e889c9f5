"""Full disks, here and there, killed processes, files that others remove: no wrong byte."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import RealHome, errno_of, kill, mounted, run, served_by_ssh, until
from tests.support.sshd import SshServer

MIB = 1 << 20
MakeDisk = Callable[[int], Path]
Starts = Callable[[str], Linked]


def test_the_remote_is_full(sshd: SshServer, small_disk: MakeDisk, real_home: RealHome) -> None:
    """close(2) says so, and the bytes are kept; when there is room again all is well."""
    data = random.Random(1).randbytes(12 * MIB)
    folder = small_disk(8)
    with mounted(
        real_home, {"ns": served_by_ssh(sshd, folder)}, expected=["full|space|kept|quota"]
    ) as mount:
        (mount.path / "ns" / "small").write_bytes(data[:MIB])
        with (mount.path / "ns" / "file").open("wb", buffering=0) as file:
            file.write(data)
            descriptor = os.dup(file.fileno())
            assert errno_of(file.close) == errno.ENOSPC
        assert errno_of(os.close, descriptor) == errno.ENOSPC
        (kept,) = until(lambda: mount.kept)
        assert Path(kept.data).read_bytes() == data
        assert kept.path == "file"
        assert (mount.path / "ns" / "small").read_bytes() == data[:MIB]
        os.unlink(mount.path / "ns" / "file")
        (mount.path / "ns" / "file").write_bytes(data[:MIB])
        assert (folder / "file").read_bytes() == data[:MIB]
        assert os.statvfs(mount.path).f_blocks == os.statvfs(folder).f_blocks


def test_the_caches_disk_is_full_while_reading(
    sshd: SshServer, small_disk: MakeDisk, real_home: RealHome
) -> None:
    """Twice as much is read as the disk holds: old blocks make room for new ones."""
    served = served_by_ssh(sshd)
    contents = {f"f{n}": random.Random(n).randbytes(12 * MIB) for n in range(6)}
    for name, data in contents.items():
        served.inside.write(name, data)
    with mounted(
        real_home, {"ns": served}, "--cache-dir", small_disk(32), expected=["full|index"]
    ) as mount:
        for _ in range(2):
            for name, data in contents.items():
                assert (mount.path / "ns" / name).read_bytes() == data
        with (
            (mount.path / "ns" / "f0").open("rb") as one,
            (mount.path / "ns" / "f1").open("rb") as two,
        ):
            assert one.read() == contents["f0"]
            assert two.read() == contents["f1"]


def test_a_file_larger_than_the_caches_disk_can_be_read(
    sshd: SshServer, small_disk: MakeDisk, real_home: RealHome
) -> None:
    served = served_by_ssh(sshd)
    data = random.Random(7).randbytes(60 * MIB)
    served.inside.write("file", data)
    with mounted(
        real_home, {"ns": served}, "--cache-dir", small_disk(24), expected=["full|index"]
    ) as mount:
        assert (mount.path / "ns" / "file").read_bytes() == data


def test_the_cache_leaves_some_of_its_disk_free(
    sshd: SshServer, small_disk: MakeDisk, real_home: RealHome
) -> None:
    """Also when others fill it up: then reading goes on, and what was cached makes room."""
    served = served_by_ssh(sshd)
    data = random.Random(7).randbytes(60 * MIB)
    served.inside.write("file", data)
    disk = small_disk(48)

    def free() -> int:
        found = os.statvfs(disk)
        return found.f_bavail * found.f_frsize

    with mounted(real_home, {"ns": served}, "--cache-dir", disk, cache_min_free="16 MiB") as mount:
        assert (mount.path / "ns" / "file").read_bytes() == data
        until(lambda: free() >= 16 * MIB)
        (disk / "of-others").write_bytes(bytes(16 * MIB))
        assert (mount.path / "ns" / "file").read_bytes() == data
        until(lambda: free() >= 16 * MIB)
        (disk / "more").write_bytes(bytes(12 * MIB))
        assert (mount.path / "ns" / "file").read_bytes() == data
        (disk / "more").unlink()
        (disk / "of-others").unlink()


def test_the_caches_disk_is_full_while_writing(
    sshd: SshServer, small_disk: MakeDisk, real_home: RealHome
) -> None:
    """ENOSPC from write(2); what was written before it is whole, here and on the remote."""
    data = random.Random(8).randbytes(40 * MIB)
    with mounted(
        real_home,
        {"ns": served_by_ssh(sshd)},
        "--cache-dir",
        small_disk(24),
        expected=["full|index"],
    ) as mount:
        (mount.path / "ns" / "before").write_bytes(data[: 4 * MIB])
        file = os.open(mount.path / "ns" / "file", os.O_CREAT | os.O_RDWR)
        written, number = 0, None
        while number is None and written < len(data):
            piece = data[written : written + MIB]
            number = errno_of(os.write, file, piece)
            written += len(piece) if number is None else 0
        assert number == errno.ENOSPC
        assert written > 4 * MIB
        assert os.pread(file, MIB, written - MIB) == data[written - MIB : written]
        os.close(file)
        inside = mount.namespaces["ns"].inside
        assert inside.read("file") == data[:written]
        assert inside.read("before") == data[: 4 * MIB]
        (mount.path / "ns" / "after").write_bytes(data[:MIB])
        assert inside.read("after") == data[:MIB]
        assert (mount.path / "ns" / "file").read_bytes() == data[:written]
        assert mount.kept == []


def test_a_cache_directory_that_is_full_from_the_start(
    small_disk: MakeDisk, sshd: SshServer, real_home: RealHome
) -> None:
    """What is read goes through memory, and writes say that the disk is full, until there is
    room."""
    served = served_by_ssh(sshd)
    data = random.Random(2).randbytes(3 * MIB)
    served.inside.write("file", data)
    disk = small_disk(2)
    with (disk / "ballast").open("wb", buffering=0) as file:
        for length in (MIB, 4096, 1):
            while errno_of(file.write, bytes(length)) is None and file.tell() < 4 * MIB:
                pass
    full = ["full|space|index|journal|takes no"]
    with mounted(real_home, {"ns": served}, "--cache-dir", disk, expected=full) as mount:
        assert os.listdir(mount.path / "ns") == ["file"]
        assert (mount.path / "ns" / "file").read_bytes() == data
        assert errno_of((mount.path / "ns" / "new").write_bytes, data) == errno.ENOSPC
        assert mount.status.troubles
        (disk / "ballast").unlink()
        (mount.path / "ns" / "new").write_bytes(data[:MIB])
        assert served.inside.read("new") == data[:MIB]
        assert (mount.path / "ns" / "file").read_bytes() == data


def test_the_cache_directory_is_removed(linked: Starts, real_home: RealHome) -> None:
    """Reads go on, what waits to be uploaded is written again, and the directory is made anew."""
    data = random.Random(3).randbytes(5 * MIB)
    far = linked("sftp")
    far.served.keys["write"] = "back"
    for name in ("one", "two"):
        far.served.inside.write(name, data)
    with mounted(
        real_home,
        {"ns": far.served},
        expected=["removed|written anew|begins anew|index|takes no files"],
    ) as mount:
        cache = Path(mount.status.cache_dir)
        assert (mount.path / "ns" / "one").read_bytes() == data
        with (mount.path / "ns" / "two").open("rb") as two:
            assert two.read(1000) == data[:1000]
            with (mount.path / "ns" / "written").open("wb") as written:
                written.write(data)
                written.flush()
                shutil.rmtree(cache)
                assert (mount.path / "ns" / "one").read_bytes() == data
                assert two.read() == data[1000:]
                until(lambda: (cache / "journal.db").exists())
                assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        until(lambda: any("was removed" in one for one in mount.status.troubles))
        until(lambda: mount.status.pending_files == 0)
        assert far.served.inside.read("written") == data
        (mount.path / "ns" / "later").write_bytes(data)
        assert (mount.path / "ns" / "one").read_bytes() == data
        mount.remount()
        assert (mount.path / "ns" / "later").read_bytes() == data
        assert "Traceback" not in mount.log


# --- killed while writing -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone"])
def test_a_daemon_killed_in_the_middle_of_a_write(
    kind: str, linked: Starts, real_home: RealHome
) -> None:
    """What write(2) accepted is there, and uploaded, though nobody was told that it is safe."""
    data = random.Random(9).randbytes(9 * MIB + 5)
    far = linked(kind)
    far.served.inside.write("old", data[: 3 * MIB])
    with mounted(real_home, {"ns": far.served}) as mount:
        new = os.open(mount.path / "ns" / "new", os.O_CREAT | os.O_WRONLY)
        for start in range(0, len(data), MIB):
            assert os.write(new, data[start : start + MIB]) == len(data[start : start + MIB])
        old = os.open(mount.path / "ns" / "old", os.O_RDWR)
        assert os.pwrite(old, b"changed", MIB) == 7
        mount.kill_daemon()
        assert errno_of(os.close, new) in (errno.ENOTCONN, errno.ECONNABORTED)
        assert errno_of(os.close, old) in (errno.ENOTCONN, errno.ECONNABORTED)
        assert "2 files of an earlier mount: the upload goes on" in mount.mount()
        expected = {"new": data, "old": data[:MIB] + b"changed" + data[MIB + 7 : 3 * MIB]}
        for name, content in expected.items():
            assert (mount.path / "ns" / name).read_bytes() == content
        real_home.run("sync", mount.path)
        assert mount.status.pending == []
        for name, content in expected.items():
            assert far.served.inside.read(name) == content


def test_a_daemon_killed_while_it_uploads(linked: Starts, real_home: RealHome) -> None:
    data = random.Random(10).randbytes(30 * MIB)
    far = linked("sftp")
    with mounted(real_home, {"ns": far.served}) as mount:
        far.link.fail_after(10 * MIB, then="frozen")
        process = os.fork()
        if process == 0:
            os._exit(errno_of((mount.path / "ns" / "file").write_bytes, data) or 0)
        until(lambda: far.link.is_down)
        mount.kill_daemon()
        _, result = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(result) in (errno.ENOTCONN, errno.ECONNABORTED)
        far.link.cut()
        far.link.mend()
        mount.mount()
        assert (mount.path / "ns" / "file").read_bytes() == data
        real_home.run("sync", mount.path)
        assert mount.status.pending == []
        assert far.served.inside.read("file") == data


def test_a_transfer_process_killed_while_it_reads_and_writes(
    linked: Starts, real_home: RealHome
) -> None:
    data = random.Random(11).randbytes(20 * MIB)
    far = linked("sftp")
    far.served.inside.write("file", data)
    with mounted(real_home, {"ns": far.served}, expected=["process"]) as mount:
        far.link.fail_after(5 * MIB, then="frozen")
        process = os.fork()
        if process == 0:
            code = errno_of((mount.path / "ns" / "file").read_bytes) or 0
            os._exit(code)
        until(lambda: far.link.is_down)
        (pid,) = mount.transfer_processes()
        kill(pid)
        far.link.mend()
        _, result = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(result) == 0, "it is started anew, and asked again"
        until(lambda: errno_of(os.listdir, mount.path / "ns") is None)
        assert (mount.path / "ns" / "file").read_bytes() == data


# --- others on the remote -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone", "s3-moto"])
def test_an_object_deleted_while_it_is_read(kind: str, linked: Starts, real_home: RealHome) -> None:
    data = random.Random(12).randbytes(30 * MIB)
    far = linked(kind)
    far.served.inside.write("file", data)
    gone = (errno.ESTALE, errno.ENOENT, errno.EIO)
    with mounted(real_home, {"ns": far.served}, expected=["changed|exist|no such|gone"]) as mount:
        with (mount.path / "ns" / "file").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 1000, 0) == data[:1000]
            far.served.inside.remove("file")
            number = errno_of(os.pread, file.fileno(), 1000, 25 * MIB)
            assert number in (None, *gone)
            if number is None:  # SFTP: the server has it open
                assert os.pread(file.fileno(), 1000, 25 * MIB) == data[25 * MIB :][:1000]
        until(lambda: errno_of(os.stat, mount.path / "ns" / "file") == errno.ENOENT, 5)
        far.served.inside.write("file", b"another")
        until(lambda: errno_of(os.stat, mount.path / "ns" / "file") is None, 5)
        assert (mount.path / "ns" / "file").read_bytes() == b"another"


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone", "s3-moto"])
def test_a_file_replaced_while_it_is_read(kind: str, linked: Starts, real_home: RealHome) -> None:
    """All bytes that one open file gives are of one version."""
    one, other = random.Random(13).randbytes(30 * MIB), random.Random(14).randbytes(29 * MIB)
    far = linked(kind)
    far.served.inside.write("file", one)
    with mounted(real_home, {"ns": far.served}, expected=["changed|another"]) as mount:
        with (mount.path / "ns" / "file").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 1000, 0) == one[:1000]
            far.served.inside.remove("file")
            far.served.inside.write("file", other)
            if errno_of(os.pread, file.fileno(), 1000, 25 * MIB) is None:
                assert os.pread(file.fileno(), 1000, 25 * MIB) == one[25 * MIB :][:1000]
        until(lambda: _read_unless_stale(mount.path / "ns" / "file") == other, 5)


def _read_unless_stale(path: Path) -> bytes | None:
    """An open believes what was seen less than a tenth of a second ago; reading then fails."""
    return path.read_bytes() if errno_of(path.read_bytes) != errno.ESTALE else None


# --- large directories ----------------------------------------------------------------------------


def test_a_directory_of_100_000_entries(sshd: SshServer, real_home: RealHome) -> None:
    """Bounds are loose: they catch what grows with the square, or keeps every entry."""
    served = served_by_ssh(sshd)
    folder = Path(str(served.keys["path"])) / "many"
    folder.mkdir()
    at = os.open(folder, os.O_DIRECTORY)
    for number in range(100_000):
        os.close(os.open(f"entry-{number:06}", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)
    with mounted(real_home, {"ns": served}) as mount:
        before = mount.status.memory
        started = time.monotonic()
        shown = run("sh", "-c", "ls -U | wc -l", cwd=mount.path / "ns" / "many")
        seconds = time.monotonic() - started
        grown = (mount.status.memory - before) / MIB
        assert shown.strip() == "100000"
        assert (mount.path / "ns" / "many" / "entry-077777").stat().st_size == 0
        assert run("sh", "-c", "ls | sort | uniq -d", cwd=mount.path / "ns" / "many") == ""
        print(f"100,000 entries: {seconds:.1f} s, {grown:.0f} MiB more")
        assert seconds < 60
        assert grown < 400
