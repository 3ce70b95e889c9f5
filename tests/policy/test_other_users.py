"""Another user of this machine, who came first: to the places of our sockets and of our cache."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcfs.cache import location
from hpcfs.cache.location import Location
from hpcfs.control import control, mountpoint
from hpcfs.laptop import status as tunnel_status
from hpcfs.model.errors import SetupError
from hpcfs.system import ownership, paths
from tests.support.command import Home, make_home

OTHER = 12345
"""A user whom nobody is. Only root, as in CI, can act as another user: without it these fail."""
PLACE = Path("/m/cluster")
LIAR = """
import os, socket, sys
path, answer, late = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
if not late: os.setuid(int({other}))
listener.bind(path)
os.chmod(path, 0o777)
if late: os.setuid(int({other}))
listener.listen()
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(answer.encode() + b"\\n")
    connection.close()
"""
UPLOADED = '{"outcome": {"files": 7, "bytes": 7}}'


@contextmanager
def liar(path: Path, answer: str = UPLOADED, *, our_file: bool = False) -> Iterator[None]:
    """A process of another user that listens there; with `our_file` at a socket file of ours."""
    program = LIAR.format(other=OTHER)
    command = [sys.executable, "-I", "-c", program, str(path), answer, "late" if our_file else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield
        finally:
            process.kill()


@pytest.fixture
def base() -> Iterator[Path]:
    """Its name is short, since names of sockets are, and others can reach it."""
    with tempfile.TemporaryDirectory(prefix="hpcfs-") as name:
        Path(name).chmod(0o755)
        yield Path(name).resolve()


@pytest.fixture
def shared_tmp(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /tmp of the test's own; and no runtime directory."""
    found = base / "tmp"
    found.mkdir()
    found.chmod(0o1777)
    monkeypatch.setattr(paths, "SHARED_TMP", found)
    monkeypatch.setattr(paths, "RUN_USER", base / "none")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("HOME", str(base / "home"))
    return found


@pytest.fixture
def squatted(shared_tmp: Path) -> Path:
    """The directory for our sockets, made by somebody else."""
    taken = paths.shared_tmp_dir()
    taken.mkdir()
    os.chown(taken, OTHER, OTHER)
    taken.chmod(0o777)
    return taken


# --- sockets --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_daemon_of_another_user_is_not_believed(squatted: Path) -> None:
    path = squatted / f"{paths.mount_id(PLACE)}.sock"
    with liar(path):
        assert paths.find_socket(PLACE) != path
        for at in (path, paths.find_socket(PLACE)):
            with pytest.raises(control.DaemonNotRunning):
                control.work(at, control.ControlRequest("sync"), lambda step: None)


def test_a_place_that_another_user_took_is_passed_over(squatted: Path) -> None:
    assert squatted not in paths.runtime_dirs()
    found = paths.socket_path(PLACE)
    assert found.is_relative_to(paths.home())
    machine = os.uname().nodename.partition(".")[0]
    assert found.parent.name == f"run-{machine}", "homes are shared between machines"
    paths.make_private(found.parent)
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(found))
        ours.listen()
        assert paths.find_socket(PLACE) == found
        ownership.connect(found, 1).close()


def test_a_link_in_place_of_the_directory_is_passed_over(shared_tmp: Path) -> None:
    paths.make_private(shared_tmp / "elsewhere")
    paths.shared_tmp_dir().symlink_to(shared_tmp / "elsewhere")
    assert paths.shared_tmp_dir() not in paths.runtime_dirs()


@pytest.mark.slow
def test_who_listens_is_asked_of_the_kernel_too(shared_tmp: Path) -> None:
    """The directory and the file are ours, and the process is not."""
    path = paths.make_private(paths.shared_tmp_dir()) / f"{paths.mount_id(PLACE)}.sock"
    with liar(path, our_file=True):
        assert ownership.is_socket(path)
        with pytest.raises(control.DaemonNotRunning):
            control.query_status(path)


def test_a_socket_in_a_directory_that_others_can_enter_is_not_used(shared_tmp: Path) -> None:
    path = paths.make_private(paths.shared_tmp_dir()) / f"{paths.mount_id(PLACE)}.sock"
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(path))
        ours.listen()
        ownership.connect(path, 1).close()
        path.parent.chmod(0o711)
        with pytest.raises(control.DaemonNotRunning):
            control.query_status(path)


@pytest.mark.slow
def test_a_tunnel_of_another_user_is_not_believed(squatted: Path) -> None:
    with liar(squatted / "tunnel-lap.sock", '{"error": "mine"}'):
        assert tunnel_status.running() == []
        with pytest.raises(tunnel_status.TunnelNotRunning):
            tunnel_status.query("lap")
        with pytest.raises(tunnel_status.TunnelNotRunning):
            tunnel_status.stop("lap")


