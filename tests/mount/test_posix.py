"""What POSIX says of calls that few programs make, on real mounts: what suites look at."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

from tests.mount.conftest import WorkTree
from tests.support.mounts import RealHome, errno_of, mounted, served_by_ssh, until
from tests.support.sshd import ordinary_user

# --- sizes ----------------------------------------------------------------------------------------


def test_what_is_too_large_is_told_so(tree: WorkTree) -> None:
    """Also where the server only says "failure", or the cache's own disk refuses."""
    tree.mount.expected.append("more than its file system|5 TiB|file that large")
    path = tree.path / "file"
    path.write_bytes(b"content")
    assert errno_of(os.truncate, path, 999_999_999_999_999) == errno.EFBIG
    with path.open("r+b", 0) as file:
        assert errno_of(os.pwrite, file.fileno(), b"x", 2**63 - 2) == errno.EFBIG
        assert errno_of(os.pwrite, file.fileno(), b"x", 2**63 - 1) == errno.EINVAL
        assert errno_of(os.ftruncate, file.fileno(), 2**63 - 1) == errno.EFBIG
        assert os.fstat(file.fileno()).st_size == 7
    assert path.read_bytes() == tree.on_server("file") == b"content"


# --- links ----------------------------------------------------------------------------------------


def test_hard_links_are_one_file(sftp_tree: WorkTree) -> None:
    one, two, three = (sftp_tree.path / name for name in ("one", "two", "three"))
    one.write_bytes(b"content")
    os.link(one, two)
    os.link(two, three)
    assert len({path.stat().st_ino for path in (one, two, three)}) == 1
    assert [path.stat().st_nlink for path in (one, two, three)] == [3, 3, 3]
    with one.open("r+b", 0) as file:
        file.write(b"CON")
        assert two.read_bytes() == b"CONtent", "before it is closed"
        one.unlink()
        assert (two.stat().st_nlink, os.fstat(file.fileno()).st_nlink) == (2, 2)
        file.write(b"TENT")
        two.rename(sftp_tree.path / "renamed")
        three.chmod(0o600)
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        os.unlink(sftp_tree.path / "renamed")
        (sftp_tree.path / "other").write_bytes(b"other")
        os.rename(sftp_tree.path / "other", three)
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b" to nobody")
        assert os.pread(file.fileno(), 100, 0) == b"CONTENT to nobody"
    assert os.listdir(sftp_tree.path) == ["three"]
    assert sftp_tree.on_server("three") == b"other"


def test_a_link_goes_on_after_the_name_it_was_opened_by(sftp_tree: WorkTree) -> None:
    one, two = sftp_tree.path / "one", sftp_tree.path / "two"
    one.write_bytes(b"content")
    os.link(one, two)
    with one.open("r+b", 0) as file:
        one.unlink()
        file.write(b"CON")
    assert sftp_tree.on_server("two") == two.read_bytes() == b"CONtent"
    assert two.stat().st_nlink == 1


def test_a_link_that_the_cluster_replaced_is_a_file_of_its_own(sftp_tree: WorkTree) -> None:
    one, two = sftp_tree.path / "one", sftp_tree.path / "two"
    one.write_bytes(b"content")
    os.link(one, two)
    served = Path(str(sftp_tree.mount.namespaces["sftp"].keys["path"])) / sftp_tree.name
    (served / "new").write_bytes(b"another file")
    os.rename(served / "new", served / "two")
    until(lambda: two.read_bytes() == b"another file", 5)
    assert one.read_bytes() == b"content"
    until(lambda: one.stat().st_ino != two.stat().st_ino, 5)
    with two.open("ab") as file:
        file.write(b"!")
    assert one.read_bytes() == sftp_tree.on_server("one") == b"content"
    assert sftp_tree.on_server("two") == b"another file!"


def test_a_removed_file_has_no_links(tree: WorkTree) -> None:
    with (tree.path / "file").open("wb") as file:
        assert os.fstat(file.fileno()).st_nlink == 1
        os.unlink(tree.path / "file")
        assert os.fstat(file.fileno()).st_nlink == 0


def test_a_removed_directory_that_is_open_has_attributes(tree: WorkTree) -> None:
    (tree.path / "d").mkdir()
    descriptor = os.open(tree.path / "d", os.O_DIRECTORY)
    try:
        os.rmdir(tree.path / "d")
        os.mkdir(tree.path / "d", 0o711)
        os.fchmod(descriptor, 0o700)
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o700
        assert stat.S_IMODE((tree.path / "d").stat().st_mode) == 0o711
        assert os.listdir(descriptor) == []
    finally:
        os.close(descriptor)


