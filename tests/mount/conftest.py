"""One mount of three namespaces, one of each kind, for all tests of ordinary work.

Every test gets a directory of its own in it (`tree`, once for each kind), and fails if the daemon
logged a problem meanwhile. Tests that kill or remount daemons make mounts of their own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mounts import (
    KINDS,
    Inside,
    Mount,
    RealHome,
    Served,
    make_real_home,
    mounted,
    pytest_runtest_makereport,
    served_by_s3,
    served_by_ssh,
)
from tests.support.s3 import S3Server, moto_s3, rclone_s3
from tests.support.sshd import SshServer, ssh_server

__all__ = ["pytest_runtest_makereport"]
_numbers = itertools.count()


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with ssh_server(tmp_path_factory.mktemp("sshd") / "server") as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_s3(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with moto_s3() as server:
        yield server


@dataclass
class Servers:
    """All running; `serve` gives a new empty folder on the one of this kind."""

    sshd: SshServer
    rclone: S3Server
    moto: S3Server

    def serve(self, kind: str) -> Served:
        if kind == "sftp":
            return served_by_ssh(self.sshd)
        return served_by_s3(kind, self.rclone if kind == "s3-rclone" else self.moto)


@pytest.fixture(scope="session")
def servers(sshd: SshServer, rclone: S3Server, moto: S3Server) -> Servers:
    return Servers(sshd, rclone, moto)


@pytest.fixture(scope="session")
def everything(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    home = make_real_home(tmp_path_factory.mktemp("everything") / "home")
    with mounted(home, {kind: servers.serve(kind) for kind in KINDS}) as mount:
        yield mount


@dataclass
class WorkTree:
    """An empty directory of one namespace of the mount, and what the server has in it."""

    kind: str
    mount: Mount
    name: str

    @property
    def path(self) -> Path:
        return self.mount.path / self.kind / self.name

    @property
    def is_s3(self) -> bool:
        return self.kind != "sftp"

    @property
    def inside(self) -> Inside:
        """Paths are relative to the namespace's folder: put `name` before them."""
        return self.mount.namespaces[self.kind].inside

    def on_server(self, path: str) -> bytes:
        return self.inside.read(f"{self.name}/{path}")

    def write_on_server(self, path: str, data: bytes) -> None:
        self.inside.write(f"{self.name}/{path}", data)

    def remove_on_server(self, path: str) -> None:
        self.inside.remove(f"{self.name}/{path}")


def _work_tree(kind: str, everything: Mount) -> Iterator[WorkTree]:
    everything.problems()
    made = WorkTree(kind, everything, f"work-{next(_numbers)}")
    os.mkdir(made.path)
    yield made
    everything.check_log()


@pytest.fixture(params=KINDS)
def tree(request: pytest.FixtureRequest, everything: Mount) -> Iterator[WorkTree]:
    yield from _work_tree(request.param, everything)


@pytest.fixture
def sftp_tree(everything: Mount) -> Iterator[WorkTree]:
    yield from _work_tree("sftp", everything)


@pytest.fixture(params=KINDS[1:])
def s3_tree(request: pytest.FixtureRequest, everything: Mount) -> Iterator[WorkTree]:
    yield from _work_tree(request.param, everything)


@pytest.fixture
def real_home(tmp_path: Path) -> RealHome:
    return make_real_home(tmp_path / "home")
