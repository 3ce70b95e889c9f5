"""Work with colleagues on one cluster: their files, groups, access lists, and disks that are
read-only. Programs see what they would see there."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.acl import set_default_acl
from tests.support.mounts import (
    WRITE_MODES,
    Mount,
    RealHome,
    errno_of,
    in_write_mode,
    mounted,
    run,
    served_by_s3,
    served_by_ssh,
    until,
)
from tests.support.s3 import moto_s3, with_credentials_that_read
from tests.support.sshd import ordinary_user, ssh_server

COLLEAGUE, PROJECT = 23456, 34567
REFUSED = "setattr: .*(may not be accessed|only root)"


@contextmanager
def shared_folder(
    home: RealHome, directory: Path, write: str, expected: str = ""
) -> Iterator[tuple[Mount, Path]]:
    """A mount by somebody who is not root there, and the folder as the cluster has it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ordinary_user(directory / "server") as server,
    ):
        if not os.getuid():
            shutil.chown(folder, server.user)
        served = in_write_mode(served_by_ssh(server, Path(folder)), write)
        with mounted(home, {"ns": served}, expected=[expected] if expected else []) as mount:
            yield mount, Path(folder)


def sync(mount: Mount) -> None:
    done = mount.home.run("sync", mount.path)
    assert done.returncode == 0, done.stderr
    assert mount.status.pending == []


# --- files of others ------------------------------------------------------------------------------

PROGRAMS = {
    "gzip": (["gzip", "gzip"], "gzip.gz", ["gzip", "-dc"]),
    "xz": (["xz", "--no-warn", "xz"], "xz.xz", ["xz", "-dc"]),
    "sed": (["sed", "-i", "s/one/ONE/", "sed"], "sed", ["cat"]),
    "perl": (["perl", "-i", "-pe", "s/one/ONE/", "perl"], "perl", ["cat"]),
}
"""What each does to the file of its name, the result, and how to read that."""


@pytest.mark.parametrize("write", WRITE_MODES)
def test_programs_on_files_of_a_colleague(write: str, real_home: RealHome, tmp_path: Path) -> None:
    """They try to give the new file to the colleague, and go on when they can't."""
    if os.getuid():
        return  # only root makes files of others
    with shared_folder(real_home, tmp_path, write, REFUSED) as (mount, folder):
        for name in PROGRAMS:
            (folder / name).write_text("one\n")
            (folder / name).chmod(0o644)
            os.chown(folder / name, COLLEAGUE, COLLEAGUE)
        for command, _, _ in PROGRAMS.values():
            run(*command, cwd=mount.path / "ns")
        sync(mount)
        assert sorted(os.listdir(folder)) == sorted(result for _, result, _ in PROGRAMS.values())
        for command, result, reading in PROGRAMS.values():
            assert run(*reading, folder / result) == ("ONE\n" if "-i" in command else "one\n")
            assert (mount.path / "ns" / result).stat().st_uid == os.getuid()
            assert (folder / result).stat().st_uid != COLLEAGUE
            assert stat.S_IMODE((folder / result).stat().st_mode) == 0o644


@pytest.mark.parametrize("write", WRITE_MODES)
def test_giving_away_is_refused_at_once(write: str, real_home: RealHome, tmp_path: Path) -> None:
    with shared_folder(real_home, tmp_path, write, REFUSED) as (mount, folder):
        with (mount.path / "ns" / "file").open("wb", 0) as file:
            file.write(b"content")
            for owner in ((COLLEAGUE, -1), (-1, PROJECT), (COLLEAGUE, PROJECT)):
                assert errno_of(os.fchown, file.fileno(), *owner) == errno.EPERM
            os.fchown(file.fileno(), os.getuid(), os.getgid())
            file.write(b"!")
        sync(mount)
        assert errno_of(os.chown, mount.path / "ns" / "file", COLLEAGUE, -1) == errno.EPERM
        assert (folder / "file").read_bytes() == b"content!"


@pytest.mark.parametrize("write", WRITE_MODES)
def test_a_file_that_the_group_may_write(write: str, real_home: RealHome, tmp_path: Path) -> None:
    if os.getuid():
        return  # only root makes files of others
    with shared_folder(real_home, tmp_path, write, REFUSED) as (mount, folder):
        (folder / "file").write_bytes(b"content")
        (folder / "file").chmod(0o666)
        os.chown(folder / "file", COLLEAGUE, COLLEAGUE)
        with (mount.path / "ns" / "file").open("r+b", 0) as file:
            file.write(b"CON")
            assert errno_of(os.fchmod, file.fileno(), 0o600) == errno.EPERM
            assert errno_of(os.fchown, file.fileno(), -1, PROJECT) == errno.EPERM
            assert errno_of(os.utime, file.fileno(), (1, 1)) == errno.EPERM
        sync(mount)
        assert (folder / "file").read_bytes() == b"CONtent"


# --- what is made in shared directories -----------------------------------------------------------


def assert_shown(here: Path, there: Path) -> None:
    """As the server has it; the kernel believes for a second what it was told before an upload."""
    right = there.stat().st_mode, there.stat().st_gid
    until(lambda: (here.stat().st_mode, here.stat().st_gid) == right, 5, f"{here} is {right}")


def make_everything(top: Path, source: Path) -> None:
    """In all ways in which programs do it. `source` is readable by all."""
    (top / "written").write_bytes(b"content")
    (top / "d").mkdir()
    (top / "d" / "below").write_bytes(b"content")
    (top / "l").symlink_to("written")
    (top / "empty").touch()
    shutil.copyfile(source, top / "new")
    os.rename(top / "new", top / "written")  # over another


