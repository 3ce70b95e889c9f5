"""`hpcfs check` on the cluster: what it finds of a laptop, and of each way not to reach it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcfs.cli import check_laptop
from hpcfs.cli.findings import Finding
from hpcfs.laptop.acceptor import EndpointKind
from hpcfs.laptop.identity import TunnelIdentity
from hpcfs.laptop.shares import Share
from hpcfs.model.sites import SftpRoot, TunnelSite
from hpcfs.remotes.tunnel import pipe
from hpcfs.tunnel.file import UnixEndpoint
from tests.support.command import Home, make_home
from tests.support.laptop import NAME, Laptop, laptop


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


@pytest.fixture(params=["unix", "tcp"])
def running(request: pytest.FixtureRequest, home: Home) -> Iterator[Laptop]:
    kind: EndpointKind = request.param
    (home.path / "data" / "run7").mkdir(parents=True)
    with laptop(home.path, Share("data", home.path / "data"), kind=kind) as found:
        yield found


def check(running: Laptop, path: str = "/", name: str = NAME) -> list[Finding]:
    site = TunnelSite(name, str(running.directory))
    return list(check_laptop.laptop_namespace("ns", site, SftpRoot(path)))


def failure(running: Laptop, **more: str) -> str:
    (found,) = check(running, **more)
    assert (found.level, found.subject) == ("fail", "ns")
    return found.text


def test_who_the_laptop_is_and_what_it_shares(running: Laptop) -> None:
    who, shares = check(running, "/data/run7")
    assert (who.level, shares.level) == ("ok", "ok")
    assert "on laptop.example answers, through" in who.text
    way = {"unix": "a socket that only you can open", "tcp": "a port, with SSH behind it"}
    assert way[running.kind] in who.text
    assert shares.text == "it shares data"
    deadline = time.monotonic() + 5
    while running.call(lambda: running.mounts.all) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running.call(lambda: running.mounts.all), "the check has taken leave"


def test_a_folder_that_is_not_shared(running: Laptop) -> None:
    who, shares = check(running, "/dota")
    assert (who.level, shares.level) == ("ok", "fail")
    assert "does not exist: correct path, it shares data" in shares.text


def test_no_tunnel_of_that_name(running: Laptop) -> None:
    said = failure(running, name="other")
    assert "run 'hpcfs tunnel HOST --name other' on the laptop" in said
    assert said.endswith(f"(tunnels in {running.directory}: {NAME})")
    running.withdraw()
    assert failure(running).endswith(f"(tunnels in {running.directory}: none)")


def test_a_file_that_was_cut_short(running: Laptop) -> None:
    file = running.directory / f"{NAME}.json"
    os.truncate(file, 200)
    said = failure(running)
    assert "is damaged or was not written by hpcfs" in said
    assert "writes it anew" in said


@pytest.mark.parametrize("which", ["file", "directory", "parent"])
def test_what_others_could_change(running: Laptop, which: str) -> None:
    file = running.directory / f"{NAME}.json"
    place = {"file": file, "directory": running.directory, "parent": running.directory.parent}
    place[which].chmod(0o777)
    assert f"run 'chmod go-rwx {place[which]}', and start the tunnel again" in failure(running)


def test_a_tunnel_that_was_killed(running: Laptop) -> None:
    running.deafen()
    assert "the tunnel lap of 2026-11-25 10:00 UTC is not up any more" in failure(running)


def test_a_laptop_that_sleeps(running: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "PLACE_SECONDS", 0.3)
    running.silent = True
    assert "does not answer: it sleeps or has no network" in failure(running)


def test_a_tunnel_on_another_machine(running: Laptop) -> None:
    running.deafen()
    running.publish(login_host="login01.cluster")
    said = failure(running)
    assert "it is on login01.cluster" in said
    assert "--bind" in said


@pytest.mark.parametrize("kind", ["file", "foreign", "missing"])
def test_a_socket_that_is_not_ours(running: Laptop, kind: str) -> None:
    path = running.directory / "foreign.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if kind == "file":
            path.touch()
        elif kind == "foreign":
            if os.getuid() != 0:
                pytest.skip("only root can give a socket away")
            listener.bind(str(path))
            os.chown(path, 65534, 65534)
        running.publish(places=[UnixEndpoint(str(path))])
        reason = "No such file" if kind == "missing" else f"{path} is no socket of yours"
        assert reason in failure(running)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"client_key": TunnelIdentity().client_key_text},
            "by the keys of its tunnel|refuses the key",
        ),
        (
            {"host_key": TunnelIdentity().host_key_line},
            "by the keys of its tunnel|is not the one whose",
        ),
        ({"id": "f" * 32}, "something else than this tunnel answers"),
        ({"client_key": "nonsense"}, "has a damaged key"),
    ],
)
def test_keys_that_do_not_fit(running: Laptop, changes: dict[str, Any], said: str) -> None:
    running.publish(**changes)
    found = failure(running)
    assert any(part in found for part in said.split("|"))
    assert "PRIVATE KEY" not in found


def test_as_a_user_calls_it(home: Home, running: Laptop) -> None:
    """The file is found in the home directory, and the exit code tells."""
    fine = home.run("check", "laptop=tunnel:lap")
    assert "ok    laptop: it shares data" in fine.stdout
    assert fine.stderr == ""
    bad = home.run("check", "laptop=tunnel:lop/data")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "fail  laptop: no tunnel named lop is up" in bad.stdout
    assert "PRIVATE KEY" not in fine.stdout + bad.stdout