# --- times ----------------------------------------------------------------------------------------


def ctime_passes(path: Path, call: object, *arguments: object) -> bool:
    before = path.stat().st_ctime_ns
    until(lambda: time.time_ns() > before)
    call(*arguments)  # type: ignore[operator]
    return path.stat().st_ctime_ns > before


def test_ctime_tells_of_changes_that_mtime_does_not(tree: WorkTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"content")
    assert ctime_passes(path, path.chmod, 0o600)
    assert ctime_passes(path, os.utime, path, (1e9, 1e9))
    assert ctime_passes(path, os.chown, path, os.getuid(), os.getgid())
    assert path.stat().st_mtime == 1e9


@pytest.mark.parametrize("empty", [True, False])
def test_truncation_to_the_same_size_sets_the_time(tree: WorkTree, empty: bool) -> None:
    path = tree.path / "file"
    path.write_bytes(b"" if empty else b"content")
    os.utime(path, (1e9, 1e9))
    with path.open("r+b") as file:
        os.ftruncate(file.fileno(), path.stat().st_size)
        assert path.stat().st_mtime > 1e9
    assert path.stat().st_mtime > 1e9
    os.utime(path, (1e9, 1e9))
    with path.open("rb"):
        os.truncate(path, path.stat().st_size)
        assert path.stat().st_mtime > 1e9
    os.utime(path, (1e9, 1e9))
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_mtime > 1e9
    assert path.stat().st_size == 0


def test_what_is_written_after_utime_has_the_time_of_writing(tree: WorkTree) -> None:
    path = tree.path / "file"
    with path.open("wb", 0) as file:
        file.write(b"one")
        os.utime(path, (1e9, 4e9))
        assert path.stat().st_mtime == 4e9
        file.write(b"two")
        assert path.stat().st_mtime < 4e9
    assert path.stat().st_mtime < 4e9


# --- what is not there ---------------------------------------------------------------------------


def test_room_is_not_set_aside(tree: WorkTree) -> None:
    """fallocate(2): glibc's posix_fallocate(3) then extends the file itself."""
    with (tree.path / "file").open("wb+", 0) as file:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        assert libc.fallocate(file.fileno(), 0, 0, 10_000) == -1
        assert ctypes.get_errno() == errno.ENOTSUP
        os.posix_fallocate(file.fileno(), 0, 10_000)
        assert os.fstat(file.fileno()).st_size == 10_000
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 10_000
    assert tree.on_server("file") == bytes(10_000)


def test_there_are_no_unnamed_files(tree: WorkTree) -> None:
    """O_TMPFILE: tempfile makes a name and removes it."""
    assert errno_of(os.open, tree.path, os.O_TMPFILE | os.O_RDWR) == errno.ENOTSUP
    with tempfile.TemporaryFile(dir=tree.path) as file:
        file.write(b"content")
        file.seek(0)
        assert file.read() == b"content"
    assert os.listdir(tree.path) == []


# --- modes ----------------------------------------------------------------------------------------


def test_a_new_owner_takes_the_set_user_id_bit(tree: WorkTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"content")
    path.chmod(0o6755)
    os.chown(path, os.getuid(), os.getgid())
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_what_only_the_owner_may_do(real_home: RealHome, tmp_path: Path) -> None:
    """SFTP has one code for EACCES and EPERM."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ordinary_user(tmp_path / "server") as server,
        mounted(
            real_home,
            {"ns": served_by_ssh(server, Path(folder))},
            expected=["may not be accessed|may not be"],
        ) as mount,
    ):
        os.chmod(folder, 0o1777)
        own = mount.path / "ns" / "own"
        until(lambda: errno_of(own.write_bytes, b"content") is None, 5)
        assert errno_of(os.chown, own, 12345, -1) == errno.EPERM
        own.chmod(0o600)
        if os.getuid():
            return
        (Path(folder) / "roots").write_bytes(b"content")
        roots = mount.path / "ns" / "roots"
        until(roots.exists, 5)
        assert errno_of(roots.open, "r+b") == errno.EACCES
        assert errno_of(os.truncate, roots, 3) == errno.EACCES
        assert errno_of(roots.chmod, 0o600) == errno.EPERM
        assert errno_of(os.utime, roots, (1, 1)) == errno.EPERM
        assert errno_of(roots.unlink) == errno.EPERM
        assert errno_of(roots.rename, mount.path / "ns" / "new") == errno.EPERM
        assert errno_of(own.rename, roots) == errno.EPERM
        os.chmod(folder, 0o755)
        until(lambda: errno_of((mount.path / "ns" / "new").touch) == errno.EACCES, 5)
        assert errno_of(own.unlink) == errno.EACCES
