"""`write = "back"` on real mounts: programs work, and after `hpcfs sync`, an unmount, a signal or a
kill the server has what was closed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.mount.test_programs import git
from tests.mount.test_trees import recipe, rsync_finds_to_do
from tests.support.mounts import (
    KINDS,
    Mount,
    RealHome,
    Served,
    errno_of,
    kill,
    mounted,
    run,
    until,
)
from tests.support.trees import make_tree

BACK = pytest.mark.parametrize("kind", KINDS)


def served_back(servers: Servers, kind: str) -> Served:
    return servers.serve(kind).but(write="back")


def sync(mount: Mount) -> None:
    done = mount.home.run("sync", mount.path)
    assert done.returncode == 0, done.stderr
    assert mount.status.pending == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree of files, small ones and some of several MiB."""
    made = tmp_path / "source"
    make_tree(made, replace(recipe("s3-moto", "rsync -a"), count=60))
    return made


@BACK
def test_rsync_and_sync(kind: str, servers: Servers, real_home: RealHome, source: Path) -> None:
    served = served_back(servers, kind).but(symlinks="follow")  # some of the tree's lead out
    with mounted(real_home, {"ns": served}) as mount:
        target = mount.path / "ns" / "tree"
        run("rsync", "-a", f"{source}/", f"{target}/")
        run("diff", "-r", "--no-dereference", source, target)
        sync(mount)
        assert rsync_finds_to_do(source, target) == ""
        mount.remount("--cache-dir", mount.home.path / "another-cache")
        assert rsync_finds_to_do(source, target) == ""


@BACK
def test_git(kind: str, servers: Servers, real_home: RealHome, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    git(tmp_path, "init", "-q", "-b", "main", repository)
    for number in range(40):
        (repository / f"file-{number}").write_text(f"{number}\n" * 50)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "first")
    with mounted(real_home, {"ns": served_back(servers, kind)}) as mount:
        clone = mount.path / "ns" / "clone"
        git(tmp_path, "clone", "-q", "--no-hardlinks", repository, clone)
        (clone / "new").write_text("new\n")
        git(clone, "add", "-A")
        git(clone, "commit", "-q", "-m", "from the mount")
        git(clone, "gc", "-q")
        mount.remount("--cache-dir", mount.home.path / "another-cache")
        assert git(clone, "status", "--porcelain") == ""
        git(clone, "fsck", "--strict", "--full")
        assert git(clone, "log", "-1", "--format=%s") == "from the mount\n"


@BACK
def test_unmounting_waits_for_all(
    kind: str, servers: Servers, real_home: RealHome, source: Path
) -> None:
    served = served_back(servers, kind)
    with mounted(real_home, {"ns": served}) as mount:
        shutil.copytree(source, mount.path / "ns" / "tree", symlinks=True)
        mount.umount()
        _check_on_server(served, source)


def _check_on_server(served: Served, source: Path) -> None:
    for path in source.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode):
            name = os.path.join("tree", path.relative_to(source))
            assert served.inside.read(name) == path.read_bytes(), name


def test_ending_the_daemon_waits_for_all(
    servers: Servers, real_home: RealHome, source: Path
) -> None:
    served = served_back(servers, "sftp")
    with mounted(real_home, {"ns": served}) as mount:
        shutil.copytree(source, mount.path / "ns" / "tree", symlinks=True)
        kill(mount.status.pid, signal.SIGTERM)
        until(lambda: not mount.is_mounted)
        _check_on_server(served, source)


@BACK
def test_a_killed_daemon_loses_nothing_that_was_closed(
    kind: str, servers: Servers, real_home: RealHome
) -> None:
    """Killed in the half second in which files settle: none of them is on the server yet."""
    served = served_back(servers, kind)
    with mounted(real_home, {"ns": served}) as mount:
        folder = mount.path / "ns" / "folder"
        folder.mkdir()
        os.listdir(folder)
        for number in range(20):
            (folder / f".{number}.tmp").write_bytes(b"%d" % number * 1000)
            os.utime(folder / f".{number}.tmp", (10**9, 10**9))
            (folder / f".{number}.tmp").rename(folder / str(number))
        mount.kill_daemon()
        mount.mount()
        assert sorted(os.listdir(folder), key=int) == [str(number) for number in range(20)]
        for number in range(20):
            assert (folder / str(number)).read_bytes() == b"%d" % number * 1000
            assert (folder / str(number)).stat().st_mtime == 10**9
        sync(mount)
        for number in range(20):
            assert served.inside.read(f"folder/{number}") == b"%d" % number * 1000
        assert not served.inside.exists("folder/.0.tmp")


def test_a_conflict_is_told(servers: Servers, real_home: RealHome) -> None:
    """Others wrote to the file while it was open here: both versions are on the server."""
    served = servers.serve("sftp")
    served.inside.write("file", b"old")
    with mounted(real_home, {"ns": served}, expected=["was changed"]) as mount:
        file = os.open(mount.path / "ns" / "file", os.O_RDWR)
        os.pwrite(file, b"mine", 0)
        served.inside.write("file", b"somebody else's")
        assert errno_of(os.close, file) == errno.ESTALE
        assert served.inside.read("file") == b"somebody else's"
        shown = real_home.run("status", mount.path).stdout
        (beside,) = re.findall(r"conflict: ns/file was .* is beside it as (\S+)", shown)
        assert served.inside.read(beside) == b"mine"
        assert (mount.path / "ns" / "file").read_bytes() == b"somebody else's"


def test_a_link_that_is_renamed_over_goes_on(servers: Servers, real_home: RealHome) -> None:
    """Under its other name, with what is being written to it."""
    with mounted(real_home, {"ns": served_back(servers, "sftp")}) as mount:
        top = mount.path / "ns"
        (top / "one").write_bytes(b"old")
        os.link(top / "one", top / "two")
        with (top / "one").open("r+b", 0) as file:
            file.write(b"mine")
            (top / "new").write_bytes(b"new")
            os.rename(top / "new", top / "one")
            assert os.fstat(file.fileno()).st_nlink == 1
            file.write(b" too")
        assert ((top / "one").read_bytes(), (top / "two").read_bytes()) == (b"new", b"mine too")
        sync(mount)
        inside = mount.namespaces["ns"].inside
        assert (inside.read("one"), inside.read("two")) == (b"new", b"mine too")


def test_links_of_one_file_are_renamed_over_each_other(
    servers: Servers, real_home: RealHome
) -> None:
    """On the server they still are two, when one of them is to be replaced here."""
    with mounted(real_home, {"ns": served_back(servers, "sftp")}) as mount:
        top = mount.path / "ns"
        (top / "one").write_bytes(b"old")
        os.link(top / "one", top / "two")
        (top / "new").write_bytes(b"new")
        os.rename(top / "new", top / "one")
        os.rename(top / "two", top / "one")
        assert os.listdir(top) == ["one"]
        sync(mount)
        assert mount.namespaces["ns"].inside.read("one") == b"old"
        assert not mount.namespaces["ns"].inside.exists("two")
