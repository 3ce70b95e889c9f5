"""An upload whose answer was lost, or that was refused half-way, and a program that removes or
renames the file next: what the remote has of it goes, or gets the new name, too."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import (
    WRITE_MODES,
    Mount,
    RealHome,
    Served,
    errno_of,
    mounted,
    served_by_s3,
    served_by_ssh,
    until,
)
from tests.support.s3 import rclone_s3
from tests.support.sshd import SshServer

KINDS = ("sftp", "s3-rclone")
MIB = 1024 * 1024
DATA = bytes(range(256)) * 4096
EXPECTED = (
    "reach|nothing answers|connection|ended|no answer|lost|closed|space|full|InternalError",
)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("write", WRITE_MODES)
each_way = pytest.mark.parametrize("way", ["rm", "mv"])


def _has(served: Served, name: str, data: bytes) -> bool:
    return served.inside.exists(name) and served.inside.read(name) == data


@contextmanager
def _answer_lost(far: Linked, mount: Mount) -> Iterator[None]:
    """The open file "f", whose fsync failed though the server has all of it. The link is mended."""
    descriptor = os.open(mount.path / "ns" / "f", os.O_CREAT | os.O_RDWR)
    try:
        os.write(descriptor, DATA)
        far.link.lose_answers_after(len(DATA) // 2)
        failed: list[int | None] = []
        waiting = threading.Thread(target=lambda: failed.append(errno_of(os.fsync, descriptor)))
        waiting.start()
        until(lambda: _has(far.served, "f", DATA))
        far.link.cut()
        waiting.join(60)
        assert failed != [None]
        far.link.mend()
        until(lambda: errno_of(os.listdir, mount.path / "ns") is None)  # it is connected again
        yield
    finally:
        os.close(descriptor)


def _remove_or_rename(way: str, mount: Mount) -> None:
    if way == "rm":
        (mount.path / "ns" / "f").unlink()
    else:
        (mount.path / "ns" / "f").rename(mount.path / "ns" / "g")


def _check(way: str, served: Served, mount: Mount, home: RealHome, data: bytes) -> None:
    """At the mount and at the server, once nothing is pending."""
    assert home.run("sync", mount.path).returncode == 0
    names = [] if way == "rm" else ["g"]
    assert sorted(os.listdir(mount.path / "ns")) == names
    assert not served.inside.exists("f")
    assert all(_has(served, name, data) for name in names)


@each_kind
@each_mode
@each_way
def test_after_the_answer_was_lost(
    kind: str, write: str, way: str, linked: Callable[[str], Linked], real_home: RealHome
) -> None:
    far = linked(kind)
    served, impatient = {"ns": far.served.but(write=write)}, ("--patience", "2")
    with mounted(real_home, served, *impatient, expected=EXPECTED) as mount:
        with _answer_lost(far, mount):
            _remove_or_rename(way, mount)
            assert not far.served.inside.exists("f")
        _check(way, far.served, mount, real_home, DATA)


@contextmanager
def _on_a_small_disk(kind: str, disk: Path, sshd: SshServer) -> Iterator[Served]:
    if kind == "sftp":
        yield served_by_ssh(sshd, disk / "served")
    else:
        with rclone_s3(disk) as server:
            yield served_by_s3(kind, server)


@each_kind
@each_mode
@each_way
def test_after_it_was_refused_half_way(
    kind: str,
    write: str,
    way: str,
    small_disk: Callable[[int], Path],
    sshd: SshServer,
    real_home: RealHome,
) -> None:
    """The server's disk is full in the middle of it; over SFTP a part of the file is there."""
    disk = small_disk(8)
    data = DATA * 4
    with (
        _on_a_small_disk(kind, disk, sshd) as served,
        mounted(real_home, {"ns": served.but(write=write)}, expected=EXPECTED) as mount,
    ):
        filler = disk / "filler"
        filler.write_bytes(bytes(6 * MIB))
        descriptor = os.open(mount.path / "ns" / "f", os.O_CREAT | os.O_RDWR)
        try:
            os.write(descriptor, data)
            number = errno_of(os.fsync, descriptor)
            assert number == errno.ENOSPC if kind == "sftp" else number is not None
            assert served.inside.exists("f") == (kind == "sftp")
            if way == "mv":  # what is renamed must be there first
                filler.unlink()
            _remove_or_rename(way, mount)
            assert not served.inside.exists("f")
        finally:
            os.close(descriptor)
        _check(way, served, mount, real_home, data)
