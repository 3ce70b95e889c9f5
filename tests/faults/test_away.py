"""A namespace that is away, on real mounts: what is cached is served, new files are taken."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import RealHome, errno_of, mounted, until

Starts = Callable[[str], Linked]
WAYS = [("sftp", "cut"), ("s3-rclone", "freeze")]
PATIENCE = 2.0
MARGIN = 5.0
"""For a loaded machine, however many calls there are: none of them waits for the namespace."""
CLEAR = (errno.EHOSTUNREACH, errno.ETIMEDOUT)


def lose(far: Linked, how: str) -> None:
    if how == "cut":
        far.link.cut()
    else:
        far.link.freeze()


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_what_is_cached_is_served_and_nothing_waits(
    kind: str, how: str, linked: Starts, real_home: RealHome
) -> None:
    far = linked(kind)
    inside = far.served.inside
    for number in range(20):
        inside.write(f"dir/f{number}", b"%d" % number * 1000)
    inside.write("uncached", b"x" * 1000)
    with mounted(
        real_home, {"ns": far.served}, "--patience", f"{PATIENCE:g}", expected=(".",)
    ) as mount:
        ns = mount.path / "ns"
        names = sorted(os.listdir(ns / "dir"))
        contents = {name: (ns / "dir" / name).read_bytes() for name in names}
        os.stat(ns / "uncached")
        lose(far, how)
        assert errno_of((ns / "uncached").read_bytes) in CLEAR
        began = time.monotonic()
        assert sorted(os.listdir(ns / "dir")) == names
        assert {name: (ns / "dir" / name).read_bytes() for name in names} == contents
        assert errno_of(os.stat, ns / "dir" / "missing") == errno.ENOENT
        for number in range(20):
            assert errno_of(os.stat, ns / f"unknown{number}") in CLEAR
        assert errno_of((ns / "uncached").read_bytes) in CLEAR
        assert errno_of(os.mkdir, ns / "dir" / "new") in CLEAR
        assert errno_of(os.open, ns / "dir" / "f1", os.O_WRONLY) in CLEAR
        assert time.monotonic() - began < MARGIN
        far.link.mend()
        inside.write("dir/f1", b"changed meanwhile")
        until(lambda: (ns / "dir" / "f1").read_bytes() == b"changed meanwhile", 20)
        assert (ns / "uncached").read_bytes() == b"x" * 1000


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_new_files_in_known_directories_wait_here(
    kind: str, how: str, linked: Starts, real_home: RealHome, tmp_path: Path
) -> None:
    far = linked(kind)
    inside = far.served.inside
    inside.write("known/old", b"old")
    source = tmp_path / "source"
    source.mkdir()
    copied = {f"c{number}": os.urandom(5000) for number in range(10)}
    for name, data in copied.items():
        (source / name).write_bytes(data)
    options = ("--write", "back", "--patience", f"{PATIENCE:g}")
    with mounted(real_home, {"ns": far.served}, *options, expected=(".",)) as mount:
        known = mount.path / "ns" / "known"
        assert os.listdir(known) == ["old"]
        lose(far, how)
        for number in range(5):
            (known / f"n{number}").write_bytes(b"%d" % number)
        began = time.monotonic()
        os.rename(known / "n0", known / "renamed")
        os.rename(known / "n1", known / "old")
        os.unlink(known / "n2")
        os.chmod(known / "n3", 0o600)
        os.utime(known / "n3", (1, 1))
        for command in (
            ["cp", "-r", f"{source}/.", str(known)],
            ["rsync", "-a", f"{source}/", str(known)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), command
        shown = {"old", "renamed", "n3", "n4", *copied}
        assert set(os.listdir(known)) == shown
        assert (known / "old").read_bytes() == b"1"
        assert time.monotonic() - began < MARGIN
        far.link.mend()
        synced = real_home.run("sync", mount.path)
        assert synced.returncode == 0, synced.stderr
        found = {name: inside.read(f"known/{name}") for name in shown}
        assert found == {"old": b"1", "renamed": b"0", "n3": b"3", "n4": b"4", **copied}
        assert not inside.exists("known/n2")
        if kind == "sftp":  # buckets keep no times of directories
            assert int(os.stat(known).st_mtime) == int(os.stat(source).st_mtime)
        assert (os.stat(known / "n3").st_mode & 0o777, os.stat(known / "n3").st_mtime) == (0o600, 1)


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_a_mount_begins_without_a_namespace_that_is_away(
    kind: str, how: str, linked: Starts, real_home: RealHome
) -> None:
    """`hpcfs mount` answers, and the namespace is there once its link is; what an earlier mount has
    cached of it is then read from the cache."""
    far = linked(kind)
    content = os.urandom(200_000)
    far.served.inside.write("file", content)
    options = ("--patience", f"{PATIENCE:g}")
    with mounted(real_home, {"ns": far.served}, *options, expected=(".",)) as mount:
        file = mount.path / "ns" / "file"
        assert file.read_bytes() == content
        mount.umount()
        lose(far, how)
        began = time.monotonic()
        mount.mount(*options)
        assert time.monotonic() - began < 15 + MARGIN  # seconds in which a dead link is noticed
        began = time.monotonic()
        assert os.listdir(mount.path) == ["ns"]
        assert errno_of(file.read_bytes) in CLEAR
        assert errno_of(os.listdir, file.parent) in CLEAR
        assert time.monotonic() - began < MARGIN
        far.link.mend()
        until(lambda: errno_of(os.stat, file) is None, 30)
        far.link.fail_after(100_000)  # too little for the content
        assert file.read_bytes() == content