@pytest.mark.parametrize("write", WRITE_MODES)
def test_access_lists_of_the_server_decide(
    write: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    served = in_write_mode(servers.serve("sftp"), write)
    folder = Path(str(served.keys["path"]))
    set_default_acl(folder, 7, 5, 0)
    source = tmp_path / "source"
    source.write_bytes(b"content")
    with mounted(real_home, {"ns": served}) as mount:
        make_everything(mount.path / "ns", source)
        sync(mount)
        for path in ("written", "d", "d/below", "empty"):
            assert not (folder / path).stat().st_mode & 0o027, path
            assert_shown(mount.path / "ns" / path, folder / path)
        run("chmod", "a+r", mount.path / "ns" / "written")
        assert stat.S_IMODE((folder / "written").stat().st_mode) == 0o644
        run("cp", "-p", source, mount.path / "ns" / "kept")
        sync(mount)
        assert stat.S_IMODE((folder / "kept").stat().st_mode) == stat.S_IMODE(source.stat().st_mode)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_groups_of_directories_are_inherited(
    write: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    if os.getuid():
        return  # only root makes files of others
    served = in_write_mode(servers.serve("sftp"), write)
    folder = Path(str(served.keys["path"]))
    os.chown(folder, -1, PROJECT)
    folder.chmod(0o2775)
    source = tmp_path / "source"
    source.write_bytes(b"content")
    with mounted(real_home, {"ns": served}) as mount:
        top = mount.path / "ns"
        make_everything(top, source)
        assert {(top / path).stat().st_gid for path in ("written", "d", "d/below")} == {PROJECT}
        sync(mount)
        for path in ("written", "d", "d/below", "empty"):
            assert (folder / path).stat().st_gid == PROJECT
            assert_shown(top / path, folder / path)
        assert (folder / "d").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("write", WRITE_MODES)
def test_copies_into_a_directory_of_a_group_are_as_on_the_server(
    write: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    """The same command in such a directory of the server says what is right."""
    if os.getuid():
        return  # only root is in another group for certain
    served = in_write_mode(servers.serve("sftp"), write)
    folder, local = Path(str(served.keys["path"])), tmp_path / "local"
    local.mkdir()
    for directory in (folder, local):
        os.chown(directory, -1, PROJECT)
        directory.chmod(0o2775)
    source = tmp_path / "source"
    source.write_bytes(b"content")
    os.chown(source, -1, 0)
    with mounted(real_home, {"ns": served}) as mount:
        for command in ("cp -p", "cp -a", "rsync -a", "install -m 640", "rsync -rlpt"):
            run(*command.split(), source, mount.path / "ns" / command)
            run(*command.split(), source, local / command)
        sync(mount)
        for right in local.iterdir():
            there, locally = (folder / right.name).stat(), right.stat()
            assert (there.st_gid, there.st_mode) == (locally.st_gid, locally.st_mode), right
            assert_shown(mount.path / "ns" / right.name, right)
        told = run("rsync", "-ai", source, mount.path / "ns" / "rsync -a")
        assert told == "", "a second one finds nothing to do"


# --- read-only ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITE_MODES)
def test_a_server_that_only_reads(write: str, real_home: RealHome, tmp_path: Path) -> None:
    with ssh_server(tmp_path / "server", subsystem="internal-sftp -R") as server:
        served = in_write_mode(served_by_ssh(server), write)
        folder = Path(str(served.keys["path"]))
        (folder / "file").write_bytes(b"content")
        (folder / "d").mkdir()
        with mounted(
            real_home, {"ns": served}, expected=["only lets read|read-only on the remote"]
        ) as mount:
            top = mount.path / "ns"
            for attempt in (
                (os.mkdir, top / "new"),
                (os.rmdir, top / "d"),
                (os.unlink, top / "file"),
                (os.rename, top / "file", top / "new"),
                (os.symlink, "file", top / "new"),
                (os.chmod, top / "file", 0o600),
                (os.utime, top / "file", (1, 1)),
                (os.truncate, top / "file", 3),
                ((top / "new").write_bytes, b"content"),
                ((top / "file").write_bytes, b"other"),
                ((top / "file").open, "r+b"),
            ):
                assert errno_of(*attempt) == errno.EROFS, attempt
            assert (top / "file").read_bytes() == b"content"
            sync(mount)


@pytest.mark.parametrize("write", WRITE_MODES)
def test_credentials_for_s3_that_only_read(write: str, real_home: RealHome) -> None:
    with moto_s3() as server:
        with server.client() as client:
            client.put_object(Bucket=server.bucket, Key="file", Body=b"content")
        reading = served_by_s3("s3-moto", with_credentials_that_read(server)).but(prefix="")
        served = in_write_mode(reading, write)
        with mounted(real_home, {"ns": served}, expected=["denies|not uploaded"]) as mount:
            top = mount.path / "ns"
            for attempt in (
                (os.mkdir, top / "new"),
                (os.unlink, top / "file"),
                (os.rename, top / "file", top / "new"),
                (os.symlink, "file", top / "new"),
                (os.chmod, top / "file", 0o600),
                (os.truncate, top / "file", 3),
            ):
                assert errno_of(*attempt) == errno.EACCES, attempt
            assert (top / "file").read_bytes() == b"content"
            refused = None if write == "back" else errno.EACCES
            assert errno_of((top / "new").write_bytes, b"content") == refused
            assert mount.home.run("sync", mount.path).returncode == 1
            assert "denies access" in mount.home.run("status", mount.path).stdout
