"""Links on a server that lead local programs out of the mount, and links that do not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcfs.laptop.shares import Share
from tests.mount.conftest import Servers
from tests.support.laptop import NAME, laptop
from tests.support.mounts import (
    Mount,
    OnDisk,
    RealHome,
    Served,
    errno_of,
    mounted,
    run,
    served_by_s3,
)

Plant = Callable[[str, str], None]
"""(path, target): somebody else makes a link on the server."""


@contextmanager
def with_links(
    kind: str, servers: Servers, home: RealHome, symlinks: str | None = None, write: str = "through"
) -> Iterator[tuple[Mount, Path, Plant]]:
    """A mount with one namespace, its place, and what plants links in it."""
    keys: dict[str, str | bool | float] = {"write": write}
    if symlinks is not None:
        keys["symlinks"] = symlinks
    if kind == "tunnel":
        folder = home.path / "shared"
        folder.mkdir()
        served = Served(
            "tunnel", {"type": "tunnel", "tunnel": NAME, "path": "data"}, OnDisk(folder)
        )
        with (
            laptop(home.path, Share("data", folder)),
            mounted(home, {"ns": served.but(**keys)}) as mount,
        ):
            yield mount, mount.path / "ns", lambda path, to: (folder / path).symlink_to(to)
        return
    served = servers.serve(kind).but(**keys)

    def plant(path: str, target: str) -> None:
        if isinstance(served.inside, OnDisk):
            (served.inside.root / path).symlink_to(target)
            return
        with servers.moto.client() as client:
            client.put_object(
                Bucket=servers.moto.bucket,
                Key=f"{served.keys['prefix']}/{path}",
                Body=target.encode(),
                Metadata={"mode": "41471", "mtime": "1700000000"},
            )

    with mounted(home, {"ns": served}) as mount:
        yield mount, mount.path / "ns", plant


REMOTES = ("sftp", "s3-moto", "tunnel")


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("kind", REMOTES)
def test_a_server_s_links_lead_nobody_out_of_the_mount(
    servers: Servers, real_home: RealHome, kind: str, write: str
) -> None:
    precious = real_home.path / "precious"
    precious.write_bytes(b"local")
    up = "../" * 30
    with with_links(kind, servers, real_home, write=write) as (_, place, plant):
        os.mkdir(place / "d")
        (place / "d" / "file").write_bytes(b"remote")
        run("hpcfs", "sync", place, **real_home.environment())
        out = [str(precious), f"{up}{precious}", "../../precious", f"d/../{up}{precious}"]
        plant("in", "d/file")
        plant("d/up", "../d/file")
        for number, target in enumerate(out):
            plant(f"out{number}", target)
        for number in range(len(out)):
            link = place / f"out{number}"
            assert link.is_symlink()
            for call in (
                lambda link=link: link.write_bytes(b"stolen"),
                lambda link=link: link.read_bytes(),
                lambda link=link: os.stat(link),
                lambda link=link: os.readlink(link),
                lambda link=link: os.truncate(link, 0),
                lambda link=link: os.chmod(link, 0),
            ):
                assert errno_of(call) == errno.EPERM
        assert (place / "in").read_bytes() == (place / "d" / "up").read_bytes() == b"remote"
        assert os.readlink(place / "d" / "up") == "../d/file"
    assert precious.read_bytes() == b"local"


def test_absolute_links_below_the_root_are_translated(
    servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    """As the server's own users make them; also where the namespace's path is a link itself."""
    served = servers.serve("sftp")
    assert isinstance(served.inside, OnDisk)
    root = served.inside.root
    other = tmp_path / "other-name"
    other.symlink_to(root)
    (root / "d" / "e").mkdir(parents=True)
    (root / "file").write_bytes(b"remote")
    (root / "d" / "e" / "named").symlink_to(other / "file")
    (root / "d" / "e" / "real").symlink_to(root / "file")
    (root / "d" / "e" / "top").symlink_to(root)
    (root / "d" / "e" / "out").symlink_to(root.parent / "file")
    with mounted(real_home, {"ns": served.but(path=str(other))}) as mount:
        place = mount.path / "ns" / "d" / "e"
        for name in ("named", "real"):
            assert os.readlink(place / name) == "../../file"
            assert (place / name).read_bytes() == b"remote"
        assert sorted(os.listdir(place / "top")) == ["d", "file"]
        assert errno_of(os.readlink, place / "out") == errno.EPERM


def test_absolute_links_of_a_laptop_mean_its_own_paths(
    servers: Servers, real_home: RealHome
) -> None:
    """What a tunnel shows at its top is not what the laptop has there."""
    with with_links("tunnel", servers, real_home) as (_, place, plant):
        plant("out", "/data/file")
        assert errno_of(os.readlink, place / "out") == errno.EPERM


@pytest.mark.parametrize("kind", REMOTES)
def test_follow_and_hide(servers: Servers, real_home: RealHome, kind: str) -> None:
    local = real_home.path / "local"
    local.write_bytes(b"local")
    with with_links(kind, servers, real_home, "follow") as (mount, place, plant):
        plant("out", str(local))
        assert os.readlink(place / "out") == str(local)
        assert (place / "out").read_bytes() == b"local"
        mount.umount()
        mount.namespaces["ns"] = mount.namespaces["ns"].but(symlinks="hide")
        mount.mount()
        assert os.listdir(place) == []
        assert errno_of(os.lstat, place / "out") == errno.ENOENT
        assert errno_of(os.symlink, "x", place / "new") == errno.EPERM
        mount.umount()
        mount.mount("--symlinks", "contain")
        assert os.listdir(place) == ["out"]
        assert errno_of(os.readlink, place / "out") == errno.EPERM


def test_links_that_are_copied_in_are_what_they_were(
    servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    """rsync compares them, and would make them again."""
    source = tmp_path / "source"
    source.mkdir()
    for name, target in (("abs", "/usr/bin/env"), ("up", "../../x"), ("in", "f"), ("loop", "loop")):
        (source / name).symlink_to(target)
    with mounted(real_home, {"ns": servers.serve("sftp")}) as mount:
        run("rsync", "-a", f"{source}/", mount.path / "ns" / "copy")
        assert run("rsync", "-ai", f"{source}/", mount.path / "ns" / "copy") == ""
        run("diff", "-r", "--no-dereference", source, mount.path / "ns" / "copy")


def test_a_url_may_say_where_links_lead(servers: Servers, real_home: RealHome) -> None:
    served = served_by_s3("s3-moto", servers.moto)
    url = f"s3://{served.keys['bucket']}/{served.keys['prefix']}?endpoint_url="
    environment = {
        "AWS_ACCESS_KEY_ID": servers.moto.access_key,
        "AWS_SECRET_ACCESS_KEY": servers.moto.secret_key,
        "AWS_DEFAULT_REGION": servers.moto.region,
    }
    with servers.moto.client() as client:
        client.put_object(
            Bucket=servers.moto.bucket,
            Key=f"{served.keys['prefix']}/out",
            Body=b"/nowhere",
            Metadata={"mode": "41471"},
        )
    place = real_home.path / "by-url"
    place.mkdir()
    full = f"{url}{servers.moto.endpoint_url}&symlinks=follow"
    run(*real_home.command("mount", full, place), **{**real_home.environment(), **environment})
    try:
        assert os.readlink(place / "out") == "/nowhere"
    finally:
        run(*real_home.command("umount", place), **real_home.environment())
