"""Whoever runs hpcfs in a directory of others runs nothing that lies there: mounts with all that
they start, tunnels, the demo with its servers and its tour."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.mounts import KINDS, RealHome, errno_of, kill, make_real_home, mounted, until
from tests.support.planted import plant
from tests.support.seed import seed
from tests.support.tunnels import ALIAS, NAME

SEARCH_PATHS = ["", ":", "."]
"""Of PYTHONPATH. A home's commands run in its directory, and modules are planted there."""


@pytest.mark.parametrize("search_path", SEARCH_PATHS)
def test_a_mount_and_the_processes_that_it_starts(
    servers: Servers, tmp_path: Path, search_path: str
) -> None:
    home = make_real_home(tmp_path / "home")
    home.environ["PYTHONPATH"] = search_path
    planted = plant(home.path)
    served = {kind: servers.serve(kind) for kind in KINDS}
    served["openssh"] = servers.serve("sftp").but(transport="openssh")
    expected = ["transfer process .*ended"]
    with mounted(home, served, expected=expected) as mount:
        for name in served:
            (mount.path / name / "file").write_bytes(b"content")
        for pid in mount.transfer_processes():
            kill(pid)
        for name in served:  # by processes that were started after the mount
            other = mount.path / name / "other"
            until(lambda other=other: errno_of(other.write_bytes, b"more") is None)
    assert planted.executed == ""


@pytest.mark.parametrize("search_path", [*SEARCH_PATHS, "lib:/opt/lib"])
def test_a_command_has_the_search_path_that_it_was_given(
    servers: Servers, tmp_path: Path, search_path: str
) -> None:
    """`hpcfs run` runs nothing of the directory; what the user runs in it may."""
    home = make_real_home(tmp_path / "home")
    planted = plant(home.path)
    with mounted(home, {"home": servers.serve("sftp")}):
        told = home.run("run", "--", "sh", "-c", 'echo "$PYTHONPATH"', PYTHONPATH=search_path)
    assert (told.returncode, told.stdout) == (0, f"{search_path}\n"), told.stderr
    assert planted.executed == ""


@pytest.mark.parametrize("search_path", SEARCH_PATHS)
def test_a_tunnel(tmp_path: Path, search_path: str) -> None:
    with seed(tmp_path) as found:
        planted = plant(found.laptop.path)
        laptop = RealHome(found.laptop.path, {"PYTHONPATH": search_path})
        tunnel = laptop.start("tunnel", ALIAS, "--name", NAME, "--share", found.shared)
        try:
            until(lambda: found.place() or tunnel.poll() is not None, what="the tunnel is up")
            assert laptop.run("tunnel", "--status").returncode == 0
            assert laptop.run("check", "--tunnel", ALIAS).returncode in (0, 1)
        finally:
            tunnel.send_signal(signal.SIGTERM)
            told = tunnel.communicate(timeout=20)
        assert (tunnel.returncode, planted.executed) == (0, ""), told


@pytest.mark.parametrize("search_path", SEARCH_PATHS)
def test_the_demo_with_its_servers_and_its_tour(tmp_path: Path, search_path: str) -> None:
    home = make_real_home(tmp_path / "home")
    planted = plant(home.path)
    (home.path / "tmp").mkdir()
    more = {"PYTHONPATH": search_path, "TMPDIR": str(home.path / "tmp")}
    result = home.run("demo", "--tour", **more)
    assert (result.returncode, planted.executed) == (0, ""), result.stderr


PROGRAMS = ("fusermount3", "id", "python3", "readlink", "rsync", "sh", "ssh", "ssh-keygen")


@pytest.mark.parametrize("entry", ["", ".", "bin"])
def test_no_program_of_the_current_directory_is_run(
    servers: Servers, tmp_path: Path, entry: str
) -> None:
    """By a PATH with an entry that is empty or relative, where that would come first."""
    home = make_real_home(tmp_path / "home")
    marks = tmp_path / "executed"
    for name in PROGRAMS:
        program = home.path / entry / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {name} >> {marks}\nexit 1\n")
        program.chmod(0o755)
    linked = tmp_path / "linked"
    linked.symlink_to(home.command()[0])
    home.environ["PATH"] = f"{entry}:{os.environ['PATH']}"
    with mounted(home, {"home": servers.serve("sftp").but(transport="openssh")}) as mount:
        (mount.path / "home" / "file").write_bytes(b"content")
        home.run("check")
        told = home.run("run", "--", "id")
        run = subprocess.run(
            [linked, "--version"],
            cwd=home.path,
            env=home.environment(),
            capture_output=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    assert told.returncode == 1, "the user's own command is found as PATH has it"
    assert marks.read_text() == "id\n"
