"""Servers behind links that tests cut, and small disks that tests fill. Every test has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import disks
from tests.support.link import Link, link_to, ssh_config_through
from tests.support.mounts import (
    RealHome,
    Served,
    make_real_home,
    pytest_runtest_makereport,
    served_by_s3,
    served_by_ssh,
)
from tests.support.s3 import moto_s3, rclone_s3
from tests.support.sshd import SshServer, ssh_server

__all__ = ["pytest_runtest_makereport"]


@pytest.fixture
def real_home(tmp_path: Path) -> RealHome:
    return make_real_home(tmp_path / "home")


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[SshServer]:
    with ssh_server(tmp_path / "sshd") as server:
        yield server


@dataclass
class Linked:
    """A folder on a server of its own, reached over a link."""

    kind: str
    served: Served
    link: Link


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Callable[[str], Linked]]:
    """Starts a server of this kind."""
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(_linked(kind, tmp_path / kind))


@contextmanager
def _linked(kind: str, directory: Path) -> Iterator[Linked]:
    directory.mkdir()
    if kind == "sftp":
        with ssh_server(directory / "server") as server, link_to(server.port) as link:
            config = directory / "ssh_config"
            config.write_text(ssh_config_through(link, server))
            yield Linked(kind, served_by_ssh(server, ssh_config=config), link)
    else:
        with (
            rclone_s3(directory) if kind == "s3-rclone" else moto_s3() as s3,
            link_to(int(s3.endpoint_url.rpartition(":")[2])) as link,
        ):
            url = f"http://127.0.0.1:{link.port}"
            yield Linked(kind, served_by_s3(kind, s3, url), link)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many MiB."""
    with ExitStack() as stack:
        yield lambda megabytes: stack.enter_context(disks.small_disk(tmp_path / "disk", megabytes))
