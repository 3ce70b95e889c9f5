"""One server of each kind for all tests of the contract; every test gets a root of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcfs.laptop.acceptor import EndpointKind
from hpcfs.laptop.shares import Share
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.remotes.s3.site import S3SiteConnection
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.tunnel.site import TunnelSiteConnection
from tests.remotes.contract import Subject
from tests.support.laptop import Laptop, laptop
from tests.support.s3 import S3Server, moto_s3, rclone_s3
from tests.support.sshd import LOCAL_GID, LOCAL_UID, ScriptedPrompter, SshServer, ssh_server

KINDS = ("sftp", "openssh", "tunnel", "tunnel-tcp", "s3-rclone", "s3-moto")
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's ~/.ssh nor an agent or ~/.aws takes part in a test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SSH_AUTH_SOCK", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with ssh_server(tmp_path_factory.mktemp("sshd") / "server") as server:
        yield server


@pytest.fixture(scope="session")
def s3_rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_s3(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_moto() -> Iterator[S3Server]:
    with moto_s3() as server:
        yield server


@pytest.fixture(scope="session")
def laptop_unix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    place = tmp_path_factory.mktemp("lap")
    with laptop(place, Share("data", tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture(scope="session")
def laptop_tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    place = tmp_path_factory.mktemp("lap")
    with laptop(place, Share("data", tmp_path_factory.mktemp("data")), kind="tcp") as running:
        yield running


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_s3() as server:
        yield server


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_s3(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture(params=["moto", "rclone"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, S3Server)
    return found


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A part of the bucket of its own for each test."""
    return f"t{abs(hash(request.node.nodeid))}"


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    makers: dict[str, Callable[[], Subject]] = {
        "sftp": lambda: _sftp("sftp", request.getfixturevalue("sshd"), "asyncssh"),
        "openssh": lambda: _sftp("openssh", request.getfixturevalue("sshd"), "openssh"),
        "tunnel": lambda: _tunnel("tunnel", request, "unix"),
        "tunnel-tcp": lambda: _tunnel("tunnel-tcp", request, "tcp"),
        "s3-rclone": lambda: _s3(
            "s3-rclone", request.getfixturevalue("s3_rclone"), request.getfixturevalue("tmp_path")
        ),
        "s3-moto": lambda: _s3(
            "s3-moto", request.getfixturevalue("s3_moto"), request.getfixturevalue("tmp_path")
        ),
    }
    return makers[request.param]()


def _sftp(kind: str, server: SshServer, transport: str) -> Subject:
    root = server.root / f"root-{next(_numbers)}"
    root.mkdir()
    spec = server.site_spec(os.fspath(root), server.site(transport=transport))
    return Subject(kind, lambda: SshSiteConnection(spec, ScriptedPrompter()), root)


def _tunnel(kind: str, request: pytest.FixtureRequest, way: EndpointKind) -> Subject:
    running: Laptop = request.getfixturevalue(f"laptop_{way}")
    (share,) = running.shares
    root = share.directory / f"root-{next(_numbers)}"
    root.mkdir()
    spec = running.site_spec(f"/{share.name}/{root.name}", share.directory)
    return Subject(kind, lambda: TunnelSiteConnection(spec), root)


def _s3(kind: str, server: S3Server, cache: Path) -> Subject:
    spec = SiteSpec(
        site=S3Site(
            endpoint_url=server.endpoint_url,
            region="us-east-1",
            access_key=Secret(server.access_key),
            secret_key=Secret(server.secret_key),
        ),
        roots={"ns": S3Root(server.bucket, prefix=f"root-{next(_numbers)}")},
        state_dir=str(cache),
        uid=LOCAL_UID,
        gid=LOCAL_GID,
    )
    return Subject(kind, lambda: S3SiteConnection(spec))