class HomeWithTmp(Home):
    """Its commands take another directory for /tmp."""

    shared: Path

    def command(self, *arguments: str | Path) -> list[str]:
        program = (
            "import runpy, sys; from pathlib import Path; from hpcfs.system import paths;"
            f"paths.SHARED_TMP = Path({str(self.shared)!r}); paths.RUN_USER = Path('/none');"
            "runpy.run_module('tests.support.stub_daemon', run_name='__main__', alter_sys=True)"
        )
        return [sys.executable, "-c", program, *map(str, arguments)]


@pytest.mark.slow
def test_sync_says_that_nothing_is_mounted_and_a_mount_works(squatted: Path, base: Path) -> None:
    (base / "home").mkdir()
    home = HomeWithTmp(make_home(base / "home").path, {"XDG_RUNTIME_DIR": ""})
    home.shared = squatted.parent
    with liar(squatted / f"{paths.mount_id(home.mountpoint)}.sock"):
        told = home.run("sync", home.mountpoint)
        assert (told.returncode, told.stdout) == (1, ""), told.stderr
        made = home.run("mount", "login3:", home.mountpoint)
        assert made.returncode == 0, made.stderr
        try:
            assert home.run("status", home.mountpoint).returncode == 0
        finally:
            assert home.run("umount", home.mountpoint).returncode == 0


# --- the cache ------------------------------------------------------------------------------------


def _give(path: Path, mode: int = 0o777) -> Path:
    path.mkdir()
    os.chown(path, OTHER, OTHER)
    path.chmod(mode)
    return path


def test_places_that_others_took_are_passed_over(
    shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"hpcfs-{os.getuid()}"
    disks = [shared_tmp / name for name in ("linked", "foreign", "open", "free")]
    for disk in disks[:2] + disks[3:]:
        disk.mkdir()
        disk.chmod(0o1777)
    (disks[0] / own).symlink_to(_give(shared_tmp / "theirs"))
    os.chown(disks[0] / own, OTHER, OTHER, follow_symlinks=False)
    _give(disks[1] / own)
    disks[2].mkdir()
    disks[2].chmod(0o777)  # not sticky: anybody renames anything
    monkeypatch.setattr(location, "SHARED_DISKS", tuple(disks))
    assert location.local_places({})[0] == disks[3] / own


def test_a_default_that_others_can_change_is_passed_over(shared_tmp: Path) -> None:
    home = shared_tmp.parent / "home"
    home.mkdir()
    home.chmod(0o777)
    found = location.locate(None, {"HOME": str(home)})
    assert not found.directory.is_relative_to(home)
    assert found.note is not None
    assert "not safe from others" in found.note


@pytest.mark.parametrize("what", ["link", "directory", "above", "open above", "link above"])
def test_a_place_that_the_user_named_is_refused(shared_tmp: Path, what: str) -> None:
    named = shared_tmp / "named" / "cache"
    if what == "directory":
        named = _give(shared_tmp / "cache")
    elif what == "above":
        _give(shared_tmp / "named", 0o755)
    elif what == "open above":
        named.parent.mkdir()
        named.parent.chmod(0o777)
    else:
        target = _give(shared_tmp / "target")
        link = shared_tmp / "cache" if what == "link" else named.parent
        link.symlink_to(target)
        os.chown(link, OTHER, OTHER, follow_symlinks=False)
        named = link if what == "link" else named
    with pytest.raises(SetupError, match="not safe from others"):
        location.locate(named, {"HOME": str(shared_tmp)})


def test_our_own_directories_and_links_are_fine(shared_tmp: Path) -> None:
    ours = shared_tmp / "ours"
    ours.mkdir(mode=0o755)
    (shared_tmp / "link").symlink_to("ours")
    for place in (ours, ours / "new" / "cache", shared_tmp / "link" / "cache"):
        assert ownership.unsafe_reason(place) is None
        assert location.locate(place, {}).directory.is_relative_to(ours)
    made = location.prepare(Location(ours / "new" / "cache"), PLACE)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_group_of_others_may_not_write_on_the_way(shared_tmp: Path) -> None:
    ours = shared_tmp / "ours"
    ours.mkdir()
    os.chown(ours, -1, OTHER)
    ours.chmod(0o770)
    assert "others may write" in (ownership.unsafe_reason(ours / "cache") or "")


def test_links_in_a_circle_end(shared_tmp: Path) -> None:
    (shared_tmp / "one").symlink_to("two")
    (shared_tmp / "two").symlink_to("one")
    assert "without an end" in (ownership.unsafe_reason(shared_tmp / "one" / "cache") or "")


# --- the mount point ------------------------------------------------------------------------------


def test_a_mount_point_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mountpoint.check_directory(tmp_path / "real")
    with pytest.raises(SetupError, match="is a symbolic link"):
        mountpoint.check_directory(tmp_path / "link")


def test_a_mount_point_of_another_user_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is not yours"):
        mountpoint.check_directory(_give(tmp_path / "theirs"))
